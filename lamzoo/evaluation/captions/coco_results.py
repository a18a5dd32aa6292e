"""Captions in COCO's results format: a JSON list of objects with an image_id and a caption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamzoo.data.json_files import read_json
from lamzoo.errors import DataError
from lamzoo.files import write_data
from lamzoo.reading import to_json

_FORM = '[{"image_id": ..., "caption": ...}, ...]'


def read_captions(path: str | Path) -> dict[int | str, str]:
    """Reads captions from a JSON file, optionally gzipped (``.gz``), for :func:`lamzoo.evaluation.caption_metrics`.

    Returns:
        The caption of each image_id, in the file's order; other keys are ignored.

    Raises:
        DataError: the file does not exist, is not JSON or not in this format, an id or a caption is missing or has the
            wrong type, or an id occurs twice.
    """
    path = Path(path)
    entries = read_json(path)
    if not isinstance(entries, list):
        raise DataError(f"{path} is not a list of captions; it must be {_FORM}")
    captions: dict[int | str, str] = {}
    for number, entry in enumerate(entries):
        where = f"entry {number} of {path}"
        if not isinstance(entry, dict) or "image_id" not in entry or "caption" not in entry:
            raise DataError(f"{where} lacks an image_id or a caption; the file must be {_FORM}")
        key, caption = entry["image_id"], entry["caption"]
        _check(key, caption, where)
        if key in captions:
            raise DataError(f"{where} repeats the image_id {key!r}; remove one of the two")
        captions[key] = caption
    return captions


def write_captions(path: str | Path, hypotheses: Mapping[Any, str]) -> None:
    """Writes captions atomically, gzipped if the name ends in ``.gz``.

    Args:
        path: the file; its folder is created if needed.
        hypotheses: maps each id, an int or a string, to its caption.

    Raises:
        DataError: an id or caption has another type, or the file can't be written.
    """
    for key, caption in hypotheses.items():
        _check(key, caption, f"{path} can't be written: the entry of {key!r}")
    entries = [{"image_id": key, "caption": caption} for key, caption in hypotheses.items()]
    write_data(path, to_json(entries).encode())


def _check(key: Any, caption: Any, where: str) -> None:
    if not isinstance(key, (int, str)) or isinstance(key, bool):
        raise DataError(f"{where} has an image_id of type {type(key).__name__}; it must be an int or a string")
    if not isinstance(caption, str):
        raise DataError(f"{where} has the caption {caption!r:.60}; it must be one string")
