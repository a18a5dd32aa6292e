"""Training of moment retrieval: what is asked of a model, the curve of a run however it is cut, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lamzoo
from lamzoo.data.moments import MomentQuery, create_moment_dataset
from lamzoo.data.moments.base import HIGHEST_GRADE
from lamzoo.errors import DataError, LamzooError
from lamzoo.evaluation import evaluate_moments
from lamzoo.training import TrainResult, load_recipe, parse_recipe, train
from lamzoo.training.moments.batches import Samples, clip_grades, collate, unrelated
from lamzoo.training.moments.run import MomentRun
from tests.speech import write_speech
from tests.training.gradients import gradients
from tests.training.moment_data import moment_recipe, write_qvhighlights
from tests.training.processes import train_failed, train_in_two, train_killed

RECIPE = Path(__file__).resolve().parents[2] / "benchmarks" / "recipes" / "qvhighlights.toml"
HELD_BY_RECIPE = ("epoch", "update", "lr", "train_loss", "eval_R1@0.5", "eval_R1@0.7", "eval_mAP")


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speech(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def qvhighlights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qvhighlights(tmp_path_factory.mktemp("qvhighlights"), clip=8, slowfast=6, text=5)


@pytest.fixture
def table(speech: Path, tmp_path: Path) -> dict[str, Any]:
    return moment_recipe(f"grid:{speech}:audio:3", tmp_path / "out")


def run(table: dict[str, Any], output: Path, **changes: Any) -> TrainResult:
    return train(parse_recipe({**table, "run": {**table["run"], "output": str(output), **changes}}))


def curve(history: list[dict[str, float]]) -> torch.Tensor:
    return torch.tensor([[float(record[key]) for key in HELD_BY_RECIPE] for record in history])


@pytest.mark.parametrize("role", ["val_release", "test_with_gt"])
def test_wrong_grades_are_found_before_anything_is_trained(tmp_path: Path, role: str) -> None:
    folder = write_qvhighlights(tmp_path / "data", clip=8, slowfast=6, text=5)
    file = folder / f"highlight_{role}.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for grades in lines[-1]["saliency_scores"]:
        grades.pop()
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=f"qid {lines[-1]['qid']} has a clip without three grades"):
        run(moment_recipe(f"qvhighlights:{folder}", tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def query(windows: list[tuple[float, float]], grades: Any = None) -> MomentQuery:
    return MomentQuery(0, "a dog", "v", 20.0, tuple(windows), grades)


def test_clips_in_a_moment_have_the_highest_grade_and_short_moments_their_nearest_clip() -> None:
    grades = clip_grades(query([(4.0, 8.0), (13.1, 13.3)]), 10)
    assert grades.tolist() == [0, 0, *[HIGHEST_GRADE] * 2, 0, 0, HIGHEST_GRADE, 0, 0, 0]


def test_grades_are_the_annotators_sum_at_the_features_length() -> None:
    given = np.zeros((10, 3), dtype=np.float32)
    given[2:4] = [[4, 0, 1], [3, 2, 2]]
    assert clip_grades(query([(4.0, 8.0)], given), 9).tolist() == [0, 0, 5, 7, 0, 0, 0, 0, 0]
    assert clip_grades(query([(4.0, 8.0)], given), 11).tolist() == [0, 0, 5, 7, 0, 0, 0, 0, 0, 0, 0]


def test_a_sample_says_what_is_true_of_it(qvhighlights: Path) -> None:
    dataset = create_moment_dataset(f"qvhighlights:{qvhighlights}", "train")
    samples = Samples(dataset)
    for index, truth in enumerate(dataset.queries):
        sample = samples[index]
        [[start, end]] = np.array(truth.windows) / truth.duration
        assert sample.spans.tolist() == [pytest.approx([(start + end) / 2, end - start])]
        assert (sample.grades[sample.better] >= sample.grades[sample.worse]).all()
        assert sample.grades[sample.better[0]] > 0
        assert sample.grades[sample.worse[0]] == 0
        assert sample.grades[sample.better[1]] == sample.grades.max()
    batch = collate([samples[index] for index in range(5)])
    lengths = [len(dataset.read(index).video) for index in range(5)]
    assert batch["video_mask"].sum(1).tolist() == lengths
    assert batch["video"].shape == (5, max(lengths), 8 + 6 + 2)
    assert batch["grades"].shape == batch["video_mask"].shape
    assert batch["moments"].tolist() == [1] * 5


def test_a_batch_pairs_videos_with_words_that_are_not_said_in_them(speech: Path) -> None:
    samples = Samples(create_moment_dataset(f"grid:{speech}:audio:3", "train"), splice=0.5)
    drawn = [samples[index] for index in range(12)]
    batch = collate(drawn)
    for sample, other in zip(drawn, unrelated(batch["sentence"], batch["fits"]).tolist(), strict=True):
        assert drawn[other].query.text not in {word for word, *_ in sample.query.words}
    alike = collate([drawn[0], drawn[0], drawn[0]])
    assert unrelated(alike["sentence"], alike["fits"]).tolist() == [1, 2, 0]  # where all fit, the next


def test_a_batch_says_which_word_is_said_in_each_clip(speech: Path) -> None:
    dataset = create_moment_dataset(f"grid:{speech}:audio:2-3", "train")
    samples = Samples(dataset)
    drawn = [samples[index] for index in range(8)]
    words = collate(drawn)["words"]
    for sample, row in zip(drawn, words, strict=True):
        count = len(sample.grades)
        assert row[count:].eq(-100).all()
        number = dataset.vocabulary.index(sample.query.text) + 1
        assert row[:count].eq(number).tolist() == sample.grades.gt(0).tolist()
        said = {word for word, *_ in sample.query.words}
        assert {dataset.vocabulary[each - 1] for each in row[:count].tolist() if each} == said


def test_data_whose_words_have_no_times_say_nothing_of_them(qvhighlights: Path) -> None:
    samples = Samples(create_moment_dataset(f"qvhighlights:{qvhighlights}", "train"))
    batch = collate([samples[0], samples[1]])
    assert "words" not in batch
    assert unrelated(batch["sentence"], batch["fits"]).tolist() == [1, 0]


def test_a_model_of_another_vocabulary_is_refused(table: dict[str, Any], tmp_path: Path) -> None:
    table["model"]["kwargs"]["words"] = 51
    with pytest.raises(
        LamzooError, match="classifies 51 words, but .* has the times of 6; set model.kwargs.words to 6"
    ):
        run(table, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lam_moment_detr_micro", "qd_detr_micro"])
def test_it_learns_to_find_words_it_has_not_heard(table: dict[str, Any], tmp_path: Path, name: str) -> None:
    table["model"] |= {"name": name}
    table["model"]["kwargs"] |= {"width": 32}
    if not name.startswith("lam_"):
        del table["model"]["lam"]
    table["schedule"]["epochs"] = 25
    table["optimizer"] = {"lr": 2e-3, "clip_grad": 1.0}
    result = run(table, tmp_path / "out", ema_decay=0.9, eval_interval=25, report=True)
    assert result.scores["test"]["brief"]["MR-full-R1@0.5"] > 40
    rows = list(csv.DictReader((result.output / "metrics.csv").open()))
    assert float(rows[-1]["eval_mAP"]) == result.scores["val"]["brief"]["MR-full-mAP"]
    assert result.report is not None
    assert "| R1@0.7 |" in result.report.read_text()
    model = lamzoo.create_model(f"local-dir:{result.model}", pretrained=True)
    dataset = create_moment_dataset(table["data"]["source"], "test")
    assert evaluate_moments(model, dataset, batch_size=5).metrics == result.scores["test"]


def test_a_run_in_bfloat16_is_scored_in_float32(table: dict[str, Any]) -> None:
    table["run"]["precision"] = "bf16"
    trained = MomentRun(parse_recipe(table), False, None, None)
    dtypes = set()
    layers = trained.evaluated_model.encoder[0].feed_forward.layers
    layers.register_forward_hook(lambda _, __, tokens: dtypes.add(tokens.dtype))
    trained.score("validation")
    assert dtypes == {torch.float32}
    facts = trained.facts(None)
    assert (facts["precision"], facts["scoring_precision"]) == ("bf16", "float32")
    trained.backward(0, 0, [next(iter(trained.loader))])
    assert dtypes == {torch.float32, torch.bfloat16}


@pytest.mark.slow
def test_runs_of_several_precisions_follow_each_other(table: dict[str, Any], tmp_path: Path) -> None:
    for precision in ("no", "bf16", "no"):
        result = run(table, tmp_path / f"{precision}{len(list(tmp_path.iterdir()))}", precision=precision)
        assert len(result.history) == 2


@pytest.mark.parametrize("killed_at", [pytest.param(3, marks=pytest.mark.slow), 8])
def test_killed_run_resumes_to_the_same_curve(table: dict[str, Any], tmp_path: Path, killed_at: int) -> None:
    table["model"]["kwargs"] |= {"dropout": 0.1}
    table["run"] |= {"ema_decay": 0.9, "checkpoint_interval": 2}
    whole = run(table, tmp_path / "whole")
    resumed = train_killed(table, tmp_path / "killed", killed_at)
    assert torch.equal(curve(resumed.history), curve(whole.history))
    expected, weights = (load_file(result.model / "model.safetensors") for result in (whole, resumed))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_workers_do_not_change_the_curve(table: dict[str, Any], tmp_path: Path) -> None:
    table["schedule"]["epochs"] = 1
    alone = run(table, tmp_path / "alone")
    table["data"]["workers"] = 1
    assert torch.equal(curve(run(table, tmp_path / "workers").history), curve(alone.history))


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(table: dict[str, Any], tmp_path: Path) -> None:
    table["optimizer"] = {"name": "sgd", "lr": 1e-4}
    alone = run(table, tmp_path / "alone")
    table["run"]["accumulation"] = 2
    rows = train_in_two(table, tmp_path / "two")
    torch.testing.assert_close(curve(rows), curve(alone.history), rtol=1e-4, atol=1e-4)


def test_a_batch_of_one_says_that_no_sentence_can_be_unrelated(
    table: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table["run"]["batch_size"] = 1
    assert gradients(table, tmp_path / "out")["loss"].isfinite()
    assert "run.batch_size is 1, so lam_qd_detr_micro is trained without negative sentences" in caplog.text


@pytest.mark.parametrize("name", ["lam_moment_detr_micro", "lam_qd_detr_micro"])
def test_qvhighlights_layout_trains_with_grades(qvhighlights: Path, tmp_path: Path, name: str) -> None:
    result = run(moment_recipe(f"qvhighlights:{qvhighlights}", tmp_path, name), tmp_path / "out")
    assert set(result.scores) == {"val", "test"}
    assert "HL-min-VeryGood-mAP" in result.scores["test"]["brief"]
    assert all(np.isfinite(record["train_loss"]) for record in result.history)


def test_published_weights_must_fit_the_data(table: dict[str, Any], qvhighlights: Path, tmp_path: Path) -> None:
    first = run(table, tmp_path / "first")
    table["model"] = {"name": f"local-dir:{first.model}", "pretrained": True}
    assert run(table, tmp_path / "second").history[0]["train_loss"] < first.history[0]["train_loss"]
    table["data"] = {"source": f"qvhighlights:{qvhighlights}"}
    table["augment"] = {}
    with pytest.raises(LamzooError, match="expects 258 features per clip and 6 per word, but the data have 16 and 5"):
        run(table, tmp_path / "third")


@pytest.mark.parametrize("form", ["{}", "local-dir:{}"])
def test_a_saved_model_keeps_its_input_sizes(table: dict[str, Any], tmp_path: Path, form: str) -> None:
    folder = tmp_path / "saved"
    lamzoo.save_pretrained(lamzoo.create_model("qd_detr_micro", video_dim=16, text_dim=5, words=0), folder)
    table["model"] = {"name": form.format(folder)}
    with pytest.raises(LamzooError, match="expects 16 features per clip and 5 per word"):
        run(table, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "moment"}, "The task 'moment' is unknown"),
        ({"data": {"sauce": "grid:x"}}, "data.sauce is unknown; did you mean data.source"),
        ({"data": {"eval_split": "train"}}, "queries of .* would be used for training and scoring"),
        ({"data": {"eval_split": "absent"}}, "absent"),
        ({"augment": {"splice": 2.0}}, "augment.splice is 2.0"),
        ({"loss": {"giou": -1.0}}, "loss.giou is -1.0"),
        ({"loss": {"temperature": 0.0}}, "loss.temperature is 0.0"),
        ({"optimizer": {"layer_decay": 0.5}}, "optimizer.layer_decay is for classifiers"),
        ({"model": {"name": "lam_vit_micro"}}, "lam_vit_micro.* no argument 'video_dim'|no argument"),
        ({"run": {"batch_size": 4096}}, "batch_size is 4096, but .* has only 72 queries"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_and_leaves_nothing(
    table: dict[str, Any], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    for section, values in changes.items():
        table[section] = {**table.get(section, {}), **values} if isinstance(values, dict) else values
    with pytest.raises(LamzooError, match=says):
        train(parse_recipe(table))
    assert not (tmp_path / "out").exists()


def test_splicing_is_refused_where_the_data_know_no_pieces(qvhighlights: Path, tmp_path: Path) -> None:
    table = moment_recipe(f"qvhighlights:{qvhighlights}", tmp_path / "out") | {"augment": {"splice": 0.5}}
    with pytest.raises(LamzooError, match=r"can't splice videos.*augment\.splice"):
        train(parse_recipe(table))
    assert not (tmp_path / "out").exists()


def test_a_missing_feature_is_named_before_the_first_epoch(tmp_path: Path) -> None:
    folder = write_qvhighlights(tmp_path / "data", clip=8, slowfast=6, text=5)
    (folder / "features" / "clip_text_features" / "qid30.npz").unlink()
    with pytest.raises(LamzooError, match=r"has no qid30\.npz"):
        train(parse_recipe(moment_recipe(f"qvhighlights:{folder}", tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_features_of_another_rate_are_named_before_the_first_epoch(tmp_path: Path) -> None:
    folder = write_qvhighlights(tmp_path / "data", clip=8, slowfast=6, text=5)
    for kind, width in (("clip_features", 8), ("slowfast_features", 6)):
        np.savez(folder / "features" / kind / "v25.npz", features=np.ones((300, width), np.float32))
    with pytest.raises(LamzooError, match=r"the video 'v25' of .* have 300 rows"):
        train(parse_recipe(moment_recipe(f"qvhighlights:{folder}", tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_an_evaluation_that_fails_does_not_cost_the_epoch(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(table, tmp_path / "whole")
    resumed = train_failed(table, tmp_path / "failed", MomentRun, monkeypatch)
    assert torch.equal(curve(resumed.history), curve(whole.history))


@pytest.mark.slow
def test_the_qvhighlights_recipe_takes_twenty_updates_on_features_of_its_shape(tmp_path: Path) -> None:
    folder = write_qvhighlights(tmp_path / "data")
    output = tmp_path / "out"
    changes = ("run.batch_size=6", "schedule.epochs=5", "data.workers=0", "run.device=cpu", "run.report=false")
    recipe = load_recipe(RECIPE, (f"data.source=qvhighlights:{folder}", f"run.output={output}", *changes))
    result = train(recipe)
    assert result.history[-1]["update"] == 20
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert "HL-min-VeryGood-Hit1" in result.scores["val"]["brief"]
