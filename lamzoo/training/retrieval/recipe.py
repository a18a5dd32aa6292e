"""The text-video retrieval recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

from lamzoo.data import OnBadInput
from lamzoo.data.video.sampling import FrameSampling, Slicing
from lamzoo.errors import RecipeError
from lamzoo.records import Limits
from lamzoo.training.recipe_common import (
    Count,
    CountOrZero,
    DataSectionBase,
    Fraction,
    ModelSectionBase,
    OptimizerSection,
    Positive,
    PositiveOrZero,
    Probability,
    ReductionSection,
    RunSection,
    ScheduleSection,
    TaskRecipe,
    check_crops,
)

Tower = Literal["vision", "text"]


@dataclass(frozen=True)
class RetrievalModelSection(ModelSectionBase):
    """``[model]``: a model of the family ``lam_clip4clip`` or ``open_clip/<name>``, and its frozen parts.

    ``max_frames`` and ``fps`` in ``kwargs`` default to those in ``[data]``.

    Attributes:
        fused_attention: whether PyTorch may use its fused kernels. On CPUs, bfloat16 training of short sequences is
            faster without them; use the same value on both sides of a comparison.
        lock_image_tower: freeze the vision tower except for its masks.
        freeze_layers: number of first blocks of both towers to freeze, with the embeddings; None for none.
    """

    fused_attention: bool = True
    lock_image_tower: bool = False
    freeze_layers: CountOrZero | None = None


@dataclass(frozen=True)
class RetrievalDataSection(DataSectionBase):
    """``[data]``: videos, as :func:`lamzoo.data.retrieval.create_retrieval_dataset` opens them.

    Attributes:
        val_fraction: share of the training videos, drawn with ``run.seed``, that is held out if the data has no
            ``eval_split``; None makes a missing split an error.
        fps: candidate frames per second; 0 for every frame.
        max_frames: maximum number of frames per video.
        slicing: selection among more frames, as of :class:`lamzoo.data.video.sampling.FrameSampling`.
        captions: ``"all"`` captions of a video in each epoch, or ``"one"`` of them at random.
        equal_captions: treatment of videos with equal captions in a batch: ``"negatives"`` as in CLIP4Clip, or
            ``"positives"``.
        on_bad_input: treatment of unreadable videos in the scan: ``"stop"``, or ``"skip"``, which leaves them out and
            lists them in ``bad-inputs.csv``.
    """

    val_fraction: Fraction | None = None
    fps: PositiveOrZero = 1.0
    max_frames: Count = 12
    slicing: Slicing = "uniform"
    captions: Literal["all", "one"] = "all"
    equal_captions: Literal["negatives", "positives"] = "negatives"
    on_bad_input: OnBadInput = "stop"

    @property
    def sampling(self) -> FrameSampling:
        """The frame sampling."""
        return FrameSampling(self.fps or None, self.max_frames, self.slicing)


@dataclass(frozen=True)
class ClipAugmentSection:
    """``[augment]``: augmentation shared by all frames of a video; CLIP4Clip itself uses none.

    Attributes:
        scale: area of the crop as a fraction of the frame.
        ratio: aspect ratio of the crop, width over height.
        hflip: probability of a horizontal flip.
        color_jitter: strength of random changes in brightness, contrast and saturation.
        splice: probability that a video is spliced from pieces of several, for data with annotated pieces (GRID's
            words).
        phrase: probability that such a video has only a few neighbouring pieces, usually one: a word is shorter than a
            sentence, and easier to learn.
    """

    scale: tuple[Positive, Positive] = (1.0, 1.0)
    ratio: tuple[Positive, Positive] = (1.0, 1.0)
    hflip: Probability = 0.0
    color_jitter: PositiveOrZero = 0.0
    splice: Probability = 0.0
    phrase: Probability = 0.0


@dataclass(frozen=True)
class TowersSection:
    """``[towers]``: the two towers, whole.

    Attributes:
        freeze: the frozen towers, ``"vision"``, ``"text"`` or both, as of
            :meth:`lamzoo.models.clip4clip.Clip4Clip.freeze_towers`. They stay in evaluation mode. Without augmentation
            they encode each text and video alone on a CPU, which makes a run with ``cache`` the same bit by bit.
        vision_lr: learning rate of the vision tower; None for ``optimizer.tower_lr``.
        text_lr: learning rate of the text tower; None for ``optimizer.tower_lr``.
        cache: folder for the states of frozen towers, such as one beside the data. They are computed once, and again
            if the tower, the data or the preprocessing differ. None computes them in each epoch.
    """

    freeze: list[Tower] = field(default_factory=list)
    vision_lr: Positive | None = None
    text_lr: Positive | None = None
    cache: str | None = None


@dataclass(frozen=True)
class RetrievalOptimizerSection(OptimizerSection):
    """``[optimizer]``: the common section, and CLIP4Clip's second learning rate.

    Attributes:
        tower_lr: learning rate of the pretrained towers; ``lr`` applies to new parts, head and masks. None for ``lr``.
    """

    tower_lr: Positive | None = None


@dataclass(frozen=True)
class MatchingSection:
    """``[matching]``: two-stage retrieval with ``similarity="tight"`` (ALBEF, arXiv 2107.07651).

    The contrastive loss is that of the embeddings alone, the first stage. The joint transformer, the second stage,
    learns to tell matching pairs from others of the batch, and scores are those of both stages. Pairs with equal
    captions are no negatives, and ``data.captions`` must be ``"one"``. Without this section, the contrastive loss is
    that of the joint transformer on all pairs of the batch, as in CLIP4Clip.

    Attributes:
        weight: weight of the second stage's loss.
        rerank: number of candidates of a query that the joint transformer orders in evaluation.
        negatives: ``"hard"`` draws one for each text and video by their similarity, as ALBEF does, whose joint
            transformer is pretrained; ``"group"`` compares all pairs within groups of the batch by CLIP4Clip's loss,
            for a joint transformer that begins from scratch.
        group: pairs of a group, so that an update has ``batch_size * group`` comparisons; only read with ``"group"``.
    """

    weight: Positive = 1.0
    rerank: Count = 50
    negatives: Literal["hard", "group"] = "hard"
    group: Annotated[int, Limits(least=2)] = 8


@dataclass(frozen=True)
class RetrievalRecipe(TaskRecipe):
    """A training run of text-video retrieval; see the sections for the contents of each table.

    ``run.accumulation`` splits an update's batch over forward passes; the loss is still over all pairs of the whole
    batch.
    """

    model: RetrievalModelSection
    data: RetrievalDataSection
    run: RunSection
    task: Literal["retrieval"] = "retrieval"
    augment: ClipAugmentSection = field(default_factory=ClipAugmentSection)
    optimizer: RetrievalOptimizerSection = field(default_factory=RetrievalOptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    towers: TowersSection | None = None
    reduction: ReductionSection | None = None
    matching: MatchingSection | None = None

    def check(self) -> None:
        check_crops(self.augment.scale, self.augment.ratio)
        if self.optimizer.layer_decay is not None:
            raise RecipeError("Recipe key optimizer.layer_decay is for classifiers; use optimizer.tower_lr.")
        if self.model.lock_image_tower and self.model.freeze_layers is not None:
            raise RecipeError("Recipe keys model.lock_image_tower and model.freeze_layers exclude each other; use one.")
        if self.towers is not None:
            self._check_towers(self.towers)
        if self.matching is not None and self.data.captions == "all":
            raise RecipeError(
                "[matching] compares pairs of the batch, which must not have a video twice, and data.captions "
                "is 'all'; set it to 'one'."
            )
        if self.reduction is not None:
            self.reduction.check(merges_only=True)

    @property
    def augments(self) -> list[str]:
        """The keys of ``[augment]`` by which a video, or its caption, differs from one epoch to the next."""
        plain, given = asdict(ClipAugmentSection()), asdict(self.augment)
        return [key for key in plain if given[key] != plain[key] and key != "phrase"]  # which goes with splice

    def _check_towers(self, towers: TowersSection) -> None:
        others = {
            "lock_image_tower": self.model.lock_image_tower,
            "freeze_layers": self.model.freeze_layers is not None,
        }
        for key, given in others.items():
            if towers.freeze and given:
                raise RecipeError(f"Recipe keys towers.freeze and model.{key} exclude each other; use one.")
        for tower, rate in (("vision", towers.vision_lr), ("text", towers.text_lr)):
            if tower in towers.freeze and rate is not None:
                raise RecipeError(
                    f"Recipe key towers.{tower}_lr is {rate}, and towers.freeze has {tower!r}; leave one out."
                )
        if towers.cache is None:
            return
        if not towers.freeze:
            raise RecipeError("Recipe key towers.cache is for frozen towers; name them in towers.freeze.")
        if self.run.fsdp:
            raise RecipeError("Recipe key towers.cache does not go with run.fsdp; leave one out.")
        for key in self.augments:
            if "vision" in towers.freeze or key == "splice":
                raise RecipeError(
                    f"Recipe key towers.cache needs the same videos in each epoch, and augment.{key} is "
                    f"{getattr(self.augment, key)}; leave one out."
                )
