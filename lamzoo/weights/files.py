"""Reading, checking, writing and sharding weight files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import load_state_dict
from torch import Tensor

from lamzoo.errors import ConfigError, HashMismatchError, UnsafeWeightsError, WeightsError, WeightsNotFoundError
from lamzoo.files import atomic_files
from lamzoo.lam.config import LamConfig
from lamzoo.lam.layer import carried_configs, carry_configs
from lamzoo.reading import open_regular, to_json
from lamzoo.weights.loading import StateDict
from lamzoo.weights.sources import INDEX_SUFFIX, WeightsFile, promised_by_hub, read_index, way_out

_LAM_CONFIG = "lam_config"
_PICKLE_SUFFIXES = {".bin", ".pth", ".pt", ".ckpt", ".tar", ".pkl"}


def read_state_dict(path: str | Path, *, sha256: str | None = None, allow_pickle: bool = False) -> StateDict:
    """Checks the hash of a weights file and reads it.

    Args:
        path: a safetensors file, the ``.index.json`` of a sharded one, or, if allowed, a torch pickle.
        sha256: expected hash of the file. The shards of an index are checked against the hashes in the index.
        allow_pickle: also read a pickle, with ``weights_only=True``.

    Returns:
        Parameter name to tensor, on the CPU. Like the state dict of a model, it carries the ``LamConfig`` of its
        masks, if the file has one.

    Raises:
        WeightsNotFoundError: there is no such file.
        HashMismatchError: the file has another hash; it was not used.
        UnsafeWeightsError: the file is a pickle, which is not allowed, or contains more than weights.
        WeightsError: the file is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsNotFoundError(f"There is no weights file {path}.")
    try:
        _check_hash(path, sha256 or promised_by_hub(path))
        pickled = _is_pickle(path)
    except OSError as error:
        raise WeightsError(f"The weights file {path} cannot be read: {error.strerror}.") from error
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    if pickled:
        return _read_pickle(path, allow_pickle)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping
    except (SafetensorError, OSError, RuntimeError) as error:  # torch raises the last for shapes that it can't have
        raise WeightsError(f"{path} is damaged or not a safetensors file ({error}); {way_out(path)}.") from error
    return _with_lam_config(tensors, metadata, path)


def write_state_dict(state_dict: Mapping[str, Tensor], path: str | Path, max_bytes: int | None = None) -> WeightsFile:
    """Writes tensors to a safetensors file, or to shards of it and their index.

    Args:
        state_dict: names to tensors; tensors that share memory are written separately. The ``LamConfig`` that the
            state dict of a masked model carries is stored as JSON in the file's metadata, under ``lam_config``.
        path: ``NAME.safetensors``.
        max_bytes: maximum size of a file, including its header; by default a single file of any size is written.

    Returns:
        The file, or the index, with its sha256.

    Raises:
        WeightsError: a file cannot be written, or a single tensor is larger than ``max_bytes``.
    """
    with atomic_files() as stage:
        return stage_state_dict(stage, state_dict, Path(path), max_bytes)


def shard(path: str | Path, max_bytes: int, out_dir: str | Path | None = None) -> Path:
    """Splits a safetensors file into shards of at most ``max_bytes`` each, and writes an index in the hub's format.

    Args:
        path: ``NAME.safetensors``; not modified.
        max_bytes: maximum size of a shard, including its header.
        out_dir: folder for the shards; the folder of ``path`` by default.

    Returns:
        ``NAME.safetensors.index.json``, which also has the sha256 of each shard.

    Raises:
        WeightsError: the file is damaged, a file cannot be written, or a single tensor is larger than ``max_bytes``.
    """
    path = Path(path)
    target = (Path(out_dir) if out_dir is not None else path.parent) / path.name
    with atomic_files() as stage:
        return _stage_shards(stage, read_state_dict(path), target, max_bytes).path


def join(index: str | Path, path: str | Path) -> Path:
    """Merges the shards of an index into one safetensors file and returns its path.

    Raises:
        WeightsError: a shard is missing or damaged, or the file cannot be written.
    """
    return write_state_dict(read_state_dict(index), path).path


def stage_state_dict(
    stage: Callable[[Path], Path], state_dict: Mapping[str, Tensor], path: Path, max_bytes: int | None
) -> WeightsFile:
    """Does :func:`write_state_dict` as part of the caller's :func:`atomic_files`, together with other files."""
    tensors = _independent(state_dict)
    if max_bytes is not None and sum(t.nbytes for t in tensors.values()) + _header_bytes(tensors) > max_bytes:
        return _stage_shards(stage, tensors, path, max_bytes)
    staged = stage(path)
    _save(tensors, staged)
    return WeightsFile(path, file_sha256(staged), str(path))


