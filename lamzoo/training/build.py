"""Model, optimiser, scheduler, averaged weights and accelerator, built from a recipe's sections."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import timm.optim
import timm.scheduler
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from timm.layers import set_fused_attn, use_fused_attn
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lamzoo.adapters import lam_parameters
from lamzoo.adapters.decay import full_rate_parameters
from lamzoo.data.paths import nfc
from lamzoo.errors import RecipeError, UnsupportedHostError
from lamzoo.reduction.budget import merge_tokens, prune_tokens
from lamzoo.registry.factory import create_for_images
from lamzoo.training.recipe import Recipe
from lamzoo.training.recipe_common import (
    OptimizerSection,
    PruneSection,
    ReductionSection,
    RunSection,
    ScheduleSection,
)

_logger = logging.getLogger(__name__)


def build_model(recipe: Recipe, classes: list[str] | None) -> Any:
    """Creates the recipe's model.

    Args:
        recipe: the whole recipe.
        classes: class names of the data; their number is the width of the classifier. A pretrained classifier is kept
            if its label names are the same in the same order, or unknown.

    Raises:
        RecipeError: the number of classes is unknown, or data and recipe contradict each other.
        LamzooError: the model's name, arguments or weights are invalid.
    """
    section = recipe.model
    kwargs = section.arguments()
    if classes is None and "num_classes" not in kwargs:
        raise RecipeError(f"{recipe.data.source} has no class names; set model.kwargs.num_classes in the recipe.")
    if classes is not None and kwargs.setdefault("num_classes", len(classes)) != len(classes):
        raise RecipeError(
            f"model.kwargs.num_classes is {kwargs['num_classes']} and {recipe.data.source} has {len(classes)} classes; "
            "leave the number out of the recipe."
        )
    with _fused_attention(section.fused_attention):
        model: Any = create_for_images(section.name, pretrained=section.pretrained, **kwargs)
    if classes is not None and _knows_others(model, classes):
        _logger.info("%s: new classifier, since the weights are for other classes", section.name)
        model.reset_classifier(len(classes))
    if recipe.token_reduction is not None:
        reduce_by_section(model, recipe.token_reduction)
    if recipe.run.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def reduce_by_section(model: nn.Module, section: PruneSection) -> None:
    """Merges or prunes the tokens of a model, in place, as a recipe's ``[reduction]`` or ``[prune]`` says."""
    if isinstance(section, ReductionSection) and section.method == "merge":
        merge_tokens(
            model, target_gmacs=section.target_gmacs, keep=section.keep, r=section.r, at=section.at,
            frames=section.frames,
        )  # fmt: skip
    else:
        prune_tokens(
            model, section.keep, section.at, target_gmacs=section.target_gmacs, score=section.score, rest=section.rest,
            training=section.training,
        )  # fmt: skip


def timm_optimizer(section: OptimizerSection, parts: Any, **settings: Any) -> torch.optim.Optimizer:
    """Creates timm's optimiser over a model, or groups of parameters.

    Raises:
        RecipeError: ``optimizer.kwargs`` don't fit it.
    """
    try:
        return timm.optim.create_optimizer_v2(parts, opt=section.name, lr=section.lr, **settings, **section.kwargs)
    except (TypeError, ValueError, AssertionError, ArithmeticError, RuntimeError) as error:
        raise RecipeError(f"optimizer.kwargs {section.kwargs} do not fit {section.name!r}: {error}.") from None


def build_optimizer(section: OptimizerSection, model: nn.Module) -> torch.optim.Optimizer:
    """Creates timm's optimiser over the trainable parameters.

    Layer decay applies to pretrained layers, and to masks only if they were loaded and belong to one layer.
    """
    optimizer = timm_optimizer(section, model, weight_decay=section.weight_decay, layer_decay=section.layer_decay)
    if section.lam_lr is not None:
        _set_rate(optimizer, mask_parameters(model), section.lam_lr / section.lr)
    elif section.layer_decay is not None:
        _set_rate(optimizer, full_rate_parameters(model), 1.0)
    optimizer.register_load_state_dict_pre_hook(partial(_regroup_state, section, model))
    return optimizer


