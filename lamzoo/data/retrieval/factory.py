"""Creation of retrieval data sets from one-line specifications: the grammar and the source of each layout."""

from __future__ import annotations

from pathlib import Path
from typing import cast, get_args

from lamzoo.data.paths import folder_exists, split_last
from lamzoo.data.retrieval.base import CaptionedVideos, VideoSource
from lamzoo.data.retrieval.caption_folder import PlainSource
from lamzoo.data.retrieval.flickr import Flickr8kSource
from lamzoo.data.retrieval.grid import GridSource, GridView
from lamzoo.data.retrieval.msrvtt import MsrvttSource, TrainingList
from lamzoo.data.retrieval.msvd import MsvdSource
from lamzoo.data.retrieval.shards import ShardSource
from lamzoo.data.splits import check_whole, split_spec
from lamzoo.errors import DataError

#: Kinds of data specifications that are of videos only; ``wds`` may be of images too.
VIDEO_KINDS = ("msrvtt", "msvd", "videos", "grid", "flickr8k")

_GRAMMAR = "msrvtt:DIR[:9k|7k], msvd:DIR, videos:DIR, wds:SHARDS, grid:DIR[:VIEW] or flickr8k:DIR"


def create_retrieval_dataset(spec: str, split: str) -> CaptionedVideos:
    """Opens a split of videos with captions.

    Args:
        spec: one of

            - ``msrvtt:DIR`` or ``msrvtt:DIR:7k``: MSR-VTT's official layout, with the training list of 9,000 or of
              7,010 videos; see :class:`lamzoo.data.retrieval.msrvtt.MsrvttSource`, also for its validation split.
            - ``msvd:DIR``: MSVD in CLIP4Clip's layout; see :class:`lamzoo.data.retrieval.msvd.MsvdSource`.
            - ``videos:DIR``: a folder of videos with ``DIR/captions.csv``, whose columns are ``video``, ``caption``
              and, if there are splits, ``split``.
            - ``wds:SHARDS``: local webdataset tar files, ``DIR/{split}-{000..012}.tar`` or with ``*``, of ``KEY.mp4``
              with ``KEY.txt`` or ``KEY.json``; ``{split}`` is replaced by the split; without it, there are no splits.
            - ``grid:DIR``, ``grid:DIR:lips``, ``:motion`` or ``:face``: clips of the GRID corpus: the talker's mouth,
              the lips in its middle, their motion, or the face; see :class:`lamzoo.data.retrieval.grid.GridSource`.
            - ``flickr8k:DIR``: Flickr8k's photographs as videos of one frame.
        split: ``train``, ``validation``, ``test`` or another name in the data. ``val``, ``valid``, ... are synonyms of
            ``validation``, which is never replaced by ``test``. ``"all"`` for data without splits.

    Returns:
        The videos with captions; :meth:`~CaptionedVideos.read` returns their frames.

    Raises:
        DataError: the specification, the folder or the split does not exist, the files are invalid, or a video is
            missing or has no caption.
    """
    source = _source(spec, split)
    dataset = CaptionedVideos(source, spec)
    check_whole(dataset, split, source.how_to_split)
    return dataset


def _source(spec: str, split: str) -> VideoSource:
    kind, rest = split_spec(spec, split, _GRAMMAR, _KINDS)
    match kind:
        case "msrvtt":
            folder, training = _option(rest, get_args(TrainingList), "training list")
            return MsrvttSource(folder, split, cast(TrainingList, training))
        case "msvd":
            return MsvdSource(Path(rest), split)
        case "videos":
            return PlainSource(Path(rest), split)
        case "wds":
            return ShardSource(rest, split)
        case "grid":
            folder, view = _option(rest, get_args(GridView), "view")
            return GridSource(folder, split, cast(GridView, view))
        case "flickr8k":
            return Flickr8kSource(Path(rest), split)
    raise DataError(f"{spec!r} is not a data set of videos with captions; it must be {_GRAMMAR}")


def _option(rest: str, options: tuple[str, ...], what: str) -> tuple[Path, str]:
    """Splits ``DIR:OPTION``; the first option is the default. Folder names may contain colons."""
    folder, option = split_last(rest)
    if option is None or folder_exists(rest):
        return Path(rest), options[0]
    if option not in options:
        raise DataError(f"{folder} has no {what} {option!r}; it must be {' or '.join(map(repr, options))}")
    return Path(folder), option


_KINDS = (*VIDEO_KINDS, "wds")
