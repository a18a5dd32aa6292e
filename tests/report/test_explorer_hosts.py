"""The explorer page of every host: what its tokens are, and the numbers of ``capture_masks``."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lamzoo.adapters import add_lam, capture_masks
from lamzoo.lam import LamConfig
from lamzoo.report import TokenRun, explore
from tests.adapters.transformers_hosts import HOSTS
from tests.report.explorer_data import PageLayer, read_page

MASK = LamConfig(init="paper", op="mul", heads="per-head", rank=3)


class Tokenizer:
    """What the page needs of a tokenizer and an image processor of transformers."""

    image_mean, image_std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<{number}>" for number in ids]


def written(model: nn.Module, inputs: Any, tmp_path: Any, **given: Any) -> tuple[dict[str, Any], list[list[str]]]:
    """Writes the page, compares its numbers, and returns its data with the runs of each layer's keys."""
    explore(model, inputs, tmp_path / "page.html", **given)
    page = read_page((tmp_path / "page.html").read_text())
    with torch.no_grad(), capture_masks(model.eval()) as records:
        model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    assert [layer["name"].split(" ")[0] for layer in page["layers"]] == list(records)
    for index, record in enumerate(records.values()):
        layer, mask = PageLayer(page, index), record.mask.dense()[0].numpy()
        np.testing.assert_allclose(layer.mask, mask, atol=2e-4 * np.abs(mask).max())
        np.testing.assert_allclose(layer.masked, record.attention[0], atol=1e-3)
        np.testing.assert_allclose(layer.plain, record.scores.attention()[0], atol=1e-3)
    runs = [[page["runs"][run]["name"] for run in page["sequences"][layer["keys"]]] for layer in page["layers"]]
    return page, runs


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", [["word"]] * 2),
        pytest.param("llama", [["word"]] * 2, marks=pytest.mark.slow),
        ("t5", [["word"]] * 6),
        pytest.param("vit", [["token", "patch"]] * 2, marks=pytest.mark.slow),
        ("dinov3", [["token", "patch"]] * 2),
        pytest.param("beit", [["token", "patch"]] * 2, marks=pytest.mark.slow),
        ("clip", [["token", "patch"]] * 2 + [["word"]] * 2),
    ],
)
def test_words_and_patches_of_transformers_are_told(name, expected, tmp_path):
    host = HOSTS[name]
    model = add_lam(host.create(), MASK)
    inputs = {key: value[:1] for key, value in host.inputs().items()}
    page, runs = written(model, inputs, tmp_path, processor=Tokenizer())
    assert sorted(runs) == expected
    texts = [run["labels"] for run in page["runs"] if run["name"] == "word"]
    if "input_ids" in inputs:
        assert texts[0] == [f"<{number}>" for number in inputs["input_ids"][0].tolist()]
    patches = [run for run in page["runs"] if run["name"] == "patch"]
    assert all(run["picture"].startswith("data:image/jpeg;base64,") for run in patches)


def test_padding_and_causality_are_kept(tmp_path):
    host = HOSTS["bert"]
    inputs = {key: value[:1] for key, value in host.inputs().items()}
    inputs["attention_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0]])
    page, _ = written(add_lam(host.create(), MASK), inputs, tmp_path)
    assert (PageLayer(page, 0).masked[..., 4:] == 0).all()
    assert page["runs"][0]["labels"] == [str(number) for number in inputs["input_ids"][0].tolist()]


def test_described_tokens_of_an_encoder_and_a_decoder(tmp_path):
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
    add_lam(model, MASK)
    words = [TokenRun("word", ("a", "dog", "runs"))]
    seconds = [TokenRun("second", tuple(f"{start} s" for start in range(5)), time=True)]
    inputs = (torch.randn(1, 5, 16), torch.randn(1, 3, 16))
    page, runs = written(model, inputs, tmp_path, tokens=[words, seconds])
    assert sorted(runs) == [["second"], ["second"], ["word"]]
    (crossing,) = [layer for layer in page["layers"] if layer["queries"] != layer["keys"]]
    assert [page["runs"][run]["name"] for run in page["sequences"][crossing["queries"]]] == ["word"]


def test_tokens_that_nothing_is_known_of_are_numbered(tmp_path):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = add_lam(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), MASK)
    page, runs = written(model, (torch.randn(2, 4, 16),), tmp_path)
    assert runs == [["token"]]
    assert page["runs"][0]["labels"] == ["0", "1", "2", "3"]
    assert page["layers"][0]["name"].endswith(" (first of 2)")


def test_towers_of_open_clip_show_patches_and_words(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}
    text = {"context_length": 6, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    inputs = (torch.rand(1, 3, 32, 32), torch.tensor([[1, 2, 3, 4, 0, 0]]))
    _, runs = written(add_lam(model, MASK), inputs, tmp_path)
    assert runs == [["token", "patch"], ["word"]]
