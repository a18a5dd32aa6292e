"""Valid things that faults are made of, each built once a session and copied into the folder of a row."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.compatibility.inputs import photo, write_photos, write_speech
from tests.shards import write_shard
from tests.training.moment_data import SMALL, write_qvhighlights

ARTEFACTS = Path(__file__).resolve().parents[1] / "compatibility" / "artefacts"
CLASSES = ("blue", "red")


class Stock:
    """Builds things on their first use, each in a folder of its own.

    Args:
        folder: where to keep them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def copy(self, names: str, place: Path) -> None:
        """Copies the content of things, by their names, into a folder."""
        for name in names.split():
            shutil.copytree(self._built(name), place, symlinks=True, dirs_exist_ok=True)

    def _built(self, name: str) -> Path:
        folder = self._folder / name
        if not folder.exists():
            folder.mkdir()
            try:
                _BUILDERS[name](folder, self)
            except BaseException:
                shutil.rmtree(folder)
                raise
        return folder


def _png(label: int, number: int = 100) -> bytes:
    import io

    file = io.BytesIO()
    photo(label, number).save(file, "PNG")
    return file.getvalue()


def _photo(folder: Path, _: Stock) -> None:
    """``photo.png``."""
    (folder / "photo.png").write_bytes(_png(1))


def _photos(folder: Path, _: Stock) -> None:
    """``photos/<class>/<number>.png``, eight of each."""
    write_photos(folder / "photos", each=8)


def _splits(folder: Path, _: Stock) -> None:
    """``splits/<split>/<class>/<number>.png``, three of each."""
    for split in ("train", "val"):
        write_photos(folder / "splits" / split, each=3)


def _listed(folder: Path, _: Stock) -> None:
    """``flat/<number>.png`` and ``labels.csv``."""
    (folder / "flat").mkdir()
    rows = ["filename,label"]
    for number in range(6):
        (folder / "flat" / f"{number}.png").write_bytes(_png(number % 2, number))
        rows.append(f"{number}.png,{CLASSES[number % 2]}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


def npz_arrays() -> dict[str, Any]:
    files = [_png(number % 2, number) for number in range(6)]
    return {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)], dtype=np.int64),
        "labels": np.arange(6, dtype=np.int16) % 2,
    }


def _packed(folder: Path, _: Stock) -> None:
    """``packed/test.npz`` and ``packed/classes.json``."""
    (folder / "packed").mkdir()
    np.savez(folder / "packed" / "test.npz", **npz_arrays())
    (folder / "packed" / "classes.json").write_text(json.dumps(CLASSES))


def _shards(folder: Path, _: Stock) -> None:
    """``shards/0.tar`` and ``shards/1.tar``, three images in each."""
    (folder / "shards").mkdir()
    for shard in (0, 1):
        samples: dict[str, bytes] = {}
        for number in range(3):
            samples |= {f"{number}.png": _png(number % 2, number), f"{number}.cls": str(number % 2).encode()}
        write_shard(folder / "shards" / f"{shard}.tar", samples)


def _artefact(name: str, target: str) -> Callable[[Path, Stock], None]:
    def copy(folder: Path, _: Stock) -> None:
        source = ARTEFACTS / name
        if source.is_dir():
            shutil.copytree(source, folder / target)
        else:
            shutil.copy(source, folder / target)

    return copy


def _speech(folder: Path, _: Stock) -> None:
    """``speech/``, clips in the layout of GRID."""
    write_speech(folder / "speech")


def _old_run(folder: Path, _: Stock) -> None:
    """``run/`` of 0.1.0, killed half-way, its data ``photos/`` and its recipe."""
    write_photos(folder / "photos")
    with tarfile.open(ARTEFACTS / "training" / "classification.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    shutil.copy(ARTEFACTS / "recipes" / "classification.toml", folder / "recipe.toml")


RECIPE = """
task = "classification"
model = {name = "lam_vit_micro", kwargs = {embed_dim = 8, depth = 1}}
data = {source = "imagefolder:photos", val_fraction = 0.25}
schedule = {epochs = 2, warmup_epochs = 0}
run = {output = "run", batch_size = 6, device = "cpu", ema_decay = 0.9, report = false}
"""


def _recipe(folder: Path, stock: Stock) -> None:
    """``photos/`` and ``recipe.toml``."""
    stock.copy("photos", folder)
    (folder / "recipe.toml").write_text(RECIPE)


def _run(folder: Path, stock: Stock) -> None:
    """``photos/``, ``recipe.toml`` and its ``run/``, with two checkpoints."""
    import os

    from lamzoo.training import load_recipe, train

    stock.copy("recipe", folder)
    here = os.getcwd()
    os.chdir(folder)
    try:
        train(load_recipe("recipe.toml"))
    finally:
        os.chdir(here)


def _film_finder(folder: Path, _: Stock) -> None:
    """``film_finder/``, which reads the features of ``retriever/``."""
    import lamzoo

    sizes = {"width": 16, "heads": 2, "hidden": 32, "queries": 4}
    model = lamzoo.create_model("lam_moment_detr_micro", video_dim=18, text_dim=8, **sizes)
    lamzoo.save_pretrained(model, folder / "film_finder")


def _film_describer(folder: Path, _: Stock) -> None:
    """``film_describer/``, which reads the features of ``retriever/``."""
    import lamzoo

    model = lamzoo.create_model(
        "lam_describer_micro", features={"video": 16}, rates={"video": 5.0}, vocabulary=["red", "blue"], seconds=2.0,
        width=32, heads=2, hidden=32, encoder_layers=1, decoder_layers=1, context_length=5, align=False,
    )  # fmt: skip
    lamzoo.save_pretrained(model, folder / "film_describer")


def _qv(folder: Path, _: Stock) -> None:
    """``qv/``, features in QVHighlights' layout, and ``qv_finder/``, which reads them."""
    import lamzoo

    write_qvhighlights(folder / "qv", clip=8, slowfast=6, text=5)
    model = lamzoo.create_model("lam_qd_detr_micro", video_dim=16, text_dim=5, **SMALL)
    lamzoo.save_pretrained(model, folder / "qv_finder")


_BUILDERS: dict[str, Callable[[Path, Stock], None]] = {
    "photo": _photo,
    "photos": _photos,
    "splits": _splits,
    "listed": _listed,
    "packed": _packed,
    "shards": _shards,
    "speech": _speech,
    "old_run": _old_run,
    "recipe": _recipe,
    "run": _run,
    "model": _artefact("models/vit", "model"),
    "sharded": _artefact("models/sharded", "sharded"),
    "retriever": _artefact("models/retrieval", "retriever"),
    "finder": _artefact("models/moments", "finder"),
    "describer": _artefact("models/captions", "describer"),
    "film_finder": _film_finder,
    "film_describer": _film_describer,
    "qv": _qv,
    "clips": _artefact("clips", "clips"),
    "onnx": _artefact("vit.onnx", "vit.onnx"),
    "pt2": _artefact("vit.pt2", "vit.pt2"),
    "index": _artefact("index.safetensors", "index.safetensors"),
    "table": _artefact("bench.csv", "bench.csv"),
    "state": _artefact("state.json", "state.json"),
    "captions": _artefact("captions.json", "captions.json"),
    "moments": _artefact("moments.jsonl", "moments.jsonl"),
}
