"""Faults of saved models: values of config.json, attacks on weights and shard indexes, names that lead elsewhere."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.faults.driver import Canary, Row, cut, edit, flip, move, pipe, put, without_rights

CONFIG, WEIGHTS, INDEX = "model/config.json", "model/model.safetensors", "sharded/model.safetensors.index.json"
PREDICT = "predict local-dir:model photo.png --device cpu"
DEEP = "[" * 100_000 + "]" * 100_000


def config(name: str, changes: Mapping[str, Any], *says: str, call: str = PREDICT, needs: str = "model photo") -> Row:
    return Row(f"config: {name}", call, says, needs, partial(edit, CONFIG, changes))


def text(name: str, content: bytes | str, *says: str) -> Row:
    return Row(f"config: {name}", PREDICT, says, "model photo", partial(put, CONFIG, content))


CONFIGS = [
    config("depth is text", {"model_args.depth": "abc"}, "config.json", "depth", "abc"),
    config("depth is negative", {"model_args.depth": -1}, "depth", "-1"),
    config("depth is a million", {"model_args.depth": 10**6}, "config.json"),
    config("embed_dim is null", {"model_args.embed_dim": None}, "config.json", "embed_dim"),
    config("embed_dim is 10^12", {"model_args.embed_dim": 10**12}, "config.json"),
    config("img_size is 0", {"model_args.img_size": 0}, "config.json", "img_size", "0"),
    config("img_size is 10^9", {"model_args.img_size": 10**9}, "config.json"),
    config("input_size is 10^9", {"pretrained_cfg.input_size": [3, 10**9, 10**9]}, "config.json", "input_size"),
    config("input_size is text", {"pretrained_cfg.input_size": "large"}, "config.json", "input_size", "large"),
    config("input_size has one number", {"pretrained_cfg.input_size": [32]}, "config.json", "input_size"),
    config("std is 0", {"pretrained_cfg.std": [0, 0, 0]}, "config.json", "std", "0"),
    config("mean has two numbers", {"pretrained_cfg.mean": [0.5, 0.5]}, "config.json", "mean"),
    config("mean is text", {"pretrained_cfg.mean": "grey"}, "config.json", "mean"),
    config("mean holds a boolean", {"pretrained_cfg.mean": [True, 0, 0]}, "config.json", "mean"),
    config("crop_pct is -1", {"pretrained_cfg.crop_pct": -1}, "config.json", "crop_pct", "-1"),
    config("crop_pct is 0", {"pretrained_cfg.crop_pct": 0}, "config.json", "crop_pct"),
    config("crop_mode is unknown", {"pretrained_cfg.crop_mode": "left"}, "config.json", "crop_mode", "left"),
    config("interpolation is unknown", {"pretrained_cfg.interpolation": "x"}, "config.json", "interpolation"),
    config("num_classes is -5", {"num_classes": -5, "model_args.num_classes": -5}, "config.json", "num_classes", "-5"),
    config("num_classes is 10^12", {"num_classes": 10**12, "model_args.num_classes": 10**12}, "config.json"),
    config("num_classes is a float", {"num_classes": 2.5, "model_args.num_classes": 2.5}, "config.json", "num_classes"),
    config("in_chans is 0", {"model_args.in_chans": 0}, "config.json", "in_chans"),
    config("label_names are numbers", {"label_names": [1, 2]}, "config.json", "label_names"),
    config("label_names are too many", {"label_names": ["a", "b", "c"]}, "config.json", "label_names"),
    config("label_names is text", {"label_names": "ab"}, "config.json", "label_names"),
    config("rank is 10^9", {"lam_config.rank": 10**9}, "rank"),
    config("rank is text", {"lam_config.rank": "two"}, "config.json", "rank", "two"),
    config("op is unknown", {"lam_config.op": "div"}, "config.json", "op", "div"),
    config("fused is text", {"fused": "yes"}, "config.json", "fused", "yes"),
    config("lam_config is a list", {"lam_config": ["mul"]}, "config.json", "lam_config"),
    config("lam_config has an unknown key", {"lam_config.colour": "red"}, "config.json", "colour"),
    config("prune_config is text", {"prune_config": "half"}, "config.json", "prune_config"),
    config("prune_config keeps 7", {"prune_config": {"keep": 7, "at": [0]}}, "keep", "7"),
    config("token_reduction is text", {"token_reduction": "half"}, "config.json", "token_reduction"),
    config("token_reduction keeps 7", {"token_reduction": {"keep": 7}}, "config.json", "keep", "7"),
    config("token_reduction is of an unknown method", {"token_reduction": {"keep": 0.5, "method": "mix"}},
           "config.json", "method", "mix"),
    config("token_reduction in a layer that isn't there", {"token_reduction": {"keep": 0.5, "at": [99]}},
           "config.json", "at=(99,)"),
    config("architecture is a path", {"architecture": "../../etc/passwd", "lamzoo.name": "../../etc/passwd"},
           "config.json"),
    config("architecture is unknown", {"architecture": "vit_nano", "lamzoo.name": "vit_nano"}, "vit_nano"),
    config("architecture is a number", {"architecture": 7, "lamzoo.name": 7}, "config.json"),
    config("architecture is absent", {"architecture": ..., "lamzoo": ...}, "config.json"),
    config("model_args is a list", {"model_args": [1]}, "config.json", "model_args"),
    config("model_args has an unknown key", {"model_args.wheels": 4}, "wheels"),
    config("pretrained_cfg is text", {"pretrained_cfg": "imagenet"}, "config.json", "pretrained_cfg"),
    config("lamzoo is a list", {"lamzoo": [1]}, "config.json"),
    text("nested too deeply", DEEP, "model/config.json", "nested too deeply"),
    text("nested too deeply below a key", '{"pretrained_cfg": ' + DEEP + "}", "model/config.json", "nested"),
    text("not UTF-8", '{"architecture": "é"}'.encode("latin-1"), "model/config.json", "UTF-8"),
    text("a list", "[]", "model/config.json"),
    text("empty", "", "model/config.json"),
    text("half a document", '{"architecture": "lam_vi', "model/config.json"),
    text("a number that is none", '{"architecture": "lam_vit_micro", "num_classes": NaN}', "config.json", "NaN"),
    Row("config: a pipe", PREDICT, "config.json", "model photo", partial(pipe, CONFIG)),
    Row("config: a folder", PREDICT, "config.json", "model photo",
        lambda: (Path(CONFIG).unlink(), Path(CONFIG).mkdir())),
    Row("config: missing", PREDICT, "config.json", "model photo", lambda: Path(CONFIG).unlink()),
    Row("config: unreadable", PREDICT, ("config.json", "ermission"), "model photo", lambda: Path(CONFIG).chmod(0),
        within=without_rights),
    config("info: std is text", {"pretrained_cfg.std": "x"}, "config.json", "std", call="info local-dir:model"),
    config("eval: std is 0", {"pretrained_cfg.std": [0, 0, 0]}, "config.json", "std",
           call="eval local-dir:model --data packed --device cpu", needs="model packed"),
    config("explain: rank is text", {"lam_config.rank": "two"}, "config.json", "rank",
           call="explain local-dir:model photo.png --out masks.png"),
    config("export: depth is text", {"model_args.depth": "abc"}, "config.json", "depth",
           call="export local-dir:model --out x.onnx"),
    config("train: depth is text", {"model_args.depth": "abc"}, "config.json", "depth",
           call="train --model local-dir:model --data photos --epochs 1 --device cpu", needs="model photos"),
    Row("config: search: width is text", "search 'red' --videos clips --model local-dir:retriever --device cpu",
        ("config.json",), "retriever clips", partial(edit, "retriever/config.json", {"model_args.clip": "large"})),
    Row("config: find: width is negative",
        "find red clips/coffee.mp4 --model local-dir:film_finder --features local-dir:retriever",
        "config.json", "film_finder retriever clips",
        partial(edit, "film_finder/config.json", {"model_args.width": -4})),
    Row("config: describe: vocabulary is a number",
        "describe clips/coffee.mp4 --model local-dir:film_describer --features local-dir:retriever",
        "vocabulary", "film_describer retriever clips",
        partial(edit, "film_describer/config.json", {"model_args.vocabulary": 5})),
    Row("config: eval: moments with heads of text",
        "eval local-dir:finder --task moments --data grid:speech:audio --split test --device cpu",
        "config.json", "finder speech", partial(edit, "finder/config.json", {"model_args.heads": "two"})),
]  # fmt: skip


# Names in a config or an index of shards are those of files beside it.


def outside(name: str) -> Callable[[], None]:
    def make() -> None:
        move("model/model.safetensors", "outside/model.safetensors")
        content = json.loads(Path(CONFIG).read_text())
        (digest,) = content["lamzoo"]["sha256"].values()
        edit(CONFIG, {"lamzoo/sha256": {name: digest}})

    return make


def index_of(change: Callable[[dict[str, Any]], Any]) -> Callable[[], None]:
    def make() -> None:
        content = json.loads(Path(INDEX).read_text())
        change(content)
        Path(INDEX).write_text(json.dumps(content))
        edit("sharded/config.json", {"lamzoo.sha256": ...})  # which has that of the index

    return make


def shards(name: str, make: Callable[[], Any], *says: str) -> Row:
    return Row(f"shards: {name}", "predict local-dir:sharded photo.png --device cpu", says, "sharded photo", make)


def to_shard(target: Any) -> Callable[[], None]:
    def change(content: dict[str, Any]) -> None:
        content["weight_map"] = dict.fromkeys(content["weight_map"], target)

    return index_of(change)


NAMES = [
    Row("names: a hash of ../outside", PREDICT, ("config.json", "../outside/model.safetensors"), "model photo",
        outside("../outside/model.safetensors")),
    Row("names: a hash of an absolute path", PREDICT, ("config.json", "/tmp/"), "model photo",
        outside("/tmp/lamzoo-outside/model.safetensors")),
    Row("names: a hash of a path of Windows", PREDICT, ("config.json",), "model photo",
        outside("..\\outside\\model.safetensors")),
    Row("names: a hash of a name with NUL", PREDICT, "config.json", "model photo",
        lambda: edit(CONFIG, {"lamzoo/sha256": {"model\0.safetensors": "0" * 64}})),
    Row("names: a hash that is a number", PREDICT, "config.json", "model photo",
        lambda: edit(CONFIG, {"lamzoo/sha256": {"model.safetensors": 5}})),
    Row("names: hashes are a list", PREDICT, "config.json", "model photo",
        lambda: edit(CONFIG, {"lamzoo/sha256": ["model.safetensors"]})),
    Row("names: train follows no hash outside",
        "train --model local-dir:model --pretrained --data photos --epochs 1 --device cpu",
        "../outside/model.safetensors", "model photos", outside("../outside/model.safetensors")),
    shards("one of ../outside", to_shard("../outside/model.safetensors"), "../outside/model.safetensors"),
    shards("one of an absolute path", to_shard("/etc/passwd"), "/etc/passwd"),
    shards("one that is a number", to_shard(5), "index.json"),
    shards("one that is the index itself", to_shard("model.safetensors.index.json"), "index.json"),
    shards("one that is missing", lambda: Path("sharded/model-00003-of-00005.safetensors").unlink(),
           "model-00003-of-00005.safetensors"),
    shards("one that is truncated", partial(cut, "sharded/model-00002-of-00005.safetensors"),
           "model-00002-of-00005.safetensors"),
    shards("one that is flipped", partial(flip, "sharded/model-00002-of-00005.safetensors"),
           "model-00002-of-00005.safetensors"),
    shards("one that is a pipe", partial(pipe, "sharded/model-00002-of-00005.safetensors"), "model-00002"),
    shards("an index without weight_map", index_of(lambda index: index.pop("weight_map")), "index.json"),
    shards("an index whose weight_map is a list",
           index_of(lambda index: index.update(weight_map=["a"])), "index.json"),
    shards("an index nested too deeply", lambda: (index_of(dict.clear)(), put(INDEX, DEEP)), "index.json"),
    shards("an empty index", partial(put, INDEX), "index.json"),
    shards("an index with a tensor of no shard", index_of(lambda index: index["weight_map"].update(
        {"extra.weight": "model-00001-of-00005.safetensors"})), "extra.weight"),
    shards("an index that lacks a tensor", index_of(lambda index: index["weight_map"].pop("head.weight")),
           "head.weight"),
]  # fmt: skip


# Weights.


def header(content: bytes | str, body: bytes = b"", length: int | None = None) -> Callable[[], None]:
    """Writes weights with a header of one's own, which the config has no hash of."""
    raw = content.encode() if isinstance(content, str) else content

    def make() -> None:
        unhashed()
        put(WEIGHTS, struct.pack("<Q", len(raw) if length is None else length) + raw + body)

    return make


