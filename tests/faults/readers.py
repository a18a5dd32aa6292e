"""Faults of structured files and values: recipes, changes, class maps, labels, predictions, options and outputs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.driver import Row, cut, pipe, put, without_rights

DEEP = "[" * 100_000 + "]" * 100_000
TRAIN = "train --model local-dir:model --data photos --epochs 1 --device cpu --workers 0 --no-report"
EVAL = "eval local-dir:model --data photos --device cpu --json"


# Recipes.


def recipe(name: str, make: Callable[[], Any], *says: str, call: str = "train recipe.toml", **more: Any) -> Row:
    return Row(f"recipe: {name}", call, says, "recipe", make, **more)


def replaced(old: str, new: str) -> Callable[[], None]:
    def make() -> None:
        text = Path("recipe.toml").read_text()
        assert old in text
        put("recipe.toml", text.replace(old, new))

    return make


def section(text: str) -> Callable[[], None]:
    """More keys of the table of the run."""
    return replaced("report = false", f"report = false, {text}")


def change(name: str, argument: str, *says: str) -> Row:
    return recipe(name, lambda: None, *says, call=f"train recipe.toml '{argument}'")


RECIPES = [
    recipe("nested too deeply", partial(put, "recipe.toml", "a = " + DEEP), "recipe.toml", "nested too deeply"),
    recipe("JSON nested too deeply", partial(put, "recipe.json", '{"a": ' + DEEP + "}"), "recipe.json",
           "nested too deeply", call="train recipe.json"),
    recipe("tables nested too deeply", partial(put, "recipe.toml", "[" + ".".join("a" * 5000) + "]"), "recipe.toml"),
    recipe("truncated", partial(cut, "recipe.toml"), "recipe.toml"),
    recipe("empty", partial(put, "recipe.toml"), "model"),
    recipe("not UTF-8", partial(put, "recipe.toml", "task = 'größe'".encode("latin-1")), "recipe.toml", "UTF-8"),
    recipe("in UTF-16", partial(put, "recipe.toml", "task = 'a'".encode("utf-16")), "recipe.toml", "UTF-8"),
    recipe("with NUL", partial(put, "recipe.toml", "task = 'a\0b'"), "recipe.toml"),
    recipe("a pipe", partial(pipe, "recipe.toml"), "recipe.toml", "pipe"),
    recipe("a folder", lambda: (Path("recipe.toml").unlink(), Path("recipe.toml").mkdir()), "recipe.toml"),
    recipe("can't be read", partial(os.chmod, "recipe.toml", 0), "recipe.toml", "ermission", within=without_rights),
    recipe("a list", partial(put, "recipe.json", "[1]"), "recipe.json", call="train recipe.json"),
    recipe("a section that is a number", replaced("schedule = {epochs = 2, warmup_epochs = 0}", "schedule = 5"),
           "schedule"),
    recipe("a key twice", replaced("task =", 'task = "classification"\ntask ='), "recipe.toml"),
    recipe("an unknown key", section("wheels = 4"), "wheels"),
    recipe("a batch size of text", section('accumulation = "two"'), "accumulation"),
    recipe("a batch size of 10^12", replaced("batch_size = 6", "batch_size = 1000000000000"), "batch_size"),
    recipe("a batch size of 0", replaced("batch_size = 6", "batch_size = 0"), "batch_size"),
    recipe("an epoch count of 10^30", replaced("epochs = 2", "epochs = 1000000000000000000000000000000"), "epochs"),
    recipe("a negative number of epochs", replaced("epochs = 2", "epochs = -1"), "epochs"),
    recipe("a seed of 2^70", section(f"seed = {2**70}"), "seed"),
    recipe("a negative seed", section("seed = -1"), "seed"),
    recipe("an average of 2", replaced("ema_decay = 0.9", "ema_decay = 2.0"), "ema_decay"),
    recipe("an average of NaN", replaced("ema_decay = 0.9", "ema_decay = nan"), "recipe.toml", "nan"),
    recipe("no checkpoint to keep", section("keep_checkpoints = 0"), "keep_checkpoints"),
    recipe("a learning rate of NaN", replaced("schedule =", "optimizer = {lr = nan}\nschedule ="), "recipe.toml",
           "nan"),
    recipe("an infinite learning rate", replaced("schedule =", "optimizer = {lr = inf}\nschedule ="),
           "recipe.toml", "inf"),
    recipe("an optimiser of text", replaced("schedule =", 'optimizer = {kwargs = {eps = "x"}}\nschedule ='), "eps"),
    recipe("10^6 workers", replaced("val_fraction = 0.25", "val_fraction = 0.25, workers = 1000000"), "workers"),
    recipe("an image size of 10^9", replaced("depth = 1", "depth = 1, img_size = 1000000000"), "img_size"),
    recipe("a depth of text", replaced("depth = 1", 'depth = "abc"'), "depth"),
    recipe("an output of NUL", replaced('output = "run"', 'output = "run\\u0000"'), "output"),
    recipe("an output of 5,000 characters", replaced('output = "run"', f'output = "{"x" * 5000}"'), "xxx", "too long"),
    recipe("validation on nothing", replaced("val_fraction = 0.25", "val_fraction = nan"), "recipe.toml", "nan"),
    change("a change nested too deeply", f"run.seed={'[' * 3000}", "run.seed"),
    change("a change without a value", "run.seed=", "run.seed"),
    change("a change of a section", "run=5", "run"),
    change("a change of no section", "wheels.count=5", "wheels"),
    change("a seed of 2^70 as a change", f"run.seed={2**70}", "seed"),
]  # fmt: skip


# Class maps, ReaL labels, predictions.


def mapped(name: str, make: Callable[[], Any], *says: str, file: str = "map.json", **more: Any) -> Row:
    return Row(f"class map: {name}", f"{EVAL} --class-map {file}", says or (file,), "model photos", make, **more)


def real(name: str, content: bytes | str, *says: str) -> Row:
    return Row(f"ReaL: {name}", f"{EVAL} --class-map model --real-labels real.json", says or ("real.json",),
               "model photos", partial(put, "real.json", content))  # fmt: skip


LISTS = [
    mapped("nested too deeply", partial(put, "map.json", DEEP), "map.json", "nested"),
    mapped("a number", partial(put, "map.json", "5")),
    mapped("numbers", partial(put, "map.json", "[1, 2]")),
    mapped("empty", partial(put, "map.json")),
    mapped("a class of number 10^20", partial(put, "map.json", json.dumps({"blue": 0, "red": 10**20}))),
    mapped("a class twice", partial(put, "map.json", '["blue", "blue"]'), "map.json", "twice"),
    mapped("a gap", partial(put, "map.json", '{"0": "blue", "2": "red"}')),
    mapped("not UTF-8", partial(put, "map.txt", "grün\nrot".encode("latin-1")), "map.txt", "UTF-8", file="map.txt"),
    mapped("a pipe", partial(pipe, "map.txt"), "map.txt", file="map.txt"),
    mapped("a folder", lambda: Path("map.txt").mkdir(), "map.txt", file="map.txt"),
    mapped("missing", lambda: None, "map.txt", file="map.txt"),
    mapped("can't be read", lambda: put("map.txt", "blue\nred").chmod(0), "map.txt", "ermission", file="map.txt",
           within=without_rights),
    mapped("classes that are absent", partial(put, "map.txt", "cat\ndog\n"), "blue", file="map.txt"),
    real("nested too deeply", DEEP),
    real("empty", ""),
    real("of text", '[["blue"]]'),
    real("of 10^20", json.dumps([[10**20]] * 16), str(10**20)),
    real("negative", json.dumps([[-1]] * 16)),
    real("too few", "[[0]]", "1 images with ReaL labels"),
    real("a number", "5"),
    real("NaN", "[[NaN]]"),
]  # fmt: skip


def predictions(name: str, task: str, make: Callable[[], Any], *says: str, **more: Any) -> Row:
    file = {"moments": "moments.jsonl", "captions": "captions.json"}[task]
    call = f"eval {file} --task {task} --data grid:speech:audio --split test --json"
    return Row(f"predictions: {task}: {name}", call, says or (file,), f"{task} speech", make, **more)


def first(**changes: Any) -> Callable[[], None]:
    """Changes the first line of the predicted moments."""

    def make() -> None:
        head, *rest = Path("moments.jsonl").read_text().splitlines()
        put("moments.jsonl", "\n".join([json.dumps({**json.loads(head), **changes}), *rest]) + "\n")

    return make


def caption(content: Any) -> Callable[[], None]:
    return lambda: put("captions.json", json.dumps([content, *json.loads(Path("captions.json").read_text())[1:]]))


PREDICTIONS = [
    *(
        predictions(name, task, partial(make, file))
        for task, file in (("moments", "moments.jsonl"), ("captions", "captions.json"))
        for name, make in (
            ("truncated", partial(cut, share=0.45)), ("a pipe", pipe),
            ("nested too deeply", partial(put, content=DEEP)),
            ("not UTF-8", partial(put, content=b'{"qid": "\xff"}\n')),
        )
    ),
    predictions("empty", "moments", partial(put, "moments.jsonl"), "lack 11 of 11 queries"),
    predictions("empty", "captions", partial(put, "captions.json")),
    predictions("windows of text", "moments", first(pred_relevant_windows="all")),
    predictions("windows of one number", "moments", first(pred_relevant_windows=[[1.0]]), "test0-red"),
    predictions("windows that end before they begin", "moments", first(pred_relevant_windows=[[9.0, 1.0, 0.5]]),
                "test0-red"),
    predictions("windows of booleans", "moments", first(pred_relevant_windows=[[True, False, True]]),
                "test0-red"),
    predictions("an unknown query", "moments", first(qid="nobody"), "nobody"),
    predictions("a query of a list", "moments", first(qid=[1])),
    predictions("a query twice", "moments",
                lambda: put("moments.jsonl", Path("moments.jsonl").read_text().splitlines()[0] + "\n" +
                            Path("moments.jsonl").read_text()), "test0-red"),
    predictions("NaN", "moments",
                lambda: put("moments.jsonl", Path("moments.jsonl").read_text().replace("8.2122", "NaN"))),
    predictions("a number that is too large", "moments",
                lambda: put("moments.jsonl", Path("moments.jsonl").read_text().replace("8.2122", "1e999"))),
    predictions("a caption that is a number", "captions", caption({"image_id": "test0-red-at-left", "caption": 5})),
    predictions("a caption without its clip", "captions", caption({"caption": "red"})),
    predictions("an unknown clip", "captions", caption({"image_id": "nobody", "caption": "red"}),
                "test0-red-at-left"),
    predictions("an entry that is a number", "captions", caption(5)),
]  # fmt: skip


# Options and outputs.

PREDICT = "predict local-dir:model photo.png"
SEARCH = "search red --videos clips --model local-dir:retriever --device cpu"
FIND = "find red clips/coffee.mp4 --model local-dir:film_finder --features local-dir:retriever"
DESCRIBE = "describe clips/coffee.mp4 --model local-dir:film_describer --features local-dir:retriever"
EXTRACT = "extract-features clips --model local-dir:retriever"
EXPORT = "export local-dir:model"
LONG = "x" * 300
FILMS = "retriever film_finder film_describer clips"


def option(call: str, more: str, *says: str, needs: str = "model photo photos", **extra: Any) -> Row:
    shown = more if len(more) < 50 else f"{more[:20]}, {len(more)} characters"
    return Row(f"option: {call.split()[0]} {shown}", f"{call} {more}", says, needs, **extra)


OPTIONS = [
    option(TRAIN, f"--seed {2**70}", "seed"),
    option(TRAIN, "--seed -1", "seed"),
    option(TRAIN, "--lr nan", "lr"),
    option(TRAIN, "--lr inf", "lr"),
    option(TRAIN, "--batch-size 1000000000000", "batch"),
    option(TRAIN, "--epochs 100000000000000000000000000", "epochs"),
    option(TRAIN, "--img-size 1000000000", "--img-size"),
    option(TRAIN, "--img-size 0", "--img-size"),
    option(TRAIN, "--workers 1000000", "workers"),
    option(TRAIN, "--val-fraction nan", "--val-fraction"),
    option("bench lam_vit_micro", f"--out b.csv --seed {2**70}", "seed", needs=""),
    option("bench lam_vit_micro", "--out b.csv --timeout nan", "timeout", needs=""),
    option("bench lam_vit_micro", "--out b.csv --threads 1000000000", "threads", needs=""),
    option(PREDICT, "--topk -1", "topk"),
    option(PREDICT, "--batch-size 0", "batch size"),
    option(EVAL, "--limit 0", "limit"),
    option(EVAL, "--limit -5", "limit"),
    option(EVAL, "--workers 1000000", "workers"),
    option(EVAL, f"--batch-size {10**30}", "batch"),
    option(SEARCH, "--fps nan", "fps", needs=FILMS),
    option(SEARCH, "--fps -1", "fps", needs=FILMS),
    option(SEARCH, f"--max-frames {10**30}", "", needs=FILMS),
    option(FIND, "--clip-seconds nan", "clip", needs=FILMS),
    option(FIND, "--clip-seconds 0", "clip", needs=FILMS),
    option(DESCRIBE, "--rate nan", "rate", needs=FILMS),
    option(DESCRIBE, "--seconds inf", "seconds", needs=FILMS),
    option(DESCRIBE, "--start -5", "start", needs=FILMS),
    option(DESCRIBE, "--start nan", "start", needs=FILMS),
    option(DESCRIBE, "--beams 0", "beams", needs=FILMS),
    option(DESCRIBE, "--top-p 7", "top", needs=FILMS),
    option(EXTRACT, "--out features --clip-seconds nan", "clip", needs=FILMS),
    option(EXTRACT, "--out features --batch-size 0", "batch", needs=FILMS),
    option(EXPORT, "--out x.onnx --keep nan", "keep"),
    option(EXPORT, "--out x.onnx --target-gmacs -1", "gmacs"),
    option(EXPORT, "--out x.onnx --keep 0.5 --at 99999999999999999999999", ""),
    option(PREDICT, f"--checkpoint {'x' * 5000}.safetensors", ""),
    option(PREDICT, "--device cuda:99999999999999999999", "cuda"),
    option(PREDICT, "--device ''", "device"),
    option(EVAL, f"--output {LONG}.json", "xxx"),
    option(EVAL, f"--output {'x' * 5000}.json", "xxx"),
    option(EVAL, f"--state {LONG}.json", "xxx"),
    option(EVAL, "--output /dev/full", "/dev/full"),
    option(EVAL, "--output model", "model"),
    option(EVAL, "--output nowhere/x.json", "nowhere"),
    option(EXPORT, "--out /dev/full --format onnx", ""),
    option(EXPORT, f"--out {LONG}.onnx", "xxx"),
    option("explain local-dir:model photo.png", f"--out {LONG}.png", "xxx"),
    option("explain local-dir:model photo.png", "--out /dev/full", "/dev/full"),
    option("explain local-dir:model photo.png", "--out model", "model"),
    option(SEARCH, f"--sheet {LONG}.png", "xxx", needs=FILMS),
    option(SEARCH, f"--index {LONG}.safetensors", "xxx", needs=FILMS),
    option(FIND, "--strip /dev/full", "/dev/full", needs=FILMS),
    option(FIND, "--html nowhere/x.html", "nowhere", needs=FILMS),
    option(DESCRIBE, "--out /dev/full", "/dev/full", needs=FILMS),
    option(EXTRACT, f"--out {LONG}", "xxx", needs=FILMS),
    option(EXTRACT, "--out photo.png", "photo.png", needs=f"{FILMS} photo"),
    option(EXTRACT, "--out features --queries photo.png", "photo.png", needs=f"{FILMS} photo"),
    option("compare bench.csv", f"--out {LONG}", "xxx", needs="table"),
    option("compare bench.csv", "--out bench.csv", "bench.csv", needs="table"),
    option("demo", "--out photo.png", "photo.png", needs="photo"),
    Row("option: extract-features queries nested too deeply", f"{EXTRACT} --out features --queries q.jsonl", "q.jsonl",
        FILMS, partial(put, "q.jsonl", DEEP)),
    Row("option: extract-features queries that are a pipe", f"{EXTRACT} --out features --queries q.jsonl", "q.jsonl",
        FILMS, partial(pipe, "q.jsonl")),
    Row("option: extract-features queries of names outside", f"{EXTRACT} --out features --queries q.jsonl", "q.jsonl",
        FILMS, partial(put, "q.jsonl", '{"qid": "../../x", "query": "red"}\n')),
]  # fmt: skip

ROWS = [*RECIPES, *LISTS, *PREDICTIONS, *OPTIONS]
