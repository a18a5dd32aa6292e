"""Checkpoints of a run: whole or not used, never pickles with code, one run in a folder at a time."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from lamzoo.errors import RecipeError
from lamzoo.files import file_lock
from lamzoo.training import Progress, TrainResult, parse_recipe, train
from lamzoo.training.checkpoints import Checkpoints, TrainedParts


@pytest.fixture(scope="module")
def stopped(packed_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with averaged weights, stopped after its checkpoints of updates 2 and 4 of 6; not to be changed."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        train(parse_recipe(table(packed_data, output)), progress=stop_at(5))
    return output


def table(data: Path, output: Path) -> dict[str, Any]:
    size = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return {
        "model": {"name": "timm/test_vit", "lam": {"rank": 2}, "kwargs": size},
        "data": {"source": f"npz:{data}", "eval_split": "test", "scan": False},
        "optimizer": {"lr": 1e-2},
        "schedule": {"epochs": 1, "warmup_epochs": 0},
        "run": {
            "output": str(output), "batch_size": 8, "device": "cpu", "report": False, "checkpoint_interval": 2,
            "ema_decay": 0.9,
        },
    }  # fmt: skip


def stop_at(update: int) -> Callable[[Progress], None]:
    def stop(progress: Progress) -> None:
        if progress.update == update:
            raise KeyboardInterrupt

    return stop


@pytest.fixture
def killed(stopped: Path, tmp_path: Path) -> Path:
    """A copy of :func:`stopped`."""
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.fixture
def resume(packed_data: Path, killed: Path) -> Callable[..., TrainResult]:
    return lambda **options: train(parse_recipe(table(packed_data, killed)), resume=True, **options)


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("update-*"))


def as_of_0_1_0(checkpoint: Path, **changes: Any) -> None:
    """Removes what checkpoints of lamzoo 0.1.0 lack: the manifest and the averaged weights."""
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "ema.safetensors").unlink()
    kept = {key: value for key, value in state.items() if key not in ("files", "sha256")}
    (checkpoint / "state.json").write_text(json.dumps({**kept, **changes}))


FAULTS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "altered": lambda path: path.write_bytes(path.read_bytes()[:-40] + bytes(40)),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize(
    ("file", "fault"),
    [
        *(("optimizer.bin", fault) for fault in FAULTS),
        *(("state.json", fault) for fault in FAULTS),
        ("model.safetensors", "altered"),
        ("ema.safetensors", "missing"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    killed: Path, resume: Callable[..., TrainResult], caplog: pytest.LogCaptureFixture, file: str, fault: str
) -> None:
    FAULTS[fault](newest(killed) / file)
    with pytest.raises(KeyboardInterrupt):
        resume(progress=stop_at(3))
    assert f"(update-00000004: {file} " in caplog.text
    assert "the run continues from update-00000002" in caplog.text


def test_a_run_that_went_back_ends_as_if_nothing_had_happened(
    packed_data: Path, stopped: Path, killed: Path, resume: Callable[..., TrainResult], tmp_path: Path
) -> None:
    undamaged = shutil.copytree(stopped, tmp_path / "undamaged")
    expected = train(parse_recipe(table(packed_data, undamaged)), resume=True)
    FAULTS["truncated"](newest(killed) / "optimizer.bin")
    result = resume()
    assert (result.model / "model.safetensors").read_bytes() == (expected.model / "model.safetensors").read_bytes()
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (killed, undamaged)]
    assert names[0] == names[1] == ["update-00000004", "update-00000006"]


def test_without_a_whole_checkpoint_the_faults_are_named(killed: Path, resume: Callable[..., TrainResult]) -> None:
    for checkpoint in (killed / "checkpoints").iterdir():
        FAULTS["empty"](checkpoint / "optimizer.bin")
    with pytest.raises(
        RecipeError, match=r"is whole \(update-00000004: optimizer.bin has 0 bytes.*; update-00000002: "
    ):
        resume()


@pytest.mark.parametrize(
    ("file", "fault"),
    [("state.json", "empty"), ("model.safetensors", "truncated"), *(("optimizer.bin", fault) for fault in FAULTS)],
)
def test_a_damaged_checkpoint_of_0_1_0_is_passed_over_too(
    killed: Path, resume: Callable[..., TrainResult], caplog: pytest.LogCaptureFixture, file: str, fault: str
) -> None:
    for checkpoint in (killed / "checkpoints").iterdir():
        as_of_0_1_0(checkpoint)
    FAULTS[fault](newest(killed) / file)
    with pytest.raises(KeyboardInterrupt):
        resume(progress=stop_at(3))
    assert f"(update-00000004: {file} " in caplog.text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"update": "6"}, "update"),
        ({"history": [{"epoch": "x"}]}, "no number for 'epoch'"),
        ({"history": 3}, "history"),
        ({"seconds": None}, "seconds"),
        ({"best": {"epoch": [], "value": 1.0}}, "best.epoch"),
        ({"files": {"model.safetensors": 5}}, "altered"),
    ],
)
def test_a_wrong_value_in_the_state_is_a_fault(
    killed: Path, resume: Callable[..., TrainResult], changes: dict[str, Any], says: str
) -> None:
    for checkpoint in (killed / "checkpoints").iterdir():
        as_of_0_1_0(checkpoint, **changes)
    with pytest.raises(RecipeError, match=f"state.json.*{says}"):
        resume()


def test_code_in_a_checkpoint_is_not_run(killed: Path, resume: Callable[..., TrainResult], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run-by-pickle"),)

    for checkpoint in (killed / "checkpoints").iterdir():
        as_of_0_1_0(checkpoint)
        torch.save({"state": Evil()}, checkpoint / "optimizer.bin")
    with pytest.raises(RecipeError, match="optimizer.bin is damaged"):
        resume()
    for checkpoint in (killed / "checkpoints").iterdir():
        torch.save(Evil(), checkpoint / "custom_checkpoint_0.pkl")
    with pytest.raises(RecipeError, match="custom_checkpoint_0.pkl is a pickle.*delete the file"):
        resume()
    assert not (tmp_path / "run-by-pickle").exists()


def test_without_the_pickle_of_0_1_0_its_run_resumes(
    killed: Path, resume: Callable[..., TrainResult], caplog: pytest.LogCaptureFixture
) -> None:
    as_of_0_1_0(newest(killed))
    result = resume()
    assert "the average starts again" in caplog.text
    assert [record["update"] for record in result.history] == [6]


def test_a_checkpoint_of_another_optimiser_is_refused_with_a_way_out(
    killed: Path, resume: Callable[..., TrainResult]
) -> None:
    as_of_0_1_0(newest(killed))
    file = newest(killed) / "optimizer.bin"
    state = torch.load(file, weights_only=True)
    state["param_groups"][0]["params"].append(len(state["state"]))
    torch.save(state, file)
    with pytest.raises(RecipeError, match="another version of lamzoo.*another folder"):
        resume()


def test_a_folder_with_any_checkpoint_is_not_trained_in_anew(packed_data: Path, killed: Path) -> None:
    (killed / "recipe.json").unlink()
    recipe = parse_recipe(table(packed_data, killed))
    for resume in (False, True):
        with pytest.raises(RecipeError, match=r"no recipe\.json.*restore it"):
            train(recipe, resume=resume)


def test_the_recipe_is_there_before_the_first_checkpoint(packed_data: Path, tmp_path: Path) -> None:
    recipe, there = parse_recipe(table(packed_data, tmp_path / "run")), []

    def stop(progress: Progress) -> None:
        there.append(sorted(path.name for path in (tmp_path / "run").iterdir()))
        with pytest.raises(RecipeError, match="already holds a run"):  # as after a kill
            train(recipe)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, progress=stop)
    assert there == [[".lock", "checkpoints", "data.json", "recipe.json"]]


def test_two_trainings_do_not_share_a_folder(killed: Path, resume: Callable[..., TrainResult]) -> None:
    with file_lock(killed / ".lock"), pytest.raises(RecipeError, match="is being trained in by another process; wait"):
        resume()
    with pytest.raises(KeyboardInterrupt):
        resume(progress=stop_at(5))


def test_a_full_disk_leaves_nothing_half_written(killed: Path, resume: Callable[..., TrainResult]) -> None:
    (killed / "checkpoints" / ".update-00000009").mkdir()  # of a killed process
    before = {*killed.rglob("*")}
    room = (newest(killed) / "model.safetensors").stat().st_size + 1000  # for the weights, not for the optimiser
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(progress: Progress) -> None:
        if progress.update == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))

    try:
        with pytest.raises(RecipeError, match=r"optimizer\.bin cannot be written.*nothing was changed"):
            resume(progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before - {*killed.rglob("*")} == {killed / "checkpoints" / ".update-00000009"}
    assert {*killed.rglob("*")} < before


def test_the_scale_of_fp16_gradients_is_kept(packed_data: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(table(packed_data, tmp_path))
    accelerator, found = Accelerator(cpu=True), []
    for scale, resume in ((7.0, False), (1.0, True)):
        model = torch.nn.Linear(2, 2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        parts = TrainedParts(model, torch.optim.SGD(model.parameters()), None, scaler)
        checkpoints = Checkpoints(tmp_path, recipe, resume)
        if not resume:
            checkpoints.write_recipe()
            checkpoints.save(accelerator, parts, {"update": 1, "loss_sum": 0.0, "seconds": 0.0, "history": []})
        found.append(checkpoints.load(accelerator, parts, None))
        assert scaler.get_scale() == 7
    assert found[1] == {"update": 1, "loss_sum": 0, "seconds": 0, "history": []}