def unhashed() -> None:
    edit(CONFIG, {"lamzoo/sha256": ...})


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[], None]:
    def make() -> None:
        unhashed()
        content = load_file(WEIGHTS)
        change(content)
        save_file({key: value.contiguous() for key, value in content.items()}, WEIGHTS)

    return make


def every(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
    def all_of(content: dict[str, torch.Tensor]) -> None:
        content.update({key: change(value) for key, value in content.items() if value.is_floating_point()})

    return tensors(all_of)


def pickled(path: str) -> None:
    """Weights as torch writes them by default, with an object that runs code when it is read."""
    torch.save({"head.weight": torch.zeros(2), "canary": Canary()}, path)


def weights(name: str, make: Callable[[], Any], *says: str, **options: Any) -> Row:
    return Row(f"weights: {name}", PREDICT, says or (WEIGHTS,), "model photo", make, **options)


def one(dtype: str, shape: list[int], offsets: list[int]) -> str:
    return json.dumps({"head.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


WEIGHTS_ROWS = [
    weights("truncated", partial(cut, WEIGHTS)),
    weights("truncated, without a hash", lambda: (unhashed(), cut(WEIGHTS))),
    weights("empty", partial(put, WEIGHTS)),
    weights("empty, without a hash", lambda: (unhashed(), put(WEIGHTS))),
    weights("flipped", partial(flip, WEIGHTS), WEIGHTS, "sha256"),
    weights("missing", lambda: Path(WEIGHTS).unlink(), "model.safetensors"),
    weights("a pipe", partial(pipe, WEIGHTS), "pipe"),
    weights("a pipe, without a hash", lambda: (unhashed(), pipe(WEIGHTS)), "model"),
    weights("a folder", lambda: (Path(WEIGHTS).unlink(), Path(WEIGHTS).mkdir()), "model.safetensors"),
    weights("unreadable", lambda: Path(WEIGHTS).chmod(0), WEIGHTS, "ermission", within=without_rights),
    weights("a header of 2^63 bytes", header("{}", length=2**63)),
    weights("a header of 10^8 bytes", header("{}", length=10**8)),
    weights("a header of no JSON", header("{nothing}")),
    weights("a header nested too deeply", header(DEEP)),
    weights("a header that is a list", header("[]")),
    weights("offsets beyond the end", header(one("F32", [2, 8], [0, 64]), b"\0" * 8)),
    weights("offsets that overlap", header(json.dumps({
        name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in ("head.weight", "head.bias")
    }), b"\0" * 8)),
    weights("negative offsets", header(one("F32", [2], [-8, 0]), b"\0" * 8)),
    weights("a shape of 2^62", header(one("F32", [2**62], [0, 8]), b"\0" * 8)),
    weights("an unknown dtype", header(one("F99", [2], [0, 8]), b"\0" * 8)),
    weights("a key twice", header(
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"\0" * 4)),
    weights("no tensor", header("{}")),
    weights("a missing tensor", tensors(lambda content: content.pop("head.weight")), "head.weight"),
    weights("one tensor too many", tensors(lambda content: content.update(extra=torch.zeros(1))), "extra"),
    weights("another shape", tensors(lambda content: content.update({"head.bias": torch.zeros(7)})), "head.bias"),
    weights("a shape with 0", tensors(lambda content: content.update({"head.bias": torch.zeros(0)})), "head.bias"),
    weights("whole numbers", every(lambda value: value.to(torch.int32)), "model.safetensors"),
    weights("complex numbers", every(lambda value: value.to(torch.complex64)), "model.safetensors"),
    weights("NaN", every(lambda value: value * float("nan")), "finite"),
    weights("infinity", every(lambda value: value + float("inf")), "finite"),
    weights("a pickle under another name", lambda: (unhashed(), pickled(WEIGHTS))),
    weights("a pickle of old, under another name",
            lambda: (unhashed(), put(WEIGHTS, pickle.dumps({"a": Canary()})))),
    weights("a zip file", lambda: (unhashed(), Path(WEIGHTS).unlink(), zipfile.ZipFile(WEIGHTS, "w").close())),
    weights("a folder with a pickle alone",
            lambda: (unhashed(), Path(WEIGHTS).unlink(), pickled("model/pytorch_model.bin")), "safetensors"),
    *(
        Row(f"weights: {call.split()[0]} --checkpoint of a pickle {suffix}", f"{call} --checkpoint weights{suffix}",
            f"weights{suffix}", "model photo photos", partial(pickled, f"weights{suffix}"))
        for call, suffix in (
            (PREDICT, ".pt"), (PREDICT, ".pth"), (PREDICT, ".bin"), (PREDICT, ".ckpt"), (PREDICT, ".safetensors"),
            ("explain local-dir:model photo.png --out masks.png", ".pt"),
            ("export local-dir:model --out x.onnx", ".pt"),
            ("eval local-dir:model --data photos --device cpu", ".pt"),
            ("train --model local-dir:model --data photos --epochs 1 --device cpu", ".pt"),
        )
    ),
    Row("weights: --checkpoint that is missing", f"{PREDICT} --checkpoint none.safetensors", "none.safetensors",
        "model photo"),
    Row("weights: --checkpoint that is a folder", f"{PREDICT} --checkpoint model", "model", "model photo"),
    Row("weights: --checkpoint that is a pipe", f"{PREDICT} --checkpoint pipe.safetensors",
        ("pipe.safetensors", "pipe"), "model photo", partial(pipe, "pipe.safetensors")),
    Row("weights: --checkpoint of another model", f"{PREDICT} --checkpoint finder/model.safetensors",
        "finder/model.safetensors", "model photo finder"),
]  # fmt: skip

ROWS = [*CONFIGS, *NAMES, *WEIGHTS_ROWS]
