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
measured again, unless ``--again`` is given.

A folder with a trained model takes data, twin and stages of the model it was trained from, to which its rows give the
difference; recipes name these commands. Its own reduction is left out, and every method is measured on its weights:

    python -m benchmarks.reduction --models local-dir:runs/merged_10.cifar10/model --like lam_vit_micro.cifar10 \
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
from typing import Any, TypeVar

import numpy as np
import timm.data
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import lamzoo
from benchmarks.methods import ALL, METHODS, OURS, PEERS, Samples
from benchmarks.reduction_figure import DRAWN, draw
from benchmarks.rows import measured_on, read_rows, with_quartiles, write_rows
from lamzoo.data import create_dataset
from lamzoo.data.arrays import read_npy
from lamzoo.data.json_files import read_json
from lamzoo.data.trained import RECIPE_NAME
from lamzoo.evaluation.resume import weights_sha256
from lamzoo.evaluation.runtime import inference
from lamzoo.profiling.inputs import as_arguments, default_input, image_config, image_mode
from lamzoo.profiling.latency import compare_latency, device_label
from lamzoo.registry.catalog import model_ref
from lamzoo.report.compare.plots import encode

AnyRow = TypeVar("AnyRow", bound="Row")
AnyTable = TypeVar("AnyTable", bound="Row | TimeRow")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reduction.csv"
TIMES = ROOT / "benchmarks" / "results" / "reduction_times.csv"
SHARES = (0.9, 0.8, 0.7, 0.63, 0.5)
THREADS = (1, 2)  # of PyTorch, for rows of time
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
SUBJECTS = (
    Subject(f"lam_{_TINY}", _TINY, "tinyimagenet100", "val", (3, 6, 9)),
    Subject(_TINY, _TINY, "tinyimagenet100", "val", (3, 6, 9)),
    Subject(f"lam_{_MICRO}", _MICRO, "cifar10", "test", (0, 1, 2)),
    Subject(_MICRO, _MICRO, "cifar10", "test", (0, 1, 2)),
)
#: Timed with random weights, at one budget.
TIMED_SUBJECTS = tuple(
    Subject(model, "timm/vit_base_patch16_224", "", "", (3, 6, 9), (0.63,))
    for model in ("lam_vit_base", "timm/vit_base_patch16_224")
)


@dataclass(frozen=True)
class Row:
    """Quality of one method at one budget.

    Attributes:
        model: the model whose tokens are reduced.
        plain: its plain twin, whose GMACs are 1.
        method: the method.
        variant: of the method, if it has several.
        share: the budget, as a share of the twin's GMACs.
        setting: the largest setting within the budget.
        gmacs: GMACs of one image at this setting.
        top1: top-1 accuracy in percent.
        difference: of top-1 to that with all tokens, in points.
        difference_se: standard error of the difference, paired over images.
        agreement: percentage of images with the same prediction as with all tokens.
        kl: mean KL divergence of the output from that with all tokens, in nats.
        peer: the best peer on the same weights at the same budget; for methods of this project.
        ahead: difference of top-1 to that peer, in points.
        ahead_se: its standard error, paired over images.
        data: data set.
        split: split of the data.
        images: number of images.
        device: label of the device.
        threads: number of PyTorch's threads.
        dtype: of weights and activations.
        torch: version of torch.
    """

    model: str
    plain: str
    method: str
    variant: str | None
    share: float
    setting: str
    gmacs: float
    top1: float
    difference: float | None
    difference_se: float | None
    agreement: float | None
    kl: float | None
    peer: str | None
    ahead: float | None
    ahead_se: float | None
    data: str
    split: str
    images: int
    device: str
    threads: int
    dtype: str
    torch: str

    @property
    def key(self) -> tuple[str, str, str | None, float]:
        """What tells the row from others: model, method, variant and budget."""
        return self.model, self.method, self.variant, self.share

    @property
    def contest(self) -> tuple[str | int | float | None, ...]:
        """What rows have in common whose methods are compared: the weights and the budget."""
        return self.model, self.share


