"""Mutations of valid files: of their bytes, and of the values in them."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

#: The operation, the place, and what is put there; the latter two are taken modulo what there is.
Edit = tuple[int, int, int]

TOKENS: tuple[bytes, ...] = (
    b"", b" ", b"\n", b"\r", b"\t", b"\0", b"\x1b[31m", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", "²".encode(),
    "١٢".encode(), "\u202e".encode(), b'"', b'""', b"'", b",", b";", b":", b"=", b"#", b"[", b"]", b"{", b"}", b"\\",
    b"\\ud800", b"\\u0000", b"0", b"-1", b"1_000", b"1e400", b"1e308", b"1e-320", b"nan", b"NaN", b"inf", b"Infinity",
    b"null", b"true", b"false", b"2024-01-31", b"../../etc/passwd", b"C:\\x", b"1" * 30, b"9" * 5000, b"[" * 2000,
    b"{\"a\":" * 300, b"x" * 5000, b"a.b.c.d" * 40, b"\x7f", b"\x80", b"PK\x05\x06", b"\xff\xff\xff\xff", b"\0\0\0\0",
)  # fmt: skip

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 10**20, 10**400, 0.5, -0.0, 1e308, 1e-320, "", " ", "a", "x" * 5000, "\0",
    "\x1b[31m", "²", "١٢", "1_000", "1e400", "nan", "-1", "0.5", "2024-01-31", "../../etc/passwd", "/dev/null", "a/b",
    "C:\\x", "é", "e\u0301", "\u202e", [], {}, [[]], [{}], [None], [0], [-1, 1], [1, 1], ["a"], ["a", "a"], {"a": 1},
    {"0": "a"}, [[1, 2], [3]], [[1e308, 1e308]],
)  # fmt: skip
_NESTED: Any = []
for _ in range(60):
    _NESTED = [_NESTED]
VALUES += (_NESTED, {"a": {"b": {"c": _NESTED}}})


def draw(seed: int) -> list[Edit]:
    """Draws one to four edits."""
    drawn = random.Random(seed)
    return [(drawn.randrange(8), drawn.randrange(2**16), drawn.randrange(128)) for _ in range(drawn.randint(1, 4))]


def mutate_bytes(content: bytes, edits: Sequence[Edit]) -> bytes:
    """Flips, cuts, inserts, doubles, overwrites and moves parts of a file."""
    for operation, place, what in edits:
        start = place % (len(content) + 1)
        token = TOKENS[what % len(TOKENS)]
        match operation:
            case 0:
                content = content[:start] + token + content[start:]
            case 1:
                content = content[:start] + token + content[start + len(token) :]
            case 2:
                content = content[:start] + content[start + 1 + what :]
            case 3:
                content = content[:start]
            case 4:
                content = (
                    content[:start]
                    + bytes([byte ^ (1 << what % 8) for byte in content[start : start + 1]])
                    + content[start + 1 :]
                )
            case 5:
                content = content[:start] + content[start : start + what] * 2 + content[start + what :]
            case 6:
                content = content[:start] + bytes([what * 2 % 256]) + content[start + 1 :]
            case _:
                content = content[start:] + content[:start]
    return content


def mutate_values(value: Any, edits: Sequence[Edit], values: Sequence[Any] = VALUES) -> Any:
    """Replaces, removes, doubles, renames and moves the nodes of nested lists and tables."""
    root = [copy.deepcopy(value)]
    for operation, place, what in edits:
        nodes = list(_nodes(root))
        holder, key = nodes[place % len(nodes)]
        new = copy.deepcopy(values[what % len(values)])
        if operation < 4 or holder is root:
            holder[key] = new
        elif operation == 4:
            del holder[key]
        elif operation == 5 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif operation == 5:
            holder[str(new)] = holder.pop(key)
        elif operation == 6:
            other, name = nodes[what % len(nodes)]
            holder[key] = copy.deepcopy(other[name])
        elif isinstance(holder, list):
            holder.append(new)
        else:
            holder[str(new)] = copy.deepcopy(holder[key])
    return root[0]


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """The places of all nodes: the list or table that holds each, and its index or key."""
    found = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        for key, inner in list(enumerate(holder)) if isinstance(holder, list) else list(holder.items()):
            found.append((holder, key))
            if isinstance(inner, (list, dict)):
                waiting.append(inner)
    return found
