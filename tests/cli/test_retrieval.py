import json
import re
from pathlib import Path

import pytest
import torch

import lamzoo
from lamzoo.profiling import bench
from lamzoo.profiling.results import read_rows
from lamzoo.profiling.worker import measured_row
from lamzoo.training import load_recipe
from tests.training.retrieval_data import retrieval_table, write_faces


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), copies=2)


@pytest.fixture(scope="module")
def model(faces: Path) -> str:
    towers = retrieval_table(faces, faces)["model"]["kwargs"]
    built = lamzoo.create_model("lam_clip4clip_micro", **towers, max_frames=3, fps=0)
    return f"local-dir:{lamzoo.save_pretrained(built, faces / 'model')}"


def test_retrieval_is_scored_printed_and_written(run, faces: Path, model: str) -> None:
    call = ("eval", model, "--task", "retrieval", "--data", f"grid:{faces}:face")
    done = run(*call, "--dual-softmax", "--output", "scores.json")
    assert done.code == 0, done.err
    assert "12 texts, 12 videos" in done.out
    assert done.out.count("text to video") == done.out.count("video to text") == 2
    written = json.loads(Path("scores.json").read_text())
    assert written["metrics"]["t2v"].keys() == {"R1", "R5", "R10", "R50", "MedianR", "MeanR"}
    assert written["sampling"] == {"fps": None, "max_frames": 3, "slicing": "uniform"}
    again = json.loads(run(*call, "--json", "--fps", "5", "--slicing", "head").out)
    assert again["sampling"] == {"fps": 5.0, "max_frames": 3, "slicing": "head"}
    assert again["dual"] is None


@pytest.fixture(scope="module")
def tight(faces: Path) -> str:
    """A model with a joint transformer."""
    towers = retrieval_table(faces, faces)["model"]["kwargs"]
    built = lamzoo.create_model("lam_clip4clip_micro", **towers, similarity="tight", max_frames=3, fps=0)
    return f"local-dir:{lamzoo.save_pretrained(built, faces / 'tight')}"


def test_both_stages_are_scored(run, faces: Path, model: str, tight: str) -> None:
    call = ("--data", f"grid:{faces}:face", "--rerank", "4")
    done = run("eval", tight, *call, "--output", "scores.json")
    assert done.code == 0, done.err
    assert "first stage alone" in done.out
    written = json.loads(Path("scores.json").read_text())
    assert written["rerank"] == 4
    assert written["first_stage"].keys() == written["metrics"].keys()
    done = run("eval", model, *call)
    assert (done.code, done.out) == (2, "")
    assert 'rerank needs a model with a joint transformer, similarity="tight"' in " ".join(done.err.split())


def test_both_stages_are_measured(faces: Path, tight: str, monkeypatch: pytest.MonkeyPatch, run) -> None:
    monkeypatch.setitem(bench.bench.__kwdefaults__, "runner", lambda job, **_: measured_row(job))
    options = ("--batch", "1", "--repeats", "2", "--threads", str(torch.get_num_threads()))
    done = run("bench", tight, "--out", "r.csv", "--data", f"grid:{faces}:face", "--rerank", "4", *options)
    assert done.code == 0, done.err
    every, first, staged = read_rows("r.csv")
    assert [row.rerank for row in (every, first, staged)] == [None, 0, 4]
    assert first.lam_gmacs == 0
    assert staged.lam_gmacs == pytest.approx(4 * every.lam_gmacs, abs=3e-6)  # rows have six decimals
    assert staged.gmacs - first.gmacs == pytest.approx(4 * (every.gmacs - first.gmacs), abs=3e-6)
    assert all(row.value is not None for row in (every, first, staged))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--task retrieval --limit 3", "--limit does not apply to the task retrieval"),
        ("--task retrieval --class-map model", "--class-map does not apply to the task retrieval"),
        ("--limit 3", "--limit does not apply to the task retrieval"),
        ("--task retrieval --split absent", "no split 'absent'"),
        ("--task retrieval --output nowhere/x.json", "The folder nowhere of the record does not exist"),
    ],
)
def test_what_does_not_fit_the_task_is_refused(run, faces: Path, model: str, arguments: str, says: str) -> None:
    done = run("eval", model, "--data", f"grid:{faces}:face", *arguments.split())
    assert (done.code, done.out) == (2, "")
    assert says in " ".join(done.err.split())


