"""Tables of docs/results/claims.md: what the paper and its reviewers say, and what was measured here.

Numbers are read from the stored results; a verdict is this project's reading of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks import kernels, reduction_tables, significance
from benchmarks.ablation.run import RESULTS, read_results
from benchmarks.rows import markdown
from benchmarks.rows import read_rows as read_lines
from lamzoo.profiling.results import BenchRow, Form, read_rows

Verdict = Literal["holds", "holds in part", "does not hold", "undecided", "not tested"]


@dataclass(frozen=True)
class Claim:
    """A line of a table.

    Attributes:
        says: the claim, or the reviewers' point.
        measured: returns what was measured here, from the stored results.
        source: page of the measurement, relative to docs/results, with its heading.
        command: the command that measures it again.
        verdict: the verdict.
    """

    says: str
    measured: Callable[[], str]
    source: str
    command: str
    verdict: Verdict


def claims() -> str:
    """Returns the table of the abstract's claims."""
    return _table("the paper says", _CLAIMS)


def reviews() -> str:
    """Returns the table of the reviewers' points."""
    return _table("reviewers say", _REVIEWS)


def _table(heading: str, lines: Sequence[Claim]) -> str:
    cells = ((each.says, f"{each.measured()} ({each.source})", each.command, each.verdict) for each in lines)
    return markdown((heading, "measured here", "by", "verdict"), cells)


def _gain(ablation: str, row: str, reference: str = "plain", score: str = "top1", decimals: int = 2) -> str:
    """Returns the difference of two rows of an ablation, mean and standard deviation over the seeds, if several."""
    values: dict[str, dict[str, float]] = {row: {}, reference: {}}
    for line in read_results(RESULTS / f"{ablation}.csv"):
        if line["row"] in values:
            values[line["row"]][line["seed"]] = float(line[score])
    seeds = sorted(values[row].keys() & values[reference].keys())
    found = [values[row][seed] - values[reference][seed] for seed in seeds]
    spread = f" ± {statistics.stdev(found):.{decimals}f}" if len(found) > 1 else " (one seed)"
    return f"{statistics.mean(found):+z.{decimals}f}{spread}"


def _score(name: str) -> float:
    value = _row("zoo", name).value
    assert value is not None
    return value


def _row(file: str, name: str, form: Form | None = None) -> BenchRow:
    (row,) = [row for row in read_rows(RESULTS / f"{file}.csv") if row.name == name and row.form == form]
    return row


def _images() -> str:
    tiny = "vit_tiny_patch8_64.tinyimagenet100"
    return (
        "Three seeds on CIFAR-10, three epochs: additive position masks "
        f"{_gain('ablation', 'add-position')} points, the paper's form from identity masks "
        f"{_gain('ablation', 'paper')}, positive multiplicative masks {_gain('ablation', 'base')}. After twelve: "
        f"{_gain('micro', 'mask')}, and in the model of three epochs, of rank 7, "
        f"{_gain('positions', 'mask-12', 'plain-12')}. At 64 pixels, after half as many updates: "
        f"{_score(f'lam_{tiny}') - _score(tiny):+.2f} (one seed). A pretrained ViT-S, fine-tuned: "
        f"{_gain('clothing10', 'mask')}"
    )


def _modalities() -> str:
    def each(ablation: str, setting: str, score: str) -> str:
        both = (_gain(ablation, f"{setting}{kind}", f"{setting}plain", score) for kind in ("single", "multi"))
        return " and ".join(both)

    return (
        "Small models from scratch, differences to plain with one mask and with a mask in each layer. Moments, R1@0.7: "
        f"sound and lips {each('moments', '', 'R1_07')}, sound {each('moments', 'audio_', 'R1_07')}, lips "
        f"{each('moments', 'video_', 'R1_07')}. Description, word errors (fewer are better): lips and sound "
        f"{each('captions', 'both_', 'WER')}, lips and damaged sound {each('captions', 'damaged_', 'WER')}, sound "
        f"{each('captions', 'audio_', 'WER')}, lips {each('captions', 'video_', 'WER')}"
    )


