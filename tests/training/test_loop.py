"""A run's curve depends on its recipe alone: not on kills, workers or processes."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.layers import use_fused_attn

import lamzoo
from lamzoo.errors import DataError, DivergedError, LamzooError, RecipeError, UnsupportedHostError
from lamzoo.records import to_toml
from lamzoo.tasks import TASKS
from lamzoo.tasks.classification import CLASSIFICATION
from lamzoo.training import TrainResult, loop, parse_recipe, train
from lamzoo.training.classification.run import ClassificationRun
from lamzoo.training.loaders import check_mixup
from lamzoo.training.splits import write_bad_inputs
from tests.forked import run_in_two
from tests.images import write_npz
from tests.operators import Operators
from tests.training.processes import start_in_two, train_failed, train_in_two, train_killed

HELD_BY_RECIPE = ("epoch", "update", "lr", "train_loss", "eval_loss", "eval_top1")


def curve(history: list[dict[str, float]]) -> list[tuple[float, ...]]:
    return [tuple(record[key] for key in HELD_BY_RECIPE) for record in history]


def assert_close(actual: list[tuple[float, ...]], expected: list[tuple[float, ...]]) -> None:
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def run(table: dict[str, Any], output: Path, **changes: Any) -> TrainResult:
    return train(parse_recipe({**table, "run": {**table["run"], "output": str(output), **changes}}))


def test_run_leaves_a_model_that_loads_by_name(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    result = run(recipe_table, tmp_path / "out", ema_decay=0.9)
    assert [record["update"] for record in result.history] == [6, 12]
    rows = list(csv.DictReader((result.output / "metrics.csv").open()))
    assert float(rows[-1]["eval_top1"]) == result.history[-1]["eval_top1"]
    model = lamzoo.create_model(f"local-dir:{result.model}", pretrained=True)
    assert model.lam_config == lamzoo.LamConfig(rank=2)
    assert list(model.pretrained_cfg["label_names"]) == ["blue", "red"]


def test_tensorboard_log_is_written(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["schedule"]["epochs"] = 1
    result = run(recipe_table, tmp_path / "out", tensorboard=True)
    (log,) = result.output.glob("tensorboard/events.*")
    events = EventAccumulator(str(log)).Reload()
    logged = events.Scalars("train_loss")
    assert [event.step for event in logged] == [6]
    assert logged[0].value == pytest.approx(result.history[0]["train_loss"])


def test_tensorboard_log_that_cannot_be_written_is_named(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tensorboard").write_text("")
    with pytest.raises(RecipeError, match=r"TensorBoard log .*tensorboard.* can't be written .*tensorboard=false"):
        run(recipe_table, tmp_path / "out", tensorboard=True)


def test_training_lowers_the_loss(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["schedule"]["epochs"] = 6
    losses = [record["train_loss"] for record in run(recipe_table, tmp_path / "out").history]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("killed_at", [6, *(pytest.param(each, marks=pytest.mark.slow) for each in (3, 10))])
def test_killed_run_resumes_to_the_same_curve(recipe_table: dict[str, Any], tmp_path: Path, killed_at: int) -> None:
    recipe_table["augment"] |= {"mixup": 0.5, "color_jitter": 0.2, "auto_augment": "rand-m5"}
    recipe_table["run"] |= {"ema_decay": 0.9, "checkpoint_interval": 2}
    recipe_table["model"]["kwargs"]["drop_path_rate"] = 0.2
    whole = run(recipe_table, tmp_path / "whole")
    resumed = train_killed(recipe_table, tmp_path / "killed", killed_at)
    assert curve(resumed.history) == curve(whole.history)
    expected, weights = (load_file(result.model / "model.safetensors") for result in (whole, resumed))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("left_out", [False, True])
def test_a_resumed_run_reads_its_images_again_only_if_some_were_left_out(
    recipe_table: dict[str, Any], tmp_path: Path, left_out: bool
) -> None:
    def scans() -> int:
        seen: list[Any] = []
        train(recipe, resume=True, scanning=lambda *progress: seen.append(progress))
        return len(seen)

    recipe_table["run"]["output"] = str(tmp_path / "out")
    recipe = parse_recipe(recipe_table)
    assert scans()
    if left_out:
        write_bad_inputs(tmp_path / "out" / "bad-inputs.csv", [])
    assert bool(scans()) == left_out


@pytest.mark.parametrize("processes", [1, 2])
def test_the_end_of_another_process_is_one_sentence(
    recipe_table: dict[str, Any], monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    def lost(*args: Any) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1")

    monkeypatch.setattr(loop, "create_run", lost)
    monkeypatch.setattr(loop.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(loop.dist, "get_world_size", lambda: processes)
    with pytest.raises(RuntimeError if processes == 1 else LamzooError, match="gloo" if processes == 1 else "--resume"):
        train(parse_recipe(recipe_table))


def test_an_evaluation_that_fails_does_not_cost_the_epoch(
    recipe_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_table["run"]["ema_decay"] = 0.9
    whole = run(recipe_table, tmp_path / "whole")
    resumed = train_failed(recipe_table, tmp_path / "failed", ClassificationRun, monkeypatch)
    assert curve(resumed.history) == curve(whole.history)


def test_a_run_goes_through_its_cooldown_epochs(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["schedule"] |= {"epochs": 1, "cooldown_epochs": 1, "min_lr": 1e-3}
    result = train_killed(recipe_table, tmp_path / "out", 9)
    assert [record["update"] for record in result.history] == [6, 12]
    assert result.history[0]["lr"] > result.history[1]["lr"] == 1e-3
    assert "eval_top1" in result.history[1]


def held_out(table: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The recipe with three epochs, watched on images that it holds out of the training images."""
    table["data"] = {"source": table["data"]["source"], "val_fraction": 0.25}
    table["schedule"]["epochs"] = 3
    table["run"] |= changes
    return table


