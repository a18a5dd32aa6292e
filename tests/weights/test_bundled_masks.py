"""The masks that come with lamzoo: whole, with their card, small, and loadable into their base."""

from __future__ import annotations

import pytest

import lamzoo
from lamzoo.registry.cards import data_dir
from lamzoo.weights import file_sha256
from lamzoo.weights.mask_folder import ADAPTERS, MASKS_NAME, bundled_masks, find_mask_folder, read_mask_folder
from lamzoo.weights.sources import way_out


def test_one_set_is_bundled() -> None:
    assert "vit_small_patch14_dinov2.clothing10" in bundled_masks()


@pytest.mark.parametrize("name", bundled_masks())
def test_a_damaged_file_of_theirs_is_replaced_by_installing_again(name: str) -> None:
    assert "install lamzoo again" in way_out(find_mask_folder(name) / MASKS_NAME)


@pytest.mark.parametrize("name", bundled_masks())
def test_bundled_masks_have_a_card_their_hash_and_a_base(name: str) -> None:
    folder = find_mask_folder(name)
    assert folder == data_dir("weights") / ADAPTERS / name
    masks, file = read_mask_folder(folder), folder / MASKS_NAME
    assert file_sha256(file) == masks.lamzoo.sha256
    assert file.stat().st_size < 2e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith(f"# {name}\n")
    assert f"`{masks.config}`" in card
    assert masks.base_model.name is not None
    assert masks.label_names is not None
    model = lamzoo.create_model(masks.base_model.name, num_classes=len(masks.label_names), img_size=112)
    lamzoo.load_lam(model, name)  # random weights, which is a warning
    assert model.lam_config == masks.config
    assert tuple(model.pretrained_cfg["label_names"]) == masks.label_names
