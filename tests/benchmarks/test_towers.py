"""The comparison on frozen towers: ranks, damage, intervals, and a row on small towers."""

from __future__ import annotations

import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lamzoo
from benchmarks import towers
from benchmarks.ablation import run as ablation
from lamzoo.evaluation import retrieval_metrics
from lamzoo.lam import LamConfig
from lamzoo.training import parse_recipe, train
from tests.training.retrieval_data import retrieval_table, write_faces


@given(seed=st.integers(0, 2**31), captions=st.lists(st.integers(1, 3), min_size=2, max_size=6))
def test_ranks_are_those_of_the_metrics(seed: int, captions: list[int]) -> None:
    owners = [video for video, count in enumerate(captions) for _ in range(count)]
    scores = torch.randn(len(owners), len(captions), generator=torch.manual_seed(seed), dtype=torch.float64)
    expected = retrieval_metrics(scores, owners)
    for way, ranks in zip(("t2v", "v2t"), towers.ranks_of(scores, owners), strict=True):
        assert 100 * (ranks < 1).mean() == pytest.approx(expected[way]["R1"])
        assert ranks.mean() + 1 == pytest.approx(expected[way]["MeanR"])


@given(data=st.data(), videos=st.integers(2, 30))
def test_a_pool_has_the_match_and_others_once(data: st.DataObject, videos: int) -> None:
    owners = data.draw(st.lists(st.integers(0, videos - 1), min_size=1, max_size=20))
    pools = towers.pools(owners, videos)
    assert pools.shape == (len(owners), min(towers.POOL, videos))
    assert pools[:, 0].tolist() == owners
    assert all(len(set(pool)) == len(pool) and set(pool) <= {*range(videos)} for pool in pools.tolist())
    assert torch.equal(towers.pools(owners, videos), pools)


@given(st.text(alphabet="abc ", min_size=1).filter(str.strip))
def test_words_of_the_caption_are_left_in_their_order(text: str) -> None:
    kept, words = towers.drop_words(text).split(), text.split()
    assert len(kept) == max(1, round(len(words) / 2))
    rest = iter(words)
    assert all(word in rest for word in kept)  # a subsequence
    assert towers.drop_words(text) == " ".join(kept)


def test_half_of_the_patches_are_grey() -> None:
    image = torch.rand(3, 56, 42) + 0.1
    damaged = towers.drop_patches(image)
    patches = damaged.unfold(1, 14, 14).unfold(2, 14, 14).flatten(1, 2)
    gone = (patches == 0).all(dim=(-2, -1)).all(dim=0)
    assert gone.sum() == 6
    whole = image.unfold(1, 14, 14).unfold(2, 14, 14).flatten(1, 2)
    assert torch.equal(patches[:, ~gone], whole[:, ~gone])
    assert torch.equal(towers.drop_patches(image), damaged)


def test_an_interval_covers_seeds_and_queries() -> None:
    random = np.random.default_rng(0)
    others = [random.random(400) < 0.5 for _ in range(5)]
    better = [hits | (random.random(400) < 0.3) for hits in others]
    difference, low, high = towers.interval(better, others, draws=500)
    assert difference == pytest.approx(100 * (np.mean(better) - np.mean(others)))
    assert 0 < low < difference < high
    same = towers.interval(others, others, draws=50)
    assert same == (0.0, 0.0, 0.0)
    one = towers.interval([np.repeat(sign, 400) for sign in (True, False)], [np.repeat(False, 400)] * 2, draws=500)
    assert (one[1], one[2]) == (0.0, 100.0)  # a seed that wins everything and one that loses everything


def test_hits_are_of_photographs(tmp_path: Path) -> None:
    hits = {"multi.0.none.t2v": np.array([True, False, False, True]), "multi.0.none.v2t": np.array([False, True])}
    np.savez(tmp_path / "hits.npz", **hits)
    stored = towers.stored_hits("multi", 0, "none", tmp_path / "hits.npz")
    assert stored.tolist() == [0.25, 0.75]


