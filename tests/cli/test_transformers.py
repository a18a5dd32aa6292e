"""Image models of Hugging Face transformers on the command line, from a hub of this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

transformers = pytest.importorskip("transformers", reason="the extra transformers")

import lamzoo  # noqa: E402
from lamzoo.errors import ConfigError, StateDictError, UnsupportedHostError  # noqa: E402
from lamzoo.lam import Lam, LamConfig  # noqa: E402
from lamzoo.models.transformers_images import TransformersImages, as_image_model  # noqa: E402
from lamzoo.profiling.inputs import image_size  # noqa: E402
from lamzoo.registry.factory import create_for_images  # noqa: E402
from lamzoo.registry.huggingface import _preprocessing  # noqa: E402
from lamzoo.training import parse_recipe, train  # noqa: E402
from tests.adapters.transformers_hosts import HOSTS  # noqa: E402
from tests.images import CLASSES, write_folder  # noqa: E402
from tests.training.processes import train_in_two  # noqa: E402
from tests.weights.hub_server import HubServer  # noqa: E402

NAME = "hf/me/vit"
_SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
_PROCESSOR = {"size": {"height": 32, "width": 32}, "resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2] * 3}

_DINO = {
    "image_processor_type": "BitImageProcessor",
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
    "size": {"shortest_edge": 40},
}


def _model() -> Any:
    torch.manual_seed(0)
    names = dict(enumerate(CLASSES))
    config = transformers.ViTConfig(**_SMALL, image_size=32, patch_size=8, id2label=names)
    return transformers.ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of an image classifier, one with masks, a backbone and a text model."""
    folder = tmp_path_factory.mktemp("hub")
    model = _model()
    model.save_pretrained(folder / "vit")
    model.vit.save_pretrained(folder / "backbone")
    lamzoo.add_lam(model, LamConfig(rank=3, op="add")).save_pretrained(folder / "masked")
    text = {**_SMALL, "vocab_size": 40}
    transformers.BertModel(transformers.BertConfig(**text)).save_pretrained(folder / "bert")
    dino = transformers.Dinov2Config(**_SMALL, image_size=56, patch_size=8, num_labels=3)
    transformers.Dinov2ForImageClassification(dino).save_pretrained(folder / "dino")
    (folder / "dino" / "preprocessor_config.json").write_text(json.dumps(_DINO))
    for name in ("vit", "backbone", "masked"):
        (folder / name / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR))
    return {f"me/{each.name}": {path.name: path.read_bytes() for path in each.iterdir()} for each in folder.iterdir()}


@pytest.fixture(autouse=True)
def _hub(
    repos: dict[str, dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A hub with those models, and an empty cache."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub-cache")))
    with HubServer(repos) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield


def test_info_and_eval_read_the_preprocessing_and_classes_of_the_repository(run: Any, tmp_path: Path) -> None:
    done = run("info", NAME, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert (facts["family"], facts["task"], facts["classes"]) == ("transformers", "classification", 3)
    assert (facts["label names"], facts["input_size"]) == (CLASSES, [3, 32, 32])
    assert (facts["mean"], facts["interpolation"], facts["crop_pct"]) == ([0.4, 0.5, 0.6], "bicubic", 1.0)
    model: Any = create_for_images(NAME, pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), _model()(x).logits)
    assert facts["parameters"] == sum(each.numel() for each in model.parameters())
    assert facts["gmacs"] == round(lamzoo.profile(model).gmacs, 4)
    folder = write_folder(tmp_path / "photos", splits=("val",), each=2)
    done = run("eval", NAME, "--data", folder, "--split", "val", "--device", "cpu", "--workers", 0, "--merge", 0.8)
    assert done.code == 0, done.err
    assert "6 images" in done.out + done.err


def test_other_models_are_refused_in_one_sentence(run: Any) -> None:
    done = run("info", "hf/me/bert")
    assert done.code != 0
    assert "hf/me/bert is a BertModel, and lamzoo's commands take image classifiers" in " ".join(done.err.split())