def _layers() -> str:
    tiny = "vit_tiny_patch8_64.tinyimagenet100"
    return (
        "Over plain, a mask in each layer and one for all: images at 64 pixels, additive "
        f"{_score(f'lam_{tiny}') - _score(tiny):+.2f} and {_score(f'lam_single_{tiny}') - _score(tiny):+.2f} points "
        f"(one seed), at 32, positive multiplicative {_gain('ablation', 'base')} and {_gain('ablation', 'single')}, "
        f"retrieval {_gain('grid', 'multi', score='t2v_R1')} and {_gain('grid', 'single', score='t2v_R1')}, moments "
        f"{_gain('moments', 'multi', score='R1_07')} and {_gain('moments', 'single', score='R1_07')} in QD-DETR, "
        f"{_gain('moments', 'detr_multi', 'detr_plain', 'R1_07')} and "
        f"{_gain('moments', 'detr_single', 'detr_plain', 'R1_07')} in Moment-DETR, photographs' R@10 "
        f"{_gain('flickr8k', 'multi', score='t2v_R10')} and {_gain('flickr8k', 'single', score='t2v_R10')}, word "
        "errors with damaged sound (fewer are better) "
        f"{_gain('captions', 'damaged_multi', 'damaged_plain', 'WER')} and "
        f"{_gain('captions', 'damaged_single', 'damaged_plain', 'WER')}"
    )


def _accuracy_at(method: str, share: float, model: str = "lam_vit_micro.cifar10_mul") -> float:
    (row,) = [
        row
        for row in read_lines(RESULTS / "reduction.csv", reduction_tables.Row)
        if (row.model, row.method, row.share) == (model, method, share)
    ]
    return row.top1


def _critical() -> str:
    def kept(model: str, share: float) -> str:
        methods = ("mask, drop", "attention, drop", "random", "stride")
        return ", ".join(f"{_accuracy_at(method, share, model):.2f}" for method in methods)

    micro, tiny = "lam_vit_micro.cifar10_mul", "lam_vit_tiny_patch8_64.tinyimagenet100"
    return (
        "Top-1 with the tokens that masks rate highest, those of the attention, random ones, and every so many: "
        f"{micro} ({_accuracy_at('all tokens', 1.0):.2f} %) at 80 % of the GMACs {kept(micro, 0.8)}, at 63 % "
        f"{kept(micro, 0.63)}, at 50 % {kept(micro, 0.5)}; {tiny} ({_accuracy_at('all tokens', 1.0, tiny):.2f} %) at "
        f"80 % {kept(tiny, 0.8)}, at 50 % {kept(tiny, 0.5)}"
    )


def _redundant() -> str:
    row = _row("zoo", "lam_vit_tiny_patch8_64.tinyimagenet100")
    merged = _accuracy_at("merged", 0.63, row.name)
    return (
        f"A mask removes no computation: it adds {row.lam_gmacs:.4f} to {(row.gmacs or 0) - (row.lam_gmacs or 0):.4f} "
        f"GMACs at 64 pixels, and {100 * ((row.latency_ratio or 0) - 1):.0f} % of the time of one image. Merging "
        f"tokens does: at 63 % of the GMACs, masks included, {merged:.2f} % instead of {row.value:.2f} %, and works as "
        "well without masks"
    )


def _kernel_cost() -> str:
    rows = read_lines(RESULTS / "kernels.csv", kernels.Row)

    def ratio(backend: str, tokens: int) -> float:
        (found,) = [
            row.ratio
            for row in rows
            if (row.backend, row.op, row.rank, row.heads, row.tokens, row.batch, row.mode, row.device)
            == (backend, "add", 9, "per-head", tokens, 1, "forward", "cpu")
        ]
        return float(found)

    return (
        "Two thin factors, folded into queries and keys of the fused kernel: a layer of 1,025 tokens takes "
        f"{ratio('sdpa', 1025):.2f} of the plain layer's time on a CPU, the dense mask {ratio('eager', 1025):.2f}; of "
        f"4,097 tokens {ratio('sdpa', 4097):.2f}"
    )


def _latency() -> str:
    def ratios(form: Form | None) -> str:
        rows = [_row("cost", f"lam_vit_{size}", form) for size in ("tiny", "small", "base")]
        return ", ".join(f"{row.latency_ratio:.2f}" for row in rows)

    return (
        f"One image at 224 pixels, ViT-Ti, -S and -B with masks: {ratios(None)} of the plain model's time, two "
        f"threads; fused {ratios('fused')}"
    )


