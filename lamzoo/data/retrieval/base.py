"""The data set class for text-video retrieval: checks and reads the videos and captions of a source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

from lamzoo.data.fingerprint import Fingerprint, group
from lamzoo.data.splits import check_videos
from lamzoo.data.validation import BadInput
from lamzoo.data.video.reader import VideoClip
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import DataError


class VideoSource(ABC):
    """Source of videos and captions: one subclass per layout.

    Attributes:
        split: name of the split in the data, or ``None`` for data without splits.
        how_to_split: how to add splits to such data, for messages; ``None`` for layouts without splits.
        videos: unique ids of the videos.
        captions: captions of each video, in the order of the layout's file.
        lost: indices of videos that are known to be unreadable without opening them, because they have no file, each
            with the reason.
    """

    split: str | None = None
    how_to_split: str | None = None
    videos: Sequence[str]
    captions: Sequence[Sequence[str]]
    lost: Mapping[int, str] = MappingProxyType({})

    @abstractmethod
    def read(self, index: int, sampling: FrameSampling, threads: int = 1) -> VideoClip:
        """Returns the sampled frames of a video; a ``DataError`` names it as :meth:`name` does.

        Args:
            index: index into ``videos``.
            sampling: the frame sampling.
            threads: decoding threads, if supported; see :func:`lamzoo.data.video.reader.read_video`.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Returns the name of a video in messages: its path, or its place in an archive."""

    def sizes(self) -> Sequence[int]:
        """Returns the size of each video in bytes, without reading any; empty if the layout doesn't tell."""
        return ()

    def splice(self, among: Sequence[int], sampling: FrameSampling, phrase: bool = False) -> tuple[VideoClip, str]:
        """Returns a new video and its caption, for :meth:`CaptionedVideos.splice`.

        Args:
            among: indices of the videos that pieces may come from.
            sampling: frame sampling of the new video.
            phrase: use only one or more neighbouring pieces, which gives a shorter video.
        """
        raise DataError("these data can't splice videos, since they have no pieces; set augment.splice to 0")


class SelectedVideos(VideoSource):
    """Selected videos of another source, in the order given.

    Args:
        source: source of the videos.
        indices: indices of the videos.
        split: name of the part; ``None`` for the source's own split.
    """

    def __init__(self, source: VideoSource, indices: Sequence[int], split: str | None = None) -> None:
        self.split = source.split if split is None else split
        self.videos = [source.videos[index] for index in indices]
        self.captions = [source.captions[index] for index in indices]
        self._source = source
        self._indices = list(indices)
        self.lost = {place: source.lost[index] for place, index in enumerate(self._indices) if index in source.lost}

    def read(self, index: int, sampling: FrameSampling, threads: int = 1) -> VideoClip:
        return self._source.read(self._indices[index], sampling, threads)

    def sizes(self) -> Sequence[int]:
        sizes = self._source.sizes()
        return [sizes[index] for index in self._indices] if len(sizes) else ()

    def splice(self, among: Sequence[int], sampling: FrameSampling, phrase: bool = False) -> tuple[VideoClip, str]:
        return self._source.splice([self._indices[index] for index in among], sampling, phrase)

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])


