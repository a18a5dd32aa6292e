"""The features, index and descriptions of a folder of videos, in this process or, as a script, in several."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lamzoo
from lamzoo.video.features import extract_features
from lamzoo.video.processes import Processes, launched_processes

TOWERS: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1},
}
DESCRIBER: dict[str, Any] = {
    "features": {"video": 24}, "rates": {"video": 5.0}, "seconds": 1.0, "width": 32, "heads": 2, "hidden": 32,
    "encoder_layers": 1, "decoder_layers": 1, "align": False,
}  # fmt: skip


def work(folder: Path, out: Path, processes: Processes, died: str = "") -> tuple[Any, Any, Any]:
    """Computes everything from ``folder/videos``; process 1 ends in the stage ``died`` once it has done one video."""

    def moved(stage: str, *done: Any) -> None:
        if stage == died and processes.rank == 1:
            os._exit(9)

    torch.manual_seed(0)
    towers: Any = lamzoo.create_model("lam_clip4clip_micro", clip=TOWERS, head_layers=1, max_frames=4, fps=1, lam=False)
    describer: Any = lamzoo.create_model("lam_describer_micro", **DESCRIBER)
    videos, queries, options = folder / "videos", folder / "queries.jsonl", {"device": "cpu", "processes": processes}
    bad: dict[str, Any] = {"on_bad_input": "skip"}
    made = extract_features(
        [videos], out / "features", towers, queries=queries, batch_size=2, progress=moved, **bad, **options
    )
    index = lamzoo.index_videos(
        videos, towers, index=out / "index.safetensors", batch_size=2, progress=partial(moved, "index"), **options
    )
    described = lamzoo.describe_videos(
        [videos], out / "described", describer, towers=towers, progress=partial(moved, "described"), **bad, **options
    )
    return made, index, described


def _main(folder: Path, died: str) -> None:
    torch.set_num_threads(1)
    with launched_processes() as processes:
        made, index, described = work(folder, folder / "two", processes, died)
        assert (len(made.unreadable), len(index.unreadable), len(described.unreadable)) == (1, 1, 1)
        assert processes.gather(len(index)) == [3, 3]
    with launched_processes() as processes:  # a program may share several folders
        assert processes.gather(processes.rank) == [0, 1]


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2])
