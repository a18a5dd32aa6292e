"""Tasks are records: what they name exists, and nothing but the records tells tasks apart."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamzoo.errors import DataError, DuplicateModelError, UnknownTaskError
from lamzoo.registry.catalog import _load_own, find_spec, list_models
from lamzoo.tasks import TASKS, MetricSpec, Task, find_metric, find_task, metric_table, register_task

ROOT = Path(__file__).parents[2]
NAMED = ("open", "evaluate", "recipe", "run", "defaults", "open_scored", "watched", "table", "score_predictions",
         "write_predictions", "explain", "explore", "explore_video", "figure", "describe_input")  # fmt: skip
# Classes of one task: of its models, its recipe, its run.
OF_A_TASK = {
    "Clip4Clip", "MomentNetwork", "MomentDetr", "QdDetr", "Describer", "Recipe", "RetrievalRecipe", "MomentRecipe",
    "CaptionRecipe", "ClassificationRun", "RetrievalRun", "MomentRun", "CaptionRun",
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_what_a_record_names_can_be_imported(task: Task) -> None:
    for attribute in NAMED:
        if getattr(task, attribute) is not None:
            assert callable(task.load(attribute)), attribute
    assert task.load("recipe").task == task.name


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_kinds_of_data_are_those_that_the_task_opens(task: Task) -> None:
    for kind in task.kinds:
        with pytest.raises(DataError) as caught:
            task.open_split(f"{kind}:", "test")
        assert f"has nothing after {kind}:" in str(caught.value)


def _sources() -> Iterator[tuple[Path, ast.AST]]:
    for folder in ("lamzoo", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.parent != ROOT / "lamzoo" / "tasks":
                yield path, ast.parse(path.read_text(encoding="utf-8"))


def _is_task_name(node: ast.AST) -> bool:
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return any(map(_is_task_name, node.elts))
    return isinstance(node, ast.Constant) and node.value in TASKS


def test_no_code_tells_tasks_apart_by_their_classes_or_names() -> None:
    found = []
    for path, tree in _sources():
        for node in ast.walk(tree):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                names = {getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(node.args[1])}
                found += [where] if names & OF_A_TASK else []
            elif isinstance(node, ast.Compare):
                found += [where] if any(map(_is_task_name, (node.left, *node.comparators))) else []
            elif isinstance(node, ast.Dict):
                found += [where] if sum(key is not None and _is_task_name(key) for key in node.keys) > 2 else []
            elif isinstance(node, ast.MatchValue):
                found += [where] if _is_task_name(node.value) else []
    assert found == []


def test_every_model_of_the_zoo_says_a_task_that_there_is() -> None:
    _load_own()
    assert {find_spec(name).task for name in list_models()} == set(TASKS)
    assert find_spec("timm/vit_tiny_patch16_224").task == "classification"


def test_a_task_is_found_by_its_name_or_named_with_the_closest() -> None:
    assert find_task("moments") is TASKS["moments"]
    with pytest.raises(UnknownTaskError, match="The task 'momnets' is unknown; did you mean 'moments'"):
        find_task("momnets")
    with pytest.raises(DuplicateModelError, match="'moments' is taken by moment retrieval"):
        register_task(dataclasses.replace(TASKS["captions"], name="moments"))


def test_data_of_another_task_is_named() -> None:
    with pytest.raises(DataError, match="'videos:here' is data for text-video retrieval or captions of clips, not"):
        TASKS["classification"].open_split("videos:here", "test")


def test_metrics_of_old_tables_are_known_by_their_names_alone() -> None:
    for name, heading in (("top1", "top-1 (%)"), ("t2v_R1", "text to video R@1 (%)")):
        metric = find_metric(name)
        assert metric is not None and metric.heading == heading
    assert find_metric("top1", "moments") is None
    assert find_metric("nothing") is None


def test_a_table_has_a_column_for_each_score_that_was_measured() -> None:
    metrics = [MetricSpec("a", ("x", "a"), "A"), MetricSpec("b", ("b",), "B", decimals=1), MetricSpec("c", ("c",), "C")]
    table = metric_table(metrics, {"one": {"x": {"a": 1}, "b": None}, "two": {"b": 2.25}})
    assert table.columns == ("split", "A", "B")
    assert table.rows == (("one", "1.00", ""), ("two", "", "2.2"))


def test_the_records_are_read_without_torch() -> None:
    probe = "import sys, lamzoo.tasks; assert not {'torch', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", probe], check=True)
