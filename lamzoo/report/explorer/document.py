"""The page itself: token runs, layers and answers as data, quantised, in one HTML file with its script."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.escaping import html_text, printable
from lamzoo.lam import LamConfig, MaskRecord
from lamzoo.lam.layer import Scores
from lamzoo.reading import to_json
from lamzoo.report.mask_pictures import mask_words

_MOST = 32767  # int16, whose lowest value marks what is forbidden
_FORBIDDEN = -80.0  # a bias so far below the largest of its query leaves no attention; such as the lowest of a dtype
_JPEG_QUALITY = 85
_ANSWERS = 5
_FILES = ("numbers.js", "explorer.js", "explorer.html")


@dataclass(frozen=True)
class TokenRun:
    """Consecutive tokens of one kind in the sequence of an attention layer.

    Attributes:
        name: what they are, in the singular: ``"patch"``, ``"word"``.
        labels: text of each token; empty for patches, whose rows and columns are counted.
        grid: ``(rows, columns)`` of patches; None for other tokens.
        picture: what the patches were cut from, or what is drawn behind tokens in time; None if unknown.
        time: whether the tokens follow each other in time, and are drawn as a strip.
        frames: pictures of the same size: one for each label, in which case the tokens are drawn as these; or another
            number, evenly spaced over the labels and drawn behind their strip. Empty if unknown.
    """

    name: str
    labels: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None
    picture: Image.Image | None = None
    time: bool = False
    frames: tuple[Image.Image, ...] = ()

    def __len__(self) -> int:
        return len(self.labels) if self.grid is None else self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class ExploredLayer:
    """One attention layer on the page.

    Attributes:
        name: path of the layer, or what it is.
        config: of its mask.
        record: as captured.
        queries: the stack's input tokens that the queries are made of, in order.
        keys: likewise of the keys; the same object in self-attention.
        sample: index in the batch.
    """

    name: str
    config: LamConfig
    record: MaskRecord
    queries: Sequence[TokenRun]
    keys: Sequence[TokenRun]
    sample: int = 0


@dataclass(frozen=True)
class UnmaskedLayer:
    """One attention layer without a mask of its own, which reads what layers with masks made.

    Attributes:
        name: path of the layer, or what it is.
        masked: scores in a run with the masks of the model.
        plain: scores of the same tokens in a run with neutral masks.
        queries: the tokens that the queries are made of, in order.
        keys: likewise of the keys.
        sample: index in the batch.
    """

    name: str
    masked: Scores
    plain: Scores
    queries: Sequence[TokenRun]
    keys: Sequence[TokenRun]
    sample: int = 0


@dataclass(frozen=True)
class Answer:
    """A line of the model's prediction, with its masks and with neutral ones.

    Attributes:
        label: such as a class.
        masked: text of the prediction with masks.
        plain: likewise without masks; empty if unknown.
        shares: both as numbers from 0 to 1, to be drawn as bars; None for text alone.
    """

    label: str
    masked: str
    plain: str = ""
    shares: tuple[float, float] | None = None

    @classmethod
    def of_shares(cls, label: str, masked: float, plain: float) -> Answer:
        """Returns a line of two probabilities, 0 to 1, as percentages with bars."""
        return cls(label, f"{masked:.1%}", f"{plain:.1%}", (masked, plain))


def best_answers(labels: Sequence[str], masked: Tensor, plain: Tensor, also: int | None = None) -> list[Answer]:
    """Returns the five labels of the largest probabilities, with masks or without, sorted by those with masks.

    Args:
        labels: text of each label.
        masked: logits of the labels, ``(N,)``, with masks.
        plain: likewise without masks.
        also: index of a label that is among the answers in any case.
    """
    with_masks, without = (logits.float().softmax(dim=0).tolist() for logits in (masked, plain))
    best = sorted(range(len(labels)), key=lambda index: -max(with_masks[index], without[index]))[:_ANSWERS]
    if also is not None and also not in best:
        best[-1] = also
    return [
        Answer.of_shares(labels[index], with_masks[index], without[index])
        for index in sorted(best, key=lambda index: -with_masks[index])
    ]


@dataclass(frozen=True)
class Exploration:
    """What the page shows.

    Attributes:
        title: model and input.
        layers: at least one with a mask, the first one.
        facts: lines below the title.
        answers: predictions.
    """

    title: str
    layers: Sequence[ExploredLayer | UnmaskedLayer]
    facts: Sequence[str] = ()
    answers: Sequence[Answer] = ()


def to_html(exploration: Exploration) -> str:
    """Renders the page: one file with its data, script and style, which needs no network.

    Queries, keys and the factors of the masks are stored as int16 with a float32 scale for each row, so that what the
    page computes of them differs by less than 0.001 of an attention weight or of the largest mask value of a row.

    Raises:
        ConfigError: the model's scores or masks are not finite.
        UnsupportedHostError: a layer's scores were not captured, or its tokens are others than described.
    """
    files = resources.files(__package__)
    script, more, page = (files.joinpath(name).read_text(encoding="utf-8") for name in _FILES)
    script += more
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return Template(page).substitute(
        title=html_text(exploration.title),
        facts="\n".join(f'<p class="faint">{html_text(fact)}</p>' for fact in exploration.facts),
        answers=_answers(exploration.answers),
        legend=html_text(_legend(exploration.layers)),
        # A script element ends at the first "</script", whatever it holds.
        data=to_json(page_data(exploration)).replace("<", "\\u003c"),
        script=script,
        script_hash=f"sha256-{digest}",
    )


def page_data(exploration: Exploration) -> dict[str, Any]:
    """Returns what the script reads, as JSON values; raises as :func:`to_html`."""
    store = _Store()
    layers = [
        _layer(layer, store) if isinstance(layer, ExploredLayer) else _unmasked_layer(layer, store)
        for layer in exploration.layers
    ]
    return {"layers": layers, "runs": store.runs, "sequences": store.sequences, "arrays": store.arrays}


class _Store:
    """Arrays, runs and sequences, each stored once and referred to by its number."""

    def __init__(self) -> None:
        self.arrays: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.sequences: list[list[int]] = []
        self._numbers: dict[Any, int] = {}
        self._alive: list[object] = []  # what is known by its id

    def array(self, rows: Tensor) -> int:
        """Stores ``(..., columns)`` as rows of int16 with a scale each."""
        values = rows.detach().float().flatten(0, -2).cpu().numpy()
        packed, scales = quantise(values)
        texts = [base64.b64encode(each.tobytes()).decode("ascii") for each in (packed, scales)]
        key = (values.shape[1], *texts)
        if key not in self._numbers:
            self._numbers[key] = len(self.arrays)
            self.arrays.append({"columns": values.shape[1], "values": texts[0], "scales": texts[1]})
        return self._numbers[key]

    def sequence(self, runs: Sequence[TokenRun]) -> int:
        key = ("sequence", *map(id, runs))
        if key not in self._numbers:
            self._alive.append(runs)
            self._numbers[key] = len(self.sequences)
            self.sequences.append([self._run(run) for run in runs])
        return self._numbers[key]

    def _run(self, run: TokenRun) -> int:
        key = ("run", id(run))
        if key not in self._numbers:
            self._alive.append(run)
            self._numbers[key] = len(self.runs)
            self.runs.append(_run_data(run))
        return self._numbers[key]


def quantise(values: NDArray[np.float32]) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Quantises rows to int16, with ``-inf`` as -32768.

    Args:
        values: ``(rows, columns)``, float32, finite or ``-inf``.

    Returns:
        The integers, little-endian, and the scale of each row, ``(rows,)``.

    Raises:
        ConfigError: a value is NaN or infinite.
    """
    forbidden = np.isneginf(values)
    finite = np.where(forbidden, 0, values)
    if not np.isfinite(finite).all():
        raise ConfigError("the model's attention scores or masks are not finite; check the weights")
    scales = (np.abs(finite).max(axis=1, initial=0) / _MOST).astype("<f4")
    integers = np.rint(finite / np.maximum(scales, np.finfo(np.float32).tiny)[:, None])
    return np.where(forbidden, -_MOST - 1, integers).astype("<i2"), scales


