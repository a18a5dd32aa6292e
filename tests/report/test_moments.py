"""The timeline of a query: what is measured for it, and that it is drawn so that it can be read."""

import os
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lamzoo
from lamzoo import LamConfig
from lamzoo.adapters.capture import capture_masks
from lamzoo.data.moments import MomentDataset, MomentQuery, MomentSource
from lamzoo.errors import ConfigError, DataError, MissingExtraError, UnsupportedHostError
from lamzoo.evaluation.moments.evaluate import pad_features
from lamzoo.report import explain_moments, moment_pictures
from lamzoo.report.mpl import new_figure
from lamzoo.report.timeline import LayerImportance, Timeline, draw_timeline

pytest.importorskip("matplotlib")

PLACES = {"moment_detr_micro": ("encoder", "decoder"), "qd_detr_micro": ("cross", "encoder", "decoder")}
each_model = pytest.mark.parametrize("name", PLACES)
WINDOWS = ((4.0, 10.0), (12.0, 13.5))


class Source(MomentSource):
    """Random features of two queries about one video."""

    split, clip_seconds = "test", 2.0

    def __init__(self, clips: int, words: int, windows: tuple[tuple[float, float], ...]) -> None:
        self.clips, self.words = clips, words
        texts = ("A dog runs.", "A $5 bill and a $10 one")
        self.queries = [MomentQuery(qid, text, "a_b", 2.0 * clips, windows) for qid, text in enumerate(texts)]

    def video(self, index: int) -> Any:
        return np.random.default_rng(0).standard_normal((self.clips, 64)).astype(np.float32)

    def text(self, index: int) -> Any:
        return np.random.default_rng(1 + index).standard_normal((self.words, 64)).astype(np.float32)


def data(clips: int = 9, words: int = 5, windows: tuple[tuple[float, float], ...] = WINDOWS) -> MomentDataset:
    return MomentDataset(Source(clips, words, windows), "tiny")


def model(name: str, lam_in: Any = None, lam: LamConfig | None = None) -> Any:
    torch.manual_seed(0)
    options = {"lam_in": lam_in, "lam": lam or LamConfig(init="paper")} if name.startswith("lam_") else {}
    return lamzoo.create_model(name, video_dim=64 + 2, text_dim=64, **options)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands between `explain_moments` and the drawing, and keeps what is to be drawn; `draw` draws it."""
    seen = SimpleNamespace(draw=lambda: draw_timeline(seen.timeline, neutral=seen.neutral, title=seen.title))

    def keep(timeline: Timeline, *, neutral: float, title: str) -> Any:
        seen.timeline, seen.neutral, seen.title = timeline, neutral, title
        return new_figure((1, 1))

    monkeypatch.setattr(moment_pictures, "draw_timeline", keep)
    return seen


def answer(built: Any, dataset: MomentDataset, index: int = 0) -> Any:
    """What the model says, called directly."""
    with torch.no_grad():
        return built.eval()(*pad_features([dataset.read(index)]))


def mean_mask(built: Any, dataset: MomentDataset, layer: str) -> Any:
    """The mean over heads and queries of a layer's dense mask, ``(Nk,)``."""
    with capture_masks(built) as records:
        answer(built, dataset)
    return records[layer].mask.dense()[0].mean(dim=(0, 1)).numpy()


