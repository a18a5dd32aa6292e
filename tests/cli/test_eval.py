import json
import pwd
from pathlib import Path

import pytest

from lamzoo.cli._options import load_model
from lamzoo.profiling import profile
from lamzoo.registry.factory import create_model
from lamzoo.registry.saving import save_pretrained
from tests.images import CLASSES, encoded, write_folder, write_npz

WNIDS = ["n01440764", "n01443537", "n01484850"]


@pytest.fixture(scope="module")
def of_colours(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "colours"
    names = ["violet", *CLASSES]
    save_pretrained(create_model("lam_vit_micro", num_classes=4), folder, label_names=names)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def of_imagenet(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "imagenet"
    save_pretrained(create_model("lam_vit_micro", num_classes=1000), folder)
    return f"local-dir:{folder}"


def write_validation(root: Path) -> Path:
    """``val/<wnid>/ILSVRC2012_val_*.JPEG`` of three classes, two images each."""
    for number in range(6):
        folder = root / "val" / WNIDS[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"ILSVRC2012_val_{number + 1:08}.JPEG").write_bytes(encoded(number % 3, number))
    return root / "val"


def test_a_broken_image_stops_or_is_skipped_and_counted(run, of_colours: str, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", splits=())
    (root / "red" / "1.jpg").write_text("nothing")
    common = ("eval", of_colours, "--data", root, "--class-map", "model")
    code, _, error = run(*common)
    assert code == 2
    assert "1.jpg: it is not an image" in error
    code, printed, error = run(*common, "--on-bad-input", "skip", "--json")
    assert code == 0
    assert "1.jpg" in error
    record = json.loads(printed)
    assert (record["samples"], record["skipped"]) == (8, 1)
    assert record["bad_images"][0]["filename"] == str(root / "red" / "1.jpg")
    code, printed, _ = run(*common, "--on-bad-input", "skip")
    assert "1 images could not be read and were left out" in printed


def test_a_model_is_scored_with_merged_tokens(run, of_colours: str, tmp_path: Path) -> None:
    data = ("--data", write_npz(tmp_path / "data"), "--class-map", "model")
    assert json.loads(run("eval", of_colours, *data, "--merge", "0.7", "--json").out)["merge"] == 0.7
    assert "merged to 70 % of its GMACs" in run("eval", of_colours, *data, "--merge", "0.7").out
    whole, merged = (profile(load_model(of_colours, None, merge=share)).gmacs for share in (None, 0.7))
    assert 0.65 * whole < merged <= 0.7 * whole


@pytest.mark.parametrize("home", ["/dev/null", None])
def test_a_user_without_a_cache_gets_the_score_and_a_warning(
    run, of_colours: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    data = write_npz(tmp_path / "data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a user without an entry
    else:
        monkeypatch.setenv("HOME", home)
    common = ("eval", of_colours, "--data", data, "--class-map", "model")
    code, printed, error = run(*common)
    assert (code, "top-1" in printed) == (0, True)
    assert "can't be resumed" in error
    code, _, error = run(*common, "--resume")
    assert code == 2
    assert ("set XDG_CACHE_HOME" if home is None else "choose another path") in error


def test_whole_data_have_no_line_about_what_was_left_out(run, of_colours: str, tmp_path: Path) -> None:
    data = write_npz(tmp_path / "data")
    code, printed, _ = run("eval", of_colours, "--data", data, "--class-map", "model")
    assert code == 0
    assert "left out" not in printed
    assert "ReaL" not in printed


def test_imagenets_validation_folder_is_scored_as_it_lies(run, of_imagenet: str, tmp_path: Path) -> None:
    val = write_validation(tmp_path)
    (tmp_path / "real.json").write_text(json.dumps([[0], [1, 2], [], [0], [389], [2]]))
    common = ("eval", of_imagenet, "--data", f"imagefolder:{val}", "--json")
    code, _, error = run(*common)
    assert code == 2
    assert "3 classes and the model 1000" in error
    assert "--class-map" in error
    code, printed, _ = run(*common, "--class-map", "imagenet-1k", "--real-labels", "real.json")
    assert code == 0
    record = json.loads(printed)
    assert (record["samples"], record["real_samples"], record["split"]) == (6, 5, None)
    code, printed, _ = run(*common[:-1], "--class-map", "imagenet-1k", "--real-labels", "timm")
    assert code == 0
    assert "ReaL top-1 (%)" in printed


def test_a_flat_validation_folder_scores_as_the_sorted_one(run, of_imagenet: str, tmp_path: Path) -> None:
    val = write_validation(tmp_path)
    (tmp_path / "flat").mkdir()
    rows = ["ImageId,PredictionString"]
    for path in sorted(val.rglob("*.JPEG")):
        (tmp_path / "flat" / path.name).write_bytes(path.read_bytes())
        rows.append(f"{path.stem},{path.parent.name} 1 2 3 4")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(rows))
    (tmp_path / "map.json").write_text(json.dumps({str(i): [wnid, wnid] for i, wnid in enumerate(WNIDS)}))
    scores = []
    for data in (f"imagefolder:{val}", "imagelist:flat:LOC_val_solution.csv"):
        code, printed, _ = run("eval", of_imagenet, "--data", data, "--class-map", "imagenet-1k", "--json")
        assert code == 0
        scores.append([json.loads(printed)[key] for key in ("top1", "top5", "samples")])
    assert scores[0] == scores[1]
    code, _, error = run("eval", of_imagenet, "--data", f"imagefolder:{val}", "--class-map", "map.json")
    assert code == 2
    assert "has 3 classes and the model 1000" in error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--class-map nowhere.txt", "nowhere.txt"),
        ("--class-map imagenet-1k", "'blue'"),
        ("--real-labels nowhere.json --class-map model", "nowhere.json"),
        ("--real-labels timm --class-map model", "up to 999"),
        ("--on-bad-input ignore", "ignore"),
        ("--task=", "--task is empty; give it a value"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    run, of_colours: str, tmp_path: Path, arguments: str, named: str
) -> None:
    write_npz(tmp_path / "data")
    code, printed, error = run("eval", of_colours, "--data", "data", *arguments.split())
    assert (code, printed) == (2, "")
    assert named in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
