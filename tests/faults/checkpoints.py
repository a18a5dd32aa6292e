"""Faults of runs and of everything that is continued: checkpoints, evaluation states, tables of bench, indexes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.faults.driver import Canary, Row, cut, edit, flip, limited, pipe, put, without_rights

RESUME = "train recipe.toml --resume"
RUN = ("run*", "cache*")
LEGACY = "run/checkpoints/update-*"


def newest() -> Path:
    return sorted(Path("run/checkpoints").glob("update-*"))[-1]


def in_newest(name: str, make: Callable[[str], Any]) -> Callable[[], None]:
    return lambda: make(str(newest() / name))


def in_all(name: str, make: Callable[[str], Any]) -> Callable[[], None]:
    def damage() -> None:
        for folder in Path("run/checkpoints").glob("update-*"):
            make(str(folder / name))

    return damage


def state(change: Callable[[dict[str, Any]], Any]) -> Callable[[], None]:
    def make() -> None:
        path = newest() / "state.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return make


DAMAGE: dict[str, Callable[[str], Any]] = {"missing": os.remove, "truncated": cut, "empty": put, "flipped": flip}
QUICK = {("model.safetensors", "flipped"), ("optimizer.bin", "truncated"), ("ema.safetensors", "missing"),
         ("state.json", "empty")}  # fmt: skip
WHOLE = [
    Row(f"checkpoint: the newest has {file} {damage}: the one before is used", RESUME, (file, "damaged"), "run",
        in_newest(file, make), code=0, out=True, writes=RUN, leaves=("run/model/config.json",),
        slow=(file, damage) not in QUICK)
    for file in ("model.safetensors", "optimizer.bin", "ema.safetensors", "state.json")
    for damage, make in DAMAGE.items()
    if damage != "flipped" or file != "state.json"  # which would be another valid state, or no JSON
] + [
    Row("checkpoint: the newest is an empty folder", RESUME, "damaged", "run",
        lambda: (shutil.rmtree(newest()), newest_again()), code=0, out=True, writes=RUN),
    Row("checkpoint: the newest has a pipe for its state", RESUME, ("state.json", "damaged"), "run",
        in_newest("state.json", pipe), code=0, out=True, writes=RUN),
    Row("checkpoint: the newest has a state nested too deeply", RESUME, ("state.json", "damaged"), "run",
        in_newest("state.json", partial(put, content="[" * 10**5)), code=0, out=True, writes=RUN),
    Row("checkpoint: the newest has a manifest of names outside", RESUME, ("state.json", "damaged"), "run",
        state(lambda content: content["files"].update({"../x": {"size": 0, "sha256": "0"}})), code=0, out=True,
        writes=RUN),
    Row("checkpoint: the newest has an update of text", RESUME, ("state.json", "damaged"), "run",
        state(lambda content: content.update(update="two")), code=0, out=True, writes=RUN),
    *(
        Row(f"checkpoint: all have {file} {damage}", RESUME, (file, "another folder"), "run", in_all(file, make))
        for file, damage, make in (
            ("model.safetensors", "missing", os.remove), ("model.safetensors", "flipped", flip),
            ("optimizer.bin", "truncated", cut), ("state.json", "empty", put), ("state.json", "truncated", cut),
            ("ema.safetensors", "missing", os.remove),
        )
    ),
    Row("checkpoint: a pickle in the place of the optimiser's state", RESUME, "optimizer.bin", "run",
        in_all("optimizer.bin", lambda path: put(path, pickle.dumps(Canary())))),
    Row("checkpoint: all can't be read", RESUME, ("state.json", "ermission"), "run",
        in_all("state.json", partial(os.chmod, mode=0)), within=without_rights),
]  # fmt: skip


def newest_again() -> None:
    Path("run/checkpoints/update-00000099").mkdir()


# Runs of 0.1.0, without a manifest.


def old(name: str, make: Callable[[], Any], *says: str, **more: Any) -> Row:
    return Row(f"0.1.0: {name}", RESUME, says, "old_run", make, writes=("run/data.json",), **more)


def in_old(name: str, content: Callable[[], Any]) -> Callable[[], None]:
    return lambda: torch.save(content(), newest() / name)


def with_average(content: bytes | None) -> Callable[[], None]:
    def make() -> None:
        if content is not None:
            (newest() / "custom_checkpoint_0.pkl").write_bytes(content)

    return make


OLD = [
    old("a pickle of averaged weights runs code", with_average(pickle.dumps(Canary())), "custom_checkpoint_0.pkl"),
    old("a pickle in the optimiser's state",
        lambda: (with_average(None)(), (newest() / "custom_checkpoint_0.pkl").unlink(),
                 torch.save({"state": Canary()}, newest() / "optimizer.bin")), "optimizer.bin"),
    old("a truncated optimiser's state",
        lambda: ((newest() / "custom_checkpoint_0.pkl").unlink(), cut(str(newest() / "optimizer.bin"))),
        "optimizer.bin"),
    old("truncated weights",
        lambda: ((newest() / "custom_checkpoint_0.pkl").unlink(), cut(str(newest() / "model.safetensors"))),
        "model.safetensors"),
    old("wrong types in the state",
        lambda: ((newest() / "custom_checkpoint_0.pkl").unlink(), state(lambda c: c.update(history="none"))()),
        "state.json"),
]  # fmt: skip


# The folder of a run.


@contextlib.contextmanager
def locked() -> Iterator[None]:
    with open("run/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def folder(name: str, call: str, make: Callable[[], Any] | None, *says: str, needs: str = "run", **more: Any) -> Row:
    return Row(f"run: {name}", call, says, needs, make, **more)


FOLDER = [
    folder("no --resume", "train recipe.toml", None, "already holds a run", "--resume"),
    folder("no recipe.json and no --resume", "train recipe.toml", lambda: Path("run/recipe.json").unlink(),
           "holds checkpoints, but no recipe.json"),
    folder("no recipe.json", RESUME, lambda: Path("run/recipe.json").unlink(), "recipe.json"),
    folder("recipe.json truncated", RESUME, partial(cut, "run/recipe.json"), "recipe.json"),
    folder("recipe.json a pipe", RESUME, partial(pipe, "run/recipe.json"), "recipe.json"),
    folder("recipe.json nested too deeply", RESUME, partial(put, "run/recipe.json", "[" * 10**5), "recipe.json"),
    folder("another recipe", f"{RESUME} --seed 7", None, "run.seed was 0 and is 7"),
    folder("another training in the folder", RESUME, lambda: put("run/.lock"), "another process", within=locked,
           writes=("run/.lock",)),
    folder("leftovers of a killed run are removed", RESUME,
           lambda: (put("run/checkpoints/.update-00000099/model.safetensors", b"half"),
                    put("run/checkpoints/.update-00000099/.state.json.abcdefgh.tmp", b"half")),
           code=0, out=True, writes=RUN, then=lambda: no_leftovers("run")),
    folder("the disk is full while the recipe is written", "train recipe.toml", None, "run/", needs="recipe",
           within=partial(limited, resource.RLIMIT_FSIZE, 100), writes=RUN),
    folder("the disk is full while a checkpoint is written", "train recipe.toml", None, "checkpoints",
           needs="recipe", within=partial(limited, resource.RLIMIT_FSIZE, 12_000), writes=RUN,
           then=lambda: no_leftovers("run")),
    folder("the output is a file", "train recipe.toml", partial(put, "run", "a file"), "run", needs="recipe"),
    folder("the output can't be written", "train recipe.toml", lambda: (Path("run").mkdir(), Path("run").chmod(0o500)),
           "run", "ermission", needs="recipe", within=without_rights),
    folder("metrics.csv is a folder", "train recipe.toml",
           lambda: Path("run/metrics.csv").mkdir(parents=True), "metrics.csv", needs="recipe", writes=RUN),
    folder("an image was added", RESUME, lambda: shutil.copy("photos/red/00.png", "photos/red/99.png"), "changed"),
    folder("an image was removed", RESUME, lambda: Path("photos/red/00.png").unlink(), "changed"),
    folder("an image was replaced", RESUME, lambda: shutil.copy("photo.png", "photos/red/00.png"), "changed",
           needs="run photo"),
    folder("an image moved to another class", RESUME,
           lambda: shutil.move("photos/red/00.png", "photos/blue/99.png"), "changed"),
    folder("a class was renamed, so that labels shift", RESUME, lambda: shutil.move("photos/red", "photos/ant"),
           "red", "ant"),
    folder("a class was added", RESUME, lambda: shutil.copytree("photos/red", "photos/green"), "green"),
    folder("a class was removed", RESUME, lambda: shutil.rmtree("photos/red"), "red"),
    folder("the data is gone", RESUME, lambda: shutil.rmtree("photos"), "photos"),
    folder("data.json truncated", RESUME, partial(cut, "run/data.json"), "data.json"),
    folder("the trained model is damaged", "eval local-dir:run --device cpu --json",
           partial(flip, "run/model/model.safetensors"), "model.safetensors"),
    folder("eval of a run without its model", "eval local-dir:run --device cpu --json",
           lambda: shutil.rmtree("run/model"), "run"),
    folder("eval of a run whose recipe is damaged", "eval local-dir:run --device cpu --json",
           partial(put, "run/recipe.json", "{}"), "recipe.json"),
]  # fmt: skip


def no_leftovers(folder: str) -> None:
    found = [str(path) for path in Path(folder).rglob("*") if path.name.endswith(".tmp")]
    found += map(str, Path(folder).rglob(".update-*"))
    assert not found, found


# Evaluations.

EVAL = "eval local-dir:model --data imagefolder:photos --batch-size 1 --device cpu --json --state state.json"
PARTIAL = {"seen": 4, "correct1": 2, "correct5": 4, "bad": [], "real_seen": 0, "real_correct1": 0,
           "real_correct5": 0, "seconds": 1.0}  # fmt: skip


def evaluation(name: str, make: Callable[[], Any], *says: str, **more: Any) -> Row:
    return Row(f"state: {name}", f"{EVAL} --resume", says or ("state.json",), "model photos state", make, **more)


STATES = [
    evaluation("truncated", partial(cut, "state.json")),
    evaluation("empty", partial(put, "state.json")),
    evaluation("a text", partial(put, "state.json", "I am a text")),
    evaluation("nested too deeply", partial(put, "state.json", "[" * 10**5)),
    evaluation("not UTF-8", partial(put, "state.json", b'{"kind": "\xff"}')),
    evaluation("a pipe", partial(pipe, "state.json")),
    evaluation("a folder", lambda: (Path("state.json").unlink(), Path("state.json").mkdir())),
    evaluation("of other images", lambda: None, "another evaluation"),
    evaluation("counts of text", partial(edit, "state.json", {"partial.seen": "four"})),
    evaluation("negative counts", partial(edit, "state.json", {"partial.seen": -4})),
    evaluation("more right than seen", partial(edit, "state.json", {"partial.correct1": 10**6})),
    evaluation("counts of NaN", lambda: put("state.json", Path("state.json").read_text().replace("1000.0", "NaN"))),
    evaluation("a key that is a list", partial(edit, "state.json", {"key": [1]})),
    evaluation("can't be read", partial(os.chmod, "state.json", 0), "state.json", "ermission", within=without_rights),
]  # fmt: skip

# Tables of bench, and of comparisons.


def table(name: str, make: Callable[[], Any], *says: str, **more: Any) -> Row:
    return Row(f"table: {name}", "compare bench.csv --format csv", says or ("bench.csv",), "table", make, **more)


TABLES = [
    table("truncated", partial(cut, "bench.csv", 0.9)),
    table("empty", partial(put, "bench.csv")),
    table("not a table", partial(put, "bench.csv", b"\x89PNG\r\n\x1a\n\0\0")),
    table("other columns", partial(put, "bench.csv", "a,b\n1,2\n")),
    table("a pipe", partial(pipe, "bench.csv")),
    table("missing", lambda: Path("bench.csv").unlink()),
    table("can't be read", partial(os.chmod, "bench.csv", 0), "bench.csv", "ermission", within=without_rights),
    table("a value of text", lambda: put("bench.csv", Path("bench.csv").read_text().replace("0.000502", "many"))),
    table("a field of a million characters", lambda: put("bench.csv", Path("bench.csv").read_text() + "x" * 10**6)),
    Row("table: bench goes on from a table that is none", "bench lam_vit_micro --out bench.csv", "bench.csv", "table",
        partial(put, "bench.csv", "a,b\n1,2\n")),
    Row("table: bench goes on from a pipe", "bench lam_vit_micro --out bench.csv", "bench.csv", "table",
        partial(pipe, "bench.csv")),
]  # fmt: skip

# Indexes of videos.

SEARCH = "search red --videos clips --model local-dir:retriever --index index.safetensors --no-sheet --device cpu"


def index(name: str, make: Callable[[], Any], *says: str, **more: Any) -> Row:
    return Row(f"index: {name}", SEARCH, says or ("index.safetensors",), "clips retriever index", make, **more)


def poisoned_index() -> None:
    np.save("index.npy", np.array([Canary()], object), allow_pickle=True)
    Path("index.npy").rename("index.safetensors")


INDEXES = [
    index("truncated", partial(cut, "index.safetensors")),
    index("empty", partial(put, "index.safetensors")),
    index("a text", partial(put, "index.safetensors", "I am a text")),
    index("a pickle", poisoned_index),
    index("a pipe", partial(pipe, "index.safetensors")),
    index("a folder", lambda: (Path("index.safetensors").unlink(), Path("index.safetensors").mkdir())),
    index("weights of a model", lambda: shutil.copy("retriever/model.safetensors", "index.safetensors")),
    index("a header of 2^63 bytes", partial(put, "index.safetensors", b"\xff" * 7 + b"\x7f" + b"{}")),
    index("can't be read", partial(os.chmod, "index.safetensors", 0), "index.safetensors", "ermission",
          within=without_rights),
    Row("index: in a folder that can't be written", SEARCH.replace("index.safetensors", "closed/index.safetensors"),
        "closed", "clips retriever", lambda: (Path("closed").mkdir(), Path("closed").chmod(0o500)),
        within=without_rights),
]  # fmt: skip

ROWS = [*WHOLE, *OLD, *FOLDER, *STATES, *TABLES, *INDEXES]
