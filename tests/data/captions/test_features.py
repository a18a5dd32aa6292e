"""Features in files: which rows belong to a span, and how files that are wrong are named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamzoo.data.captions.feature_files import FeatureFiles, row_times, rows_within
from lamzoo.errors import DataError
from lamzoo.video.feature_files import write_features


def rows(count: int, width: int = 4) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, width)).astype(np.float32)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0.0, 1.0, range(5)),
        (0.1, 0.9, range(5)),  # a middle at the very edge counts
        (0.11, 0.89, range(1, 4)),
        (0.45, 0.46, range(2, 3)),  # none has its middle there: that which is nearest
        (-3.0, 0.2, range(1)),
        (1.8, 9.0, range(9, 10)),
        (7.0, 9.0, range(9, 10)),  # behind the end
        (0.0, float("inf"), range(10)),
    ],
)
def test_a_span_has_the_rows_whose_middles_it_holds(start: float, end: float, expected: range) -> None:
    assert rows_within(10, 5.0, start, end) == expected
    assert row_times(expected, 5.0, start) == pytest.approx([(k + 0.5) / 5 - start for k in expected], abs=1e-6)


def test_files_know_their_rate_or_are_told_it_or_are_spread(tmp_path: Path) -> None:
    write_features(tmp_path / "clip_features" / "own.npz", "features", rows(6), {"clip_seconds": 2.0})
    np.save(tmp_path / "clip_features" / "told.npy", rows(6))
    np.savez(tmp_path / "clip_features" / "plain.npz", features=rows(6).astype(np.float16))
    (tmp_path / "audio").mkdir()
    np.save(tmp_path / "audio" / "told.npy", rows(12, 3))
    files = FeatureFiles(tmp_path, 5.0)
    assert files.modalities == {"video": 4, "audio": 3}
    found = files.read("own", 3.5, 8.0)
    assert list(found) == ["video"]
    assert found["video"].times == pytest.approx([1.5, 3.5])  # clips 2 and 3 of 2 s
    assert found["video"].features == pytest.approx(rows(6)[2:4] / np.linalg.norm(rows(6)[2:4], axis=1)[:, None])
    both = files.read("told", 0.2, 0.8)
    assert both["video"].times == pytest.approx([0.1, 0.3, 0.5])
    assert both["audio"].features.dtype == np.float32
    spread = FeatureFiles(tmp_path).read("told", 0.0, 3.0, 3.0)
    assert spread["video"].times == pytest.approx(np.arange(6) / 2 + 0.25)
    assert spread["audio"].times == pytest.approx(np.arange(12) / 4 + 0.125)
    assert FeatureFiles(tmp_path).read("none", 0.0, 3.0) == {}
    with pytest.raises(DataError, match=r"plain\.npz doesn't state its rows per second; append them"):
        FeatureFiles(tmp_path).read("plain", 0.0, 3.0)


def test_a_folder_without_files_is_no_modality(tmp_path: Path) -> None:
    (tmp_path / "video").mkdir()
    (tmp_path / "video" / ".DS_Store").touch()
    assert FeatureFiles(tmp_path).modalities == {}
    assert FeatureFiles(tmp_path / "nowhere").modalities == {}


def damaged_origin(path: Path) -> None:
    np.savez(path, features=rows(3), lamzoo=np.array(json.dumps({"clip_seconds": "long"})))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("b.npy", lambda path: path.write_bytes(b"no"), r"b\.npy is not a complete npy file"),
        ("b.npz", lambda path: path.write_bytes(b"no"), r"b\.npz is not a complete npz archive"),
        ("b.npz", lambda path: np.savez(path, x=rows(3)), r"b\.npz has no array 'features'"),
        ("b.npz", damaged_origin, r"b\.npz has invalid provenance"),
        (
            "b.npy",
            lambda path: np.save(path, rows(3)[0]),
            r"b\.npy is float32 \(4,\); it must be floats, one row per frame",
        ),
        ("b.npy", lambda path: np.save(path, rows(3) * np.nan), r"b\.npy has values that are not finite"),
        (
            "b.npy",
            lambda path: np.save(path, rows(3, 5)),
            r"b\.npy has 5 features per row, and others in its folder have 4",
        ),
    ],
)
def test_files_that_are_wrong_are_named(tmp_path: Path, name: str, change: Any, says: str) -> None:
    (tmp_path / "video").mkdir()
    np.save(tmp_path / "video" / "a.npy", rows(6))
    change(tmp_path / "video" / name)
    with pytest.raises(DataError, match=says):
        FeatureFiles(tmp_path, 5.0).read("b", 0.0, 1.0)
