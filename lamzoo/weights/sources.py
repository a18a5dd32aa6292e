"""Where weight files are: bundled, in the hub's cache, on the hub or in a folder; needs neither torch nor timm."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from huggingface_hub import constants

from lamzoo.errors import RegistryError, UnsafeWeightsError, WeightsError, WeightsNotFoundError
from lamzoo.files import is_plain_name, is_sha256
from lamzoo.reading import parse_json, read_text
from lamzoo.registry.cards import PretrainedWeights, data_dir

WEIGHTS_NAME = "model.safetensors"
INDEX_SUFFIX = ".index.json"
_OPEN_CLIP_NAME = "open_clip_pytorch_model.bin"
SAFE_SUFFIXES = (".safetensors", INDEX_SUFFIX)


@dataclass(frozen=True)
class WeightsFile:
    """A weights file on this machine.

    Attributes:
        path: a safetensors file, the ``.index.json`` of a sharded one, or a pickle.
        sha256: expected hash of the file; None if unknown.
        source: name of the weights in messages.
    """

    path: Path
    sha256: str | None
    source: str


class ShardIndex(NamedTuple):
    """The content of an index: the shard of each parameter, and the sha256 of each shard that states one."""

    shard_of: dict[str, str]
    sha256: dict[str, str]


class HubFile(NamedTuple):
    """A file of a hub repository; without ``filename``, the usual names of weight files are tried."""

    repo: str
    revision: str | None
    filename: str | None


def hub_file_of(tag: PretrainedWeights) -> HubFile | None:
    """Returns where a tag's weights are on the hub; timm or open_clip is asked only if the card has no repository."""
    if tag.hub is not None:
        default = _OPEN_CLIP_NAME if tag.open_clip else None if tag.timm else WEIGHTS_NAME
        return HubFile(tag.hub, tag.revision, tag.hub_file or default)
    if tag.timm is not None:
        from timm.models import get_pretrained_cfg

        cfg = get_pretrained_cfg(tag.timm)
        repo, _, revision = (cfg.hf_hub_id or "" if cfg is not None else "").partition("@")
        return HubFile(repo, tag.revision or revision or None, cfg.hf_hub_filename) if cfg and repo else None
    if tag.open_clip is not None:
        from open_clip import get_pretrained_cfg as open_clip_cfg

        place = open_clip_cfg(*tag.open_clip.split(":")).get("hf_hub") or ""
        repo, _, filename = place.rpartition("/")
        return HubFile(repo, tag.revision, filename or _OPEN_CLIP_NAME) if repo else None
    return None


def location(
    tag: PretrainedWeights, *, weights_dir: Path | None, cache_dir: str | Path | None = None
) -> Literal["bundled", "cached", "hub", "missing"]:
    """Returns where the weights of a tag would be loaded from, without network.

    Args:
        tag: the weights.
        weights_dir: folder of the bundled files.
        cache_dir: replaces the hub's cache folder.
    """
    if tag.file is not None and weights_dir is not None and (weights_dir / tag.file).is_file():
        return "bundled"
    place = hub_file_of(tag)
    if place is None:
        return "missing"
    folder = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{place.repo.replace('/', '--')}"
    if not folder.is_dir():  # spares the import of huggingface_hub's downloader, which takes longer than all the rest
        return "hub"
    from lamzoo import hub

    names = [name for name in _candidates(place.filename) if name.endswith(SAFE_SUFFIXES)]
    found = any(hub.cached(place.repo, name, revision=place.revision, cache_dir=cache_dir) for name in names)
    return "cached" if found else "hub"


