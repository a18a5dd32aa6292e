"""A few updates of each optimiser that a sharded run takes, in this process or, as a script, in several."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lamzoo.adapters import add_lam
from lamzoo.adapters.wrappers import full_tensor
from lamzoo.lam import LamConfig
from lamzoo.training.build import build_optimizer
from lamzoo.training.gradients import average_gradients
from lamzoo.training.recipe_common import SHARDED_OPTIMIZERS, OptimizerSection
from lamzoo.training.sharding import load_whole, shard, sharded_state, whole_state
from tests.forked import run_module_in_two

Weights = dict[str, Tensor]


class _Scaled(nn.Module):
    """A masked vision transformer with a scalar parameter, which is not sharded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        vit = timm.create_model(
            "test_vit", img_size=16, patch_size=8, embed_dim=16, num_heads=2, depth=2, num_classes=3
        )
        self.vit = add_lam(vit, LamConfig(rank=2, op="mul", init="paper"))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.vit(x)


def _create(accelerator: Accelerator, name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model: nn.Module = _Scaled().double()
    if accelerator.num_processes > 1:
        shard(accelerator, model)
    return model, build_optimizer(OptimizerSection(name=name, lr=1e-3, weight_decay=0.1), model)


def steps(name: str) -> Weights:
    """Returns the weights after four updates of eight samples; after the second, another model continues."""
    accelerator = Accelerator(cpu=True)
    model, optimizer = _create(accelerator, name)
    generator = torch.Generator().manual_seed(1)
    for update in range(4):
        if update == 2:
            weights = {key: full_tensor(value.detach()).clone() for key, value in model.state_dict().items()}
            state: Any = whole_state(optimizer.state_dict())
            model, optimizer = _create(accelerator, name)
            if accelerator.num_processes > 1:
                load_whole(model, weights)
                state = sharded_state(optimizer, state)
            else:
                model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        x, y = torch.randn(8, 3, 16, 16, generator=generator).double(), torch.arange(8) % 3
        own = slice(accelerator.process_index, None, accelerator.num_processes)
        nn.functional.cross_entropy(model(x[own]), y[own]).backward()
        average_gradients(accelerator, model)
        optimizer.step()
        optimizer.zero_grad()
    return {key: full_tensor(value.detach()).clone() for key, value in model.state_dict().items()}


def steps_in_two(folder: Path) -> dict[str, Weights]:
    """Returns those weights by optimiser, of two processes that shard the model."""
    file = folder / "weights.pt"
    for done in run_module_in_two("tests.training.optimizer_steps", str(file)):
        assert done.returncode == 0, done.stderr
    found: dict[str, Weights] = torch.load(file, weights_only=True)
    return found


if __name__ == "__main__":
    _found = {name: steps(name) for name in SHARDED_OPTIMIZERS}
    if os.environ["RANK"] == "0":
        torch.save(_found, sys.argv[1])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