@pytest.mark.parametrize(
    ("name", "place", "layer", "token", "clips", "words"),
    [
        ("moment_detr_micro", "encoder", "encoder.{}.attention.attn", False, True, True),
        ("moment_detr_micro", "decoder", "decoder.{}.cross_attention.attn", False, True, True),
        ("qd_detr_micro", "cross", "cross.{}.attention.attn", False, False, True),
        ("qd_detr_micro", "encoder", "encoder.{}.attention.attn", True, True, False),
        ("qd_detr_micro", "decoder", "decoder.layers.{}.cross_attention", False, True, False),
    ],
)
@pytest.mark.parametrize(("n", "w"), [(4, 4), (6, 1), (1, 1)])
def test_importance_drawn_is_the_captured_masks_own(
    name: str, place: str, layer: str, token: bool, clips: bool, words: bool, n: int, w: int, drawn: Any, tmp_path: Path
) -> None:
    built, dataset = model(f"lam_{name}", [place]), data(n, w, ())
    explain_moments(built, dataset, 0, tmp_path / "a.png")
    assert [one.name for one in drawn.timeline.layers] == [f"{place}.0", f"{place}.1"]
    for number, one in enumerate(drawn.timeline.layers):
        expected = mean_mask(built, dataset, layer.format(number))
        first = int(token)
        assert len(one.clips) == (n if clips else 0)
        assert len(one.words) == (w if words else 0)
        np.testing.assert_allclose(one.clips, expected[first : first + len(one.clips)], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(one.words, expected[len(expected) - len(one.words) :], rtol=1e-4, atol=1e-6)
        assert (one.token is not None) == token
        if one.token is not None:
            assert one.token == pytest.approx(float(expected[0]), rel=1e-4, abs=1e-6)


@each_model
def test_all_places_are_drawn_in_the_order_in_which_they_run(name: str, drawn: Any, tmp_path: Path) -> None:
    explain_moments(model(f"lam_{name}", PLACES[name]), data(), 0, tmp_path / "a.png")
    expected = [f"{place}.{number}" for place in PLACES[name] for number in range(2)]
    assert [layer.name for layer in drawn.timeline.layers] == expected


@each_model
def test_a_shared_mask_is_drawn_once(name: str, drawn: Any, tmp_path: Path) -> None:
    explain_moments(model(f"lam_{name}", PLACES[name], LamConfig(layers="single")), data(), 0, tmp_path / "a.png")
    assert [layer.name for layer in drawn.timeline.layers] == [f"{place}\nall layers" for place in PLACES[name]]


@each_model
@pytest.mark.parametrize("index", [0, 1])
def test_spans_are_in_seconds_and_saliency_is_the_models(name: str, index: int, drawn: Any, tmp_path: Path) -> None:
    built, dataset = model(f"lam_{name}"), data()
    explain_moments(built, dataset, index, tmp_path / "a.png", top=3)
    said, timeline = answer(built, dataset, index), drawn.timeline
    windows = said.windows()[0].double().numpy()[:3] * [18.0, 18.0, 1.0]
    np.testing.assert_allclose(timeline.found, windows, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(timeline.saliency, said.saliency[0], rtol=1e-4, atol=1e-5)
    assert (timeline.duration, timeline.true) == (18.0, WINDOWS)
    axes = drawn.draw().axes
    spans, curve = axes[:2]
    bars = [
        (bar.get_x(), bar.get_x() + bar.get_width(), bar.get_y() + bar.get_height() / 2)
        for container in spans.containers
        for bar in container
    ]
    expected = [(*window, 0) for window in WINDOWS] + [(*window[:2], row) for row, window in enumerate(windows, 1)]
    np.testing.assert_allclose(bars, expected, rtol=1e-4, atol=1e-6)
    assert spans.get_xlim() == curve.get_xlim() == (0.0, 18.0)
    assert any(axis.get_xlabel() == "time (s)" for axis in axes)


def test_scores_stand_beside_their_spans_and_make_them_opaque() -> None:
    found = Timeline(18.0, (), np.array([[1.0, 5.0, 0.75], [2.0, 3.0, 0.25]]), np.zeros(9, dtype=np.float32))
    axis = draw_timeline(found, neutral=0.0, title="").axes[0]
    assert [(text.get_text(), text.get_position()[1]) for text in axis.texts] == [("score 0.75", 0), ("score 0.25", 1)]
    first, second = (container[0].get_facecolor()[3] for container in axis.containers)
    assert first > second > 0
    assert [label.get_text() for label in axis.get_yticklabels()] == ["found 1", "found 2"]


@each_model
def test_a_plain_model_gets_spans_and_saliency_and_no_mask(name: str, drawn: Any, tmp_path: Path) -> None:
    explain_moments(model(name), data(), 0, tmp_path / "a.png")
    assert drawn.timeline.layers == ()
    assert len(drawn.draw().axes) == 2
    assert "scores" not in drawn.title


def test_moments_that_are_not_known_have_no_row(drawn: Any, tmp_path: Path) -> None:
    for windows, first in ((WINDOWS, "true"), ((), "found 1")):
        explain_moments(model("moment_detr_micro"), data(windows=windows), 0, tmp_path / "a.png")
        assert drawn.draw().axes[0].get_yticklabels()[0].get_text() == first


@pytest.mark.parametrize(("op", "neutral"), [("mul", 1.0), ("add", 0.0)])
@each_model
def test_colours_are_centred_at_neutral(name: str, op: Any, neutral: float, drawn: Any, tmp_path: Path) -> None:
    explain_moments(model(f"lam_{name}", ["encoder"], LamConfig(op=op, init="paper")), data(), 0, tmp_path / "a.png")
    assert drawn.neutral == neutral
    limits = {image.get_clim() for axis in drawn.draw().axes[2:4] for image in axis.images}
    ((low, high),) = limits
    assert (low + high) / 2 == pytest.approx(neutral)
    assert high - low >= 0.1


def test_curves_of_importance_are_drawn_where_they_are_measured() -> None:
    clips, words = np.array([0.5, 2.0, 1.5], dtype=np.float32), np.array([1.25, 0.25], dtype=np.float32)
    layer = LayerImportance("encoder.0", clips, words)
    timeline = Timeline(6.0, (), np.array([[0.0, 6.0, 0.5]]), np.zeros(3, dtype=np.float32), (layer,))
    axes = draw_timeline(timeline, neutral=1.0, title="").axes
    (heat,) = axes[2].images
    assert heat.get_array()[0].tolist() == clips.tolist()
    curve = axes[2].patches[-1].get_data()
    assert (curve.values.tolist(), curve.edges.tolist()) == (clips.tolist(), [0.0, 2.0, 4.0, 6.0])
    assert [(bar.get_y(), bar.get_height()) for bar in axes[3].containers[0]] == [(1.0, 0.25), (1.0, -0.75)]
    assert [label.get_text() for label in axes[3].get_xticklabels()] == ["1", "2"]
    assert 1.0 in axes[2].get_yticks()


@pytest.mark.parametrize(
    ("source", "query", "says"),
    [
        (None, 0, "lam_moment_detr_micro on video a_b, query 0\n“A dog runs.”"),
        (
            "/a.safetensors",
            1,
            "lam_moment_detr_micro (/a.safetensors) on video a_b, query 1\n“A $5 bill and a $10 one”",
        ),
    ],
)
def test_title_names_model_video_and_sentence(
    source: str | None, query: int, says: str, drawn: Any, tmp_path: Path
) -> None:
    built = model("lam_moment_detr_micro")
    built.weights_source = source
    explain_moments(built, data(), query, tmp_path / "a.png")
    assert drawn.title.startswith(f"{says}\nM is added to the attention scores, 0 is neutral; ")
    assert not drawn.draw()._suptitle.get_parse_math()


def texts(figure: Any) -> list[Any]:
    """Everything that is written, with its place in pixels; ticks outside of their axis are not."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    hidden = {
        label
        for axis in figure.axes
        for line in (axis.xaxis, axis.yaxis)
        for tick in (*line.get_major_ticks(), *line.get_minor_ticks())
        if not min(line.get_view_interval()) <= tick.get_loc() <= max(line.get_view_interval())
        for label in (tick.label1, tick.label2)
    }
    written = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in hidden]
    return [(text.get_text(), text.get_window_extent()) for text in written]


@pytest.mark.parametrize(
    ("clips", "words"),
    [(9, 5), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 1), (75, 77), (750, 2)))],
)
@each_model
def test_no_two_labels_overlap_and_none_is_cut(name: str, clips: int, words: int, drawn: Any, tmp_path: Path) -> None:
    built, dataset = model(f"lam_{name}", PLACES[name]), data(clips, words, ((0.0, 2.0),))
    explain_moments(built, dataset, 0, tmp_path / "a.png")
    figure = drawn.draw()
    written = texts(figure)
    width, height = figure.bbox.size
    for text, box in written:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    for (one, box), (other, rest) in combinations(written, 2):
        shared = (min(box.x1, rest.x1) - max(box.x0, rest.x0), min(box.y1, rest.y1) - max(box.y0, rest.y0))
        assert min(shared) <= 1, f"{one} and {other}"


def test_the_picture_is_a_png_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    explain_moments(model("lam_qd_detr_micro"), data(), 0, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert image.width == 8 * 130
    assert os.listdir(tmp_path) == ["a.png"]


def test_model_and_pyplot_are_left_alone(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    built = model("lam_moment_detr_micro").train()
    built.span_head.eval()
    explain_moments(built, data(), 0, tmp_path / "a.png")
    assert ("matplotlib.pyplot" in sys.modules) == before
    assert built.training
    assert not built.span_head.training
    assert all(layer.attention.attn.lam.recorder is None for layer in built.encoder)


def test_more_spans_than_there_are_is_all_of_them(drawn: Any, tmp_path: Path) -> None:
    explain_moments(model("moment_detr_micro"), data(), 0, tmp_path / "a.png", top=99)
    assert len(drawn.timeline.found) == 10


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        (
            "lam_vit_micro",
            {},
            UnsupportedHostError,
            "does not predict moments; use a model of the family lam_moment_detr",
        ),
        (
            "moment_detr_micro",
            {"video_dim": 12, "text_dim": 64},
            UnsupportedHostError,
            "create it with video_dim=66, text_dim=64",
        ),
    ],
)
def test_a_model_that_can_not_read_the_data_is_named(
    name: str, options: Any, error: Any, says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        explain_moments(lamzoo.create_model(name, **options), data(), 0, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_attention_that_is_not_the_familys_is_named(tmp_path: Path) -> None:
    built = model("lam_qd_detr_micro")
    with pytest.raises(UnsupportedHostError, match=r"encoder\.0\.attention\.attn of Wrapper attends to 10 tokens"):
        explain_moments(Wrapper(built), data(), 0, tmp_path / "a.png")


class Wrapper(torch.nn.Module):
    """Hands everything on, and is no model of the family itself."""

    def __init__(self, built: Any) -> None:
        super().__init__()
        self.built, self.video_dim, self.text_dim = built, built.video_dim, built.text_dim

    def forward(self, *inputs: Any) -> Any:
        return self.built(*inputs)


@pytest.mark.parametrize(
    ("path", "top", "error", "says"),
    [
        ("a.pdf", 5, DataError, r"\.png"),
        ("absent/a.png", 5, DataError, "absent of the picture does not exist"),
        ("a.png", 0, ConfigError, "top is 0"),
    ],
)
def test_what_can_not_be_drawn_is_refused_before_the_model_runs(
    path: str, top: int, error: Any, says: str, tmp_path: Path
) -> None:
    built = model("lam_moment_detr_micro")
    built.forward = None
    with pytest.raises(error, match=says):
        explain_moments(built, data(), 0, tmp_path / path, top=top)


def test_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"lamzoo\[report\]"):
        explain_moments(model("moment_detr_micro"), data(), 0, tmp_path / "a.png")