def test_a_classifier_cannot_retrieve(run, faces: Path) -> None:
    done = run("eval", "vit_micro", "--task", "retrieval", "--data", f"grid:{faces}:face")
    assert done.code == 2
    assert "does not compare texts with videos" in " ".join(done.err.split())


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight clips with captions, without splits."""
    from tests.videos import write_clip

    folder = tmp_path_factory.mktemp("videos") / "clips"
    folder.mkdir()
    for number in range(8):
        write_clip(folder / f"{number}.mp4", 3 + number % 2)
    rows = [f"{number}.mp4,clip number {number}" for number in range(8)]
    (folder / "captions.csv").write_text("\n".join(["video,caption", *rows]))
    return folder


def test_weights_and_a_folder_of_videos_are_enough(run, model: str, videos: Path) -> None:
    options = ("--model", model, "--pretrained", "--data", f"videos:{videos}", "--epochs", 1, "--device", "cpu",
               "--workers", 0, "--output", "out", "--no-report")  # fmt: skip
    printed = run("train", *options, "--print-recipe")
    assert (printed.code, printed.err) == (0, "")
    assert not Path("out").exists()
    Path("recipe.toml").write_text(printed.out)

    done = run("train", *options)
    assert done.code == 0, done.err
    assert "7 videos to train on, 1 to validate on (held out: 1 video, by seed 0)" in done.err
    recipe = json.loads(Path("out/recipe.json").read_text())
    assert recipe["task"] == "retrieval"
    assert (recipe["data"]["max_frames"], recipe["data"]["fps"]) == (3, 0)  # as the weights have it
    assert json.loads(json.dumps(load_recipe("recipe.toml").to_dict())) == recipe

    assert "t2v_R1 on validation" in done.out

    (held_out,) = json.loads(Path("out/held-out.json").read_text())
    scored = json.loads(run("eval", "local-dir:out", "--json").out)
    assert (scored["split"], scored["videos"], scored["texts"]) == ("validation", 1, 1)
    assert held_out in {f"{number}.mp4" for number in range(8)}
    assert json.loads(run("eval", "local-dir:out", "--split", "all", "--json").out)["videos"] == 8
    (videos / "captions.csv").write_text((videos / "captions.csv").read_text().replace(held_out, "x.mp4"))
    (videos / held_out).rename(videos / "x.mp4")
    refused = run("eval", "local-dir:out")
    assert refused.code == 2
    assert f"no longer has the video '{held_out}', which a run held out for validation" in refused.err


def test_a_recipe_trains_and_prints_both_ways(run, faces: Path, tmp_path: Path) -> None:
    table = retrieval_table(faces, tmp_path / "out")
    table["schedule"]["epochs"] = 1
    (tmp_path / "recipe.json").write_text(json.dumps(table))
    done = run("train", "recipe.json")
    assert done.code == 0, done.err
    assert re.search(r": \d+ videos to train on, \d+ to validate on, \d+ to test on\n", done.err)
    assert re.search(r"^epoch 1 of 1: training loss .*; val: t2v_R1 .*, v2t_R1 ", done.err, re.MULTILINE)
    assert done.out.count("text to video") == 2  # validation and test
    assert f"the model is {tmp_path / 'out' / 'model'}" in "".join(done.out.split("\n"))


def test_a_benchmark_scores_retrieval(run, faces: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()  # a job in this process, and not in one of its own, sets them
    monkeypatch.setitem(bench.bench.__kwdefaults__, "runner", lambda job, timeout=None: measured_row(job))
    try:
        done = run("bench", model, "--data", f"grid:{faces}:face", "--split", "test", "--max-batch", 1, "--repeats", 2,
                   "--out", "rows.csv")  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert done.code == 0, done.err
    (row,) = [row for row in read_rows(Path("rows.csv")) if row.model == model]
    assert (row.status, row.metric) == ("ok", "t2v_R1")
    assert row.value is not None and 0 <= row.value <= 100
    assert row.latency_ratio is not None and row.lam_gmacs
