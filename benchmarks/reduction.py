"""Quality and time of token reductions at equal budgets: merging and pruning of this project, and their peers.

    python -m benchmarks.reduction                         measures what benchmarks/results/reduction.csv lacks
    python -m benchmarks.reduction --only ToMe --models vit_micro.cifar10 --shares 0.63
    python -m benchmarks.reduction --times                 the same for benchmarks/results/reduction_times.csv
    python -m benchmarks.reduction --table                 prints the tables of stored results
    python -m benchmarks.reduction --figure FILE.svg       draws the figure

A budget is a share of the plain twin's GMACs. Every method takes its largest setting within the budget, and masks,
scoring and matching count towards it. Peers run on the masked model and on its plain twin. Rows of quality are the same
on any machine up to rounding, and take some three hours of one core, a third of them for DiffRate's searches; rows of
time need a quiet machine, and leave out ATM and DiffRate, whose settings depend on images. Existing rows are not
measured again, unless ``--again`` is given. On a GPU:

    python -m benchmarks.reduction --times --device cuda --dtype bfloat16 --graphs --images 1 128 --threads 1 \
        --models lam_vit_base timm/vit_base_patch16_224 --only "all tokens" merged ToMe \
        --time-results benchmarks/results/reduction_times.gpu.csv

A folder with a trained model takes data, twin and stages of the model it was trained from, to which its rows give the
difference; recipes name these commands. Its own reduction is left out, and every method is measured on its weights:

    python -m benchmarks.reduction --models local-dir:runs/merged_10.cifar10/model --like lam_vit_micro.cifar10_mul \
        --only "all tokens" merged ToMe --shares 0.63 --results benchmarks/results/reduction_trained.csv
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import lamzoo
from benchmarks.methods import ALIKE, ALL, METHODS, OURS, Samples
from benchmarks.reduction_figure import DRAWN, draw
from benchmarks.reduction_tables import (
    AnyRow,
    Row,
    TimeRow,
    TrainedRow,
    best_peer,
    best_variants,
    peer_table,
    table,
    time_table,
    trained_table,
)
from benchmarks.rows import ROOT, STORED, read_rows, write_rows
from lamzoo.data import create_dataset
from lamzoo.data.arrays import read_npy
from lamzoo.data.json_files import read_json
from lamzoo.data.trained import RECIPE_NAME
from lamzoo.evaluation.resume import weights_sha256
from lamzoo.evaluation.runtime import inference
from lamzoo.profiling.inputs import as_arguments, default_input, image_config, image_mode
from lamzoo.profiling.latency import compare_latency, device_label
from lamzoo.registry.catalog import model_ref
from lamzoo.report.mpl import encode

RESULTS = STORED / "reduction.csv"
TIMES = STORED / "reduction_times.csv"
SHARES = (0.9, 0.8, 0.7, 0.63, 0.5)
THREADS = (1, 2)  # of PyTorch, for rows of time
BATCHES = (1, 16)  # images, likewise
EAGER, GRAPH = "", "CUDA graph"  # modes, likewise
CPU = torch.device("cpu")
_BATCH = 100  # images in a batch of the quality rows
_SCORED, _TRAINING = 500, 128  # images for methods that need some to find their setting


@dataclass(frozen=True)
class Subject:
    """A model whose tokens are reduced.

    Attributes:
        model: its name.
        plain: its plain twin, whose GMACs and time are 1.
        data: folder of the data set that scores it, below ``--data``; empty for random weights, which are only timed.
        split: split of the data.
        at: layers after which pruning and selection reduce tokens, from 0.
        shares: its budgets.
        start: the model that it was trained from; None for published weights.
    """

    model: str
    plain: str
    data: str
    split: str
    at: tuple[int, ...]
    shares: tuple[float, ...] = SHARES
    start: str | None = None


_TINY, _MICRO = "vit_tiny_patch8_64.tinyimagenet100", "vit_micro.cifar10"
_EARLIER = "vit_micro.cifar10_mul"  # from which the trained models of reduction_trained.csv started
SUBJECTS = (
    Subject(f"lam_{_TINY}", _TINY, "tinyimagenet100", "val", (3, 6, 9)),
    Subject(_TINY, _TINY, "tinyimagenet100", "val", (3, 6, 9)),
    Subject(f"lam_{_MICRO}", _MICRO, "cifar10", "test", (0, 1, 2)),
    Subject(_MICRO, _MICRO, "cifar10", "test", (0, 1, 2)),
    Subject(f"lam_{_EARLIER}", _EARLIER, "cifar10", "test", (0, 1, 2)),
    Subject(_EARLIER, _EARLIER, "cifar10", "test", (0, 1, 2)),
)
#: Timed with random weights, at one budget.
TIMED_SUBJECTS = tuple(
    Subject(model, "timm/vit_base_patch16_224", "", "", (3, 6, 9), (0.63,))
    for model in ("lam_vit_base", "timm/vit_base_patch16_224")
)


@dataclass(frozen=True)
class Images:
    """A split of a data set, as a model reads it.

    Attributes:
        pixels: preprocessed, ``(images, C, H, W)``, float32.
        labels: int64 ``(images,)``.
    """

    pixels: Tensor
    labels: Tensor

    @classmethod
    def load(cls, model: nn.Module, spec: str, split: str, limit: int | None = None) -> Images:
        """Decodes a split with timm's evaluation transform for the model; with ``limit``, so many, evenly spread."""
        dataset, config = copy.copy(create_dataset(spec, split)), image_config(model)
        dataset.mode = image_mode(config)
        dataset.transform = timm.data.create_transform(**config, is_training=False)
        count = len(dataset) if limit is None else min(limit, len(dataset))
        indices = [place * len(dataset) // count for place in range(count)]
        pixels, labels = zip(*(dataset[index] for index in indices), strict=True)
        return cls(torch.stack(pixels), torch.tensor(labels))


def logits_of(model: nn.Module, images: Images) -> Tensor:
    """Returns the logits of all images, ``(images, classes)``, float32 on the CPU."""
    device = next(model.parameters()).device
    with inference(model, device, "float32", _BATCH):
        return torch.cat([model(batch.to(device)).float().cpu() for batch in images.pixels.split(_BATCH)])


def paired_difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Difference of two accuracies on the same images, and its standard error over the images, in points.

    Args:
        ours: bool ``(images,)``, whether each prediction is correct.
        theirs: the same of the other model.
    """
    differences = ours.double() - theirs.double()
    return 100 * float(differences.mean()), 100 * float(differences.std()) / math.sqrt(len(differences))


def kl_divergence(logits: Tensor, reference: Tensor) -> float:
    """Mean over images of KL(reference || logits) in nats, of the softmax of ``(images, classes)``."""
    mine, whole = (each.double().log_softmax(dim=1) for each in (logits, reference))
    return float(F.kl_div(mine, whole, reduction="batchmean", log_target=True))


def measure(
    subject: Subject,
    model: nn.Module,
    method: str,
    variant: str | None,
    share: float,
    images: Images,
    reference: Tensor,
    samples: Samples | None = None,
) -> tuple[Row, Tensor] | None:
    """Measures the quality of one method at one budget.

    Args:
        subject: what is reduced.
        model: the subject's model.
        method: a key of :data:`METHODS`.
        variant: one of those that the model allows.
        share: the budget.
        images: what scores it.
        reference: the model's logits with all tokens.
        samples: for methods that need some to find their setting.

    Returns:
        The row and the predictions, int64 ``(images,)``; None if no setting of the method meets the budget.
    """
    budget = math.inf if method == ALL else share * _all_gmacs(subject.plain)
    with METHODS[method](model)[variant](model, budget, subject.at, samples) as setting:
        if setting is None:
            return None
        logits = reference if method == ALL else logits_of(model, images)
    predictions, whole = logits.argmax(dim=1), reference.argmax(dim=1)
    correct = predictions == images.labels
    difference, error = paired_difference(correct, whole == images.labels)
    first = next(model.parameters())
    row = Row(
        model=subject.model, plain=subject.plain, method=method, variant=variant, share=share, setting=setting.text,
        gmacs=round(setting.gmacs, 6), top1=round(_percent(correct), 2), difference=round(difference, 2),
        difference_se=round(error, 2), agreement=round(_percent(predictions == whole), 2),
        kl=round(kl_divergence(logits, reference), 4), peer=None, ahead=None, ahead_se=None, data=subject.data,
        split=subject.split, images=len(correct), device=device_label(first.device), threads=torch.get_num_threads(),
        dtype=str(first.dtype).removeprefix("torch."), torch=torch.__version__,
    )  # fmt: skip
    return row, predictions


def _percent(hits: Tensor) -> float:
    return 100 * float(hits.double().mean())


@cache
def _all_gmacs(name: str) -> float:
    return lamzoo.profile(lamzoo.remove_reduction(lamzoo.create_model(name))).gmacs


def _create(name: str, *, pretrained: bool) -> Any:
    torch.manual_seed(0)
    model = lamzoo.create_model(name, pretrained=pretrained).eval()
    return lamzoo.remove_reduction(model)  # weights trained with pruning have their own setting


def against_peers(rows: Sequence[AnyRow], correct: Callable[[Row], Tensor | None]) -> list[AnyRow]:
    """Completes the rows of this project's methods by the difference to the best peer.

    Args:
        rows: rows of quality.
        correct: whether each image's prediction was correct, bool ``(images,)``; None where predictions were not kept,
            which leaves a row as it is, or without a peer if another one is the best by now.
    """
    completed = []
    for row in rows:
        peer = best_peer(rows, row.contest) if row.method in OURS else None
        if peer is not None:
            name = f"{peer.method}, {peer.variant}" if peer.variant else peer.method
            ours, theirs = correct(row), correct(peer)
            if ours is not None and theirs is not None:
                ahead, error = paired_difference(ours, theirs)
                row = replace(row, peer=name, ahead=round(ahead, 2), ahead_se=round(error, 2))
            elif row.peer != name:
                row = replace(row, peer=None, ahead=None, ahead_se=None)
        completed.append(row)
    return completed


def measure_all(
    subjects: Iterable[Subject],
    methods: Collection[str],
    data: str,
    path: Path,
    kept: Path,
    device: torch.device,
    *,
    again: bool = False,
) -> None:
    """Measures the rows of quality that a results file lacks; keeps each row's predictions in a folder.

    Args:
        subjects: what is reduced.
        methods: keys of :data:`METHODS`.
        data: prefix of the data sets' folders, as ``npz:../shared/data/``.
        path: results file.
        kept: folder of predictions, for differences to the best peer.
        device: a torch device.
        again: whether to measure existing rows again.
    """
    subjects = list(subjects)
    kind: type[Row] = TrainedRow if any(subject.start for subject in subjects) else Row
    rows = read_rows(path, kind)
    for subject in subjects:
        model = _create(subject.model, pretrained=True).to(device)
        wanted = [
            (method, variant, share)
            for share, method in itertools.product((1.0, *subject.shares), methods)
            for variant in METHODS[method](model)
            if (method == ALL) == (share == 1.0)
        ]
        done = set() if again else {row.key for row in rows}
        wanted = [each for each in wanted if (subject.model, *each) not in done]
        if wanted:
            kept.mkdir(parents=True, exist_ok=True)
            images = Images.load(model, data + subject.data, subject.split)
            np.save(kept / f"{_slug(subject.data, subject.split)}.labels.npy", images.labels.numpy())
            reference = _kept_logits(kept, subject, model, images)
            training = Images.load(model, data + subject.data, "train", _TRAINING)
            samples = Samples(images.pixels[:: max(1, len(images.pixels) // _SCORED)], training.pixels)
            if subject.start is not None:
                start = replace(subject, model=subject.start)
                before = _kept_logits(kept, start, _create(subject.start, pretrained=True).to(device), images)
        for method, variant, share in track(wanted, description=subject.model):
            measured = measure(subject, model, method, variant, share, images, reference, samples)
            if measured is None:
                print(f"No setting of {method} meets {share:.0%} of the GMACs on {subject.model}.")
                continue
            row, predictions = measured
            if subject.start is not None:
                row = _trained(subject, row, predictions == images.labels, before.argmax(dim=1) == images.labels)
            np.save(kept / f"{_slug(*row.key)}.npy", predictions.numpy().astype(np.int16))
            rows = against_peers([*(each for each in rows if each.key != row.key), row], partial(_kept_correct, kept))
            rows.sort(key=partial(_order, [each.model for each in rows]))
            write_rows(path, rows)


def _trained(subject: Subject, row: Row, correct: Tensor, before: Tensor) -> TrainedRow:
    """Completes a row by the training of its weights; of each image, whether it was correct now and before."""
    gain, error = paired_difference(correct, before)
    training, epochs = training_of(subject)
    return TrainedRow(
        **vars(row), start=subject.start, training=training, epochs=epochs, gain=round(gain, 2), gain_se=round(error, 2)
    )


def training_of(subject: Subject) -> tuple[str, int]:
    """Reads from the run of a trained model which tokens it was trained with, and for how many epochs.

    Raises:
        LamzooError: there is no such run, or it started from another model.
    """
    folder = model_ref(subject.model).path or Path(subject.model)
    paths = [place / RECIPE_NAME for place in (folder, folder.parent)]
    recipe = read_json(next((path for path in paths if path.is_file()), paths[-1]))
    if recipe["model"]["name"] != subject.start:
        raise lamzoo.LamzooError(
            f"{subject.model} was trained from {recipe['model']['name']}, and not from {subject.start}; name that one "
            "with --like."
        )
    epochs = recipe["schedule"]["epochs"] + recipe["schedule"]["cooldown_epochs"]
    section = recipe.get("peer") or recipe.get("reduction") or recipe.get("prune") or {"target_gmacs": math.inf}
    name = section.get("method", "prune")
    name = {"merge": "merged", "prune": f"pruned, {section.get('training')}"}.get(name, name)
    target = section.get("target_gmacs")
    if target is None:
        return ", ".join([name, *(f"{key}={section[key]}" for key in ("keep", "r") if key in section)]), epochs
    reduces = target < _all_gmacs(subject.start)
    return f"{name}, {target / _all_gmacs(subject.plain):.0%}" if reduces else ALL, epochs


def _order(models: Sequence[str], row: Row | TimeRow) -> tuple[int, int, int, float]:
    """Sorts rows by model, method and budget; models other than those of the benchmark stay in their order."""
    known = [subject.model for subject in SUBJECTS]
    model = known.index(row.model) if row.model in known else len(known)
    return model, models.index(row.model), list(METHODS).index(row.method), -row.share


def _kept_correct(kept: Path, row: Row) -> Tensor | None:
    predictions, labels = (kept / f"{name}.npy" for name in (_slug(*row.key), f"{_slug(row.data, row.split)}.labels"))
    if not (predictions.exists() and labels.exists()):
        return None
    return torch.from_numpy(read_npy(predictions) == read_npy(labels))


def _kept_logits(kept: Path, subject: Subject, model: nn.Module, images: Images) -> Tensor:
    """Returns the logits with all tokens, computed once for the same weights."""
    path = kept / f"{_slug(subject.model, subject.split, weights_sha256(model)[:12])}.logits.npy"
    if not path.exists():
        np.save(path, logits_of(model, images).numpy())
    return torch.from_numpy(read_npy(path))


def _slug(*parts: str | float | None) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(str(part) for part in parts if part is not None))


def measure_times(
    subject: Subject,
    methods: Collection[str],
    quality: Sequence[Row],
    done: Collection[TimeRow],
    pairs: int,
    threads: Sequence[int] = THREADS,
    batches: Sequence[int] = BATCHES,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    modes: Sequence[str] = (EAGER,),
) -> Iterator[TimeRow]:
    """Times the methods on one model, alternating with the plain twin.

    Args:
        subject: what is reduced.
        methods: keys of :data:`METHODS`.
        quality: rows of quality, which choose the variant.
        done: existing rows, which are not measured again.
        pairs: timed pairs of one image; a quarter as many for several.
        threads: numbers of PyTorch's threads, each of which has rows of its own.
        batches: numbers of images.
        device: of the models.
        dtype: of weights and images.
        modes: how the models run: :data:`EAGER`, :data:`GRAPH` or both.
    """
    here = device_label(device), str(dtype).removeprefix("torch.")
    same = [row for row in done if (row.device, row.dtype) == here]
    known = {(row.model, row.method, row.share, row.images, row.threads, row.mode) for row in same}
    trained = bool(subject.data)
    model, plain = (_create(name, pretrained=trained) for name in (subject.model, subject.plain))
    (image,) = as_arguments(default_input(plain))
    for share, method in itertools.product((1.0, *subject.shares), methods):
        variants = METHODS[method](model)
        if (method == ALL) != (share == 1.0) or not variants:
            continue
        scored = [row for row in quality if (row.model, row.method, row.share) == (subject.model, method, share)]
        variant = max(scored, key=lambda row: row.top1).variant if scored else next(iter(variants))
        budget = math.inf if method == ALL else share * _all_gmacs(subject.plain)
        wanted = [
            each
            for each in itertools.product(batches, threads, modes)
            if (subject.model, method, share, *each) not in known
        ]
        if not wanted:
            continue
        with variants[variant](model, budget, subject.at, None) as setting:
            if setting is None:
                continue
            for each in (model, plain):
                each.to(device, dtype)
            for images, count, mode in wanted:
                batch = image.to(device, dtype).repeat(images, 1, 1, 1)
                repeats = pairs if images == 1 else max(2, pairs // 4)
                with _threads(count):
                    timed = [Replayed(each, batch) if mode == GRAPH else each for each in (model, plain)]
                    found = compare_latency(timed[0], timed[1], batch, repeats)
                yield TimeRow(
                    model=subject.model, plain=subject.plain, method=method, variant=variant, share=share,
                    setting=setting.text, gmacs=round(setting.gmacs, 6), images=images, ratio=round(found.ratio, 3),
                    ratio_q1=round(found.ratio_quartiles[0], 3), ratio_q3=round(found.ratio_quartiles[1], 3),
                    ms=round(found.model.median_ms, 2), plain_ms=round(found.baseline.median_ms, 2),
                    pairs=found.repeats, device=found.device, threads=found.threads, dtype=found.dtype,
                    torch=torch.__version__, mode=mode,
                )  # fmt: skip
        for each in (model, plain):
            each.to(CPU, torch.float32)  # for the next setting


class Replayed(nn.Module):
    """A model whose forward pass on a batch is recorded in a CUDA graph, and replayed without launching its kernels.

    Args:
        model: the model, on a GPU.
        batch: the images of every call, ``(B, C, H, W)``.
    """

    def __init__(self, model: nn.Module, batch: Tensor) -> None:
        super().__init__()
        self.model, self.graph = model.eval(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # as the documentation of torch.cuda.graph asks for
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode():
            with torch.cuda.stream(stream):
                for _ in range(3):
                    model(batch)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph):
                self.out = model(batch)

    def forward(self, batch: Tensor) -> Tensor:
        """Returns the scores ``(B, classes)`` of the batch that was recorded."""
        self.graph.replay()
        return self.out


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> None:
    """Measures missing rows and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = {subject.model: subject for subject in (*SUBJECTS, *TIMED_SUBJECTS)}
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="by default all: " + ", ".join(named))
    parser.add_argument(
        "--like", choices=[subject.model for subject in SUBJECTS], help="data, twin and stages of MODEL"
    )
    parser.add_argument("--only", nargs="+", metavar="METHOD", choices=list(METHODS), help="by default all")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--data", default="npz:../shared/data/", help="prefix of the data sets' folders")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--kept", type=Path, default=ROOT / "runs" / "reduction", help="folder of predictions")
    parser.add_argument("--again", action="store_true", help="measure existing rows of quality again")
    parser.add_argument("--times", action="store_true", help="measure time instead of quality")
    parser.add_argument("--time-results", type=Path, default=TIMES)
    parser.add_argument("--pairs", type=int, default=40, help="timed pairs of one image")
    parser.add_argument("--threads", nargs="+", type=int, default=THREADS, help="for rows of time")
    parser.add_argument("--images", nargs="+", type=int, default=BATCHES, help="for rows of time: images of a batch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="likewise")
    parser.add_argument("--graphs", action="store_true", help="likewise: time replays of CUDA graphs, too")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--figure", type=Path, metavar="FILE.svg", help="draw stored results without measuring")
    args = parser.parse_args()
    if args.figure:
        stored = [row for row in best_variants(read_rows(args.results, Row)) if row.method in DRAWN]
        if not stored:
            parser.error(f"{args.results} has no rows to draw; measure some first, without --figure")
        args.figure.write_bytes(encode(draw(stored), "svg"))
        return
    methods = args.only or [method for method in METHODS if not (args.times and method == ALIKE)]
    models = args.models or [subject.model for subject in (*SUBJECTS, *(TIMED_SUBJECTS if args.times else ()))]
    unknown = sorted(set(models) - set(named))
    if unknown and not args.like:
        parser.error(f"{', '.join(unknown)}: no model of this benchmark; say with --like which one it was trained from")
    subjects = [
        named[model] if model in named else replace(named[args.like], model=model, start=args.like) for model in models
    ]
    subjects = [
        replace(each, shares=tuple(share for share in each.shares if share in args.shares)) for each in subjects
    ]
    if args.times and not args.table:
        times = read_rows(args.time_results, TimeRow)
        for subject in subjects:
            quality = read_rows(args.results, Row)
            for row in measure_times(
                subject, methods, quality, times, args.pairs, args.threads, args.images, torch.device(args.device),
                getattr(torch, args.dtype), (EAGER, GRAPH) if args.graphs else (EAGER,),
            ):  # fmt: skip
                times.append(row)
                write_rows(args.time_results, times)
    elif not args.table:
        scored = [subject for subject in subjects if subject.data]
        measure_all(scored, methods, args.data, args.results, args.kept, torch.device(args.device), again=args.again)
    rows = read_rows(args.results, TrainedRow)
    if any(row.start for row in rows):
        print(trained_table(rows))
    else:
        print(table(rows), peer_table(rows), sep="\n")
    if args.times or args.table:
        print(time_table(read_rows(args.time_results, TimeRow)))


if __name__ == "__main__":
    main()
