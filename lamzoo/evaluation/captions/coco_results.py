"""Captions in COCO's form of results: a JSON list of objects with an image_id and a caption."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamzoo.data.json_files import read_json
from lamzoo.errors import DataError
from lamzoo.files import atomic_files

_FORM = '[{"image_id": ..., "caption": ...}, ...]'


def read_captions(path: str | Path) -> dict[int | str, str]:
    """Reads captions, gzipped (``.gz``) or not, as :func:`lamzoo.evaluation.caption_metrics` takes them.

    Returns:
        For each image_id its caption, in the file's order; other keys are passed over.

    Raises:
        DataError: there is no such file, it is no JSON or not of that form, an id or a caption is missing or of a wrong
            type, or an id is there twice.
    """
    path = Path(path)
    entries = read_json(path)
    if not isinstance(entries, list):
        raise DataError(f"{path} is not a list of captions; it must be {_FORM}")
    captions: dict[int | str, str] = {}
    for number, entry in enumerate(entries):
        where = f"entry {number} of {path}"
        if not isinstance(entry, dict) or "image_id" not in entry or "caption" not in entry:
            raise DataError(f"{where} has no image_id or no caption; the file must be {_FORM}")
        key, caption = entry["image_id"], entry["caption"]
        _check(key, caption, where)
        if key in captions:
            raise DataError(f"{where} has the image_id {key!r} again; leave one out")
        captions[key] = caption
    return captions


def write_captions(path: str | Path, hypotheses: Mapping[Any, str]) -> None:
    """Writes captions, gzipped where the name ends in ``.gz``, all of them or nothing.

    Args:
        path: the file; its folder is made.
        hypotheses: for each id, a number or a string, its caption.

    Raises:
        DataError: an id or caption of another type, or the file can't be written there.
    """
    for key, caption in hypotheses.items():
        _check(key, caption, f"{path} can't be written: the entry of {key!r}")
    entries = [{"image_id": key, "caption": caption} for key, caption in hypotheses.items()]
    data = json.dumps(entries, ensure_ascii=False).encode()
    with atomic_files(DataError) as stage:
        path = Path(path)
        stage(path).write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _check(key: Any, caption: Any, where: str) -> None:
    if not isinstance(key, (int, str)) or isinstance(key, bool):
        raise DataError(f"{where} has an image_id of type {type(key).__name__}; it must be an int or a string")
    if not isinstance(caption, str):
        raise DataError(f"{where} has the caption {caption!r:.60}; it must be one string")
