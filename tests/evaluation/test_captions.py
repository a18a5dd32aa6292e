"""Scores of captions: the published ones to four decimals, Java's only where it is asked for, and named errors."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamzoo.errors import ConfigError, DataError, MissingExtraError
from lamzoo.evaluation import (
    caption_metrics,
    neighbour_recall,
    read_captions,
    word_error_rate,
    word_overlap,
    write_captions,
)
from lamzoo.evaluation.captions.evaluate import _plain
from lamzoo.evaluation.captions.metrics import _edits, _tokenized

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "caption_metrics"
NEEDS_JAVA = pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java on the PATH")
REFERENCES = {1: ["a dog runs on the grass", "a brown dog is running"], 2: ["a cat sleeps", "the cat is asleep"]}
HYPOTHESES = {1: "a dog runs", 2: "a cat is asleep"}


def published(name: str) -> tuple[dict[Any, list[str]], dict[Any, str], dict[str, float]]:
    """References, hypotheses and their published scores: of 1,000 images, or of nlg-eval's two sentences."""
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not here")
    expected = json.loads((DATA / "expected.json").read_text())
    if name == "nlg_eval_example":
        example = expected[name]
        return (
            dict(enumerate(map(list, zip(*example["refs"], strict=True)))),
            dict(enumerate(example["hyp"])),
            example["published"],
        )
    truth, found = (
        json.loads(gzip.decompress((DATA / f"{name}_{part}.json.gz").read_bytes())) for part in ("gts", "res")
    )
    return truth, {key: caption for key, (caption,) in found.items()}, expected[name]["stored_in_captionmetrics"]


@pytest.mark.parametrize("name", ["coco_fakecap", "nlg_eval_example"])
def test_published_scores_are_met(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    references, hypotheses, expected = published(name)
    metrics = caption_metrics(references, hypotheses)
    assert list(metrics) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    assert metrics == pytest.approx({key: expected[key] for key in metrics}, abs=5e-5)
    assert all(type(value) is float for value in metrics.values())
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@NEEDS_JAVA
@pytest.mark.parametrize("name", ["coco_fakecap", "nlg_eval_example"])
def test_published_meteor_is_met(name: str) -> None:
    references, hypotheses, expected = published(name)
    assert caption_metrics(references, hypotheses, metrics=["METEOR"]) == pytest.approx(
        {"METEOR": expected["METEOR"]}, abs=5e-5
    )


def test_an_empty_caption_scores_nothing_and_the_right_one_all() -> None:
    empty = caption_metrics(REFERENCES, dict.fromkeys(REFERENCES, ""))
    assert set(empty.values()) == {0.0}
    some = caption_metrics(REFERENCES, HYPOTHESES | {1: " "})
    assert some["CIDEr"] == pytest.approx(caption_metrics(REFERENCES, HYPOTHESES | {1: "x"})["CIDEr"])
    one = {key: texts[:1] for key, texts in {1: ["a dog runs on grass"], 2: ["the cat is fast asleep"]}.items()}
    right = caption_metrics(one, {key: texts[0] for key, texts in one.items()})
    assert right == pytest.approx(dict.fromkeys(("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L"), 1) | {"CIDEr": 10})


def test_the_number_of_blanks_and_the_order_of_ids_do_not_matter() -> None:
    spaced = {key: f"  {text.replace(' ', '   ')} \n" for key, text in reversed(HYPOTHESES.items())}
    assert caption_metrics(REFERENCES, spaced) == caption_metrics(REFERENCES, HYPOTHESES)


def test_only_what_is_asked_for_is_computed() -> None:
    assert list(caption_metrics(REFERENCES, HYPOTHESES, metrics=["CIDEr", "ROUGE_L"])) == ["CIDEr", "ROUGE_L"]
    with pytest.raises(
        ConfigError, match="The metric 'BLEU' is unknown; use one of Bleu, ROUGE_L, CIDEr, METEOR, SPICE"
    ):
        caption_metrics(REFERENCES, HYPOTHESES, metrics=["BLEU"])  # type: ignore[list-item]


@pytest.mark.slow
@NEEDS_JAVA
def test_tokens_are_those_of_pycocoevalcap(capfd: pytest.CaptureFixture[str]) -> None:
    lines = ["A man's café, isn't it?", "", '"Hello" – (world); don\'t… a/b', "3 1/2 cups.", "!"]
    ours = _tokenized(lines)
    assert capfd.readouterr() == ("", "")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    try:
        theirs = PTBTokenizer().tokenize(dict(enumerate([{"caption": line}] for line in lines)))
    except PermissionError as error:
        pytest.skip(f"it writes into its own folder: {error}")
    assert ours == [text for (text,) in theirs.values()]
    assert ours[0] == "a man 's café is n't it"


@pytest.mark.slow
@NEEDS_JAVA
def test_raw_captions_are_tokenized_on_demand() -> None:
    raw = {1: "A dog runs.", 2: "A cat\nis asleep!"}
    assert caption_metrics(REFERENCES, raw, tokenize=True) == caption_metrics(REFERENCES, HYPOTHESES)
    assert caption_metrics(REFERENCES, raw)["Bleu_1"] < caption_metrics(REFERENCES, HYPOTHESES)["Bleu_1"]
    with pytest.raises(DataError, match="reference of id 2 has only punctuation"):
        caption_metrics(REFERENCES | {2: ["a cat", "..."]}, raw, tokenize=True)


def test_without_java_only_what_needs_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    for metric in ("METEOR", "SPICE"):
        with pytest.raises(MissingExtraError, match=f"{metric} runs Java, which is not on the PATH"):
            caption_metrics(REFERENCES, HYPOTHESES, metrics=[metric])  # type: ignore[list-item]
    with pytest.raises(MissingExtraError, match="tokenize=True runs Java, which is not on the PATH"):
        caption_metrics(REFERENCES, HYPOTHESES, tokenize=True)
    assert caption_metrics(REFERENCES, HYPOTHESES)["CIDEr"] > 0


@pytest.mark.skipif(sys.platform == "win32", reason="the false Java is a shell script")
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("asked", "says"), [({"metrics": ["METEOR"]}, "METEOR"), ({"tokenize": True}, "tokenize=True")]
)
def test_a_java_that_fails_is_named_and_nothing_waits_for_it(
    asked: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 3\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match=rf"^{says} runs Java, which failed \("):
        caption_metrics(REFERENCES, HYPOTHESES, **asked)


