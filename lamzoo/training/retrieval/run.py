"""Training runs of text-video retrieval."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import timm.data
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lamzoo.data.retrieval import (
    CaptionedVideos,
    find_invalid_videos,
    leave_out_invalid_videos,
    select_videos,
)
from lamzoo.data.retrieval.clips import ClipAugment, Clips, EachFrame, Pairs, pad_clips
from lamzoo.evaluation.retrieval.evaluate import encode_texts, frames_config, join_videos, score_embeddings
from lamzoo.evaluation.retrieval.reranking import check_rerank
from lamzoo.profiling.inputs import evaluating
from lamzoo.registry.factory import create_model
from lamzoo.training.build import attention_kernels, mask_parameters, reduce_by_section, timm_optimizer
from lamzoo.training.loaders import check_batch, create_seeded_loader, generator_of, pins_memory, seed_everything
from lamzoo.training.retrieval.contrastive import contrastive_backward, contrastive_loss
from lamzoo.training.retrieval.recipe import RetrievalRecipe, TowersSection
from lamzoo.training.retrieval.second_stage import group_loss, matching_loss
from lamzoo.training.retrieval.tower_cache import TextStates, TowerCache
from lamzoo.training.splits import BadInputs, ScanProgress, check_disjoint, open_roles, scan_split
from lamzoo.training.trainer import TrainingRun

_MAX_LOGIT_SCALE = 4.6052  # ln(100), CLIP's own limit


class RetrievalRun(TrainingRun):
    """A training run of a retrieval model; arguments as of :class:`TrainingRun`."""

    recipe: RetrievalRecipe
    cached: TowerCache

    def open_data(self) -> None:
        data = self.recipe.data
        self.splits, self.videos_held_out = open_roles(self.task, data, self.recipe.run.seed)
        check_disjoint(self.splits, lambda split: split.videos, "videos", data.source)
        if self.recipe.augment.splice:
            self.splits["train"].splice(data.sampling)  # raises if the data does not support it

    def build_model(self) -> nn.Module:
        section, data = self.recipe.model, self.recipe.data
        kwargs = {"max_frames": data.max_frames, "fps": data.fps, **section.arguments()}
        model: Any = create_model(section.name, pretrained=section.pretrained, **kwargs)
        frames_config(model)  # raises for other models
        if self.recipe.matching is not None:
            check_rerank(model, self.recipe.matching.rerank)
        if section.lock_image_tower:
            model.lock_image_tower()
        if section.freeze_layers is not None:
            model.freeze_layers(section.freeze_layers)
        towers = self.recipe.towers
        if towers is not None and towers.freeze:
            model.freeze_towers(towers.freeze, one_by_one=not self.recipe.augments)
        if self.recipe.reduction is not None:
            reduce_by_section(model, self.recipe.reduction)
        if self.recipe.run.grad_checkpointing:
            model.set_grad_checkpointing(True)
        return model

    def datasets(self) -> Mapping[str, Any]:
        return self.splits

    def scan_data(self, progress: ScanProgress | None) -> BadInputs:
        bad: list[Any] = []
        for role, split in self.splits.items():
            self.splits[role] = self._scan(role, split, bad, progress)
        check_batch(self.recipe, len(self._pairs(None)), "pairs", self.recipe.data.train_split)
        return tuple(bad)

    def train_loader(self, model: nn.Module) -> DataLoader[Any]:
        recipe, augment = self.recipe, self.recipe.augment
        transform = ClipAugment(frames_config(model), augment.scale, augment.ratio, augment.hflip, augment.color_jitter)
        self.cached = TowerCache(recipe, model, self.accelerator)
        pairs = self._pairs(transform)
        states = self.cached.texts("train", pairs.videos) if self.cached.has("text") else None
        if self.cached.has("vision"):
            pairs = self.cached.pairs(pairs)
        return create_seeded_loader(recipe, pairs, _Collate(model.tokenizer, recipe.data.max_frames, states))

    def eval_loaders(self, model: nn.Module) -> list[DataLoader[Any]]:
        transform = EachFrame(timm.data.create_transform(**frames_config(model)))
        recipe, loaders = self.recipe, []
        for role, split in self.splits.items():
            if role == "train":
                continue
            clips: Any = Clips(split, recipe.data.sampling, transform)
            if self.cached.has("vision"):
                clips = self.cached.clips(role, clips)
            batch = recipe.run.batch_size // recipe.run.accumulation
            collate, workers = partial(pad_clips, frames=recipe.data.max_frames), recipe.data.workers
            pinned = pins_memory(recipe)
            loaders.append(DataLoader(clips, batch, collate_fn=collate, num_workers=workers, pin_memory=pinned))
        return loaders

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        section = self.recipe.optimizer
        rates = self._tower_rates()
        lam_scale = 1.0 if section.lam_lr is None else section.lam_lr / section.lr
        masks = set() if section.lam_lr is None else mask_parameters(model)
        undecayed = model.no_weight_decay()  # type: ignore[operator]
        groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            mask = ".lam." in name
            # Not matrix products: Muon leaves the towers' embeddings to AdamW but would take the masks' tables.
            embedding = name.endswith(".modality.bias") or (not mask and (name in undecayed or "embedding" in name))
            decay = 0.0 if parameter.ndim <= 1 or name in undecayed else section.weight_decay
            new = mask or not name.startswith("clip.") or name.startswith(model.fresh_layers)  # type: ignore[arg-type]
            tower = "vision" if name.startswith("clip.visual.") else "text"
            tower = "both" if name.startswith("clip.logit_") else tower
            scale = lam_scale if parameter in masks else 1.0 if new else rates[tower] / section.lr
            # timm's schedulers multiply the learning rate by lr_scale, so the group must not set its own rate.
            group = groups.setdefault(
                (decay, scale, embedding),
                {"params": [], "weight_decay": decay, "lr_scale": scale, "use_fallback": embedding},
            )
            group["params"].append(parameter)
        return timm_optimizer(section, list(groups.values()), weight_decay=0.0)

    def _tower_rates(self) -> dict[str, float]:
        """Returns the learning rates of the towers, and of what they have in common."""
        section, towers = self.recipe.optimizer, self.recipe.towers or TowersSection()
        both = section.tower_lr or section.lr
        return {"vision": towers.vision_lr or both, "text": towers.text_lr or both, "both": both}

    def prepare_model(self, model: nn.Module) -> Any:
        # Not wrapped: the gradients of both passes are averaged once, by contrastive_backward.
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def backward(self, epoch: int, update: int, batches: list[Any]) -> Tensor:
        rank, seed = self.accelerator.process_index, self.recipe.run.seed

        def encode(index: int, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            frames, mask, text, *states = batch
            # The second pass repeats the random draws of the first.
            seed_everything(seed, epoch, update * len(batches) + index, rank, 1)
            with self.accelerator.autocast():
                texts = self.model.embed_text(*states) if states else self.model.encode_text(text)
                return texts, self._encode_video(self.model, frames, mask)

        masks = [batch[1] for batch in batches]
        shared, matching = self.recipe.data.equal_captions == "positives", self.recipe.matching
        captions = [batch[2] for batch in batches] if shared or matching is not None else None

        def staged_loss(text: Tensor, video: Tensor, mask: Tensor, positives: Tensor | None) -> Tensor:
            assert matching is not None and positives is not None
            dual = self.model.dual_similarity(text, video, mask)
            if matching.negatives == "group":
                matched = group_loss(self.model, text, video, mask, positives, matching.group)
            else:
                generator = generator_of(seed, epoch, update, 0, 3)
                matched = matching_loss(self.model, text, video, mask, dual, positives, generator)
            return contrastive_loss(dual, positives if shared else None) + matching.weight * matched

        loss_of = None if matching is None else staged_loss
        with attention_kernels(self.recipe.model.fused_attention):
            return contrastive_backward(self.accelerator, self.model, batches, encode, masks, captions, loss_of)

    @torch.no_grad()
    def after_update(self) -> None:
        self.model.clip.logit_scale.clamp_(0, _MAX_LOGIT_SCALE)

    @torch.inference_mode()
    def score(self, role: str) -> dict[str, dict[str, float]]:
        split, model = self.splits[role], self.evaluated_model
        loader = self.prepared_eval_loaders[0 if role == "validation" else 1]
        videos, masks = [], []
        with evaluating(model), self.accelerator.autocast():
            for frames, mask in loader:
                video = self._encode_video(model, frames, mask).float()
                video, mask = self.accelerator.gather_for_metrics((video, mask))
                videos.append(video)
                masks.append(mask)
            texts = self._encode_texts(model, role)
            rerank = None if self.recipe.matching is None else self.recipe.matching.rerank
            scores = score_embeddings(model, texts, *join_videos(videos, masks), split.video_of_text, rerank=rerank)
        return scores[0]

    def facts(self, command: str | None) -> dict[str, Any]:
        return super().facts(command) | {"training_captions": len(self.splits["train"].texts)}

    def _encode_video(self, model: Any, frames: Tensor, mask: Tensor) -> Tensor:
        return model.embed_video(frames, mask) if self.cached.has("vision") else model.encode_video(frames, mask)

    def _encode_texts(self, model: Any, role: str) -> Tensor:
        split, batch = self.splits[role], self.recipe.run.batch_size
        if not self.cached.has("text"):
            return encode_texts(model, split.texts, batch)
        states = self.cached.texts(role, split)
        parts = [states(split.texts[start : start + batch]) for start in range(0, len(split.texts), batch)]
        return torch.cat([model.embed_text(part.to(self.accelerator.device)).float() for part in parts])

    def _pairs(self, transform: Any) -> Pairs:
        data = self.recipe.data
        augment = self.recipe.augment
        return Pairs(self.splits["train"], data.sampling, transform, data.captions, augment.splice, augment.phrase)

    def _scan(
        self, role: str, split: CaptionedVideos, bad: list[Any], progress: ScanProgress | None
    ) -> CaptionedVideos:
        """Leaves out the invalid videos; without ``data.scan`` only the missing ones, which are known already."""
        data = self.recipe.data
        scans = self.checkpoints.needs_scan()
        find = partial(find_invalid_videos, sampling=data.sampling, workers=data.workers) if scans else None
        found = scan_split(split, role, self.accelerator, progress, select=select_videos, find=find)
        bad += [(split.split or role, video) for video in found]
        return leave_out_invalid_videos(split, found, data.on_bad_input)


class _Collate:
    """Pads videos to one length in all batches, so that processes can exchange them, and tokenises captions."""

    def __init__(self, tokenizer: Any, frames: int, states: TextStates | None = None) -> None:
        self._tokenizer, self._frames, self._states = tokenizer, frames, states

    def __call__(self, pairs: list[tuple[Tensor, str]]) -> tuple[Tensor, ...]:
        frames, mask = pad_clips([clip for clip, _ in pairs], self._frames)
        texts = [text for _, text in pairs]
        states = () if self._states is None else (self._states(texts),)
        return frames, mask, self._tokenizer(texts), *states