class CaptionedVideos:
    """Videos with one or more captions each: one split of a retrieval data set.

    Picklable, for data-loader workers. Videos are decoded by :meth:`read`.

    Attributes:
        spec: specification of the data set.
        split: name of the split in the data, or ``None`` for data without splits.
        videos: ids of the videos.
        texts: the captions of all videos, stripped, grouped by video in the order of the videos.
        video_of_text: index of the video of each text.
        source: source of the videos.
        lost: the videos that are known to be unreadable, such as missing files; reading one raises an error.
        threads: decoding threads, as for :func:`lamzoo.data.video.reader.read_video`; 1 by default.

    Args:
        source: source of videos and captions.
        spec: name of the data set in messages.

    Raises:
        DataError: there are no videos, one is listed twice or has no caption, or a caption is empty.
    """

    def __init__(self, source: VideoSource, spec: str) -> None:
        if not len(source.videos):
            raise DataError(f"{spec} has no videos")
        self.spec = spec
        self.split = source.split
        self.source = source
        self.threads = 1
        self.videos = list(source.videos)
        self.lost = [BadInput(index, source.name(index), reason) for index, reason in source.lost.items()]
        self.texts: list[str] = []
        self.video_of_text: list[int] = []
        self._starts = [0]  # offsets of each video in the texts, and the end
        _check_unique(self.videos, spec)
        for index, captions in enumerate(source.captions):
            self.texts += _checked(captions, self.videos[index], spec)
            self.video_of_text += [index] * len(captions)
            self._starts.append(len(self.texts))

    def __len__(self) -> int:
        return len(self.videos)

    def read(self, index: int, sampling: FrameSampling) -> VideoClip:
        """Returns the sampled frames of a video.

        Raises:
            DataError: the video can't be read; names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.source.read(index, sampling, self.threads)

    def splice(self, sampling: FrameSampling, phrase: bool = False) -> tuple[VideoClip, str]:
        """Returns a new video with its caption, spliced from pieces of several; draws from :mod:`random`.

        Args:
            sampling: frame sampling of the new video.
            phrase: use only one or more neighbouring pieces, which gives a shorter video.

        Raises:
            DataError: the layout doesn't support splicing, or a video can't be read.
        """
        return self.source.splice(range(len(self)), sampling, phrase)

    def video_names(self) -> set[str]:
        """Returns the names of the videos."""
        return set(self.videos)

    def of_videos(self, names: Collection[str], split: str | None = None) -> CaptionedVideos:
        """Returns the subset of selected videos, in the order of this data set.

        Args:
            names: names of the videos.
            split: name of the part; None for this split's own.

        Raises:
            DataError: a video is not in the data set, or none is given.
        """
        check_videos(names, self.videos, self.spec)
        chosen = [index for index, video in enumerate(self.videos) if video in names]
        return select_videos(self, chosen, split=split)

    def texts_of(self, index: int) -> list[int]:
        """Returns the indices of the texts of a video, ascending; at least one."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return list(range(self._starts[index], self._starts[index + 1]))

    def filename(self, index: int) -> str:
        """Returns the path of a video, or its place in an archive."""
        return self.source.name(index)

    def fingerprint(self) -> Fingerprint:
        """Returns digests of ids, captions and sizes of the videos, which are not read."""
        pairs = zip(self.video_of_text, self.texts, strict=True)
        captions = group([f"{self.videos[video]}\t{text}" for video, text in pairs])
        return Fingerprint({"videos": group(self.videos, self.source.sizes()), "captions": captions})


def select_videos(dataset: CaptionedVideos, indices: Iterable[int], *, split: str | None = None) -> CaptionedVideos:
    """Returns a subset of a data set, with all captions of the selected videos.

    Args:
        dataset: the data set; not modified.
        indices: indices of the videos to keep, 0 to ``len(dataset) - 1``, in the order wanted.
        split: name of the part; its own split's name by default.

    Raises:
        DataError: there are no indices, or one is out of range or repeated.
    """
    chosen = list(indices)
    for index in chosen:
        if not 0 <= index < len(dataset):
            raise DataError(f"{dataset.spec} has no video {index}; it has {len(dataset)} videos")
    part = CaptionedVideos(SelectedVideos(dataset.source, chosen, split), dataset.spec)
    part.threads = dataset.threads
    return part


def _check_unique(videos: Sequence[str], spec: str) -> None:
    seen: set[str] = set()
    for video in videos:
        if video in seen:
            raise DataError(f"the video {video!r} is listed twice in {spec}; remove one of them")
        seen.add(video)


def _checked(captions: Sequence[str], video: str, spec: str) -> list[str]:
    if not captions:
        raise DataError(f"the video {video!r} of {spec} has no caption; add one, or remove the video")
    texts = [caption.strip() for caption in captions]
    if not all(texts):
        number = texts.index("") + 1
        raise DataError(f"caption {number} of the video {video!r} of {spec} is empty; fill it in, or remove it")
    return texts
