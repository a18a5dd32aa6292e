"""``Task`` and ``MetricSpec``: plain records of what the zoo has to know about a task; importing them is cheap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

from lamzoo.errors import DataError


@dataclass(frozen=True)
class MetricSpec:
    """A score of a task.

    Attributes:
        name: in logs, in ``metrics.csv`` (behind ``eval_``) and in the results tables of ``lamzoo bench``.
        path: keys, or attributes, that lead to it in the scores of a split.
        heading: of a table's column, with its unit.
        short: likewise, beside other scores of the task; ``heading`` by default.
        decimals: worth printing.
        higher_is_better: False for errors and ranks.
        column: in the registry's cards and the results of ablations; ``name`` by default.
    """

    name: str
    path: tuple[str, ...]
    heading: str
    short: str = ""
    decimals: int = 2
    higher_is_better: bool = True
    column: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "column", self.column or self.name)
        object.__setattr__(self, "short", self.short or self.heading)

    def of(self, scores: Any) -> float | None:
        """Returns the score of a split; None where it was not measured."""
        for key in self.path:
            scores = scores.get(key) if isinstance(scores, Mapping) else getattr(scores, key, None)
        return None if scores is None else float(scores)

    def text(self, value: float | None) -> str:
        """Writes the score for a table; ``""`` for None."""
        return "" if value is None else f"{value:.{self.decimals}f}"


@dataclass(frozen=True)
class EvalRequest:
    """How a model is scored: what :attr:`Task.evaluate` gets beside the model and the data.

    Attributes:
        batch_size: inputs at a time.
        device: as torch writes it, or ``"auto"``.
        precision: of the autocast: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        workers: processes that read inputs; 0 reads in this one.
        progress: called with inputs done, inputs in all, and a note.
        options: the task's own options of ``lamzoo eval`` that were given, by their names in Python.
    """

    batch_size: int = 64
    device: Any = "auto"
    precision: Any = "float32"
    workers: int = 0
    progress: Callable[[int, int, str], None] = lambda done, total, note: None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model on a split: what :attr:`Task.evaluate` returns.

    Attributes:
        scores: what the paths of the task's metrics lead through.
        samples: what was scored, in words: ``"20 images"``.
        record: the whole as JSON values, for ``lamzoo eval --json``.
        variants: further scores of the same split, by what is different about them.
        predictions: what the model answered, for :attr:`Task.write_predictions`; None where that is not kept.
        notes: sentences to print below the scores.
    """

    scores: Any
    samples: str
    record: Mapping[str, Any]
    variants: Mapping[str, Any] = field(default_factory=dict)
    predictions: Any = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoreTable:
    """Scores ready to be printed.

    Attributes:
        columns: the headings; the first one's cells are text.
        rows: the cells, all as text.
        note: a sentence below the table of a report; empty for none.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Task:
    """A task: everything that commands, training and reports have to know about it.

    A field that says "function" or "class" holds ``"module:name"``, which :meth:`load` imports when it is needed.

    Attributes:
        name: in recipes, cards and ``--task``.
        about: a noun phrase: ``"image classification"``.
        items: what a data set holds, in messages: ``"images"``.
        model_kind: a noun phrase for messages: ``"a model of the family lam_clip4clip"``.
        kinds: what may precede the colon of a data specification.
        metrics: the scores that are logged and kept in results; the first one is watched.
        open: function ``(spec, split) -> dataset``; the data set has ``split`` and a length.
        evaluate: function ``(model, dataset, request: EvalRequest) -> Evaluation``.
        recipe: class, a :class:`lamzoo.training.recipe_common.TaskRecipe`.
        run: class, a :class:`lamzoo.training.trainer.TrainingRun`.
        defaults: function that chooses a recipe's settings for the data, as
            :func:`lamzoo.training.defaults.complete_recipe` says; None where a recipe must say them.
        open_scored: function ``(spec, split | None, trained | None) -> dataset`` for the data that a model is scored
            on; None for :attr:`open` with ``test`` by default.
        watched: function ``(dataset) -> name`` of the watched metric, where that depends on the data; None for the
            first one.
        table: function ``(scores by row) -> ScoreTable``; None for a column for each metric.
        options: options of ``lamzoo eval`` that the task takes, by their names in Python.
        predictions: suffixes of files of predictions that ``lamzoo eval`` scores in place of a model.
        score_predictions: function ``(path, dataset) -> Evaluation``.
        write_predictions: function ``(path, predictions)``.
        explain: function that draws a model: ``(model, image, path)``, or ``(model, dataset, query, path)`` where
            ``explains`` is ``"queries"``; None where ``lamzoo explain`` draws nothing.
        explains: what ``explain`` draws: ``"image"`` or ``"queries"`` of a data set.
        explain_hint: a way out where ``explain`` is None.
        describe_input: function ``(model) -> str``: the size of its input, for a model card.
        listed: name of the metric that ``lamzoo list`` shows; the first one by default.
        reads_images: whether a model has an image size and timm's preprocessing.
    """

    name: str
    about: str
    items: str
    model_kind: str
    kinds: tuple[str, ...]
    metrics: tuple[MetricSpec, ...]
    open: str
    evaluate: str
    recipe: str
    run: str
    defaults: str | None = None
    open_scored: str | None = None
    watched: str | None = None
    table: str | None = None
    options: tuple[str, ...] = ()
    predictions: tuple[str, ...] = ()
    score_predictions: str | None = None
    write_predictions: str | None = None
    explain: str | None = None
    explains: str = "image"
    explain_hint: str = ""
    describe_input: str | None = None
    listed: str = ""
    reads_images: bool = False

    def load(self, attribute: str) -> Any:
        """Imports what a field names: ``load("run")`` returns the class.

        Raises:
            LookupError: the task has none.
        """
        name = getattr(self, attribute)
        if name is None:
            raise LookupError(f"the task {self.name} has no {attribute}")
        module, _, member = name.partition(":")
        return getattr(import_module(module), member)

    def open_split(self, spec: str, split: str) -> Any:
        """Opens a split of a data set.

        Raises:
            DataError: the data is of another task, which is named; or whatever :attr:`open` raises.
        """
        self._check_kind(spec)
        return self.load("open")(spec, split)

    def open_for_scoring(self, spec: str, split: str | None = None, trained: Any = None) -> Any:
        """Opens the split that a model is scored on.

        Args:
            spec: the data set.
            split: None for ``test``, and for all of data without splits.
            trained: a :class:`lamzoo.data.images.trained.TrainedData`, what the model was trained on, where it is the
                model of a run.

        Raises:
            DataError: as of :meth:`open_split`.
        """
        self._check_kind(spec)
        if self.open_scored is not None:
            return self.load("open_scored")(spec, split, trained)
        from lamzoo.data.images.trained import open_videos  # lamzoo.data imports torch

        return open_videos(partial(self.load("open"), spec), spec, split, trained)

    def metric(self, name: str) -> MetricSpec:
        """Returns a metric by its name.

        Raises:
            LookupError: the task has no such metric.
        """
        found = next((metric for metric in self.metrics if metric.name == name), None)
        if found is None:
            raise LookupError(f"the task {self.name} has no metric {name!r}")
        return found

    @property
    def listed_metric(self) -> MetricSpec:
        """The metric that ``lamzoo list`` shows."""
        return self.metric(self.listed) if self.listed else self.metrics[0]

    def watched_metric(self, dataset: Any) -> MetricSpec:
        """Returns the metric that is watched in training and that ``lamzoo bench`` measures, for such data."""
        return self.metrics[0] if self.watched is None else self.metric(self.load("watched")(dataset))

    def score_table(self, scores: Mapping[str, Any]) -> ScoreTable:
        """Returns scores as a table.

        Args:
            scores: those of splits, by the name of the split, or by what else tells them apart.
        """
        if self.table is not None:
            table: ScoreTable = self.load("table")(scores)
            return table
        return metric_table(self.metrics, scores)

    def _check_kind(self, spec: str) -> None:
        kind, colon, _ = spec.partition(":")
        others = [task for task in TASKS.values() if kind in task.kinds]
        if colon and others and self.name not in [task.name for task in others]:
            raise DataError(
                f"{spec!r} is data for {' or '.join(task.about for task in others)}, and not for {self.about}; give "
                f"{' or '.join(f'{name}:...' for name in self.kinds)}, or choose {others[0].model_kind} "
                f"(--task {others[0].name})"
            )


#: By name; :mod:`lamzoo.tasks` lists those of the zoo, and plug-ins register theirs.
TASKS: dict[str, Task] = {}


def metric_table(
    metrics: Sequence[MetricSpec], scores: Mapping[str, Any], *, heading: str = "split", note: str = ""
) -> ScoreTable:
    """Returns a row for each split and a column for each metric that any of them has.

    Args:
        metrics: the columns.
        scores: by the name of the split.
        heading: of the first column.
        note: below the table.
    """
    found = {row: [metric.of(of_split) for metric in metrics] for row, of_split in scores.items()}
    there = [i for i in range(len(metrics)) if any(values[i] is not None for values in found.values())]
    columns = (heading, *(metrics[i].heading for i in there))
    rows = tuple((row, *(metrics[i].text(values[i]) for i in there)) for row, values in found.items())
    return ScoreTable(columns, rows, note)
