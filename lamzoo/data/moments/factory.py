"""Creation of moment data sets from one-line specifications: the grammar and the source of each layout."""

from __future__ import annotations

import re
from pathlib import Path

from lamzoo.data.grid_tokens import GridTokens, Modalities
from lamzoo.data.moments.base import MomentDataset, MomentSource
from lamzoo.data.moments.grid import GridMoments
from lamzoo.data.moments.qvhighlights import charades, qvhighlights, tvsum
from lamzoo.data.paths import folder_exists, split_last
from lamzoo.data.splits import split_spec
from lamzoo.errors import DataError

_GRAMMAR = "qvhighlights:DIR, charades:DIR, tvsum:DIR[:DOMAIN] or grid:DIR[:MODALITIES[:SECONDS]]"

_NUMBER = r"\d+(?:\.\d+)?"
_GRID_OPTIONS = re.compile(
    rf":(?P<modalities>both|video|audio)(?::(?P<shortest>{_NUMBER})(?:-(?P<longest>{_NUMBER}))?)?$"
)
_GRID_SECONDS = 10.0


def create_moment_dataset(spec: str, split: str) -> MomentDataset:
    """Opens a split of queries about videos.

    Args:
        spec: one of

            - ``qvhighlights:DIR``: QVHighlights' annotations; see :func:`qvhighlights`.
            - ``charades:DIR``: Charades-STA; see :func:`lamzoo.data.moments.qvhighlights.charades`.
            - ``tvsum:DIR`` or ``tvsum:DIR:BK``: TVSum's highlights, of all domains or one; see
              :func:`lamzoo.data.moments.qvhighlights.tvsum`.
            - ``grid:DIR``, ``grid:DIR:audio`` or ``grid:DIR:both:10-60``: words in recordings of GRID's sentences, from
              ``both`` modalities (the default), ``video`` or ``audio``, of 10 s (the default) or of 10 to 60; see
              :class:`lamzoo.data.moments.grid.GridMoments`.

            The features of the first three are in ``DIR/features``, ``DIR/moment_detr_features`` or ``DIR`` itself.
        split: ``train``, ``validation``, ``test`` or another name in the data.

    Returns:
        The queries; :meth:`~MomentDataset.read` returns their features.

    Raises:
        DataError: the specification, the folder or the split does not exist, or the files are invalid.
    """
    return MomentDataset(_source(spec, split), spec)


def _source(spec: str, split: str) -> MomentSource:
    kind, rest = split_spec(spec, split, _GRAMMAR, ("qvhighlights", "charades", "tvsum", "grid"))
    match kind:
        case "qvhighlights":
            return qvhighlights(Path(rest), split)
        case "charades":
            return charades(Path(rest), split)
        case "tvsum":
            folder, domain = split_last(rest)
            if domain is not None and not folder_exists(rest):
                return tvsum(Path(folder), split, domain)
            return tvsum(Path(rest), split)
        case "grid":
            return _grid(rest, split)
    raise DataError(f"{spec!r} is not a moment data set; it must be {_GRAMMAR}")


def _grid(rest: str, split: str) -> MomentSource:
    modalities: Modalities = "both"
    shortest = longest = _GRID_SECONDS
    found = _GRID_OPTIONS.search(rest)
    if found is not None:
        rest = rest[: found.start()]
        modalities = found["modalities"]  # type: ignore[assignment]  # the pattern has no others
        shortest = float(found["shortest"] or _GRID_SECONDS)
        longest = float(found["longest"] or shortest)
    return GridMoments(GridTokens(Path(rest), split, modalities), (shortest, longest))
