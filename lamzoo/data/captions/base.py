"""The data set class for description: clips with captions, and features of each modality with their own times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from lamzoo.data.feature_arrays import Features
from lamzoo.data.fingerprint import Fingerprint, group
from lamzoo.data.splits import check_videos
from lamzoo.errors import DataError

_ROUNDING = 1e-6  # seconds


@dataclass(frozen=True)
class Stream:
    """Features of one modality of a clip.

    Attributes:
        features: ``(N, D)``, float32.
        times: ``(N,)``, float32, seconds from the start of the clip: the middle of the interval of each feature.
    """

    features: Features
    times: Features


@dataclass(frozen=True)
class CaptionItem:
    """A clip with its captions.

    Attributes:
        id: id in the data set.
        video: id of the video or movie that it belongs to.
        start: start of the described span, seconds in the video. The clip that is read may start earlier and end later.
        end: end of the described span; infinite for a whole video of unknown duration.
        captions: one or several captions.
        words: the words spoken in the clip, each with its start and end, seconds from the start of the clip; empty if
            unknown.
    """

    id: str
    video: str
    start: float
    end: float
    captions: tuple[str, ...]
    words: tuple[tuple[str, float, float], ...] = ()


class CaptionSource(ABC):
    """Source of clips, captions and features: one subclass per layout.

    Attributes:
        split: name of the split in the data, or ``None`` for data without splits.
        how_to_split: how to add splits to such data, for messages; ``None`` for layouts without splits.
        items: the clips, with stripped captions.
        modalities: feature width of each modality, by name, in order.
    """

    split: str | None
    how_to_split: str | None = None
    items: Sequence[CaptionItem]
    modalities: Mapping[str, int]

    @abstractmethod
    def streams(self, index: int) -> dict[str, Stream]:
        """Returns the features of an item by modality, without missing ones; a ``DataError`` names the file."""

    def frames(self, index: int, count: int) -> Sequence[Image.Image]:
        """Returns up to ``count`` frames of a clip, evenly spaced over it, for pictures; empty if there are none."""
        return ()

    def place(self, index: int) -> tuple[str, float, float]:
        """Returns the name of an item's video file, without extension, and the span that is read, in its seconds."""
        item = self.items[index]
        return item.video, item.start, item.end

    def sizes(self) -> Sequence[int]:
        """Returns the sizes of the feature files in bytes, without reading them; empty if unknown."""
        return ()

    def splice(self) -> tuple[CaptionItem, dict[str, Stream]]:
        """Returns a new item and its features, for :meth:`CaptionDataset.splice`."""
        raise DataError("these data can't splice clips, since they have no pieces; set augment.splice to 0")


class _Part(CaptionSource):
    """Selected clips of another source, in the order given; splicing is not supported."""

    def __init__(self, source: CaptionSource, indices: Sequence[int], split: str | None) -> None:
        self.split, self.modalities = source.split if split is None else split, source.modalities
        self.items = [source.items[index] for index in indices]
        self._source, self._indices = source, list(indices)

    def streams(self, index: int) -> dict[str, Stream]:
        return self._source.streams(self._indices[index])

    def frames(self, index: int, count: int) -> Sequence[Image.Image]:
        return self._source.frames(self._indices[index], count)

    def place(self, index: int) -> tuple[str, float, float]:
        return self._source.place(self._indices[index])

    def sizes(self) -> Sequence[int]:
        return self._source.sizes()