@NEEDS_JAVA
def test_spice_downloads_nothing_by_itself() -> None:
    spice = pytest.importorskip("pycocoevalcap.spice.spice")
    if list((Path(spice.__file__).parent / "lib").glob("stanford-corenlp-*")):
        pytest.skip("Stanford CoreNLP has been fetched")
    with pytest.raises(MissingExtraError, match="python -m pycocoevalcap.spice.get_stanford_models"):
        caption_metrics(REFERENCES, HYPOTHESES, metrics=["SPICE"])


def test_without_pycocoevalcap_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lamzoo\[captions\]'"):
        caption_metrics(REFERENCES, HYPOTHESES)


@pytest.mark.parametrize(
    ("references", "hypotheses", "says"),
    [
        ({}, {}, "The references are empty"),
        (REFERENCES, {}, "The hypotheses are empty or not a mapping"),
        (REFERENCES, [{"image_id": 1, "caption": "a dog"}], "The hypotheses are empty or not a mapping"),
        (REFERENCES, {1: "a dog"}, "1 of 2 ids have no hypothesis, such as 2"),
        ({1: ["a dog"]}, HYPOTHESES, "1 of 2 ids have no reference, such as 2"),
        (REFERENCES, {"1": "a dog", "2": "a cat"}, "have no hypothesis, such as 1, 2; .* all int or all str"),
        (REFERENCES | {2: []}, HYPOTHESES, r"references of id 2 are \[\]; give a list of at least one"),
        (REFERENCES | {2: "a cat"}, HYPOTHESES, "references of id 2 are 'a cat'; give a list"),
        (REFERENCES | {2: ["a cat", " "]}, HYPOTHESES, "reference of id 2 is ' '; give a string with words"),
        (REFERENCES | {2: [None]}, HYPOTHESES, "reference of id 2 is None"),
        (REFERENCES, HYPOTHESES | {2: ["a cat"]}, r"hypothesis of id 2 is \['a cat'\]; give one string"),
        (REFERENCES, HYPOTHESES | {2: float("nan")}, "hypothesis of id 2 is nan"),
    ],
)
@pytest.mark.parametrize("score", [caption_metrics, word_error_rate])
def test_what_cannot_be_scored_is_named(references: Any, hypotheses: Any, says: str, score: Any) -> None:
    with pytest.raises(DataError, match=says) as caught:
        score(references, hypotheses)
    assert "\n" not in str(caught.value)


