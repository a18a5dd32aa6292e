"""The micro builder's relative position bias, the ablation's control."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import lamzoo
from lamzoo.errors import ConfigError, UnsupportedHostError

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def biased() -> torch.nn.Module:
    torch.manual_seed(0)
    return lamzoo.create_model("vit_micro", rel_pos_bias=True, **SMALL).eval()


@torch.no_grad()
def test_the_bias_shifts_the_scores_and_zero_leaves_them(biased: torch.nn.Module) -> None:
    plain = lamzoo.create_model("vit_micro", **SMALL).eval()
    plain.load_state_dict(biased.state_dict(), strict=False)
    images = torch.rand(2, 3, 32, 32)
    assert not torch.equal(biased(images), plain(images))
    for block in biased.blocks:
        block.attn.rel_pos.relative_position_bias_table.zero_()
    torch.testing.assert_close(biased(images), plain(images))


def test_the_bias_adds_one_table_a_layer_and_is_trained(biased: torch.nn.Module) -> None:
    names = [name for name, _ in biased.named_parameters() if "rel_pos" in name]
    assert names == [f"blocks.{index}.attn.rel_pos.relative_position_bias_table" for index in range(2)]
    biased(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(biased.get_parameter(name).grad.any() for name in names)


@torch.no_grad()
def test_a_copy_uses_its_own_bias(biased: torch.nn.Module) -> None:
    images = torch.rand(1, 3, 32, 32)
    before = biased(images)
    other = copy.deepcopy(biased)
    for block in other.blocks:
        block.attn.rel_pos.relative_position_bias_table.fill_(3.0).mul_(torch.arange(225)[:, None] % 5)
    assert not torch.equal(other(images), before)
    assert torch.equal(biased(images), before)


def test_a_bias_beside_masks_is_refused() -> None:
    with pytest.raises(ConfigError, match="rel_pos_bias is a control without masks"):
        lamzoo.create_model("lam_vit_micro", rel_pos_bias=True)


@pytest.mark.parametrize("encoding", ["rotary", "conv"])
def test_positions_of_another_encoding_go_with_masks(encoding: str) -> None:
    images = torch.rand(2, 3, 32, 32)
    torch.manual_seed(0)
    model = lamzoo.create_model("vit_micro", position_encoding=encoding, **SMALL).eval()
    plain = lamzoo.create_model("vit_micro", **SMALL).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    masked = lamzoo.create_model("lam_vit_micro", position_encoding=encoding, **SMALL).eval()
    masked.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        expected = model(images)
        assert not torch.allclose(plain(images), expected)
        torch.testing.assert_close(masked(images), expected)
        assert torch.equal(copy.deepcopy(model)(images), expected)


def test_masks_are_in_the_given_blocks() -> None:
    lam = lamzoo.LamConfig(keys="position", rank=2)
    model = lamzoo.create_model("lam_vit_micro", lam=lam, lam_blocks=[1], **SMALL).eval()
    assert {name.split(".")[1] for name, _ in model.named_parameters() if ".lam." in name} == {"1"}
    for parameter in lamzoo.lam_parameters(model):
        torch.nn.init.normal_(parameter)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        masked = model(images)
        assert not torch.allclose(lamzoo.remove_lam(copy.deepcopy(model))(images), masked)


def test_masks_of_some_blocks_are_saved_with_the_model_alone(tmp_path: Path) -> None:
    lam = lamzoo.LamConfig(keys="position", rank=2)
    model = lamzoo.create_model("lam_vit_micro", lam=lam, lam_blocks=[1], **SMALL).eval()
    images = torch.rand(2, 3, 32, 32)
    folder = lamzoo.save_pretrained(model, tmp_path / "whole")
    with torch.no_grad():
        again = lamzoo.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(again(images), model(images))
        plain = lamzoo.create_model(f"local-dir:{folder}", pretrained=True, lam=False).eval()
        torch.testing.assert_close(plain(images), model(images))  # identity masks
    for refused in (lambda: lamzoo.save_lam(model, tmp_path / "masks"), lambda: lamzoo.set_lam(model, None)):
        with pytest.raises(
            UnsupportedHostError, match=r"Only the blocks \(1,\) .* whole model with lamzoo.save_pretrained"
        ):
            refused()
    lamzoo.save_lam(lamzoo.add_lam(lamzoo.remove_lam(model), lam), tmp_path / "masks")  # of all blocks


def test_a_convolution_of_patches_needs_all_of_them() -> None:
    model = lamzoo.create_model("vit_micro", position_encoding="conv", **SMALL).eval()
    lamzoo.merge_tokens(model, keep=0.5)
    with pytest.raises(ConfigError, match="needs all patches; leave tokens unmerged and unpruned"):
        model(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"position_encoding": "sine"}, "position_encoding is 'sine'; it must be one of 'rotary', 'conv', or None"),
        ({"position_encoding": "conv", "class_token": True}, "position_encoding is for patches alone"),
        ({"lam_blocks": [7]}, r"lam_blocks is \(7,\); it must name some of the blocks 0 to 1"),
        ({"lam_blocks": [0], "lam": lamzoo.LamConfig(layers="single")}, "layers='multi'"),
    ],
)
def test_a_wrong_place_or_encoding_is_named(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        lamzoo.create_model("lam_vit_micro", **{**SMALL, **arguments})
