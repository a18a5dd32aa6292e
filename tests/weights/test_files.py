"""Weight files: what is refused before it is used, what is never left half-written, and shards."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lamzoo.errors import DataError, HashMismatchError, UnsafeWeightsError, WeightsError, WeightsNotFoundError
from lamzoo.files import check_target
from lamzoo.weights.files import file_sha256, join, read_state_dict, shard, write_state_dict


def tensors() -> dict[str, Tensor]:
    return {f"blocks.{i}.weight": torch.randn(16, 16) for i in range(5)} | {"head.bias": torch.randn(3)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_the_expected_file_is_read(file: Path) -> None:
    assert same(read_state_dict(file, sha256=file_sha256(file)), read_state_dict(file))


def test_one_flipped_byte_is_refused(file: Path) -> None:
    expected = file_sha256(file)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    read_state_dict(file)  # still a valid safetensors file: only the hash can tell
    with pytest.raises(HashMismatchError, match=f"{file}.* is expected"):
        read_state_dict(file, sha256=expected)


@pytest.mark.parametrize("keep", [0, 4, 100, 3000])
def test_a_truncated_file_is_refused_without_a_hash_too(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="damaged"):
        read_state_dict(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match="nowhere.safetensors"):
        read_state_dict(tmp_path / "nowhere.safetensors")


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["model.pth", "model.bin", "model.safetensors"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_a_payload_never_runs(tmp_path: Path, name: str, legacy: bool) -> None:
    hit, path = tmp_path / "hit", tmp_path / name
    if legacy:
        path.write_bytes(pickle.dumps({"weight": Payload(hit)}))
    else:
        torch.save({"weight": Payload(hit)}, path)
    with pytest.raises(UnsafeWeightsError, match="allow_pickle=True"):
        read_state_dict(path)
    with pytest.raises(UnsafeWeightsError, match="no code in it was run"):
        read_state_dict(path, allow_pickle=True)
    assert not hit.exists()


def test_an_allowed_pickle_gives_its_weights(tmp_path: Path) -> None:
    expected = tensors()
    torch.save({"state_dict": {f"module.{key}": value for key, value in expected.items()}}, tmp_path / "checkpoint.pth")
    assert same(read_state_dict(tmp_path / "checkpoint.pth", allow_pickle=True), expected)


def test_no_safetensors_file_passes_for_a_pickle(tmp_path: Path) -> None:
    # The first byte of a safetensors file is the low byte of its header's length; 0x80 is also the first of a pickle.
    expected = {"x" * 70: torch.ones(1)}
    save_file(expected, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes()[0] == 0x80
    assert same(read_state_dict(tmp_path / "a.safetensors"), expected)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(file: Path) -> None:
    # A real limit of the operating system, in a child process, since it cannot be raised again.
    resource = pytest.importorskip("resource", reason="limits of a process are Unix's")
    before = file.read_bytes()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_state_dict(tensors(), file)
        except WeightsError as error:
            os._exit(0 if "nothing was changed" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_no_space_halfway_through_the_shards_leaves_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []

    def full(contents: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if saved:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(path)
        save_file(contents, path, metadata)

    monkeypatch.setattr("lamzoo.weights.files.save_file", full)
    with pytest.raises(WeightsError, match="No space left on device"):
        shard(file, 4000)
    assert saved
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot be written"):
        write_state_dict(tensors(), tmp_path / "file" / "model.safetensors")


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    base = torch.randn(4, 4)
    write_state_dict({"a": base, "b": base, "c": base[1:], "d": base.T}, tmp_path / "m.safetensors")
    assert same(read_state_dict(tmp_path / "m.safetensors"), {"a": base, "b": base, "c": base[1:], "d": base.T})


@hypothesis.settings(max_examples=15, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=8), max_bytes=st.integers(4000, 8000))
def test_shards_keep_to_their_size_and_join_to_what_they_were(tmp_path: Path, sizes: list[int], max_bytes: int) -> None:
    expected = {f"layer.{i}": torch.randn(size) for i, size in enumerate(sizes)}
    write_state_dict(expected, tmp_path / "m.safetensors")
    index = shard(tmp_path / "m.safetensors", max_bytes, tmp_path / "shards")
    weight_map = json.loads(index.read_text())["weight_map"]
    assert index.name == "m.safetensors.index.json"
    assert weight_map.keys() == expected.keys()
    assert all((index.parent / part).stat().st_size <= max_bytes for part in weight_map.values())
    assert same(read_state_dict(index), expected)
    assert same(read_state_dict(join(index, tmp_path / "joined.safetensors")), expected)


def test_a_tensor_larger_than_a_shard_is_named(file: Path) -> None:
    with pytest.raises(WeightsError, match=r"blocks\.0\.weight .* alone has 1024 bytes; shards need at least"):
        shard(file, 2500)


def test_each_shard_is_checked(file: Path, tmp_path: Path) -> None:
    index = shard(file, 4000, tmp_path / "shards")
    part = sorted(index.parent.glob("*.safetensors"))[1]
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(HashMismatchError, match=part.name):
        read_state_dict(index)
    part.unlink()
    with pytest.raises(WeightsNotFoundError, match=part.name):
        read_state_dict(index)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {"a": "../../x.safetensors"}}',
        '{"weight_map": {"a": "C:x.safetensors"}}',
        '{"weight_map": {"a": "m.safetensors.index.json"}}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {}, "metadata": {"sha256": {"x.safetensors": 5}}}',
        '{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_an_index_that_is_none_or_leads_elsewhere_is_refused(tmp_path: Path, text: str) -> None:
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(WeightsError, match=r"m\.safetensors\.index\.json .*; replace it with an intact copy"):
        read_state_dict(index)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x" * 300 + ".png", r"x\.\.\. can't be written \(File name too long\)"),
        ("x.gif", "is written as PNG; its name must end in .png"),
        ("nowhere/x.png", "does not exist; create it first"),
        ("folder.png", "can't be written over the folder"),
        ("file.png/x.png", "can't be written"),
    ],
)
def test_an_impossible_target_is_refused_in_advance(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.png").touch()
    with pytest.raises(DataError, match=says):
        check_target(tmp_path / name, "picture", suffix=".png")
    check_target(tmp_path / "new" / "x.png", "picture", suffix=".png", makes_folder=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.png", "folder.png"]


def test_a_shard_of_another_save_is_refused(file: Path, tmp_path: Path) -> None:
    index = shard(file, 4000, tmp_path / "shards")
    content = json.loads(index.read_text())
    content["weight_map"]["more"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="disagree about 'more'"):
        read_state_dict(index)


def header(content: object, size: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        header(b"{}", 2**63),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        header({"a": {"dtype": "F32", "shape": [10**18], "data_offsets": [0, 4]}}) + bytes(4),
        header({key: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for key in "ab"}) + bytes(4),
        header({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}) + bytes(3),
        header(b'{"a": ' + b"[" * 100_000),
        header({"__metadata__": {"lam_config": "[" * 100_000}}),
    ],
)
def test_a_hostile_safetensors_file_is_one_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match=r"m\.safetensors .*; replace it with an intact copy"):
        read_state_dict(tmp_path / "m.safetensors")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match="pipe"):
        read_state_dict(tmp_path / "m.safetensors")
