"""Masks of layers that attend within windows: of each window's own tokens, and of places in a window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lamzoo.adapters import add_lam, capture_masks
from lamzoo.errors import ConfigError
from lamzoo.lam import Lam, LamConfig
from tests.adapters.timm_hosts import HOSTS

SWIN, SAM = HOSTS["swin_tiny_patch4_window7_224"], HOSTS["samvit_base_patch16"]


def test_a_windows_mask_reads_the_tokens_of_that_window_alone() -> None:
    model, x = add_lam(SWIN.create().eval(), LamConfig(init="paper")), SWIN.images(1)
    other = x.clone()
    other[..., 16:, 16:] = 0.0  # 8 x 8 patches of 2 pixels in each of 4 x 4 windows of the first block: the last 4
    masks = []
    for images in (x, other):
        with torch.no_grad(), capture_masks(model) as captured:
            model(images)
        masks.append(captured["layers.0.blocks.0.attn"].mask)
    changed = [not torch.equal(*factors) for factors in zip(masks[0].left, masks[1].left, strict=True)]
    assert changed == [row >= 2 and column >= 2 for row in range(4) for column in range(4)]
    assert masks[0].right.shape == (16, 2, 16, 9)


def test_shifted_windows_hide_from_each_other_what_they_hid_before() -> None:
    model, x = add_lam(SWIN.create().eval(), LamConfig(init="paper", keys="position")), SWIN.images()
    with torch.no_grad(), capture_masks(model) as masks:
        model(x)
    hidden = model.layers[0].blocks[1].attn_mask < 0
    assert hidden.any()
    attention = masks["layers.0.blocks.1.attn"].attention.unflatten(0, (2, -1)).transpose(1, 2)  # (B, H, W, N, N)
    assert attention[:, :, hidden].max() < 1e-30


def rows_of_a_table(model: nn.Module) -> None:
    """Gives every place in a window of 4 x 4, or of 3 x 3, the number of its row."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Lam):
                table = module.network.table
                rows, columns = table.grid
                table.bias.copy_(torch.arange(rows).repeat_interleave(columns))


def test_the_table_follows_the_window_that_timm_resizes() -> None:
    model = add_lam(SWIN.create().eval(), LamConfig(keys="position"))
    rows_of_a_table(model)
    model.set_input_size(img_size=(64, 32))
    assert model.layers[0].blocks[0].attn.window_size == (8, 4)
    with torch.no_grad(), capture_masks(model) as masks:
        model(torch.randn(1, 3, 64, 32))
    window = masks["layers.0.blocks.0.attn"].importance[0, 0].view(8, 4)
    assert (window.diff(dim=0) > 0).all()
    assert_close(window, window[:, :1].expand(8, 4))


def test_sams_tables_are_over_the_window_or_over_the_patches_of_any_image() -> None:
    model = add_lam(SAM.create().eval(), LamConfig(keys="position"))
    rows_of_a_table(model)
    with torch.no_grad(), capture_masks(model) as masks:
        model(torch.randn(1, 3, 32, 16))
    within, among = (masks[f"blocks.{index}.attn"].importance[0, 0] for index in range(2))
    assert_close(within, torch.arange(3.0).repeat_interleave(3))
    assert (among.view(8, 4)[:, 0].diff() > 0).all()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "its windows shift"),
        ("swinv2_tiny_window8_256", "its windows shift"),
        ("samvit_base_patch16", "some layers attend within windows"),
        ("maxvit_tiny_tf_224", "blocks and grids alternate"),
        ("coatnet_rmlp_nano_rw_224", "differ in their number of heads"),
    ],
)
def test_layers_with_other_tokens_share_no_mask(name: str, reason: str) -> None:
    model = HOSTS[name].create()
    with pytest.raises(ConfigError, match=rf"can't share a mask.*{reason}.*layers='multi'"):
        add_lam(model, LamConfig(layers="single"))
    assert not hasattr(model, "lam_config")


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("swinv2_tiny_window8_256", {}),
        ("swinv2_cr_tiny_224", {}),
        ("coatnet_0_224", {}),
        ("samvit_base_patch16", {"use_rope": True, "use_rel_pos": False}),
        ("samvit_base_patch16", {"use_rel_pos": True, "qk_norm": True}),
        ("maxvit_tiny_tf_224", {"transformer_use_nchw_attn": True}),
        ("maxvit_tiny_tf_224", {"transformer_head_first": True}),
    ],
)
def test_variants_keep_outputs_with_tables_over_places(name: str, kwargs: dict[str, Any]) -> None:
    host = HOSTS[name]
    plain, x = host.create(**kwargs).eval(), host.images()
    expected = plain(x)
    assert_close(add_lam(plain, LamConfig(keys="position"))(x), expected, rtol=1e-5, atol=1e-5)


def test_a_feature_map_of_any_size_takes_content_keys_alone() -> None:
    model = HOSTS["coatnet_0_224"].create(transformer_rel_pos_type="").eval()
    with pytest.raises(ConfigError, match=r"no fixed size; use keys='content'"):
        add_lam(model, LamConfig(keys="position"))
    x = torch.randn(1, 3, 48, 32)
    expected = model(x)
    assert_close(add_lam(model)(x), expected, rtol=1e-5, atol=1e-5)
