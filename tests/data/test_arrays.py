"""Arrays from npy and npz files: whole or refused in one sentence, and never with code."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lamzoo.data.arrays import read_npy, read_npz
from lamzoo.errors import DataError


def header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_arrays_are_read_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    arrays = {"x": np.arange(6.0).reshape(2, 3).T, "y": np.zeros((0, 4), np.uint8), "z": np.array("text")}
    np.savez_compressed(path, **arrays)
    found = read_npz(path, ["x", "y"], optional=["z", "other"])
    assert found.keys() == {"x", "y", "z"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    np.save(tmp_path / "a.npy", arrays["x"])
    np.testing.assert_array_equal(read_npy(tmp_path / "a.npy"), arrays["x"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a complete npy file"),
        (b"\x93NUMPY", "not a complete npy file"),
        (header((1 << 43,)), "has 128 bytes"),
        (header((-1,)) + bytes(40), "states an array"),
        (header((1,), "|O") + b"cos\nsystem\n(S'touch pwned'\ntR.", "contains a pickle"),
        (header((3,)) + bytes(8), "not a complete npy file|has 136 bytes"),
    ],
    ids=["empty", "cut in the magic", "32 TB", "negative", "pickle", "cut in the data"],
)
def test_a_damaged_array_is_refused_without_being_allocated(tmp_path: Path, content: bytes, says: str) -> None:
    path, packed = tmp_path / "a.npy", tmp_path / "a.npz"
    path.write_bytes(content)
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(DataError, match=says):
        read_npy(path)
    with pytest.raises(DataError, match=says.replace("npy file", "npz archive")):
        read_npz(packed, ["x"])


def test_a_missing_array_and_a_pipe_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(1))
    with pytest.raises(DataError, match="has no array 'y'; it has 'x'"):
        read_npz(tmp_path / "a.npz", ["x", "y"])
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(DataError, match="pipe, socket or device"):
        read_npz(tmp_path / "pipe.npz", ["x"])


def test_an_array_that_grows_too_much_is_not_decompressed(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(2**22))  # zeros are no bomb
    assert len(read_npz(tmp_path / "a.npz", ["x"])["x"]) == 2**22
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"")
        archive.infolist()[0].file_size = 2**31 - 1  # as the directory of the archive states
    with pytest.raises(DataError, match="'x' would grow to 2147483647 bytes"):
        read_npz(tmp_path / "a.npz", ["x"])


def test_an_archive_with_an_array_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header((0,)))
        archive.writestr("x", header((0,)))
    with pytest.raises(DataError, match="it has an array twice"):
        read_npz(tmp_path / "a.npz", ["x"])
