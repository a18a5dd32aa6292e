import os
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from lamzoo.adapters import add_lam
from lamzoo.adapters.capture import capture_masks
from lamzoo.errors import ConfigError, DataError, MissingExtraError, UnsupportedHostError
from lamzoo.lam import LamConfig
from lamzoo.reduction import merge_tokens, prune_tokens
from lamzoo.report import explain
from lamzoo.report.mask_figure import LayerPicture, draw
from lamzoo.report.model_view import view


def _pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"), dtype=np.float32)


def _expected(model, photo, head=None):
    """The masks of all layers, dense, ``(Hm, Nq, Nk)``, one or all heads."""
    with torch.no_grad(), capture_masks(model.eval()) as records:
        model(view(model, photo).images)
    dense = [record.mask.dense()[0] for record in records.values()]
    return [mask if head is None else mask[head : head + 1] for mask in dense]


def test_picture_is_a_png_with_something_on_it(build, photo, tmp_path):
    explain(build(), photo, tmp_path / "masks.png")
    pixels = _pixels(tmp_path / "masks.png")
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 600
    coloured = np.abs(pixels[..., 0] - pixels[..., 2]) > 30
    assert coloured.mean() > 0.05
    assert os.listdir(tmp_path) == ["masks.png"]


def test_picture_changes_with_the_mask_alone(build, photo, tmp_path):
    model = build(LamConfig(layers="single"))
    for name in ("a", "b"):
        explain(model, photo, tmp_path / f"{name}.png", rows=[(1, 2)])
    torch.nn.init.normal_(model.blocks[0].attn.lam.network.key[-1].weight)
    explain(model, photo, tmp_path / "c.png", rows=[(1, 2)])
    a, b, c = (_pixels(tmp_path / f"{name}.png") for name in "abc")
    assert np.array_equal(a, b)
    assert (np.abs(a - c).max(axis=2) > 30).mean() > 0.02