def _layer(layer: ExploredLayer, store: _Store) -> dict[str, Any]:
    record, row = layer.record, layer.sample
    scores = record.scores
    if scores is None:
        raise UnsupportedHostError(
            f"{layer.name} attends to its tokens part by part, which the page can't show; use the picture of "
            "lamzoo.report.figure, or a model whose layers attend to all tokens at once."
        )
    left, right = (factor[row if factor.shape[0] > 1 else 0] for factor in record.mask)
    places = [None if each is None else each[row] for each in (record.query_places, record.key_places)]
    return {
        **_scores(layer, scores, places, store),
        "op": layer.config.op,
        "neutral": layer.config.mask_op.identity,
        "maskHeads": left.shape[0],
        "left": store.array(left),
        "right": store.array(right),
        "queryPlaces": None if places[0] is None else places[0].tolist(),
        "keyPlaces": None if places[1] is None else places[1].tolist(),
    }


def _unmasked_layer(layer: UnmaskedLayer, store: _Store) -> dict[str, Any]:
    plain, row = layer.plain, layer.sample
    return {
        **_scores(layer, layer.masked, (None, None), store),
        "op": None,
        "neutral": None,
        "plainQuery": store.array(plain.query[row] * plain.scale),
        "plainKey": store.array(plain.key[row]),
        "queryPlaces": None,
        "keyPlaces": None,
    }


