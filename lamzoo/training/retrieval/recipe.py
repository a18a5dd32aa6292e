"""The recipe of text-video retrieval: its own sections beside those that all tasks share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from lamzoo.data import OnBadInput
from lamzoo.data.video.sampling import FrameSampling, Slicing
from lamzoo.errors import RecipeError
from lamzoo.training.config_reader import without_none
from lamzoo.training.recipe_common import OptimizerSection, RunSection, ScheduleSection


@dataclass(frozen=True)
class RetrievalModelSection:
    """``[model]``: what :func:`lamzoo.create_model` gets, and what of it is frozen.

    Attributes:
        name: a model of the family ``lam_clip4clip``, ``open_clip/<name>``, ``local-dir:`` or ``hf-hub:``.
        pretrained: start from the published weights.
        lam: fields of a :class:`lamzoo.LamConfig` in place of the registered one; true for the registered one or, where
            there is none, the default; false for none.
        kwargs: further arguments of ``create_model``, such as ``similarity``, ``lam_in`` and ``img_size``;
            ``max_frames`` and ``fps`` come from ``[data]`` where they are left out.
        fused_attention: whether PyTorch may use its fused kernels. On CPUs, bfloat16 training of short sequences is
            two to three times faster without them; both sides of a comparison should say the same.
        lock_image_tower: train nothing of the vision tower but its masks.
        freeze_layers: blocks of both towers that are frozen, from the first one on, with the embeddings; None for none.
    """

    name: str
    pretrained: bool = False
    lam: dict[str, Any] | bool | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    fused_attention: bool = True
    lock_image_tower: bool = False
    freeze_layers: int | None = None


@dataclass(frozen=True)
class RetrievalDataSection:
    """``[data]``: the data set, as :func:`lamzoo.data.retrieval.create_retrieval_dataset` reads it.

    Attributes:
        source: the data set's specification.
        train_split: the videos to train on.
        eval_split: the videos to score on during the run.
        test_split: scored once, at the end; None for none.
        fps: frames a second that are candidates; 0 takes every frame of a video.
        max_frames: frames that a video gives at most.
        slicing: which ones, where there are more, as of :class:`lamzoo.data.video.sampling.FrameSampling`.
        captions: an epoch shows ``"all"`` captions of a video, or ``"one"`` of them, drawn anew.
        equal_captions: what the videos of equal captions in a batch are to each other: ``"negatives"`` as in CLIP4Clip,
            or ``"positives"``.
        workers: processes that read videos, for each training process; 0 reads in that one.
        scan: read every video of all these splits once before the first epoch.
        on_bad_input: what a scan does with videos that can't be read: ``"stop"``, or ``"skip"``, which leaves them out
            and lists them in ``bad-inputs.csv``.
    """

    source: str
    train_split: str = "train"
    eval_split: str = "validation"
    test_split: str | None = None
    fps: float = 1.0
    max_frames: int = 12
    slicing: Slicing = "uniform"
    captions: Literal["all", "one"] = "all"
    equal_captions: Literal["negatives", "positives"] = "negatives"
    workers: int = 0
    scan: bool = True
    on_bad_input: OnBadInput = "stop"

    @property
    def sampling(self) -> FrameSampling:
        """Which frames of a video are read."""
        return FrameSampling(self.fps or None, self.max_frames, self.slicing)


@dataclass(frozen=True)
class ClipAugmentSection:
    """``[augment]``: what all frames of a video go through alike; CLIP4Clip itself has none of it.

    Attributes:
        scale: share of a frame's area that is cropped.
        ratio: width over height of the crop.
        hflip: probability of a mirror image.
        color_jitter: strength of changes in brightness, contrast and saturation.
        splice: probability that a video is put together from pieces of several, where the data know pieces (GRID's
            words).
        phrase: probability that such a video has but a few neighbouring pieces, mostly one: a word is easier to learn
            than a sentence, and shorter.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    hflip: float = 0.0
    color_jitter: float = 0.0
    splice: float = 0.0
    phrase: float = 0.0


@dataclass(frozen=True)
class RetrievalOptimizerSection(OptimizerSection):
    """``[optimizer]``: as for every task, and CLIP4Clip's second learning rate.

    Attributes:
        tower_lr: of the pretrained towers; ``lr`` is that of what is new, the head and the masks. None for ``lr``.
    """

    tower_lr: float | None = None


@dataclass(frozen=True)
class RetrievalRecipe:
    """One training run of text-video retrieval; see the sections for what each table holds.

    ``run.accumulation`` cuts an update's batch into passes through the towers; the loss is over all pairs of the whole
    batch all the same.
    """

    model: RetrievalModelSection
    data: RetrievalDataSection
    run: RunSection
    task: Literal["retrieval"] = "retrieval"
    augment: ClipAugmentSection = field(default_factory=ClipAugmentSection)
    optimizer: RetrievalOptimizerSection = field(default_factory=RetrievalOptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as nested plain values, fields that are None left out."""
        return without_none(dataclasses.asdict(self))


def check_retrieval(recipe: RetrievalRecipe) -> None:
    """Checks what only this task's sections say.

    Raises:
        RecipeError: an impossible value; names its key.
    """
    augment, data = recipe.augment, recipe.data
    if data.fps < 0:
        raise RecipeError(f"Recipe key data.fps is {data.fps}; it must be positive, or 0 for every frame.")
    if data.max_frames < 1:
        raise RecipeError(f"Recipe key data.max_frames is {data.max_frames}; it must be at least 1.")
    for key in ("hflip", "splice", "phrase"):
        if not 0 <= getattr(augment, key) <= 1:
            raise RecipeError(f"Recipe key augment.{key} is {getattr(augment, key)}; it must lie between 0 and 1.")
    low, high = augment.scale
    if not 0 < low <= high <= 1:
        raise RecipeError(f"Recipe key augment.scale is {augment.scale}; it must rise and lie between 0 and 1.")
    if recipe.optimizer.layer_decay is not None:
        raise RecipeError("Recipe key optimizer.layer_decay is for classifiers; use optimizer.tower_lr.")
    tower_lr = recipe.optimizer.tower_lr
    if tower_lr is not None and tower_lr <= 0:
        raise RecipeError(f"Recipe key optimizer.tower_lr is {tower_lr}; it must be positive.")
    if recipe.model.lock_image_tower and recipe.model.freeze_layers is not None:
        raise RecipeError("Recipe keys model.lock_image_tower and model.freeze_layers exclude each other; use one.")
