"""Creation of caption data sets from one-line specifications: the grammar and the source of each layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from lamzoo.data.captions.base import CaptionDataset, CaptionSource
from lamzoo.data.captions.flickr import Flickr8kCaptions
from lamzoo.data.captions.grid import GridCaptions
from lamzoo.data.captions.lsmdc import LsmdcSource
from lamzoo.data.captions.mad import MadSource
from lamzoo.data.captions.sound import Damage
from lamzoo.data.captions.videos import VideoFolder
from lamzoo.data.paths import folder_exists
from lamzoo.data.splits import check_whole, split_spec
from lamzoo.errors import DataError

_KINDS = ("mad", "lsmdc", "videos", "grid", "flickr8k")
_GRAMMAR = (
    "mad:DIR[:SECONDS], lsmdc:DIR, videos:DIR[:FRAMES_PER_SECOND], grid:DIR[:MODALITIES[:DAMAGE]] or flickr8k:DIR"
)

_NUMBER = re.compile(r":(\d+(?:\.\d+)?)$")
_MODALITY = r"(?:mouth|face|audio)"
_GRID_OPTIONS = re.compile(
    rf":(?P<modalities>{_MODALITY}(?:\+{_MODALITY})*)(?::(?P<damage>noise|gaps|damaged))?$"
)  # fmt: skip
_MAD_SECONDS = 2.0


def create_caption_dataset(spec: str, split: str) -> CaptionDataset:
    """Opens a split of clips with captions.

    Args:
        spec: one of

            - ``mad:DIR`` or ``mad:DIR:4``: MAD and MADv2, audio descriptions of movies; clips are at least 2 s long
              (the default), or 4; see :class:`lamzoo.data.captions.mad.MadSource`, also for its splits.
            - ``lsmdc:DIR``: LSMDC's tables, and features of each clip; see
              :class:`lamzoo.data.captions.lsmdc.LsmdcSource`.
            - ``videos:DIR`` or ``videos:DIR:0.5``: a folder of videos with ``DIR/captions.csv``, their sound, and
              feature files, with this number of rows per second unless they state it; see
              :class:`lamzoo.data.captions.videos.VideoFolder`.
            - ``grid:DIR``, ``grid:DIR:face+audio`` or ``grid:DIR:mouth+audio:noise``: GRID's sentences, from
              ``mouth+audio`` (the default) or any of ``mouth``, ``face`` and ``audio``, with sound that is clean (the
              default), has ``noise`` or ``gaps``, or is ``damaged`` by both; see
              :class:`lamzoo.data.captions.grid.GridCaptions`.
            - ``flickr8k:DIR``: Flickr8k's photographs in patches; see
              :class:`lamzoo.data.captions.flickr.Flickr8kCaptions`.
        split: ``train``, ``validation``, ``test`` or another name in the data; ``"all"`` for data without splits.

    Returns:
        The clips with captions; :meth:`~CaptionDataset.read` returns their features.

    Raises:
        DataError: the specification, the folder or the split does not exist, or the files are invalid.
        MissingExtraError: the layout needs a package that is not installed; names the extra.
    """
    source = _source(spec, split)
    dataset = CaptionDataset(source, spec)
    check_whole(dataset, split, source.how_to_split)
    return dataset


def _source(spec: str, split: str) -> CaptionSource:
    kind, rest = split_spec(spec, split, _GRAMMAR, _KINDS)
    match kind:
        case "mad":
            folder, seconds = _number(rest)
            return MadSource(folder, split, _MAD_SECONDS if seconds is None else seconds)
        case "lsmdc":
            return LsmdcSource(Path(rest), split)
        case "videos":
            return VideoFolder(*_number(rest), split)
        case "grid":
            return _grid(rest, split)
        case "flickr8k":
            return Flickr8kCaptions(Path(rest), split)
    raise DataError(f"{spec!r} is not a caption data set; it must be {_GRAMMAR}")


def _number(rest: str) -> tuple[Path, float | None]:
    """Splits ``DIR:NUMBER``; a folder may have a colon in its name."""
    found = None if folder_exists(rest) else _NUMBER.search(rest)
    return (Path(rest), None) if found is None else (Path(rest[: found.start()]), float(found[1]))


def _grid(rest: str, split: str) -> GridCaptions:
    found = None if folder_exists(rest) else _GRID_OPTIONS.search(rest)
    if found is None:
        return GridCaptions(Path(rest), split)
    modalities = tuple(found["modalities"].split("+"))
    return GridCaptions(Path(rest[: found.start()]), split, modalities, cast(Damage | None, found["damage"]))
