"""Some videos of a data set, with their captions; reads no video."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lamzoo.data.retrieval.base import CaptionedVideos, VideoSource
from lamzoo.data.video.reader import VideoClip
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import DataError


class SelectedVideos(VideoSource):
    """Some videos of another source, in the order given.

    Args:
        source: where the videos are.
        indices: which of them.
    """

    def __init__(self, source: VideoSource, indices: Sequence[int]) -> None:
        self.split = source.split
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


def select_videos(dataset: CaptionedVideos, indices: Iterable[int]) -> CaptionedVideos:
    """Returns a data set of some videos of another, with all their captions.

    Args:
        dataset: left as it is.
        indices: of the videos to keep, 0 to ``len(dataset) - 1``, in the order wanted.

    Raises:
        DataError: no index, one that is out of range, or one twice.
    """
    chosen = list(indices)
    for index in chosen:
        if not 0 <= index < len(dataset):
            raise DataError(f"{dataset.spec} has no video {index}; it has {len(dataset)}")
    part = CaptionedVideos(SelectedVideos(dataset.source, chosen), dataset.spec)
    part.threads = dataset.threads
    return part