@pytest.mark.parametrize(("name", "given"), [(NAME, {}), ("hf/me/masked", {"num_classes": 5})])
def test_only_heads_of_other_classes_stay_fresh(name: str, given: dict[str, int]) -> None:
    model: Any = create_for_images(name, pretrained=True, num_classes=5).eval()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    positions = "vit.embeddings.position_embeddings"
    assert torch.equal(model.host.get_parameter(positions), _model().get_parameter(positions))
    refused = (
        r"position_embeddings has the shape \(1, 17, 16\) .* image_size=64; leave .* another image size as img_size="
    )
    with pytest.raises(StateDictError, match=refused):
        create_for_images(name, pretrained=True, image_size=64, **given)


def test_saved_models_come_back_with_masks_and_merging(tmp_path: Path) -> None:
    model: Any = create_for_images("hf/me/masked", pretrained=True).eval()
    assert model.lam_config == LamConfig(rank=3, op="add")
    lamzoo.merge_tokens(model, keep=0.5)
    x = torch.randn(2, 3, 32, 32)
    lamzoo.save_pretrained(model, tmp_path / "saved")
    loaded: Any = lamzoo.create_model(tmp_path / "saved", pretrained=True).eval()
    assert type(loaded) is TransformersImages
    assert loaded.token_reduction == model.token_reduction
    assert torch.equal(loaded(x), model(x))
    other: Any = lamzoo.create_model(tmp_path / "saved", pretrained=True, num_classes=5, lam=False)
    assert other(x).shape == (2, 5)
    assert not any(isinstance(module, Lam) for module in other.modules())


