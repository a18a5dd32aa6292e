"""The page for a moment model: clips over time, words of the sentence, and moment queries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from lamzoo.adapters.state import masks_of
from lamzoo.data.moments import MomentDataset, MomentFeatures, MomentQuery
from lamzoo.errors import UnsupportedHostError, class_name
from lamzoo.evaluation.moments.evaluate import MomentPrediction, find_moments
from lamzoo.files import check_target
from lamzoo.report.explorer.document import Answer, Exploration, ExploredLayer, TokenRun
from lamzoo.report.explorer.runs import frames_of, run_twice, thumbnails, without_frames, write_page
from lamzoo.report.mask_pictures import title_of
from lamzoo.report.moment_pictures import index_of

_MOMENTS = 5
_FRAMES = 24


def explore_query(
    model: nn.Module,
    dataset: MomentDataset,
    qid: str | None,
    path: str | Path,
    *,
    videos: str | Path | None = None,
) -> None:
    """Writes an interactive page of a moment model's masks and attention for one query, over time in seconds.

    The tokens are the clips of the video, the words of the sentence, QD-DETR's saliency token and the decoder's moment
    queries. The prediction is the best spans with the masks and without. Otherwise as
    :func:`lamzoo.report.explore_image`.

    Args:
        model: a model of the family ``lam_moment_detr`` with masks.
        dataset: a split of queries.
        qid: id of the query; None for the first one.
        path: the HTML file, in an existing folder; an older file is replaced.
        videos: folder of video files named by the ids of the videos, whose frames are shown behind the clips, for data
            without frames of their own, such as GRID's.

    Raises:
        UnsupportedHostError: the model has no masks, is not a moment model, or takes features of another width.
        ConfigError: its masks or predictions are not finite.
        DataError: the split has no such query, its features or its video can't be read, or the file can't be written.
        MissingExtraError: PyAV, which reads video files, is not installed.
    """
    check_target(Path(path), "page", suffix=".html")
    masks_of(model)
    index = index_of(dataset, qid)
    query = dataset.queries[index]
    frames = frames_of(dataset, index, _FRAMES, videos, (query.video, 0.0, query.duration))
    notes = [] if frames else [without_frames(query.video)]
    _write(model, dataset.read(index), query, Path(path), frames, notes)


def explore_moments(
    model: nn.Module,
    features: MomentFeatures,
    query: MomentQuery,
    path: str | Path,
    *,
    frames: Sequence[Image.Image] = (),
) -> None:
    """Writes the page of :func:`explore_query` for features, such as those of a video file.

    Args:
        model: a model of the family ``lam_moment_detr`` with masks.
        features: of the video and the sentence.
        query: the sentence and the duration of the video.
        path: the HTML file, in an existing folder; an older file is replaced.
        frames: of the same size, evenly spaced over the video; shown behind the clips.

    Raises:
        UnsupportedHostError: as of :func:`explore_query`.
        ConfigError: as of :func:`explore_query`.
        DataError: the file can't be written.
    """
    _write(model, features, query, Path(path), frames)


def _write(
    model: nn.Module,
    features: MomentFeatures,
    query: MomentQuery,
    path: Path,
    frames: Sequence[Image.Image],
    notes: Sequence[str] = (),
) -> None:
    check_target(path, "page", suffix=".html")
    masks = masks_of(model)
    records, masked, plain = run_twice(model, lambda: find_moments(model, [features], [query.duration])[0])
    reader = MomentTokens(model, features, query, frames)
    layers = [
        ExploredLayer(name.removesuffix(".attn"), masks[f"{name}.lam"].config, record, *reader.read(name))
        for name, record in records.items()
    ]
    true = ", ".join(f"{start:g}–{end:g} s" for start, end in query.windows)
    facts = [f"“{query.text}”", f"moments in the data: {true}" if true else "moments in the data: unknown", *notes]
    title = f"{title_of(model)} on video {query.video}"
    if query.qid != "":
        title += f", query {query.qid}"
    write_page(Exploration(title, layers, facts, _answers(masked, plain)), path)


class MomentTokens:
    """The queries and keys of each layer of a moment model, for one query."""

    def __init__(
        self, model: Any, features: MomentFeatures, query: MomentQuery, frames: Sequence[Image.Image] = ()
    ) -> None:
        self.model = model
        edges = np.asarray(features.video, np.float64)[:, -2:] * query.duration
        labels = tuple(f"{start:.2f}–{end:.2f} s" for start, end in edges)
        self.clips = TokenRun("clip", labels, time=True, frames=thumbnails(frames))
        self.words = TokenRun("word", _words(query.text, len(features.text)))
        self.token = TokenRun("saliency", ("token",))
        self.moments = (TokenRun("moment query", tuple(map(str, range(model.num_queries)))),)
        self._known: dict[tuple[int, int, int], tuple[TokenRun, ...]] = {}

    def read(self, path: str) -> tuple[Sequence[TokenRun], Sequence[TokenRun]]:
        """Returns the runs of a layer's queries and of its keys."""
        if not hasattr(self.model, "attended"):
            raise UnsupportedHostError(f"{class_name(self.model)} is not of the family lam_moment_detr, unwrapped.")
        if "self_attention" in path:  # of the decoder
            return self.moments, self.moments
        keys = self._sequence(*self.model.attended(path, len(self.clips), len(self.words)))
        if path.startswith("decoder."):
            return self.moments, keys
        return (self._sequence(0, len(self.clips), 0) if path.startswith("cross.") else keys), keys

    def _sequence(self, *lengths: int) -> tuple[TokenRun, ...]:
        runs = zip((self.token, self.clips, self.words), lengths, strict=True)
        token, clips, words = lengths
        return self._known.setdefault((token, clips, words), tuple(run for run, length in runs if length))


def _words(text: str, count: int) -> tuple[str, ...]:
    """Returns the words of a sentence, if its features are one for each, with or without a start and an end."""
    words = text.split()
    if len(words) == count:
        return tuple(words)
    if len(words) + 2 == count:
        return "<start>", *words, "<end>"
    return tuple(map(str, range(count)))


def _answers(masked: MomentPrediction, plain: MomentPrediction) -> list[Answer]:
    def texts(found: MomentPrediction) -> list[str]:
        return [f"{start:.2f}–{end:.2f} s, score {score:.2f}" for start, end, score in found.windows[:_MOMENTS]]

    pairs = enumerate(zip(texts(masked), texts(plain), strict=True), start=1)
    return [Answer(f"moment {rank}", with_masks, without) for rank, (with_masks, without) in pairs]
