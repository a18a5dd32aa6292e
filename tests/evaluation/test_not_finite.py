"""Outputs that are not finite are refused, wherever a model's outputs become an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lamzoo
from lamzoo.data.moments.base import MomentFeatures
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.evaluation import predict
from lamzoo.evaluation.moments.evaluate import find_moments
from lamzoo.evaluation.retrieval.evaluate import compare
from lamzoo.models.describer.generation import GenerationConfig, generate
from tests.images import write_folder


def spoilt(model: nn.Module) -> Any:
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    return model.eval()


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos"), each=1) / "val" / "red" / "0.jpg"


def test_predictions_and_pictures_of_images(photo: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from lamzoo.report import explain

    model = spoilt(lamzoo.create_model("lam_vit_micro", num_classes=3, embed_dim=16, depth=1, num_heads=2))
    with pytest.raises(ConfigError, match="outputs are not finite"):
        predict(model, [photo])
    with pytest.raises(ConfigError, match="outputs are not finite"):
        explain(model, photo, tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_no_logits(photo: Path) -> None:
    class Pair(nn.Module):
        num_classes = 3

        def __init__(self) -> None:
            super().__init__()
            self.pretrained_cfg = {"input_size": (3, 8, 8)}

        def forward(self, images: Tensor) -> Any:
            return images, images

    with pytest.raises(UnsupportedHostError, match="returns a tuple in place of 3 logits per image"):
        predict(Pair(), [photo])


def test_similarities() -> None:
    model = spoilt(lamzoo.create_model("clip4clip_micro"))
    with pytest.raises(ConfigError, match="outputs are not finite"), torch.inference_mode():
        compare(model, torch.ones(1, 64), torch.ones(1, 64), torch.ones(1, 1).bool())


def test_moments() -> None:
    model = spoilt(lamzoo.create_model("moment_detr_micro"))
    clips, words = np.zeros((4, model.video_dim), np.float32), np.zeros((2, model.text_dim), np.float32)
    with pytest.raises(ConfigError, match="outputs are not finite"):
        find_moments(model, [MomentFeatures(clips, words)], [10.0])


@pytest.mark.parametrize("generation", [GenerationConfig(), GenerationConfig(beams=2), GenerationConfig(top_p=0.9)])
def test_generated_texts(generation: GenerationConfig) -> None:
    class Cache:
        def select(self, rows: Tensor) -> Cache:
            return self

    class Decoder:
        context_length = 4
        new_cache = Cache

        def __call__(self, tokens: Tensor, *rest: object) -> Tensor:
            return torch.full((len(tokens), 1, 8), torch.nan)

    with pytest.raises(ConfigError, match="outputs are not finite"):
        generate(Decoder(), torch.zeros(1, 1, 4), None, 0, 1, generation)
