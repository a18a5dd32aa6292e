"""Frozen towers: they stay as they were, and a run that reads their states from files is the run without files."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import lamzoo
from lamzoo.data.retrieval.clips import ClipAugment
from lamzoo.errors import RecipeError
from lamzoo.models.clip4clip import Clip4Clip
from lamzoo.training import parse_recipe, train
from lamzoo.training.checkpoints import Checkpoints
from lamzoo.training.retrieval.run import RetrievalRun
from lamzoo.training.retrieval.tower_cache import read_or_make
from tests.models.test_towers import BERT, TEXT, VISION
from tests.training.processes import train_in_two
from tests.training.retrieval_data import retrieval_table, write_faces

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TOKENS = {"similarity": "tight", "patch_grid": 2, "words": True}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), copies=2)


@pytest.fixture
def table(faces: Path, tmp_path: Path) -> dict[str, Any]:
    found = retrieval_table(faces, tmp_path / "out")
    found["schedule"]["epochs"] = 1
    found["run"]["batch_size"] = 12
    found["model"]["kwargs"] |= TOKENS
    found["towers"] = {"freeze": ["vision", "text"], "cache": str(tmp_path / "cache")}
    return found


def run(table: dict[str, Any], output: Path, **towers: Any) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The scores and the weights of a run."""
    given = {**deepcopy(table), "towers": {**table["towers"], **towers}}
    given["towers"] = {key: value for key, value in given["towers"].items() if value is not None}
    given["run"]["output"] = str(output)
    result = train(parse_recipe(given))
    scores = [{k: v for k, v in row.items() if "seconds" not in k} for row in result.history]
    return [*scores, result.scores], load_file(result.model / "model.safetensors")


def same(one: Any, other: Any) -> bool:
    (scores, weights), (others, theirs) = one, other
    return scores == others and all(torch.equal(weights[name], theirs[name]) for name in weights)


@pytest.mark.parametrize("fused_attention", [True, False])
def test_a_run_that_reads_states_from_files_is_the_same_bit_by_bit(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused_attention: bool
) -> None:
    table["model"]["fused_attention"] = fused_attention
    plain = run(table, tmp_path / "plain", cache=None)
    made = run(table, tmp_path / "made")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "text-test.npz", "text-train.npz", "text-validation.npz",
        "vision-test.npz", "vision-train.npz", "vision-validation.npz",
    ]  # fmt: skip
    for name in ("frame_states", "text_states"):
        monkeypatch.setattr(Clip4Clip, name, None)  # the towers run no more
    read = run(table, tmp_path / "read")
    assert same(made, plain)
    assert same(read, plain)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [["vision"], ["text"], ["vision", "text"]])
@pytest.mark.parametrize("tokens", [{"similarity": "seq"}, TOKENS])
def test_each_tower_of_timm_and_transformers_is_cached_bit_by_bit(
    table: dict[str, Any], tmp_path: Path, freeze: list[str], tokens: dict[str, Any]
) -> None:
    clip = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
    table["model"]["kwargs"] |= {"clip": clip, "words": False, "patch_grid": 0} | tokens
    table["data"] |= {"captions": "one", "equal_captions": "positives"}
    table["run"]["accumulation"] = 2
    table["towers"]["freeze"] = freeze
    plain = run(table, tmp_path / "plain", cache=None)
    assert same(run(table, tmp_path / "made"), plain)
    assert same(run(table, tmp_path / "read"), plain)
    assert {path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()} == set(freeze)


@pytest.mark.slow
def test_two_processes_train_from_the_same_states(table: dict[str, Any], tmp_path: Path) -> None:
    table["optimizer"]["lr"] = 1e-3
    table["run"]["accumulation"] = 2
    alone, _ = run(table, tmp_path / "alone", cache=None)
    (record,) = train_in_two(table, tmp_path / "two")
    for key in ("train_loss", "eval_t2v_R1", "eval_v2t_R1"):
        assert float(record[key]) == pytest.approx(alone[0][key], rel=1e-4, abs=1e-4), key
    assert len(list((tmp_path / "cache").iterdir())) == 6


def some_photographs(folder: Path, counts: dict[str, int]) -> Path:
    """Writes the first photographs of each split of Flickr8k, with their captions, in its layout."""
    lines = [json.loads(line) for line in (DATA / "flickr8k" / "captions.jsonl").read_text().splitlines()]
    chosen = [i for split, count in counts.items() for i in [*_of_split(lines, split)][:count]]
    with np.load(DATA / "flickr8k" / "images.npz") as archive:
        jpeg, offsets = archive["jpeg"], archive["offsets"]
    files = [jpeg[offsets[i] : offsets[i + 1]] for i in chosen]
    starts = np.cumsum([0, *map(len, files)], dtype=np.int64)
    np.savez(folder / "images.npz", jpeg=np.concatenate(files), offsets=starts)
    (folder / "captions.jsonl").write_text("".join(json.dumps(lines[i]) + "\n" for i in chosen))
    return folder