def _scores(
    layer: ExploredLayer | UnmaskedLayer, scores: Scores, places: Sequence[Tensor | None], store: _Store
) -> dict[str, Any]:
    """Returns the name, tokens, queries and keys of a layer, after checking that its tokens are those described."""
    query, key = scores.query[layer.sample] * scores.scale, scores.key[layer.sample]
    for runs, known, tokens in zip((layer.queries, layer.keys), places, (query, key), strict=True):
        described = sum(map(len, runs))
        if described != (tokens.shape[1] if known is None else len(known)):
            raise UnsupportedHostError(f"{layer.name} has {tokens.shape[1]} tokens, and {described} are described.")
    return {
        "name": printable(layer.name),
        "heads": query.shape[0],
        "queryCount": query.shape[1],
        "keyCount": key.shape[1],
        "query": store.array(query),
        "key": store.array(key),
        "bias": _bias(scores.bias, scores.allowed, key.shape[1], layer.sample, store),
        "queries": store.sequence(layer.queries),
        "keys": store.sequence(layer.keys),
    }


def _bias(bias: Tensor | None, allowed: Tensor | None, keys: int, row: int, store: _Store) -> dict[str, int] | None:
    """Stores what is added to the scores, -inf where attention may not go, for the heads and queries that differ."""
    if bias is None and (allowed is None or bool(allowed.all())):
        return None
    added = torch.zeros(()) if bias is None else bias.float()
    if allowed is not None:
        added = torch.where(allowed, added, -torch.inf)
    added = added[(None,) * (4 - added.ndim)]
    added = added[row if added.shape[0] > 1 else 0]
    added = added.expand(*added.shape[:-1], keys)
    largest = added.amax(dim=-1, keepdim=True)
    added = added - largest.where(largest.isfinite(), 0.0)  # which the softmax doesn't see, and finer when quantised
    added = added.masked_fill(added < _FORBIDDEN, -torch.inf)
    return {"array": store.array(added), "heads": added.shape[0], "queries": added.shape[1]}


def _run_data(run: TokenRun) -> dict[str, Any]:
    data: dict[str, Any] = {"name": printable(run.name), "size": len(run), "time": run.time}
    grid, picture = run.grid, run.picture
    if grid is None:
        data["labels"] = [printable(label) for label in run.labels]
    if run.frames:
        picture, sheet = _sheet(run.frames)
        data |= {"sheet": sheet, "frames": len(run.frames)}
        grid = sheet if len(run.frames) == len(run) else None
    if grid is not None:
        data |= {"grid": grid, "shape": (1, 1)}
    if picture is not None:
        encoded = io.BytesIO()
        picture.convert("RGB").save(encoded, "JPEG", quality=_JPEG_QUALITY)
        data["picture"] = f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode('ascii')}"
        if grid is not None:
            data["shape"] = (picture.height / grid[0], picture.width / grid[1])
    return data


def _sheet(frames: Sequence[Image.Image]) -> tuple[Image.Image, tuple[int, int]]:
    """Returns frames of the same size in rows of one picture, about as high as wide, and its rows and columns."""
    width, height = frames[0].size
    columns = min(len(frames), math.ceil(math.sqrt(len(frames) * height / width)))
    rows = -(-len(frames) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for number, frame in enumerate(frames):
        sheet.paste(frame, (number % columns * width, number // columns * height))
    return sheet, (rows, columns)


def _answers(answers: Sequence[Answer]) -> str:
    if not answers:
        return ""
    lines = []
    for answer in answers:
        cells = [f"<th>{html_text(answer.label)}</th>"]
        for text, share in zip((answer.masked, answer.plain), answer.shares or (None, None), strict=True):
            cells.append(f'<td class="{"text" if share is None else "number"}">{html_text(text)}</td>')
            bar = "" if share is None else f'<span style="width:{100 * share:.1f}%"></span>'
            cells.append(f'<td class="bar">{bar}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = '<tr><th>prediction</th><td colspan="2">with masks</td><td colspan="2">without</td></tr>'
    return f'<table id="answers">\n{head}\n{"".join(lines)}\n</table>'


def _legend(layers: Sequence[ExploredLayer | UnmaskedLayer]) -> str:
    config = next(layer.config for layer in layers if isinstance(layer, ExploredLayer))
    heads = "one mask for all heads" if config.heads == "shared" else "one mask for each head"
    text = (
        f"{mask_words(config)}, {heads}. Attention without the mask is that of the same queries and keys in this "
        "layer; the prediction without masks is that of all layers without theirs. "
        "Tokens that have been merged are outlined as one, and have the numbers of the token that they are part of."
    )
    if any(isinstance(layer, UnmaskedLayer) for layer in layers):
        text += (
            " A layer without a mask shows its attention in the model with its masks, and in the model with neutral "
            "ones; below, it has the mean of its attention over the queries in place of the importance."
        )
    return text