def _control() -> str:
    return (
        f"Wider MLPs with as many parameters: images {_gain('ablation', 'mlp')} points, in a larger model after twelve "
        f"epochs {_gain('micro', 'mlp')}, retrieval {_gain('grid', 'mlp', score='t2v_R1')}, moments "
        f"{_gain('moments', 'mlp', score='R1_07')}, word errors "
        f"{_gain('captions', 'damaged_mlp', 'damaged_plain', 'WER')}; a learned relative position bias on "
        f"images {_gain('ablation', 'rel-pos')}"
    )


_ABLATION = "`python -m benchmarks.ablation.run`"
_MICRO = f"{_ABLATION}, also with `--ablation benchmarks/ablation/{{micro,positions,clothing10}}.toml`"
_VIDEO = f"{_ABLATION} with `--ablation benchmarks/ablation/{{grid,flickr8k,moments,captions}}.toml`"
_REDUCTION = "`python -m benchmarks.reduction`"

_CLAIMS = (
    Claim(
        "Masks improve accuracy", _images, "[ablation](ablation.md), [images](images.md)", _MICRO, "holds in part",
    ),
    Claim(
        "Attention is less effective with several modalities, where masks help most", _modalities,
        "[retrieval](retrieval.md), [moments](moments.md), [description](captions.md)", _VIDEO, "undecided",
    ),
    Claim(
        "A mask in each layer captures more than one mask", _layers,
        "[ablation](ablation.md), [moments](moments.md#discussion)", f"{_ABLATION}; {_VIDEO}", "undecided",
    ),
    Claim("Masks prioritise critical tokens", _critical, "[pruning](tokens.md#pruning)", _REDUCTION, "does not hold"),
    Claim(
        "Masks reduce redundant computation", _redundant, "[images](images.md), [merging](tokens.md)",
        f"`make tables`; {_REDUCTION}", "does not hold",
    ),
    Claim(
        "Results on ImageNet-1k, MSR-VTT, QVHighlights and MADv2",
        lambda: "The recipes exist; the data were not available",
        "[limitations](limitations.md#not-run)", "the first lines of each recipe in `benchmarks/recipes`", "not tested",
    ),
)  # fmt: skip

_REVIEWS = (
    Claim(
        "The mask is fixed to one length",
        lambda: "Content keys take any length; tables of position keys are resized like position embeddings. Tested on "
        "every host, image size and length",
        "[masks](../concepts/masks.md)", "`pytest tests/lam tests/adapters`", "holds",
    ),
    Claim("An N × N mask can't use fused attention", _kernel_cost, "[kernels](kernels.md)",
          "`python -m benchmarks.kernels --lengths 1025 4097 --ranks 9`", "holds"),
    Claim(
        "Negative masks flip scores",
        lambda: f"Multiplicative masks of free sign {_gain('ablation', 'free')} points, positive ones "
        f"{_gain('ablation', 'base')}: positive masks are no better",
        "[ablation](ablation.md)", _ABLATION, "holds in part",
    ),
    Claim(
        "Latency and memory are missing", _latency, "[images](images.md), [speed](speed.md)", "`make tables`", "holds",
    ),
    Claim("A control with as many parameters is missing", _control, "[ablation](ablation.md), [images](images.md)",
          f"{_MICRO}; {_VIDEO}", "holds"),
    Claim(
        "Sparse and pruning baselines are missing",
        lambda: "EViT, ToMe, PiToMe, DiffRate, ATM, random and stride, on the same weights at the same GMACs: pruning "
        "by masks is behind the best of them in most cells; merging is clearly ahead in less than half of those on "
        "CIFAR-10, on which it was tuned, and level on Tiny-ImageNet-100, or behind",
        "[token reduction](tokens.md#is-it-ahead-of-other-methods)", _REDUCTION, "holds",
    ),
    Claim(
        "Significance is missing",
        lambda: f"Three to six seeds in most tables, differences seed by seed: {significance.summary()}. The image "
        "models at 64 pixels have one seed",
        "[below](#significance)", "`python -m benchmarks.significance`", "holds",
    ),
)  # fmt: skip
