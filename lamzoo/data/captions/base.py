"""The one data set class for description: clips with their captions, and features of each modality on its own clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lamzoo.data.splits import check_videos
from lamzoo.errors import DataError

Features: TypeAlias = NDArray[np.float32]

_ROUNDING = 1e-6  # seconds


@dataclass(frozen=True)
class Stream:
    """Features of one modality of a clip.

    Attributes:
        features: ``(N, D)``, float32.
        times: ``(N,)``, float32, seconds from the start of the item's clip: the middle of what each was taken from.
    """

    features: Features
    times: Features


@dataclass(frozen=True)
class CaptionItem:
    """A clip that somebody described.

    Attributes:
        id: what the data call it.
        video: id of the video or movie that it belongs to.
        start: of what is described, seconds in the video. The clip that is read may begin earlier and end later.
        end: likewise; infinite where it is the whole video and its length is not known.
        captions: what people wrote; one or several.
        words: each word that is said in the clip, with its start and end, seconds from the clip's start; none where the
            data don't know.
    """

    id: str
    video: str
    start: float
    end: float
    captions: tuple[str, ...]
    words: tuple[tuple[str, float, float], ...] = ()


class CaptionSource(ABC):
    """Where clips, captions and features come from: one subclass per layout.

    Attributes:
        split: the split's own name, or ``None`` where the data have no splits.
        how_to_split: what to do to such data to give it splits, for messages; ``None`` where the layout never has any.
        items: the clips, with stripped captions.
        modalities: width of the features by the modality's name, in their order.
    """

    split: str | None
    how_to_split: str | None = None
    items: Sequence[CaptionItem]
    modalities: Mapping[str, int]

    @abstractmethod
    def streams(self, index: int) -> dict[str, Stream]:
        """Returns an item's features by modality, without those it lacks; a ``DataError`` names the file."""

    def splice(self) -> tuple[CaptionItem, dict[str, Stream]]:
        """Returns a new item and its features; what :meth:`CaptionDataset.splice` asks for."""
        raise DataError(f"{type(self).__name__} can't splice clips, since it has no pieces; set augment.splice to 0")


class _Part(CaptionSource):
    """Some clips of another source, in the order given; it cannot splice."""

    def __init__(self, source: CaptionSource, indices: Sequence[int], split: str | None) -> None:
        self.split, self.modalities = source.split if split is None else split, source.modalities
        self.items = [source.items[index] for index in indices]
        self._source, self._indices = source, list(indices)

    def streams(self, index: int) -> dict[str, Stream]:
        return self._source.streams(self._indices[index])


class CaptionDataset:
    """Clips with captions: a split of a data set of descriptions.

    It can be pickled for the workers of a loader. Features are read, decoded or computed by :meth:`read`.

    Attributes:
        spec: what the data set was created from.
        split: the split's own name, or ``None`` where the data have no splits.
        items: the clips.
        modalities: width of the features by the modality's name, in their order.

    Args:
        source: where clips, captions and features come from.
        spec: how to call the whole in an error.

    Raises:
        DataError: there is no clip, one is listed twice, has no caption or an empty one, or ends before it starts.
    """

    def __init__(self, source: CaptionSource, spec: str) -> None:
        self.spec, self.split = spec, source.split
        self.items, self.modalities = list(source.items), dict(source.modalities)
        self._source = source
        if not self.items:
            raise DataError(f"{spec} holds no item")
        self._by_video: dict[str, list[tuple[float, float, int]]] = {}
        seen: set[str] = set()
        for index, item in enumerate(self.items):
            if item.id in seen:
                raise DataError(f"the item {item.id!r} is listed twice in {spec}; remove one of them")
            seen.add(item.id)
            _check(item, spec)
            self._by_video.setdefault(item.video, []).append((item.end, item.start, index))
        for ends in self._by_video.values():
            ends.sort()

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> dict[str, Stream]:
        """Returns an item's features by modality, in the order of ``modalities``; at least one of them.

        Raises:
            DataError: a file is missing or damaged, or features are not as wide as ``modalities`` says; names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._checked(self._source.streams(index), self.items[index].id)

    def splice(self) -> tuple[CaptionItem, dict[str, Stream]]:
        """Returns a clip that is put together of pieces of several, drawn from :mod:`random`, and its features.

        Raises:
            DataError: the data know of no pieces; or as :meth:`read`.
        """
        item, streams = self._source.splice()
        return item, self._checked(streams, item.id)

    def video_names(self) -> set[str]:
        """Returns the names of the videos that the clips belong to."""
        return {item.video for item in self.items}

    def of_videos(self, names: Collection[str], split: str | None = None) -> CaptionDataset:
        """Returns the clips of some videos, in their order here.

        Args:
            names: of the videos.
            split: name of the part; None for this split's own.

        Raises:
            DataError: one of the videos is not here, or none is named.
        """
        check_videos(names, (item.video for item in self.items), self.spec)
        chosen = [index for index, item in enumerate(self.items) if item.video in names]
        return CaptionDataset(_Part(self._source, chosen, split), self.spec)

    def references(self) -> dict[str, tuple[str, ...]]:
        """Returns what people wrote about each item, by its id, for the scores of :mod:`lamzoo.evaluation`."""
        return {item.id: item.captions for item in self.items}

    def context(self, index: int, count: int) -> tuple[str, ...]:
        """Returns what was said before: captions of items of the same video that end before an item starts.

        Args:
            index: of the item.
            count: how many of them at most, the nearest.

        Returns:
            The first caption of each, the nearest last.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        item = self.items[index]
        known = self._by_video[item.video]
        before = bisect_right(known, item.start + _ROUNDING, key=lambda entry: entry[0])
        nearest = known[max(0, before - count) : before] if count > 0 else []
        return tuple(self.items[number].captions[0] for *_, number in nearest)

    def _checked(self, streams: Mapping[str, Stream], item: str) -> dict[str, Stream]:
        if not streams:
            raise DataError(
                f"the item {item!r} of {self.spec} has no features of {' or '.join(self.modalities)}; make some, or "
                "leave it out"
            )
        for name, stream in streams.items():
            rows, width = stream.features.shape
            if not rows or width != self.modalities[name] or stream.times.shape != (rows,):
                raise DataError(
                    f"the item {item!r} of {self.spec} has {name} features {stream.features.shape}, and "
                    f"{len(stream.times)} times; they must be rows of {self.modalities[name]}, as of other items"
                )
        return {name: streams[name] for name in self.modalities if name in streams}


def _check(item: CaptionItem, spec: str) -> None:
    if not item.captions:
        raise DataError(f"the item {item.id!r} of {spec} has no caption; give it one, or take it off the list")
    if not all(caption.strip() for caption in item.captions):
        raise DataError(f"the item {item.id!r} of {spec} has an empty caption; write one, or remove it")
    if not item.start < item.end:
        raise DataError(
            f"the item {item.id!r} of {spec} is from {item.start:g} to {item.end:g} s; its start must come before its "
            "end"
        )
