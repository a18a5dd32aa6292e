"""Faults of the hub: out of reach, refusing, broken off, flipped, and a cache that is damaged or can't be written."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from lamzoo.cli import app as cli
from tests.faults.driver import Row, cut, flip, pipe, put
from tests.faults.stock import ARTEFACTS
from tests.weights.hub_server import HubServer

_numbers = itertools.count()
GOOD = {name: (ARTEFACTS / "models" / "vit" / name).read_bytes() for name in ("config.json", "model.safetensors")}
SHARDED = {path.name: path.read_bytes() for path in (ARTEFACTS / "models" / "sharded").iterdir()}


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def serving(repo: str, files: dict[str, bytes], **faults: Any) -> Iterator[None]:
    """A hub on this machine, with one repository and faults such as ``cut=True``."""
    with HubServer({repo: files}) as server:
        for name, value in faults.items():
            setattr(server, name, value)
        with environment(HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0"):
            yield


def hub(
    name: str,
    *says: str,
    files: dict[str, bytes] = GOOD,
    call: str = "predict hf-hub:{} photo.png --device cpu",
    mended: dict[str, bytes] | None = None,
    before: Callable[[Path], Any] | None = None,
    repaired: str | None = None,
    **more: Any,
) -> Row:
    """A row with a repository of its own.

    Args:
        name: of the row.
        says: as of :class:`Row`.
        files: of the repository.
        call: the command, with a place for the name of the repository.
        mended: what the repository holds when the command is repeated, which then works.
        before: a fault of the cache, given its folder of the repository, which holds a good download.
        repaired: a file of the cache that must hold the content of the repository afterwards.
        more: faults of the server and fields of the row.
    """
    repo = f"zoo/model-{next(_numbers)}"
    faults = {key: more.pop(key) for key in ("cut", "corrupt", "status", "stall") if key in more}
    line = call.format(repo)

    def cache() -> Path:
        return Path(huggingface_hub.constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")

    def run() -> None:
        with contextlib.suppress(SystemExit):
            cli.main(shlex.split(line))

    def make() -> None:
        if before is not None:
            with serving(repo, files):
                run()
            before(cache())

    def check_repaired() -> None:
        (path,) = cache().glob(f"snapshots/*/{repaired}")
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(files[repaired]).digest()

    @contextlib.contextmanager
    def mended_hub() -> Iterator[None]:
        with serving(repo, mended or {}, commit="f" * 40):
            yield

    then: Callable[[], None] | None = None
    if mended is not None:
        then = partial(_again, line, mended_hub)
    elif repaired is not None:
        then = check_repaired
    return Row(f"hub: {name}", line, says, "photo", make, within=partial(serving, repo, files, **faults), then=then,
               **more)  # fmt: skip


def _again(line: str, within: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    err = io.StringIO()
    with within(), pytest.raises(SystemExit) as end, contextlib.redirect_stderr(err):
        cli.main(shlex.split(line))
    assert end.value.code == 0, f"again: {err.getvalue()}"


def changed(name: str, content: bytes) -> dict[str, bytes]:
    return {**GOOD, name: content}


def of_config(**values: Any) -> dict[str, bytes]:
    return changed("config.json", json.dumps({**json.loads(GOOD["config.json"]), **values}).encode())


def flipped(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def in_cache(name: str, change: Callable[[str], Any]) -> Callable[[Path], None]:
    """Changes the content of a cached file, behind its link."""
    return lambda folder: change(os.path.realpath(next(folder.glob(f"snapshots/*/{name}"))))


def snapshot(name: str, change: Callable[[str], Any]) -> Callable[[Path], None]:
    return lambda folder: change(str(next(folder.glob(f"snapshots/*/{name}"))))


UNREACHABLE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}
WEIGHTS = "model.safetensors"

ROWS = [
    *(
        Row(f"hub: {' '.join(call.split()[:2])}: {how}", call, says, needs, env=env, lines=3)
        for how, env, says in (("out of reach", UNREACHABLE, "127.0.0.1"), ("offline", OFFLINE, "HF_HUB_OFFLINE"))
        for call, needs in (
            ("download lam_vit_base", ""),
            ("predict lam_vit_base photo.png", "photo"),
            ("predict hf-hub:zoo/nothing photo.png", "photo"),
            ("eval lam_vit_base --data photos", "photos"),
            ("explain lam_vit_base photo.png --out masks.png", "photo"),
            ("export lam_vit_base --out x.onnx", ""),
            ("train --model lam_vit_base --pretrained --data photos --epochs 1 --device cpu", "photos"),
        )
    ),
    Row("hub: a name with ..", "predict hf-hub:zoo/../secret photo.png", "zoo/../secret", "photo", env=UNREACHABLE),
    Row("hub: a name without an owner", "predict hf-hub:/ photo.png", "OWNER/NAME", "photo", env=UNREACHABLE),
    Row("hub: a name with a line end", "predict 'hf-hub:zoo/a\nb' photo.png", "", "photo", env=UNREACHABLE),
    hub("no repository", "no repository", call="predict hf-hub:{}-else photo.png"),
    hub("no revision", "revision", call="predict hf-hub:{}@v9 photo.png"),
    hub("a revision with ..", "", call="predict hf-hub:{}@../main photo.png"),
    hub("no config.json", "config.json", files={WEIGHTS: GOOD[WEIGHTS]}, mended=GOOD),
    hub("no weights", "safetensors", files={"config.json": GOOD["config.json"]}, mended=GOOD),
    hub("pickles alone", "safetensors", files={"config.json": GOOD["config.json"], "pytorch_model.bin": b"\x80\4."},
        mended=GOOD),
    hub("answers 500", "500", status=500, mended=GOOD),
    hub("answers 429", "429", status=429, mended=GOOD),
    hub("answers 401", "", status=401, mended=GOOD),
    hub("a flipped file of weights, until the hub is mended", WEIGHTS, "sha256",
        files=changed(WEIGHTS, flipped(GOOD[WEIGHTS])), mended=GOOD),
    hub("half a file of weights, until the hub is mended", WEIGHTS, "sha256",
        files=changed(WEIGHTS, GOOD[WEIGHTS][:9000]), mended=GOOD),
    hub("a config.json of no JSON, until the hub is mended", "config.json", files=changed("config.json", b"{"),
        mended=GOOD),
    hub("a config.json of wrong values, until the hub is mended", "config.json", "num_classes",
        files=of_config(num_classes=-3), mended=GOOD),
    hub("an empty config.json, until the hub is mended", "config.json", files=changed("config.json", b""),
        mended=GOOD),
    hub("a flipped shard, until the hub is mended", "model-00002-of-00005.safetensors",
        files={**SHARDED, "model-00002-of-00005.safetensors": flipped(SHARDED["model-00002-of-00005.safetensors"])},
        mended=SHARDED),
    hub("an index of shards that is no JSON, until the hub is mended", "index.json",
        files={**SHARDED, "model.safetensors.index.json": b"{"}, mended=SHARDED),
    hub("an index of shards with names outside", "../outside", files={**SHARDED, "model.safetensors.index.json":
        json.dumps({"weight_map": {"head.weight": "../outside.safetensors"}}).encode()}, mended=SHARDED),
    hub("a missing shard, until the hub is mended", "model-00002-of-00005.safetensors",
        files={key: value for key, value in SHARDED.items() if "00002" not in key}, mended=SHARDED),
    hub("files flipped on their way", "config.json", "twice", corrupt=True, call="predict hf-hub:{} photo.png",
        files=GOOD, mended=GOOD),
    hub("a download that breaks off", "config.json", cut=True, mended=GOOD),
    hub("download: a flipped file of weights", WEIGHTS, "sha256", files=changed(WEIGHTS, flipped(GOOD[WEIGHTS])),
        call="download hf-hub:{}", mended=GOOD),
    hub("cache: weights flipped on the disk", before=in_cache(WEIGHTS, flip), repaired=WEIGHTS, code=0, out=True),
    hub("cache: weights truncated on the disk", before=in_cache(WEIGHTS, cut), repaired=WEIGHTS, code=0, out=True),
    hub("cache: weights emptied on the disk", before=in_cache(WEIGHTS, put), repaired=WEIGHTS, code=0, out=True),
    hub("cache: config.json truncated on the disk", before=in_cache("config.json", cut), repaired="config.json",
        code=0, out=True),
    hub("cache: config.json emptied on the disk", before=in_cache("config.json", put), repaired="config.json",
        code=0, out=True),
    hub("cache: config.json is a pipe", "config.json", before=snapshot("config.json", pipe), mended=GOOD),
    hub("cache: a link that leads nowhere is downloaded again", before=in_cache(WEIGHTS, os.remove), repaired=WEIGHTS,
        code=0, out=True),
    hub("cache: refs/main damaged", before=lambda folder: put(folder / "refs" / "main", b"\0\xff/../x"), code=0,
        out=True),
    hub("cache: a file in the place of the folder", "models--",
        before=lambda folder: (shutil.rmtree(folder), put(folder, "a file"))),
]  # fmt: skip
