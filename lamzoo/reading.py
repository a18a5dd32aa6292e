"""Reading of files that may be damaged or hostile: regular files only, and strict JSON and TOML."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import tomllib
from pathlib import Path
from typing import Any, BinaryIO


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading, in binary; never waits for the other end of a pipe.

    Raises:
        OSError: the file cannot be opened, or is a folder, pipe, socket or device, as ``strerror`` says.
    """
    _check_regular(os.stat(path), path)  # before opening, which may have effects on a device
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    try:
        _check_regular(os.fstat(file.fileno()), path)  # it may have been replaced since
    except OSError:
        file.close()
        raise
    return file


def read_bytes(path: str | Path) -> bytes:
    """Returns the content of a regular file; raises as :func:`open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_text(path: str | Path) -> str:
    r"""Returns the text of a regular UTF-8 file, without its byte order mark and with ``\n`` as line ends.

    Raises:
        OSError: as of :func:`open_regular`.
        ValueError: the file is not UTF-8.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{error}; save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str | bytes) -> Any:
    """Parses JSON as RFC 8259 defines it: NaN and infinity, which Python accepts, are refused.

    Raises:
        ValueError: the text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Parses TOML.

    Raises:
        ValueError: the text is not TOML, or is nested too deeply.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def to_json(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Writes plain values as JSON that every parser accepts.

    Numbers that are not finite become null, as JSON has none. Text is written as it is, except that a file name whose
    bytes are not UTF-8 has the whole document escaped to ASCII.

    Raises:
        TypeError: a value has no JSON form.
    """
    text = json.dumps(_with_nulls(value), indent=indent, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates, as os.fsdecode makes of such names
        return json.dumps(_with_nulls(value), indent=indent, sort_keys=sort_keys, allow_nan=False)
    return text


def _check_regular(status: os.stat_result, path: str | Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe, socket or device, not a regular file", str(path))


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large for a number")
    return number


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _with_nulls(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_nulls(inner) for inner in value]
    return value
