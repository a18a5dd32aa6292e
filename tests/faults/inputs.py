"""Faults of inputs: what is lost or counted twice in folders, lists and archives, what hangs, and what is no image."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import struct
import tarfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.driver import Row, cut, flip, pipe, put, without_rights
from tests.faults.stock import npz_arrays

EVAL = "eval local-dir:model --device cpu --json --data"
TRAIN = "train --model local-dir:model --epochs 1 --device cpu --workers 0 --no-report --data"
PREDICT = "predict local-dir:model --device cpu"
SEARCH = "search red --videos clips --model local-dir:retriever --device cpu --no-sheet --on-bad-input stop"
RED = "photos/red/03.png"


# Folders of images.


def unreadable(path: str) -> Callable[[], None]:
    return lambda: Path(path).chmod(0)


def cycle() -> None:
    os.symlink("..", "photos/red/again")


def counted(samples: int) -> tuple[str, ...]:
    return (f'"samples": {samples},',)


def listing(
    name: str, make: Callable[[], Any], *says: str, call: str = f"{EVAL} imagefolder:photos", **more: Any
) -> Row:
    return Row(f"listing: {name}", call, says, "model photos", make, **more)


FOLDERS = [
    listing("eval: a class folder that can't be read", unreadable("photos/red"), "photos/red", "ermission",
            within=without_rights),
    listing("eval: the same, left out", unreadable("photos/red"), "photos/red", code=0, out=True,
            call=f"{EVAL} imagefolder:photos --on-bad-input skip", within=without_rights),
    listing("train: a class folder that can't be read", unreadable("photos/red"), "photos/red", "ermission",
            call=f"{TRAIN} photos", within=without_rights),
    listing("predict: a folder below that can't be read", unreadable("photos/red"), "photos/red", "ermission",
            call=f"{PREDICT} photos", within=without_rights),
    listing("eval: a folder that can't be read", unreadable("photos"), "photos", "ermission", within=without_rights),
    listing("predict: a folder that can't be read", unreadable("photos"), "photos", "ermission",
            call=f"{PREDICT} photos", within=without_rights),
    listing("eval: a folder whose parent can't be searched",
            lambda: (Path("upper").mkdir(), shutil.move("photos", "upper/photos"), Path("upper").chmod(0)), "upper",
            "ermission", call=f"{EVAL} imagefolder:upper/photos", within=without_rights),
    listing("eval: a cycle of links counts no photo twice", cycle, '"samples": 16,', code=0, out=True),
    listing("predict: a cycle of links shows no photo twice", cycle, code=0, out=True, call=f"{PREDICT} photos --json"),
    listing("train: a cycle of links", cycle, code=0, out=True, call=f"{TRAIN} photos", writes=("runs*", "cache*")),
    listing("eval: a link that leads nowhere", lambda: os.symlink("nowhere.png", "photos/red/x.png"),
            "photos/red/x.png"),
    listing("eval: a link to itself", lambda: os.symlink("x.png", "photos/red/x.png"), "photos/red/x.png"),
    listing("eval: a pipe among the images", partial(pipe, "photos/red/x.png"), "photos/red/x.png"),
    listing("eval: a pipe, left out", partial(pipe, "photos/red/x.png"), '"samples": 16,', '"skipped": 1', code=0,
            out=True, call=f"{EVAL} imagefolder:photos --on-bad-input skip"),
    listing("train: a pipe among the images", partial(pipe, "photos/red/x.png"), "photos/red/x.png",
            call=f"{TRAIN} photos"),
    listing("predict: a pipe in the folder", partial(pipe, "photos/red/x.png"), "photos/red/x.png",
            call=f"{PREDICT} photos"),
    listing("predict: a pipe", partial(pipe, "x.png"), "x.png", "pipe", call=f"{PREDICT} x.png"),
    listing("explain: a pipe", partial(pipe, "x.png"), "x.png", "pipe",
            call="explain local-dir:model x.png --out masks.png"),
    listing("export: a pipe as images", partial(pipe, "x.png"), "x.png",
            call="export local-dir:model --out x.onnx --images x.png"),
    listing("predict: a socket", lambda: bound("x.png"), "x.png", call=f"{PREDICT} x.png"),
    listing("predict: a device", lambda: None, "/dev/null", call=f"{PREDICT} /dev/null"),
    listing("eval: an image that can't be read", unreadable(RED), RED, "ermission", within=without_rights),
    listing("train: a class without images", lambda: Path("photos/green").mkdir(), "green", call=f"{TRAIN} photos"),
    listing("eval: no image at all", lambda: (shutil.rmtree("photos"), Path("photos/red").mkdir(parents=True)),
            "photos"),
    listing("eval: a folder in the place of an image",
            lambda: (Path(RED).unlink(), Path(RED).mkdir()), '"samples": 15,', code=0, out=True),
    listing("eval: more classes than the model", lambda: shutil.copytree("photos/red", "photos/green"), "3 classes",
            "2"),
    Row("listing: eval: a split that is missing", f"{EVAL} imagefolder:splits --split test", ("test", "train"),
        "model splits"),
    Row("listing: eval: a folder that is a file", f"{EVAL} imagefolder:photo.png", "photo.png", "model photo"),
]  # fmt: skip


def bound(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)


# Images.


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(pixels)) if pixels else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


BAD_IMAGES: dict[str, Callable[[], Any]] = {
    "truncated": partial(cut, "photo.png"),
    "empty": partial(put, "photo.png"),
    "a text": partial(put, "photo.png", "I am a text"),
    "of 10^10 pixels": partial(put, "photo.png", png(100_000, 100_000, b"\0" * 1000)),
    "of 2^31 pixels in width": partial(put, "photo.png", png(2**31 - 1, 1, b"\0")),
    "without pixels": partial(put, "photo.png", png(32, 32)),
    "of size 0": partial(put, "photo.png", png(0, 0, b"\0")),
    "a broken chunk": lambda: put("photo.png", Path("photo.png").read_bytes().replace(b"IDAT", b"IDXT")),
    "a broken GIF": partial(put, "photo.png", b"GIF89a" + b"\xff" * 40),
    "a broken TIFF": partial(put, "photo.png", b"II*\0" + b"\xff" * 60),
    "a broken WebP": partial(put, "photo.png", b"RIFF\x40\0\0\0WEBPVP8 " + b"\xff" * 60),
    "a broken JPEG": partial(put, "photo.png", b"\xff\xd8\xff\xe0\0\x10JFIF" + b"\xff" * 60),
    "a broken BMP": partial(put, "photo.png", b"BM" + b"\xff" * 60),
    "a broken icon": partial(put, "photo.png", b"\0\0\1\0" + b"\xff" * 60),
    "PostScript, which Pillow would hand to Ghostscript": partial(put, "photo.png",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(CANARY) (w) file\n%%EOF\n"),
    "missing": lambda: Path("photo.png").unlink(),
    "unreadable": partial(os.chmod, "photo.png", 0),
}  # fmt: skip
IMAGES = [
    Row(f"image: predict: {name}", f"{PREDICT} photo.png", "photo.png", "model photo", make,
        within=without_rights)
    for name, make in BAD_IMAGES.items()
] + [
    Row("image: explain: truncated", "explain local-dir:model photo.png --out masks.png", "photo.png", "model photo",
        partial(cut, "photo.png")),
    Row("image: export: truncated", "export local-dir:model --out x.onnx --images photo.png", "photo.png",
        "model photo", partial(cut, "photo.png")),
    Row("image: eval: truncated", f"{EVAL} photos", RED, "model photos", partial(cut, RED)),
    Row("image: eval: truncated, left out", f"{EVAL} photos --on-bad-input skip", ('"samples": 15,', '"skipped": 1'),
        "model photos", partial(cut, RED), code=0, out=True),
    Row("image: train: truncated", f"{TRAIN} photos", (RED, "--on-bad-input skip"), "model photos", partial(cut, RED)),
    Row("image: predict: a name that is not UTF-8", f"{PREDICT} photos", ".png", "model photos",
        lambda: put(os.fsdecode(b"photos/\xff\xfe.png"), "no image")),
    Row("image: predict: a name of 5,000 characters", f"{PREDICT} {'x' * 5000}.png", "xxx", "model"),
]  # fmt: skip


# Lists of labels.


def lines(*rows: str) -> Callable[[], Path]:
    return partial(put, "labels.csv", "\n".join(rows) + "\n")


def listed(name: str, make: Callable[[], Any], *says: str, options: str = "", **more: Any) -> Row:
    return Row(f"list: {name}", f"{EVAL} imagelist:flat:labels.csv{options}", says, "model listed", make, **more)


def all_but(number: int) -> tuple[str, ...]:
    return tuple(f"{other}.png,red" for other in range(6) if other != number)


LISTS = [
    listed("a listed image is missing", lambda: Path("flat/3.png").unlink(), "3.png"),
    listed("a listed image is missing, left out", lambda: Path("flat/3.png").unlink(), '"samples": 5,', '"skipped": 1',
           options=" --on-bad-input skip", code=0, out=True),
    listed("an image is not listed", lines("filename,label", *all_but(3)), "3.png"),
    listed("an image with two labels", lines("filename,label", *all_but(9), "3.png,blue"), "3.png"),
    listed("labels of 10^20", lines(*(f"{number}.png {10**20}" for number in range(6))), "100000000000000000000"),
    listed("a negative label", lines(*(f"{number}.png -1" for number in range(6))), "labels.csv", "'-1'"),
    listed("a label in other digits", lines(*(f"{number}.png ²" for number in range(6))), "labels"),
    listed("a label beyond the model", lines(*(f"{number}.png 7" for number in range(6))), "7"),
    listed("an empty list", partial(put, "labels.csv"), "labels.csv", "empty"),
    listed("a list that is missing", lambda: Path("labels.csv").unlink(), "labels.csv"),
    listed("a list that is a pipe", partial(pipe, "labels.csv"), "labels.csv", "pipe"),
    listed("a list that is a folder", lambda: (Path("labels.csv").unlink(), Path("labels.csv").mkdir()), "labels.csv"),
    listed("a list in Latin-1", partial(put, "labels.csv", "filename,label\n0.png,grün\n".encode("latin-1")),
           "labels.csv", "UTF-8"),
    listed("a list in UTF-16", partial(put, "labels.csv", "filename,label\n0.png,red\n".encode("utf-16")),
           "labels.csv", "UTF-8"),
    listed("a list with NUL", lines("filename,label", *all_but(3), "3.png,\0"), "labels.csv"),
    listed("a row without a label", lines("filename,label", *all_but(3), "3.png,"), "labels.csv", "line"),
    listed("a field of a million characters", lines("filename,label", *all_but(3), f"3.png,{'x' * 10**6}"),
           "labels.csv"),
    listed("a quote that is not closed", lines("filename,label", *all_but(3), '3.png,"red'), "labels.csv"),
    listed("no column of labels", lines("filename,size,colour", "0.png,1,2"), "labels.csv"),
    listed("a list that can't be read", unreadable("labels.csv"), "labels.csv", "ermission", within=without_rights),
    listed("train: a listed image is missing", lambda: Path("flat/3.png").unlink(), "3.png"),
]  # fmt: skip
LISTS[-1] = Row(LISTS[-1].name, f"{TRAIN} imagelist:flat:labels.csv", "3.png", "model listed", LISTS[-1].make)


# Packed images.


def arrays(**changes: Any) -> Callable[[], None]:
    return lambda: np.savez("packed/test.npz", **{**npz_arrays(), **changes})


def packed(name: str, make: Callable[[], Any], *says: str, **more: Any) -> Row:
    return Row(f"npz: {name}", f"{EVAL} npz:packed", says or ("test.npz",), "model packed", make, **more)


def huge() -> None:
    """An array whose header promises 32 TB."""
    head = b"{'descr': '<i8', 'fortran_order': False, 'shape': (4398046511104,), }"
    head = head.ljust(118) + b"\n"
    import zipfile

    with zipfile.ZipFile("packed/test.npz", "w") as archive:
        for name in ("jpeg", "offsets", "labels"):
            archive.writestr(f"{name}.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head)


class _Written:
    def __reduce__(self) -> Any:
        return (io.open, ("CANARY", "w"))


def objects() -> None:
    np.savez("packed/test.npz", **{**npz_arrays(), "labels": np.array([_Written()] * 6, object)})


NPZ = [
    packed("truncated", partial(cut, "packed/test.npz")),
    packed("empty", partial(put, "packed/test.npz")),
    packed("a text", partial(put, "packed/test.npz", "I am a text")),
    packed("a pipe", partial(pipe, "packed/test.npz"), "test.npz"),
    packed("flipped", partial(flip, "packed/test.npz", 0.5), "packed"),
    packed("a header of 32 TB", huge),
    packed("pickled labels", objects),
    packed("labels of 10^18", arrays(labels=np.full(6, 10**18)), str(10**18)),
    packed("negative labels", arrays(labels=np.full(6, -3)), "-3"),
    packed("labels of floats", arrays(labels=np.full(6, 0.5))),
    packed("labels that are too few", arrays(labels=np.zeros(3, np.int64))),
    packed("offsets beyond the files", arrays(offsets=np.arange(7) * 10**12)),
    packed("offsets that fall", arrays(offsets=np.arange(7)[::-1].copy())),
    packed("offsets of NaN", arrays(offsets=np.full(7, np.nan))),
    packed("files of text", arrays(jpeg=np.array(["a", "b"]))),
    packed("no array of files", lambda: np.savez("packed/test.npz", labels=np.zeros(6)), "test.npz", "jpeg"),
    packed("class names nested too deeply", partial(put, "packed/classes.json", "[" * 10**5), "classes.json"),
    packed("class names that are numbers", partial(put, "packed/classes.json", "[1, 2]"), "classes.json"),
    packed("class names that are too few", partial(put, "packed/classes.json", '["blue"]'), "classes"),
    packed("class names in Latin-1", partial(put, "packed/classes.json", '["grün", "b"]'.encode("latin-1")),
           "classes.json"),
    packed("class names in a pipe", partial(pipe, "packed/classes.json"), "classes.json", "pipe"),
    packed("a broken image", arrays(jpeg=np.zeros(npz_arrays()["jpeg"].size, np.uint8)), "packed"),
]  # fmt: skip


# Shards.


def shard(samples: list[tuple[str, bytes]]) -> Callable[[], None]:
    def make() -> None:
        with tarfile.open("shards/1.tar", "w") as archive:
            for name, content in samples:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))

    return make


def special(kind: bytes, target: str = "") -> Callable[[], None]:
    def make() -> None:
        with tarfile.open("shards/1.tar", "w") as archive:
            entry = tarfile.TarInfo("0.png")
            entry.type, entry.linkname = kind, target
            archive.addfile(entry)
            label = tarfile.TarInfo("0.cls")
            label.size = 1
            archive.addfile(label, io.BytesIO(b"0"))

    return make


def tars(name: str, make: Callable[[], Any], *says: str, spec: str = "shards/{0..1}.tar", **more: Any) -> Row:
    return Row(f"tar: {name}", f"{EVAL} 'wds:{spec}'", says or ("1.tar",), "model shards", make, **more)


SHARDS = [
    tars("a shard is missing", lambda: Path("shards/1.tar").unlink()),
    tars("no shard at all", lambda: None, "nowhere", spec="nowhere/*.tar"),
    tars("a shard is empty", partial(put, "shards/1.tar")),
    tars("a shard is truncated", partial(cut, "shards/1.tar", 0.3)),
    tars("a shard is truncated between members", partial(cut, "shards/1.tar", 1536 / 10240)),
    tars("a shard is a text", partial(put, "shards/1.tar", "I am a text")),
    tars("a shard is a pipe", partial(pipe, "shards/1.tar")),
    tars("a shard can't be read", unreadable("shards/1.tar"), "1.tar", "ermission", within=without_rights),
    tars("a shard is compressed", partial(put, "shards/1.tar", b"\x1f\x8b\x08\0\0\0\0\0\0\3" + b"\0" * 100)),
    tars("an image without a label", shard([("0.png", b"x")]), "1.tar", "0"),
    tars("a label without an image", shard([("0.cls", b"0")]), "1.tar", "0"),
    tars("an image twice", shard([("0.png", b"x"), ("0.png", b"x"), ("0.cls", b"0")]), "1.tar", "0.png"),
    tars("a label of text", shard([("0.png", b"x"), ("0.cls", b"red")]), "0"),
    tars("a label of 10^20", shard([("0.png", b"x"), ("0.cls", str(10**20).encode())]), "0"),
    tars("a label in other digits", shard([("0.png", b"x"), ("0.cls", "²".encode())]), "0"),
    tars("a link out of the shard", special(tarfile.SYMTYPE, "/etc/passwd"), "1.tar"),
    tars("a hard link", special(tarfile.LNKTYPE, "../photo.png"), "1.tar"),
    tars("a device", special(tarfile.CHRTYPE), "1.tar"),
    tars("a broken image", shard([("0.png", b"x"), ("0.cls", b"0")]), "1.tar[0]"),
]  # fmt: skip


# Videos, features and captions.

GRID = "eval local-dir:{} --task {} --data grid:speech:{} --split test --device cpu"
CLIP = "clips/coffee.mp4"


def video(name: str, make: Callable[[], Any], *says: str, call: str = SEARCH, **more: Any) -> Row:
    return Row(
        f"video: {name}", call, says or ("coffee.mp4",), "retriever film_finder film_describer clips", make, **more
    )


FIND = f"find red {CLIP} --model local-dir:film_finder --features local-dir:retriever --device cpu"
DESCRIBE = f"describe {CLIP} --model local-dir:film_describer --features local-dir:retriever"
EXTRACT = "extract-features clips --out features --model local-dir:retriever --device cpu --on-bad-input stop"
CACHE = ("cache*",)

VIDEOS = [
    *(
        video(f"{call.split()[0]}: {name}", make, "coffee.mp4", call=call, writes=("features*",))
        for call in (SEARCH, FIND, DESCRIBE, EXTRACT)
        for name, make in (
            ("truncated", partial(cut, CLIP, 0.4)),
            ("empty", partial(put, CLIP)),
            ("a text", partial(put, CLIP, "I am a text")),
            ("a pipe", partial(pipe, CLIP)),
        )
    ),
    video("search: a pipe, left out", partial(pipe, CLIP), "coffee.mp4", call=SEARCH.replace("stop", "skip"), code=0,
          out=True, writes=CACHE),
    video("search: a list of other files", partial(put, CLIP, "ffconcat version 1.0\nfile /etc/passwd\n")),
    video("search: a playlist", partial(put, CLIP, "#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")),
    video("search: unreadable", unreadable(CLIP), "coffee.mp4", "ermission", within=without_rights),
    video("search: a folder below that can't be read",
          lambda: (Path("clips/more").mkdir(), Path("clips/more").chmod(0)), "clips/more", within=without_rights),
    video("search: a cycle of links", lambda: os.symlink("..", "clips/again"), "3 of 3 videos", code=0, out=True,
          writes=CACHE),
    video("search: a link that leads nowhere", lambda: os.symlink("nowhere.mp4", "clips/x.mp4"), "x.mp4"),
    video("search: no video", lambda: (shutil.rmtree("clips"), Path("clips").mkdir()), "clips"),
    video("find: missing", lambda: Path(CLIP).unlink(), call=FIND),
    video("extract-features: a folder that can't be read", unreadable("clips"), "clips", "ermission", call=EXTRACT,
          within=without_rights),
    video("extract-features: half a file of features is made again",
          lambda: put("features/clip_features/coffee.npz", b"half"), "features", call=EXTRACT, code=0, out=True,
          writes=("features*",)),
    Row("captions: retrieval: a video is missing", "eval local-dir:retriever --data videos:clips --device cpu",
        "absent.mp4", "retriever clips", partial(put, "clips/captions.csv", "video,caption\nabsent.mp4,a cup\n")),
    Row("captions: retrieval: a row without a caption",
        "eval local-dir:retriever --task retrieval --data videos:clips --device cpu", "captions.csv", "retriever clips",
        partial(put, "clips/captions.csv", "video,caption\ncoffee.mp4,\n")),
    Row("captions: retrieval: no column of captions",
        "eval local-dir:retriever --task retrieval --data videos:clips --device cpu", "captions.csv", "retriever clips",
        partial(put, "clips/captions.csv", "video,text_of\ncoffee.mp4,a\n")),
    Row("captions: retrieval: a table that is a pipe",
        "eval local-dir:retriever --task retrieval --data videos:clips --device cpu", "captions.csv", "retriever clips",
        partial(pipe, "clips/captions.csv")),
    *(
        Row(f"grid: {task}: {name}", GRID.format(model, task, view), says, f"{model} speech", make)
        for model, task, view in (("retriever", "retrieval", "face"), ("finder", "moments", "audio"),
                                  ("describer", "captions", "audio"))
        for name, make, says in (
            ("captions truncated", partial(cut, "speech/captions.jsonl"), "captions.jsonl"),
            ("captions nested too deeply", partial(put, "speech/captions.jsonl", "[" * 10**5 + "\n"), "captions.jsonl"),
            ("captions are a pipe", partial(pipe, "speech/captions.jsonl"), "captions.jsonl"),
            ("captions without their keys", partial(put, "speech/captions.jsonl", '{"id": 1}\n'), "captions.jsonl"),
        )
    ),
    Row("grid: moments: sound truncated", GRID.format("finder", "moments", "audio"), "logmel.npz", "finder speech",
        partial(cut, "speech/logmel.npz")),
    Row("grid: captions: sound is missing", GRID.format("describer", "captions", "audio"), "logmel.npz",
        "describer speech", lambda: Path("speech/logmel.npz").unlink()),
    Row("grid: retrieval: faces truncated", GRID.format("retriever", "retrieval", "face"), "face.npz",
        "retriever speech", partial(cut, "speech/face.npz")),
    Row("grid: retrieval: faces are a pipe", GRID.format("retriever", "retrieval", "face"), "face.npz",
        "retriever speech", partial(pipe, "speech/face.npz")),
    Row("torchvision: a batch of pickles", f"{EVAL} torchvision:CIFAR10:cifar", "cifar", "model", lambda: cifar()),
]  # fmt: skip


LAYOUTS = [
    Row(f"layout: {spec}: {name}", f"eval local-dir:{model} --task {task} --data {spec}:somewhere{rest} --device cpu",
        "somewhere", model, make)
    for model, task, spec, rest in (
        ("model", "classification", "imagefolder", ""),
        ("model", "classification", "imagelist", ":somewhere/labels.csv"),
        ("model", "classification", "npz", ""),
        ("model", "classification", "wds", "/*.tar"),
        ("retriever", "retrieval", "videos", ""),
        ("retriever", "retrieval", "msrvtt", ""),
        ("retriever", "retrieval", "msvd", ""),
        ("retriever", "retrieval", "grid", ":face"),
        ("retriever", "retrieval", "flickr8k", ""),
        ("finder", "moments", "qvhighlights", ""),
        ("finder", "moments", "charades", ""),
        ("finder", "moments", "tvsum", ""),
        ("describer", "captions", "mad", ""),
        ("describer", "captions", "lsmdc", ""),
    )
    for name, make in (
        ("no folder", lambda: None),
        ("an empty folder", lambda: Path("somewhere").mkdir()),
        ("a pipe", partial(pipe, "somewhere")),
    )
]  # fmt: skip


# Features and annotations in QVHighlights' layout.

QV = "eval local-dir:qv_finder --task moments --data qvhighlights:qv --split val --device cpu"
FEATURE, QUERY = "qv/features/clip_features/v24.npz", "qv/features/clip_text_features/qid24.npz"
ANNOTATIONS = "qv/highlight_val_release.jsonl"


def annotation(**changes: Any) -> Callable[[], None]:
    """Changes the first line of the annotations."""

    def make() -> None:
        head, *rest = Path(ANNOTATIONS).read_text().splitlines()
        put(ANNOTATIONS, "\n".join([json.dumps({**json.loads(head), **changes}), *rest]) + "\n")

    return make


def qv(name: str, make: Callable[[], Any], *says: str, **more: Any) -> Row:
    return Row(f"features: {name}", QV, says, "qv", make, **more)


FEATURES = [
    qv("a video's are missing", lambda: Path(FEATURE).unlink(), "v24"),
    qv("a video's are truncated", partial(cut, FEATURE), FEATURE),
    qv("a video's are empty", partial(put, FEATURE), FEATURE),
    qv("a video's are a pipe", partial(pipe, FEATURE), FEATURE),
    qv("a video's are pickled", lambda: np.savez(FEATURE, features=np.array([_Written()], object)), FEATURE),
    qv("a video's are text", lambda: np.savez(FEATURE, features=np.array(["a"])), FEATURE),
    qv("a video's are NaN", lambda: np.savez(FEATURE, features=np.full((60, 8), np.nan, np.float32)), FEATURE),
    qv("a video's have another width", lambda: np.savez(FEATURE, features=np.zeros((60, 5), np.float32)), FEATURE),
    qv("a video's have no rows", lambda: np.savez(FEATURE, features=np.zeros((0, 8), np.float32)), FEATURE),
    qv("a query's are missing", lambda: Path(QUERY).unlink(), "qid24"),
    qv("a query's are truncated", partial(cut, QUERY), QUERY),
    qv("a query's can't be read", partial(os.chmod, QUERY, 0), QUERY, "ermission", within=without_rights),
    qv("annotations are truncated", partial(cut, ANNOTATIONS, 0.47), ANNOTATIONS),
    qv("annotations are empty", partial(put, ANNOTATIONS), "no queries"),
    qv("annotations are a pipe", partial(pipe, ANNOTATIONS), ANNOTATIONS),
    qv("windows are text", annotation(relevant_windows="all"), ANNOTATIONS),
    qv("windows of one number", annotation(relevant_windows=[[1]]), ANNOTATIONS),
    qv("a duration is negative", annotation(duration=-5), ANNOTATIONS),
    qv("a duration is 10^12", annotation(duration=10**12), ""),
    qv("a video of a path", annotation(vid="../../outside"), "outside"),
    qv("a video of a number", annotation(vid=5), ANNOTATIONS),
    qv("a query of a list", annotation(query=["a"]), ANNOTATIONS),
    qv("a number of a query is a list", annotation(qid=[1]), ANNOTATIONS),
    qv("a number of a query twice", annotation(qid=25), "25"),
]  # fmt: skip


def cifar() -> None:
    """CIFAR-10 in the layout that torchvision unpickles, with other content."""
    import pickle

    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        put(f"cifar/cifar-10-batches-py/{name}", pickle.dumps({"data": _Written(), "labels": [0]}))


ROWS = [*FOLDERS, *IMAGES, *LISTS, *NPZ, *SHARDS, *VIDEOS, *LAYOUTS, *FEATURES]
