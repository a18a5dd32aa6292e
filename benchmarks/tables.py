"""Fills the tables of the README and the docs from stored results in ``benchmarks/results`` and the registry.

    python -m benchmarks.tables            rewrite the tables in README.md and docs/
    python -m benchmarks.tables --check    exit with 1 if a table is out of date

Tables are placed between ``<!-- table: NAME -->`` and ``<!-- end of table -->``. `make tables` measures first.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import lamzoo
from benchmarks import (
    breakdown,
    claims,
    exported,
    features,
    finetuning,
    fused,
    hosts,
    kernels,
    reduction_tables,
    search_index,
    significance,
    speed,
    tiles,
    video_merging,
)
from benchmarks.ablation.run import HERE
from benchmarks.ablation.table import table as ablation
from benchmarks.methods import ALIKE, ALL, MERGED, OURS, PEERS
from benchmarks.rows import ROOT, STORED, markdown, measured_on
from benchmarks.rows import read_rows as read_lines
from lamzoo.profiling.results import BenchRow, read_rows
from lamzoo.reading import read_text

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def zoo(path: Path = STORED / "zoo.csv") -> str:
    """Returns the table of models trained here, each next to its plain twin, with the cost of the masks."""
    return _benched(path, {
        "data": lambda row: (row.data or "").rpartition("/")[2], "top-1 (%)": lambda row: _number(row.value, 2),
    })  # fmt: skip


def cost(path: Path = STORED / "cost.csv") -> str:
    """Returns the cost table of models with timm's weights, next to their plain backbones."""
    return _benched(path, {"pixels": lambda row: str(row.img_size or "")})


# Rows of the README's overview: task, masked model, and the metric in its card with a heading.
_OVERVIEW = (
    ("images, CIFAR-10", "lam_vit_micro.cifar10", "top1", "top-1"),
    ("images, Tiny-ImageNet-100", "lam_vit_tiny_patch8_64.tinyimagenet100", "top1", "top-1"),
    ("images, ImageNet-1k", "lam_vit_base.augreg2_in21k_ft_in1k", "top1", "top-1"),
    ("text-video retrieval, GRID", "lam_single_clip4clip_micro.grid", "t2v_R1", "R@1"),
    ("text-video retrieval", "lam_clip4clip.openai", "t2v_R1", "R@1"),
    ("moments, GRID", "lam_qd_detr_micro.grid", "R1_07", "R1@0.7"),
    ("moments", "lam_qd_detr", "R1_07", "R1@0.7"),
    ("audio description, GRID", "lam_describer_micro.grid", "WER", "word error rate"),
    ("audio description", "lam_describer.coca_laion2b_s13b_b90k", "WER", "word error rate"),
)


def overview() -> str:
    """Returns the README's overview: a masked model per task, its score and its plain twin's, cost and weights."""
    lines = []
    for task, name, metric, heading in _OVERVIEW:
        info = lamzoo.model_info(name)
        score, twin, weights = "", "", "none, to be trained"
        if info.tag is not None:
            weights = "bundled" if info.tag.file else "download"
            if metric in info.tag.metrics:
                # A timm backbone with identity masks has the same scores as without them.
                twin = info.plain_of(info.tag)
                of_twin = info.tag if twin is None else lamzoo.model_info(twin).tag
                score = f"{heading} {info.tag.metrics[metric]:.2f} %"
                twin = f"{of_twin.metrics[metric]:.2f} %"
        lines.append((task, f"`{name}`", score, twin, _number(info.gmacs, 4), weights))
    return markdown(("task", "model", "score", "plain twin", "GMACs", "weights"), lines)


def sequences(path: Path = STORED / "sequences.csv") -> str:
    """Returns the cost table of models that read sequences of features, or frames and text."""
    return _benched(path, {}, rate="inputs/s")


def _reduced(*methods: str) -> str:
    rows = read_lines(STORED / "reduction.csv", reduction_tables.Row)
    models = {row.model for row in rows if row.method in methods}
    return reduction_tables.table([row for row in rows if row.method in (ALL, *methods) and row.model in models])


def _reduction_times(name: str = "reduction_times.csv") -> str:
    rows = read_lines(STORED / name, reduction_tables.TimeRow)
    return reduction_tables.time_table([row for row in rows if row.method in (ALL, MERGED, *PEERS)])


def _merged(metric: str) -> list[video_merging.Row]:
    rows = read_lines(STORED / "video_merging.csv", video_merging.Row)
    return [row for row in rows if row.metric == metric]


