r"""Text of unknown origin, such as file and class names, made safe for terminals, Markdown and spreadsheets."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Callable, Iterable
from html import escape
from typing import Any

_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))  # controls, format characters, surrogates, line separators
_NOT_XML = "\ufffe\uffff"  # are no characters, and make an SVG file invalid
_UNUSUAL = re.compile("[^ -~]")  # outside of printable ASCII, of which no character is hidden
_JOINERS = "\u200c\u200d"  # zero-width, but part of emoji and of Persian and Indic words
# Code, HTML, entities, tables, emphasis, ends of links, mathematics, attributes, URLs and signs that begin a line.
_MARKUP = re.compile(
    r"[\\`<|*~${]|&(?=[#\w])|(?<![^\W_])_|_(?![^\W_])|\](?=\s*[\[(:]|$)|:(?=//)|^[>#]|^[-+=:](?=[\s\-=]|$)|#(?=#*$)|^\d+[.)](?!\S)"
)
_FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def printable(text: str, *, keep: str = "", escape: Callable[[str], str] | None = None) -> str:
    r"""Escapes characters that a terminal obeys instead of showing, as Python writes them: ``\x1b``, ``\u202e``.

    These are control characters, line ends included, invisible format characters such as those that reverse the
    direction of text, and surrogates; also all that XML excludes. Others stay as they are, in any script, with the
    joiners of emoji.

    Args:
        text: the text.
        keep: characters to leave alone, such as line ends.
        escape: how to write a character otherwise.
    """

    def shown(found: re.Match[str]) -> str:
        letter = found[0]
        return letter if letter in keep or not _is_hidden(letter) else (escape or _escaped)(letter)

    return _UNUSUAL.sub(shown, text)


def markdown(text: str) -> str:
    """Returns text for one line or table cell of Markdown, where no part of it is markup, HTML or a link.

    White space becomes single spaces, hidden characters are escaped as by :func:`printable`, and characters with a
    meaning become numeric entities, which all dialects show as the character itself.
    """
    return _MARKUP.sub(lambda found: f"{found[0][:-1]}&#{ord(found[0][-1])};", printable(" ".join(text.split())))


def markdown_code(text: str) -> str:
    """Returns text as code within a line or table cell of Markdown."""
    line = printable(" ".join(text.split()))
    if line and not re.search(r"[`|<>&\\]", line):
        return f"`{line}`"
    return f"<code>{markdown(line)}</code>"


def markdown_block(*lines: str) -> list[str]:
    """Returns the lines of a block of code in Markdown."""
    shown = [printable(line) for line in lines]
    longest = max(map(len, re.findall("`+", "\n".join(shown))), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, *shown, fence]


def html_text(text: str) -> str:
    """Returns text for an element or a quoted attribute of HTML, where no part of it is markup."""
    return escape(printable(text))


def spreadsheet_cell(text: str) -> str:
    """Returns text for a CSV cell that a spreadsheet does not run as a formula; a number stays as it is.

    An apostrophe goes before text that begins with a character of formulas, which :func:`from_spreadsheet_cell`
    removes.
    """
    return f"'{text}" if _FORMULA.match(text) and not _is_number(text) else text


def csv_line(cells: Iterable[Any]) -> str:
    """Returns a line of CSV, with its line end, whose texts are cells of :func:`spreadsheet_cell`; None is empty."""
    line = io.StringIO(newline="")
    # With another line end than its default, the csv module would not quote carriage returns.
    csv.writer(line).writerow([spreadsheet_cell(cell) if isinstance(cell, str) else cell for cell in cells])
    return line.getvalue().removesuffix("\r\n") + "\n"


def from_spreadsheet_cell(cell: str) -> str:
    """Returns the text of which :func:`spreadsheet_cell` made a cell."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _is_hidden(letter: str) -> bool:
    return (unicodedata.category(letter) in _HIDDEN and letter not in _JOINERS) or letter in _NOT_XML


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text == text.strip()
