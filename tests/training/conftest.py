"""A tiny data set and a recipe that trains on it in seconds."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def packed_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training and 20 test images of two classes, red and blue noise, in the packed npz layout."""
    folder = tmp_path_factory.mktemp("packed")
    generator = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 20)):
        files, labels = [], np.arange(count, dtype=np.int16) % 2
        for label in labels:
            pixels = generator.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            pixels[..., 0 if label else 2] += 100
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG")
            files.append(buffer.getvalue())
        offsets = np.cumsum([0, *map(len, files)], dtype=np.int64)
        np.savez(folder / f"{split}.npz", jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, labels=labels)
    (folder / "classes.json").write_text(json.dumps(["blue", "red"]))
    return folder


@pytest.fixture
def recipe_table(recipe_in: Callable[[Path], dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """A recipe as nested values: two epochs of six updates."""
    return recipe_in(tmp_path)


@pytest.fixture(scope="session")
def recipe_in(packed_data: Path) -> Callable[[Path], dict[str, Any]]:
    """Makes that recipe for a run below a folder."""
    return lambda folder: {
        "model": {
            "name": "timm/test_vit",
            "lam": {"rank": 2},
            "kwargs": {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2},
        },
        "data": {"source": f"npz:{packed_data}", "eval_split": "test"},
        "augment": {"scale": [0.5, 1.0]},
        "optimizer": {"lr": 1e-2},
        "schedule": {"epochs": 2, "warmup_epochs": 0},
        "run": {"output": str(folder / "run"), "batch_size": 8, "device": "cpu", "report": False},
    }
