"""Caption metrics: COCO's scores, word error rate and neighbour recall, from references and hypotheses."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lamzoo.errors import ConfigError, DataError, MissingExtraError

References: TypeAlias = Mapping[Any, Sequence[str]]
Hypotheses: TypeAlias = Mapping[Any, str]
CaptionMetric: TypeAlias = Literal["Bleu", "ROUGE_L", "CIDEr", "METEOR", "SPICE"]
Similarity: TypeAlias = Callable[[Sequence[str], Sequence[str]], ArrayLike]
_Sentences: TypeAlias = dict[int, list[str]]


def caption_metrics(
    references: References,
    hypotheses: Hypotheses,
    *,
    metrics: Sequence[CaptionMetric] = ("Bleu", "ROUGE_L", "CIDEr"),
    tokenize: bool = False,
) -> dict[str, float]:
    """Computes COCO's caption metrics with the original tools (package pycocoevalcap).

    CIDEr takes its document frequencies from the given references, so a subset of a data set has other values than the
    whole, and a single id always scores 0.

    Args:
        references: one or more reference sentences for each id.
        hypotheses: one sentence for each of these ids; an empty one scores 0.
        metrics: the metrics to compute. ``"METEOR"`` and ``"SPICE"`` run Java; SPICE also needs Stanford CoreNLP, which
            is downloaded separately by pycocoevalcap, and prints its progress.
        tokenize: lowercase and strip punctuation as COCO does, with Stanford's PTBTokenizer, which runs Java.
            Otherwise the text is split at spaces unchanged.

    Returns:
        In the order of ``metrics``: ``Bleu_1`` to ``Bleu_4``, ``ROUGE_L``, ``CIDEr``, ``METEOR``, ``SPICE``; fractions
        as computed by the tools, CIDEr from 0 to 10.

    Raises:
        DataError: there are no ids, an id occurs on one side only, an id has no references, a reference has no words,
            or a sentence is not a string.
        ConfigError: an unknown metric.
        MissingExtraError: pycocoevalcap, Java or CoreNLP is missing, or Java fails.
    """
    unknown = [metric for metric in metrics if metric not in _SCORERS]
    if unknown:
        raise ConfigError(f"The metric {unknown[0]!r} is unknown; use one of {', '.join(_SCORERS)}.")
    _check(references, hypotheses)
    lines = [" ".join(text.split()) for key in references for text in (hypotheses[key], *references[key])]
    if tokenize:
        lines = _tokenized(lines)
    rest = iter(lines)
    found: _Sentences = {}
    truth: _Sentences = {}
    for number, (key, texts) in enumerate(references.items()):
        found[number] = [next(rest)]
        truth[number] = [next(rest) for _ in texts]
        if not all(truth[number]):
            raise DataError(f"A reference of id {key!r} has only punctuation; remove it.")
    scores: dict[str, float] = {}
    for metric in metrics:
        scores |= _SCORERS[metric](truth, found)
    return scores


def word_error_rate(references: References, hypotheses: Hypotheses) -> dict[str, float]:
    """Computes the word error rate, for speech and other text with a single correct transcription.

    Args:
        references: for each id one sentence, split at spaces, or several, of which the one with the fewest errors
            counts, and among ties the longest.
        hypotheses: one sentence for each of these ids.

    Returns:
        ``WER``: insertions, deletions and substitutions in percent of the references' words, over all ids together, so
        it may exceed 100; and ``sentence_accuracy``: the percentage of sentences without an error.

    Raises:
        DataError: as of :func:`caption_metrics`.
    """
    _check(references, hypotheses)
    errors = words = right = 0
    for key, hypothesis in hypotheses.items():
        sentences = [reference.split() for reference in references[key]]
        fewest, shorter = min((_edits(hypothesis.split(), sentence), -len(sentence)) for sentence in sentences)
        errors, words, right = errors + fewest, words - shorter, right + (fewest == 0)
    return {"WER": 100 * errors / words, "sentence_accuracy": 100 * right / len(hypotheses)}


def word_overlap(hypotheses: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """Returns the F1 of the words, split at spaces, shared by each pair of sentences, ``(hypotheses, references)``."""
    ours, theirs = ([Counter(text.split()) for text in texts] for texts in (hypotheses, references))
    return np.array([[2 * (a & b).total() / max(1, a.total() + b.total()) for b in theirs] for a in ours])


def neighbour_recall(
    references: References,
    hypotheses: Hypotheses,
    groups: Mapping[Any, Sequence[Any]],
    *,
    k: int,
    window: int,
    similarity: Similarity = word_overlap,
) -> float:
    """Computes R@k/N of audio descriptions (AutoAD II, arXiv 2310.06838): do they match their own moment best?

    Among ``N = window`` successive descriptions of a movie, a hypothesis is correct if its own reference is among the
    ``k`` most similar. As in AutoAD's code, windows start every ``N // 2`` descriptions and are always full, so up to
    half a window at the end of a movie may be ignored; recall is averaged over the windows of a movie, then over
    movies. A reference ranks behind all equally similar ones, so a model that repeats the same text scores no better
    than chance.

    Published figures (R@5/16) rank by BERTScore, which downloads a model; scores of another similarity are not
    comparable. With the package bert-score it is::

        scorer = bert_score.BERTScorer(lang="en", rescale_with_baseline=True)

        def similarity(hypotheses, references):
            pairs = [h for h in hypotheses for _ in references], [*references] * len(hypotheses)
            return scorer.score(*pairs)[2].reshape(len(hypotheses), len(references))

    Args:
        references: for each id a list with its reference description.
        hypotheses: the predicted description of each of these ids.
        groups: for each movie the ids of its descriptions in temporal order; each id belongs to one movie. A movie with
            fewer than ``window`` descriptions forms a single window.
        k: number of most similar references that count.
        window: number of descriptions per window.
        similarity: maps lists of hypotheses and references to ``(hypotheses, references)``; higher is more similar.
            Word overlap by default, which needs no download.

    Returns:
        The recall in percent.

    Raises:
        DataError: as of :func:`caption_metrics`; or an id has two references, or belongs to no movie or to two.
        ConfigError: ``k`` is below 1 or above ``window``, or ``similarity`` returns another shape or NaN.
    """
    _check(references, hypotheses)
    _check_groups(references, groups)
    if not 1 <= k <= window:
        raise ConfigError(f"k is {k}; it must be from 1 to the window, {window}.")
    recalls = []
    for movie in groups.values():
        size = min(window, len(movie))
        parts = [movie[start : start + size] for start in range(0, len(movie) - size + 1, max(1, window // 2))]
        hits = [_hits([hypotheses[key] for key in p], [references[key][0] for key in p], k, similarity) for p in parts]
        recalls.append(np.mean(hits))
    return 100 * float(np.mean(recalls))


def _check(references: References, hypotheses: Hypotheses) -> None:
    for name, given in (("references", references), ("hypotheses", hypotheses)):
        if not isinstance(given, Mapping) or not given:
            raise DataError(f"The {name} are empty or not a mapping; give them as {{id: ...}}.")
    for name, given, other in (("hypothesis", references, hypotheses), ("reference", hypotheses, references)):
        missing = [key for key in given if key not in other]
        if missing:
            few = ", ".join(map(repr, missing[:3]))
            raise DataError(
                f"{len(missing)} of {len(given)} ids have no {name}, such as {few}; use the same ids on both sides, "
                "all int or all str."
            )
    for key, texts in references.items():
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise DataError(f"The references of id {key!r} are {texts!r:.60}; give a list of at least one string.")
        for text in texts:
            if not isinstance(text, str) or not text.split():
                raise DataError(f"A reference of id {key!r} is {text!r:.60}; give a string with words, or remove it.")
        if not isinstance(hypotheses[key], str):
            raise DataError(f"The hypothesis of id {key!r} is {hypotheses[key]!r:.60}; give one string.")


def _check_groups(references: References, groups: Mapping[Any, Sequence[Any]]) -> None:
    movie_of: dict[Any, Any] = {}
    for movie, keys in groups.items():
        if not keys:
            raise DataError(f"The movie {movie!r} has no descriptions; remove it.")
        for key in keys:
            if key in movie_of:
                raise DataError(f"Id {key!r} is in the movie {movie_of[key]!r} and again in {movie!r}; list it once.")
            if key not in references:
                raise DataError(f"The movie {movie!r} lists the id {key!r}, which has no reference.")
            movie_of[key] = movie
    for key, texts in references.items():
        if key not in movie_of:
            raise DataError(f"Id {key!r} is in no movie of groups; add it to one, or remove it.")
        if len(texts) > 1:
            raise DataError(f"Id {key!r} has {len(texts)} references; neighbour recall needs exactly one.")


def _edits(words: Sequence[str], others: Sequence[str]) -> int:
    """Returns the word-level edit distance of two sequences."""
    above = list(range(len(others) + 1))
    for row, word in enumerate(words, start=1):
        left = row
        line = [left]
        for column, other in enumerate(others):
            left = min(left + 1, above[column + 1] + 1, above[column] + (word != other))
            line.append(left)
        above = line
    return above[-1]


def _hits(hypotheses: list[str], references: list[str], k: int, similarity: Similarity) -> float:
    scores = np.asarray(similarity(hypotheses, references), dtype=np.float64)
    if scores.shape != (len(hypotheses), len(references)) or np.isnan(scores).any():
        raise ConfigError(
            f"The similarity returned shape {scores.shape}, or NaN, for {len(hypotheses)} hypotheses and as many "
            "references; it must return a number for each pair."
        )
    ranks = (scores >= scores.diagonal()[:, None]).sum(axis=1)
    return float((ranks <= k).mean())


def _bleu(references: _Sentences, hypotheses: _Sentences) -> dict[str, float]:
    scores, _ = _tool("bleu.bleu").Bleu(4).compute_score(references, hypotheses, verbose=0)  # prints otherwise
    return {f"Bleu_{n}": float(score) for n, score in enumerate(scores, start=1)}


def _rouge(references: _Sentences, hypotheses: _Sentences) -> dict[str, float]:
    return {"ROUGE_L": float(_tool("rouge.rouge").Rouge().compute_score(references, hypotheses)[0])}


def _cider(references: _Sentences, hypotheses: _Sentences) -> dict[str, float]:
    return {"CIDEr": float(_tool("cider.cider").Cider().compute_score(references, hypotheses)[0])}


def _meteor(references: _Sentences, hypotheses: _Sentences) -> dict[str, float]:
    tool = _tool("meteor.meteor")
    _java("METEOR")
    scorer = tool.Meteor()
    try:
        return {"METEOR": float(scorer.compute_score(references, hypotheses)[0])}
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError):
            scorer.meteor_p.stdin.close()
        raise _broken("METEOR", error) from error
    finally:
        if scorer.lock.locked():  # left locked by an exception; __del__ would wait forever
            scorer.lock.release()


def _spice(references: _Sentences, hypotheses: _Sentences) -> dict[str, float]:
    tool = _tool("spice.spice")
    _java("SPICE")
    folder = Path(tool.__file__).parent / "lib"
    if not all((folder / f"stanford-corenlp-3.6.0{part}.jar").exists() for part in ("", "-models")):
        raise MissingExtraError(
            f"SPICE needs Stanford CoreNLP 3.6.0, which is not in {folder}; download it with "
            "python -m pycocoevalcap.spice.get_stanford_models"
        )
    try:
        return {"SPICE": float(tool.Spice().compute_score(references, hypotheses)[0])}
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise _broken("SPICE", error) from error


def _tokenized(lines: Sequence[str]) -> list[str]:
    """Tokenises as pycocoevalcap's PTBTokenizer does, without writing to the package's folder or to stderr."""
    tool = _tool("tokenizer.ptbtokenizer")
    _java("tokenize=True")
    jar = str(Path(tool.__file__).parent / tool.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    try:
        done = subprocess.run(command, input="".join(f"{line}\n" for line in lines).encode(), capture_output=True)
    except OSError as error:
        raise _broken("tokenize=True", error) from error
    found = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(found) != len(lines):
        raise _broken("tokenize=True", f"{len(found)} sentences of {len(lines)}, exit status {done.returncode}")
    # Split at plain spaces only: a token may contain a no-break space.
    return [" ".join(word for word in line.rstrip().split(" ") if word not in tool.PUNCTUATIONS) for line in found]


def _tool(name: str) -> Any:
    try:
        return importlib.import_module(f"pycocoevalcap.{name}")
    except ImportError as error:
        raise MissingExtraError(
            f"Scoring captions needs pycocoevalcap ({error}); install it with: pip install 'lamzoo[captions]'"
        ) from None


def _java(what: str) -> None:
    if shutil.which("java") is None:
        raise MissingExtraError(f"{what} runs Java, which is not on the PATH; install a Java runtime, or leave it out.")


def _broken(what: str, why: object) -> MissingExtraError:
    return MissingExtraError(f"{what} runs Java, which failed ({why}); check `java -version`, or leave it out.")


_SCORERS: dict[str, Callable[[_Sentences, _Sentences], dict[str, float]]] = {
    "Bleu": _bleu,
    "ROUGE_L": _rouge,
    "CIDEr": _cider,
    "METEOR": _meteor,
    "SPICE": _spice,
}
