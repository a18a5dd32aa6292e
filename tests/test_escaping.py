"""Text of unknown origin: nothing in it is obeyed by a terminal, a Markdown renderer or a spreadsheet."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lamzoo.escaping import (
    csv_line,
    from_spreadsheet_cell,
    markdown,
    markdown_block,
    markdown_code,
    printable,
    spreadsheet_cell,
)

ANY = st.text(st.characters(codec=None), max_size=30)
MARKUP = st.lists(
    st.sampled_from([*"\\`*_[]()<>&|~#$!{}:-+=.1a \n", "<b>", "&lt;", "](http://x)", "https://x", "```", "__"]),
    max_size=14,
).map("".join)


@given(ANY)
@example("\x1b]52;c;cm0gLXJm\x07\x9b2J\x7f\b\r")
@example("\u202eexe.\u2066gpj\u200b\ufeff\u2028\U000e0041\ud800")
def test_no_text_has_a_character_that_a_terminal_obeys(text: str) -> None:
    shown = printable(text)
    categories = {unicodedata.category(letter) for letter in shown if letter not in "\u200c\u200d"}
    assert not categories & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@pytest.mark.parametrize(
    "text", ["👩‍👩‍👧‍👦 🏳️‍🌈", "日本語 한국어", "e\u0301 ญี่ปุ่น", "עברית العربية", "می\u200cخواهم", "a\u00a0b\u3000c"]
)
def test_ordinary_text_of_any_script_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_escapes_are_those_of_python() -> None:
    assert printable("a\x1b[2J\nb\u202e") == r"a\x1b[2J\nb\u202e"
    assert printable("a\tb\n", keep="\n") == "a\\tb\n"


class _Elements(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(text: str) -> _Elements:
    markdown_package = pytest.importorskip("markdown", reason="needs Python-Markdown, of the extra docs")
    return _Elements(markdown_package.markdown(text, extensions=["tables", "fenced_code", "attr_list", "def_list"]))


@given(MARKUP | ANY)
@example("<img src=x onerror=alert(1)>")
@example("# [a](javascript:x) `b` | __c__ *d* <http://x>")
@example("_a_ __b__ a__b__")
@example("- a")
@example("12. a")
def test_no_name_becomes_an_element_of_rendered_markdown(name: str) -> None:
    shown = printable(" ".join(name.split()))
    page = rendered(f"x {markdown(name)}\n\n{markdown(name)}\n")
    assert set(page.tags) <= {"p"}
    assert page.text.split() == ["x", *shown.split(), *shown.split()]
    table = rendered(f"| a | b |\n|---|---|\n| {markdown(name)} | {markdown_code(name)} |\n| c | d |\n")
    assert [tag for tag in table.tags if tag != "code"] == rendered("| a | b |\n|---|---|\n| c | d |\n| c | d |\n").tags
    assert "".join(table.text.split()) == "".join(f"ab{shown}{shown}cd".split())


@given(MARKUP | ANY)
@example("```\n<script>")
def test_no_line_ends_a_block_of_code(line: str) -> None:
    page = rendered("\n".join(["before", "", *markdown_block("start", line), "", "after"]))
    assert page.tags == ["p", "pre", "code", "p"]


@given(ANY)
@example("=cmd|' /C calc'!A0")
@example("'=1+1")
@example("''")
def test_no_cell_is_a_formula_and_every_cell_reads_back_the_same(text: str) -> None:
    (cells,) = csv.reader(io.StringIO(csv_line([text, "end"]), newline=""), strict=True)
    assert from_spreadsheet_cell(cells[0]) == text
    assert not re.match(r"[=+\-@\t\r\n]", cells[0]) or re.match(r"[+-]?[\d.infa_]", cells[0], re.IGNORECASE)


@pytest.mark.parametrize("number", ["-1.5", "+3", "-1e-05", "-inf", "0.25", "lam_vit_micro", "a=b", "'quoted'"])
def test_numbers_and_plain_names_stay_as_they_are(number: str) -> None:
    assert spreadsheet_cell(number) == from_spreadsheet_cell(number) == number