def _of_split(lines: list[dict[str, Any]], split: str) -> Iterator[int]:
    return (number for number, line in enumerate(lines) if line["split"] == split)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "vit_s14").is_dir(), reason="needs the ViT-S/14 of ../shared/data/vit_s14")
@pytest.mark.skipif(not (DATA / "flickr8k").is_dir(), reason="needs the photographs of ../shared/data/flickr8k")
def test_heads_on_a_pretrained_vision_transformer_train_from_its_states(table: dict[str, Any], tmp_path: Path) -> None:
    source = some_photographs(tmp_path, {"train": 24, "val": 6, "test": 6})
    vision = {
        "timm_model_name": "vit_small_patch14_dinov2", "timm_pool": "token", "image_size": 112,
        "timm_model_pretrained": str(DATA / "vit_s14" / "vit_small_patch14_dinov2.focus.safetensors"),
    }  # fmt: skip
    bert = {**BERT, "hidden_size": 64, "vocab_size": 2048}
    clip = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": {**TEXT, "hf_config": bert, "context_length": 32}}
    table["model"]["kwargs"] = {"clip": clip, "similarity": "tight", "head_layers": 2, "patch_grid": 4, "words": True}
    table["data"] = {"source": f"flickr8k:{source}", "max_frames": 1, "captions": "one", "test_split": "test"}
    table["schedule"]["epochs"] = 2
    made = run(table, tmp_path / "made")
    assert same(run(table, tmp_path / "read"), made)
    assert same(run(table, tmp_path / "plain", cache=None), made)
    saved: Any = lamzoo.create_model(f"local-dir:{tmp_path / 'read' / 'model'}", pretrained=True).eval()
    trunk: Any = lamzoo.create_model(
        "timm/vit_small_patch14_dinov2", checkpoint_path=str(vision["timm_model_pretrained"]), num_classes=0,
        img_size=112,
    ).eval()  # fmt: skip
    frames = torch.randn(1, 1, 3, 112, 112)
    torch.testing.assert_close(saved.frame_states(frames)[0, 0, 0], trunk(frames[0])[0], rtol=1e-3, atol=1e-3)


def test_a_file_of_another_origin_or_number_and_a_damaged_one_are_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, made = tmp_path / "new" / "vision-train.npz", [torch.rand(2, 3), torch.rand(1, 3)]

    def never() -> Iterator[Tensor]:
        raise AssertionError("the states are in the file")
        yield

    def logged(origin: dict[str, Any], make: Iterable[Tensor], count: int = 2) -> str:
        caplog.clear()
        states = read_or_make(path, origin, count, make)
        assert all(torch.equal(states[index], part) for index, part in enumerate(made[:count]))
        return caplog.text

    with caplog.at_level(logging.INFO, "lamzoo"):
        assert "computing the states of 2 items" in logged({"weights": "a"}, made)
        assert "are read" in logged({"weights": "a"}, never())
        assert "is of another weights" in logged({"weights": "b"}, made)
        assert "is of another number of items" in logged({"weights": "b"}, made[:1], 1)
        path.write_bytes(path.read_bytes()[:100])
        assert "is damaged" in logged({"weights": "b"}, made)
        assert "are read" in logged({"weights": "b"}, never())
    assert torch.equal(read_or_make(path, {"weights": "b"}, 2, never()).padded([1], 2)[0, 1], torch.zeros(3))


