import json
from pathlib import Path

import pytest

import lamzoo
from lamzoo.evaluation.captions import metrics as scores
from tests.speech import ALL, write_speech


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speech(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def model(data: Path) -> str:
    built = lamzoo.create_model(
        "lam_describer_micro", features={"audio": 128}, vocabulary=ALL, width=32, heads=2, hidden=64, encoder_layers=1,
        decoder_layers=1, context_length=5,
    )  # fmt: skip
    return f"local-dir:{lamzoo.save_pretrained(built, data / 'model')}"


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores.shutil, "which", lambda name: None)


@pytest.mark.usefixtures("no_java")
def test_a_model_and_its_captions_score_alike(run, data: Path, model: str) -> None:
    options = ("--task", "captions", "--data", f"grid:{data}:audio")
    done = run("eval", model, *options, "--submission", "test.json", "--output", "scores.json", "--beams", "2")
    assert done.code == 0, done.err
    assert all(name in done.out for name in ("8 clips", "CIDEr", "WER"))
    assert "METEOR is left out: METEOR runs Java" in " ".join(done.err.split())
    written = json.loads(Path("scores.json").read_text())
    entries = json.loads(Path("test.json").read_text())
    assert (written["clips"], written["beams"], len(entries)) == (8, 2, 8)
    assert list(entries[0]) == ["image_id", "caption"]
    again = json.loads(run("eval", "test.json", *options, "--json").out)
    assert again["metrics"] == written["metrics"]


@pytest.mark.usefixtures("no_java")
def test_true_captions_have_no_word_error(run, data: Path) -> None:
    lines = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    entries = [{"image_id": line["id"], "caption": line["text"]} for line in lines if line["split"] == "test"]
    Path("true.json").write_text(json.dumps(entries))
    done = run("eval", "true.json", "--task", "captions", "--data", f"grid:{data}:audio", "--json")
    metrics = json.loads(done.out)["metrics"]
    assert (metrics["WER"], metrics["sentence_accuracy"]) == (0, 100)
    assert metrics["CIDEr"] > 0


@pytest.mark.usefixtures("no_java")
def test_captions_of_a_film_are_looked_for_among_their_neighbours(run) -> None:
    folder = Path("film")
    folder.mkdir()
    (folder / "film.mp4").write_bytes(b"")  # captions are compared without it
    rows = [f"film,{start},{start + 2},the man number {start} walks" for start in range(0, 40, 2)]
    (folder / "captions.csv").write_text("\n".join(["video,start,end,caption", *rows]))
    own = [{"image_id": f"film.mp4[{s}-{s + 2}]", "caption": f"the man number {s} walks"} for s in range(0, 40, 2)]
    Path("own.json").write_text(json.dumps(own))
    Path("same.json").write_text(json.dumps([entry | {"caption": "the man walks"} for entry in own]))
    found = []
    for name in ("own.json", "same.json"):
        done = run("eval", name, "--task", "captions", "--data", f"videos:{folder}", "--json")
        assert done.code == 0, done.err
        found.append(json.loads(done.out)["metrics"]["R@5/16"])
    assert found == [100, 0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--limit 3", "--limit does not apply to the task captions"),
        ("--dual-softmax", "--dual-softmax does not apply to the task captions"),
        ("--split absent", "absent"),
        ("--submission nowhere/test.json", "The folder nowhere of the submission does not exist"),
        ("--beams 0", "'--beams'"),
    ],
)
def test_what_does_not_fit_the_task_is_refused(run, data: Path, model: str, arguments: str, says: str) -> None:
    done = run("eval", model, "--task", "captions", "--data", f"grid:{data}:audio", *arguments.split())
    assert (done.code, done.out) == (2, "")
    assert says in " ".join(done.err.split())
    assert not Path("nowhere").exists()


def test_beams_are_for_captions_and_classifiers_describe_nothing(run, data: Path, model: str) -> None:
    done = run("eval", "vit_micro", "--task", "captions", "--data", f"grid:{data}:audio")
    assert done.code == 2
    assert "does not generate captions; use a model of the family lam_describer" in " ".join(done.err.split())
    done = run("eval", "vit_micro", "--data", "npz:x", "--beams", "2")
    assert "--beams does not apply to the task classification" in " ".join(done.err.split())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "is not a list of captions"),
        ('[{"image_id": 1}]', "entry 0 of broken.json lacks an image_id or a caption"),
        ('[{"image_id": 1, "caption": "a"}]', "have no hypothesis"),
    ],
)
def test_malformed_captions_are_named(run, data: Path, text: str, says: str) -> None:
    Path("broken.json").write_text(text)
    done = run("eval", "broken.json", "--task", "captions", "--data", f"grid:{data}:audio")
    assert (done.code, done.out) == (2, "")
    assert says in " ".join(done.err.split())


def test_context_needs_a_model_with_room(run, data: Path, model: str) -> None:
    done = run("eval", model, "--task", "captions", "--data", f"grid:{data}:audio", "--context", "2")
    assert done.code == 2
    assert "context=2: the model does not support earlier captions" in " ".join(done.err.split())
