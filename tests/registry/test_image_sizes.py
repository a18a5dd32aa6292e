"""What img_size= promises of the vision models of transformers, on a hub of this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

transformers = pytest.importorskip("transformers", reason="the extra transformers")

import lamzoo  # noqa: E402
from lamzoo.errors import ConfigError, StateDictError  # noqa: E402
from lamzoo.lam import LamConfig  # noqa: E402
from lamzoo.profiling.inputs import image_size  # noqa: E402
from lamzoo.registry.factory import create_for_images, create_model  # noqa: E402
from tests.weights.hub_server import HubServer  # noqa: E402

_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_IMAGE = _SMALL | {"image_size": 32, "patch_size": 8}
_TEXT = _SMALL | {"vocab_size": 40}
_PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}  # fmt: skip
_CONFIGS: dict[str, Any] = {
    "ViTForImageClassification": lambda: transformers.ViTConfig(**_IMAGE, num_labels=3),
    "CLIPModel": lambda: transformers.CLIPConfig(text_config=_TEXT, vision_config=_IMAGE, projection_dim=8),
    "CLIPForImageClassification": lambda: transformers.CLIPConfig(vision_config=_IMAGE, num_labels=3),
    "SiglipVisionModel": lambda: transformers.SiglipVisionConfig(**_IMAGE),
    "SiglipForImageClassification": lambda: transformers.SiglipConfig(vision_config=_IMAGE, num_labels=3),
    "Dinov2Model": lambda: transformers.Dinov2Config(**_IMAGE),
    "BeitModel": lambda: transformers.BeitConfig(**_IMAGE, use_relative_position_bias=True),
}
SIZED = list(_CONFIGS)[:-1]
POSITIONS = LamConfig(rank=2, init="paper", keys="position")


def _built(name: str) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, name)(_CONFIGS[name]()).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "position_embedding" in key:
                parameter.normal_()
    return model


def _built_at(name: str, size: int) -> Any:
    config = _CONFIGS[name]()
    config.image_size = size
    return getattr(transformers, name)(config)


@pytest.fixture(scope="module")
def _files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("hub")
    for name in _CONFIGS:
        _built(name).save_pretrained(folder / name)
    lamzoo.add_lam(_built("ViTForImageClassification"), POSITIONS).save_pretrained(folder / "masked")
    for each in folder.iterdir():
        (each / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR))
    return {f"me/{each.name}": {path.name: path.read_bytes() for path in each.iterdir()} for each in folder.iterdir()}


@pytest.fixture(autouse=True)
def _hub(_files: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    with HubServer(_files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield


def _output(model: Any, x: Tensor, **kwargs: Any) -> Tensor:
    vision = model.vision_model if hasattr(model, "get_image_features") else model
    found = vision(pixel_values=x, **kwargs)
    return found["logits" if "logits" in found else "last_hidden_state"]


@pytest.mark.parametrize(("name", "size"), [(name, 24 if index % 2 else 48) for index, name in enumerate(SIZED)])
def test_positions_are_interpolated_as_by_the_model_itself(name: str, size: int) -> None:
    model: Any = create_model(f"hf/me/{name}", pretrained=True, img_size=size).eval()
    x = torch.randn(2, 3, size, size)
    asked = {} if name == "Dinov2Model" else {"interpolate_pos_encoding": True}
    assert_close(_output(model, x), _output(_built(name), x, **asked), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipVisionModel"])
def test_another_size_is_saved_and_comes_back(name: str, tmp_path: Path) -> None:
    model: Any = create_model(f"hf/me/{name}", pretrained=True, img_size=48).eval()
    lamzoo.add_lam(model, LamConfig(rank=2, init="paper"))
    model.save_pretrained(tmp_path)
    loaded, x = lamzoo.from_pretrained(tmp_path), torch.randn(2, 3, 48, 48)
    assert getattr(loaded.config, "vision_config", loaded.config).image_size == 48
    assert torch.equal(_output(loaded, x), _output(model, x))


@pytest.mark.parametrize("name", ["masked", "SiglipForImageClassification"])
def test_commands_take_a_saved_model_at_its_own_size_and_at_another(name: str, tmp_path: Path) -> None:
    model: Any = create_for_images(f"hf/me/{name}", pretrained=True, img_size=48).eval()
    assert image_size(model) == (3, 48, 48)
    if name != "masked":
        lamzoo.add_lam(model, POSITIONS)
    lamzoo.save_pretrained(model, tmp_path / "saved")
    loaded, x = create_model(tmp_path / "saved", pretrained=True).eval(), torch.randn(2, 3, 48, 48)
    assert torch.equal(loaded(x), model(x))
    other: Any = create_model(tmp_path / "saved", pretrained=True, img_size=64).eval()
    assert other(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    assert image_size(other) == (3, 64, 64)


def test_tables_of_saved_masks_are_resized_with_the_image() -> None:
    small, large = (create_model("hf/me/masked", pretrained=True, **given) for given in ({}, {"img_size": 64}))
    resized = lamzoo.add_lam(_built_at("ViTForImageClassification", 64), POSITIONS)
    lamzoo.load_lam_state_dict(resized, lamzoo.lam_state_dict(small))
    found, expected = (lamzoo.lam_state_dict(model) for model in (large, resized))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert {value.shape[1] for key, value in found.items() if key.endswith("table.weight")} == {65}


@pytest.mark.parametrize(
    ("name", "size", "error", "message"),
    [
        ("BeitModel", 48, StateDictError, r"relative_position_bias_table has the shape .* leave img_size out"),
        ("CLIPModel", (32, 48), ConfigError, r"img_size=\(32, 48\): CLIP takes square images"),
        ("ViTForImageClassification", 4, ConfigError, r"has patches of \(8, 8\) pixels"),
        ("ViTForImageClassification", "48", ConfigError, r"img_size='48' \(img_size must be an integer\)"),
    ],
)
def test_sizes_that_a_model_cannot_have_are_refused(name: str, size: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        create_model(f"hf/me/{name}", pretrained=True, img_size=size)


def test_images_need_not_be_square() -> None:
    model: Any = create_model("hf/me/ViTForImageClassification", pretrained=True, img_size=(48, 32)).eval()
    x = torch.randn(2, 3, 48, 32)
    expected = _built("ViTForImageClassification")(x, interpolate_pos_encoding=True).logits
    assert_close(model(x).logits, expected, atol=1e-5, rtol=1e-5)