class CaptionDataset:
    """Clips with captions: one split of a data set.

    Picklable, for data-loader workers. Features are read, decoded or computed by :meth:`read`.

    Attributes:
        spec: specification of the data set.
        split: name of the split in the data, or ``None`` for data without splits.
        items: the clips.
        modalities: feature width of each modality, by name, in order.

    Args:
        source: source of clips, captions and features.
        spec: name of the data set in messages.

    Raises:
        DataError: there are no clips, or one is listed twice, has no caption or an empty one, or ends before it starts.
    """

    def __init__(self, source: CaptionSource, spec: str) -> None:
        self.spec, self.split = spec, source.split
        self.items, self.modalities = list(source.items), dict(source.modalities)
        self._source = source
        if not self.items:
            raise DataError(f"{spec} has no items")
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
        """Returns the features of an item by modality, in the order of ``modalities``; at least one.

        Raises:
            DataError: a file is missing or damaged, or the width of features differs from ``modalities``; names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._checked(self._source.streams(index), self.items[index].id)

    def frames(self, index: int, count: int) -> list[Image.Image]:
        """Returns up to ``count`` frames of a clip, evenly spaced over it; a photograph itself; empty if unknown.

        Raises:
            DataError: a video or image can't be read; names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        return list(self._source.frames(index, count))

    def place(self, index: int) -> tuple[str, float, float]:
        """Returns where the clip that is read is, for frames of data that have none.

        Returns:
            The name of its video file, without extension, and its start and end, seconds in that file.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._source.place(index)

    def splice(self) -> tuple[CaptionItem, dict[str, Stream]]:
        """Returns a new clip, spliced from pieces of several, and its features; draws from :mod:`random`.

        Raises:
            DataError: the layout doesn't support splicing; or as for :meth:`read`.
        """
        item, streams = self._source.splice()
        return item, self._checked(streams, item.id)

    def video_names(self) -> set[str]:
        """Returns the names of the videos that the clips belong to."""
        return {item.video for item in self.items}

    def of_videos(self, names: Collection[str], split: str | None = None) -> CaptionDataset:
        """Returns the clips of selected videos, in the order of this data set.

        Args:
            names: names of the videos.
            split: name of the part; None for this split's own.

        Raises:
            DataError: a video is not in the data set, or none is given.
        """
        check_videos(names, (item.video for item in self.items), self.spec)
        chosen = [index for index, item in enumerate(self.items) if item.video in names]
        return CaptionDataset(_Part(self._source, chosen, split), self.spec)

    def references(self) -> dict[str, tuple[str, ...]]:
        """Returns the reference captions by item id, for the metrics of :mod:`lamzoo.evaluation`."""
        return {item.id: item.captions for item in self.items}

    def fingerprint(self) -> Fingerprint:
        """Returns digests of the clips, and of the sizes of the features, which are not read."""
        clips = [
            f"{item.id!r} {item.video!r} {item.start} {item.end} {item.captions} {item.words}" for item in self.items
        ]
        return Fingerprint({"clips": group(clips), "features": group((), self._source.sizes())})

    def context(self, index: int, count: int) -> tuple[str, ...]:
        """Returns the previous captions: those of items of the same video that end before an item starts.

        Args:
            index: index of the item.
            count: maximum number of captions; the nearest are taken.

        Returns:
            The first caption of each item, the nearest last.
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
                f"the item {item!r} of {self.spec} has no features of {' or '.join(self.modalities)}; extract some, or "
                "remove the item"
            )
        for name, stream in streams.items():
            rows, width = stream.features.shape
            if not rows or width != self.modalities[name] or stream.times.shape != (rows,):
                raise DataError(
                    f"the item {item!r} of {self.spec} has {name} features {stream.features.shape} and "
                    f"{len(stream.times)} times; they must be rows of {self.modalities[name]}, as for other items"
                )
        return {name: streams[name] for name in self.modalities if name in streams}


def _check(item: CaptionItem, spec: str) -> None:
    if not item.captions:
        raise DataError(f"the item {item.id!r} of {spec} has no caption; add one, or remove the item")
    if not all(caption.strip() for caption in item.captions):
        raise DataError(f"the item {item.id!r} of {spec} has an empty caption; fill it in, or remove it")
    if not item.start < item.end:
        raise DataError(
            f"the item {item.id!r} of {spec} is from {item.start:g} to {item.end:g} s; its start must be before its end"
        )
