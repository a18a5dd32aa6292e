import json
import re
from pathlib import Path

import pytest

import lamzoo
from tests.training.moment_data import SMALL, moment_recipe, write_qvhighlights


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qvhighlights(tmp_path_factory.mktemp("qvhighlights"), clip=8, slowfast=6, text=5)


@pytest.fixture(scope="module")
def model(data: Path) -> str:
    built = lamzoo.create_model("lam_qd_detr_micro", video_dim=16, text_dim=5, **SMALL)
    return f"local-dir:{lamzoo.save_pretrained(built, data / 'model')}"


def test_a_model_and_its_submission_score_alike(run, data: Path, model: str) -> None:
    options = ("--task", "moments", "--data", f"qvhighlights:{data}", "--split", "val")
    done = run("eval", model, *options, "--submission", "val.jsonl", "--output", "scores.json")
    assert done.code == 0, done.err
    assert all(name in done.out for name in ("8 queries", "R1@0.7", "VeryGood-Hit1"))
    assert done.err == f"{model} on qvhighlights:{data}: 8 of 8\n"
    written = json.loads(Path("scores.json").read_text())
    lines = [json.loads(line) for line in Path("val.jsonl").read_text().splitlines()]
    assert written["queries"] == len(lines) == 8
    assert list(lines[0]) == ["qid", "query", "vid", "pred_relevant_windows", "pred_saliency_scores"]
    again = json.loads(run("eval", "val.jsonl", *options, "--json").out)
    assert again["metrics"] == written["metrics"]
    (data / "features").rename(data / "away")
    try:
        assert run("eval", "val.jsonl", *options).code == 0  # a submission needs no features
    finally:
        (data / "away").rename(data / "features")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--limit 3", "--limit does not apply to the task moments"),
        ("--fps 2", "--fps does not apply to the task moments"),
        ("--split absent", "no split 'absent'"),
        ("--submission nowhere/val.jsonl", "The folder nowhere of the submission does not exist"),
    ],
)
def test_what_does_not_fit_the_task_is_refused(run, data: Path, model: str, arguments: str, says: str) -> None:
    done = run("eval", model, "--task", "moments", "--data", f"qvhighlights:{data}", *arguments.split())
    assert (done.code, done.out) == (2, "")
    assert says in " ".join(done.err.split())
    assert not Path("nowhere").exists()


def test_a_classifier_finds_no_moments(run, data: Path) -> None:
    done = run("eval", "vit_micro", "--task", "moments", "--data", f"qvhighlights:{data}")
    assert done.code == 2
    assert "does not predict moments; use a model of the family lam_moment_detr" in " ".join(done.err.split())
    done = run("eval", "vit_micro", "--data", "npz:x", "--submission", "x.jsonl")
    assert "--submission does not apply to the task classification" in " ".join(done.err.split())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[]", "line 1 of broken.jsonl is not a JSON object"),
        ('{"qid": 24', "line 1 of broken.jsonl is not JSON"),
        ('{"query": "a"}', "line 1 of broken.jsonl has no qid"),
        ('{"qid": 24, "pred_relevant_windows": 3}', "pred_relevant_windows is not a list"),
        ('{"qid": 999, "pred_relevant_windows": [[0, 2, 1]]}', "have qid 999, which is not annotated"),
    ],
)
def test_a_malformed_submission_is_named(run, data: Path, line: str, says: str) -> None:
    Path("broken.jsonl").write_text(line + "\n")
    done = run("eval", "broken.jsonl", "--task", "moments", "--data", f"qvhighlights:{data}", "--split", "val")
    assert (done.code, done.out) == (2, "")
    assert says in " ".join(done.err.split())


def test_a_recipe_trains_and_prints_the_scores(run, data: Path, tmp_path: Path) -> None:
    table = moment_recipe(f"qvhighlights:{data}", tmp_path / "out")
    Path("recipe.json").write_text(json.dumps(table))
    done = run("train", "recipe.json", "schedule.epochs=1", "run.report=true")
    assert done.code == 0, done.err
    assert ": 24 queries to train on, 8 to validate on, 8 to test on\n" in done.err
    assert re.search(r"^epoch 1 of 1: training loss .*; val: R1@0.7 .*, R1@0.5 .*, mAP ", done.err, re.MULTILINE)
    assert "R1@0.7" in done.out
    assert "| R1@0.5 | R1@0.7 | mAP |" in (tmp_path / "out" / "report" / "report.md").read_text()
    done = run("eval", f"local-dir:{tmp_path}/out", "--split", "val")  # task and data are the run's
    assert done.code == 0, done.err
    assert "R1@0.7" in done.out