@cache
def by_recursion(words: str, others: str) -> int:
    if not words or not others:
        return len(words) + len(others)
    return min(
        by_recursion(words[1:], others) + 1,
        by_recursion(words, others[1:]) + 1,
        by_recursion(words[1:], others[1:]) + (words[0] != others[0]),
    )


@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_edits_are_those_by_brute_recursion(words: str, others: str) -> None:
    assert _edits(words, others) == _edits(others, words) == by_recursion(words, others)


def test_word_errors_are_counted_over_the_whole_set() -> None:
    references = {1: ["bin blue at f two now"], 2: ["set red", "set red by k"]}
    assert word_error_rate(references, {1: "bin blue at f two now", 2: "set red by k"}) == {
        "WER": 0, "sentence_accuracy": 100,
    }  # fmt: skip
    # A word replaced and one left out of six; and one too many for the longer of two equally near ones, of four.
    scores = word_error_rate(references, {1: "bin  green at f two", 2: "set red by"})
    assert scores == {"WER": 100 * 3 / 10, "sentence_accuracy": 0}
    assert word_error_rate({1: ["a"]}, {1: "b c d"})["WER"] == 300
    assert word_error_rate({1: ["a b"]}, {1: ""}) == {"WER": 100, "sentence_accuracy": 0}


def test_words_in_common_are_counted_as_often_as_both_have_them() -> None:
    scores = word_overlap(["a a b", ""], ["a a c", "b", "x"])
    np.testing.assert_allclose(scores, [[2 / 3, 1 / 2, 0], [0, 0, 0]])


@given(st.data(), st.lists(st.integers(1, 11), min_size=1, max_size=3), st.integers(1, 6))
def test_neighbour_recall_is_that_written_out(data: st.DataObject, lengths: list[int], window: int) -> None:
    k = data.draw(st.integers(1, window))
    names = iter(range(sum(lengths)))
    groups = {movie: [next(names) for _ in range(length)] for movie, length in enumerate(lengths)}
    texts = [str(name) for movie in groups.values() for name in movie]
    scores = np.array(data.draw(st.permutations(range(len(texts) ** 2)))).reshape(len(texts), -1)  # no ties
    truth, said = {int(text): [text] for text in reversed(texts)}, {int(text): text for text in texts}
    found = neighbour_recall(
        truth, said, groups, k=k, window=window,
        similarity=lambda ours, theirs: scores[np.ix_([int(text) for text in ours], [int(text) for text in theirs])],
    )  # fmt: skip
    of_movies = []
    for movie in groups.values():
        of_windows, start = [], 0
        while start == 0 or start + window <= len(movie):
            part = movie[start : start + window]
            hits = [name in sorted(part, key=lambda other: -scores[name, other])[:k] for name in part]
            of_windows.append(sum(hits) / len(part))
            start += window // 2 or 1
        of_movies.append(sum(of_windows) / len(of_windows))
    assert found == pytest.approx(100 * sum(of_movies) / len(of_movies))


