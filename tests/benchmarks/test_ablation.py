"""The ablation: its rows are fair, and what was run is neither run again nor mistabled."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

import lamzoo
from benchmarks.ablation import run as ablation
from benchmarks.ablation.table import table
from lamzoo.lam import LamConfig
from lamzoo.training import Recipe
from lamzoo.training.config_reader import read_recipe
from lamzoo.training.recipe import AnyRecipe

FILE = ablation.HERE / "ablation.toml"
ROWS = list(ablation.read_ablation(FILE).rows)
TRAINED = [file for file in sorted(ablation.HERE.glob("*.toml")) if (ablation.RESULTS / f"{file.stem}.csv").exists()]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    runs = ablation.plan(FILE, tmp_path_factory.mktemp("plan"), ROWS, [0], [])
    return {run.row: run.recipe for run in runs}


def parameters(recipe: AnyRecipe, **kwargs: int) -> int:
    lam = None if recipe.model.lam is None else LamConfig.from_dict(recipe.model.lam)
    with torch.device("meta"):
        model = lamzoo.create_model(recipe.model.name, lam=lam, **kwargs, **recipe.model.kwargs)
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_row_that_was_asked_for_is_there(recipes: dict[str, Recipe]) -> None:
    lams = [LamConfig.from_dict(recipe.model.lam) for recipe in recipes.values() if recipe.model.lam is not None]
    for field in ("layers", "keys", "op", "sign", "heads"):
        assert len({getattr(lam, field) for lam in lams}) == 2, field
    assert {lam.rank for lam in lams} == {4, 16, 64}
    assert sum(recipe.model.lam is None for recipe in recipes.values()) == 3


def test_the_wider_mlp_has_the_base_masks_parameters_within_two_percent(recipes: dict[str, Recipe]) -> None:
    wider, base = (parameters(recipes[row], num_classes=10) for row in ("mlp", "base"))
    assert wider == pytest.approx(base, rel=0.02)


ONE_FACTOR = [("base", row) for row in ("single", "position", "free", "shared", "rank-4", "rank-64")]
ONE_FACTOR += [("add", row) for row in ("free", "add-shared", "add-position", "add-rank-4")]


@pytest.mark.parametrize(("reference", "row"), ONE_FACTOR)
def test_a_row_changes_one_factor_of_its_reference(recipes: dict[str, Recipe], reference: str, row: str) -> None:
    base, other = recipes[reference].model.lam, recipes[row].model.lam
    assert base is not None
    assert other is not None
    assert sum(base[key] != other[key] for key in base) == 1


def test_the_image_models_are_compared_with_as_many_parameters(tmp_path: Path) -> None:
    runs = ablation.plan(ablation.HERE / "micro.toml", tmp_path, ["plain", "mlp", "mask"], [0, 1, 2], [])
    assert [(run.row, run.recipe.run.seed) for run in runs[:4]] == [("plain", 0), ("mlp", 0), ("mask", 0), ("plain", 1)]
    plain, wider, masked = (parameters(run.recipe, num_classes=10) for run in runs[:3])
    assert wider == pytest.approx(masked, rel=1e-3) and plain < wider
    assert all(run.recipe.optimizer == runs[0].recipe.optimizer for run in runs)
    tiny = ablation.plan(ablation.HERE / "tinyimagenet100.toml", tmp_path, ["plain", "mask"], [0], [])
    assert {run.recipe.schedule.epochs for run in tiny} == {14}


def test_masks_are_compared_with_the_same_encoding_of_positions(tmp_path: Path) -> None:
    file = ablation.HERE / "positions.toml"
    rows = ablation.read_ablation(file).rows
    runs = {run.row: run.recipe for run in ablation.plan(file, tmp_path, list(rows), [0], [])}
    for row, recipe in runs.items():
        other = runs[rows[row].reference or "plain"]
        assert recipe.schedule == other.schedule, row
        if row.endswith("-mask"):
            assert recipe.model.kwargs == other.model.kwargs, row
        assert parameters(recipe, num_classes=10)  # can be built
    base = ablation.plan(FILE, tmp_path, ["plain", "add-position"], [0], [])
    for row, run in zip(("plain", "mask"), base, strict=True):  # the rows that are trained again are the same
        assert (runs[row].model.kwargs, runs[row].model.lam) == (run.recipe.model.kwargs, run.recipe.model.lam)
        assert (runs[row].optimizer, runs[row].schedule) == (run.recipe.optimizer, run.recipe.schedule)


def test_rows_differ_in_nothing_but_the_model(recipes: dict[str, Recipe]) -> None:
    plain = recipes["plain"]
    for row, recipe in recipes.items():
        for section in ("data", "augment", "optimizer", "schedule"):
            assert getattr(recipe, section) == getattr(plain, section), row
        assert recipe.run.seed == plain.run.seed


@pytest.mark.parametrize("name", ["grid", "flickr8k"])
def test_retrieval_compares_plain_single_multi_and_as_many_parameters(tmp_path: Path, name: str) -> None:
    file = ablation.HERE / f"{name}.toml"
    rows = list(ablation.read_ablation(file).rows)
    recipes = {run.row: run.recipe for run in ablation.plan(file, tmp_path, rows, [0], [])}
    frames = {"max_frames": recipes["plain"].data.max_frames}
    count = {row: parameters(recipe, **frames) for row, recipe in recipes.items()}
    assert count["plain"] < count["single"] < count["multi"]
    assert count["mlp"] == pytest.approx(count["multi"], rel=0.001)
    for row, recipe in recipes.items():
        for section in ("data", "augment", "optimizer", "schedule"):
            assert getattr(recipe, section) == getattr(recipes["plain"], section), row


def test_captions_compare_masks_with_as_many_parameters_in_each_setting(tmp_path: Path) -> None:
    file = ablation.HERE / "captions.toml"
    tables = ablation.read_ablation(file)
    recipes = {run.row: run.recipe for run in ablation.plan(file, tmp_path, list(tables.rows), [0], [])}
    for setting in ("damaged", "both", "audio", "video"):
        rows = {row.partition("_")[2]: recipe for row, recipe in recipes.items() if row.startswith(f"{setting}_")}
        count = {row: parameters(recipe) for row, recipe in rows.items()}
        assert count["plain"] < count["single"] < count["multi"] < count["layer"]
        assert count["mlp"] == pytest.approx(count["multi"], rel=0.001)
        for row, recipe in rows.items():
            for section in ("data", "augment", "loss", "optimizer", "schedule"):
                assert getattr(recipe, section) == getattr(rows["plain"], section), row
            reference = tables.rows[f"{setting}_{row}"].reference or tables.reference
            assert reference == f"{setting}_plain"


def test_moments_compare_masks_with_as_many_parameters_and_what_an_ablation_sets_is_its_recipe(tmp_path: Path) -> None:
    file = ablation.HERE / "moments.toml"
    rows = list(ablation.read_ablation(file).rows)
    recipes = {run.row: run.recipe for run in ablation.plan(file, tmp_path, rows, [0], [])}
    count = {row: parameters(recipe, video_dim=642, text_dim=51) for row, recipe in recipes.items()}
    assert count["plain"] < count["single"] < count["multi"] < count["decoder"]
    assert count["mlp"] == pytest.approx(count["multi"], rel=0.002)
    for row, recipe in recipes.items():
        assert recipe.schedule.epochs == 10, row
        for section in ("augment", "loss", "optimizer", "schedule"):
            assert getattr(recipe, section) == getattr(recipes["plain"], section), row


def test_each_row_and_seed_has_a_digest_of_its_own(tmp_path: Path) -> None:
    runs = ablation.plan(FILE, tmp_path, ROWS, [0, 1], [])
    assert [run.recipe.run.seed for run in runs] == [0] * len(ROWS) + [1] * len(ROWS)
    assert len({run.sha256 for run in runs}) == len(runs)


@pytest.mark.parametrize("file", TRAINED, ids=lambda file: file.stem)
def test_stored_results_are_known_as_done_and_keep_the_last_weights(file: Path) -> None:
    tables = ablation.read_ablation(file)
    assert tables.recipe["run"]["keep"] == "last"
    lines = ablation.read_results(ablation.RESULTS / f"{file.stem}.csv")
    assert lines
    for line in lines:
        changes = (*tables.rows[line["row"]].set, f"run.seed={line['seed']}")
        assert ablation.recipe_digest(tables.recipe, changes) == line["recipe_sha256"], (line["row"], line["seed"])


def test_recipes_keep_the_last_weights() -> None:
    files = list((ablation.ROOT / "benchmarks" / "recipes").glob("*.toml"))
    assert files
    for file in files:
        assert read_recipe(file)["run"]["keep"] == "last", file.name


def test_a_row_may_have_more_seeds_than_the_others(tmp_path: Path) -> None:
    runs = ablation.plan(ablation.HERE / "moments.toml", tmp_path, ["plain", "mlp"], None, [])
    assert [(run.recipe.run.seed, run.row) for run in runs] == [
        (0, "plain"), (0, "mlp"), (1, "plain"), (1, "mlp"), (2, "plain"), (2, "mlp"),
        (3, "plain"), (4, "plain"), (5, "plain"),
    ]  # fmt: skip


def test_seeds_run_in_the_order_given(tmp_path: Path) -> None:
    runs = ablation.plan(ablation.HERE / "moments.toml", tmp_path, ["plain", "mlp"], [4, 0], [])
    assert [(run.recipe.run.seed, run.row) for run in runs] == [(4, "plain"), (4, "mlp"), (0, "plain"), (0, "mlp")]


def test_the_digest_does_not_depend_on_where_the_run_is_kept(tmp_path: Path) -> None:
    here, there = (ablation.plan(FILE, tmp_path / name, ["plain"], [0], [])[0] for name in "ab")
    assert here.sha256 == there.sha256


def test_an_unknown_row_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no rows plian; use plain, mlp"):
        ablation.plan(FILE, tmp_path, ["plian"], [0], [])


def test_scores_are_those_of_the_last_split_that_a_report_names() -> None:
    image = {"scores": {"test": {"images": 9, "top1": 70.96, "loss": 0.862491}}}
    assert ablation.final_scores(image, "classification") == {"top1": 70.96, "eval_loss": 0.8625}
    videos = {
        split: {way: {"R1": value, "R5": 20.0, "R10": 30.0, "MedianR": 9.5, "R50": 80.0} for way in ("t2v", "v2t")}
        for split, value in {"validation": 12.0, "test": 11.0}.items()
    }
    assert ablation.final_scores({"scores": videos}, "retrieval") == {
        "t2v_R1": 11.0, "t2v_R5": 20.0, "t2v_R10": 30.0, "t2v_MedianR": 9.5,
        "v2t_R1": 11.0, "v2t_R5": 20.0, "v2t_R10": 30.0, "v2t_MedianR": 9.5,
    }  # fmt: skip


def result(row: str, seed: int, top1: float) -> dict[str, Any]:
    cost = {"params_m": 0.3, "lam_params_m": 0.1, "gmacs": 0.02, "lam_gmacs": 0.003}
    return {"row": row, "seed": seed, "top1": top1} | cost


def test_the_table_takes_differences_seed_by_seed(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    for row, scores in {"plain": (70.0, 72.0), "base": (71.0, 73.0)}.items():
        for seed, top1 in enumerate(scores):
            ablation.add_result(results, result(row, seed, top1))
    lines = {line.split("|")[1].strip().partition(" ")[0]: line for line in table(FILE, results).splitlines()}
    assert "| 71.00 ± 1.41 |  | 2 |" in lines["plain"]
    assert "| 72.00 ± 1.41 | +1.00 ± 0.00 | 2 |" in lines["base:"]


def test_an_ablation_may_say_in_which_score_rows_are_compared(tmp_path: Path) -> None:
    flickr, results = ablation.HERE / "flickr8k.toml", tmp_path / "results.csv"
    for row, found in {"plain": (2.0, 14.0), "multi": (1.5, 16.0)}.items():
        scores = dict(zip(("t2v_R1", "t2v_R10"), found, strict=True))
        ablation.add_result(results, {"row": row, "seed": 0, **scores, "params_m": 1, "gmacs": 1, "lam_gmacs": 0})
    heads, _, plain, multi = table(flickr, results).splitlines()
    assert "| R@10 | vs. plain | R@1 |" in heads
    assert "| 14.00 |  | 2.00 |" in plain
    assert "| 16.00 | +2.00 | 1.50 |" in multi


def test_scores_that_are_not_in_percent_have_three_decimals(tmp_path: Path) -> None:
    flickr, results = ablation.HERE / "flickr8k_captions.toml", tmp_path / "results.csv"
    for row, found in {"plain": (0.15, 0.0816, 0.3), "multi": (0.156, 0.082, 0.3494)}.items():
        scores = dict(zip(("CIDEr", "Bleu_4", "ROUGE_L"), found, strict=True))
        ablation.add_result(results, {"row": row, "seed": 0, **scores, "params_m": 1, "gmacs": 1, "lam_gmacs": 0})
    _, _, plain, multi = table(flickr, results).splitlines()
    assert "| 0.150 |  | 0.082 | 0.300 |" in plain
    assert "| 0.156 | +0.006 | 0.082 | 0.349 |" in multi


def test_two_results_of_one_run_are_refused(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    ablation.add_result(results, result("plain", 0, 70.0))
    ablation.add_result(results, result("plain", 0, 71.0))
    with pytest.raises(ValueError, match="plain, seed 0 twice"):
        table(FILE, results)


def test_where_a_run_is_trained_is_no_part_of_its_identity(tmp_path: Path) -> None:
    machine = ["run.device=auto", "data.workers=3"]
    (here,) = ablation.plan(FILE, tmp_path, ["plain"], [0], [])
    (there,) = ablation.plan(FILE, tmp_path, ["plain"], [0], [], machine)
    assert here.sha256 == there.sha256
    assert (there.recipe.run.device, there.recipe.data.workers) == ("auto", 3)
    assert ablation.machine_of(argparse.Namespace(machine=machine)) == machine
    with pytest.raises(SystemExit, match=r"--machine optimizer\.lr=1: it takes run\.device,.*use --set"):
        ablation.machine_of(argparse.Namespace(machine=["optimizer.lr=1"]))
