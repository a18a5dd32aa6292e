"""Training batches: timm's transforms, seeded by recipe, epoch and image only."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import timm.data
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from lamzoo.errors import RecipeError
from lamzoo.evaluation.runtime import data_config
from lamzoo.profiling.inputs import image_mode
from lamzoo.training.recipe import AnyRecipe, Recipe


class SeededDataset(Dataset[tuple[Tensor, int]]):
    """Reads each item under its own random state, so that augmentation depends on (seed, epoch, index) only.

    The training curve is then independent of the number of workers and processes, and of interruptions.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with _own_random_states(self.seed, self.epoch, index):
            return self.dataset[index]


class SeededSampler(Sampler[int]):
    """Shuffles a :class:`SeededDataset` for each epoch, depending on (seed, epoch) only.

    Accelerate's own sampler seeds with their sum, so seed 1 would start with the second epoch of seed 0.
    """

    def __init__(self, dataset: SeededDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[int]:
        generator = generator_of(self._dataset.seed, self._dataset.epoch, 0, 0, 2)  # keys of dropout end in 1
        order: list[int] = torch.randperm(len(self), generator=generator).tolist()
        return iter(order)


def seed_everything(*key: int) -> None:
    """Seeds ``random``, NumPy and torch on all devices with non-negative integers, starting with the recipe's seed."""
    torch.manual_seed(_seed_host(key))


def generator_of(*key: int) -> torch.Generator:
    """Returns a generator on the CPU, seeded as by :func:`seed_everything`."""
    first, second = _words(key)
    return torch.Generator().manual_seed(first << 32 | second)


def _words(key: tuple[int, ...]) -> tuple[int, int]:
    # A spawn key, because SeedSequence pads plain entropy with zeros: (3,) and (3, 0, 0) would be equal.
    first, second = np.random.SeedSequence(key[0], spawn_key=key[1:]).generate_state(2)
    return int(first), int(second)


def _seed_host(key: tuple[int, ...]) -> int:
    first, second = _words(key)
    random.seed(first)
    np.random.seed(first)
    return first << 32 | second


@contextmanager
def _own_random_states(*key: int) -> Iterator[None]:
    if get_worker_info() is not None:  # a worker draws for items only, so nothing needs its former states
        torch.default_generator.manual_seed(_seed_host(key))
        yield
        return
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed also seeds every accelerator, which takes longer than decoding a small image.
        torch.default_generator.manual_seed(_seed_host(key))
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def check_batch(recipe: AnyRecipe, inputs: int, items: str, split: str | None) -> None:
    """Raises a :class:`RecipeError` if there are fewer training inputs than in one batch.

    Args:
        recipe: the whole recipe.
        inputs: number of training inputs.
        items: what they are, for the message: ``"images"``.
        split: the training split, for the message.
    """
    if inputs < recipe.run.batch_size:
        raise RecipeError(
            f"run.batch_size is {recipe.run.batch_size}, but {recipe.data.source} has only {inputs} {items} in "
            f"{split}; use a smaller batch."
        )


def check_mixup(recipe: Recipe, processes: int, images: int) -> None:
    """Raises a :class:`RecipeError` if mixup or cutmix would receive batches of odd size."""
    run, augment = recipe.run, recipe.augment
    share = processes * run.accumulation
    if augment.mixes and run.batch_size // share % 2:
        ways = [f"choose a multiple of {2 * share}"] if 2 * share <= images else []
        ways += ["lower run.accumulation"] if run.accumulation > 1 else []
        raise RecipeError(
            f"augment.mixup and augment.cutmix mix images in pairs, and run.batch_size {run.batch_size} over "
            f"{run.accumulation} accumulation steps and {processes} processes makes batches of "
            f"{run.batch_size // share}; {', or '.join([*ways, 'set both to 0'])}."
        )


def pins_memory(recipe: AnyRecipe) -> bool:
    """Returns whether loaders use pinned memory, from which a GPU copies batches while it computes."""
    return torch.cuda.is_available() and recipe.run.device != "cpu"


def create_seeded_loader(
    recipe: AnyRecipe, samples: Any, collate: Callable[[list[Any]], Any] | None = None
) -> DataLoader[Any]:
    """Returns a training loader for any task, before sharding over processes.

    Args:
        recipe: the whole recipe.
        samples: a map-style data set.
        collate: collate function; torch's default if None.

    Returns:
        A loader of batches of ``run.batch_size / run.accumulation`` samples, without the last incomplete one. Set its
        ``dataset.epoch`` before each epoch: order and samples depend on it.
    """
    dataset = SeededDataset(samples, recipe.run.seed)
    return DataLoader(
        dataset,
        recipe.run.batch_size // recipe.run.accumulation,
        sampler=SeededSampler(dataset),
        collate_fn=collate,
        num_workers=recipe.data.workers,
        pin_memory=pins_memory(recipe),
        drop_last=True,
    )


def create_train_loader(recipe: Recipe, train_set: Any, model: nn.Module) -> DataLoader[Any]:
    """Returns the training loader, before sharding over processes.

    Args:
        recipe: the whole recipe.
        train_set: the training images; their transform is replaced.
        model: the model, which defines input size, mean and standard deviation.

    Returns:
        A loader of float images ``(B, C, H, W)`` and int labels ``(B,)``, as of :func:`create_seeded_loader`.
    """
    config = data_config(model)
    augment = recipe.augment
    train_set.mode = image_mode(config)
    if train_set.mode == "RGBA" and augment.auto_augment:
        raise RecipeError(
            f"augment.auto_augment is {augment.auto_augment!r}, but timm's policies do not support 4 channels; "
            "set it to ''."
        )
    train_set.transform = timm.data.create_transform(
        input_size=config["input_size"],
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        re_prob=augment.random_erasing,
        re_mode=augment.random_erasing_mode,
        mean=config["mean"],
        std=config["std"],
    )
    return create_seeded_loader(recipe, train_set)


def create_eval_loader(recipe: Recipe, eval_set: Any, model: nn.Module) -> DataLoader[Any]:
    """Returns a loader of all images of a split in order, preprocessed according to the model's ``pretrained_cfg``.

    Its batch size, about 256, is a multiple of the training batch size, which is divisible by the number of processes.
    """
    config = data_config(model)
    eval_set.mode = image_mode(config)
    eval_set.transform = timm.data.create_transform(**config)
    batch = recipe.run.batch_size // recipe.run.accumulation
    size, workers = max(256 // batch, 1) * batch, recipe.data.workers
    return DataLoader(eval_set, size, num_workers=workers, pin_memory=pins_memory(recipe))


def create_mixup(recipe: Recipe, num_classes: int) -> timm.data.Mixup | None:
    """Returns timm's Mixup as configured by the recipe, or None."""
    augment = recipe.augment
    if not augment.mixes:
        return None
    return timm.data.Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mixup_prob,
        label_smoothing=augment.label_smoothing,
        num_classes=num_classes,
    )
