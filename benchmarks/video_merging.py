r"""Quality, GMACs and time of merged frames, patches and streams in models of videos.

    python -m benchmarks.video_merging lam_clip4clip_micro.grid clip4clip_micro.grid \
        --data grid:../shared/data/grid_s1:motion
    python -m benchmarks.video_merging lam_describer_micro.grid describer_micro.grid \
        --data grid:../shared/data/grid_s1:mouth+audio
    python -m benchmarks.video_merging lam_clip4clip clip4clip --time     times one video; random weights suffice
    python -m benchmarks.video_merging --table [--time]                   prints the table of stored results

GMACs are those of the side that merging reduces, matching included: of a retrieval model, the towers and the head over
the frames of one video; of a describer, the joint encoder over one clip. A budget is a share of them with all tokens,
and each method uses its largest setting within it. Scores are of a whole split, in float32; the error of a difference
is that of its mean over the same texts or clips. Existing rows are not measured again.
"""

from __future__ import annotations

import argparse
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.data
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lamzoo
from benchmarks.methods import ALL
from benchmarks.rows import STORED, markdown, measured_on, read_rows, with_quartiles, write_rows
from lamzoo.data.captions import create_caption_dataset
from lamzoo.data.retrieval import create_retrieval_dataset
from lamzoo.data.retrieval.clips import Clips, EachFrame, pad_clips
from lamzoo.errors import ConfigError
from lamzoo.evaluation.captions.evaluate import caption_scores, describe_clips
from lamzoo.evaluation.captions.metrics import word_error_rate
from lamzoo.evaluation.retrieval.evaluate import compare, encode_texts, frames_config, join_videos
from lamzoo.evaluation.runtime import inference
from lamzoo.profiling.latency import compare_latency


@dataclass(frozen=True)
class Row:
    """The quality of one method at one budget.

    Attributes:
        model: the model.
        method: what merges: the ``"patches"`` of each frame, the ``"frames"`` of a video, the ``"streams"`` of a clip.
        share: the budget, as a share of the GMACs with all tokens.
        keep: share of the patches, or of a stream's tokens, that is left.
        frames: share of the frames that is left.
        gmacs: of the reduced side.
        metric: ``"R@1"`` from text to video, or ``"WER"``, both in percent.
        score: the metric.
        error: its standard error over texts, or clips.
        difference: to all tokens.
        difference_error: the standard error of that over the same texts, or clips.
        second: R@10 in percent from text to video, or CIDEr.
        data: data set.
        split: split of the data.
        device: device of the scores.
        torch: version of torch.
    """

    model: str
    method: str
    share: float
    keep: float
    frames: float
    gmacs: float
    metric: str
    score: float
    error: float
    difference: float
    difference_error: float
    second: float
    data: str
    split: str
    device: str
    torch: str


@dataclass(frozen=True)
class TimeRow:
    """The time of one method at one budget, of the reduced side.

    Attributes:
        model: the model.
        method: as in :class:`Row`, like the next four.
        share: likewise.
        keep: likewise.
        frames: likewise.
        gmacs: likewise.
        milliseconds: median time of one video.
        ratio: median ratio to the time with all tokens, of neighbouring runs.
        ratio_q1: first quartile of the ratio.
        ratio_q3: third quartile of the ratio.
        device: label of the device.
        threads: number of PyTorch's threads.
        torch: version of torch.
    """

    model: str
    method: str
    share: float
    keep: float
    frames: float
    gmacs: float
    milliseconds: float
    ratio: float
    ratio_q1: float
    ratio_q3: float
    device: str
    threads: int
    torch: str


class Side(nn.Module):
    """The side of a model that merging reduces, as a module of its own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        """Encodes the frames of videos, or the streams of clips."""
        return self.model.encode_video(inputs) if is_retrieval(self.model) else self.model.encode(inputs)

    @property
    def example(self) -> tuple[Any]:
        """The input of one video or clip."""
        return (self.model.example_inputs()[0],)


def is_retrieval(model: nn.Module) -> bool:
    """Returns whether a model compares texts with videos."""
    return hasattr(model, "encode_video")


def gmacs(model: nn.Module) -> float:
    """Returns the GMACs of the reduced side of a model for one video."""
    side = Side(model)
    return lamzoo.profile(side, side.example).gmacs


def reduce(model: Any, method: str, share: float, whole: float) -> bool:
    """Merges tokens or frames of a model, in place, to the largest setting within a share of ``whole`` GMACs.

    Returns:
        Whether there is one; says so where there is none.
    """
    if method == ALL:
        return True
    if method != "frames":
        try:
            lamzoo.merge_tokens(model, target_gmacs=share * whole, count_gmacs=gmacs)
        except ConfigError as error:
            print(f"{method}: {error}")
            return False
        return True
    total = model.max_frames

    def cost(frames: int) -> float:
        return gmacs(lamzoo.merge_tokens(model, keep=1, frames=frames / total))

    largest = bisect_right(range(1, total + 1), share * whole, key=cost)
    lamzoo.merge_tokens(model, keep=1, frames=max(1, largest) / total)
    return True


def settings(model: nn.Module, shares: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Yields methods and budgets."""
    yield ALL, 1.0
    for share in shares:
        for method in ("patches", "frames") if is_retrieval(model) else ("streams",):
            yield method, share