def resolve(
    name: str,
    tag: PretrainedWeights,
    *,
    weights_dir: Path | None,
    cache_dir: str | Path | None = None,
    allow_pickle: bool = False,
) -> WeightsFile:
    """Finds a tag's file: bundled, in the local cache or on the hub, in this order.

    Args:
        name: ``arch.tag``, for messages.
        tag: the weights.
        weights_dir: folder of the bundled files.
        cache_dir: replaces the hub's cache folder.
        allow_pickle: accept the pickle of a hub repository without safetensors.

    Raises:
        WeightsNotFoundError: the file is not available; the message lists the places searched and how to get it.
        WeightsError: the download failed otherwise.
    """
    bundled = weights_dir / tag.file if weights_dir and tag.file else None
    if bundled is not None and bundled.is_file():
        return WeightsFile(bundled, tag.sha256, f"{name} ({bundled})")
    place = hub_file_of(tag)
    if place is None and tag.external:
        library, known = ("timm", tag.timm) if tag.timm else ("open_clip", tag.open_clip)
        raise WeightsNotFoundError(
            f"{library} has no hub repository for the weights of {known}; download a safetensors file and pass "
            "checkpoint_path=."
        )
    if place is None:
        raise WeightsNotFoundError(
            f"The weights {name} are not on this machine: {bundled} does not exist and the card names no hub "
            "repository; copy the file there, or pass its path as checkpoint_path=."
        )
    return resolve_repo(
        place.repo, revision=place.revision, filename=place.filename, sha256=tag.sha256, cache_dir=cache_dir,
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
    """Finds the weights of a hub repository, in the local cache or on the hub; safetensors are preferred.

    Raises:
        WeightsNotFoundError: the repository, or a usable file in it, is not available.
        UnsafeWeightsError: the repository has only a pickle and ``allow_pickle`` is False.
        WeightsError: the download failed otherwise.
    """
    from lamzoo import hub

    names = _candidates(filename)
    for candidate in names:  # a cached file is preferred to another format that has to be downloaded
        if (candidate.endswith(SAFE_SUFFIXES) or allow_pickle) and hub.cached(
            repo, candidate, revision=revision, cache_dir=cache_dir
        ):
            names = [candidate]
            break
    missing: hub.HubEntryMissingError | None = None
    for candidate in names:
        if not candidate.endswith(SAFE_SUFFIXES) and not allow_pickle:
            raise UnsafeWeightsError(
                f"The hub repository {repo} has no {' or '.join(names[:-1])}, only the pickle {candidate}, which can "
                "run code when it is read; pass allow_pickle=True in Python if you trust its authors."
            ) from missing
        try:
            path = hub.download(repo, candidate, revision=revision, cache_dir=cache_dir)
        except hub.HubEntryMissingError as error:
            missing = error
            continue
        if candidate.endswith(INDEX_SUFFIX):
            for part in sorted(set(read_index(path).shard_of.values())):
                hub.download(repo, part, revision=revision, cache_dir=cache_dir)
        return WeightsFile(path, sha256 or promised_by_hub(path), f"{repo}/{candidate}")
    raise missing or WeightsNotFoundError(f"The hub repository {repo} has none of {', '.join(names)}.")


def find_in_folder(folder: Path) -> Path:
    """Returns the weights file of a folder written by ``save_pretrained``, timm or the hub client.

    Raises:
        WeightsNotFoundError: the folder has no weights.
    """
    names = _candidates(None)
    for candidate in names:
        if (folder / candidate).is_file():
            return folder / candidate
    raise WeightsNotFoundError(f"The folder {folder} has no weights: none of {', '.join(names)}.")


def promised_by_hub(path: Path) -> str | None:
    """Returns the sha256 in the name of a cached hub file: the cache names the blob of a large file by its hash."""
    while True:  # the blob may be a link as well, to the store that repositories share
        if path.parent.name == "blobs" and is_sha256(path.name):
            return path.name
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()


def way_out(path: Path) -> str:
    """Returns how to replace a refused file, as the end of a message; one in the hub's cache is discarded for that."""
    from lamzoo import hub

    if (done := hub.discard(path)) is not None:
        return done
    if _is_bundled(path):
        return "it belongs to lamzoo: install lamzoo again (pip install --force-reinstall)"
    return "replace it with an intact copy, or save it again"


def read_index(path: Path) -> ShardIndex:
    """Reads the index of a sharded safetensors file.

    Raises:
        WeightsError: the file is not such an index, or names a shard outside its own folder.
    """
    try:
        index = parse_json(read_text(path))
        shards, hashes = index["weight_map"], (index.get("metadata") or {}).get("sha256") or {}
        for name in [*shards.values(), *hashes]:
            if not is_plain_name(name) or not name.endswith(".safetensors"):
                raise ValueError(f"{name!r} is not the name of a safetensors file in its folder")
        if odd := [sha256 for sha256 in hashes.values() if not is_sha256(sha256)]:
            raise ValueError(f"{odd[0]!r} is not a sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path} is not the index of a sharded safetensors file ({error}); {way_out(path)}."
        ) from error
    return ShardIndex(shards, hashes)


def _is_bundled(path: Path) -> bool:
    try:
        return data_dir("weights") in path.parents
    except RegistryError:  # an installation without weights
        return False


def _candidates(filename: str | None) -> list[str]:
    filename = filename or constants.PYTORCH_WEIGHTS_NAME
    if filename.endswith(".safetensors"):
        return [filename, filename + INDEX_SUFFIX]
    if filename == constants.PYTORCH_WEIGHTS_NAME:
        return [WEIGHTS_NAME, WEIGHTS_NAME + INDEX_SUFFIX, filename]
    if filename == _OPEN_CLIP_NAME:
        return ["open_clip_model.safetensors", filename]
    return [str(Path(filename).with_suffix(".safetensors")), filename]
