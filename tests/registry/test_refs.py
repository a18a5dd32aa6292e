"""Model names: every form is parsed in one place, and what cannot be a model is refused in one sentence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lamzoo.errors import UnknownModelError
from lamzoo.registry.catalog import get_pretrained_cfg, list_tags, model_info, model_ref
from lamzoo.registry.factory import create_model
from lamzoo.registry.refs import ModelRef, display_name
from lamzoo.registry.saving import save_pretrained


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved model in ``mine``, one of a run in ``runs/x``, and files beside them."""
    for folder in ("mine", "runs/x/model", "lam_vit_micro"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").touch()
    for file in ("other.safetensors", "notes.txt"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lam_vit_micro", {"kind": "registered", "arch": "lam_vit_micro"}),
        ("lam_vit_micro.cifar10", {"kind": "registered", "arch": "lam_vit_micro", "tag": "cifar10"}),
        ("no_such_name", {"kind": "registered", "arch": "no_such_name"}),
        ("timm/vit_a", {"kind": "timm", "arch": "timm/vit_a"}),
        ("timm/vit_a.b", {"kind": "timm", "arch": "timm/vit_a", "tag": "b"}),
        ("open_clip/ViT-B-32", {"kind": "open_clip", "arch": "open_clip/ViT-B-32"}),
        ("open_clip/ViT-B-32:openai", {"kind": "open_clip", "arch": "open_clip/ViT-B-32", "tag": "openai"}),
        ("open_clip/ViT-B-32.openai", {"kind": "open_clip", "arch": "open_clip/ViT-B-32", "tag": "openai"}),
        ("hf/me/mine", {"kind": "hf", "repo": "me/mine"}),
        ("hf/me/mine@v1", {"kind": "hf", "repo": "me/mine", "revision": "v1"}),
        ("hf-hub:me/mine", {"kind": "hf-hub", "repo": "me/mine"}),
        ("hf-hub:me/mine@v1", {"kind": "hf-hub", "repo": "me/mine", "revision": "v1"}),
        ("local-dir:mine", {"kind": "local-dir", "path": Path("mine")}),
        ("local-dir:runs/x", {"kind": "local-dir", "path": Path("runs/x/model")}),
        ("local-dir:nowhere", {"kind": "local-dir", "path": Path("nowhere")}),
        ("mine", {"kind": "local-dir", "path": Path("mine")}),
        ("./mine", {"kind": "local-dir", "path": Path("mine")}),
        ("./lam_vit_micro", {"kind": "local-dir", "path": Path("lam_vit_micro")}),
        ("runs/x", {"kind": "local-dir", "path": Path("runs/x/model")}),
        ("runs/x/", {"kind": "local-dir", "path": Path("runs/x/model")}),
        ("runs/x/model", {"kind": "local-dir", "path": Path("runs/x/model")}),
        ("runs/x/model/model.safetensors", {"kind": "local-dir", "path": Path("runs/x/model")}),
        ("runs/x/model.safetensors", {"kind": "checkpoint", "path": Path("runs/x/model.safetensors")}),
        ("runs/x/model/other.safetensors", {"kind": "checkpoint", "path": Path("runs/x/model/other.safetensors")}),
        ("other.safetensors", {"kind": "checkpoint", "path": Path("other.safetensors")}),
        ("out/program.onnx", {"kind": "program", "path": Path("out/program.onnx")}),
        ("moments.jsonl", {"kind": "predictions", "path": Path("moments.jsonl")}),
        ("program.pt2", {"kind": "program", "path": Path("program.pt2")}),
    ],
)
def test_every_form_is_parsed(name: str, expected: dict[str, Any]) -> None:
    assert model_ref(name) == dataclasses.replace(ModelRef(name, expected["kind"]), **expected)
    assert model_ref(Path(name)).kind == model_ref(str(Path(name))).kind


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_ref("~/mine").path == model_ref("local-dir:~/mine").path == tmp_path / "mine"


@pytest.mark.parametrize(
    "name",
    [
        "lam_vit_micro.cifar10",
        "timm/vit_a.b",
        "hf/me/mine@v1",
        "hf-hub:me/mine@v1",
        "local-dir:runs/x",
        "runs/x",
        "mine",
    ],
)
def test_the_canonical_name_is_parsed_to_the_same_model(name: str) -> None:
    ref = model_ref(name)
    assert dataclasses.replace(model_ref(ref.name), text=name) == ref
    assert model_ref(ref.name).name == ref.name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "lamzoo.list_models"),
        ("hf_hub:me/mine", "did you mean hf-hub:me/mine?"),
        ("ftp:somewhere", "'ftp' is not a known prefix"),
        ("local-dir:", "nothing follows the prefix"),
        ("timm/", "There is no model 'timm/'"),
        ("runs/y", "no such folder; did you mean runs/x?"),
        ("tim/vit_tiny_patch16_224", "did you mean timm/vit_tiny_patch16_224?"),
        ("me/mine", "a hub repository is written hf-hub:OWNER/NAME"),
        ("./notes.txt", "neither weights nor a program"),
        (
            "other.safetensors",
            "does not state its architecture; name the architecture and pass",
        ),
        ("nothing.safetensors", "no such file"),
        ("program.onnx", "lamzoo.load_exported"),
        ("a" * 300, "lamzoo.list_models"),
        ("./" + "a" * 300, "no such folder"),
        ("captions.json", "files of predictions are for `lamzoo eval` only"),
        ("open_clip/ViT-B-23:openai", "did you mean open_clip/ViT-B-"),
        ("open_clip/ViT-B-32:opnai", "did you mean open_clip/ViT-B-32:openai?"),
    ],
)
def test_what_is_no_model_is_refused_in_one_sentence(name: str, says: str) -> None:
    if name.startswith("open_clip/"):
        pytest.importorskip("open_clip")
    with pytest.raises(UnknownModelError) as caught:
        create_model(name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("local-dir:a/b", "b"),
        ("local-dir:mine", "mine"),
        ("local-dir:runs/mine/model", "mine"),
        ("local-dir:model", "model"),
        ("timm/vit.tag", "timm/vit.tag"),
    ],
)
def test_plots_name_a_saved_model_by_its_folder(name: str, short: str) -> None:
    assert display_name(name) == short


def test_a_saved_model_is_known_by_its_folder(tmp_path: Path) -> None:
    saved = create_model("vit_micro", lam={"rank": 2}, num_classes=3, embed_dim=32, depth=1)
    save_pretrained(saved, tmp_path / "runs" / "x" / "model")
    info = model_info("runs/x")
    assert (info.name, info.family, info.lam, info.params) == ("vit_micro", "lam_vit", saved.lam_config, None)
    assert list_tags("runs/x") == []
    assert get_pretrained_cfg("runs/x").num_classes == info.pretrained_cfg["num_classes"] == 3
    loaded = create_model(Path("runs/x"), pretrained=True)
    assert (loaded.head.weight == saved.head.weight).all()
