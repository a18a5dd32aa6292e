"""The gradients of the first global batch of a recipe, in this process or, as a script, in several."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamzoo.adapters.wrappers import full_tensor
from lamzoo.training import parse_recipe
from lamzoo.training.loop import create_run
from tests.forked import run_module_in_two

Gradients = dict[str, Tensor]


def gradients(table: dict[str, Any], output: Path, accumulation: int = 1) -> Gradients:
    """Returns by parameter the gradients of the first update of a recipe, given as nested values, and its ``loss``."""
    changes = {"output": str(output), "accumulation": accumulation}
    run = create_run(parse_recipe({**table, "run": {**table["run"], **changes}}), False, None, None)
    run.loader.set_epoch(0)
    run.train_mode()
    loss = run.backward(0, 0, list(islice(run.loader, accumulation)))
    model = run.accelerator.unwrap_model(run.model)
    found = {name: full_tensor(each.grad).clone() for name, each in model.named_parameters() if each.grad is not None}
    return found | {"loss": loss.float()}


def gradients_in_two(tables: Mapping[str, dict[str, Any]], folder: Path, accumulation: int = 1) -> dict[str, Gradients]:
    """Returns those of several recipes, each in the same two processes."""
    job = folder / "job.json"
    job.write_text(json.dumps({"tables": tables, "accumulation": accumulation}))
    for done in run_module_in_two("tests.training.gradients", str(job)):
        assert done.returncode == 0, done.stderr
    found: dict[str, Gradients] = torch.load(job.with_suffix(".pt"), weights_only=True)
    return found


def _main(job: Path) -> None:
    asked = json.loads(job.read_text())
    found = {
        name: gradients(table, job.parent / f"two-{name}", asked["accumulation"])
        for name, table in asked["tables"].items()
    }
    if os.environ["RANK"] == "0":
        torch.save(found, job.with_suffix(".pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
