"""Rows of :mod:`benchmarks.reduction`, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from benchmarks.methods import ALIKE, ALL, PEERS
from benchmarks.rows import markdown, measured_on, with_quartiles

_BLIND = ("random", "stride")  # peers that select tokens without looking at them
_CERTAIN = 1.96  # standard errors, beyond which 5 % of the differences lie by chance

AnyRow = TypeVar("AnyRow", bound="Row")
AnyTable = TypeVar("AnyTable", bound="Row | TimeRow")


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
        mode: how the models ran, such as ``"CUDA graph"``; empty for eager mode.
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
    mode: str = ""


def best_peer(rows: Iterable[Row], contest: tuple[str | int | float | None, ...]) -> Row | None:
    """Returns the row of the peer with the highest accuracy in a contest (:attr:`Row.contest`), if there is one."""
    peers = [row for row in rows if row.contest == contest and row.method in PEERS]
    return max(peers, key=lambda row: row.top1, default=None)


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

    The last layer of both is whole. Cells are the difference of top-1 in points, its standard error, and the peer. A
    sentence below counts them.
    """
    compared = [row for row in rows if row.method == ALIKE and row.peer is not None]

    def cell(row: Row) -> str:
        return f"{row.ahead:+.2f} ± {row.ahead_se:.2f} ({row.peer.partition(',')[0] if row.peer else ''})"

    lines = _table(compared, ["model"], lambda row: (f"`{row.model}`",), _budget, cell)
    images = (f"{row.data}, {row.split} split, {row.images:,} images" for row in compared)
    return lines + _summary(compared, rows) + measured_on(images)


def _summary(compared: Sequence[Row], rows: Sequence[Row]) -> str:
    """Says how often merging is ahead of and behind the best peer, where one that looks at the tokens is compared."""
    looking = {row.contest for row in rows if row.method in PEERS and row.method not in _BLIND}
    blind = sum(row.contest not in looking for row in compared)
    compared = [row for row in compared if row.contest in looking]
    if not compared:
        return ""
    errors = [(row, (row.ahead or 0.0) / max(row.ahead_se or 0.0, 1e-9)) for row in compared]
    each = {name: [error for row, error in errors if row.data == name] for name in {row.data for row in compared}}
    ahead = " and ".join(
        f"{sum(error > _CERTAIN for error in found)} of {_counted(len(found), 'comparison')} on {name}"
        for name, found in sorted(each.items())
    )
    behind = [f"`{row.model}` at {row.share:.0%}" for row, error in errors if error < -_CERTAIN]
    named = f"{len(behind)}: {', '.join(behind)}" if behind else "none"
    peers = [(row, best_peer(rows, row.contest)) for row in compared]
    closer = sum(peer is not None and (row.kl or 0.0) < (peer.kl or 0.0) for row, peer in peers)
    beside = f" Where only {' and '.join(_BLIND)} reach the budget ({blind}), nothing is counted." if blind else ""
    return (
        f"\nMerging is ahead by more than {_CERTAIN} standard errors in {ahead}, and behind by more in {named}; this "
        "is not corrected for the number of comparisons. Its KL divergence is smaller than that of the peer in "
        f"{closer} of {len(compared)}.{beside}\n"
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
            (row.images, row.threads, row.mode),
            ", ".join(
                [
                    _counted(row.images, "image"),
                    *([] if row.device.startswith("cuda") else [_counted(row.threads, "thread")]),
                    *filter(None, [row.mode]),
                ]
            ),
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
    lines = []
    for line in dict.fromkeys(map(line_of, rows)):
        cells = {column_of(row): cell(row) for row in rows if line_of(row) == line}
        lines.append([*line, *(cells.get(column, "") for column in columns)])
    return markdown(titles, lines)