@pytest.mark.parametrize(
    ("lam", "kwargs", "head"),
    [
        (LamConfig(init="paper"), {}, None),
        (LamConfig(init="paper", heads="per-head", op="add", keys="position"), {"img_size": (32, 64)}, None),
        (LamConfig(init="paper", heads="per-head"), {"img_size": (64, 32), "reg_tokens": 3}, 1),
        (LamConfig(init="paper", layers="single"), {"class_token": False, "global_pool": "avg"}, None),
    ],
)
def test_what_is_drawn_is_the_mask_between_patches(lam, kwargs, head, build, photo, drawn, tmp_path):
    model = build(lam, **kwargs)
    explain(model, photo, tmp_path / "masks.png", rows=[(0, 1), (5, 6)], head=head)
    grid, prefix = model.patch_embed.grid_size, model.num_prefix_tokens
    expected = _expected(model, photo, head)
    assert len(drawn.layers) == (1 if lam.layers == "single" else 2)
    assert drawn.neutral == (0.0 if lam.op == "add" else 1.0)
    for layer, mask in zip(drawn.layers, expected, strict=lam.layers == "multi"):
        mask = mask.mean(dim=0)[:, prefix:].unflatten(1, grid)
        for row, (y, x) in zip(layer.rows, [(0, 1), (5, 6)], strict=True):
            np.testing.assert_allclose(row, mask[prefix + y * grid[1] + x], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.importance, mask.mean(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", ["multi", "single"])
def test_patches_of_merged_tokens_are_drawn_with_the_values_of_these(layers, build, photo, drawn, tmp_path):
    model = merge_tokens(build(LamConfig(init="paper", layers=layers), depth=3), keep=0.4)
    explain(model, photo, tmp_path / "masks.png", rows=[(0, 1), (5, 6)])
    with torch.no_grad(), capture_masks(model.eval()) as records:
        model.forward_features(view(model, photo).images)
    assert len(drawn.layers) == (1 if layers == "single" else 3)
    for layer, record in zip(drawn.layers, records.values(), strict=layers == "multi"):
        mask, prefix = record.mask.dense()[0].mean(dim=0), model.num_prefix_tokens
        for (y, x), row in zip([(0, 1), (5, 6)], layer.rows, strict=True):
            query = record.query_places[0, prefix + 8 * y + x]
            for patch in range(64):
                key = patch + prefix if record.key_places is None else record.key_places[0, prefix + patch]
                np.testing.assert_allclose(row[patch // 8, patch % 8], mask[query, key], rtol=1e-4, atol=1e-5)


def test_pruned_models_are_refused(build, photo, tmp_path):
    with pytest.raises(UnsupportedHostError, match=r"aren't a patch grid; explain draws .* whose tokens aren't pruned"):
        explain(prune_tokens(build(), 0.5, (0,)), photo, tmp_path / "masks.png")


@pytest.mark.parametrize(
    ("loaded", "name"),
    [(None, "micro"), ("micro.random", "micro.random"), ("/a.safetensors", "micro (/a.safetensors)")],
)
def test_title_names_model_loaded_weights_and_prediction(loaded, name, build, photo, drawn, tmp_path):
    photo.save(tmp_path / "photo.png")
    model = build()
    model.weights_source = loaded
    explain(model, tmp_path / "photo.png", tmp_path / "masks.png", rows=[(0, 0)])
    best = model.eval()(view(model, photo).images).argmax().item()
    assert drawn.title.startswith(f"{name} on photo.png: {model.pretrained_cfg['label_names'][best]} ")
    assert [layer.name for layer in drawn.layers] == ["blocks.0", "blocks.1"]


def test_timm_model_without_head_is_drawn(photo, drawn, tmp_path):
    model = add_lam(timm.create_model("test_vit2", num_classes=0, img_size=32), LamConfig(init="paper"))
    explain(model, photo, tmp_path / "masks.png", rows=[(0, 0)])
    assert drawn.title.startswith("test_vit2")
    assert "%" not in drawn.title


def test_colours_are_centred_at_neutral_and_stay_pale_near_it():
    image = np.zeros((8, 8, 3), dtype=np.float32)
    for value, half in ((1.001, 0.05), (3.0, 2.0)):
        values = np.full((2, 2), value, dtype=np.float32)
        figure = draw([LayerPicture("one", values, ((0, 0),), values[None])], image, image, neutral=1.0, title="")
        scaled = [shown for axis in figure.axes for shown in axis.images if shown.get_array().ndim == 2]
        assert len(scaled) == 2
        for shown in scaled:
            assert shown.get_clim() == pytest.approx((1 - half, 1 + half))


def test_model_and_pyplot_are_left_alone(build, photo, tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    model = build().train()
    model.norm.eval()
    explain(model, photo, tmp_path / "masks.png", rows=[(0, 0)])
    assert ("matplotlib.pyplot" in sys.modules) == before
    assert model.training
    assert not model.norm.training
    assert all(block.attn.lam.recorder is None for block in model.blocks)


def test_model_without_masks_is_refused(build, photo, tmp_path):
    with pytest.raises(UnsupportedHostError, match="add_lam"):
        explain(build(lam=None), photo, tmp_path / "masks.png")


def test_unreadable_image_is_named(build, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    for name in ("broken.jpg", "missing.jpg"):
        with pytest.raises(DataError, match=name):
            explain(build(), tmp_path / name, tmp_path / "masks.png")
    assert not (tmp_path / "masks.png").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("masks.pdf", r"\.png"), ("absent/masks.png", "absent of the picture does not exist"), ("dir.png", "dir.png")],
)
def test_impossible_target_is_refused_before_the_model_runs(name, reason, build, photo, tmp_path):
    (tmp_path / "dir.png").mkdir()
    model = build()
    model.forward = None
    with pytest.raises(DataError, match=reason):
        explain(model, photo, tmp_path / name)


def test_failed_write_keeps_the_old_picture_and_leaves_nothing(build, photo, tmp_path, monkeypatch):
    (tmp_path / "masks.png").write_bytes(b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lamzoo.files.os.fsync", full)
    with pytest.raises(DataError, match=r"masks\.png cannot be written \(.*No space left"):
        explain(build(), photo, tmp_path / "masks.png", rows=[(0, 0)])
    assert os.listdir(tmp_path) == ["masks.png"]
    assert (tmp_path / "masks.png").read_bytes() == b"old"


def test_patch_or_head_that_does_not_exist_is_named(build, photo, tmp_path):
    with pytest.raises(ConfigError, match=r"\(8, 0\) is outside .* 8 rows and 8 columns"):
        explain(build(), photo, tmp_path / "masks.png", rows=[(8, 0)])
    with pytest.raises(ConfigError, match="no head 1"):
        explain(build(), photo, tmp_path / "masks.png", head=1)


def test_missing_matplotlib_names_the_extra(build, photo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"lamzoo\[report\]"):
        explain(build(), photo, tmp_path / "masks.png")


def test_masks_of_grey_models_are_drawn(build, photo, drawn, tmp_path):
    explain(build(in_chans=1), photo, tmp_path / "masks.png")
    assert len(drawn.layers) == 2
    assert (tmp_path / "masks.png").is_file()


def test_models_of_five_channels_are_refused(build, photo, tmp_path):
    with pytest.raises(UnsupportedHostError, match="5 channels"):
        explain(build(in_chans=5), photo, tmp_path / "masks.png")
