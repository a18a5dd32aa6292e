"""Scores of a retrieval model on captioned videos: by hand, in any batches, with and without the bad ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch

import lamzoo
from lamzoo.data.retrieval import create_retrieval_dataset
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import ConfigError, DataError, UnsupportedHostError
from lamzoo.evaluation import retrieval_metrics
from lamzoo.evaluation.retrieval.evaluate import evaluate_retrieval, frames_config
from lamzoo.evaluation.retrieval.reranking import rerank_candidates
from tests.training.retrieval_data import retrieval_table, write_faces


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), copies=1)


def build(faces: Path, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    towers = retrieval_table(faces, faces)["model"]["kwargs"]
    return lamzoo.create_model("lam_clip4clip_micro", **{**towers, "max_frames": 3, "fps": 0, **kwargs}).eval()


@pytest.mark.parametrize("similarity", ["mean", "seq", "tight"])
def test_the_scores_are_those_of_all_pairs(faces: Path, similarity: str) -> None:
    model = build(faces, similarity=similarity, lam_in=["vision"])
    dataset = create_retrieval_dataset(f"grid:{faces}:face", "test")
    result = evaluate_retrieval(model, dataset, batch_size=5, dual=similarity != "tight")
    transform = timm.data.create_transform(**frames_config(model))
    frames = torch.stack(
        [torch.stack([transform(frame) for frame in dataset.read(i, model.sampling).frames]) for i in range(12)]
    )
    with torch.no_grad():
        scores = model(frames, model.tokenizer(dataset.texts))
    for way, expected in retrieval_metrics(scores).items():
        assert result.metrics[way] == pytest.approx(expected)
    assert (result.texts, result.videos, result.skipped) == (12, 12, 0)
    if similarity == "tight":
        with pytest.raises(ConfigError, match="logits of similarity='tight' are only known up to a constant"):
            evaluate_retrieval(model, dataset, dual=True)
    else:
        assert result.dual is not None and result.dual.keys() == result.metrics.keys()


def test_with_all_candidates_two_stages_are_the_joint_transformer_on_all_pairs(faces: Path) -> None:
    model = build(faces, similarity="tight")
    dataset = create_retrieval_dataset(f"grid:{faces}:face", "test")
    whole, staged = (evaluate_retrieval(model, dataset, rerank=count) for count in (None, 12))
    assert staged.metrics == whole.metrics
    assert staged.first_stage is not None and whole.first_stage is None
    one = evaluate_retrieval(model, dataset, rerank=1)
    assert one.metrics == one.first_stage == staged.first_stage
    with pytest.raises(ConfigError, match="dual softmax needs the scores of all pairs"):
        evaluate_retrieval(model, dataset, rerank=3, dual=True)
    with pytest.raises(ConfigError, match='needs a model with a joint transformer, similarity="tight".*"seq"'):
        evaluate_retrieval(build(faces), dataset, rerank=3)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_candidates_come_first_in_the_order_of_their_matches_and_the_others_follow(faces: Path, count: int) -> None:
    model = build(faces, similarity="tight")
    model.head.max_pairs = 5
    random = torch.manual_seed(0)
    texts, videos = torch.randn(6, 32, generator=random), torch.randn(9, 3, 32, generator=random)
    masks = torch.tensor([[True, number > 1, number > 2] for number in range(9)])
    with torch.no_grad():
        dual, joint = model.dual_similarity(texts, videos, masks), model.similarity(texts, videos, masks)
        to_video, to_text = rerank_candidates(model, texts, videos, masks, dual, count)
    for staged, first, second in ((to_video, dual, joint), (to_text.T, dual.T, joint.T)):
        for row, scores, matches in zip(staged, first, second, strict=True):
            order, by_score = row.argsort(descending=True), scores.argsort(descending=True)
            chosen = by_score[:count]
            assert torch.equal(order[:count], chosen[matches[chosen].argsort(descending=True)])
            assert torch.equal(order[count:], by_score[count:])


def test_batches_do_not_change_the_scores(faces: Path) -> None:
    model, dataset = build(faces), create_retrieval_dataset(f"grid:{faces}:face", "test")
    one, many = (evaluate_retrieval(model, dataset, batch_size=size) for size in (1, 16))
    assert one.metrics == many.metrics


def test_videos_of_different_lengths_share_a_batch(faces: Path) -> None:
    model = build(faces, max_frames=15)
    dataset = create_retrieval_dataset(f"grid:{faces}:face", "test")
    short = evaluate_retrieval(model, dataset, FrameSampling(None, 2))
    assert short.videos == 12
    with pytest.raises(ConfigError, match="have 15 frames and this CLIP4Clip has positions for 3"):
        evaluate_retrieval(build(faces), dataset, FrameSampling(None, 15))


def test_a_video_that_cannot_be_read_stops_or_is_left_out_with_its_text(faces: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text((faces / "captions.jsonl").read_text())
    with np.load(faces / "face.npz") as archive:
        jpeg, offsets = archive["jpeg"].copy(), archive["offsets"]
    jpeg[offsets[-2] : offsets[-2] + 200] = 0  # the header of the last clip, which is of the test split
    np.savez(tmp_path / "face.npz", jpeg=jpeg, offsets=offsets)
    model, dataset = build(faces), create_retrieval_dataset(f"grid:{tmp_path}:face", "test")
    with pytest.raises(DataError, match=r"face\.npz\[35\]"):
        evaluate_retrieval(model, dataset)
    result = evaluate_retrieval(model, dataset, on_bad_input="skip")
    assert (result.texts, result.videos, result.skipped) == (11, 11, 1)


def test_a_classifier_is_refused(faces: Path) -> None:
    with pytest.raises(UnsupportedHostError, match="does not compare texts with videos"):
        evaluate_retrieval(lamzoo.create_model("vit_micro"), create_retrieval_dataset(f"grid:{faces}:face", "test"))
