"""Small valid files of every format that lamzoo reads, and how each is read to the end."""

from __future__ import annotations

import csv
import io
import json
import math
import tarfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lamzoo import LamConfig
from lamzoo.data.captions import create_caption_dataset
from lamzoo.data.fingerprint import (
    FINGERPRINT_NAME,
    describe_changes,
    image_fingerprint,
    read_fingerprints,
    write_fingerprints,
)
from lamzoo.data.images.class_map import read_class_map
from lamzoo.data.images.factory import create_dataset
from lamzoo.data.moments import create_moment_dataset
from lamzoo.data.moments.qvhighlights import read_queries
from lamzoo.data.retrieval import create_retrieval_dataset
from lamzoo.data.trained import HELD_OUT_NAME, RECIPE_NAME, SPLIT_NAME, MadeSplit, TrainedData
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.evaluation.captions.coco_results import read_captions, write_captions
from lamzoo.evaluation.classification.imagenet_real import RealLabels
from lamzoo.evaluation.moments.metrics import moment_metrics
from lamzoo.evaluation.moments.submissions import read_submission, write_submission
from lamzoo.evaluation.resume import EvalState, StateFile
from lamzoo.profiling.results import BenchRow, read_rows, write_rows
from lamzoo.records import to_toml
from lamzoo.registry.cards import read_card
from lamzoo.registry.catalog import model_ref
from lamzoo.report.compare.timm_results import read_timm
from lamzoo.training import load_recipe
from lamzoo.video.feature_files import write_features
from lamzoo.video.index import IndexedVideo, Origin, StoredIndex, read_index, write_index
from lamzoo.weights.mask_folder import CONFIG_NAME, read_mask_folder
from lamzoo.weights.saved import read_saved
from tests.images import write_npz
from tests.shards import write_shard


@dataclass(frozen=True)
class Format:
    """A file of one format.

    Attributes:
        name: the format.
        write: writes a valid file, and what it needs, into an empty folder; returns the file.
        read: reads it as lamzoo does, and checks that the result is right.
        load: its values, to be mutated; None for files that are mutated as bytes only.
        store: writes such values.
        often: whether it is one of the formats that files from elsewhere have most often.
    """

    name: str
    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    load: Callable[[Path], Any] | None = None
    store: Callable[[Path, Any], None] | None = None
    often: bool = False


def load_json(path: Path) -> Any:
    return json.loads(path.read_text())


def store_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def load_lines(path: Path) -> Any:
    return [json.loads(line) for line in path.read_text().splitlines()]