@pytest.mark.slow
def test_states_of_another_origin_are_computed_again(
    table: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def logged(**changes: Any) -> str:
        caplog.clear()
        given = deepcopy(table)
        for section, values in changes.items():
            given[section] |= values
        RetrievalRun(parse_recipe(given), False, None, None)
        return caplog.text

    with caplog.at_level(logging.INFO, "lamzoo"):
        assert "computing the states of 24 items" in logged()
        text = logged()
        assert text.count("are read") == 2 + 2  # of both videos' and texts' files; texts to score on are read later
        assert "computed again" not in text
        assert "vision-train.npz is of another sampling" in logged(data={"max_frames": 2})
        text = logged(run={"seed": 1})
        assert "vision-train.npz is of another weights" in text
        assert "text-train.npz is of another weights" in text
        kwargs = deepcopy(table["model"]["kwargs"]) | {"quick_gelu": True}  # the same weights compute otherwise
        text = logged(model={"kwargs": kwargs}, run={"seed": 1})
        assert "vision-train.npz is of another towers" in text and "text-train.npz is of another towers" in text
        logged(run={"seed": 1})
        file = tmp_path / "cache" / "vision-train.npz"
        file.write_bytes(file.read_bytes()[:1000])
        assert "vision-train.npz is damaged" in logged(run={"seed": 1})


@pytest.mark.slow
def test_a_frozen_tower_stays_as_it_was_and_its_masks_train(table: dict[str, Any], tmp_path: Path) -> None:
    table["model"]["kwargs"] |= {"lam_in": ["vision", "head"]}
    table["towers"] = {"freeze": ["vision"]}
    recipe = parse_recipe(table)
    before = {k: v.clone() for k, v in RetrievalRun(recipe, False, None, None).model.state_dict().items()}
    after = load_file(train(recipe).model / "model.safetensors")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    vision = {name for name in changed if name.startswith("clip.visual.")}
    assert vision
    assert all(".lam." in name for name in vision)
    assert any(name.startswith("clip.transformer.") for name in changed)


@pytest.mark.slow
def test_each_tower_learns_at_its_own_rate_and_new_projections_at_that_of_the_head(table: dict[str, Any]) -> None:
    table["model"]["kwargs"]["clip"] = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
    table["optimizer"] = {"lr": 1e-3, "tower_lr": 1e-4}
    table["towers"] = {"vision_lr": 1e-5}
    trainer = RetrievalRun(parse_recipe(table), False, None, None)
    rates = {id(p): group["lr_scale"] for group in trainer.optimizer.param_groups for p in group["params"]}
    expected = {"clip.visual.trunk.": 0.01, "clip.text.transformer.": 0.1, "clip.logit_scale": 0.1}
    for name, parameter in trainer.model.named_parameters():
        scale = next((rate for prefix, rate in expected.items() if name.startswith(prefix)), 1.0)
        assert rates[id(parameter)] == pytest.approx(scale), name


def test_frames_without_augmentation_are_the_same_each_time() -> None:
    frame = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 129, 3), dtype=np.uint8))
    config = {"input_size": (3, 32, 32), "mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bicubic"}
    augment = ClipAugment(config, (1.0, 1.0), (1.0, 1.0), 0.0, 0.0)
    views = [augment([frame]) for _ in range(8)]
    assert all(torch.equal(view, views[0]) for view in views)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"towers": {"cache": "x"}}, "towers.cache is for frozen towers"),
        ({"towers": {"freeze": ["audio"]}}, "towers.freeze"),
        ({"towers": {"freeze": ["vision"], "vision_lr": 1e-4}}, "towers.vision_lr is 0.0001, and towers.freeze has"),
        ({"model": {"lock_image_tower": True}}, "towers.freeze and model.lock_image_tower exclude each other"),
        ({"model": {"freeze_layers": 0}}, "towers.freeze and model.freeze_layers exclude each other"),
        ({"augment": {"hflip": 0.5}}, "the same videos in each epoch, and augment.hflip is 0.5"),
        ({"augment": {"scale": [0.5, 1.0]}}, r"augment.scale is \(0.5, 1.0\)"),
        ({"run": {"fsdp": True}}, "towers.cache does not go with run.fsdp"),
    ],
)
def test_a_section_of_towers_that_cannot_be_is_refused(
    table: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    for section, values in changes.items():
        table[section] = values if section == "towers" else {**table.get(section, {}), **values}
    with pytest.raises(RecipeError, match=says):
        parse_recipe(table)


def test_a_run_goes_on_with_its_states_in_another_place(table: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse_recipe(table)
    Checkpoints(tmp_path, recipe, resume=False).write_recipe()
    for cache in (str(tmp_path / "elsewhere"), None):
        assert recipe.towers is not None
        Checkpoints(tmp_path, replace(recipe, towers=replace(recipe.towers, cache=cache)), resume=True)
    with pytest.raises(RecipeError, match="towers.freeze was"):
        Checkpoints(tmp_path, replace(recipe, towers=replace(recipe.towers, freeze=["text"], cache=None)), resume=True)


def test_a_cached_tower_has_no_masks(table: dict[str, Any], tmp_path: Path) -> None:
    table["model"]["kwargs"]["lam_in"] = ["text"]
    with pytest.raises(RecipeError, match="the text tower has masks, which are trained; leave 'text' out of"):
        RetrievalRun(parse_recipe(table), False, None, None)


@pytest.mark.slow
def test_augmented_frames_are_encoded_in_each_epoch_though_texts_are_cached(table: dict[str, Any]) -> None:
    table["towers"]["freeze"], table["augment"] = ["text"], {"hflip": 0.5}
    trainer = RetrievalRun(parse_recipe(table), False, None, None)
    frames, _, tokens, states = next(iter(trainer.loader))
    assert (frames.shape[1:], tokens.shape[1:], states.shape[1:]) == ((3, 3, 32, 32), (16,), (17, 32))


@pytest.mark.slow
def test_the_origin_of_states_is_json(table: dict[str, Any], tmp_path: Path) -> None:
    RetrievalRun(parse_recipe(table), False, None, None)
    with np.load(tmp_path / "cache" / "vision-train.npz") as arrays:
        origin = json.loads(str(arrays["origin"]))
        assert (arrays["states"].shape, len(arrays["offsets"])) == ((24 * 3 * 5, 32), 25)
    assert origin["sampling"]["max_frames"] == 3
    assert origin["data"]["groups"]["videos"]["count"] == 24