def build_scheduler(section: ScheduleSection, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Any:
    """Creates timm's scheduler, to be stepped after each update; after its last epoch it stays at ``min_lr``.

    Raises:
        RecipeError: the lengths do not fit the schedule.
    """
    try:
        scheduler, _ = timm.scheduler.create_scheduler_v2(
            optimizer,
            sched=section.name,
            num_epochs=section.epochs,
            warmup_epochs=section.warmup_epochs,  # type: ignore[arg-type]  # counted in updates, so a fraction will do
            warmup_lr=section.warmup_lr,
            min_lr=section.min_lr,
            cooldown_epochs=section.cooldown_epochs,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except ValueError as error:
        raise RecipeError(f"schedule.name {section.name!r} does not fit the rest of [schedule]: {error}") from None
    return scheduler


def build_ema(run: RunSection, model: nn.Module, device: torch.device) -> ModelEmaV3 | None:
    """Creates an averaged copy of the weights; None without ``run.ema_decay``."""
    return None if run.ema_decay is None else ModelEmaV3(model.to(device), decay=run.ema_decay, use_warmup=True)


def _knows_others(model: Any, classes: list[str]) -> bool:
    """Returns whether a model has a pretrained classifier with label names other than ``classes``."""
    known = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    return model.weights_source is not None and known is not None and [*map(nfc, known)] != [*map(nfc, classes)]


def mask_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Returns the parameters of masks; raises a :class:`RecipeError` if there are none for ``optimizer.lam_lr``."""
    try:
        return set(lam_parameters(model))
    except UnsupportedHostError:
        raise RecipeError(
            "Recipe key optimizer.lam_lr is for masks, and the model has none; leave it out or set model.lam."
        ) from None


def _set_rate(optimizer: torch.optim.Optimizer, parameters: set[nn.Parameter], scale: float) -> None:
    """Gives parameters groups of their own, whose learning rate is ``scale`` times the scheduled one."""
    for group in list(optimizer.param_groups):
        chosen = [parameter for parameter in group["params"] if parameter in parameters]
        if chosen:
            group["params"] = [parameter for parameter in group["params"] if parameter not in parameters]
            optimizer.add_param_group({**group, "params": chosen, "lr_scale": scale})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _regroup_state(
    section: OptimizerSection, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any] | None:
    """Maps an optimiser state of lamzoo 0.1.0, which decayed mask tables, to the current parameter groups."""
    sizes = [len(group["params"]) for group in state["param_groups"]]
    if sizes == [len(group["params"]) for group in optimizer.param_groups]:
        return None
    host = getattr(type(model), "no_weight_decay", None)
    names = set() if host is None else host(model)
    if section.layer_decay is None:
        groups = timm.optim.param_groups_weight_decay(model, section.weight_decay, no_weight_decay_list=names)
    else:
        groups = timm.optim.param_groups_layer_decay(
            model, section.weight_decay, no_weight_decay_list=names, layer_decay=section.layer_decay
        )
    if sizes != [len(group["params"]) for group in groups]:
        return None  # torch reports that the groups don't match
    former = {parameter: index for index, parameter in enumerate(p for group in groups for p in group["params"])}
    today = enumerate(p for group in optimizer.param_groups for p in group["params"])
    moved = {index: state["state"][former[p]] for index, p in today if former[p] in state["state"]}
    return {**state, "state": moved, "param_groups": optimizer.state_dict()["param_groups"]}


def attention_kernels(fused: bool) -> AbstractContextManager[None]:
    """Returns a context in which PyTorch may use its fused attention kernels, or may not; also in backward passes."""
    return nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)


@contextmanager
def _fused_attention(enable: bool) -> Iterator[None]:
    # timm's layers read the global switch at construction.
    before, experimental = use_fused_attn(), use_fused_attn(experimental=True)
    set_fused_attn(enable)
    try:
        yield
    finally:
        set_fused_attn(before, experimental)


_LONGEST_WAIT = timedelta(hours=12)  # of processes for the main one, which computes and writes files


def build_accelerator(run: RunSection) -> Accelerator:
    """Returns the accelerator of a run; raises a :class:`RecipeError` if its processes can't share the batches."""
    launched = "LOCAL_RANK" in os.environ  # by torchrun or accelerate
    # The state is shared in the process and has precision and device of the last run. Launched processes keep theirs,
    # which connects them.
    AcceleratorState._reset_state(reset_partial_state=not launched)
    accelerator = Accelerator(
        mixed_precision=run.precision,
        cpu=run.device == "cpu" or (launched and not torch.accelerator.is_available()),
        dataloader_config=DataLoaderConfiguration(  # loaders yield global batches
            split_batches=True, non_blocking=torch.cuda.is_available()
        ),
        log_with="tensorboard" if run.tensorboard else None,
        project_dir=run.output,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)],
    )
    if dist.is_available() and dist.is_initialized():
        atexit.unregister(_leave)
        atexit.register(_leave)  # not at the end of a run: torchrun connects the processes only once
    started = int(os.environ.get("WORLD_SIZE", "1")) if launched else 1
    if started > accelerator.num_processes:
        raise RecipeError(
            f"{started} processes were started, which can't train together on {accelerator.device}; start one process, "
            "or choose run.device 'cpu'."
        )
    if run.batch_size // run.accumulation % accelerator.num_processes:
        raise RecipeError(
            f"run.batch_size {run.batch_size} over {run.accumulation} accumulation steps is not divisible by "
            f"{accelerator.num_processes} processes; choose a multiple."
        )
    return accelerator


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
