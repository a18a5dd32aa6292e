"""A global batch of ragged samples has one gradient, in one pass, in parts and over processes, in every task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.speech import ALL, write_speech
from tests.training.gradients import Gradients, gradients, gradients_in_two
from tests.training.moment_data import moment_recipe, write_qvhighlights
from tests.training.retrieval_data import retrieval_table, write_faces

DESCRIBER = {
    "width": 16, "heads": 2, "hidden": 16, "encoder_layers": 1, "text_layers": 1, "decoder_layers": 1,
    "vocabulary": ALL, "context_length": 5, "dropout": 0.0, "input_dropout": 0.0, "modality_dropout": 0.0,
}  # fmt: skip
TASKS = ("classification", "retrieval", "moment_detr", "qd_detr", "spoken words", "captions", "descriptions")


@pytest.fixture(scope="module")
def tables(packed_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Recipes of one update of eight samples."""
    folder = tmp_path_factory.mktemp("gradients")
    run = {"output": "", "batch_size": 8, "device": "cpu", "report": False}
    moments = _with_more_moments(write_qvhighlights(_made(folder / "moments"), clip=8, slowfast=6, text=5))
    speech = _with_short_sentences(write_speech(_made(folder / "speech")))
    faces = retrieval_table(_with_short_words(write_faces(_made(folder / "faces"))), Path())
    faces["data"] |= {"fps": 1.0, "max_frames": 4}
    faces["augment"] = {"splice": 1.0}
    plain = {"name": "timm/test_vit", "kwargs": {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}}
    one_layer = {"decoder_layers": 1, "anchors": "salient"}
    tables = {
        "classification": {
            "model": plain, "data": {"source": f"npz:{packed_data}", "eval_split": "test"},
            "augment": {"label_smoothing": 0.1},
        },
        "retrieval": faces,
        "moment_detr": moment_recipe(f"qvhighlights:{moments}", Path(), "lam_moment_detr_micro"),
        "qd_detr": moment_recipe(f"qvhighlights:{moments}", Path()),
        "spoken words": moment_recipe(f"grid:{speech}:audio:2-4", Path()),
        "captions": {
            "task": "captions", "model": {"name": "lam_describer_micro", "kwargs": DESCRIBER | {"align": True}},
            "data": {"source": f"grid:{speech}"}, "augment": {"splice": 0.5}, "loss": {"label_smoothing": 0.1},
        },
        "descriptions": {
            "task": "captions",
            "model": {"name": "lam_describer_micro", "kwargs": DESCRIBER | {"context_tokens": 5, "align": False}},
            "data": {"source": f"videos:{_write_videos(_made(folder / 'videos'))}:5", "context": 1},
        },
    }  # fmt: skip
    tables["spoken words"]["model"]["kwargs"] |= one_layer
    tables["qd_detr"]["model"]["kwargs"] |= {"words": 3}  # of which the data know nothing
    return {name: {**table, "run": run} for name, table in tables.items()}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _with_more_moments(folder: Path) -> Path:
    """Adds two moments at the start of every other video."""
    path = folder / "highlight_train_release.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[::2]:
        line["relevant_windows"] += [[0, 4], [6, 10]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _with_short_sentences(speech: Path) -> Path:
    """Leaves every other clip in GRID's layout the first word alone."""
    lines = [json.loads(line) for line in (speech / "captions.jsonl").read_text().splitlines()]
    for line in lines[::2]:
        line |= {"text": line["words"][0][0], "words": line["words"][:1]}
    (speech / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return speech


def _with_short_words(faces: Path) -> Path:
    """Lets the first word of every other clip be twice as long."""
    lines = [json.loads(line) for line in (faces / "captions.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        (colour, *_), (place, *_) = line["words"]
        middle = 1.0 + number % 2
        line |= {"text": f"{colour} {place}", "words": [[colour, 0.0, middle], [place, middle, 3.0]]}
    (faces / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return faces


def _write_videos(folder: Path) -> Path:
    """Writes features of eight sounds, of which one has pictures, and captions of one to three words."""
    generator, lines = np.random.default_rng(0), ["video,start,end,caption,split"]
    for part in ("audio", "video"):
        (folder / "features" / part).mkdir(parents=True)
    for number, split in enumerate(["train"] * 8 + ["val"]):
        (folder / f"v{number}.mp4").touch()
        lines.append(f"v{number},{number % 2},{2 + number},{' '.join(ALL[: 1 + number % 3])},{split}")
        parts = ("audio", "video") if number == 3 else ("audio",)
        for part in parts:
            rows = generator.standard_normal((5 * (2 + number), 4)).astype(np.float32)
            np.save(folder / "features" / part / f"v{number}.npy", rows)
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


def assert_same(found: Gradients, expected: Gradients) -> None:
    assert set(found) == set(expected)
    rounding = 1e-6 * max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=rounding), (name, found[name], value)


@pytest.mark.parametrize("task", TASKS)
def test_passes_in_parts_have_the_gradients_of_one(
    tables: dict[str, dict[str, Any]], tmp_path: Path, task: str
) -> None:
    whole = gradients(tables[task], tmp_path / "whole")
    assert_same(gradients(tables[task], tmp_path / "parts", 8 if task == "qd_detr" else 4), whole)


def test_two_processes_have_the_gradients_of_one(tables: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    masked = _with_run(_with_masks(tables["classification"]), fsdp=True)
    two = gradients_in_two({**tables, "masked, sharded": masked}, tmp_path, accumulation=2)
    assert set(two) == {*TASKS, "masked, sharded"}
    for task in TASKS:
        assert_same(two[task], gradients(tables[task], tmp_path / task))
    assert_same(two["masked, sharded"], gradients(masked, tmp_path / "masked"))


@pytest.mark.slow
def test_two_processes_that_shard_a_model_have_the_gradients_of_one(
    tables: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    more = {
        "one mask": _with_masks(tables["classification"], layers="single"),
        "two stages": _with_two_stages(tables["retrieval"]),
        "checkpointing": _with_run(_with_masks(tables["classification"]), grad_checkpointing=True),
    }
    every = {name: _with_run(table, fsdp=True) for name, table in (tables | more).items()}
    two = gradients_in_two(every, tmp_path, accumulation=2)
    for name, table in every.items():
        expected = gradients(table, tmp_path / name)
        unused = {key: torch.zeros_like(value) for key, value in two[name].items() if key not in expected}
        assert_same(two[name], expected | unused)


def _with_run(table: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**table, "run": {**table["run"], **changes}}


def _with_two_stages(table: dict[str, Any]) -> dict[str, Any]:
    tight = {**table["model"], "kwargs": {**table["model"]["kwargs"], "similarity": "tight"}}
    matching = {"negatives": "group", "group": 2}
    return {**table, "model": tight, "data": {**table["data"], "captions": "one"}, "matching": matching}


def _with_masks(table: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**table, "model": {**table["model"], "lam": {"rank": 2, **fields}}}