def file_sha256(path: str | Path) -> str:
    """Returns the sha256 of a file in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stage_shards(stage: Callable[[Path], Path], tensors: StateDict, path: Path, max_bytes: int) -> WeightsFile:
    room = max_bytes - _header_bytes(tensors)
    for key, tensor in tensors.items():
        if tensor.nbytes > room:
            least = tensor.nbytes + _header_bytes(tensors)
            raise WeightsError(f"{key} of {path} alone has {tensor.nbytes} bytes; shards need at least {least}.")
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=f"{path.name.removesuffix('.safetensors')}{{suffix}}.safetensors", max_shard_size=room
    )
    hashes = {}
    for number, keys in enumerate(split.filename_to_tensors.values(), start=1):
        name = (
            f"{path.name.removesuffix('.safetensors')}-{number:05d}-of-{len(split.filename_to_tensors):05d}.safetensors"
        )
        staged = stage(path.with_name(name))
        _save(carry_configs({key: tensors[key] for key in keys}, carried_configs(tensors)), staged)
        hashes[name] = (file_sha256(staged), keys)
    index = {
        "metadata": {**split.metadata, "sha256": {name: sha256 for name, (sha256, _) in hashes.items()}},
        "weight_map": {key: name for name, (_, keys) in hashes.items() for key in keys},
    }
    path = path.with_name(path.name + INDEX_SUFFIX)
    staged = stage(path)
    staged.write_text(to_json(index, indent=2) + "\n", encoding="utf-8")
    return WeightsFile(path, file_sha256(staged), str(path))


def _save(tensors: StateDict, path: Path) -> None:
    """Writes a file whose bytes depend only on its content; safetensors shuffles the entries of its metadata."""
    save_file(tensors, path, metadata={"format": "pt", **_lam_metadata(tensors)})
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size  # only the order of the entries changes; the tensors follow immediately
        file.seek(8)
        file.write(text.ljust(size))


def _lam_metadata(tensors: StateDict) -> dict[str, str]:
    configs = list(carried_configs(tensors).values())
    if not configs or any(config.differences(configs[0]) for config in configs):  # a file stores one configuration
        return {}
    one_length = len({config.max_length for config in configs}) == 1
    return {_LAM_CONFIG: (configs[0] if one_length else replace(configs[0], max_length=None)).to_json()}


def _with_lam_config(tensors: StateDict, metadata: Mapping[str, str], path: Path) -> StateDict:
    if _LAM_CONFIG not in metadata:
        return tensors
    try:
        config = LamConfig.from_json(metadata[_LAM_CONFIG])
    except ConfigError as error:
        reason = str(error).rstrip(".")
        raise WeightsError(
            f"The metadata {_LAM_CONFIG} of {path} is not a LamConfig: {reason}; {way_out(path)}."
        ) from error
    return carry_configs(tensors, {key.rpartition(".lam.")[0] + ".lam": config for key in tensors if ".lam." in key})


def _header_bytes(tensors: StateDict) -> int:
    return 1024 + sum(len(key) + 128 for key in tensors)  # an upper bound for the header of any shard


def _check_hash(path: Path, promised: str | None) -> None:
    if promised is None:
        return
    actual = file_sha256(path)
    if actual != promised:
        raise HashMismatchError(
            f"{path} has sha256 {actual}, but {promised} is expected: the file is damaged or another one; "
            f"{way_out(path)}."
        )


def _read_shards(path: Path) -> StateDict:
    index = read_index(path)
    tensors: StateDict = {}
    configs: dict[str, LamConfig] = {}
    for shard in sorted(set(index.shard_of.values())):
        if not path.with_name(shard).exists():
            raise WeightsNotFoundError(f"{path} lists the shard {shard}, which is missing; copy it into the folder.")
        read = read_state_dict(path.with_name(shard), sha256=index.sha256.get(shard))
        odd = sorted(read.keys() ^ {key for key, name in index.shard_of.items() if name == shard})
        if odd:
            raise WeightsError(
                f"{path} and its shard {shard} disagree about {odd[0]!r}, so they are not of one save; {way_out(path)}."
            )
        tensors.update(read)
        configs.update(carried_configs(read))
    return carry_configs(tensors, configs)


def _is_pickle(path: Path) -> bool:
    with open_regular(path) as file:
        start = file.read(9)
    # A torch file is a zip or starts with pickle's PROTO opcode, whatever its name. The header length of a safetensors
    # file may start with the same bytes; the header's brace follows it.
    looks = start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] <= b"\x05")
    return path.suffix in _PICKLE_SUFFIXES or (looks and start[8:] != b"{")


def _read_pickle(path: Path, allowed: bool) -> StateDict:
    if not allowed:
        raise UnsafeWeightsError(
            f"{path} is a pickle, which can run code when it is read; convert it to safetensors, or pass "
            "allow_pickle=True in Python (only weights are read then)."
        )
    if path.suffix == ".safetensors":
        raise UnsafeWeightsError(f"{path} is a pickle named as a safetensors file; no code in it was run. Delete it.")
    try:
        tensors = load_state_dict(str(path), weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UnsafeWeightsError(
            f"{path} contains more than weights, or is damaged; no code in it was run ({error})."
        ) from error
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise WeightsError(f"{path} is not a state dict: it has values that are not tensors.")
    return tensors


def _independent(state_dict: Mapping[str, Tensor]) -> StateDict:
    seen: set[int] = set()
    result: StateDict = {}
    for key, value in state_dict.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[key] = tensor
    return carry_configs(result, carried_configs(state_dict))
