"""Downloads from the Hugging Face Hub: cache first, a hard time limit, and one kind of error."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
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

from lamzoo.errors import HubUnreachableError, WeightsError, WeightsNotFoundError

_Result = TypeVar("_Result")

#: Seconds until the hub counts as unreachable, including name resolution and all addresses.
ANSWER_SECONDS = 8.0
# The exceptions of whichever HTTP library huggingface_hub is built on (requests, httpx, httpx2).
_TransportError: type[Exception] = HfHubHTTPError.__bases__[0]
_MAX_RESTARTS = 2


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
    """
    try:
        found = try_to_load_from_cache(repo, filename, cache_dir=cache_dir, revision=revision or "main")
    except HFValidationError as error:
        raise WeightsNotFoundError(
            f"{repo!r} is not the name of a hub repository, which is OWNER/NAME: {error}"
        ) from error
    return Path(found) if isinstance(found, str) else None


def download(repo: str, filename: str, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Returns the path of a hub file in the local cache, downloading it if necessary.

    The file is downloaded under a temporary name and renamed when complete; a second process that needs the same file
    waits. ``HF_ENDPOINT``, ``HF_HUB_CACHE`` and ``HF_HUB_OFFLINE`` have their usual meaning.

    Args:
        repo: ``owner/name``.
        filename: path in the repository.
        revision: commit, tag or branch; ``main`` by default.
        cache_dir: replaces the hub's cache folder.

    Raises:
        HubEntryMissingError: the hub has no such repository, revision or file, or this user has no access to it.
        HubUnreachableError: offline, or no answer within :data:`ANSWER_SECONDS`.
        WeightsError: any other failure: a server error, a broken connection, a cache that cannot be written.
    """
    found = cached(repo, filename, revision=revision, cache_dir=cache_dir)
    if found is not None:
        return found
    folder = Path(cache_dir or constants.HF_HUB_CACHE)
    what = f"{repo}/{filename}" + (f" at revision {revision}" if revision else "")
    bring = (
        f"To bring it here: `hf download {repo} {filename}{f' --revision {revision}' if revision else ''}` on a "
        f"machine with network, then copy its hub cache folder models--{repo.replace('/', '--')} into {folder}"
    )
    if offline():
        raise _unreachable(what, folder, "HF_HUB_OFFLINE disables downloads", bring)
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    url = hf_hub_url(repo, filename, revision=revision, endpoint=endpoint)
    try:
        # Checked before hf_hub_download, which retries for half a minute without network.
        _within(ANSWER_SECONDS, lambda: get_hf_file_metadata(url, timeout=ANSWER_SECONDS / 2, endpoint=endpoint))
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
        raise _unreachable(what, folder, f"{_host(url)} does not answer", bring) from error
    except _TransportError as error:
        if type(error).__name__ in {"ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError", "ConnectionError"}:
            raise _unreachable(what, folder, f"{_host(url)} cannot be reached ({error})", bring) from error
        raise WeightsError(f"The download of {what} broke off ({error}); try again. {bring}.") from error
    except OSError as error:
        if "Consistency check failed" in str(error):
            raise WeightsError(f"The download of {what} is incomplete; try again. {bring}.") from error
        raise WeightsError(
            f"{what} cannot be stored in the cache {folder} ({error.strerror or error}); free some space, make "
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
