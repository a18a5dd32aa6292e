"""Reading of files that may be damaged or hostile: regular files only, and strict text, JSON, TOML and CSV."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import math
import os
import re
import stat
import tomllib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

_DEPTH = 100  # levels of lists and tables; lower than what exhausts Python's stack in code that follows them
SPECIAL = "it is a pipe, socket or device, not a regular file"  # reason for not opening one
_TOO_DEEP = f"it is nested too deeply, in more than {_DEPTH} levels"
_EXPANSION = 200  # times that compressed data may grow, beyond the following size
_EXPANSION_FREE = 2**24  # bytes
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def open_regular(path: str | Path) -> io.BufferedReader:
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
    """Returns the content of a regular file.

    Raises:
        OSError: as of :func:`open_regular`.
        ValueError: it does not fit into memory, or the path has a NUL character.
    """
    try:
        with open_regular(path) as file:
            return file.read()
    except MemoryError:
        raise ValueError("it is too large for the memory of this machine") from None


def read_text(path: str | Path, *, keep_line_ends: bool = False) -> str:
    r"""Returns the text of a regular UTF-8 file, without its byte order mark; decompressed if it is named ``.gz``.

    Args:
        path: the file.
        keep_line_ends: keep ``\r`` and ``\r\n``, which are otherwise replaced by ``\n``.

    Raises:
        OSError: as of :func:`open_regular`.
        ValueError: the file is not UTF-8 text, its compression is damaged, or it grows too much when decompressed.
    """
    data = read_bytes(path)
    text = decode(_decompressed(data) if Path(path).suffix == ".gz" else data)
    return text if keep_line_ends else text.replace("\r\n", "\n").replace("\r", "\n")


def decode(data: bytes) -> str:
    """Returns UTF-8 text without its byte order mark.

    Raises:
        ValueError: the bytes are not UTF-8 text.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{error}; save it as UTF-8") from None
    if "\0" in text:  # as in UTF-16
        raise ValueError("it has NUL characters; save it as text in UTF-8")
    return text


def parse_json(text: str | bytes, *, file_names: bool = False, not_finite: bool = False) -> Any:
    """Parses JSON strictly, as RFC 8259 advises: without NaN, infinity, repeated keys and incomplete characters.

    Args:
        text: the JSON; bytes are UTF-8.
        file_names: allow the incomplete characters that Python represents file names by whose bytes are not UTF-8.
        not_finite: allow NaN and infinity, as lamzoo 0.1.0 wrote them.

    Raises:
        ValueError: the text is not such JSON, or is nested too deeply.
    """
    text = decode(text) if isinstance(text, bytes) else text
    value = _parsed(_ANY_NUMBERS.decode if not_finite else _JSON.decode, text)
    if text.count("[") + text.count("{") > _DEPTH:  # saves a walk through each of a million short lines
        _check_depth(value)
    if _ESCAPED_SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape" if file_names else "strict")
        except UnicodeEncodeError as error:
            raise ValueError(f"it has an incomplete character, \\u{ord(error.object[error.start]):04x}") from None
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Parses TOML whose values have a JSON form: without NaN, infinity and dates.

    Raises:
        ValueError: the text is not such TOML, or is nested too deeply.
    """
    table: dict[str, Any] = _parsed(partial(tomllib.loads, parse_float=_finite), text)
    _check_depth(table)
    try:
        json.dumps(table)
    except TypeError:
        raise ValueError("it has a date or time; put it in quotes") from None
    return table


def parse_csv(text: str) -> list[tuple[int, list[str]]]:
    """Parses CSV, with any line ends.

    Returns:
        For each record the number of its last line, and its cells; none for an empty line.

    Raises:
        ValueError: the text is not CSV; names the line.
    """
    records = []
    begin = 1  # first line of the current record, which may span several
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            records.append((reader.line_num, cells))
            begin = reader.line_num + 1
    except csv.Error as error:
        if str(error) == "unexpected end of data":
            raise ValueError(f"line {begin} has a double quote that is not closed; close it") from None
        if "field limit" in str(error):
            limit = csv.field_size_limit()
            raise ValueError(f"line {begin} has a cell of more than {limit} characters, or an open quote") from None
        raise ValueError(f"line {begin} is not CSV: {error}") from None
    return records


def parse_int(text: str) -> int:
    """Parses a whole number in ASCII digits, without the underscores and digits of other scripts that Python accepts.

    Raises:
        ValueError: it is not one, or has more than 300 digits.
    """
    if not _WHOLE.fullmatch(text) or len(text) > 300:
        raise ValueError(f"{text!r:.60} is not a whole number")
    return int(text)


def parse_float(text: str) -> float:
    """Parses a finite number in ASCII digits; see :func:`parse_int`.

    Raises:
        ValueError: it is not one, or is too large for a float.
    """
    if not _DECIMAL.fullmatch(text):
        raise ValueError(f"{text!r:.60} is not a number")
    return _finite(text)


def most_expanded(compressed: int) -> int:
    """Returns to how many bytes ``compressed`` bytes may grow; what grows more is a decompression bomb, not data."""
    return max(_EXPANSION_FREE, _EXPANSION * compressed)


def reason(error: Exception) -> str:
    """Returns why a file can't be read, in a few words, for messages that name the file."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


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
        raise OSError(errno.EINVAL, SPECIAL, str(path))


def _decompressed(data: bytes) -> bytes:
    limit = most_expanded(len(data))
    try:
        with gzip.open(io.BytesIO(data)) as file:
            content = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"its gzip compression is damaged ({error})") from None
    if len(content) > limit:
        raise ValueError(f"it has {len(data)} bytes, which grow to more than {limit} when decompressed")
    return content


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except ValueError as error:
        if "set_int_max_str_digits" in str(error):  # advice for programmers
            raise ValueError("it has a number with too many digits") from None
        raise


def _check_depth(value: Any) -> None:
    level: list[Any] = [[value]]
    for _ in range(_DEPTH + 1):  # level by level, because a recursive check would itself exhaust the stack
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, (dict, list))]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"it has the key {twice!r:.60} twice")
    return table


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.60} is not a finite number")
    return number


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _with_nulls(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_nulls(inner) for inner in value]
    return value


# Made once, as json.loads with these arguments makes one at each call.
_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
_ANY_NUMBERS = json.JSONDecoder(object_pairs_hook=_unique)
