"""Pictures of moment predictions and masks over time; drawn by :mod:`lamzoo.report.timeline`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import get_args

import numpy as np
from torch import nn

from lamzoo.adapters.capture import capture_masks
from lamzoo.data.moments import MomentDataset, MomentQuery
from lamzoo.data.splits import index_of_id
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.evaluation.moments.evaluate import find_moments
from lamzoo.files import check_target
from lamzoo.lam import Lam, LamConfig, MaskRecord
from lamzoo.models.moment_detr.model import Place
from lamzoo.profiling.inputs import evaluating
from lamzoo.report.mask_pictures import mask_words, title_of
from lamzoo.report.mpl import write_figure
from lamzoo.report.timeline import LayerImportance, Timeline, draw_timeline

_LINE, _LINES = 110, 3  # characters of a line of the title, and lines of its sentence


def explain_moments(model: nn.Module, dataset: MomentDataset, index: int, path: str | Path, *, top: int = 5) -> None:
    """Writes a PNG file of a model's predictions and masks for one query, over time in seconds.

    From the top: the true spans if known, the best predicted spans with their scores, the saliency of the clips, and
    the importance ``mean_i M_ij`` of each masked layer, averaged over the heads: of clips over time, of words as bars
    below, of QD-DETR's saliency token as a number. Layers that share their mask are drawn once. The decoder's
    self-attention is omitted, because its keys, the moment queries, have no time. Without masks, only spans and
    saliency are drawn. Colours are centred at the mask's neutral value (1 for ``op="mul"``, 0 for ``"add"``).

    Args:
        model: a model of the family ``lam_moment_detr``, with or without masks.
        dataset: a split of queries.
        index: index of the query.
        path: the PNG file, in an existing folder; an older file is replaced.
        top: maximum number of predicted spans.

    Raises:
        UnsupportedHostError: the model is not a moment model, takes features of another width, or has masks in
            attention outside of the family.
        ConfigError: ``top`` is less than 1.
        IndexError: there is no such query.
        MissingExtraError: matplotlib is missing.
        DataError: the features can't be read, or the file can't be written.
    """
    path = Path(path)
    check_target(path, "picture", suffix=".png")
    if top < 1:
        raise ConfigError(f"top is {top}; it must be at least 1.")
    masks = {name.removesuffix(".lam"): module for name, module in model.named_modules() if isinstance(module, Lam)}
    timeline = _measure(model, masks, dataset, index, top)
    config = next(iter(masks.values())).config if masks else None
    title = _title(model, dataset.queries[index], config)
    figure = draw_timeline(timeline, neutral=0.0 if config is None else config.mask_op.identity, title=title)
    write_figure(figure, path)


def explain_query(model: nn.Module, dataset: MomentDataset, qid: str | None, path: str | Path) -> None:
    """Draws a query as :func:`explain_moments`, selected by its id; None for the first query.

    Raises:
        DataError: the split has no such query; or as for :func:`explain_moments`.
    """
    explain_moments(model, dataset, index_of(dataset, qid), path)


def index_of(dataset: MomentDataset, qid: str | None) -> int:
    """Returns the index of a query by its id; that of the first query for None.

    Raises:
        DataError: the split has no such query.
    """
    qids = [str(query.qid) for query in dataset.queries]  # numbers in QVHighlights, strings in other data sets
    return index_of_id(qids, qid, f"the split {dataset.split!r} of {dataset.spec}", "query")


def _measure(model: nn.Module, masks: Mapping[str, Lam], dataset: MomentDataset, index: int, top: int) -> Timeline:
    features = dataset.read(index)
    query = dataset.queries[index]
    capture: AbstractContextManager[Mapping[str, MaskRecord]] = capture_masks(model) if masks else nullcontext({})
    with evaluating(model), capture as captured:
        (found,) = find_moments(model, [features], [query.duration])
    layers = (
        _layer(model, path, record, masks[path].config, len(features.video), len(features.text))
        for path, record in captured.items()
        if masks[path].network is not None  # otherwise the layer shares the mask of an earlier one
        and "self_attention" not in path  # of the decoder; that of the encoder is named attention
    )
    return Timeline(query.duration, query.windows, found.windows[:top], found.saliency, tuple(layers))


def _layer(
    model: nn.Module, path: str, record: MaskRecord, config: LamConfig, clips: int, words: int
) -> LayerImportance:
    importance = record.importance[0].float().mean(dim=0).cpu().numpy()
    # Not derived from the number of keys: with one word, Moment-DETR has as many keys as QD-DETR with its token.
    attended = getattr(model, "attended", None)
    lengths = (0, clips, words) if attended is None else attended(path, clips, words)
    if sum(lengths) != len(importance):
        raise UnsupportedHostError(
            f"{path} of {type(model).__name__} attends to {len(importance)} tokens that are not the video's {clips} "
            f"clips and the sentence's {words} words; draw a model of the family lam_moment_detr, unwrapped."
        )
    token, of_clips, of_words = np.split(importance, np.cumsum(lengths[:2]))
    parts = [part for part in path.split(".") if part.isdigit() or part in get_args(Place)]  # encoder.0.attention.attn
    name = f"{parts[0]}\nall layers" if config.layers == "single" else ".".join(parts)
    return LayerImportance(name, of_clips, of_words, float(token[0]) if token.size else None)


def _title(model: nn.Module, query: MomentQuery, config: LamConfig | None) -> str:
    lines = textwrap.wrap(f"{title_of(model)} on video {query.video}, query {query.qid}", _LINE)
    lines += textwrap.wrap(f"“{query.text}”", _LINE, max_lines=_LINES, placeholder=" …”")
    if config is not None:
        heads = "one mask for all heads" if config.heads == "shared" else "mean of the heads' masks"
        lines.append(f"{mask_words(config)}; {heads}")
    return "\n".join(lines)