def watch(monkeypatch: pytest.MonkeyPatch, scores: tuple[float, ...]) -> list[dict[str, torch.Tensor]]:
    """Lets the epochs of a run have these scores; returns the list that gets their weights."""
    weights: list[dict[str, torch.Tensor]] = []
    real = ClassificationRun.evaluate

    def evaluate(self: ClassificationRun) -> dict[str, float]:
        found = real(self)
        if len(weights) < len(scores):
            weights.append({name: value.clone() for name, value in self.evaluated_model.state_dict().items()})
            found["eval_top1"] = scores[len(weights) - 1]
        return found

    monkeypatch.setattr(ClassificationRun, "evaluate", evaluate)
    return weights


def watch_lower(monkeypatch: pytest.MonkeyPatch, lower: bool) -> None:
    """Has the watched metric be better where it is lower."""
    top1, *others = CLASSIFICATION.metrics
    metrics = (replace(top1, higher_is_better=not lower), *others)
    monkeypatch.setitem(TASKS, "classification", replace(CLASSIFICATION, metrics=metrics))


def same(folder: Path, weights: dict[str, torch.Tensor]) -> bool:
    stored = load_file(folder / "model.safetensors")
    return all(torch.equal(stored[name], value) for name, value in weights.items())


@pytest.mark.parametrize(("scores", "lower"), [((70.0, 70.0, 60.0), False), ((50.0, 40.0, 60.0), True)])
def test_the_best_weights_by_validation_are_kept_beside_the_last(
    recipe_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    scores: tuple[float, ...], lower: bool,
) -> None:  # fmt: skip
    watch_lower(monkeypatch, lower)
    weights = watch(monkeypatch, scores)
    result = run(held_out(recipe_table, report=True), tmp_path / "out", ema_decay=0.5)
    assert result.epoch == 2  # of equals the later
    assert same(result.model, weights[1]) and same(result.output / "last", weights[-1])
    assert not same(result.model, weights[-1])
    assert result.report is not None
    text = result.report.read_text("utf-8")
    assert f"those of epoch 2 of 3, the best by top1 on validation ({scores[1]:.2f}); the last epoch's" in text