def test_saying_the_same_everywhere_gains_nothing() -> None:
    references = {n: [text] for n, text in enumerate(["he runs", "she sits", "they leave", "it rains"])}
    groups = {"film": list(references)}
    right = {n: text for n, (text,) in references.items()}
    assert neighbour_recall(references, right, groups, k=1, window=4) == 100
    assert neighbour_recall(references, dict.fromkeys(references, "someone"), groups, k=3, window=4) == 0
    assert neighbour_recall(references, right | {0: "she sits"}, groups, k=1, window=4) == 75
    assert neighbour_recall(references, right, groups, k=1, window=16) == 100  # fewer than a window
    everyone = {key: ["the same"] for key in references}
    assert neighbour_recall(everyone, right, groups, k=3, window=4) == 0


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"groups": {"film": [1]}}, DataError, "Id 2 is in no movie of groups"),
        ({"groups": {"film": [1, 2], "sequel": [2]}}, DataError, "Id 2 is in the movie 'film' and again in 'sequel'"),
        ({"groups": {"film": [1, 2, 3]}}, DataError, "movie 'film' lists the id 3, which has no reference"),
        ({"groups": {"film": [1, 2], "sequel": []}}, DataError, "movie 'sequel' has no descriptions"),
        ({"references": REFERENCES}, DataError, "Id 1 has 2 references"),
        ({"hypotheses": {1: "a dog"}}, DataError, "have no hypothesis"),
        ({"k": 0}, ConfigError, "k is 0; it must be from 1 to the window, 2"),
        ({"k": 3}, ConfigError, "k is 3; it must be from 1 to the window, 2"),
        ({"similarity": lambda a, b: np.zeros(2)}, ConfigError, r"returned shape \(2,\), or NaN, for 2 hypotheses"),
        ({"similarity": lambda a, b: np.full((2, 2), np.nan)}, ConfigError, "or NaN"),
    ],
)
def test_what_has_no_neighbours_is_named(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    given = {"references": {1: ["a dog"], 2: ["a cat"]}, "hypotheses": HYPOTHESES, "groups": {"film": [1, 2]}}
    with pytest.raises(error, match=says):
        neighbour_recall(**({**given, "k": 1, "window": 2} | changes))


@pytest.mark.parametrize("name", ["captions.json", "new/captions.json.gz"])
def test_captions_come_back_as_they_were_written(tmp_path: Path, name: str) -> None:
    captions = {7: "ein Hund läuft", "b": "", 3: 'a "cat"'}
    write_captions(tmp_path / name, captions)
    assert read_captions(tmp_path / name) == captions
    assert list(read_captions(tmp_path / name)) == [7, "b", 3]
    before = (tmp_path / name).read_bytes()
    with pytest.raises(DataError, match=r"the entry of 4 has the caption \['a'\]; it must be one string"):
        write_captions(tmp_path / name, {4: ["a"]})  # type: ignore[dict-item]
    assert (tmp_path / name).read_bytes() == before
    assert [path.name for path in (tmp_path / name).parent.iterdir() if path.is_file()] == [Path(name).name]


def test_captions_are_written_as_coco_has_them(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions.json", {7: "a dog"})
    assert json.loads((tmp_path / "captions.json").read_text()) == [{"image_id": 7, "caption": "a dog"}]
    with pytest.raises(
        DataError, match="the entry of .*7.* has an image_id of type int64; it must be an int or a string"
    ):
        write_captions(tmp_path / "captions.json", {np.int64(7): "a dog"})
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        write_captions(tmp_path / "file" / "captions.json", {7: "a dog"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[{", r"captions\.json is not readable JSON"),
        (b"\xff", "is not readable JSON"),
        ('{"annotations": []}', "is not a list of captions; it must be"),
        ('[{"image_id": 1, "caption": "a"}, 2]', "entry 1 of .* lacks an image_id or a caption"),
        ('[{"image_id": 1}]', "entry 0 of .* lacks an image_id or a caption"),
        ('[{"image_id": 1.5, "caption": "a"}]', "an image_id of type float; it must be an int or a string"),
        ('[{"image_id": 1, "caption": ["a"]}]', r"entry 0 of .* has the caption \['a'\]; it must be one string"),
        (
            '[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]',
            "entry 1 of .* repeats the image_id 1",
        ),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, text: str | bytes, says: str) -> None:
    path = tmp_path / "captions.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=says):
        read_captions(path)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    for name, data in (("plain.json.gz", b"[]"), ("cut.json.gz", gzip.compress(b"[]" * 99)[:-9])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name} is not readable JSON"):
            read_captions(tmp_path / name)
    with pytest.raises(DataError, match=r"none\.json is not readable JSON: No such file"):
        read_captions(tmp_path / "none.json")


@pytest.mark.parametrize("text", ["हिन्दी में", "ภาษาไทย", "cafe\u0301 au lait"])
def test_marks_are_parts_of_words(text: str) -> None:
    assert _plain(text) == unicodedata.normalize("NFC", text)
    assert _plain(f"{text.upper()}!") == _plain(text)


def test_pictures_are_no_words_and_joined_letters_are_one() -> None:
    assert _plain("I \u2764\ufe0f you 1\ufe0f\u20e3!") == "i you 1"
    assert _plain("\u0645\u06cc\u200c\u062e") == "\u0645\u06cc\u062e"
