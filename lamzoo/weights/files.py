"""Weight files: where a tag's file is, whether it is intact, what is in it, and writing one without leaving halves."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg, load_state_dict
from torch import Tensor

from lamzoo import hub
from lamzoo.errors import ConfigError, HashMismatchError, UnsafeWeightsError, WeightsError, WeightsNotFoundError
from lamzoo.files import atomic_files
from lamzoo.lam import LamConfig
from lamzoo.lam.layer import carried_configs, carry_configs
from lamzoo.registry.cards import PretrainedWeights
from lamzoo.weights.loading import StateDict

WEIGHTS_NAME = "model.safetensors"
INDEX_SUFFIX = ".index.json"
_LAM_CONFIG = "lam_config"
_OPEN_CLIP_NAME = "open_clip_pytorch_model.bin"
_PICKLE_SUFFIXES = {".bin", ".pth", ".pt", ".ckpt", ".tar", ".pkl"}
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class WeightsFile:
    """A weights file that is on this machine.

    Attributes:
        path: a safetensors file, the ``.index.json`` of a sharded one, or a pickle.
        sha256: what the file must hash to; None where nobody promised anything.
        source: what to call it in messages.
    """

    path: Path
    sha256: str | None
    source: str


def resolve(
    name: str,
    tag: PretrainedWeights,
    *,
    weights_dir: Path | None,
    cache_dir: str | Path | None = None,
    allow_pickle: bool = False,
) -> WeightsFile:
    """Finds a tag's file: bundled, else in the local cache, else on the hub.

    Args:
        name: ``arch.tag``, for messages.
        tag: its record.
        weights_dir: folder of the bundled files.
        cache_dir: in place of the hub's cache folder.
        allow_pickle: whether a hub repository that has no safetensors may give its pickle.

    Raises:
        WeightsNotFoundError: it cannot be had here; says what was looked for, where, and how to bring it.
        WeightsError: the download failed otherwise.
    """
    bundled = weights_dir / tag.file if weights_dir and tag.file else None
    if bundled is not None and bundled.is_file():
        return WeightsFile(bundled, tag.sha256, f"{name} ({bundled})")
    if tag.timm is not None:
        cfg = get_pretrained_cfg(tag.timm)
        if cfg is None or not cfg.hf_hub_id:
            raise WeightsNotFoundError(
                f"timm has no hub repository for the weights of {tag.timm}; bring a safetensors file and pass "
                "checkpoint_path=."
            )
        repo, _, revision = cfg.hf_hub_id.partition("@")
        return resolve_repo(
            repo, revision=tag.revision or revision or None, filename=cfg.hf_hub_filename, sha256=tag.sha256,
            cache_dir=cache_dir, allow_pickle=allow_pickle,
        )  # fmt: skip
    if tag.open_clip is not None:
        return _resolve_open_clip(tag, cache_dir, allow_pickle)
    if tag.hub is None:
        raise WeightsNotFoundError(
            f"The weights {name} are not on this machine: {bundled} does not exist and the card names no hub "
            "repository; copy the file there, or pass its path as checkpoint_path=."
        )
    return resolve_repo(
        tag.hub, revision=tag.revision, filename=tag.hub_file, sha256=tag.sha256, cache_dir=cache_dir,
        allow_pickle=allow_pickle,
    )  # fmt: skip


def resolve_repo(
    repo: str,
    *,
    revision: str | None = None,
    filename: str | None = None,
    sha256: str | None = None,
    cache_dir: str | Path | None = None,
    allow_pickle: bool = False,
) -> WeightsFile:
    """Finds the weights of a hub repository, in the local cache or on the hub; safetensors before anything else.

    Raises:
        WeightsNotFoundError: the repository, or a usable file in it, cannot be had here.
        UnsafeWeightsError: it has a pickle only and ``allow_pickle`` is False.
        WeightsError: the download failed otherwise.
    """
    names = _candidates(filename)
    for candidate in names:  # what is in the cache is used before the hub is asked for another form of it
        if (candidate.endswith((".safetensors", INDEX_SUFFIX)) or allow_pickle) and hub.cached(
            repo, candidate, revision=revision, cache_dir=cache_dir
        ):
            names = [candidate]
            break
    missing: hub.HubEntryMissingError | None = None
    for candidate in names:
        if not candidate.endswith((".safetensors", INDEX_SUFFIX)) and not allow_pickle:
            raise UnsafeWeightsError(
                f"The hub repository {repo} has no {' or '.join(names[:-1])}; {candidate} would be a pickle, which can "
                "run code when it is read: pass allow_pickle=True if you trust its authors."
            ) from missing
        try:
            path = hub.download(repo, candidate, revision=revision, cache_dir=cache_dir)
        except hub.HubEntryMissingError as error:
            missing = error
            continue
        if candidate.endswith(INDEX_SUFFIX):
            for part in sorted(set(_read_index(path)["weight_map"].values())):
                hub.download(repo, part, revision=revision, cache_dir=cache_dir)
        return WeightsFile(path, sha256 or _promised_by_hub(path), f"{repo}/{candidate}")
    raise missing or WeightsNotFoundError(f"The hub repository {repo} has none of {', '.join(names)}.")


def find_in_folder(folder: Path) -> Path:
    """Returns the weights file of a folder written by ``save_pretrained``, by timm or by the hub client.

    Raises:
        WeightsNotFoundError: there is none.
    """
    names = _candidates(None)
    for candidate in names:
        if (folder / candidate).is_file():
            return folder / candidate
    raise WeightsNotFoundError(f"The folder {folder} has no weights; one of {', '.join(names)} is looked for.")


def read_state_dict(path: str | Path, *, sha256: str | None = None, allow_pickle: bool = False) -> StateDict:
    """Reads a weights file, its hash first.

    Args:
        path: a safetensors file, the ``.index.json`` of a sharded one, or, where allowed, a torch pickle.
        sha256: what the file must hash to. The shards of an index are checked against the hashes that it holds.
        allow_pickle: read a pickle, with ``weights_only=True``.

    Returns:
        Parameter name to tensor, on the CPU. It carries the ``LamConfig`` of its masks, where the file has it, as the
        state dict of a model does.

    Raises:
        WeightsNotFoundError: there is no such file.
        HashMismatchError: it is not the file promised; nothing of it was used.
        UnsafeWeightsError: it is a pickle and not allowed, or has more in it than weights.
        WeightsError: it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsNotFoundError(f"There is no weights file {path}.")
    _check_hash(path, sha256 or _promised_by_hub(path))
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    if _is_pickle(path):
        return _read_pickle(path, allow_pickle)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is damaged or not a safetensors file ({error}); delete it and get it again."
        ) from error
    return _with_lam_config(tensors, metadata, path)