def retrieval(model: Any, data: str, split: str) -> Callable[[], tuple[Tensor, float]]:
    """Returns a function that scores a retrieval model: R@1 of each text, and R@10 of all."""
    dataset = create_retrieval_dataset(data, split)
    transform = EachFrame(timm.data.create_transform(**frames_config(model)))
    batches = list(DataLoader(Clips(dataset, model.sampling, transform), 16, collate_fn=pad_clips))
    owners = torch.as_tensor(dataset.video_of_text)

    def score() -> tuple[Tensor, float]:
        videos = [model.encode_video(frames, mask).float() for frames, mask in batches]
        texts = encode_texts(model, dataset.texts, 16)
        similarity = compare(model, texts, *join_videos(videos, [mask for _, mask in batches]))
        ranks = (similarity >= similarity.gather(1, owners.unsqueeze(1))).sum(dim=1)
        return 100.0 * (ranks == 1), 100 * float((ranks <= 10).double().mean())

    return score


def captions(model: Any, data: str, split: str) -> Callable[[], tuple[Tensor, float]]:
    """Returns a function that scores a describer: word error rate of each clip, and CIDEr of all."""
    dataset = create_caption_dataset(data, split)

    def score() -> tuple[Tensor, float]:
        written = describe_clips(model, dataset, batch_size=50, device="cpu")
        spoken = {item.id: list(item.captions) for item in dataset.items}
        # Every sentence has six words, so that the mean over clips is that over words.
        wrong = [word_error_rate({key: spoken[key]}, {key: written[key]})["WER"] for key in written]
        return torch.tensor(wrong), caption_scores(dataset, written)["CIDEr"]

    return score


def measure(
    name: str, data: str, split: str, shares: Sequence[float], done: set[tuple[str, str, float]]
) -> Iterator[Row]:
    """Scores the methods and budgets of one model that aren't done."""
    model: Any = lamzoo.create_model(name, pretrained=True).eval()
    metric, scorer = ("R@1", retrieval) if is_retrieval(model) else ("WER", captions)
    score, whole = scorer(model, data, split), gmacs(model)
    with ExitStack() as stack:
        stack.enter_context(inference(model, torch.device("cpu"), "float32", 16))
        before, _ = score()
        missing = [each for each in settings(model, shares) if (name, *each) not in done]
        for method, share in track(missing, description=name):
            if not reduce(model, method, share, whole):
                continue
            found, second = score()
            config = getattr(model, "token_reduction", lamzoo.TokenReduction(1.0))
            yield Row(
                model=name, method=method, share=share, keep=config.keep, frames=round(config.frames, 4),
                gmacs=round(gmacs(model), 4), metric=metric, score=round(float(found.mean()), 2),
                error=_error(found), difference=round(float((found - before).mean()), 2),
                difference_error=_error(found - before), second=round(second, 3),
                data=data.rpartition("/")[2], split=split, device="cpu", torch=torch.__version__,
            )  # fmt: skip
            lamzoo.remove_reduction(model)


def _error(values: Tensor) -> float:
    return round(float(values.std() / len(values) ** 0.5), 2)


