"""Strict loading: what is adapted is listed, everything else is an error and leaves the model as it was."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lamzoo.errors import StateDictError, UnsafeWeightsError
from lamzoo.lam import LamConfig
from lamzoo.registry.external import timm_models
from lamzoo.registry.factory import create_model
from lamzoo.weights.loading import load_into, timm_converter

NAME = "timm/test_vit"
SIZE = {"img_size": 32}
POSITION = LamConfig(keys="position", rank=2)


def create(**kwargs: Any) -> nn.Module:
    return create_model(NAME, **{**SIZE, **kwargs})


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


@pytest.fixture
def plain() -> dict[str, Tensor]:
    return randomised(create()).state_dict()


@pytest.fixture
def masked() -> dict[str, Tensor]:
    return randomised(create(lam=LamConfig(rank=2))).state_dict()


def test_matching_weights_load_without_a_note(masked: dict[str, Tensor]) -> None:
    model = create(lam=LamConfig(rank=2))
    assert load_into(model, masked, source="file") == []
    assert all(torch.equal(value, masked[key]) for key, value in model.state_dict().items())


def test_a_plain_backbone_leaves_the_masks_fresh_and_says_so(
    plain: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model = create(lam=LamConfig(rank=2))
    with caplog.at_level(logging.INFO, "lamzoo"):
        (note,) = load_into(model, plain, source="file")
    assert "mask tensors stay fresh" in note
    assert note in caplog.text
    host = create()
    load_into(host, plain, source="file")
    x = torch.randn(1, 3, 32, 32)
    assert torch.allclose(model.eval()(x), host.eval()(x), atol=1e-5)


def test_a_renamed_backbone_key_is_an_error_that_names_both(plain: dict[str, Tensor]) -> None:
    plain["blocks.1.attn.qkvs.weight"] = plain.pop("blocks.1.attn.qkv.weight")
    model = create()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        StateDictError, match=r"missing keys blocks\.1\.attn\.qkv\.weight; unexpected keys .*qkvs\.weight"
    ):
        load_into(model, plain, source="file", given=["num_classes", "img_size", "in_chans", "global_pool"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_buffers_that_the_model_computes_may_be_in_the_file() -> None:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    plain = randomised(create_model("timm/beit_base_patch16_224", **size))
    saved = {f"blocks.{index}.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.long) for index in (0, 1)}
    model = create_model("timm/beit_base_patch16_224", lam=LamConfig(), **size)
    notes = load_into(model, plain.state_dict() | saved, source="file", arch="beit_base_patch16_224")
    assert any("relative_position_index" in note and "computes" in note for note in notes)
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model.eval()(x), plain.eval()(x), atol=1e-5)


@pytest.mark.parametrize("key", ["mask_token", "extra.weight", "pre_logits.fc.weight"])
def test_an_unexpected_key_is_an_error_even_where_timm_drops_it(plain: dict[str, Tensor], key: str) -> None:
    plain[key] = torch.zeros(1)
    with pytest.raises(StateDictError, match=key.split(".")[0]):
        load_into(create(), plain, source="file", arch="test_vit")


def test_a_missing_mask_key_among_others_is_an_error(masked: dict[str, Tensor]) -> None:
    del masked["blocks.0.attn.lam.network.query.0.weight"]
    with pytest.raises(StateDictError, match=r"missing keys blocks\.0\.attn\.lam\.network\.query\.0\.weight"):
        load_into(create(lam=LamConfig(rank=2)), masked, source="file")


def test_masks_of_another_shape_are_an_error_with_the_way_out(masked: dict[str, Tensor]) -> None:
    with pytest.raises(StateDictError, match=r"rank=2.*rank=3; pass lam=LamConfig\(rank=2\)"):
        load_into(create(lam=LamConfig(rank=3)), masked, source="file")
    with pytest.raises(StateDictError, match="omit lam="):
        load_into(create(lam=LamConfig(rank=3)), dict(masked), source="file")
    with pytest.raises(StateDictError, match="omit lam="):
        load_into(create(), masked, source="file")


def test_biases_of_older_additive_masks_are_left_out_and_listed(masked: dict[str, Tensor]) -> None:
    model = create(lam=LamConfig(rank=2))
    dead = {key.replace("weight", "bias"): value[:, 0] for key, value in masked.items() if ".key.0.weight" in key}
    assert dead
    (note,) = load_into(model, masked | dead, source="file")
    assert "key-side biases ignored" in note and "blocks.0.attn.lam.network.key.0.bias" in note
    assert all(torch.equal(value, masked[key]) for key, value in model.state_dict().items())


def test_masks_taken_out_by_the_caller_are_left_out(masked: dict[str, Tensor]) -> None:
    (note,) = load_into(create(), masked, source="file", given=["lam"])
    assert "ignored" in note


def test_a_new_head_needs_the_callers_num_classes(plain: dict[str, Tensor]) -> None:
    model = create(num_classes=7)
    fresh = model.head.weight.clone()
    with pytest.raises(StateDictError, match=r"head\.weight .*pass num_classes="):
        load_into(model, plain, source="file")
    notes = load_into(model, plain, source="file", given=["num_classes"])
    assert ["head.weight" in note and "fresh" in note for note in notes] == [True, False]
    assert torch.equal(model.head.weight, fresh)
    assert torch.equal(model.blocks[0].attn.qkv.weight, plain["blocks.0.attn.qkv.weight"])


POSITIONS = LamConfig(keys="position")
FEATURES = {"features": {"mouth": 12, "audio": 10}, "vocabulary": ["a", "b"]}


@pytest.mark.parametrize(
    ("name", "built", "asked", "advice"),
    [
        ("lam_clip4clip_micro", {}, {"max_frames": 5}, r"head\.embedding .*; max_frames= must be"),
        ("lam_clip4clip_micro", {"lam": POSITIONS}, {"max_frames": 5}, r"table\.weight' is for 37 .*; max_frames= "),
        ("lam_clip4clip_micro", {}, {"context_length": 9, "max_frames": 5}, "; context_length= and max_frames= must"),
        ("lam_qd_detr_micro", {}, {"video_dim": 9}, "; video_dim= must be"),
        ("lam_qd_detr_micro", {"lam": POSITIONS}, {"max_clips": 9}, r"table\.weight' is for .*; max_clips= "),
        ("lam_describer_micro", FEATURES, {"context_length": 9}, "; context_length= must be"),
        ("lam_describer_micro", FEATURES, {"width": 48, "heads": 4}, "; heads= and width= must be"),
        ("timm/test_vit", SIZE, {"mlp_ratio": 2.0}, "; mlp_ratio= must be"),
    ],
)
def test_a_shape_that_does_not_fit_names_the_argument_behind_it(
    name: str, built: dict[str, Any], asked: dict[str, Any], advice: str
) -> None:
    state = create_model(name, **built).state_dict()
    with pytest.raises(StateDictError, match=advice):
        load_into(create_model(name, **{**built, **asked}), state, source="file", given=asked)


def test_a_file_of_other_arguments_says_so_where_none_was_given(plain: dict[str, Tensor]) -> None:
    with pytest.raises(StateDictError, match="model with other arguments: pass those that it was trained with"):
        load_into(create(mlp_ratio=2.0), plain, source="file")


def test_a_backbone_without_head_gets_one_of_the_callers_num_classes(plain: dict[str, Tensor]) -> None:
    model = create(num_classes=7)
    fresh = model.head.weight.clone()
    backbone = {key: value for key, value in plain.items() if not key.startswith("head.")}
    with pytest.raises(StateDictError, match=r"missing keys head\.weight, head\.bias"):
        load_into(model, backbone, source="file")
    notes = load_into(model, backbone, source="file", given=["num_classes"])
    assert notes == ["head stays fresh: the file has no classifier"]
    assert torch.equal(model.head.weight, fresh)
    assert torch.equal(model.blocks[0].attn.qkv.weight, plain["blocks.0.attn.qkv.weight"])


def test_no_head_leaves_the_files_out(plain: dict[str, Tensor]) -> None:
    notes = load_into(create(num_classes=0), plain, source="file", given=["num_classes"])
    assert any("head.weight ignored" in note for note in notes)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_input_channels_are_adapted_as_timm_does(plain: dict[str, Tensor], in_chans: int) -> None:
    model = create(in_chans=in_chans)
    with pytest.raises(StateDictError, match="patch_embed"):
        load_into(model, plain, source="file")
    notes = load_into(model, plain, source="file", given=["in_chans"])
    expected = timm.models.adapt_input_conv(in_chans, plain["patch_embed.proj.weight"])
    assert torch.equal(model.patch_embed.proj.weight, expected)
    assert notes == [f"patch_embed.proj.weight adapted from 3 to {in_chans} input channels"]


def test_position_embeddings_are_resized_only_on_request(plain: dict[str, Tensor]) -> None:
    model = create(img_size=64)
    with pytest.raises(StateDictError, match=r"pos_embed.*pass img_size="):
        load_into(model, plain, source="file", arch="test_vit")
    (note,) = load_into(model, plain, source="file", arch="test_vit", given=["img_size"])
    assert note.startswith("pos_embed resized from")


def test_mask_tables_are_resized_as_the_model_would_itself() -> None:
    small = randomised(create(img_size=64, lam=POSITION))
    large = create(img_size=96, lam=POSITION)
    with pytest.raises(StateDictError, match="img_size"):
        load_into(large, small.state_dict(), source="file")
    notes = load_into(large, small.state_dict(), source="file", given=["img_size"])
    assert sum("table resized from" in note for note in notes) == len(large.blocks)
    table = small.blocks[0].attn.lam.network.table(large.pos_embed.shape[1], large.patch_embed.grid_size)
    assert torch.allclose(large.blocks[0].attn.lam.network.table(table.shape[2]), table)


def test_a_mask_table_of_an_unknown_grid_is_refused() -> None:
    oblong = randomised(create(img_size=(48, 64), lam=POSITION))
    square = create(img_size=96, lam=POSITION)
    weights = {key: value for key, value in oblong.state_dict().items() if key != "pos_embed"}
    with pytest.raises(StateDictError, match="patch grid is unknown: its patches form no square"):
        load_into(square, weights, source="file", given=["img_size"])


def test_another_pooling_brings_its_own_norm(plain: dict[str, Tensor]) -> None:
    model = create(global_pool="avg")
    with pytest.raises(StateDictError, match=r"fc_norm\.weight"):
        load_into(model, plain, source="file")
    notes = load_into(model, plain, source="file", given=["global_pool"])
    assert any("fc_norm.weight" in note for note in notes)


def test_an_external_format_goes_through_timms_converter() -> None:
    reference = randomised(timm.create_model("test_vit", img_size=32))
    external = {f"module.visual.trunk.{key}": value for key, value in reference.state_dict().items()}
    model = create()
    with pytest.raises(StateDictError, match="another format"):
        load_into(model, external, source="file", arch="test_vit")
    (note,) = load_into(model, external, source="file", arch="test_vit", external=True)
    assert "converter" in note
    assert torch.equal(model.head.weight, reference.head.weight)


def options_in_timm(arch: str) -> tuple[Any, dict[str, Any]]:
    """What timm itself converts the checkpoints of an architecture with, caught where it would load them."""
    with mock.patch.object(timm.models._builder, "load_pretrained") as loader, torch.device("meta"):
        timm.create_model(arch, pretrained=True)
    convert = loader.call_args.kwargs["filter_fn"]
    return getattr(convert, "func", convert), getattr(convert, "keywords", {})


def assert_converter_is_timms(arch: str) -> None:
    convert = timm_converter(arch)
    assert (getattr(convert, "func", convert), getattr(convert, "keywords", {})) == options_in_timm(arch), arch


@pytest.mark.parametrize(
    "arch",
    ["vit_tiny_patch16_224", "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224", "flexivit_small",
     "beit_base_patch16_224", "eva02_tiny_patch14_224"],
)  # fmt: skip
def test_timms_converter_comes_with_the_options_of_the_architecture(arch: str) -> None:
    assert_converter_is_timms(arch)


@pytest.mark.slow
def test_timms_converter_is_known_for_every_architecture_that_is_listed() -> None:
    for arch in timm_models():
        if timm.models.get_arch_pretrained_cfgs(arch):
            assert_converter_is_timms(arch)


def test_a_checkpoint_is_loaded_by_path(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    save_file(plain, tmp_path / "mine.safetensors")
    model = create(checkpoint_path=tmp_path / "mine.safetensors")
    assert torch.equal(model.head.weight, plain["head.weight"])
    torch.save(plain, tmp_path / "mine.pth")
    with pytest.raises(UnsafeWeightsError, match="allow_pickle"):
        create(checkpoint_path=tmp_path / "mine.pth")
    model = create(checkpoint_path=tmp_path / "mine.pth", allow_pickle=True)
    assert torch.equal(model.head.weight, plain["head.weight"])


def test_timms_own_loader_takes_a_renamed_key_where_ours_does_not(plain: dict[str, Tensor]) -> None:
    """The reason for a loader of our own: with another head, timm loads the whole file non-strictly."""
    plain["blocks.1.attn.qkvs.weight"] = plain.pop("blocks.1.attn.qkv.weight")
    cfg = {**create().pretrained_cfg, "state_dict": plain, "input_size": (3, 32, 32)}
    timm.create_model("test_vit", pretrained=True, pretrained_cfg=cfg, img_size=32, num_classes=7)
    with pytest.raises(StateDictError):
        load_into(create(num_classes=7), plain, source="file", arch="test_vit", given=["num_classes"])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_numbers_of_another_kind_than_the_models_are_refused(plain: dict[str, Tensor], dtype: torch.dtype) -> None:
    plain["head.weight"] = plain["head.weight"].to(dtype)
    with pytest.raises(StateDictError, match=rf"wrong types head\.weight \({dtype} in the file, torch.float32"):
        load_into(create(), plain, source="file")


def test_other_float_precisions_are_converted(plain: dict[str, Tensor]) -> None:
    model = create()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        load_into(model, {key: value.to(dtype) for key, value in plain.items()}, source="file")
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_named_in_a_warning(
    plain: dict[str, Tensor], caplog: pytest.LogCaptureFixture, value: float
) -> None:
    load_into(create(), plain, source="file")
    assert not caplog.text
    plain["head.bias"][3] = value
    load_into(create(), plain, source="file")
    assert "file has values that are not finite (head.bias)" in caplog.text
