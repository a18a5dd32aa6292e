"""ImageNet's reassessed labels (ReaL, arXiv 2006.07159), which name every object in a validation image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from timm.data import RealLabelsImagenet

from lamzoo.data.json_files import read_json
from lamzoo.errors import DataError

#: Says that the labels are those that timm ships with its package.
TIMM_REAL_LABELS = "timm"
_IMAGES = 50_000  # of the validation split, and so of timm's file
_OFFICIAL_NAME = re.compile(r"ILSVRC2012_val_\d{8}")


class RealLabels:
    """The set of right answers for each image of ImageNet-1k's validation split, possibly empty.

    Args:
        source: ``real.json``, a list with the class numbers of ``ILSVRC2012_val_00000001.JPEG``, of the second image
            and so on; or ``"timm"`` for timm's copy of it.

    Raises:
        DataError: no such file, or it holds something else.
    """

    def __init__(self, source: str | Path = TIMM_REAL_LABELS) -> None:
        timms = str(source) == TIMM_REAL_LABELS
        count = _IMAGES if timms else _count(Path(source))
        names = [""] * count  # timm's evaluator wants the images in order; here only its table is of use
        self._labels: dict[str, list[int]] = RealLabelsImagenet(names, None if timms else str(source)).real_labels
        self.highest = max((max(labels) for labels in self._labels.values() if labels), default=-1)

    def of(self, filename: str) -> Sequence[int]:
        """Returns the right class numbers of an image, none where the assessors agreed on none.

        Args:
            filename: its path, or its place in an archive, in which its official name appears.

        Raises:
            DataError: it has no such name, or one beyond the list.
        """
        names = _OFFICIAL_NAME.findall(filename)
        labels = self._labels.get(f"{names[-1]}.JPEG") if names else None
        if labels is None:
            raise DataError(
                f"{filename} is not one of the {len(self._labels)} images that the ReaL labels are of "
                "(ILSVRC2012_val_00000001.JPEG and so on); leave them out for other data"
            )
        return labels


def _count(path: Path) -> int:
    """Returns how many images the file is of, after checking that it is such a file."""
    try:
        content = read_json(path)
    except DataError as error:
        raise DataError(f"cannot read the ReaL labels: {error}; 'timm' names timm's copy") from error
    whole = isinstance(content, list) and all(
        isinstance(labels, list) and all(isinstance(label, int) and label >= 0 for label in labels)
        for labels in content
    )
    if not whole or not content:
        raise DataError(f"{path} must be a list with a list of class numbers for each image, as real.json is")
    return len(content)