def test_a_run_that_was_killed_keeps_its_best(
    recipe_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = watch(monkeypatch, (70.0, 50.0, 60.0))
    result = train_killed(held_out(recipe_table), tmp_path / "out", 7)
    assert result.epoch == 1
    assert same(result.model, weights[0]) and same(result.output / "last", weights[-1])


def test_a_run_that_goes_back_before_its_best_names_no_other_weights_as_the_best(
    recipe_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = watch(monkeypatch, (70.0, 80.0, 60.0, 60.0))
    changes = {"checkpoint_interval": 5, "output": str(tmp_path / "out")}

    def damage(output: Path) -> None:
        newest = max(output.glob("checkpoints/update-*"))
        (newest / "optimizer.bin").unlink()

    result = train_killed(held_out(recipe_table, **changes), tmp_path / "out", 9, damage)
    assert "does not hold the best weights, of epoch 1" in caplog.text
    assert result.epoch == 3 and same(result.model, weights[3])


@pytest.mark.parametrize(
    ("data", "changes", "why"),
    [
        ({"eval_split": "test"}, {}, "test was watched, and weights are not selected on a test split"),
        ({"val_fraction": 0.25}, {"keep": "last"}, 'run.keep is "last"'),
    ],
)
def test_the_last_weights_are_kept_where_nothing_may_be_chosen(
    recipe_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    data: dict[str, Any], changes: dict[str, Any], why: str,
) -> None:  # fmt: skip
    recipe_table["data"] = {"source": recipe_table["data"]["source"], **data}
    weights = watch(monkeypatch, (70.0, 50.0))
    result = run(recipe_table, tmp_path / "out", **changes)
    assert why in result.about
    assert result.epoch == 2 and same(result.model, weights[1])
    assert not (result.output / "last").exists()


def test_weights_that_were_overwritten_are_not_named_as_the_best(
    recipe_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = watch(monkeypatch, (70.0, 50.0))
    table = held_out(recipe_table, output=str(tmp_path / "out"), keep="best")
    table["schedule"]["epochs"] = 2
    assert train(parse_recipe(table)).epoch == 1
    for keep in ("last", "best"):
        table["run"]["keep"] = keep
        result = train(parse_recipe(table), resume=True)
        assert result.epoch == 2 and "those of the last epoch, not of the best" in result.about
        assert same(result.model, weights[1])


@pytest.mark.parametrize(
    ("scores", "lower", "said"),
    [((80.0, 70.0), False, "could be kept (epoch 1 scored better)."), ((80.0, 70.0), True, "(70.00).")],
)
def test_the_best_is_of_the_epochs_that_could_be_kept(
    recipe_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    scores: tuple[float, ...], lower: bool, said: str,
) -> None:  # fmt: skip
    watch_lower(monkeypatch, lower)
    watch(monkeypatch, scores)
    table = held_out(recipe_table, output=str(tmp_path / "out"), keep="last")
    table["schedule"]["epochs"] = 1
    train(parse_recipe(table))
    table["run"]["keep"], table["schedule"]["epochs"] = "best", 2
    result = train(parse_recipe(table), resume=True)
    assert result.epoch == 2 and result.about.endswith(said)


def test_a_resumed_run_may_be_longer(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["schedule"]["epochs"] = 1
    first = run(recipe_table, tmp_path / "run")
    recipe_table["schedule"]["epochs"] = 3
    longer = train(parse_recipe(recipe_table), resume=True)
    assert [record["update"] for record in longer.history] == [6, 12, 18]
    assert curve(longer.history)[:1] == curve(first.history)
    assert longer.history[1]["lr"] == pytest.approx(1e-2 * (1 + math.cos(math.pi * 11 / 18)) / 2)  # of the new schedule
    recipe_table["schedule"]["epochs"] = 2
    with pytest.raises(RecipeError, match=r"has 2 epochs, but the run in .* already has 3; raise schedule\.epochs"):
        train(parse_recipe(recipe_table), resume=True)


PRUNED = {"keep": 0.5, "at": [0]}


def test_training_with_pruning_saves_a_pruned_model(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    result = run(recipe_table | {"prune": PRUNED}, tmp_path / "out")
    pruned = lamzoo.create_model(f"local-dir:{result.model}", pretrained=True).eval()
    assert (pruned.prune_config.keep, pruned.prune_config.at) == (0.5, (0,))
    assert pruned.forward_features(torch.rand(1, 3, 32, 32)).shape[1] == pruned.num_prefix_tokens + 2


def test_the_pruning_loss_moves_the_masks(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    light, heavy = (
        load_file(
            run(recipe_table | {"prune": PRUNED | {"loss_weight": weight}}, tmp_path / str(weight)).model
            / "model.safetensors"
        )
        for weight in (0.0, 10.0)
    )
    masks = [name for name in light if name.startswith("blocks.0.attn.lam.")]
    assert masks
    assert any(not torch.allclose(light[name], heavy[name]) for name in masks)


@pytest.mark.parametrize("training", ["straight-through", pytest.param("top-k", marks=pytest.mark.slow)])
def test_killed_run_with_pruning_resumes_to_the_same_curve(
    recipe_table: dict[str, Any], tmp_path: Path, training: str
) -> None:
    recipe_table |= {"prune": PRUNED | {"training": training}}
    recipe_table["run"] |= {"ema_decay": 0.9, "checkpoint_interval": 2}
    whole = run(recipe_table, tmp_path / "whole")
    resumed = train_killed(recipe_table, tmp_path / "killed", 7)
    assert curve(resumed.history) == curve(whole.history)


@pytest.mark.parametrize(
    "lam", [pytest.param({"rank": 2}, id="masked"), pytest.param(False, id="plain", marks=pytest.mark.slow)]
)
def test_killed_run_with_merging_resumes_to_the_same_curve_and_saves_a_merged_model(
    recipe_table: dict[str, Any], tmp_path: Path, lam: Any
) -> None:
    recipe_table |= {"reduction": {"keep": 0.5}}
    recipe_table["model"]["lam"] = lam
    recipe_table["run"] |= {"ema_decay": 0.9, "checkpoint_interval": 2, "grad_checkpointing": True, "precision": "bf16"}
    whole = run(recipe_table, tmp_path / "whole")
    resumed = train_killed(recipe_table, tmp_path / "killed", 7)
    assert curve(resumed.history) == curve(whole.history)
    merged = lamzoo.create_model(f"local-dir:{whole.model}", pretrained=True)
    assert merged.token_reduction == lamzoo.TokenReduction(0.5)


def test_a_run_that_diverges_says_so_and_saves_nothing_of_it(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["optimizer"]["lr"] = 1e30
    with pytest.raises(DivergedError, match=r"loss is (nan|inf).*Lower optimizer\.lr"):
        run(recipe_table, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_pruning_what_has_no_masks_is_refused_and_leaves_nothing(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    del recipe_table["model"]["lam"]
    with pytest.raises(UnsupportedHostError, match="no learnable masks"):
        run(recipe_table | {"prune": PRUNED}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_workers_do_not_change_the_curve(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["augment"]["auto_augment"] = "rand-m5"
    recipe_table["schedule"]["epochs"] = 1
    alone = run(recipe_table, tmp_path / "alone")
    recipe_table["data"]["workers"] = 1
    assert curve(run(recipe_table, tmp_path / "workers").history) == curve(alone.history)


def test_accumulation_does_not_change_the_curve(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    whole = run(recipe_table, tmp_path / "whole")
    parts = run(recipe_table, tmp_path / "parts", accumulation=2)
    torch.testing.assert_close(
        torch.tensor(curve(parts.history)), torch.tensor(curve(whole.history)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_score_the_batch_norms_that_are_saved(
    recipe_table: dict[str, Any], tmp_path: Path, fsdp: bool
) -> None:
    data = tmp_path / "data"
    write_npz(data, "train", each=8)
    write_npz(data, "test", each=60)  # more than one process's share of a batch
    recipe_table |= {"model": {"name": "timm/test_resnet"}, "data": {"source": f"npz:{data}", "eval_split": "test"}}
    recipe_table["run"] |= {"ema_decay": 0.9 if fsdp else None, "fsdp": fsdp, "output": str(tmp_path / "two")}
    *_, row = train_in_two(recipe_table, tmp_path / "two")
    saved = train(parse_recipe(recipe_table), resume=True)  # which only scores what was saved
    assert float(row["eval_loss"]) == pytest.approx(saved.scores["test"].loss, rel=1e-4)


@pytest.mark.slow
def test_a_script_trains_twice_in_two_processes_with_tensorboard(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["schedule"]["epochs"] = 1
    recipe_table["run"] |= {"tensorboard": True, "device": "auto"}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(recipe_table))
    code = (
        "import sys; from lamzoo.training import load_recipe, train\n"
        "for output in sys.argv[2:]: train(load_recipe(sys.argv[1], [f'run.output={output}']))"
    )
    for done in run_in_two(code, "script", str(recipe), str(tmp_path / "first"), str(tmp_path / "second")):
        assert done.returncode == 0, done.stderr


def test_another_run_chooses_its_device_again(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    PartialState(cpu=True).device = torch.device("meta")  # as if the run before was on another device
    assert run(recipe_table, tmp_path / "out").history


def test_two_processes_give_the_curve_of_one(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    alone = run(recipe_table, tmp_path / "alone")
    rows = train_in_two(recipe_table, tmp_path / "two")
    two = [tuple(float(row[key]) for key in HELD_BY_RECIPE) for row in rows]
    assert_close(two, curve(alone.history))


@pytest.mark.slow
def test_a_model_that_cannot_be_written_ends_both_processes(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "model").touch()
    for done in start_in_two(recipe_table, tmp_path / "two"):
        assert done.returncode == 2
        assert str(tmp_path / "two" / "model") in done.stderr


@pytest.mark.slow
def test_two_processes_that_shard_the_model_give_the_curve_of_one_which_resumes_it(
    recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe_table["optimizer"] |= {"clip_grad": 0.5}
    recipe_table["run"] |= {"ema_decay": 0.9}
    alone = run(recipe_table, tmp_path / "alone")
    sharded = {**recipe_table, "run": {**recipe_table["run"], "fsdp": True}}
    rows = train_in_two(sharded, tmp_path / "two")
    two = [tuple(float(row[key]) for key in HELD_BY_RECIPE) for row in rows]
    assert_close(two, curve(alone.history))
    longer = {**sharded, "schedule": {**sharded["schedule"], "name": "constant", "epochs": 1}}
    train_in_two(longer, tmp_path / "resumed")
    longer["schedule"]["epochs"] = 2
    longer["run"] |= {"output": str(tmp_path / "resumed"), "fsdp": False}
    resumed = train(parse_recipe(longer), resume=True)
    longer["run"] |= {"output": str(tmp_path / "again")}
    assert_close(curve(resumed.history), curve(train(parse_recipe(longer)).history))
    longer["schedule"]["epochs"] = 3
    train_in_two({**longer, "run": {**longer["run"], "fsdp": True}}, tmp_path / "again", "--resume")


@pytest.mark.parametrize(
    ("changes", "named"), [({"run": {"precision": "fp16"}}, "fp16"), ({"optimizer": {"name": "muon"}}, "adamw, lion")]
)
def test_what_can_not_be_sharded_is_refused(
    recipe_table: dict[str, Any], changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for section, values in {**changes, "run": {"fsdp": True, "device": "auto", **changes.get("run", {})}}.items():
        recipe_table[section] |= values
    with pytest.raises(RecipeError, match=rf"run\.fsdp .*{named}|{named}"):
        parse_recipe(recipe_table)


def test_other_run_in_the_folder_is_refused(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["schedule"]["epochs"] = 1
    run(recipe_table, tmp_path / "out")
    with pytest.raises(RecipeError, match="already holds a run"):
        run(recipe_table, tmp_path / "out")
    recipe_table["run"] |= {"output": str(tmp_path / "out"), "seed": 7}
    with pytest.raises(RecipeError, match="holds a run of another recipe: run.seed was 0 and is 7; restore it"):
        train(parse_recipe(recipe_table), resume=True)


def test_batch_larger_than_the_data_is_refused(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="batch_size is 64, but .* has only 48 images"):
        run(recipe_table, tmp_path / "out", batch_size=64)


def test_update_larger_than_the_data_is_refused(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match="batch_size is 64, but .* has only 48 images"
    ):  # of two steps, each of which has images enough
        run(recipe_table, tmp_path / "out", batch_size=64, accumulation=2)


@pytest.mark.parametrize(("key", "batch"), [("mixup", (7, 1, 1)), ("cutmix", (12, 4, 1)), ("mixup", (12, 2, 2))])
def test_batches_that_mixup_cannot_pair_are_refused_before_the_data_is_read(
    recipe_table: dict[str, Any], tmp_path: Path, key: str, batch: tuple[int, int, int]
) -> None:
    batch_size, accumulation, processes = batch
    recipe_table["augment"] |= {key: 0.5}
    recipe_table["run"] |= {"batch_size": batch_size, "accumulation": accumulation}
    recipe: Any = parse_recipe(recipe_table)
    scanned: list[Any] = []
    with pytest.raises(RecipeError, match=f"choose a multiple of {2 * accumulation * processes}, or .*set both to 0"):
        check_mixup(recipe, processes, 48)
    if processes == 1:
        with pytest.raises(RecipeError, match="mix images in pairs"):
            train(recipe, scanning=lambda *progress: scanned.append(progress))
    assert not scanned


def test_an_accumulation_that_the_images_are_too_few_for_is_what_to_lower(recipe_table: dict[str, Any]) -> None:
    recipe_table["augment"] |= {"mixup": 0.5}
    recipe_table["run"] |= {"batch_size": 8, "accumulation": 8}
    recipe: Any = parse_recipe(recipe_table)
    with pytest.raises(RecipeError, match="makes batches of 1; lower run.accumulation, or set both to 0"):
        check_mixup(recipe, 1, 14)


def test_training_leaves_timms_switch_alone(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["schedule"]["epochs"] = 1
    recipe_table["model"]["fused_attention"] = False
    before = use_fused_attn()
    run(recipe_table, tmp_path / "out")
    assert before and use_fused_attn()


@pytest.mark.parametrize("fused", [True, False])
def test_merged_tokens_are_trained_by_the_kernels_that_the_recipe_allows(
    recipe_table: dict[str, Any], tmp_path: Path, fused: bool
) -> None:
    recipe_table["model"] |= {"lam": False, "fused_attention": fused}
    recipe_table["reduction"] = {"method": "merge", "keep": 0.5}
    recipe_table["schedule"]["epochs"] = 1
    with Operators() as operators:
        run(recipe_table, tmp_path / "out")
    assert ("_scaled_dot_product_flash_attention_for_cpu_backward" in operators.counts) == fused


def test_scoring_on_the_training_images_is_refused(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["data"]["eval_split"] = "train"
    with pytest.raises(RecipeError, match="use the same images for training and scoring"):
        run(recipe_table, tmp_path / "out")


def test_refused_run_leaves_nothing(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["data"]["eval_split"] = "absent"
    with pytest.raises(DataError, match="absent"):
        run(recipe_table, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unwritable_output_is_refused(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="can't be created"):
        run(recipe_table, tmp_path / "file" / "out")


@pytest.mark.gpu
@pytest.mark.parametrize("tune", ["all", "lam", "head"])
def test_trains_and_reports_on_a_gpu(recipe_table: dict[str, Any], tmp_path: Path, tune: str) -> None:
    first = run(recipe_table, tmp_path / "first", device="cuda", precision="bf16", ema_decay=0.9)
    recipe_table["model"] = {"name": f"local-dir:{first.model}", "pretrained": True, "tune": tune}
    result = run(recipe_table, tmp_path / "second", device="cuda", precision="bf16", ema_decay=0.9, report=True)
    assert result.report is not None and (result.report.parent / "masks-1.png").exists()
    assert all(torch.isfinite(torch.tensor(record["train_loss"])) for record in result.history)


def test_a_run_is_not_resumed_with_masks_of_another_kind(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    folder, start = tmp_path / "m", {"embed_dim": 16, "depth": 1, "num_classes": 2}
    lamzoo.save_pretrained(lamzoo.create_model("lam_vit_micro", lam=lamzoo.LamConfig(), **start), folder)
    recipe_table |= {"model": {"name": f"local-dir:{folder}"}}
    recipe_table["schedule"]["epochs"] = 1
    train(parse_recipe(recipe_table))
    lamzoo.save_pretrained(lamzoo.create_model("lam_vit_micro", lam=lamzoo.LamConfig(op="mul"), **start), folder)
    with pytest.raises(RecipeError, match=r"masks of LamConfig\(.*op='add'.*op='mul'.*with these masks as model.lam"):
        train(parse_recipe(recipe_table), resume=True)


@pytest.mark.parametrize(("lam", "said"), [(None, True), (True, False), (False, False)])
def test_a_model_of_timms_without_masks_is_trained_with_a_word_about_it(
    recipe_table: dict[str, Any], lam: bool | None, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    del recipe_table["model"]["lam"]
    recipe_table["model"] |= {} if lam is None else {"lam": lam}
    recipe_table["schedule"]["epochs"] = 1
    result = train(parse_recipe(recipe_table))
    assert ("timm/test_vit has no masks to train; add the default ones with model.lam=true" in caplog.text) == said
    assert (lamzoo.create_model(f"local-dir:{result.model}").lam_config is None) == (lam is not True)