def time_side(name: str, shares: Sequence[float], done: set[tuple[str, str, float]], repeats: int) -> Iterator[TimeRow]:
    """Times the methods and budgets of one model, with random weights, that aren't done."""
    with torch.device("meta"):
        counted = lamzoo.create_model(name)  # a model without numbers counts as fast as a small one
    torch.manual_seed(0)
    model, plain = (Side(lamzoo.create_model(name)).eval() for _ in range(2))
    whole = gmacs(counted)
    for method, share in settings(counted, shares):
        if (name, method, share) in done or not reduce(counted, method, share, whole):
            continue
        config = getattr(counted, "token_reduction", lamzoo.TokenReduction(1.0))
        if method != ALL:
            lamzoo.merge_tokens(model.model, keep=config.keep, frames=config.frames)
        found = compare_latency(model, plain, model.example, repeats=repeats, warmup=2)
        yield TimeRow(
            model=name, method=method, share=share, keep=config.keep, frames=round(config.frames, 4),
            gmacs=round(gmacs(counted), 4), milliseconds=round(found.model.median_ms, 2),
            ratio=round(found.ratio, 3), ratio_q1=round(found.ratio_quartiles[0], 3),
            ratio_q3=round(found.ratio_quartiles[1], 3), device=found.device, threads=found.threads,
            torch=torch.__version__,
        )  # fmt: skip
        lamzoo.remove_reduction(model.model)
        lamzoo.remove_reduction(counted)


def table(rows: Sequence[Row], times: Sequence[TimeRow] | None = None) -> str:
    """Returns the rows as Markdown.

    Args:
        rows: the rows, of models named like ``"lam_clip4clip_micro.grid"``.
        times: of models of full size, named like ``"lam_clip4clip"``. Their ratios, with quartiles, fill a column
            that is empty where a method was not timed at a budget. None for a table without the column.
    """
    heads = ["model", "merged", "GMACs", "of all tokens", "score", "to all tokens", "R@10 or CIDEr"]
    timed = {(row.model, row.method, row.share): row for row in times or ()}
    if times is not None:
        heads.append("time of the full-size model")
    lines = []
    whole = {row.model: row.gmacs for row in rows if row.method == ALL}
    for row in rows:
        cells = [
            f"`{row.model}`", _setting(row), f"{row.gmacs:.4f}", f"{row.gmacs / whole[row.model]:.1%}",
            f"{row.metric} {row.score:.2f} ± {row.error:.2f}",
            "" if row.method == ALL else f"{row.difference:+.2f} ± {row.difference_error:.2f}", f"{row.second:g}",
        ]  # fmt: skip
        if times is not None:
            found = timed.get((row.model.partition(".")[0].removesuffix("_micro"), row.method, row.share))
            cells.append(_ratio(found) if found else "")
        lines.append(cells)
    return markdown(heads, lines) + measured_on(f"{_machine(row)} (times)" for row in times or ())


def time_table(rows: Sequence[TimeRow]) -> str:
    """Returns the rows of times as Markdown."""
    lines = (
        (f"`{row.model}`", _setting(row), f"{row.gmacs:.2f}", f"{row.milliseconds:.0f}", _ratio(row), _machine(row))
        for row in rows
    )
    return markdown(("model", "merged", "GMACs", "ms", "of all tokens", "device"), lines)


def _ratio(row: TimeRow) -> str:
    return with_quartiles(row.ratio, row.ratio_q1, row.ratio_q3)


def _machine(row: TimeRow) -> str:
    return f"{row.device}, {row.threads} threads, torch {row.torch}"


def _setting(row: Row | TimeRow) -> str:
    kept = f"frames={row.frames:g}" if row.method == "frames" else f"keep={row.keep:g}"
    return row.method if row.method == ALL else f"{row.method}, {kept}"


def main() -> None:
    """Measures missing rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="retrieval models or describers")
    parser.add_argument("--data", help="data set, as for `lamzoo eval`")
    parser.add_argument("--split", default="test")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.8, 0.6, 0.49])
    parser.add_argument("--time", action="store_true", help="time the models instead, with random weights")
    parser.add_argument("--repeats", type=int, default=30, help="timed pairs of runs")
    parser.add_argument("--results", type=Path, default=STORED, help="folder of the results")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    path = args.results / ("video_merging_time.csv" if args.time else "video_merging.csv")
    rows: list[Any] = read_rows(path, TimeRow if args.time else Row)
    if not args.table and not (args.models and (args.data or args.time)):
        parser.error("give models and --data, models and --time, or --table")
    for name in [] if args.table else args.models:
        done = {(row.model, row.method, row.share) for row in rows}
        found: Iterator[Any] = (
            time_side(name, args.shares, done, args.repeats)
            if args.time
            else measure(name, args.data, args.split, args.shares, done)
        )
        for row in found:
            rows.append(row)
            write_rows(path, rows)
    print(time_table(rows) if args.time else table(rows))


if __name__ == "__main__":
    main()
