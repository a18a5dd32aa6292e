"""Videos that a small model tells apart in seconds: coloured patches that move, named by their captions."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220), "white": (240, 240, 240)}
PLACES = {"left": 4, "middle": 24, "right": 44}


def write_faces(folder: Path, copies: int = 4) -> Path:
    """Writes the layout of ``grid:DIR:face``: every colour in every place, some copies of each for training."""
    generator = np.random.default_rng(0)
    lines, files = [], []
    for split, count in (("train", copies), ("val", 1), ("test", 1)):
        for copy in range(count):
            for colour, rgb in COLOURS.items():
                for place, column in PLACES.items():
                    frames = generator.integers(0, 60, (15, 64, 64, 3), dtype=np.uint8)
                    for number, frame in enumerate(frames):
                        frame[8 + number : 40 + number, column : column + 16] = rgb
                    buffer = io.BytesIO()
                    Image.fromarray(frames.reshape(-1, 64, 3)).save(buffer, "JPEG")
                    files.append(buffer.getvalue())
                    name = f"{split}-{colour}-{place}-{copy}"
                    words = [[colour, 0.0, 1.0], [place, 1.0, 3.0]]
                    text = f"{colour} at the {place}"
                    lines.append({"id": name, "n_frames": 75, "text": text, "words": words, "split": split})
    offsets = np.cumsum([0, *map(len, files)], dtype=np.int64)
    np.savez(folder / "face.npz", jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets)
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def retrieval_table(folder: Path, output: Path) -> dict[str, Any]:
    """A recipe as nested values: two epochs of six updates."""
    towers = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
        "text_cfg": {"context_length": 16, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1},
    }
    return {
        "task": "retrieval",
        "model": {
            "name": "lam_clip4clip_micro",
            "lam": {"rank": 2},
            "kwargs": {"clip": towers, "head_layers": 1},
        },
        "data": {"source": f"grid:{folder}:face", "fps": 0, "max_frames": 3, "test_split": "test"},
        "optimizer": {"lr": 1e-2},
        "schedule": {"epochs": 2, "warmup_epochs": 0},
        "run": {"output": str(output), "batch_size": 8, "device": "cpu", "report": False},
    }
