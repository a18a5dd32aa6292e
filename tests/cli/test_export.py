"""The command that exports models."""

import json
from pathlib import Path
from typing import Any

import pytest
import skimage.data
from PIL import Image

import lamzoo
from lamzoo.errors import ExportError
from tests.images import CLASSES


@pytest.mark.slow
def test_command(tmp_path: Path, run: Any) -> None:
    model = lamzoo.create_model("lam_vit_micro", num_classes=3, depth=3, embed_dim=32, num_heads=2)
    lamzoo.save_pretrained(model, tmp_path / "micro", label_names=CLASSES)
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "photograph.png")
    name, file = f"local-dir:{tmp_path / 'micro'}", tmp_path / "micro.onnx"
    line = ("export", name, "--out", file, "--images", tmp_path / "photograph.png", "--repeats", "2")
    done = run(*line, "--keep", "0.6", "--at", "0,1", "--score", "redundancy", "--rest", "nearest", "--json")
    facts = json.loads(done.out)
    assert (facts["format"], facts["images"], facts["samples"]) == ("onnx", "given", 1)
    assert facts["gmacs"] < lamzoo.profile(model).gmacs
    assert lamzoo.load_exported(file).facts["prune_config"]["at"] == [0, 1]
    assert "opset 20" in run(*line).out
    guesses = [
        json.loads(run("predict", which, tmp_path / "photograph.png", "--json").out)[0]["predictions"]
        for which in (name, file)
    ]
    assert [guess["label"] for guess in guesses[0]] == [guess["label"] for guess in guesses[1]]


def test_fuse(tmp_path: Path, run: Any) -> None:
    model = lamzoo.create_model("lam_vit_tiny", depth=1, img_size=32, embed_dim=32, num_heads=2, num_classes=3)
    lamzoo.save_pretrained(model, tmp_path / "tiny", label_names=CLASSES)
    done = run("export", tmp_path / "tiny", "--out", tmp_path / "tiny.pt2", "--fuse", "--repeats", "2", "--json")
    assert json.loads(done.out)["gmacs"] > lamzoo.profile(model).gmacs  # the columns of the values
    assert lamzoo.load_exported(tmp_path / "tiny.pt2").facts["fused"]


@pytest.mark.parametrize(("options", "expected"), [((), False), (("--int8",), True)])
def test_int8_reaches_the_export(
    options: tuple[str, ...], expected: bool, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def export_model(*args: Any, int8: bool, **kwargs: Any) -> None:
        found.append(int8)
        raise ExportError("recorded")

    monkeypatch.setattr("lamzoo.export.export_model", export_model)
    assert run("export", "lam_vit_micro.cifar10", "--out", "x.onnx", *options).err == "lamzoo: recorded\n"
    assert found == [expected]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--at", "1"), "which --keep or --target-gmacs enables"),
        (("--keep", "0.5", "--at", "one"), "comma-separated list"),
        (("--keep", "1.5"), "keep=1.5"),
        (("--merge", "1.5"), "--merge is 1.5; it must be above 0 and at most 1"),
        (("--merge", "0"), "--merge is 0; it must be above 0"),
        (("--merge", "0.5", "--target-gmacs", "0.1"), "--merge and --target-gmacs, a setting of pruning, exclude"),
        (("--merge", "0.5", "--keep", "0.5", "--at", "1"), "--merge and --keep, a setting of pruning, exclude"),
        (("--merge", "0.5", "--at", "1"), "--merge and --at, a setting of pruning, exclude each other; leave one out"),
        (("--merge", "0.5", "--rest", "merge"), "--merge and --rest, a setting of pruning, exclude each other"),
        (("--score", "attention"), "--score is a setting of pruning, which --keep or --target-gmacs enables"),
        (("--keep", "0.5", "--target-gmacs", "0.1"), "--keep and --target-gmacs exclude each other; leave one out"),
        (("--merge", "0.01"), "Tokens can't be merged to 1 % of 0.07573 GMACs"),
        (("--images", "nowhere.jpg"), "nowhere.jpg"),
        (("--format", "torch"), "must end in .pt2"),
    ],
)
def test_wrong_arguments_of_the_command(arguments: tuple[str, ...], says: str, tmp_path: Path, run: Any) -> None:
    done = run("export", "lam_vit_micro.cifar10", "--out", tmp_path / "model.onnx", *arguments)
    assert done.code == 2
    assert says in done.err
    assert list(tmp_path.glob("*")) == []


def test_multiplicative_masks_have_no_fused_form(tmp_path: Path, run: Any) -> None:
    done = run("export", "lam_vit_micro.cifar10_mul", "--out", tmp_path / "model.onnx", "--fuse")
    assert done.code == 2
    assert "has a fused form: of blocks.0.attn, its mask has op='mul'" in done.err
    assert list(tmp_path.glob("*")) == []
