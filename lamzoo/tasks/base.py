"""``Task`` and ``MetricSpec``: plain records that describe a task; cheap to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pkgutil import resolve_name
from typing import Any

from lamzoo.errors import DataError


@dataclass(frozen=True)
class MetricSpec:
    """A metric of a task.

    Attributes:
        name: name in logs, in ``metrics.csv`` (after ``eval_``) and in the results tables of ``lamzoo bench``.
        path: keys or attributes that lead to it in the scores of a split.
        heading: heading of a table column, with its unit.
        short: shorter heading next to other metrics of the task; ``heading`` by default.
        decimals: number of decimals to print.
        higher_is_better: False for errors and ranks.
        column: column in the registry's cards and the results of ablations; ``name`` by default.
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
        """Returns the metric's value in the scores of a split; None if not measured."""
        for key in self.path:
            scores = scores.get(key) if isinstance(scores, Mapping) else getattr(scores, key, None)
        return None if scores is None else float(scores)

    def text(self, value: float | None) -> str:
        """Formats a value for a table; ``""`` for None."""
        return "" if value is None else f"{value:.{self.decimals}f}"


@dataclass(frozen=True)
class EvalRequest:
    """Evaluation settings that :attr:`Task.evaluate` receives besides the model and the data.

    Attributes:
        batch_size: inputs per batch.
        device: a torch device, or ``"auto"``.
        precision: autocast precision: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        workers: worker processes that read inputs; 0 reads in the main process.
        progress: called with the number of inputs done, the total, and a note.
        options: the given task-specific options of ``lamzoo eval``, by Python name.
    """

    batch_size: int = 64
    device: Any = "auto"
    precision: Any = "float32"
    workers: int = 0
    progress: Callable[[int, int, str], None] = lambda done, total, note: None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model on a split, as returned by :attr:`Task.evaluate`.

    Attributes:
        scores: the scores that the metrics' paths refer to.
        samples: a description of the inputs scored: ``"20 images"``.
        record: all results as JSON values, for ``lamzoo eval --json``.
        variants: further scores of the same split, by a description of the difference.
        predictions: the model's predictions, for :attr:`Task.write_predictions`; None if not kept.
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
    """A table of formatted scores.

    Attributes:
        columns: column headings; the first column holds text.
        rows: the cells, as text.
        note: a sentence below the table in reports; may be empty.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Task:
    """A task: everything that commands, training and reports need to know about it.

    Fields described as "function" or "class" hold ``"module:name"``, which :meth:`load` imports on demand.

    Attributes:
        name: name in recipes, cards and ``--task``.
        about: a noun phrase: ``"image classification"``.
        items: the plural of a data set's inputs, for messages: ``"images"``.
        model_kind: a noun phrase for messages: ``"a model of the family lam_clip4clip"``.
        kinds: prefixes of its data specifications, before the colon.
        metrics: the metrics that are logged and stored in results; the first one is watched.
        open: function ``(spec, split) -> dataset``; the data set has an attribute ``split`` and a length.
        evaluate: function ``(model, dataset, request: EvalRequest) -> Evaluation``.
        recipe: class, a :class:`lamzoo.training.recipe_common.TaskRecipe`.
        run: class, a :class:`lamzoo.training.trainer.TrainingRun`.
        defaults: function that chooses a recipe's settings for the data, as documented in
            :func:`lamzoo.training.defaults.complete_recipe`; None if recipes must set everything.
        open_scored: function ``(spec, split | None, trained | None) -> dataset`` that opens the data to score; None for
            :attr:`open` with ``test`` by default.
        watched: function ``(dataset) -> name`` of the watched metric, if it depends on the data; None for the first
            one.
        table: function ``(scores by row) -> ScoreTable``; None for one column per metric.
        options: task-specific options of ``lamzoo eval``, by Python name.
        predictions: suffixes of prediction files that ``lamzoo eval`` scores in place of a model.
        score_predictions: function ``(path, dataset) -> Evaluation``.
        write_predictions: function ``(path, predictions)``.
        explain: function that draws a model: ``(model, image, path)``, or ``(model, dataset, query, path)`` if
            ``explains`` is ``"queries"``; None if ``lamzoo explain`` does not support the task.
        explains: input of ``explain``: an ``"image"``, or the ``"queries"`` of a data set.
        explore: function that writes an interactive page of a model, with the arguments of ``explain``; None for none.
        takes_videos: whether ``explore`` takes ``videos``, a folder of video files for the frames of data without them.
        explore_video: function that writes the page of a video file: ``(model, video, texts, path)``; None for none.
        figure: function that writes a figure for a paper (PDF, SVG or PNG), likewise.
        explain_hint: what to suggest if ``lamzoo explain`` has no such output.
        describe_input: function ``(model) -> str`` that describes the input size, for a model card.
        listed: name of the metric in ``lamzoo list``; the first one by default.
        reads_images: whether models have an image size and timm's preprocessing.
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
    explore: str | None = None
    takes_videos: bool = False
    explore_video: str | None = None
    figure: str | None = None
    explain_hint: str = ""
    describe_input: str | None = None
    listed: str = ""
    reads_images: bool = False

    def load(self, attribute: str) -> Any:
        """Imports the object that a field refers to: ``load("run")`` returns the class.

        Raises:
            LookupError: the field is None.
        """
        name = getattr(self, attribute)
        if name is None:
            raise LookupError(f"the task {self.name} has no {attribute}")
        return resolve_name(name)

    def open_split(self, spec: str, split: str) -> Any:
        """Opens a split of a data set.

        Raises:
            DataError: the data belongs to another task, which is named; or as raised by :attr:`open`.
        """
        self.check_data(spec)
        return self.load("open")(spec, split)

    def open_for_scoring(self, spec: str, split: str | None = None, trained: Any = None) -> Any:
        """Opens the split to score a model on.

        Args:
            spec: specification of the data set.
            split: name of the split; None for ``test``, or for everything in data without splits.
            trained: the :class:`lamzoo.data.trained.TrainedData` of a trained run's model; None for other
                models.

        Raises:
            DataError: as of :meth:`open_split`.
        """
        self.check_data(spec)
        if self.open_scored is not None:
            return self.load("open_scored")(spec, split, trained)
        from lamzoo.data.trained import open_videos  # lamzoo.data imports torch

        return open_videos(partial(self.load("open"), spec), spec, split, trained)

    def metric(self, name: str) -> MetricSpec:
        """Returns a metric by name.

        Raises:
            LookupError: the task has no such metric.
        """
        found = next((metric for metric in self.metrics if metric.name == name), None)
        if found is None:
            raise LookupError(f"the task {self.name} has no metric {name!r}")
        return found

    @property
    def listed_metric(self) -> MetricSpec:
        """The metric in ``lamzoo list``."""
        return self.metric(self.listed) if self.listed else self.metrics[0]

    def watched_metric(self, dataset: Any) -> MetricSpec:
        """Returns the metric that training watches and ``lamzoo bench`` measures on a data set."""
        return self.metrics[0] if self.watched is None else self.metric(self.load("watched")(dataset))

    def score_table(self, scores: Mapping[str, Any]) -> ScoreTable:
        """Formats scores as a table.

        Args:
            scores: scores of splits, by name of the split or another row label.
        """
        if self.table is not None:
            table: ScoreTable = self.load("table")(scores)
            return table
        return metric_table(self.metrics, scores)

    def check_data(self, spec: str) -> None:
        """Checks by its kind that a data set is of this task; opens nothing.

        Raises:
            DataError: it is of another task, which is named.
        """
        kind, colon, _ = spec.partition(":")
        others = [task for task in TASKS.values() if kind in task.kinds]
        if colon and others and self.name not in [task.name for task in others]:
            raise DataError(
                f"{spec!r} is data for {' or '.join(task.about for task in others)}, not for {self.about}; use "
                f"{' or '.join(f'{name}:...' for name in self.kinds)}, or choose {others[0].model_kind}"
            )


#: All tasks by name: :mod:`lamzoo.tasks` registers those of the zoo, and plug-ins add theirs.
TASKS: dict[str, Task] = {}


def metric_table(metrics: Sequence[MetricSpec], scores: Mapping[str, Any], *, note: str = "") -> ScoreTable:
    """Returns a table with one row per split and one column per metric that any of them has.

    Args:
        metrics: the columns.
        scores: by the name of the split.
        note: below the table.
    """
    found = {row: [metric.of(of_split) for metric in metrics] for row, of_split in scores.items()}
    there = [i for i in range(len(metrics)) if any(values[i] is not None for values in found.values())]
    columns = ("split", *(metrics[i].heading for i in there))
    rows = tuple((row, *(metrics[i].text(values[i]) for i in there)) for row, values in found.items())
    return ScoreTable(columns, rows, note)
