"""Recipes of moment retrieval that take seconds, on spoken words and on features in QVHighlights' layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SMALL = {"width": 16, "heads": 2, "hidden": 32, "dropout": 0.0, "input_dropout": 0.0, "queries": 4}


def moment_recipe(source: str, output: Path, name: str = "lam_qd_detr_micro") -> dict[str, Any]:
    """A recipe as nested values: two epochs of a few updates."""
    return {
        "task": "moments",
        "model": {"name": name, "lam": {"rank": 2}, "kwargs": dict(SMALL)},
        "data": {"source": source, "test_split": "test"},
        "augment": {"splice": 0.5} if source.startswith("grid:") else {},
        "optimizer": {"lr": 1e-3},
        "schedule": {"epochs": 2, "warmup_epochs": 0},
        "run": {"output": str(output), "batch_size": 8, "device": "cpu", "report": False},
    }


def write_qvhighlights(folder: Path, clip: int = 512, slowfast: int = 2304, text: int = 512) -> Path:
    """Writes random features in QVHighlights' layout: 24 queries to train on, 8 to validate and 8 to test on."""
    generator = np.random.default_rng(0)

    def save(path: Path, key: str, rows: int, columns: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{key: generator.standard_normal((rows, columns)).astype(np.float16)})

    qid = 0
    for name, count in (("train_release", 24), ("val_release", 8), ("test_with_gt", 8)):
        lines = []
        for _ in range(count):
            clips = int(generator.integers(50, 76))
            start = int(generator.integers(0, clips - 10))
            length = int(generator.integers(2, 10))
            video = f"v{qid}"
            lines.append({
                "qid": qid, "query": f"query {qid}", "vid": video, "duration": 2 * clips,
                "relevant_windows": [[2 * start, 2 * (start + length)]],
                "relevant_clip_ids": list(range(start, start + length)),
                "saliency_scores": generator.integers(1, 5, (length, 3)).tolist(),
            })  # fmt: skip
            save(folder / "features" / "clip_features" / f"{video}.npz", "features", clips, clip)
            save(folder / "features" / "slowfast_features" / f"{video}.npz", "features", clips, slowfast)
            words = int(generator.integers(4, 20))
            save(folder / "features" / "clip_text_features" / f"qid{qid}.npz", "last_hidden_state", words, text)
            qid += 1
        text_lines = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"highlight_{name}.jsonl").write_text(text_lines)
    return folder