def test_controls_have_the_parameters_that_their_rows_state() -> None:
    rows = {name: entry.set for name, entry in ablation.read_ablation(towers.FILE).rows.items()}
    tiny = {
        "embed_dim": 192,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1},
        "text_cfg": {"context_length": 32, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1},
    }
    sizes = {}
    for name, changes in rows.items():
        table: dict[str, Any] = {"model": {"name": "clip4clip", "kwargs": {}}}
        ablation.override(table, changes)
        lam = table["model"].get("lam", False)
        model = lamzoo.create_model(
            table["model"]["name"], clip=tiny, similarity="tight", words=True, patch_grid=4, max_frames=1,
            lam=LamConfig.from_dict(lam) if lam else False, **{"head_layers": 2, **table["model"]["kwargs"]},
        )  # fmt: skip
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
        assert (model.lam_config is not None) == (name in ("single", "multi", "paper", "positive", "modalities"))
    assert sizes["mlp"] == pytest.approx(sizes["multi"], rel=1e-3)
    assert sizes["pairs"] - sizes["plain"] == sizes["modalities"] - sizes["multi"] == 2 * 3 * 4
    assert sizes["layer"] > sizes["multi"]


def test_a_run_is_scored_whole_and_damaged_from_stored_states(tmp_path: Path) -> None:
    table = retrieval_table(write_faces(tmp_path, copies=1), tmp_path / "out")
    table["model"]["kwargs"] |= {"similarity": "tight", "words": True, "patch_grid": 2, "lam_in": ["head"]}
    table |= {"towers": {"freeze": ["vision", "text"], "cache": str(tmp_path / "states")}, "matching": {"rerank": 12}}
    table["schedule"]["epochs"], table["data"]["captions"] = 1, "one"
    recipe: Any = parse_recipe(table)
    result = train(recipe)
    model: Any = lamzoo.create_model(f"local-dir:{result.model}", pretrained=True).eval()
    found = towers.score(model, recipe)
    assert found.keys() == set(towers.DAMAGES)
    whole, hits = found["none"]
    for way, hit in zip(("t2v", "v2t"), hits, strict=True):  # there are 12, so that a pool has all of them
        assert whole[f"pool_{way}"] == pytest.approx(result.scores["test"][way]["R1"]) == 100 * hit.mean()
    assert all(scores["t2v_R1"] == scores["pool_t2v"] for scores, _ in found.values())
    assert not {"t2v_R1", "v2t_R10"} & set(towers.score(model, recipe, "val", ("none",), rerank=False)["none"][0])
    for scores, _ in found.values():
        assert {name for name in scores if name.startswith(("pool", "t2v", "v2t", "first", "match"))} == set(scores)
        assert set(scores) <= {field.name for field in fields(towers.Row)}
    rest = {field.name for field in fields(towers.Row)} - set(whole)
    assert rest == {
        "row", "seed", "damage", "lr", "params_m", "lam_params_m", "epochs", "train_seconds", "device", "precision",
        "torch", "recipe_sha256", "commit",
    }  # fmt: skip
    assert not np.array_equal(found["none"][1][0], found["words"][1][0])
    again = towers.score(model, recipe)  # from the files
    assert all(np.array_equal(one, two) for one, two in zip(again["patches"][1], found["patches"][1], strict=True))


def test_the_first_piece_of_work_runs_alone_and_failures_are_named_at_the_end() -> None:
    done: list[int] = []
    both = threading.Barrier(2, timeout=60)

    def work(piece: int) -> None:
        if piece:
            assert done[0] == 0
            both.wait()
        if piece == 1:
            raise lamzoo.LamzooError("no such file")
        done.append(piece)

    with pytest.raises(SystemExit, match="^1: no such file$"):
        towers._first_alone(work, [0, 1, 2, 3, 4], jobs=2)
    assert sorted(done) == [0, 2, 3, 4]
    towers._first_alone(work, [], jobs=2)


def test_the_table_states_intervals(tmp_path: Path) -> None:
    common = dict.fromkeys((field.name for field in fields(towers.Row)), 1.0) | {
        "device": "cpu",
        "precision": "no",
        "torch": "2",
    }
    rows = [
        towers.Row(**{**common, "row": row, "seed": seed, "damage": damage, "recipe_sha256": "", "commit": ""})
        for row in ("plain", "multi")
        for seed in (0, 1)
        for damage in towers.DAMAGES
    ]
    page = towers.table(rows, lambda row, seed, damage: np.arange(10) < (5 if row == "plain" else 7))
    plain, multi = page.splitlines()[2:4]
    assert page.endswith("Measured on: cpu, precision no, torch 2.\n")
    assert plain.startswith("| plain joint transformer | 1,000,000 | 1.00 |  |  |")
    assert multi.startswith("| a mask in each layer | 1,000,000 | 1.00 | +20.00 (")
    best = [
        towers.RateRow("multi", lr, 0, score, score, 1, "bf16", "")
        for lr, score in ((1e-3, 2.0), (3e-3, 4.0), (3e-4, 3.0))
    ]
    assert towers.best_rate(best, "multi") == 3e-3
