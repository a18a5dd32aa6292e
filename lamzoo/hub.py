"""Downloads from the Hugging Face Hub and uploads: cache first, a hard time limit, and one kind of error."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    HfFileMetadata,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

from lamzoo.errors import HashMismatchError, HubUnreachableError, WeightsError, WeightsNotFoundError
from lamzoo.files import is_plain_name
from lamzoo.reading import open_regular, read_text

_Result = TypeVar("_Result")

#: Seconds until the hub counts as unreachable, including name resolution and all addresses.
ANSWER_SECONDS = 8.0
# The exceptions of whichever HTTP library huggingface_hub is built on (requests, httpx, httpx2).
_TransportError: type[Exception] = HfHubHTTPError.__bases__[0]
_MAX_RESTARTS = 2
_CHECKED_BYTES = 2**24  # cached files of at most this size are hashed at each use; weights are when they are read
_REFUSED = ".lamzoo-refused"  # in the folder of a repository: the commit of which a file was refused
_ABANDONED_SECONDS = 86400.0  # age of a partial download that no process is still writing


class HubEntryMissingError(WeightsNotFoundError):
    """The hub has no such repository, revision or file."""


def offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE`` is set, now or when huggingface_hub was imported."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return constants.HF_HUB_OFFLINE or any(os.environ.get(n, "").upper() in {"1", "ON", "YES", "TRUE"} for n in names)


def cached(
    repo: str, filename: str, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path | None:
    """Returns the file's path in the local cache, or None.

    A branch name refers to the commit downloaded last; the hub is not contacted.

    Raises:
        WeightsNotFoundError: the name of the repository, revision or file is not one that a repository can have.
    """
    for what, name in (("revision", revision or "main"), ("file", filename)):
        if not all(map(is_plain_name, name.split("/"))):
            raise WeightsNotFoundError(f"{name!r} cannot be a {what} of the hub repository {repo!r}; correct the name.")
    try:
        found = try_to_load_from_cache(repo, filename, cache_dir=cache_dir, revision=revision or "main")
    except HFValidationError as error:
        raise WeightsNotFoundError(
            f"{repo!r} is not the name of a hub repository, which is OWNER/NAME: {error}"
        ) from error
    except (OSError, ValueError):  # a damaged reference, which the next download writes again
        with contextlib.suppress(OSError):
            (_folder(repo, cache_dir) / "refs" / (revision or "main")).unlink()
        return None
    return Path(found) if isinstance(found, str) else None


def download(repo: str, filename: str, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Returns the path of a hub file in the local cache, downloading it if necessary.

    The file is downloaded under a temporary name and renamed when complete; a second process that needs the same file
    waits. What arrives is compared with the hash that the hub states, and so are small cached files; a damaged one is
    removed and downloaded again. ``HF_ENDPOINT``, ``HF_HUB_CACHE`` and ``HF_HUB_OFFLINE`` have their usual meaning.

    Args:
        repo: ``owner/name``.
        filename: path in the repository.
        revision: commit, tag or branch; ``main`` by default.
        cache_dir: replaces the hub's cache folder.

    Raises:
        HubEntryMissingError: the hub has no such repository, revision or file, or this user has no access to it.
        HubUnreachableError: offline, or no answer within :data:`ANSWER_SECONDS`.
        HashMismatchError: the file arrives damaged twice.
        WeightsError: any other failure: a server error, a broken connection, a cache that cannot be written.
    """
    path = cached(repo, filename, revision=revision, cache_dir=cache_dir)
    if path is not None:
        path = _ask_again(path, repo, filename, revision, cache_dir)
    try:
        if path is not None and (path.stat().st_size > _CHECKED_BYTES or is_intact(path) is not False):
            return path
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); make it readable, or delete it.") from error
    damaged = "" if path is None else f"; {path} was damaged: {discard(path)}"
    for _ in range(2):
        path = _fetch(repo, filename, revision, cache_dir, damaged)
        try:
            if is_intact(path) is not False:
                return path
        except OSError as error:  # a folder or pipe in the cache, which the hub client takes for the file
            raise WeightsError(f"{path} cannot be read ({error.strerror}); delete {path.resolve()}.") from error
        damaged = f"; {path} was damaged: {discard(path)}"
    raise HashMismatchError(
        f"{repo}/{filename} arrived twice with another sha256 than the hub states and was not kept: try again later, "
        "or through another network, proxy or mirror (HF_ENDPOINT)."
    )