TABLES: dict[str, Callable[[], str]] = {
    "overview": overview,
    "zoo": zoo,
    "cost": cost,
    "sequences": sequences,
    "claims": claims.claims,
    "reviews": claims.reviews,
    "significance": significance.table,
    "ablation": ablation,
    "micro": lambda: ablation(HERE / "micro.toml"),
    "positions": lambda: ablation(HERE / "positions.toml"),
    "grid": lambda: ablation(HERE / "grid.toml"),
    "flickr8k": lambda: ablation(HERE / "flickr8k.toml"),
    "moments": lambda: ablation(HERE / "moments.toml"),
    "captions": lambda: ablation(HERE / "captions.toml"),
    "flickr8k_captions": lambda: ablation(HERE / "flickr8k_captions.toml"),
    "retrieval-merged": lambda: video_merging.table(
        _merged("R@1"), read_lines(STORED / "video_merging_time.csv", video_merging.TimeRow)
    ),
    "search-index": lambda: search_index.table(read_lines(search_index.RESULTS, search_index.Row)),
    "captions-merged": lambda: video_merging.table(_merged("WER")),
    "speed": lambda: speed.table(read_lines(STORED / "speed.csv", speed.Row)),
    "speed-xeon": lambda: speed.table(read_lines(STORED / "speed.xeon.csv", speed.Row)),
    "fused": lambda: fused.table(read_lines(fused.MEASURED, fused.Row)),
    "fused-gpu": lambda: fused.table(read_lines(fused.ON_GPU, fused.Row)),
    "training-steps": lambda: fused.step_table(read_lines(fused.STEPS, speed.Row)),
    "breakdown": lambda: breakdown.table(read_lines(STORED / "breakdown.csv", breakdown.Row)),
    "kernels": lambda: kernels.table(read_lines(STORED / "kernels.csv", kernels.Row)),
    "kernels-gpu": lambda: kernels.table(read_lines(STORED / "kernels.gpu.csv", kernels.Row)),
    "tiles": lambda: tiles.table(read_lines(STORED / "tiles.csv", tiles.Row)),
    "exported": lambda: exported.table(read_lines(STORED / "exported.csv", exported.Row)),
    "reduction-merged": lambda: _reduced(MERGED),
    "reduction-features": lambda: features.table(read_lines(STORED / "features.csv", features.Row)),
    "reduction-times": _reduction_times,
    "reduction-times-gpu": lambda: _reduction_times("reduction_times.gpu.csv"),
    "reduction-ahead": lambda: reduction_tables.peer_table(read_lines(STORED / "reduction.csv", reduction_tables.Row)),
    "reduction-peers": lambda: _reduced(MERGED, ALIKE, *PEERS),
    "reduction-pruned": lambda: _reduced(*(method for method in OURS if method not in (MERGED, ALIKE))),
    "reduction-trained": lambda: reduction_tables.trained_table(
        read_lines(STORED / "reduction_trained.csv", reduction_tables.TrainedRow)
    ),
    "clothing10": lambda: ablation(HERE / "clothing10.toml"),
    "finetuning": lambda: finetuning.table(finetuning.read_results()),
    "timm-coverage": lambda: hosts.coverage_table(read_lines(hosts.RESULTS, hosts.Row)),
    "timm-hosts": lambda: hosts.table(read_lines(hosts.RESULTS, hosts.Row)),
    "timm-left-out": lambda: hosts.left_out_table(read_lines(hosts.RESULTS, hosts.Row)),
}


def fill(text: str) -> str:
    """Replaces the tables of a page by those of the results; returns the page.

    Raises:
        KeyError: the page refers to an unknown table.
    """
    return _BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}", text)


def main() -> None:
    """Rewrites or checks the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is out of date")
    check = parser.parse_args().check
    for page in PAGES:
        before = read_text(page)
        after = fill(before)
        if check and after != before:
            sys.exit(f"A table of {page.relative_to(ROOT)} is out of date; run `python -m benchmarks.tables`.")
        if after != before:
            page.write_text(after, encoding="utf-8")


def _benched(path: Path, more: Mapping[str, Callable[[BenchRow], str]], rate: str = "images/s") -> str:
    """Returns results of `lamzoo bench` as a table, with extra columns between names and cost."""
    rows = _measured(path)
    names = [row.name for row in rows]
    rows.sort(key=lambda row: names.index(row.name))  # stable: the fused form follows its model
    heads = ("", *more, "params (M)", "mask params (M)", "GMACs", "mask GMACs",
             "latency (ms)", "vs. plain", rate, "vs. plain", "peak (MiB)")  # fmt: skip
    lines = (
        (f"`{row.name}`{row.label.removeprefix(row.name)}", *(cell(row) for cell in more.values()), *_cost(row))
        for row in rows
    )
    return markdown(heads, lines) + _conditions(rows)


def _measured(path: Path) -> list[BenchRow]:
    return [row for row in read_rows(path) if row.ok]


def _cost(row: BenchRow) -> list[str]:
    return [
        _number(row.params_m, 3),
        _number(row.lam_params_m, 3),
        _number(row.gmacs, 4),
        _number(row.lam_gmacs, 4),
        _range(row.latency_ms, row.latency_q1_ms, row.latency_q3_ms),
        _range(row.latency_ratio, row.latency_ratio_q1, row.latency_ratio_q3),
        _number(row.images_per_s, 0),
        _number(row.images_per_s_ratio, 2),
        _number(row.peak_mib, 0),
    ]


def _conditions(rows: Iterable[BenchRow]) -> str:
    return measured_on(
        f"{row.device}, {row.threads} threads, {row.dtype}, {row.mode}, torch {row.torch}, timm {row.timm}"
        for row in rows
    )


def _number(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:,.{decimals}f}"


def _range(median: float | None, first: float | None, third: float | None) -> str:
    return "" if median is None else f"{median:.2f} ({_number(first, 2)}-{_number(third, 2)})"


if __name__ == "__main__":
    main()
