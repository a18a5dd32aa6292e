"""ImageNet's reassessed labels (ReaL, arXiv 2006.07159), which list every object in a validation image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from timm.data import RealLabelsImagenet

from lamzoo.data.json_files import read_json
from lamzoo.errors import DataError

#: Selects the labels that timm ships with its package.
TIMM_REAL_LABELS = "timm"
_IMAGES = 50_000  # in the validation split and in timm's file
_OFFICIAL_NAME = re.compile(r"ILSVRC2012_val_\d{8}")


class RealLabels:
    """The set of correct labels for each image of ImageNet-1k's validation split, possibly empty.

    Args:
        source: ``real.json``, a list with the class indices of ``ILSVRC2012_val_00000001.JPEG``, of the second image
            and so on; or ``"timm"`` for timm's copy.

    Raises:
        DataError: the file does not exist or has another format.
    """

    def __init__(self, source: str | Path = TIMM_REAL_LABELS) -> None:
        timms = str(source) == TIMM_REAL_LABELS
        count = _IMAGES if timms else _count(Path(source))
        names = [""] * count  # timm's evaluator needs names in order; only its labels are used here
        self._labels: dict[str, list[int]] = RealLabelsImagenet(names, None if timms else str(source)).real_labels
        self.highest = max((max(labels) for labels in self._labels.values() if labels), default=-1)

    def of(self, filename: str) -> Sequence[int]:
        """Returns the correct class indices of an image; empty where the assessors did not agree on any.

        Args:
            filename: path of the image, or its name in an archive; it must contain the official name.

        Raises:
            DataError: the official name is missing or beyond the end of the list.
        """
        names = _OFFICIAL_NAME.findall(filename)
        labels = self._labels.get(f"{names[-1]}.JPEG") if names else None
        if labels is None:
            raise DataError(
                f"{filename} is not one of the {len(self._labels)} images with ReaL labels "
                "(ILSVRC2012_val_00000001.JPEG and so on); omit the ReaL labels for other data"
            )
        return labels


def _count(path: Path) -> int:
    """Returns the number of images in the file, after checking its format."""
    try:
        content = read_json(path)
    except DataError as error:
        raise DataError(f"cannot read the ReaL labels: {error}; use 'timm' for timm's copy") from error
    whole = isinstance(content, list) and all(
        isinstance(labels, list) and all(type(label) is int and label >= 0 for label in labels) for labels in content
    )
    if not whole or not content:
        raise DataError(f"{path} must be a list of lists of class indices, one per image, as real.json is")
    return len(content)