@dataclass(frozen=True)
class TrainedRow(Row):
    """Quality of one method at one budget, on weights that were trained further.

    The peer that it is compared with is the best one on all weights that were trained from the same model for as many
    epochs.

    Attributes:
        start: the model that they were trained from; None, like all that follows, in rows without this record.
        training: the tokens that they were trained with.
        epochs: of this training.
        gain: difference of top-1 to the model that they were trained from, with all of its tokens, in points.
        gain_se: standard error of the gain, paired over images.
    """

    start: str | None = None
    training: str | None = None
    epochs: int | None = None
    gain: float | None = None
    gain_se: float | None = None

    @property
    def contest(self) -> tuple[str | int | float | None, ...]:
        """The model that the weights were trained from, the epochs and the budget."""
        return super().contest if self.start is None else (self.start, self.epochs, self.share)


@dataclass(frozen=True)
class TimeRow:
    """Time of one method at one budget, alternating with the plain twin with all tokens.

    Attributes:
        model: the model whose tokens are reduced.
        plain: its plain twin, whose GMACs and time are 1.
        method: the method.
        variant: of the method: the one with the highest accuracy in the rows of quality, else the first.
        share: the budget, as a share of the twin's GMACs.
        setting: the largest setting within the budget.
        gmacs: GMACs of one image at this setting.
        images: batch size.
        ratio: median ratio of times to the twin, over neighbouring runs.
        ratio_q1: first quartile of the ratio.
        ratio_q3: third quartile of the ratio.
        ms: median time in milliseconds.
        plain_ms: median time of the twin.
        pairs: number of timed pairs.
        device: label of the device.
        threads: number of PyTorch's threads.
        dtype: of weights and activations.
        torch: version of torch.
    """

    model: str
    plain: str
    method: str
    variant: str | None
    share: float
    setting: str
    gmacs: float
    images: int
    ratio: float
    ratio_q1: float
    ratio_q3: float
    ms: float
    plain_ms: float
    pairs: int
    device: str
    threads: int
    dtype: str
    torch: str


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


