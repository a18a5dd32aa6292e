"""Indexes, feature files and descriptions of one model are never taken for those of another with the same tensors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lamzoo
from lamzoo.data.feature_arrays import ORIGIN
from lamzoo.errors import DataError
from lamzoo.video.features import extract_features
from lamzoo.video.index import read_index, write_index
from tests.videos import write_clip

pytest.importorskip("open_clip")
from tests.video.shared import DESCRIBER, TOWERS

DEEPER = {**TOWERS, "vision_cfg": {**TOWERS["vision_cfg"], "layers": 2}}  # tokens don't merge in a single block
Run = Callable[[Any], int]
NEW = {"masks", "reduction", "towers' masks", "towers' reduction", "towers' preprocessing"}


def towers(sign: Any = "free") -> Any:
    torch.manual_seed(0)
    lam = lamzoo.LamConfig(op="mul", sign=sign)
    return lamzoo.create_model("lam_clip4clip_micro", clip=DEEPER, head_layers=1, max_frames=2, fps=1, lam=lam)


def describer(sign: Any = "free") -> Any:
    torch.manual_seed(0)
    return lamzoo.create_model("lam_describer_micro", **DESCRIBER, lam=lamzoo.LamConfig(op="mul", sign=sign))


def age(out: Path) -> None:
    """Removes from the one file what earlier files lack."""
    (path,) = (each for each in out.rglob("*") if each.suffix in (".json", ".npz", ".safetensors"))
    if path.suffix == ".safetensors":
        stored = read_index(path)
        write_index(path, replace(stored, origin=replace(stored.origin, masks=None, reduction={})))
    elif path.suffix == ".npz":
        arrays = dict(np.load(path))
        origin = json.loads(str(arrays[ORIGIN]))
        kept = {name: value for name, value in origin.items() if name not in NEW}
        np.savez(path, **{**arrays, ORIGIN: np.array(json.dumps(kept))})
    else:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["origin"] = {name: value for name, value in record["origin"].items() if name not in NEW}
        path.write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.parametrize("kind", ["index", "features", "describer", "towers of a describer"])
def test_results_of_other_masks_or_merged_tokens_are_refused(kind: str, tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    write_clip(videos / "film.mp4", 5, fps=5)
    fixed: Any = towers() if kind == "describer" else describer()
    runs: dict[str, Run] = {
        "index": lambda model: lamzoo.index_videos(videos, model, index=out / "i.safetensors", device="cpu").embedded,
        "features": lambda model: extract_features([videos], out, model, device="cpu").new_videos,
        "describer": lambda model: lamzoo.describe_videos([videos], out, model, towers=fixed, device="cpu").new,
        "towers of a describer": lambda model: (
            lamzoo.describe_videos([videos], out, fixed, towers=model, device="cpu").new
        ),
    }
    run, build = runs[kind], describer if kind == "describer" else towers
    first, other = build(), build("positive")
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), first.parameters(), strict=True):
            mine.copy_(theirs)
    merged = lamzoo.merge_tokens(copy.deepcopy(first), keep=0.5)
    assert (run(first), run(first)) == (1, 0)
    with pytest.raises(DataError, match=r"masks.*--force"):
        run(other)
    with pytest.raises(DataError, match=r"reduction.*--force"):
        run(merged)
    if kind == "towers of a describer":
        darker = copy.deepcopy(first)
        darker.pretrained_cfg = {**first.pretrained_cfg, "mean": (0.1, 0.1, 0.1)}
        with pytest.raises(DataError, match=r"preprocessing.*--force"):
            run(darker)
    age(out)
    assert run(first) == 0, "an earlier file is kept"
    with pytest.raises(DataError, match=r"reduction.*--force"):
        run(merged)
