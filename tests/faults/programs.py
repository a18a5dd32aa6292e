"""Faults of exported programs and outputs: code in a .pt2, damaged ONNX, metadata, numbers that are not finite."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import lamzoo
from tests.faults.driver import Canary, Row, cut, edit, flip, pipe, put, without_rights

TORCH = "predict vit.pt2 photo.png"
ONNX = "predict vit.onnx photo.png"
EVAL = "eval {} --data photos --device cpu --json"


def poisoned() -> None:
    """A program whose sample inputs run code when they are unpickled."""
    sample = io.BytesIO()
    torch.save((Canary(),), sample)
    source = Path("vit.pt2").rename("source.pt2")
    with zipfile.ZipFile(source) as before, zipfile.ZipFile("vit.pt2", "w") as after:
        for name in before.namelist():
            after.writestr(name, sample.getvalue() if "sample_inputs" in name else before.read(name))
    source.unlink()


def damaged_trust() -> None:
    put("cache/lamzoo/trusted-programs", "garbage")


WHY = ("vit.pt2", "--trust", "ONNX")
PROGRAMS = [
    Row("pt2: predict: from elsewhere", TORCH, WHY, "pt2 photo"),
    Row("pt2: eval: from elsewhere", EVAL.format("vit.pt2"), WHY, "pt2 photos"),
    Row("pt2: bench: from elsewhere", "bench vit.pt2 --out bench.csv", "vit.pt2", "pt2"),
    Row("pt2: Python: from elsewhere", lambda: lamzoo.load_exported("vit.pt2"), ("vit.pt2", "trust=True"), "pt2"),
    Row("pt2: predict: with code", TORCH, WHY, "pt2 photo", poisoned),
    Row("pt2: eval: with code", EVAL.format("vit.pt2"), WHY, "pt2 photos", poisoned),
    Row("pt2: Python: with code", lambda: lamzoo.load_exported("vit.pt2"), WHY, "pt2", poisoned),
    Row("pt2: explain: from elsewhere", "explain vit.pt2 photo.png --out masks.png", "vit.pt2", "pt2 photo", poisoned),
    Row("pt2: train: from elsewhere", "train --model vit.pt2 --data photos --epochs 1", "vit.pt2", "pt2 photos",
        poisoned),
    Row("pt2: another format's name", lambda: lamzoo.load_exported("vit.onnx", format="torch"), "vit.onnx", "pt2",
        lambda: (poisoned(), Path("vit.pt2").rename("vit.onnx"))),
    Row("pt2: code under the name of an ONNX file", ONNX, "vit.onnx", "pt2 photo",
        lambda: (poisoned(), Path("vit.pt2").rename("vit.onnx"))),
    Row("pt2: a trust folder that is a file", TORCH, WHY, "pt2 photo", damaged_trust),
    Row("pt2: a cache that is a file", TORCH, WHY, "pt2 photo", partial(put, "cache", "garbage")),
    Row("pt2: trusted, but truncated", f"{TORCH} --trust", "vit.pt2", "pt2 photo", partial(cut, "vit.pt2"),
        writes=("cache*",)),
    Row("pt2: trusted, but empty", f"{TORCH} --trust", "vit.pt2", "pt2 photo", partial(put, "vit.pt2"),
        writes=("cache*",)),
    Row("pt2: trusted, but flipped", f"{TORCH} --trust", "vit.pt2", "pt2 photo", partial(flip, "vit.pt2", 0.3)),
    Row("pt2: missing", TORCH, "vit.pt2", "photo"),
    Row("pt2: a pipe", TORCH, ("vit.pt2", "pipe"), "photo", partial(pipe, "vit.pt2")),
    Row("pt2: a folder", TORCH, "vit.pt2", "photo", lambda: Path("vit.pt2").mkdir()),
    Row("pt2: --trust of a model", "predict local-dir:model photo.png --trust", "--trust", "model photo"),
    Row("onnx: truncated", ONNX, "vit.onnx", "onnx photo", partial(cut, "vit.onnx")),
    Row("onnx: empty", ONNX, "vit.onnx", "onnx photo", partial(put, "vit.onnx")),
    Row("onnx: a text", ONNX, "vit.onnx", "onnx photo", partial(put, "vit.onnx", "I am a text")),
    Row("onnx: a pipe", ONNX, ("vit.onnx", "pipe"), "photo", partial(pipe, "vit.onnx")),
    Row("onnx: can't be read", ONNX, ("vit.onnx", "ermission"), "onnx photo", partial(os.chmod, "vit.onnx", 0),
        within=without_rights),
    Row("onnx: eval: truncated", EVAL.format("vit.onnx"), "vit.onnx", "onnx photos", partial(cut, "vit.onnx")),
    Row("onnx: Python: truncated", lambda: lamzoo.load_exported("vit.onnx"), "vit.onnx", "onnx",
        partial(cut, "vit.onnx")),
    Row("export: to a folder that can't be written", "export local-dir:model --out closed/x.pt2", "closed", "model",
        lambda: (Path("closed").mkdir(), Path("closed").chmod(0o500)), within=without_rights),
]  # fmt: skip


# Metadata of ONNX files.


def onnx(change: Callable[[Any], Any]) -> Callable[[], None]:
    def make() -> None:
        import onnx as library

        model = library.load("vit.onnx")
        change(model)
        Path("vit.onnx").write_bytes(model.SerializeToString())

    return make


def facts(change: Callable[[dict[str, Any]], Any]) -> Callable[[], None]:
    def of(model: Any) -> None:
        (entry,) = (entry for entry in model.metadata_props if entry.key == "lamzoo")
        content = json.loads(entry.value)
        change(content)
        entry.value = json.dumps(content)

    return onnx(of)


def cfg(**changes: Any) -> Callable[[], None]:
    return facts(lambda content: content["pretrained_cfg"].update(changes))


def external(location: str) -> Callable[[], None]:
    def of(model: Any) -> None:
        from onnx import TensorProto

        tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        put("outside.bin", tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return onnx(of)


def nan(model: Any) -> None:
    import numpy as np

    for tensor in model.graph.initializer:
        if tensor.data_type == 1 and len(tensor.raw_data) > 64:
            tensor.raw_data = np.full(len(tensor.raw_data) // 4, np.nan, np.float32).tobytes()


METADATA = [
    Row(f"onnx: {name}", ONNX, ("vit.onnx", *says), "onnx photo", make)
    for name, make, *says in (
        ("no metadata", onnx(lambda model: model.ClearField("metadata_props"))),
        ("metadata without preprocessing", facts(lambda content: content.pop("pretrained_cfg"))),
        ("metadata nested too deeply", onnx(lambda model: setattr(model.metadata_props[0], "value", "[" * 10**5))),
        ("std is 0", cfg(std=[0, 0, 0]), "std"),
        ("input_size is text", cfg(input_size="large"), "input_size"),
        ("input_size is 10^9", cfg(input_size=[3, 10**9, 10**9])),
        ("num_classes is text", cfg(num_classes="x"), "num_classes"),
        ("num_classes is negative", cfg(num_classes=-2), "num_classes"),
        ("interpolation is unknown", cfg(interpolation="x"), "interpolation"),
        ("crop_pct is -1", cfg(crop_pct=-1), "crop_pct"),
        ("label_names are numbers", cfg(label_names=[1, 2]), "label_names"),
        ("data in another file", external("outside.bin")),
        ("data outside of the folder", external("../outside.bin")),
        ("data of the system", external("/etc/passwd")),
        ("an operator of a library of its own",
         onnx(lambda model: setattr(model.graph.node[0], "domain", "com.example"))),
    )
] + [
    Row("onnx: an input of another size", ONNX, "vit.onnx", "onnx photo", cfg(input_size=[3, 64, 64])),
    Row("onnx: predict: outputs of NaN", ONNX, "not finite", "onnx photo", onnx(nan)),
    Row("onnx: eval: outputs of NaN", EVAL.format("vit.onnx"), "not finite", "onnx photos", onnx(nan)),
]  # fmt: skip


# Outputs that are not finite.


def filled(folder: str, value: float) -> Callable[[], None]:
    def make() -> None:
        path = f"{folder}/model.safetensors"
        edit(f"{folder}/config.json", {"lamzoo/sha256": ...})
        save_file(
            {
                key: torch.full_like(each, value) if each.is_floating_point() else each
                for key, each in load_file(path).items()
            },
            path,
        )

    return make


GRID = "eval local-dir:{} --task {} --data grid:speech:{} --split test --device cpu"
FILMS = "--features local-dir:retriever --device cpu"
NOT_FINITE = [
    Row(f"not finite: {call.split()[0]}{' --json' if '--json' in call else ''}: {name}", call, "finite", needs,
        filled(folder, value), writes=("cache*",))
    for name, value in (("NaN", float("nan")), ("infinity", float("inf")))
    for call, folder, needs in (
        ("predict local-dir:model photo.png", "model", "model photo"),
        ("predict local-dir:model photo.png --json", "model", "model photo"),
        ("explain local-dir:model photo.png --out masks.png", "model", "model photo"),
        (EVAL.format("local-dir:model"), "model", "model photos"),
        ("search red --videos clips --model local-dir:retriever --no-sheet --device cpu", "retriever",
         "retriever clips"),
        (f"find red clips/coffee.mp4 --model local-dir:film_finder {FILMS}", "film_finder",
         "film_finder retriever clips"),
        (f"describe clips/coffee.mp4 --model local-dir:film_describer {FILMS}", "film_describer",
         "film_describer retriever clips"),
    )
] + [
    Row("not finite: export: NaN", "export local-dir:model --out x.onnx", "finite", "model",
        filled("model", float("nan"))),
    Row("not finite: eval: a retriever", GRID.format("retriever", "retrieval", "face"), "finite", "retriever speech",
        filled("retriever", float("nan"))),
    Row("not finite: eval: a moment model", GRID.format("finder", "moments", "audio"), "finite", "finder speech",
        filled("finder", float("nan"))),
    Row("not finite: eval: a describer", GRID.format("describer", "captions", "audio"), "finite", "describer speech",
        filled("describer", float("nan"))),
]  # fmt: skip


ROWS = [*PROGRAMS, *METADATA, *NOT_FINITE]