def best_peer(rows: Iterable[Row], contest: tuple[str | int | float | None, ...]) -> Row | None:
    """Returns the row of the peer with the highest accuracy in a contest (:attr:`Row.contest`), if there is one."""
    peers = [row for row in rows if row.contest == contest and row.method in PEERS]
    return max(peers, key=lambda row: row.top1, default=None)


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
) -> Iterator[TimeRow]:
    """Times the methods on one model at 1 and 16 images, alternating with the plain twin.

    Args:
        subject: what is reduced.
        methods: keys of :data:`METHODS`.
        quality: rows of quality, which choose the variant.
        done: existing rows, which are not measured again.
        pairs: timed pairs of one image; a quarter as many for 16 images.
        threads: numbers of PyTorch's threads, each of which has rows of its own.
    """
    known = {(row.model, row.method, row.share, row.images, row.threads) for row in done}
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
            each for each in itertools.product((1, 16), threads) if (subject.model, method, share, *each) not in known
        ]
        if not wanted:
            continue
        with variants[variant](model, budget, subject.at, None) as setting:
            if setting is None:
                continue
            for images, count in wanted:
                with _threads(count):
                    found = compare_latency(
                        model,
                        plain,
                        image.repeat(images, 1, 1, 1),
                        repeats=pairs if images == 1 else max(2, pairs // 4),
                    )
                yield TimeRow(
                    model=subject.model, plain=subject.plain, method=method, variant=variant, share=share,
                    setting=setting.text, gmacs=round(setting.gmacs, 6), images=images, ratio=round(found.ratio, 3),
                    ratio_q1=round(found.ratio_quartiles[0], 3), ratio_q3=round(found.ratio_quartiles[1], 3),
                    ms=round(found.model.median_ms, 2), plain_ms=round(found.baseline.median_ms, 2),
                    pairs=found.repeats, device=found.device, threads=found.threads, dtype=found.dtype,
                    torch=torch.__version__,
                )  # fmt: skip


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def best_variants(rows: Iterable[AnyRow]) -> list[AnyRow]:
    """Returns one row for each model, method and budget: that of the variant with the highest accuracy."""
    best: dict[tuple[str, str, float], AnyRow] = {}
    for row in rows:
        at = (row.model, row.method, row.share)
        if at not in best or row.top1 > best[at].top1:
            best[at] = row
    return list(best.values())


def table(rows: Sequence[Row]) -> str:
    """Returns the rows of quality as Markdown: a line per model and method, a column per budget.

    Cells are top-1, its difference to all tokens with the standard error, agreement and KL divergence. Beside the model
    is top-1 with all tokens, which has a line only if there are no other rows of the model.
    """
    rows = best_variants(rows)
    whole = {row.model: row for row in rows if row.method == ALL}
    reduced = {row.model for row in rows if row.method != ALL}

    def line(row: Row) -> tuple[str, ...]:
        beside = f" ({whole[row.model].top1:.2f})" if row.model in reduced & whole.keys() else ""
        return f"`{row.model}`{beside}", row.method

    shown = [row for row in rows if row.method != ALL or row.model not in reduced]
    return _table(shown, ["model (all tokens)", "tokens"], line, _budget, _cell) + _conditions(rows)


def _conditions(rows: Iterable[Row]) -> str:
    return measured_on(
        f"{row.data}, {row.split} split, {row.images:,} images; {row.device}, {row.dtype}, torch {row.torch}"
        for row in rows
    )


def _budget(row: Row) -> tuple[Any, str]:
    return -row.share, f"{row.share:.0%} of the GMACs"


def _cell(row: Row) -> str:
    if row.kl is None or row.method == ALL:
        return f"{row.top1:.2f}"
    return f"{row.top1:.2f} ({row.difference:+.2f} ± {row.difference_se:.2f}, {row.agreement:.1f}, {row.kl:.3f})"


def trained_table(rows: Sequence[TrainedRow]) -> str:
    """Returns the rows of trained weights as Markdown: a line per model, training and method, a column per budget.

    Cells are top-1 and its difference to the model that the weights were trained from, with all of its tokens.
    """

    def line(row: TrainedRow) -> tuple[str, ...]:
        if row.start is None:  # without a record of the training: the name of the run
            return f"`{row.model.removeprefix('local-dir:runs/').removesuffix('/model')}`", "", "", row.method
        return f"`{row.start}`", row.training or "", str(row.epochs or ""), row.method

    def cell(row: TrainedRow) -> str:
        return f"{row.top1:.2f}" if row.gain is None else f"{row.top1:.2f} ({row.gain:+.2f} ± {row.gain_se:.2f})"

    heads = ["model", "trained with", "epochs", "tokens"]
    return _table(best_variants(rows), heads, line, _budget, cell) + _conditions(rows)


def peer_table(rows: Sequence[Row]) -> str:
    """Returns the difference of merging to the best peer as Markdown: a line per model, a column per budget.

    Cells are the difference of top-1 in points, its standard error, and the peer. A sentence below counts them.
    """
    compared = [row for row in rows if row.method == "merged" and row.peer is not None]

    def cell(row: Row) -> str:
        return f"{row.ahead:+.2f} ± {row.ahead_se:.2f} ({row.peer.partition(',')[0] if row.peer else ''})"

    lines = _table(compared, ["model"], lambda row: (f"`{row.model}`",), _budget, cell)
    images = (f"{row.data}, {row.split} split, {row.images:,} images" for row in compared)
    return lines + _summary(compared, rows) + measured_on(images)


def _summary(compared: Sequence[Row], rows: Sequence[Row]) -> str:
    """Says how often merging is ahead of the best peer, and names the budgets at which it is behind."""
    if not compared:
        return ""
    errors = [(row, row.ahead or 0.0, row.ahead_se or 0.0) for row in compared]
    ahead = sum(difference > error for _, difference, error in errors)
    behind = [f"`{row.model}` at {row.share:.0%}" for row, difference, error in errors if difference < -error]
    named = f"{len(behind)}: {', '.join(behind)}" if behind else "none"
    peers = [(row, best_peer(rows, row.contest)) for row in compared]
    closer = sum(peer is not None and (row.kl or 0.0) < (peer.kl or 0.0) for row, peer in peers)
    return (
        f"\nOf {len(compared)} comparisons, merging is ahead by more than one standard error in {ahead}, within one in "
        f"{len(compared) - ahead - len(behind)}, and behind by more in {named}. "
        f"Its KL divergence is smaller than that of the peer in {closer}.\n"
    )


def time_table(rows: Sequence[TimeRow]) -> str:
    """Returns the rows of time as Markdown: a line per model, budget and method, a column per batch and threads.

    Cells are the median ratios to the plain twin, with quartiles.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    lines = _table(
        sorted(rows, key=lambda row: (models.index(row.model), -row.share)),
        ["model", "GMACs", "tokens"],
        lambda row: (f"`{row.model}`", f"{row.share:.0%}", row.method),
        lambda row: (
            (row.images, row.threads),
            f"{_counted(row.images, 'image')}, {_counted(row.threads, 'thread')}",
        ),
        lambda row: with_quartiles(row.ratio, row.ratio_q1, row.ratio_q3),
    )
    return lines + measured_on(f"{row.device}, {row.dtype}, torch {row.torch}" for row in rows)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _table(
    rows: Sequence[AnyTable],
    heads: Sequence[str],
    line_of: Callable[[AnyTable], tuple[str, ...]],
    column_of: Callable[[AnyTable], tuple[Any, str]],
    cell: Callable[[AnyTable], str],
) -> str:
    """Returns rows as a Markdown table, with a cell for each.

    Args:
        rows: the rows.
        heads: headings of the cells that begin a line.
        line_of: the line of a row, as these cells; lines are in the order of the rows.
        column_of: the column of a row, as a sort key and a heading.
        cell: the cell of a row.
    """
    columns = sorted(set(map(column_of, rows)))
    titles = [*heads, *(title for _, title in columns)]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for line in dict.fromkeys(map(line_of, rows)):
        cells = {column_of(row): cell(row) for row in rows if line_of(row) == line}
        lines.append(f"| {' | '.join([*line, *(cells.get(column, '') for column in columns)])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures missing rows and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = {subject.model: subject for subject in (*SUBJECTS, *TIMED_SUBJECTS)}
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="by default all: " + ", ".join(named))
    parser.add_argument(
        "--like", choices=[subject.model for subject in SUBJECTS], help="data, twin and stages of MODEL"
    )
    parser.add_argument("--only", nargs="+", metavar="METHOD", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--data", default="npz:../shared/data/", help="prefix of the data sets' folders")
    parser.add_argument("--device", default="cpu", help="for rows of quality")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--kept", type=Path, default=ROOT / "runs" / "reduction", help="folder of predictions")
    parser.add_argument("--again", action="store_true", help="measure existing rows of quality again")
    parser.add_argument("--times", action="store_true", help="measure time instead of quality")
    parser.add_argument("--time-results", type=Path, default=TIMES)
    parser.add_argument("--pairs", type=int, default=40, help="timed pairs of one image")
    parser.add_argument("--threads", nargs="+", type=int, default=THREADS, help="for rows of time")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--figure", type=Path, metavar="FILE.svg", help="draw stored results without measuring")
    args = parser.parse_args()
    if args.figure:
        stored = [row for row in best_variants(read_rows(args.results, Row)) if row.method in DRAWN]
        if not stored:
            parser.error(f"{args.results} has no rows to draw; measure some first, without --figure")
        args.figure.write_bytes(encode(draw(stored), "svg"))
        return
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
            for row in measure_times(subject, args.only, quality, times, args.pairs, args.threads):
                times.append(row)
                write_rows(args.time_results, times)
    elif not args.table:
        scored = [subject for subject in subjects if subject.data]
        device = torch.device(args.device)
        measure_all(scored, args.only, args.data, args.results, args.kept, device, again=args.again)
    rows = read_rows(args.results, TrainedRow)
    if any(row.start for row in rows):
        print(trained_table(rows))
    else:
        print(table(rows), peer_table(rows), sep="\n")
    if args.times or args.table:
        print(time_table(read_rows(args.time_results, TimeRow)))


if __name__ == "__main__":
    main()