def push_to_hub(folder: str | Path, repo: str, *, private: bool = False, message: str = "Upload from lamzoo") -> str:
    """Uploads a folder that ``save_pretrained`` or ``save_lam`` wrote to the Hugging Face Hub, as one commit.

    Configurations, safetensors files, a tokenizer and a ``README.md`` are uploaded; other files of the folder are not.
    Needs a login with the right to write (``hf auth login``, or ``HF_TOKEN``). ``HF_ENDPOINT`` has its usual meaning.

    Args:
        folder: the folder.
        repo: ``owner/name``; created if there is none.
        private: of a new repository.
        message: of the commit.

    Returns:
        The address of the repository. ``"hf-hub:<repo>"`` is its name for :func:`lamzoo.create_model` and
        :func:`lamzoo.load_lam`.

    Raises:
        WeightsNotFoundError: the folder doesn't exist, or has no model and no masks.
        WeightsError: offline, no first answer within :data:`ANSWER_SECONDS`, no right to write, a wrong name, a file
            that cannot be read, or any other failure. The transfer of the files has no time limit.
    """
    folder = Path(folder)
    names = [path.name for pattern in _UPLOADED for path in sorted(folder.glob(pattern))]
    if not {"config.json", "lam_config.json"} & set(names):
        raise WeightsNotFoundError(
            f"There is no model and there are no masks in {folder}; write them with lamzoo.save_pretrained or "
            "lamzoo.save_lam."
        )
    if offline():
        raise WeightsError(f"{folder} cannot be uploaded, because HF_HUB_OFFLINE is set; unset it.")
    api = HfApi(endpoint=_endpoint(), library_name="lamzoo")
    what = f"{folder} cannot be uploaded to {repo!r}"
    try:
        files = [CommitOperationAdd(name, str(folder / name)) for name in names]
    except (OSError, ValueError) as error:
        why = _reason(error) if isinstance(error, OSError) else error
        raise WeightsError(f"{what}: a file cannot be read ({why}).") from error
    try:
        url = _within(ANSWER_SECONDS, lambda: api.create_repo(repo, private=private, exist_ok=True))
        api.create_commit(url.repo_id, files, commit_message=message)
    except HFValidationError as error:
        raise WeightsError(f"{what}, which is not the name of a hub repository, OWNER/NAME: {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = "this login may not write there" if status in (401, 403) else f"the hub answered {status}"
        raise WeightsError(f"{what}: {why}; log in with `hf auth login`, or try again later.") from error
    except (TimeoutError, ConnectionError, _TransportError) as error:
        raise WeightsError(
            f"{what}: {api.endpoint} does not answer ({error or 'no answer'}); try again later."
        ) from error
    except OSError as error:
        raise WeightsError(f"{what}: a file cannot be read ({_reason(error)}).") from error
    except ValueError as error:  # a mirror that answers otherwise than the hub
        raise WeightsError(f"{what}: {api.endpoint} gave no usable answer ({error}).") from error
    except RuntimeError as error:  # of large files, whatever the reason
        raise WeightsError(
            f"{what}: the transfer of a large file failed ({_one_line(error.__cause__ or error)}); try again later."
        ) from error
    return str(url)


_UPLOADED = ("*config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "README.md")


def is_intact(path: Path) -> bool | None:
    """Compares a cached file with its hash, by which the cache names it: sha256, or git's sha1 for a small file.

    Returns:
        None if the hash is unknown: the file is not in a hub cache, or a mirror names its files otherwise.
    """
    place = _Place.of(path)
    name = "" if place is None or place.blob is None else place.blob.name
    if not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", name):
        return None
    with open_regular(path) as file:
        if len(name) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest() == name
        git = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
        plain = hashlib.sha1(usedforsecurity=False)  # of some mirrors
        while block := file.read(2**20):
            git.update(block)
            plain.update(block)
    return name in (git.hexdigest(), plain.hexdigest())


def discard(path: str | Path) -> str | None:
    """Makes the next download fetch a cached file again, because its content was refused.

    A damaged file is removed with its content, the blob, to which other snapshots may link as well: the hub client
    downloads it again for them. A file that is as the hub had it stays, because other programs may use it; the next
    download asks the hub for another version.

    Args:
        path: the refused file.

    Returns:
        What was done, or has to be done, as the end of an error message; None if the file is not in a hub cache.
    """
    place = _Place.of(Path(path))
    if place is None:
        return None
    try:
        intact = is_intact(place.link)
        if intact and offline():
            return "it is as the hub had it; unset HF_HUB_OFFLINE to get a newer version"
        if intact:
            (place.folder / _REFUSED).write_text(place.revision)
            return "it is as the hub had it; tell its authors, and try again when they have corrected it"
        for file in (place.store, place.blob, place.link):
            if file is not None:
                file.unlink(missing_ok=True)
    except OSError as error:
        both = " and ".join(str(file) for file in (place.store, place.blob, place.link) if file is not None)
        return f"delete {both}, which cannot be removed here ({error.strerror}), and try again"
    return "it was removed from the cache, so that it is downloaded again"


class _Place(NamedTuple):
    """A file in a hub cache: ``models--O--N/snapshots/REVISION/FILE`` links to ``models--O--N/blobs/HASH``.

    The blob may link to the store that the repositories of a cache share. Without symbolic links there is no blob.
    """

    link: Path
    blob: Path | None
    store: Path | None
    folder: Path
    revision: str

    @classmethod
    def of(cls, path: Path) -> _Place | None:
        link = Path(os.path.abspath(path))
        for snapshot in link.parents:
            folder = snapshot.parents[1] if len(snapshot.parents) > 1 else snapshot
            if snapshot.parent.name == "snapshots" and folder.name.startswith("models--"):
                break
        else:
            return None
        blob = store = None
        if link.is_symlink():
            blob = Path(os.path.abspath(link.parent / link.readlink()))
            if blob.parent.resolve() != (folder / "blobs").resolve():
                return None  # linked by somebody else
            target = blob.resolve()
            if blob.is_symlink() and (folder.parent / "blobs").resolve() in target.parents:
                store = target
        return cls(link, blob, store, folder, snapshot.name)


def _ask_again(path: Path, repo: str, filename: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    """Asks the hub for another version of a file that was refused; returns it, or ``path`` if there is none."""
    place = _Place.of(path)
    if place is None or not (place.folder / _REFUSED).is_file() or offline():
        return path
    try:
        if read_text(place.folder / _REFUSED) != place.revision:
            return path
        found = _ask(hf_hub_url(repo, filename, revision=revision, endpoint=_endpoint()))
        if found.commit_hash == place.revision and place.blob is not None and found.etag != place.blob.name:
            place.link.unlink()  # corrected without a new commit, as on a mirror; the client keeps what a commit has
        path = _fetch(repo, filename, revision, cache_dir, "")
        (place.folder / _REFUSED).unlink(missing_ok=True)
    except (HfHubHTTPError, _TransportError, WeightsError, OSError, ValueError):
        return path  # the hub has no other version, or can't be asked now
    return path


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _ask(url: str) -> HfFileMetadata:
    """Asks the hub about a file, within :data:`ANSWER_SECONDS`."""
    return _within(ANSWER_SECONDS, lambda: get_hf_file_metadata(url, timeout=ANSWER_SECONDS / 2, endpoint=_endpoint()))


def _fetch(repo: str, filename: str, revision: str | None, cache_dir: str | Path | None, damaged: str) -> Path:
    folder = Path(cache_dir or constants.HF_HUB_CACHE)
    what = f"{repo}/{filename}" + (f" at revision {revision}" if revision else "")
    _sweep(_folder(repo, cache_dir))
    bring = (
        f"To bring it here: `hf download {repo} {filename}{f' --revision {revision}' if revision else ''}` on a "
        f"machine with network, then copy its hub cache folder models--{repo.replace('/', '--')} into {folder}"
    )
    if offline():
        raise _unreachable(what, folder, f"HF_HUB_OFFLINE disables downloads{damaged}", bring)
    endpoint = _endpoint()
    url = hf_hub_url(repo, filename, revision=revision, endpoint=endpoint)
    try:
        # Checked before hf_hub_download, which retries for half a minute without network.
        _ask(url)
        return Path(
            hf_hub_download(
                repo, filename, revision=revision, cache_dir=cache_dir, endpoint=endpoint,
                etag_timeout=ANSWER_SECONDS / 2, tqdm_class=_Progress, library_name="lamzoo",
            )
        )  # fmt: skip
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise HubEntryMissingError(
            f"The hub has no repository {repo!r}, or it needs a login or its terms accepted (`hf auth login`)."
        ) from error
    except RevisionNotFoundError as error:
        raise HubEntryMissingError(f"The hub repository {repo!r} has no revision {revision!r}.") from error
    except RemoteEntryNotFoundError as error:
        raise HubEntryMissingError(f"The hub has no file {what}.") from error
    except LocalEntryNotFoundError as error:  # raised by hf_hub_download for an unusable answer
        raise WeightsError(
            f"The hub gave no usable answer for {what} ({error.__cause__ or error}). {bring}."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 404:  # a mirror that states no reason
            raise HubEntryMissingError(f"The hub has no {what} ({url}).") from error
        raise WeightsError(f"The hub answered {status} for {what} ({url}); try again later. {bring}.") from error
    except _CutOffError as error:
        raise WeightsError(
            f"The download of {what} stopped halfway {_MAX_RESTARTS + 1} times; try again. {bring}."
        ) from error
    except (TimeoutError, ConnectionError) as error:
        raise _unreachable(what, folder, f"{_host(url)} does not answer{damaged}", bring) from error
    except _TransportError as error:
        if type(error).__name__ in {"ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError", "ConnectionError"}:
            raise _unreachable(what, folder, f"{_host(url)} cannot be reached ({error}){damaged}", bring) from error
        raise WeightsError(f"The download of {what} broke off ({error}); try again. {bring}.") from error
    except OSError as error:
        if "Consistency check failed" in str(error):
            raise WeightsError(f"The download of {what} is incomplete; try again. {bring}.") from error
        raise WeightsError(
            f"{what} cannot be stored in the cache {folder} ({_reason(error)}); free some space, make "
            "it writable, or choose another folder with cache_dir= or HF_HUB_CACHE."
        ) from error


def _unreachable(what: str, folder: Path, why: str, bring: str) -> HubUnreachableError:
    works = "Works without it: bundled models, folders of saved models, and files passed as checkpoint_path=."
    return HubUnreachableError(f"{what} is not in the cache {folder}, and {why}.", works, f"{bring}.")


class _CutOffError(Exception):
    """A download was interrupted too often."""


class _Progress(hub_tqdm):
    """The hub's progress bar; it also ends a download that the server keeps interrupting at the same place.

    huggingface_hub restarts a download endlessly as long as each attempt transfers some bytes, and updates its progress
    bar by a negative amount at each restart.
    """

    _restarts = 0

    def update(self, n: float | None = 1) -> bool | None:
        if n is not None and n < 0:
            self._restarts += 1
            if self._restarts > _MAX_RESTARTS:
                raise _CutOffError
        return super().update(n)


def _folder(repo: str, cache_dir: str | Path | None) -> Path:
    return Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _sweep(folder: Path) -> None:
    """Removes partial downloads of killed processes, which the hub client leaves for ever."""
    with contextlib.suppress(OSError):  # another process was faster, or the cache is read-only
        for partial in (folder / "blobs").glob("*.incomplete"):
            if time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS:
                partial.unlink()


def _reason(error: OSError) -> str:
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _within(seconds: float, call: Callable[[], _Result]) -> _Result:
    """Runs a call in its own thread, because neither name resolution nor a list of addresses has a timeout."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised again in the waiting thread
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="lamzoo-hub").start()
    return future.result(timeout=seconds)


def _host(url: str) -> str:
    return "/".join(url.split("/")[:3])
