"""Every command that takes a model understands every form of a name, and refuses the same ones in one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lamzoo.profiling.candidates import select_models
from lamzoo.registry.factory import create_model
from lamzoo.registry.saving import save_pretrained
from tests.images import write_folder
from tests.videos import write_clip

COMMANDS = {
    "predict": "predict {name} data/val",
    "eval": "eval {name} --data data --split val",
    "explain": "explain {name} data/val/red/0.jpg --out x.png",
    "export": "export {name} --out x.pt2",
    "download": "download {name}",
    "train": "train --model {name} --pretrained --data data --output run --no-scan",
    "describe": "describe clip.mp4 --model {name}",
    "find": "find query clip.mp4 --model {name}",
    "search": "search query --videos . --model {name}",
    "extract-features": "extract-features clip.mp4 --out features --model {name}",
}
# The weights of the saved model are damaged and the hub is unreachable: a command that has understood the name ends
# with an error about those weights, at once.
DAMAGED = r"runs/x/model/model\.safetensors has sha256"
UNDERSTOOD = {
    "lam_vit_base": r"timm/vit_base_patch16_224\.augreg2_in21k_ft_in1k/",
    "lam_vit_base.augreg_in1k": r"timm/vit_base_patch16_224\.augreg_in1k/",
    "timm/vit_tiny_patch16_224.augreg_in21k": r"timm/vit_tiny_patch16_224\.augreg_in21k/",
    "open_clip/ViT-B-32:openai": r"timm/vit_base_patch32_clip_224\.openai/",
    "hf-hub:nobody/nothing@v1": "nobody/nothing/config.json at revision v1",
    "local-dir:runs/x": DAMAGED,
    "runs/x": DAMAGED,
    "./runs/x/model": DAMAGED,
    "runs/x/model/model.safetensors": DAMAGED,
}
REFUSED = {
    "lam_vit_mikro": "did you mean lam_vit_micro",
    "ftp:x": "'ftp' is not a known prefix",
    "runs/y": r"no such folder; did you mean runs/x\?",
    "local-dir:runs/y": "no such folder",
    "x.safetensors": r"pass the file as checkpoint_path= \(--checkpoint\)",
    "x.onnx": "exported program",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    model = create_model("lam_vit_micro", num_classes=3, img_size=16, embed_dim=16, depth=1, num_heads=2)
    save_pretrained(model, folder / "runs" / "x" / "model")
    with (folder / "runs/x/model/model.safetensors").open("ab") as file:
        file.write(b"damage")
    write_folder(folder / "data", each=1)
    write_clip(folder / "clip.mp4", 3)
    (folder / "x.safetensors").touch()
    return folder


@pytest.fixture(autouse=True)
def _offline(place: Path, _own_place: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(place)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_and_refuse_the_same_names(command: str, run) -> None:
    for name, says in (UNDERSTOOD | REFUSED).items():
        if name.startswith("open_clip/") and command in ("eval", "train"):
            says = "'data' is not a data set of videos with captions"  # a folder of images is not for its task
        if name.startswith("open_clip/") and command == "explain":
            says = "which `lamzoo explain` can't draw"
        done = run(*COMMANDS[command].format(name=name).split())
        assert done.code == 2, (name, done)
        assert re.search(says, done.err), (name, done)
        assert done.err.count("lamzoo: ") == 1, (name, done)


@pytest.mark.parametrize("line", ["explain x.pt2 data/val/red/0.jpg --out x.png", "export x.pt2 --out y.pt2"])
def test_exported_programs_are_neither_explained_nor_exported_again(line: str, place: Path, run) -> None:
    (place / "x.pt2").touch()
    done = run(*line.split())
    assert done.code == 2
    assert "'x.pt2' is an exported program, which can only be run" in done.err


def test_only_a_program_is_trusted(run) -> None:
    done = run("predict", "lam_vit_micro", "data/val/red/0.jpg", "--trust")
    assert (done.code, "--trust applies to exported programs" in done.err) == (2, True), done


def test_models_without_image_classes_are_refused_by_commands_for_images(run) -> None:
    done = run(*["explain", "lam_clip4clip_micro", "data/val/red/0.jpg", "--out", "x.png"])
    assert (done.code, "which `lamzoo explain` can't draw" in done.err) == (2, True), done
    done = run(*["predict", "lam_clip4clip_micro", "data/val/red/0.jpg"])
    assert (done.code, "choose an image classifier" in done.err) == (2, True), done


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_bench_takes_every_name(name: str) -> None:
    if name.startswith("hf-hub:"):
        pytest.skip("needs the hub")
    (candidate, *_) = select_models([name], weights=True, plain=True)
    assert candidate.img_size == ("16" if "runs/x" in name else "224")


@pytest.mark.parametrize(("name", "says"), REFUSED.items())
def test_bench_refuses_the_same_names(name: str, says: str, run) -> None:
    done = run("bench", name, "--out", "bench.csv")
    assert done.code == 2
    assert re.search(says, done.err)


@pytest.mark.parametrize("name", ["lam_vit_base.augreg_in1k", "timm/test_vit.r160_in1k", "local-dir:runs/x", "runs/x"])
def test_info_takes_every_name(name: str, run) -> None:
    facts = json.loads(run("info", name, "--json").out)
    assert facts["parameters"] > 0
    assert facts["input_size"][0] == 3


@pytest.mark.parametrize(("name", "says"), REFUSED.items())
def test_info_refuses_the_same_names(name: str, says: str, run) -> None:
    done = run("info", name)
    assert done.code == 2
    assert re.search(says, done.err)


def test_the_index_of_sharded_weights_is_not_a_file_of_predictions(run, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors.index.json"
    path.write_text("{}")
    done = run("eval", path, "--data", "data")
    assert (done.code, "checkpoint" in done.err, "predictions" in done.err) == (2, True, False), done.err