@pytest.mark.slow
def test_classifiers_are_fine_tuned_scored_and_explained(run: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", splits=("train", "val"), each=4)
    options = ("--data", folder, "--epochs", 1, "--device", "cpu", "--workers", 0)
    for tune, size in (("all", 32), ("lam", 48)):
        done = run(
            "train", "--model", "hf/me/masked", "--pretrained", "--img-size", size, "--tune", tune, "--output", tune,
            *options,
        )  # fmt: skip
        assert done.code == 0, done.err
    assert image_size(lamzoo.create_model("lam", pretrained=True)) == (3, 48, 48)
    assert run("eval", "lam", "--data", folder, "--split", "val", "--device", "cpu", "--workers", 0).code == 0
    assert run("eval", "all", "--data", folder, "--split", "val", "--device", "cpu", "--workers", 0).code == 0
    photo = next((folder / "val").rglob("*.*"))
    assert run("explain", "all", photo, "--out", "masks.png").code == 0


@pytest.mark.slow
def test_two_processes_train_a_model_with_parameters_that_get_no_gradient(tmp_path: Path) -> None:
    model: Any = create_for_images("hf/me/dino", pretrained=True, num_classes=3, img_size=32)
    lamzoo.save_pretrained(model, tmp_path / "dino")  # whose mask_token is for pretraining
    photos = write_folder(tmp_path / "photos", splits=("train", "val"), each=4)
    table = {
        "model": {"name": f"local-dir:{tmp_path / 'dino'}", "pretrained": True},
        "data": {"source": str(photos), "eval_split": "val"},
        "schedule": {"epochs": 1, "warmup_epochs": 0},
        "run": {"batch_size": 4, "report": False},
    }
    rows = train_in_two(table, tmp_path / "two")
    recipe = {**table, "run": {**table["run"], "output": str(tmp_path / "alone"), "device": "cpu"}}
    (record,) = train(parse_recipe(recipe)).history
    assert float(rows[0]["eval_loss"]) == pytest.approx(record["eval_loss"], rel=1e-4)


@pytest.mark.slow
def test_bench_measures_models_by_name(run: Any) -> None:
    done = run("bench", NAME, "hf/me/masked", "--out", "rows.csv", "--repeats", 2, "--device", "cpu")
    assert done.code == 0, done.err
    assert NAME in Path("rows.csv").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_models_of_transformers_are_exported_fused_and_merged(tmp_path: Path, suffix: str) -> None:
    model = lamzoo.add_lam(_model(), LamConfig(rank=3, op="add", init="paper"))
    lamzoo.merge_tokens(lamzoo.fuse(model), keep=0.5)
    lamzoo.export_model(model, tmp_path / f"model.{suffix}")
    facts = lamzoo.load_exported(tmp_path / f"model.{suffix}", trust=True).facts
    assert facts["token_reduction"] == model.token_reduction.to_dict()
    with pytest.raises(ConfigError, match=r"The model is a BertModel, .* called with images alone"):
        lamzoo.export_model(HOSTS["bert"].create(), tmp_path / "bert.pt2")


def test_fused_layers_are_exported_in_their_fused_form() -> None:
    model = lamzoo.fuse(lamzoo.add_lam(_model(), LamConfig(rank=3, op="add"))).requires_grad_(False)
    program = torch.export.export(as_image_model(model), (torch.randn(2, 3, 32, 32),))
    linear = [node for node in program.graph.nodes if "linear" in str(node.target)]
    assert len(linear) == 3 * 4 + 1  # one for queries, keys and values


@pytest.mark.parametrize(
    "bias",
    [pytest.param("use_relative_position_bias", marks=pytest.mark.slow), "use_shared_relative_position_bias"],
)
def test_exported_models_keep_their_biases_of_positions(bias: str) -> None:
    torch.manual_seed(0)
    config = transformers.BeitConfig(**_SMALL, image_size=32, patch_size=8, num_labels=3, **{bias: True})
    host = transformers.BeitForImageClassification(config).eval()
    for name, parameter in host.named_parameters():
        if "bias_table" in name:
            torch.nn.init.normal_(parameter, std=3)
        elif "lambda" in name:
            parameter.data.fill_(1)
    model, x = as_image_model(lamzoo.add_lam(host)), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_wrapping_leaves_the_model_its_attention_masks() -> None:
    class Padded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.host = _model().vit

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
            return self.host(x, attention_mask=mask).last_hidden_state

    model = Padded().eval()
    x, mask = torch.randn(1, 3, 32, 32), torch.arange(17)[None] < 5
    torch.export.export(as_image_model(model.host), (x,))
    program = torch.export.export(model, (x, mask)).module()
    torch.testing.assert_close(program(x, mask), model(x, mask))
    assert (model(x, mask) - model(x, mask | True)).abs().max() > 1e-3


def test_a_model_is_read_from_and_to_the_given_cache(tmp_path: Path) -> None:
    create_for_images(NAME, pretrained=True, cache_dir=tmp_path)
    assert not list(Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("*.json"))
    assert list(tmp_path.rglob("preprocessor_config.json"))


def test_images_have_the_size_that_the_model_was_built_with() -> None:
    assert image_size(create_for_images(NAME, img_size=64)) == (3, 64, 64)
    assert image_size(timm.create_model("levit_128s", img_size=64)) == (3, 64, 64)


def test_eager_attention_has_no_fused_form() -> None:
    model = lamzoo.add_lam(_model(), LamConfig(rank=3, op="add"))
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedHostError, match="eager attention returns its weights"):
        lamzoo.fuse(model)


def test_masks_removed_from_a_wrapped_model_are_not_saved() -> None:
    model = lamzoo.add_lam(_model(), LamConfig())
    lamzoo.remove_lam(as_image_model(model))
    assert not hasattr(model.config, "lam_config")


def test_positions_of_a_part_of_the_tokens_are_refused() -> None:
    config = transformers.VideoMAEConfig(**_SMALL, image_size=16, patch_size=8, num_frames=4)
    model = lamzoo.add_lam(transformers.VideoMAEModel(config).eval(), LamConfig(keys="position"))
    videos, left_out = torch.randn(1, 4, 3, 16, 16), torch.arange(8)[None] < 4
    assert model(videos).last_hidden_state.shape == (1, 8, 16)
    with pytest.raises(UnsupportedHostError, match="a part of its tokens, as in VideoMAE's pretraining"):
        model(videos, bool_masked_pos=left_out)


@pytest.mark.parametrize("name", ["convit_tiny", "tnt_s_patch16_224"])
def test_parts_of_hosts_with_fixed_lengths_are_masked(name: str) -> None:
    part = torch.nn.Sequential(timm.create_model(name, depth=1).blocks)
    assert lamzoo.add_lam(part, LamConfig()).lam_config == LamConfig()
    with pytest.raises(ConfigError, match="keys='position'"):
        lamzoo.add_lam(torch.nn.Sequential(timm.create_model(name, depth=1).blocks), LamConfig(keys="position"))


