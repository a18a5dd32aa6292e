"""The tasks of the zoo as records: one file per task, and one list."""

from __future__ import annotations

import difflib
from pkgutil import resolve_name

from lamzoo.errors import DuplicateModelError, UnknownTaskError
from lamzoo.tasks.base import TASKS, EvalRequest, Evaluation, MetricSpec, ScoreTable, Task, metric_table
from lamzoo.tasks.captions import CAPTIONS
from lamzoo.tasks.classification import CLASSIFICATION
from lamzoo.tasks.moments import MOMENTS
from lamzoo.tasks.retrieval import RETRIEVAL

__all__ = [
    "TASKS",
    "EvalRequest",
    "Evaluation",
    "MetricSpec",
    "ScoreTable",
    "Task",
    "find_metric",
    "find_task",
    "metric_table",
    "register_task",
    "task_of_predictions",
]

TASKS.update({task.name: task for task in (CLASSIFICATION, RETRIEVAL, MOMENTS, CAPTIONS)})

_LOADS_PLUGINS = "lamzoo.registry.catalog:list_models"


def register_task(task: Task) -> Task:
    """Registers a task of a plug-in and returns it; call it in the module that the entry point names.

    Raises:
        DuplicateModelError: the name is taken by another task.
    """
    if TASKS.setdefault(task.name, task) != task:
        raise DuplicateModelError(f"The task name {task.name!r} is taken by {TASKS[task.name].about}; choose another.")
    return task


def find_task(name: str) -> Task:
    """Returns a task by name; loads plug-ins if lamzoo itself has no such task.

    Raises:
        UnknownTaskError: there is no such task; the message suggests a name or lists the known ones.
    """
    if name not in TASKS:
        resolve_name(_LOADS_PLUGINS)()
    if name in TASKS:
        return TASKS[name]
    close = difflib.get_close_matches(str(name), TASKS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it must be one of {', '.join(map(repr, TASKS))}."
    raise UnknownTaskError(f"The task {name!r} is unknown; {hint}")


def find_metric(name: str, task: str | None = None) -> MetricSpec | None:
    """Returns the metric of a results table.

    Args:
        name: name of the metric.
        task: the row's task; None in tables of lamzoo 0.1, whose metrics are identified by name alone.
    """
    tasks = [TASKS[task]] if task in TASKS else TASKS.values()
    return next((metric for each in tasks for metric in each.metrics if metric.name == name), None)


def task_of_predictions(path: str) -> Task | None:
    """Returns the task whose predictions a file holds, by the file's suffix; None for other files."""
    return next((task for task in TASKS.values() if task.predictions and path.endswith(task.predictions)), None)