def write_state_dict(state_dict: Mapping[str, Tensor], path: str | Path, max_bytes: int | None = None) -> WeightsFile:
    """Writes tensors to a safetensors file, or to shards of it and their index.

    Args:
        state_dict: names to tensors; those that share memory are written one by one. The ``LamConfig`` that the state
            dict of a masked model carries becomes metadata of the file, ``lam_config``, as JSON.
        path: ``NAME.safetensors``.
        max_bytes: size of the largest file, its header included; by default there is one file of any size.

    Returns:
        The file, or the index, with its sha256.

    Raises:
        WeightsError: a file cannot be written, or a tensor alone is larger than ``max_bytes``.
    """
    with atomic_files() as stage:
        return stage_state_dict(stage, state_dict, Path(path), max_bytes)


def shard(path: str | Path, max_bytes: int, out_dir: str | Path | None = None) -> Path:
    """Splits a safetensors file into shards of at most ``max_bytes`` each, with the hub's index format.

    Args:
        path: ``NAME.safetensors``; left alone.
        max_bytes: size of the largest shard, its header included.
        out_dir: folder for the shards; that of ``path`` by default.

    Returns:
        ``NAME.safetensors.index.json``, which also holds the sha256 of each shard.

    Raises:
        WeightsError: the file is damaged, or as :func:`write_state_dict`.
    """
    path = Path(path)
    target = (Path(out_dir) if out_dir is not None else path.parent) / path.name
    with atomic_files() as stage:
        return _stage_shards(stage, read_state_dict(path), target, max_bytes).path


def join(index: str | Path, path: str | Path) -> Path:
    """Puts the shards of an index back into one safetensors file and returns its path.

    Raises:
        WeightsError: as :func:`read_state_dict` and :func:`write_state_dict`.
    """
    return write_state_dict(read_state_dict(index), path).path


def stage_state_dict(
    stage: Callable[[Path], Path], state_dict: Mapping[str, Tensor], path: Path, max_bytes: int | None
) -> WeightsFile:
    """Does :func:`write_state_dict` inside an :func:`atomic_files` of the caller's, together with other files."""
    tensors = _independent(state_dict)
    if max_bytes is not None and sum(t.nbytes for t in tensors.values()) + _header_bytes(tensors) > max_bytes:
        return _stage_shards(stage, tensors, path, max_bytes)
    staged = stage(path)
    _save(tensors, staged)
    return WeightsFile(path, file_sha256(staged), str(path))


