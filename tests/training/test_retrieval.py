"""Training of retrieval: the loss is that of the whole batch however it is cut, spread or interrupted."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss
from safetensors.torch import load_file
from torch import Tensor

import lamzoo
from lamzoo.errors import LamzooError, RecipeError
from lamzoo.training import TrainResult, parse_recipe, train
from lamzoo.training.retrieval.contrastive import contrastive_loss
from lamzoo.training.retrieval.run import RetrievalRun
from lamzoo.training.retrieval.second_stage import group_loss, hard_negatives, matching_loss
from tests.training.processes import train_in_two, train_killed
from tests.training.retrieval_data import retrieval_table, write_faces

HELD_BY_RECIPE = ("epoch", "update", "lr", "train_loss", "eval_t2v_R1", "eval_t2v_MedianR", "eval_v2t_R1")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"))


@pytest.fixture
def table(faces: Path, tmp_path: Path) -> dict[str, Any]:
    return retrieval_table(faces, tmp_path / "out")


def run(table: dict[str, Any], output: Path, **changes: Any) -> TrainResult:
    return train(parse_recipe({**table, "run": {**table["run"], "output": str(output), **changes}}))


def curve(history: list[dict[str, float]]) -> torch.Tensor:
    return torch.tensor([[float(record[key]) for key in HELD_BY_RECIPE] for record in history])


def test_the_loss_is_open_clips() -> None:
    text, video = torch.nn.functional.normalize(torch.randn(2, 7, 5, generator=torch.manual_seed(0)), dim=-1)
    expected = ClipLoss()(video, text, torch.tensor(20.0))
    torch.testing.assert_close(contrastive_loss(20.0 * text @ video.T), expected)


def test_every_video_of_an_equal_caption_is_a_target() -> None:
    similarity = torch.randn(4, 4, generator=torch.manual_seed(0))
    captions = torch.tensor([0, 1, 0, 2])
    positives = captions[:, None] == captions
    expected = torch.zeros(())
    for scores in (similarity, similarity.T):
        logs = scores.log_softmax(1)
        for row in range(4):
            expected -= logs[row, positives[row]].mean() / 8
    torch.testing.assert_close(contrastive_loss(similarity, positives), expected)
    alone = torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(contrastive_loss(similarity, alone), contrastive_loss(similarity))


def test_it_learns_to_find_what_it_has_not_seen(table: dict[str, Any], tmp_path: Path) -> None:
    table["optimizer"]["lr"] = 1e-3
    table["schedule"]["epochs"] = 12
    result = run(table, tmp_path / "out", ema_decay=0.8, report=True)
    assert result.scores["test"]["t2v"]["R1"] > 60  # of 12, chance 8.3
    rows = list(csv.DictReader((result.output / "metrics.csv").open()))
    assert float(rows[-1]["eval_t2v_R1"]) == result.scores["val"]["t2v"]["R1"]
    assert result.report is not None
    assert "text to video" in result.report.read_text()
    assert (result.report.parent / "curves.png").stat().st_size > 1000
    model: Any = lamzoo.create_model(f"local-dir:{result.model}", pretrained=True).eval()
    assert model.lam_config == lamzoo.LamConfig(rank=2)
    assert model.max_frames == 3


def test_negatives_do_not_match_and_the_most_similar_ones_are_the_likeliest() -> None:
    random = torch.manual_seed(0)
    similarity = 3 * torch.randn(6, 6, generator=random)
    names = torch.tensor([0, 0, 1, 2, 3, 4])
    positives = names[:, None] == names
    drawn = torch.stack([hard_negatives(similarity, positives, random) for _ in range(4000)])
    shares = torch.nn.functional.one_hot(drawn, 6).float().mean(dim=0)
    assert not shares[positives].any()
    expected = similarity.masked_fill(positives, float("-inf")).softmax(dim=1)
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.04)  # five standard errors
    everything = torch.ones(6, 6, dtype=torch.bool)
    assert hard_negatives(similarity, everything, random).tolist() == [-1] * 6


def pairs(table: dict[str, Any], count: int) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    """Returns a model with a joint transformer, and random texts and videos with their mask."""
    table["data"]["captions"] = "one"
    recipe = parse_recipe({**table, "matching": {}})
    recipe.model.kwargs["similarity"] = "tight"
    model = RetrievalRun(recipe, False, None, None).model
    random = torch.manual_seed(0)
    text, video = torch.randn(count, 32, generator=random), torch.randn(count, 3, 32, generator=random)
    return model, (text, video, torch.ones(count, 3, dtype=torch.bool))


def test_the_matching_loss_is_the_cross_entropy_of_pairs_and_hard_negatives(table: dict[str, Any]) -> None:
    model, (text, video, mask) = pairs(table, 4)
    own = torch.eye(4, dtype=torch.bool)
    dual = model.dual_similarity(text, video, mask)
    loss = matching_loss(model, text, video, mask, dual, own, torch.Generator().manual_seed(1))
    again = torch.Generator().manual_seed(1)
    videos, texts = hard_negatives(dual, own, again), hard_negatives(dual.T, own, again)
    joint = model.similarity(text, video, mask)
    right, wrong = joint.diagonal(), torch.cat([joint[range(4), videos], joint[texts, range(4)]])
    expected = -torch.cat([right.sigmoid().log(), (-wrong).sigmoid().log()]).mean()
    torch.testing.assert_close(loss, expected)


def test_the_loss_of_groups_is_the_contrastive_one_of_each(table: dict[str, Any]) -> None:
    model, (text, video, mask) = pairs(table, 5)
    own = torch.eye(5, dtype=torch.bool)
    joint = model.similarity(text, video, mask)
    parts = [contrastive_loss(joint[some, some]) * count for some, count in ((slice(3), 3), (slice(3, 5), 2))]
    torch.testing.assert_close(group_loss(model, text, video, mask, own, 3), sum(parts) / 5)
    torch.testing.assert_close(group_loss(model, text, video, mask, own, 8), contrastive_loss(joint))
    alike = own.clone()
    alike[0, 1] = alike[1, 0] = True
    expected = contrastive_loss(joint.masked_fill(alike & ~own, float("-inf")))
    torch.testing.assert_close(group_loss(model, text, video, mask, alike, 8), expected)


@pytest.mark.slow
def test_two_stages_learn_to_find_what_they_have_not_seen(table: dict[str, Any], tmp_path: Path) -> None:
    table["model"]["kwargs"]["similarity"] = "tight"
    table["matching"], table["data"]["captions"] = {"rerank": 4}, "one"
    table["optimizer"]["lr"] = 1e-3
    table["schedule"]["epochs"] = 30
    result = run(table, tmp_path / "out", ema_decay=0.8)
    assert result.scores["test"]["t2v"]["R1"] > 60  # of 12, chance 8.3


def test_a_second_stage_needs_a_joint_transformer(table: dict[str, Any], tmp_path: Path) -> None:
    table["matching"] = {}
    with pytest.raises(RecipeError, match="must not have a video twice, and data.captions is 'all'; set it to 'one'"):
        parse_recipe(table)
    table["data"]["captions"] = "one"
    with pytest.raises(LamzooError, match='rerank needs a model with a joint transformer, similarity="tight"'):
        run(table, tmp_path / "out")


@pytest.mark.parametrize(
    ("similarity", "equal", "matching"),
    [
        pytest.param("mean", "positives", None, marks=pytest.mark.slow),
        pytest.param("seq", "negatives", None, marks=pytest.mark.slow),
        pytest.param("tight", "negatives", None, marks=pytest.mark.slow),
        ("tight", "positives", {}),
    ],
)
def test_passes_in_parts_do_not_change_the_curve(
    table: dict[str, Any], tmp_path: Path, similarity: str, equal: str, matching: dict[str, Any] | None
) -> None:
    table["model"]["kwargs"] |= {"similarity": similarity, "lam_in": ["vision"]}
    if matching is not None:
        table["matching"], table["data"]["captions"] = matching, "one"
    table["data"]["equal_captions"] = equal
    table["optimizer"]["lr"] = 1e-3
    whole = run(table, tmp_path / "whole")
    parts = run(table, tmp_path / "parts", accumulation=4)
    torch.testing.assert_close(curve(parts.history), curve(whole.history), rtol=1e-4, atol=1e-4)


def test_passes_in_parts_draw_the_same_dropout_twice(table: dict[str, Any], tmp_path: Path) -> None:
    table["model"]["kwargs"]["clip"]["vision_cfg"]["patch_dropout"] = 0.5
    recipe = parse_recipe({**table, "run": {**table["run"], "accumulation": 2}})
    trainer = RetrievalRun(recipe, False, None, None)
    trainer.train_mode()
    batches = [batch for batch, _ in zip(trainer.loader, range(2), strict=False)]
    seen: list[torch.Tensor] = []
    hook = trainer.model.clip.visual.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trainer.backward(0, 0, batches)
    hook.remove()
    first, second = seen[:2], seen[2:]
    assert len(second) == 2
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)
    assert not torch.equal(first[0], first[1])


def test_a_merged_model_learns_as_in_one_pass_and_is_saved_with_its_frames(
    table: dict[str, Any], tmp_path: Path
) -> None:
    table["model"]["kwargs"]["clip"]["vision_cfg"]["layers"] = 2
    table["schedule"]["epochs"] = 1
    table |= {"reduction": {"keep": 0.5, "frames": 0.67}}
    table["optimizer"]["lr"] = 1e-3
    whole = run(table, tmp_path / "whole")
    parts = run(table, tmp_path / "parts", accumulation=4)
    torch.testing.assert_close(curve(parts.history), curve(whole.history), rtol=1e-4, atol=1e-4)
    model: Any = lamzoo.create_model(f"local-dir:{whole.model}", pretrained=True)
    assert model.token_reduction == lamzoo.TokenReduction(0.5, frames=0.67)


def test_a_retrieval_recipe_does_not_prune(table: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="reduction.method is 'prune', which only classifiers are trained with"):
        parse_recipe(table | {"reduction": {"method": "prune", "keep": 0.5}})


@pytest.mark.parametrize("killed_at", [6, *(pytest.param(each, marks=pytest.mark.slow) for each in (3, 10))])
def test_killed_run_resumes_to_the_same_curve(table: dict[str, Any], tmp_path: Path, killed_at: int) -> None:
    table["augment"] = {"scale": [0.6, 1.0], "ratio": [0.8, 1.2], "hflip": 0.5, "color_jitter": 0.2}
    table["run"] |= {"ema_decay": 0.9, "checkpoint_interval": 2}
    whole = run(table, tmp_path / "whole")
    resumed = train_killed(table, tmp_path / "killed", killed_at)
    assert torch.equal(curve(resumed.history), curve(whole.history))
    expected, weights = (load_file(result.model / "model.safetensors") for result in (whole, resumed))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_workers_do_not_change_the_curve(table: dict[str, Any], tmp_path: Path) -> None:
    table["augment"] = {"hflip": 0.5, "color_jitter": 0.2}
    table["schedule"]["epochs"] = 1
    alone = run(table, tmp_path / "alone")
    table["data"]["workers"] = 1
    assert torch.equal(curve(run(table, tmp_path / "workers").history), curve(alone.history))


@pytest.mark.parametrize(
    ("similarity", "equal", "matching"),
    [
        pytest.param("seq", "positives", None, marks=pytest.mark.slow),
        pytest.param("tight", "negatives", None, marks=pytest.mark.slow),
        ("tight", "negatives", {"rerank": 4}),
        pytest.param("tight", "negatives", {"rerank": 4, "negatives": "group", "group": 2}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_the_curve_of_one(
    table: dict[str, Any], tmp_path: Path, similarity: str, equal: str, matching: dict[str, Any] | None
) -> None:
    table["model"]["kwargs"]["similarity"] = similarity
    if matching is not None:
        table["matching"], table["data"]["captions"] = matching, "one"
    table["data"]["equal_captions"] = equal
    table["optimizer"]["lr"] = 1e-3
    alone = run(table, tmp_path / "alone")
    table["run"] |= {"accumulation": 2}
    rows = train_in_two(table, tmp_path / "two")
    torch.testing.assert_close(curve(rows), curve(alone.history), rtol=1e-4, atol=1e-4)


def test_towers_learn_at_a_rate_of_their_own(table: dict[str, Any], tmp_path: Path) -> None:
    table["optimizer"] |= {"lr": 1e-3, "tower_lr": 1e-5}
    trainer = RetrievalRun(parse_recipe(table), False, None, None)
    rates = {id(p): group["lr_scale"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        tower = name.startswith("clip.") and ".lam." not in name
        assert rates[id(parameter)] == pytest.approx(0.01 if tower else 1.0), name


def test_a_locked_tower_stays_as_it_was(table: dict[str, Any], tmp_path: Path) -> None:
    table["model"] |= {"lock_image_tower": True}
    table["schedule"]["epochs"] = 1
    recipe = parse_recipe(table)
    before = {k: v.clone() for k, v in RetrievalRun(recipe, False, None, None).model.state_dict().items()}
    after = load_file(train(recipe).model / "model.safetensors")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("clip.visual.") for name in changed)
    assert any(name.startswith("clip.transformer.") for name in changed)


def test_one_caption_a_video_is_drawn_anew_each_epoch(faces: Path, table: dict[str, Any]) -> None:
    table["data"]["captions"] = "one"
    trainer = RetrievalRun(parse_recipe(table), False, None, None)
    assert len(trainer.seeded) == 48


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "retreival"}, "'retreival' is unknown; did you mean 'retrieval'"),
        ({"data": {"fpz": 3}}, "data.fpz is unknown; did you mean data.fps"),
        ({"data": {"fps": -1.0}}, "data.fps is -1.0"),
        ({"data": {"max_frames": 0}}, "data.max_frames is 0"),
        ({"data": {"eval_split": "train"}}, "48 videos of .* would be used for training and scoring"),
        ({"data": {"eval_split": "absent"}}, "absent"),
        ({"augment": {"splice": 2.0}}, "augment.splice is 2.0"),
        ({"augment": {"phrase": -0.5}}, "augment.phrase is -0.5"),
        ({"augment": {"scale": [0.5, 0.1]}}, "augment.scale"),
        ({"optimizer": {"tower_lr": 0.0}}, "optimizer.tower_lr is 0.0"),
        ({"model": {"lock_image_tower": True, "freeze_layers": 1}}, "exclude each other"),
        ({"model": {"name": "lam_vit_micro", "kwargs": {"num_classes": 10}, "lam": {}}}, "no argument 'max_frames'"),
        ({"run": {"batch_size": 64}}, "run.batch_size is 64, but .* has only 48 pairs"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_and_leaves_nothing(
    table: dict[str, Any], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    for section, values in changes.items():
        if section == "model" and "name" in values:
            table[section] = values
        else:
            table[section] = {**table.get(section, {}), **values} if isinstance(values, dict) else values
    with pytest.raises(LamzooError, match=says):
        train(parse_recipe(table))
    assert not (tmp_path / "out").exists()
