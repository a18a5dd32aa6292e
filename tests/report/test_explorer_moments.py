"""The explorer page of moment models: clips over time, words, and the numbers of ``capture_masks``."""

from pathlib import Path

import numpy as np
import pytest

from lamzoo.adapters import capture_masks
from lamzoo.errors import DataError, UnsupportedHostError
from lamzoo.lam import LamConfig
from lamzoo.report import explore_query
from tests.report.explorer_data import PageLayer, read_page
from tests.report.test_moments import PLACES, answer, data, model


@pytest.mark.parametrize("name", PLACES)
def test_clips_words_and_moments_have_the_numbers_of_capture_masks(name: str, tmp_path: Path) -> None:
    built = model(f"lam_{name}", PLACES[name], LamConfig(init="paper", op="mul", heads="per-head"))
    explore_query(built, data(clips=9, words=5), None, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    page = read_page(html)
    with capture_masks(built) as records:
        answer(built, data(clips=9, words=5))
    for index, (path, record) in enumerate(records.items()):
        layer, mask = PageLayer(page, index), record.mask.dense()[0].numpy()
        np.testing.assert_allclose(layer.mask, mask, atol=2e-4 * np.abs(mask).max())
        np.testing.assert_allclose(layer.masked, record.attention[0], atol=1e-3)
        queries, keys = (
            [page["runs"][run]["name"] for run in page["sequences"][layer.data[side]]] for side in ("queries", "keys")
        )
        if path.startswith("cross."):
            assert (queries, keys) == (["clip"], ["word"])
        elif path.startswith("encoder."):
            assert queries == keys == (["clip", "word"] if name.startswith("moment") else ["saliency", "clip"])
        elif "self_attention" in path:
            assert queries == keys == ["moment query"]
        else:
            assert (queries, keys[0]) == (["moment query"], "clip")
    (clips,) = [run for run in page["runs"] if run["name"] == "clip"]
    assert len(clips["labels"]) == 9
    assert clips["time"]
    assert "moments in the data: 4–10 s, 12–13.5 s" in html
    assert html.count("<th>moment ") == 5


def test_thumbnails_need_the_videos_which_are_found_by_their_ids(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from tests.videos import pictures, write_clip

    built, page = model("lam_moment_detr_micro", ("encoder",)), tmp_path / "page.html"
    explore_query(built, data(), None, page)
    assert "the data have only its features: give --videos DIR with a_b.mp4 in it" in page.read_text()
    films = tmp_path / "films"
    films.mkdir()
    with pytest.raises(DataError, match=r"films has no video 'a_b'; add a_b\.mp4"):
        explore_query(built, data(), None, page, videos=films)
    write_clip(films / "a_b.mp4", pictures(36), fps=2)
    explore_query(built, data(), None, page, videos=films)
    (clips,) = [run for run in read_page(page.read_text())["runs"] if run["name"] == "clip"]
    assert (clips["frames"], clips["picture"][:15]) == (24, "data:image/jpeg")
    assert "--videos" not in page.read_text()


def test_queries_and_models_that_can_not_be_shown_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no query '7'; it has '0', '1'"):
        explore_query(model("lam_moment_detr_micro"), data(), "7", tmp_path / "page.html")
    with pytest.raises(UnsupportedHostError, match="no learnable masks"):
        explore_query(model("moment_detr_micro"), data(), None, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