def file_sha256(path: str | Path) -> str:
    """Returns the sha256 of a file in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stage_shards(stage: Callable[[Path], Path], tensors: StateDict, path: Path, max_bytes: int) -> WeightsFile:
    room = max_bytes - _header_bytes(tensors)
    for key, tensor in tensors.items():
        if tensor.nbytes > room:
            least = tensor.nbytes + _header_bytes(tensors)
            raise WeightsError(f"{key} of {path} has {tensor.nbytes} bytes alone; shards need at least {least}.")
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
    staged.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return WeightsFile(path, file_sha256(staged), str(path))


def _save(tensors: StateDict, path: Path) -> None:
    """Writes one file whose bytes depend on what is in it alone; safetensors shuffles the entries of its metadata."""
    save_file(tensors, path, metadata={"format": "pt", **_lam_metadata(tensors)})
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size  # the order of the entries is all that changes; tensors follow at once
        file.seek(8)
        file.write(text.ljust(size))


def _lam_metadata(tensors: StateDict) -> dict[str, str]:
    configs = list(carried_configs(tensors).values())
    if not configs or any(config.differences(configs[0]) for config in configs):  # one file, one kind of masks
        return {}
    one_length = len({config.max_length for config in configs}) == 1
    return {_LAM_CONFIG: (configs[0] if one_length else replace(configs[0], max_length=None)).to_json()}


def _with_lam_config(tensors: StateDict, metadata: Mapping[str, str], path: Path) -> StateDict:
    if _LAM_CONFIG not in metadata:
        return tensors
    try:
        config = LamConfig.from_json(metadata[_LAM_CONFIG])
    except ConfigError as error:
        raise WeightsError(f"The metadata {_LAM_CONFIG} of {path} is not a LamConfig: {error}") from error
    return carry_configs(tensors, {key.rpartition(".lam.")[0] + ".lam": config for key in tensors if ".lam." in key})


def _header_bytes(tensors: StateDict) -> int:
    return 1024 + sum(len(key) + 128 for key in tensors)  # no shard's header is longer than all of theirs


def _resolve_open_clip(tag: PretrainedWeights, cache_dir: str | Path | None, allow_pickle: bool) -> WeightsFile:
    from open_clip import get_pretrained_cfg as open_clip_cfg  # needed for its own tags alone

    place = open_clip_cfg(*(tag.open_clip or "").split(":")).get("hf_hub") or ""
    repo, _, filename = place.rpartition("/")
    if not repo:
        raise WeightsNotFoundError(
            f"open_clip has no hub repository for the weights {tag.open_clip}; bring a safetensors file and pass "
            "checkpoint_path=."
        )
    return resolve_repo(
        repo, revision=tag.revision, filename=filename or _OPEN_CLIP_NAME, sha256=tag.sha256, cache_dir=cache_dir,
        allow_pickle=allow_pickle,
    )  # fmt: skip


def _candidates(filename: str | None) -> list[str]:
    filename = filename or constants.PYTORCH_WEIGHTS_NAME
    if filename.endswith(".safetensors"):
        return [filename, filename + INDEX_SUFFIX]
    if filename == constants.PYTORCH_WEIGHTS_NAME:
        return [WEIGHTS_NAME, WEIGHTS_NAME + INDEX_SUFFIX, filename]
    if filename == _OPEN_CLIP_NAME:
        return ["open_clip_model.safetensors", filename]
    return [str(Path(filename).with_suffix(".safetensors")), filename]


def _promised_by_hub(path: Path) -> str | None:
    # The hub's cache names the blob of a large file by its sha256 and links to it.
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else None


def _check_hash(path: Path, promised: str | None) -> None:
    if promised is None:
        return
    actual = file_sha256(path)
    if actual != promised:
        raise HashMismatchError(
            f"{path} has sha256 {actual} and {promised} was promised: it is damaged or another file; delete it and "
            "get it again."
        )


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        parts = set(index["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not the index of a sharded safetensors file ({error!r}).") from error
    for part in parts:
        if Path(part).name != part:
            raise WeightsError(f"{path} names the shard {part!r}, which is not beside it; refused.")
    return index


def _read_shards(path: Path) -> StateDict:
    index = _read_index(path)
    hashes = index.get("metadata", {}).get("sha256", {})
    tensors: StateDict = {}
    configs: dict[str, LamConfig] = {}
    for part in sorted(set(index["weight_map"].values())):
        read = read_state_dict(path.parent / part, sha256=hashes.get(part))
        tensors.update(read)
        configs.update(carried_configs(read))
    if tensors.keys() != index["weight_map"].keys():
        odd = sorted(tensors.keys() ^ index["weight_map"].keys())
        raise WeightsError(f"The shards of {path} and the index disagree about {odd[0]!r}; get them again.")
    return carry_configs(tensors, configs)


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    # A torch file is a zip or begins with pickle's PROTO opcode, whatever it is called; a safetensors file may begin
    # with the same bytes, the length of its header, and then has that header's brace.
    looks = start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] <= b"\x05")
    return path.suffix in _PICKLE_SUFFIXES or (looks and start[8:] != b"{")


def _read_pickle(path: Path, allowed: bool) -> StateDict:
    if not allowed:
        raise UnsafeWeightsError(
            f"{path} is a pickle, which can run code when it is read; convert it to safetensors, or pass "
            "allow_pickle=True (its weights alone are read then)."
        )
    if path.suffix == ".safetensors":
        raise UnsafeWeightsError(f"{path} is a pickle under the name of safetensors; nothing of it was run. Delete it.")
    try:
        tensors = load_state_dict(str(path), weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UnsafeWeightsError(
            f"{path} has more in it than weights, or is damaged; nothing of it was run ({error})."
        ) from error
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise WeightsError(f"{path} is not a state dict: not all of its values are tensors.")
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
