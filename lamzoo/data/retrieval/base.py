"""The one data set class for text-video retrieval: checks what a source lists, and reads its videos."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence

from lamzoo.data.splits import check_videos
from lamzoo.data.video.reader import VideoClip
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import DataError


class VideoSource(ABC):
    """Where videos and captions come from: one subclass per layout.

    Attributes:
        split: the split's own name here, or ``None`` where the layout has no splits and all of it was taken.
        how_to_split: what to do to such data to give it splits, for messages; ``None`` where the layout never has any.
        videos: what the videos are called, each by a name of its own.
        captions: the captions of each video, in the order of the layout's own file.
    """

    split: str | None = None
    how_to_split: str | None = None
    videos: Sequence[str]
    captions: Sequence[Sequence[str]]

    @abstractmethod
    def read(self, index: int, sampling: FrameSampling, threads: int = 1) -> VideoClip:
        """Returns the sampled frames of a video; a ``DataError`` names it as :meth:`name` does.

        Args:
            index: into ``videos``.
            sampling: which frames.
            threads: for decoding, where that has threads; see :func:`lamzoo.data.video.reader.read_video`.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Returns what a reader would call that video: its path, or its place in a file."""

    def splice(
        self, among: Sequence[int], sampling: FrameSampling, phrase: bool = False
    ) -> tuple[VideoClip, str] | None:
        """Puts a new video and its caption together from pieces of others, drawn from :mod:`random`.

        Args:
            among: indices of the videos that pieces may come from.
            sampling: which frames of the new video.
            phrase: take one or more neighbouring pieces, which is a shorter video, in place of all.

        Returns:
            The video and its caption; ``None`` where the layout has no pieces.
        """
        return None


class SelectedVideos(VideoSource):
    """Some videos of another source, in the order given.

    Args:
        source: where the videos are.
        indices: which of them.
        split: name of the part; ``None`` for the source's own split.
    """

    def __init__(self, source: VideoSource, indices: Sequence[int], split: str | None = None) -> None:
        self.split = source.split if split is None else split
        self.videos = [source.videos[index] for index in indices]
        self.captions = [source.captions[index] for index in indices]
        self._source = source
        self._indices = list(indices)

    def read(self, index: int, sampling: FrameSampling, threads: int = 1) -> VideoClip:
        return self._source.read(self._indices[index], sampling, threads)

    def splice(
        self, among: Sequence[int], sampling: FrameSampling, phrase: bool = False
    ) -> tuple[VideoClip, str] | None:
        return self._source.splice([self._indices[index] for index in among], sampling, phrase)

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])


class CaptionedVideos:
    """Videos, each with one or more captions: a split of a retrieval data set.

    Nothing is decoded before :meth:`read`, and it can be pickled for the workers of a loader.

    Attributes:
        spec: what the data set was created from.
        split: the split's own name, or ``None`` where the data have no splits.
        videos: the ids of the videos.
        texts: the captions of all videos, stripped; those of one video stand together, in the order of the videos.
        video_of_text: for each text the index of its video.
        source: where the videos are.
        threads: for decoding a video, as for :func:`lamzoo.data.video.reader.read_video`; 1 unless it is set.

    Args:
        source: where videos and captions come from.
        spec: how to call the whole in an error.

    Raises:
        DataError: there is no video, one is listed twice or has no caption, or a caption is empty.
    """

    def __init__(self, source: VideoSource, spec: str) -> None:
        if not len(source.videos):
            raise DataError(f"{spec} holds no video")
        self.spec = spec
        self.split = source.split
        self.source = source
        self.threads = 1
        self.videos = list(source.videos)
        self.texts: list[str] = []
        self.video_of_text: list[int] = []
        self._starts = [0]  # into the texts, of each video and behind the last
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
            DataError: it cannot be read; names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.source.read(index, sampling, self.threads)

    def splice(self, sampling: FrameSampling, phrase: bool = False) -> tuple[VideoClip, str]:
        """Returns a new video with its caption, put together from pieces of these by chance (:mod:`random`).

        Args:
            sampling: which frames of it.
            phrase: take one or more neighbouring pieces, which is a shorter video, in place of all.

        Raises:
            DataError: the layout has no pieces of its videos, or one cannot be read.
        """
        made = self.source.splice(range(len(self)), sampling, phrase)
        if made is None:
            raise DataError(f"{self.spec} has no pieces of its videos to splice; only grid: does")
        return made

    def video_names(self) -> set[str]:
        """Returns the names of the videos."""
        return set(self.videos)

    def of_videos(self, names: Collection[str], split: str | None = None) -> CaptionedVideos:
        """Returns the part of the data set that is of some videos, in their order here.

        Args:
            names: of the videos.
            split: name of the part; None for this split's own.

        Raises:
            DataError: one of the videos is not here, or none is named.
        """
        check_videos(names, self.videos, self.spec)
        chosen = [index for index, video in enumerate(self.videos) if video in names]
        return select_videos(self, chosen, split=split)

    def texts_of(self, index: int) -> list[int]:
        """Returns the indices of a video's texts, rising; at least one."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return list(range(self._starts[index], self._starts[index + 1]))

    def filename(self, index: int) -> str:
        """Returns the path of a video, or its place in the file that holds it."""
        return self.source.name(index)


def select_videos(dataset: CaptionedVideos, indices: Iterable[int], *, split: str | None = None) -> CaptionedVideos:
    """Returns a data set of some videos of another, with all their captions.

    Args:
        dataset: left as it is.
        indices: of the videos to keep, 0 to ``len(dataset) - 1``, in the order wanted.
        split: name of the part; its own split's name by default.

    Raises:
        DataError: no index, one that is out of range, or one twice.
    """
    chosen = list(indices)
    for index in chosen:
        if not 0 <= index < len(dataset):
            raise DataError(f"{dataset.spec} has no video {index}; it has {len(dataset)}")
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
        raise DataError(f"the video {video!r} of {spec} has no caption; give it one, or take it off the list")
    texts = [caption.strip() for caption in captions]
    if not all(texts):
        number = texts.index("") + 1
        raise DataError(f"caption {number} of the video {video!r} of {spec} is empty; write one, or remove it")
    return texts
