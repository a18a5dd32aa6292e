"""The recipe of text-video retrieval."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lamzoo.data import OnBadInput
from lamzoo.data.video.sampling import FrameSampling, Slicing
from lamzoo.errors import RecipeError
from lamzoo.training.recipe_common import (
    DataSectionBase,
    ModelSectionBase,
    OptimizerSection,
    RunSection,
    ScheduleSection,
    TaskRecipe,
)


@dataclass(frozen=True)
class RetrievalModelSection(ModelSectionBase):
    """``[model]``: a model of the family ``lam_clip4clip`` or ``open_clip/<name>``, and what of it is frozen.

    ``max_frames`` and ``fps`` in ``kwargs`` come from ``[data]`` where they are left out.

    Attributes:
        fused_attention: whether PyTorch may use its fused kernels. On CPUs, bfloat16 training of short sequences is
            two to three times faster without them; both sides of a comparison should say the same.
        lock_image_tower: train nothing of the vision tower but its masks.
        freeze_layers: blocks of both towers that are frozen, from the first one on, with the embeddings; None for none.
    """

    fused_attention: bool = True
    lock_image_tower: bool = False
    freeze_layers: int | None = None


@dataclass(frozen=True)
class RetrievalDataSection(DataSectionBase):
    """``[data]``: videos, as :func:`lamzoo.data.retrieval.create_retrieval_dataset` opens them.

    Attributes:
        val_fraction: where the data has no ``eval_split``, this share of the training videos, drawn with ``run.seed``,
            takes its place; None makes that an error.
        fps: frames a second that are candidates; 0 takes every frame of a video.
        max_frames: frames of a video at most.
        slicing: which ones, where there are more, as of :class:`lamzoo.data.video.sampling.FrameSampling`.
        captions: an epoch shows ``"all"`` captions of a video, or ``"one"`` of them, drawn anew.
        equal_captions: whether videos with equal captions in a batch count as ``"negatives"``, as in CLIP4Clip, or as
            ``"positives"``.
        on_bad_input: what a scan does with videos that can't be read: ``"stop"``, or ``"skip"``, which leaves them out
            and lists them in ``bad-inputs.csv``.
    """

    val_fraction: float | None = None
    fps: float = 1.0
    max_frames: int = 12
    slicing: Slicing = "uniform"
    captions: Literal["all", "one"] = "all"
    equal_captions: Literal["negatives", "positives"] = "negatives"
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
        tower_lr: of the pretrained towers; ``lr`` is for new parts, the head and the masks. None for ``lr``.
    """

    tower_lr: float | None = None


@dataclass(frozen=True)
class RetrievalRecipe(TaskRecipe):
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

    def check(self) -> None:
        augment, data = self.augment, self.data
        fraction = self.data.val_fraction
        if fraction is not None and not 0 < fraction < 1:
            raise RecipeError(f"Recipe key data.val_fraction is {fraction}; it must lie between 0 and 1.")
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
        if self.optimizer.layer_decay is not None:
            raise RecipeError("Recipe key optimizer.layer_decay is for classifiers; use optimizer.tower_lr.")
        tower_lr = self.optimizer.tower_lr
        if tower_lr is not None and tower_lr <= 0:
            raise RecipeError(f"Recipe key optimizer.tower_lr is {tower_lr}; it must be positive.")
        if self.model.lock_image_tower and self.model.freeze_layers is not None:
            raise RecipeError("Recipe keys model.lock_image_tower and model.freeze_layers exclude each other; use one.")