_CLASSES = {"num_labels": 3, "image_size": 32}
_STAGES = {"num_labels": 3, "hidden_sizes": [8] * 4, "depths": [1] * 4}


@pytest.mark.parametrize(
    ("name", "config", "heads"),
    [
        ("DeiTForImageClassificationWithTeacher", transformers.DeiTConfig(**_SMALL, **_CLASSES, patch_size=8), 2),
        ("ConvNextForImageClassification", transformers.ConvNextConfig(**_STAGES), 1),
        ("ResNetForImageClassification", transformers.ResNetConfig(**_STAGES, embedding_size=8), 1),
    ],
)  # fmt: skip
def test_heads_of_classifiers_are_known(name: str, config: Any, heads: int) -> None:
    model: Any = as_image_model(getattr(transformers, name)(config).eval())
    x = torch.randn(2, 3, 32, 32)
    assert (model.num_classes, len(model.classifier_names), model(x).shape) == (3, heads, (2, 3))
    assert model.num_features == (16 if heads == 2 else 8)
    model.reset_classifier(5)
    assert (model.num_classes, model(x).shape) == (5, (2, 5))
    model.reset_classifier(0)
    assert (model.num_classes, model(x).shape) == (0, (2, model.num_features))
    model.reset_classifier(4)
    assert (model.num_classes, model(x).shape) == (4, (2, 4))


def test_a_model_is_built_without_its_classifier() -> None:
    model: Any = create_for_images(NAME, num_classes=0)
    assert (model.num_classes, model(torch.randn(2, 3, 32, 32)).shape) == (0, (2, 16))


def test_models_that_interpolate_positions_have_the_size_of_their_preprocessing(tmp_path: Path) -> None:
    model: Any = create_for_images("hf/me/dino", pretrained=True).eval()
    assert (model.pretrained_cfg["input_size"], model.pretrained_cfg["crop_pct"]) == ((3, 32, 32), 0.8)
    assert image_size(model) == (3, 32, 32)
    assert model.host.config.image_size == 56
    lamzoo.save_pretrained(model, tmp_path / "saved")
    loaded, x = lamzoo.create_model(tmp_path / "saved", pretrained=True).eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    assert image_size(loaded) == (3, 32, 32)
    assert image_size(create_for_images("hf/me/dino", pretrained=True, img_size=48)) == (3, 48, 48)


_NORMALISED = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}


@pytest.mark.parametrize(
    ("name", "fields", "size", "pct"),
    [
        ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}, 32, 1.0),
        ("ViTImageProcessor", {"size": 32}, 32, 1.0),
        ("BitImageProcessor", _DINO, 32, 0.8),
        ("CLIPImageProcessor", {"size": 38, "crop_size": 32, "do_center_crop": True}, 32, 32 / 38),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 32}, "crop_pct": 0.8}, 32, 0.8),
        ("ViTImageProcessor", {"size": {"longest_edge": 32}}, None, None),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "do_center_crop": False}, None, None),
        ("MobileViTImageProcessor", {"size": 40, "crop_size": 32, "do_flip_channel_order": True}, None, None),
    ],
)  # fmt: skip
def test_preprocessing_is_that_of_transformers_or_refused(name: str, fields: Any, size: Any, pct: Any) -> None:
    processor = getattr(transformers, name).from_dict({**_NORMALISED, **fields})
    if size is None:
        with pytest.raises(ConfigError, match="with settings that timm's preprocessing has not"):
            _preprocessing("hf/me/model", processor, 3)
        return
    cfg = _preprocessing("hf/me/model", processor, 3)
    assert (cfg["input_size"], cfg["crop_pct"]) == ((3, size, size), pytest.approx(pct))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((128, 64))
    theirs = processor(photo, return_tensors="pt")["pixel_values"][0]
    ours: Any = timm.data.create_transform(**cfg)
    torch.testing.assert_close(ours(photo), theirs, atol=0.05, rtol=0)
