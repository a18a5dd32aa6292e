"""Figures for papers have the values of ``capture_masks``, labels that fit, and the formats of journals."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lamzoo.adapters import capture_masks
from lamzoo.errors import ConfigError, DataError, UnsupportedHostError
from lamzoo.lam import LamConfig
from lamzoo.reduction import merge_tokens, prune_tokens
from lamzoo.report import figure
from lamzoo.report.mpl import new_figure
from lamzoo.report.paper_figure import figure_image, figure_query
from tests.report.test_moments import data, model

PER_HEAD = LamConfig(init="paper", op="mul", heads="per-head")


def captured(built: Any) -> dict[str, Any]:
    with torch.no_grad(), capture_masks(built.eval()) as masks:
        built.forward_features(torch.rand(1, 3, 32, 32))
    return dict(masks)


def drawn(axis: Any) -> np.ndarray:
    (shown,) = axis.images
    return shown.get_array().filled(np.nan)


def test_layers_are_lines_of_importance(build):
    masks = captured(build(PER_HEAD))
    axis = figure(masks).axes[0]
    expected = [record.importance[0].mean(dim=0).numpy() for record in masks.values()]
    np.testing.assert_allclose(drawn(axis), expected, rtol=1e-5)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "1"]
    assert sum(axis.images[0].get_clim()) == pytest.approx(2.0)  # about 1, which is neutral


@pytest.mark.parametrize("show", ["mask", "attention", "plain", "difference"])
def test_one_layer_is_a_matrix_and_with_a_grid_a_map_of_a_query(build, show):
    masks = captured(build(PER_HEAD))
    record = masks["blocks.1.attn"]
    plain = record.scores.attention()[0]
    matrices = {"mask": record.mask.dense()[0], "attention": record.attention[0], "plain": plain}
    expected = matrices.get(show, record.attention[0] - plain)
    first, second, third = new_figure((7, 3)).subplots(1, 3)
    returned = figure(masks, first, layer=1, show=show, head=1)
    assert returned is first.figure
    figure(masks, second, layer="blocks.1.attn", show=show, query=20, grid=(8, 8))
    figure(masks, third, grid=(8, 8), show=show)
    np.testing.assert_allclose(drawn(first), expected[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(drawn(second), expected.mean(0)[20, 1:].unflatten(0, (8, 8)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(drawn(third), expected.mean((0, 1))[1:].unflatten(0, (8, 8)), rtol=1e-3, atol=1e-6)


def test_merged_tokens_have_their_values_and_pruned_ones_none(build):
    masks = captured(merge_tokens(build(PER_HEAD, depth=3), keep=0.4))
    record = masks["blocks.2.attn"]
    i, j = record.query_places[0], record.key_places[0]
    expected = record.mask.dense()[0].mean(0)[i][:, j]
    np.testing.assert_allclose(drawn(figure(masks, layer=-1).axes[0]), expected, rtol=1e-4, atol=1e-6)
    masks = captured(prune_tokens(build(PER_HEAD), 0.5, (0,)))
    gone = masks["blocks.1.attn"].key_places[0] < 0
    np.testing.assert_array_equal(np.isnan(drawn(figure(masks).axes[0])[1]), gone)


@pytest.mark.parametrize("width", [1.6, *(pytest.param(each, marks=pytest.mark.slow) for each in (3.3, 7.0))])
def test_labels_fit(build, width):
    labels = [f"word {number}" for number in range(65)]
    masks = captured(build(PER_HEAD))
    for given in (labels, None):
        shown = figure(masks, new_figure((width, 3), dpi=200).subplots(), labels=given)
        shown.canvas.draw()
        for axis in (shown.axes[0].xaxis, shown.axes[0].yaxis):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
            assert len(boxes) >= 2
            assert not any(a.overlaps(b) for a, b in pairwise(boxes))
            assert all(min(box.x0, box.y0) >= 0 and box.x1 <= 200 * width and box.y1 <= 600 for box in boxes)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"layer": 7}, "no layer 7; the masks are of blocks.0.attn to blocks.1.attn"),
        ({"head": 2}, "no head 2"),
        ({"layer": 0, "query": 65}, "no query 65"),
        ({"grid": (9, 9)}, "doesn't fit 65 tokens"),
        ({"grid": (0, 3)}, "doesn't fit 65 tokens"),
        ({"show": "masks"}, "must be one of 'mask', 'attention', 'plain', 'difference'"),
        ({"labels": ["a"]}, "1 labels for 65"),
    ],
)
def test_what_is_not_there_is_named(build, given, says):
    with pytest.raises(ConfigError, match=says):
        figure(captured(build(PER_HEAD)), **given)
    with pytest.raises(ConfigError, match="no masks"):
        figure({})


@pytest.mark.parametrize(
    ("suffix", "begin"),
    [
        ("pdf", b"%PDF"),
        pytest.param("svg", b"<?xml", marks=pytest.mark.slow),
        pytest.param("png", b"\x89PNG", marks=pytest.mark.slow),
    ],
)
def test_figures_of_an_image_and_of_a_query_are_written(build, photo, tmp_path: Path, suffix, begin):
    figure_image(build(PER_HEAD, depth=4), photo, tmp_path / f"a.{suffix}")
    figure_query(model("lam_qd_detr_micro"), data(), None, tmp_path / f"b.{suffix}")
    for name in "ab":
        content = (tmp_path / f"{name}.{suffix}").read_bytes()
        assert content.startswith(begin)
        assert suffix != "pdf" or b"/MediaBox [ 0 0 237.6 " in content  # 3.3 inches in points


def test_impossible_figures_are_refused(build, photo, tmp_path: Path):
    with pytest.raises(DataError, match=r"\.pdf, \.svg or \.png"):
        figure_image(build(), photo, tmp_path / "a.jpg")
    with pytest.raises(UnsupportedHostError, match="add_lam"):
        figure_image(build(lam=None), photo, tmp_path / "a.pdf")
    assert not list(tmp_path.iterdir())
