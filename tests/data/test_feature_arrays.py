"""Feature rows and their provenance: read from a file that is opened once, and checked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lamzoo.data.feature_arrays
from lamzoo.data.arrays import read_npz
from lamzoo.data.feature_arrays import ORIGIN, check_rows, read_features, read_features_and_origin, unit
from lamzoo.errors import DataError

ROWS = np.arange(6, dtype=np.float64).reshape(3, 2)


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_rows_and_provenance_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def counted(path: Path, *names: Any) -> dict[str, Any]:
        opened.append(path)
        return read_npz(path, *names)

    monkeypatch.setattr(lamzoo.data.feature_arrays, "read_npz", counted)
    path = write(tmp_path / "a.npz", features=ROWS, **{ORIGIN: np.array('{"clip_seconds": 2.0}')})
    rows, origin = read_features_and_origin(path, "features")
    assert origin == {"clip_seconds": 2.0}
    assert rows.dtype == np.float32
    assert rows.tolist() == ROWS.tolist()
    assert opened == [path]


def test_a_file_of_other_tools_has_no_provenance(tmp_path: Path) -> None:
    rows, origin = read_features_and_origin(write(tmp_path / "a.npz", features=ROWS), "features")
    assert (len(rows), origin) == (3, None)


@pytest.mark.parametrize(("text", "reason"), [("{", "invalid provenance"), ("[1]", "it is not a JSON object")])
def test_damaged_provenance_is_an_error_only_where_it_is_read(tmp_path: Path, text: str, reason: str) -> None:
    path = write(tmp_path / "a.npz", features=ROWS, **{ORIGIN: np.array(text)})
    assert len(read_features(path, "features")) == 3
    with pytest.raises(DataError, match=reason):
        read_features_and_origin(path, "features")


def test_errors_name_the_file_and_the_array(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no b\.npz; extract it, or remove the query"):
        read_features(tmp_path / "b.npz", "features")
    with pytest.raises(
        DataError, match=r"a\.npz: features is bool \(3,\); it must be floats, one row per clip or word"
    ):
        read_features(write(tmp_path / "a.npz", features=np.ones(3, bool)), "features")
    with pytest.raises(DataError, match=r"a\.npz: features has values that are not finite"):
        read_features(write(tmp_path / "a.npz", features=ROWS + np.inf), "features")
    with pytest.raises(DataError, match=r"^x is float64 \(0, 2\); it must be floats, one row per frame$"):
        check_rows(ROWS[:0], "x")


def test_rows_of_zeros_stay_zeros_when_normalised() -> None:
    assert unit(np.array([[0, 0], [3, 4]], np.float32)).tolist() == [[0, 0], pytest.approx([0.6, 0.8])]
