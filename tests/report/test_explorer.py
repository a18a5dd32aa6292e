"""The explorer page has the numbers of ``capture_masks``, stays small, and shows text as text."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lamzoo
from lamzoo.adapters import capture_masks, remove_lam
from lamzoo.adapters.state import masks_of
from lamzoo.errors import ConfigError, DataError, UnsupportedHostError
from lamzoo.lam import LamConfig
from lamzoo.reduction import merge_tokens, prune_tokens
from lamzoo.report import explore_image
from lamzoo.report.explorer.document import best_answers, quantise
from lamzoo.report.explorer.runs import neutral_masks
from lamzoo.report.mask_pictures import run_all_queries
from lamzoo.report.model_view import view
from tests.report.explorer_data import PageLayer, read_page

PER_HEAD = LamConfig(init="paper", op="mul", heads="per-head", keys="position", rank=3)
ADDED = LamConfig(init="paper", op="add", heads="per-head")


def sharpened(model: Any) -> Any:
    """Gives a model attention that is far from uniform."""
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 30
    return model


def captured(model: Any, photo: Image.Image) -> dict[str, Any]:
    with torch.no_grad(), capture_masks(model.eval()) as masks:
        run_all_queries(model, view(model, photo).images)
    return dict(masks)


def test_answers_are_the_most_probable_with_masks_or_without() -> None:
    masked, plain = torch.zeros(9), torch.zeros(9)
    masked[[2, 3]], plain[[7, 4]] = torch.tensor([5.0, 4.0]), torch.tensor([6.0, 5.0])
    labels = [f"class {number}" for number in range(9)]
    assert {answer.label for answer in best_answers(labels, masked, plain)} >= {f"class {n}" for n in (2, 3, 4, 7)}
    answers = best_answers(labels, masked, plain, also=8)
    assert [answer.label for answer in answers] == ["class 2", "class 3", "class 7", "class 4", "class 8"]
    for answer in answers:
        index = labels.index(answer.label)
        assert answer.shares == pytest.approx((float(masked.softmax(0)[index]), float(plain.softmax(0)[index])))


@pytest.mark.parametrize(
    ("lam", "kwargs", "reduce"),
    [
        (LamConfig(init="paper", op="mul", heads="shared"), {}, None),
        (PER_HEAD, {"img_size": (32, 64), "reg_tokens": 2}, None),
        (LamConfig(init="paper", layers="single"), {"class_token": False, "global_pool": "avg"}, None),
        (PER_HEAD, {"depth": 3}, lambda model: merge_tokens(model, keep=0.4)),
        (ADDED, {"depth": 3}, lambda model: merge_tokens(model, keep=0.4)),
        (ADDED, {"depth": 3}, lambda model: prune_tokens(model, 0.5, (0, 1))),
    ],
    ids=["shared", "positions", "single", "merged", "merged, added", "pruned"],
)
def test_page_has_the_numbers_of_capture_masks(lam, kwargs, reduce, build, photo, tmp_path):
    model = sharpened(build(lam, **kwargs))
    if reduce is not None:
        reduce(model)
    explore_image(model, photo, tmp_path / "page.html")
    page = read_page((tmp_path / "page.html").read_text())
    records = captured(model, photo)
    assert [f"{layer['name']}.attn" for layer in page["layers"]] == list(records)
    for index, record in enumerate(records.values()):
        layer, mask = PageLayer(page, index), record.mask.dense()[0].numpy()
        np.testing.assert_allclose(layer.mask, mask, atol=2e-4 * np.abs(mask).max())
        assert record.attention.max() > 0.2
        np.testing.assert_allclose(layer.masked, record.attention[0], atol=1e-3)
        np.testing.assert_allclose(layer.plain, record.scores.attention()[0], atol=1e-3)
        for name, places in (("keyPlaces", record.key_places), ("queryPlaces", record.query_places)):
            assert layer.data[name] == (None if places is None else places[0].tolist())


def test_neutral_masks_still_decide_which_tokens_leave(build, photo):
    model = sharpened(prune_tokens(build(ADDED, depth=3), 0.5, (0,)))
    hooks = [lam.attention_hook for lam in masks_of(model).values()]
    with_masks = captured(model, photo)
    with neutral_masks(model):
        without = captured(model, photo)
    for path in ("blocks.1.attn", "blocks.2.attn"):
        torch.testing.assert_close(without[path].key_places, with_masks[path].key_places)
        torch.testing.assert_close(without[path].attention, without[path].scores.attention())
        assert not torch.allclose(with_masks[path].attention, with_masks[path].scores.attention(), atol=1e-2)
    assert [lam.attention_hook for lam in masks_of(model).values()] == hooks


def test_attention_without_the_mask_is_that_of_the_plain_model_in_its_first_layer(build, photo):
    model = sharpened(build(PER_HEAD))
    (record, *_) = captured(model, photo).values()
    assert not torch.allclose(record.scores.attention(), record.attention, atol=1e-2)
    plain = lamzoo.add_lam(remove_lam(model), LamConfig())
    torch.testing.assert_close(record.scores.attention(), next(iter(captured(plain, photo).values())).attention)


def test_page_predicts_with_masks_and_without(build, photo, tmp_path):
    model = build(PER_HEAD)
    explore_image(model, photo, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    shown = re.findall(r'<tr><th>(\w+)</th><td class="number">([\d.]+)%.*?<td class="number">([\d.]+)%', html)
    images = view(model, photo).images
    with torch.no_grad():
        masked, plain = ((each(images)[0].softmax(0) * 100).tolist() for each in (model.eval(), remove_lam(model)))
    assert len(shown) == 5
    for name, *percentages in shown:
        index = model.pretrained_cfg["label_names"].index(name)
        np.testing.assert_allclose([float(each) for each in percentages], [masked[index], plain[index]], atol=0.051)


def test_fused_model_is_shown_as_it_is_without_the_fused_form(build, photo, tmp_path):
    model = build(LamConfig(init="paper", op="add")).eval()
    texts = []
    for name in ("a", "b"):
        explore_image(model, photo, tmp_path / f"{name}.html")
        texts.append((tmp_path / f"{name}.html").read_text())
        lamzoo.fuse(model)
    assert texts[0] == texts[1]


def test_names_are_text_and_nothing_of_them_is_run(build, photo, tmp_path):
    model = build()
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    model.pretrained_cfg |= {"architecture": evil, "label_names": [evil] * 10}
    explore_image(model, photo, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert html.count("<script") == html.count("</script>") == 2
    assert "<img" not in html
    assert "&lt;/script&gt;" in html


def test_page_needs_no_network(build, photo, tmp_path):
    explore_image(build(), photo, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert "default-src 'none'" in html
    assert not re.search(r"https?://|@import|url\(", html)


@pytest.mark.parametrize(
    ("name", "most"), [("lam_vit_tiny", 8.0), pytest.param("lam_vit_base", 14.0, marks=pytest.mark.slow)]
)
def test_page_of_a_224_pixel_model_is_small(name, most, photo, tmp_path):
    explore_image(lamzoo.create_model(name), photo, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < most * 1e6


def test_quantised_rows_are_close_and_keep_what_is_forbidden():
    values = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32) * 10.0 ** np.arange(-3, 7, 2)[:, None]
    values[2, 3] = -np.inf
    integers, scales = quantise(values)
    assert integers[2, 3] == -32768
    integers[2, 3], values[2, 3] = 0, 0
    error = np.abs(integers * scales[:, None].astype(float) - values).max(axis=1)
    assert (error <= np.abs(values).max(axis=1) / 65000).all()
    with pytest.raises(ConfigError, match="not finite"):
        quantise(np.array([[1, np.nan]], dtype=np.float32))


def test_impossible_pages_are_refused_and_nothing_is_written(build, photo, tmp_path):
    with pytest.raises(DataError, match=r"\.html"):
        explore_image(build(), photo, tmp_path / "page.png")
    with pytest.raises(UnsupportedHostError, match="add_lam"):
        explore_image(build(lam=None), photo, tmp_path / "page.html")
    broken = build()
    torch.nn.init.constant_(broken.blocks[0].attn.qkv.weight, torch.nan)
    with pytest.raises(ConfigError, match="not finite"):
        explore_image(broken, photo, tmp_path / "page.html")
    assert not list(Path(tmp_path).iterdir())