def store_lines(path: Path, lines: Any) -> None:
    lines = lines if isinstance(lines, list) else [lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def load_cells(path: Path) -> Any:
    return list(csv.reader(path.read_text().splitlines()))


def store_cells(path: Path, rows: Any) -> None:
    text = io.StringIO()
    for row in rows if isinstance(rows, list) else [rows]:
        csv.writer(text).writerow([str(cell) for cell in row] if isinstance(row, list) else [str(row)])
    path.write_text(text.getvalue(), encoding="utf-8")


def load_toml(path: Path) -> Any:
    return tomllib.loads(path.read_text())


def store_toml(path: Path, value: Any) -> None:
    path.write_text(to_toml(value) if isinstance(value, dict) else str(value), encoding="utf-8")


def load_words(path: Path) -> Any:
    return [line.split(" ") for line in path.read_text().splitlines()]


def store_words(path: Path, lines: Any) -> None:
    lines = lines if isinstance(lines, list) else [lines]
    rows = (" ".join(map(str, line)) if isinstance(line, list) else str(line) for line in lines)
    path.write_text("\n".join(rows), encoding="utf-8")


def load_arrays(path: Path) -> Any:
    with np.load(path) as archive:
        return dict(archive)


def store_arrays(path: Path, value: Any) -> None:
    arrays = value if isinstance(value, dict) else {"x": value}
    np.savez(path, **{name.replace("\0", ""): np.array(array) for name, array in arrays.items()})


def load_members(path: Path) -> Any:
    with tarfile.open(path) as archive:
        return [[entry.name, archive.extractfile(entry).read().decode("latin-1")] for entry in archive]  # type: ignore[union-attr]


def store_members(path: Path, members: Any) -> None:
    with tarfile.open(path, "w") as archive:
        for member in members if isinstance(members, list) else [members]:
            name, content = member if isinstance(member, list) and len(member) == 2 else (member, "")
            data = str(content).encode("utf-8", "surrogateescape")
            entry = tarfile.TarInfo(str(name))
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


ARRAYS = tuple(
    map(
        np.array,
        (
            0, [], [[]], [1.5, 2.5], [-1], [2**63 - 1], [True, False], ["a", "b"], [1j], [np.nan, np.inf],
            [[1, 2], [3, 4]],
            np.zeros((2, 3), ">f4"), np.asfortranarray(np.ones((3, 2))), np.zeros(3, [("a", "i4"), ("b", "f8")]),
            np.zeros((0, 4), np.float32), np.array([2**64 - 1], np.uint64), np.array([0, 5, 3, 9], np.uint32),
            np.array(["2024-01-31"], "datetime64[D]"), np.zeros((2, 2, 2)), np.float16([[65504, 1]]), "[1]", '{"a": 1}',
            '{"clip_seconds": 1e-320}', '{"clip_seconds": [1]}', '{"clip_seconds": 1e308}', "[" * 5000, b"\xff",
        ),
    )
)  # fmt: skip


def check_labels(dataset: Any) -> None:
    labels = dataset.labels()
    assert len(labels) == len(dataset)
    assert all(type(label) is int and 0 <= label < 2**31 for label in labels)
    torch.tensor(labels)


def write_images(folder: Path) -> None:
    for number in range(4):
        (folder / f"{number}.jpg").touch()


def images_npz(folder: Path) -> Path:
    return write_npz(folder, each=1) / "test.npz"


def image_shard(folder: Path) -> Path:
    samples = {f"{n}.{end}": text for n in range(3) for end, text in (("jpg", b"jpeg"), ("cls", b"%d" % n))}
    return write_shard(folder / "a.tar", samples)


def video_shard(folder: Path) -> Path:
    texts = {"0.txt": b"a dog\na cat", "1.json": b'{"caption": ["a dog"]}', "2.json": b'{"captions": "a cat"}'}
    return write_shard(folder / "a.tar", {**{f"{n}.mp4": b"video" for n in range(3)}, **texts})


def listed(name: str, text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_images(folder)
        (folder / name).write_text(text)
        return folder / name

    return write


def text(name: str, content: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return write


def value(name: str, content: Any) -> Callable[[Path], Path]:
    return text(name, json.dumps(content))


def read_list(path: Path) -> None:
    check_labels(create_dataset(f"imagelist:{path.parent}:{path}", "all"))


def names(path: Path) -> None:
    found = read_class_map(path)
    assert found
    assert all(isinstance(name, str) for name in found)


QUERY = {
    "qid": 7, "query": "a dog", "vid": "v", "duration": 20, "relevant_windows": [[2, 8]], "relevant_clip_ids": [1, 2],
    "saliency_scores": [[4, 0, 1], [3, 2, 2]],
}  # fmt: skip


def highlights(folder: Path) -> Path:
    store_lines(folder / "highlight_val_release.jsonl", [QUERY, {**QUERY, "qid": 8}])
    return folder / "highlight_val_release.jsonl"


def read_highlights(path: Path) -> None:
    for query in create_moment_dataset(f"qvhighlights:{path.parent}", "val").queries:
        assert 0 < query.duration < math.inf
        assert query.grades is None or np.isfinite(query.grades).all()
        assert all(0 <= start < end for start, end in query.windows)


def submission(folder: Path) -> Path:
    prediction = {
        "qid": 7,
        "pred_relevant_windows": [[2.0, 8.0, 0.9], [0.0, 4.0, 0.1]],
        "pred_saliency_scores": [0.5] * 10,
    }
    write_submission(folder / "a.jsonl", [prediction])
    return folder / "a.jsonl"


def read_scored(path: Path) -> None:
    metrics = moment_metrics(read_submission(path), [QUERY])
    assert all(0 <= number <= 100 for number in metrics["brief"].values())


def tvsum(folder: Path) -> Path:
    line = {"qid": "a", "query": "a dog", "vid": "v", "duration": 20, "label": [[1, 2], [3, 4]], "domain": "BK"}
    store_lines(folder / "tvsum_val.jsonl", [line])
    return folder / "tvsum_val.jsonl"


def charades(folder: Path) -> Path:
    (folder / "Charades_v1_test.csv").write_text("id,length\nAB,30.5\nCD,20\n")
    (folder / "charades_sta_test.txt").write_text("AB 1.5 8##a dog runs.\nCD 0.0 4.2##a cat.\n")
    return folder / "charades_sta_test.txt"


def grid(folder: Path) -> Path:
    words = [["bin", 0.0, 0.4], ["red", 0.4, 0.8]]
    line = {"id": "a", "n_frames": 25, "text": "bin red", "words": words, "split": "train"}
    store_lines(folder / "captions.jsonl", [line, {**line, "id": "b"}])
    np.savez(folder / "logmel.npz", logmel=np.random.default_rng(0).integers(0, 255, (2, 100, 64), dtype=np.uint8))
    return folder / "captions.jsonl"


def read_grid(path: Path) -> None:
    dataset = create_caption_dataset(f"grid:{path.parent}:audio", "train")
    for index in range(len(dataset)):
        for stream in dataset.read(index).values():
            assert np.isfinite(stream.features).all()
    dataset.splice()


def msrvtt(folder: Path) -> Path:
    for number in range(4):
        (folder / f"video{number}.mp4").touch()
    videos = [{"video_id": f"video{n}", "split": "validate" if n else "train"} for n in range(4)]
    sentences = [{"video_id": f"video{n}", "caption": f"caption {n}"} for n in range(4)]
    store_json(folder / "MSRVTT_data.json", {"videos": videos, "sentences": sentences})
    (folder / "MSRVTT_train.9k.csv").write_text("video_id\nvideo3\nvideo0\n")
    (folder / "MSRVTT_JSFUSION_test.csv").write_text(
        'key,video_id,sentence\na,video1,"a man, a plan"\nb,video2,two dogs\n'
    )
    return folder / "MSRVTT_JSFUSION_test.csv"


def videos_of(kind: str, split: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        source = path if kind == "wds" else path.parent
        dataset = create_retrieval_dataset(f"{kind}:{source}", split)
        assert len(dataset) > 0
        assert all(isinstance(caption, str) for caption in dataset.texts)

    return read


def msvd(folder: Path) -> Path:
    for name in ("a", "b"):
        (folder / f"{name}.avi").touch()
    (folder / "test_list.txt").write_text("a\nb\n")
    store_json(folder / "raw-captions.json", {"a": ["a dog", ["a", "cat"]], "b": ["a man"]})
    return folder / "raw-captions.json"


def lsmdc(folder: Path) -> Path:
    write_features(
        folder / "features" / "video" / "A_1.0-2.0.npz", "features", np.ones((3, 4), np.float32), {"clip_seconds": 2.0}
    )
    (folder / "test.csv").write_text("A_1.0-2.0\t01.25.49.077\t01.25.54.718\tSOMEONE goes.\nA_1.0-2.0\t1.5\t2\ta dog\n")
    return folder / "test.csv"


def features(folder: Path) -> Path:
    return lsmdc(folder).with_name("features") / "video" / "A_1.0-2.0.npz"


def npy_features(folder: Path) -> Path:
    features(folder).unlink()
    np.save(folder / "features" / "video" / "A_1.0-2.0.npy", np.ones((3, 4), np.float32))
    return folder / "features" / "video" / "A_1.0-2.0.npy"


def read_items(kind: str, split: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        root = next(place for place in path.parents if place.name not in ("video", "features", "annotations"))
        dataset = create_caption_dataset(f"{kind}:{root}", split)
        for index in range(len(dataset)):
            for stream in dataset.read(index).values():
                assert np.isfinite(stream.features).all()
                assert np.isfinite(stream.times).all()

    return read


def mad(folder: Path) -> Path:
    line = {"movie": "m", "sentence": " SOMEONE waits.", "timestamps": [4.0, 8.0]}
    (folder / "annotations").mkdir()
    store_json(folder / "annotations" / "MAD_val.json", {"0": line, "1": {**line, "timestamps": [9.5, 10]}})
    h5py = pytest.importorskip("h5py", reason="MAD's features are HDF5 files")
    with h5py.File(folder / "CLIP_B32_frames_features_5fps.h5", "w") as file:
        file["m"] = np.ones((100, 4), np.float32)
    return folder / "annotations" / "MAD_val.json"


def mad_csv(folder: Path) -> Path:
    path = mad(folder).with_name("mad-v2-ad-named.csv")
    path.write_text("movie,text,start,end\nm,A dog runs.,1.5,4\nm,A cat.,5,6.25\n")
    return path


def caption_table(folder: Path) -> Path:
    for name in ("a", "b"):
        (folder / f"{name}.mp4").touch()
    (folder / "captions.csv").write_text("video,caption,start,end,split\na.mp4,a dog,0,2.5,test\nb,a cat,1,3,test\n")
    return folder / "captions.csv"


def read_spans(path: Path) -> None:
    dataset = create_caption_dataset(f"videos:{path.parent}", "test")
    assert all(0 <= item.start < item.end for item in dataset.items)


def index(folder: Path) -> Path:
    origin = Origin("m", "0" * 64, "seq", FrameSampling(), {"mean": [0.5, 0.5, 0.5]}, {"rank": 2})
    videos = [IndexedVideo("a.mp4", 5, 10, 2.0), IndexedVideo("b.mp4", 6, 11, 3.0)]
    bad = [IndexedVideo("c.mp4", 7, 12, 0.0, "it is damaged")]
    write_index(folder / "a.safetensors", StoredIndex(origin, "videos", videos, [torch.ones(4), torch.zeros(4)], bad))
    return folder / "a.safetensors"


def load_index_values(path: Path) -> Any:
    with safe_open(path, "pt") as file:
        metadata = {key: json.loads(text) if text[0] == "{" else text for key, text in file.metadata().items()}
    videos = json.loads(load_file(path)["videos"].numpy().tobytes())
    return {"metadata": metadata, "videos": videos}


def store_index_values(path: Path, values: Any) -> None:
    values = values if isinstance(values, dict) else {"metadata": values}
    facts, videos = values.get("metadata"), values.get("videos")
    metadata = facts if isinstance(facts, dict) else {"lamzoo.video-index": facts}
    tensors = load_file(path) | {"videos": torch.frombuffer(bytearray(json.dumps(videos).encode()), dtype=torch.uint8)}
    save_file(
        tensors, path, {key: text if isinstance(text, str) else json.dumps(text) for key, text in metadata.items()}
    )


def read_stored(path: Path) -> None:
    stored = read_index(path)
    assert len(stored.videos) == len(stored.rows)
    for video in (*stored.videos, *stored.unreadable):
        assert isinstance(video.path, str)
        assert 0 <= video.duration < math.inf


RECIPE = {
    "model": {"name": "lam_vit_micro", "lam": {"rank": 2, "hidden": [4]}},
    "data": {"source": "imagefolder:photos", "workers": 1},
    "run": {"output": "runs/a", "batch_size": 4, "ema_decay": 0.9},
    "augment": {"scale": [0.5, 1.0], "mixup": 0.2},
    "optimizer": {"name": "adamw", "lr": 0.001, "kwargs": {"eps": 1e-8}},
    "schedule": {"epochs": 3, "warmup_epochs": 0.5},
    "prune": {"keep": 0.7, "at": [1]},
}
CARD = {
    "family": "a", "task": "classification", "description": "Masks.",
    "models": {
        "lam_a": {
            "builder": "lamzoo.models.vit:lam_vit", "backbone": {"depth": 2}, "lam": {"rank": 2},
            "params": 10, "gmacs": 0.1,
            "pretrained_cfg": {"num_classes": 3, "input_size": [3, 32, 32]},
            "tags": {
                "t": {
                    "file": "a.safetensors", "sha256": "0" * 64, "dataset": "d", "licence": "MIT",
                    "metrics": {"top1": 50.0}, "prune": {"keep": 0.5, "at": [0]},
                }
            },
        }
    },
}  # fmt: skip
CONFIG = {
    "architecture": "vit_tiny_patch16_224", "num_classes": 3, "num_features": 16, "global_pool": "token",
    "model_args": {"depth": 2}, "lam_config": {"rank": 2, "hidden": []}, "prune_config": {"keep": 0.5, "at": [0]},
    "lamzoo": {"name": "lam_vit_micro", "version": "0.1.0", "sha256": {"model.safetensors": "0" * 64}},
    "pretrained_cfg": {
        "input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_pct": 0.9,
        "crop_mode": "center",
        "interpolation": "bicubic", "label_names": ["a", "b", "c"], "tag": "t",
    },
}  # fmt: skip


def recipe_toml(folder: Path) -> Path:
    store_toml(folder / "a.toml", RECIPE)
    return folder / "a.toml"


def card(folder: Path) -> Path:
    store_toml(folder / "a.toml", CARD)
    return folder / "a.toml"


def read_model_card(path: Path) -> None:
    for spec in read_card(path, weights_dir=path.parent):
        assert isinstance(spec.name, str)


def read_config(path: Path) -> None:
    saved = read_saved(model_ref(f"local-dir:{path.parent}"), with_weights=False)
    assert isinstance(saved.name, str)


def masks_json(path: Path) -> None:
    config = LamConfig.from_json(path.read_text(encoding="utf-8", errors="replace"))
    assert LamConfig.from_json(config.to_json()) == config


MASK_FOLDER = {
    "lam_config": {"rank": 2, "hidden": [3], "keys": "content"},
    "base_model": {
        "model_class": "timm.VisionTransformer", "name": "timm/a.t", "revision": "abc", "attention_sha256": "0" * 64,
    },
    "layers": ["blocks.0.attn", "blocks.1.attn"], "parts": {"encoder": 5, "decoder": None}, "also": ["head.weight"],
    "label_names": ["a", "b"], "lamzoo": {"version": "0.2.0", "sha256": "0" * 64},
}  # fmt: skip


def read_masks(path: Path) -> None:
    masks = read_mask_folder(path.parent)
    assert isinstance(masks.config, LamConfig)
    assert isinstance(str(masks.base_model), str)
    assert all(isinstance(name, str) for name in (*masks.layers, *masks.also, *(masks.label_names or ())))


def masks_toml(path: Path) -> None:
    config = LamConfig.from_toml(path.read_text(encoding="utf-8", errors="replace"))
    assert LamConfig.from_toml(config.to_toml()) == config


def override(path: Path) -> None:
    load_recipe(recipe_toml(path.parent), [path.read_text(encoding="utf-8", errors="replace")])


def bench_rows(folder: Path) -> Path:
    write_rows(
        folder / "a.csv",
        [BenchRow("lam_vit_micro", "t", value=50.0, batch=4, params_m=1.5), BenchRow("a", status="failed")],
    )
    return folder / "a.csv"


def read_bench(path: Path) -> None:
    for row in read_rows(path):
        assert row.value is None or math.isfinite(row.value)
        assert isinstance(row.name, str)


def timm_table(folder: Path) -> Path:
    (folder / "results-imagenet.csv").write_text(
        'model,img_size,top1,param_count\na.t,224,80.5,"1,013.01"\nb,32,70,5.5\n'
    )
    columns = "model,infer_img_size,infer_samples_per_sec,infer_step_time,infer_batch_size,infer_gmacs"
    (folder / "benchmark-infer-a.csv").write_text(f"{columns}\na,224,100.5,9.9,32,4.5\n")
    return folder / "results-imagenet.csv"


def coco(folder: Path) -> Path:
    write_captions(folder / "a.json", {1: "a dog", 2: "a cat"})
    return folder / "a.json"


def read_coco(path: Path) -> None:
    assert all(isinstance(caption, str) for caption in read_captions(path).values())


def real(path: Path) -> None:
    assert RealLabels(path).highest >= -1


def state(folder: Path) -> Path:
    StateFile(folder / "a.json", {"model": "m", "batch": 4}).save(EvalState(5, 3, 4, (1,)))
    return folder / "a.json"


def read_state(path: Path) -> None:
    found = StateFile(path, {"model": "m", "batch": 4}).load()
    assert 0 <= found.top1 <= 100
    assert all(type(index) is int for index in found.bad)


def run(folder: Path) -> Path:
    store_json(folder / RECIPE_NAME, {"task": "classification", "data": {"source": "photos"}})
    store_json(folder / HELD_OUT_NAME, ["a", "b"])
    MadeSplit("train", 0.2, 0, (1, 2), "0" * 64).write(folder)
    return folder / SPLIT_NAME


def read_run(path: Path) -> None:
    trained = TrainedData.read(path.parent)
    assert trained is not None
    assert isinstance(trained.source, str)
    assert all(isinstance(video, str) for video in trained.held_out)


def beside(write: Callable[[Path], Path], name: str) -> Callable[[Path], Path]:
    """Writes as ``write`` does; the file to be mutated is another one in the same folder."""
    return lambda folder: write(folder).with_name(name)


def read_npz(path: Path) -> None:
    check_labels(create_dataset(f"npz:{path.parent}", "test"))


def read_tar(path: Path) -> None:
    check_labels(create_dataset(f"wds:{path}", "all"))


def read_moments(kind: str, split: str) -> Callable[[Path], None]:
    return lambda path: create_moment_dataset(f"{kind}:{path.parent}", split).annotations()


TABLE = 'filename,label,x\n0.jpg,2,a\n1.jpg,3,"b,c"\n2.jpg,2,\n3.jpg,0,d\n'
NUMBERED = {"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}


def fingerprints(folder: Path) -> Path:
    found = image_fingerprint(["a.jpg", "b.jpg"], [0, 1], [10, 20], ["cat", "dog"])
    write_fingerprints(folder, {"train": found, "validation": found})
    return folder / FINGERPRINT_NAME


def read_changes(path: Path) -> None:
    now = {"train": image_fingerprint(["a.jpg"], [0], [10], ["cat", "dog"])}
    assert isinstance(describe_changes(read_fingerprints(path.parent) or {}, now), str)


JSON, LINES, CELLS, TOML, WORDS = (
    (load_json, store_json),
    (load_lines, store_lines),
    (load_cells, store_cells),
    (load_toml, store_toml),
    (load_words, store_words),
)
ARCHIVE, TAR = (load_arrays, store_arrays), (load_members, store_members)

#: Those that files from elsewhere have most often are tried most often.
FORMATS = (
    Format("config.json", value("config.json", CONFIG), read_config, *JSON, often=True),
    Format("card", card, read_model_card, *TOML, often=True),
    Format("recipe.toml", recipe_toml, load_recipe, *TOML, often=True),
    Format("recipe.json", value("recipe.json", RECIPE), load_recipe, *JSON, often=True),
    Format("override", text("a.txt", "run.seed=1"), override),
    Format("masks.json", value("a.json", {"rank": 2, "hidden": [3]}), masks_json, *JSON),
    Format(CONFIG_NAME, value(CONFIG_NAME, MASK_FOLDER), read_masks, *JSON),
    Format("masks.toml", text("a.toml", 'rank = 2\nhidden = [3]\nop = "mul"\n'), masks_toml, *TOML),
    Format("submission", submission, read_scored, *LINES, often=True),
    Format("qvhighlights", highlights, read_highlights, *LINES, often=True),
    Format("queries", value("a.jsonl", {"qid": 1, "query": "a dog"}), read_queries, *LINES),
    Format("tvsum", tvsum, lambda path: create_moment_dataset(f"tvsum:{path.parent}", "val"), *LINES),
    Format("charades", charades, read_moments("charades", "test"), *WORDS),
    Format("charades.csv", beside(charades, "Charades_v1_test.csv"), read_moments("charades", "test"), *CELLS),
    Format("grid", grid, read_grid, *LINES, often=True),
    Format("logmel.npz", beside(grid, "logmel.npz"), read_grid, *ARCHIVE),
    Format("labels.csv", listed("a.csv", TABLE), read_list, *CELLS, often=True),
    Format("imagelist", listed("a.txt", "0.jpg 2\n1.jpg 3\n2.jpg 2\n3.jpg 0\n"), read_list, *WORDS, often=True),
    Format("bench.csv", bench_rows, read_bench, *CELLS, often=True),
    Format("timm.csv", timm_table, read_timm, *CELLS),
    Format("msrvtt.csv", msrvtt, videos_of("msrvtt", "test"), *CELLS, often=True),
    Format("msrvtt.json", beside(msrvtt, "MSRVTT_data.json"), videos_of("msrvtt", "train"), *JSON),
    Format("msvd.json", msvd, videos_of("msvd", "test"), *JSON),
    Format("captions.csv", caption_table, read_spans, *CELLS),
    Format("lsmdc", lsmdc, read_items("lsmdc", "test"), *WORDS),
    Format("features.npz", features, read_items("lsmdc", "test"), *ARCHIVE, often=True),
    Format("features.npy", npy_features, read_items("lsmdc", "test")),
    Format("mad.json", mad, read_items("mad", "val"), *JSON),
    Format("mad.csv", mad_csv, read_items("mad", "train-named"), *CELLS),
    Format("images.npz", images_npz, read_npz, *ARCHIVE, often=True),
    Format("classes.json", beside(images_npz, "classes.json"), read_npz, *JSON),
    Format("images.tar", image_shard, read_tar, *TAR, often=True),
    Format("videos.tar", video_shard, videos_of("wds", "all"), *TAR, often=True),
    Format("index", index, read_stored, load_index_values, store_index_values, often=True),
    Format("classes.txt", text("a.txt", "n01440764 tench\nn01443537 goldfish\n"), names, *WORDS, often=True),
    Format("class_index.json", value("a.json", NUMBERED), names, *JSON, often=True),
    Format("coco.json", coco, read_coco, *JSON),
    Format("real.json", value("real.json", [[1], [], [3, 4]]), real, *JSON),
    Format("state.json", state, read_state, *JSON),
    Format("split.json", run, read_run, *JSON),
    Format("fingerprints", fingerprints, read_changes, *JSON),
    Format("run's recipe.json", beside(run, RECIPE_NAME), read_run, *JSON),
    Format("held-out.json", beside(run, HELD_OUT_NAME), read_run, *JSON),
)
