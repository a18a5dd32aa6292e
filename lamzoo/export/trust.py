"""Which torch.export programs may be loaded: loading one runs code from it, so only those that the user trusts."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from pathlib import Path

from lamzoo.errors import ConfigError, UntrustedProgramError
from lamzoo.files import cache_folder

_logger = logging.getLogger(__name__)
_trusted_here: set[str] = set()  # those of this process, also where the cache can't be written


def trust_program(content: bytes, path: Path) -> None:
    """Records a program as trusted, by its sha256: in this process, and for the user in lamzoo's cache folder.

    Args:
        content: the bytes of the file.
        path: where the file is, noted in the record.
    """
    digest = hashlib.sha256(content).hexdigest()
    _trusted_here.add(digest)
    if _is_recorded(digest):
        return
    try:
        # One file for each program: processes that record programs at the same time don't disturb one another.
        record = _record(digest)
        record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(record, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(os.fsencode(path.absolute()))
    except (OSError, ConfigError) as error:  # the latter if the user has no home
        if not _is_recorded(digest):  # by another process meanwhile
            _logger.warning(
                "%s is not recorded as trusted (%s); pass --trust, or trust=True, whenever it is loaded", path, error
            )


def check_trusted(content: bytes, path: Path) -> None:
    """Raises an :class:`UntrustedProgramError` unless the user exported or trusted a file with this content.

    Args:
        content: the bytes of the file, which are to be loaded.
        path: where the file is.
    """
    digest = hashlib.sha256(content).hexdigest()
    if digest not in _trusted_here and not _is_recorded(digest):
        raise UntrustedProgramError(
            f"{path} was exported elsewhere or has changed since, and a torch.export program can run any code: if you "
            "trust its origin, pass --trust once (in Python, load_exported(path, trust=True)); otherwise use an ONNX "
            "file, which runs no code."
        )


def _record(digest: str) -> Path:
    return cache_folder() / "trusted-programs" / digest


def _is_recorded(digest: str) -> bool:
    """Returns whether the user has recorded a program; files of other users in a shared cache don't count."""
    try:
        status = os.lstat(_record(digest))
    except (OSError, ConfigError):
        return False
    return stat.S_ISREG(status.st_mode) and (not hasattr(os, "getuid") or status.st_uid == os.getuid())
