"""Phrases of an older style of this project's prose, which are not written any more."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BANNED = re.compile(
    r"\b(?:"
    r"knows? (?:no|nothing|neither)|goes on with(?:out)?|(?:can|cannot|can't) be had|stands? in for|stands? for|"
    r"(?<![Tt]here )is no (?:model name|data set|list|video|image)|what is wrong with|"
    r"has? no say|what becomes of|asks? of every|means? nothing|of them masks|what is what|nobody expected"
    r")\b"
)
PATTERNS = (
    "lamzoo/**/*.py", "docs/**/*.md", "README.md", "CONTRIBUTING.md", "registry/*.toml", "weights/*.md",
    "benchmarks/**/*.py", "benchmarks/**/*.toml",
)  # fmt: skip


def files() -> list[Path]:
    return [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]


def found(text: str) -> list[str]:
    return [match[0] for match in BANNED.finditer(re.sub(r"[\s#]+", " ", text))]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_has_no_banned_phrase(path: Path) -> None:
    assert not found(path.read_text(encoding="utf-8"))


def test_banned_phrases_are_found_across_lines() -> None:
    assert found("# a file that knows\n# no model") == ["knows no"]
    assert not found("Returns the invalid inputs.")
