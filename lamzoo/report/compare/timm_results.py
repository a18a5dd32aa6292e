"""timm's published results on ImageNet-1k, read from its own CSV files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lamzoo.data.csv_tables import open_table
from lamzoo.errors import DataError
from lamzoo.reading import parse_float

_RESULTS = "results-imagenet.csv"
_BENCHMARKS = "benchmark-infer-*.csv"
_RESULT_COLUMNS = ("model", "img_size", "top1", "param_count")
_BENCHMARK_COLUMNS = (
    "model", "infer_img_size", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "infer_gmacs",
)  # fmt: skip


@dataclass(frozen=True)
class TimmSpeed:
    """A throughput measured by timm.

    Attributes:
        machine: the setting in the name of the benchmark file: ``"fp32-nchw-pt240-cpu-i9_10940x-dynamo"``.
        images_per_s: throughput at ``batch``.
        batch: batch size.
    """

    machine: str
    images_per_s: float
    batch: int


@dataclass(frozen=True)
class TimmResult:
    """The published results of one of timm's pretrained models.

    Attributes:
        name: timm's ``arch.tag``.
        img_size: pixels.
        top1: percent, on the 50,000 images of ImageNet-1k's validation split.
        params_m: 10^6 parameters.
        gmacs: 10^9 multiply-accumulates of one image of that size; None if timm benchmarked the architecture at other
            sizes only.
        speeds: one per benchmark file that has the architecture at this size.
    """

    name: str
    img_size: int
    top1: float
    params_m: float
    gmacs: float | None
    speeds: tuple[TimmSpeed, ...]


def read_timm(path: str | Path) -> tuple[TimmResult, ...]:
    """Reads timm's ``results-imagenet.csv`` and, for GMACs and speed, the ``benchmark-infer-*.csv`` of its folder.

    A benchmark belongs to a result if the architecture (the name before the tag) and the image size are the same.

    Args:
        path: the folder of both (``results/`` of timm's repository), or the ``results-imagenet.csv`` in it.

    Raises:
        DataError: a file is missing or can't be read, or has scores on another test set than ImageNet-1k's.
    """
    path = Path(path)
    results = path / _RESULTS if path.is_dir() else path
    lines = _read(results, _RESULT_COLUMNS)
    if lines and "top1_diff" in lines[0]:
        raise DataError(f"{results} has scores on another test set than ImageNet-1k's; give timm's {_RESULTS}.")
    gmacs: dict[tuple[str, str], float] = {}
    speeds: dict[tuple[str, str], list[TimmSpeed]] = {}
    for file in sorted(results.parent.glob(_BENCHMARKS)):
        machine = file.stem.removeprefix("benchmark-infer-")
        for line in _read(file, _BENCHMARK_COLUMNS):
            key = (line["model"], line["infer_img_size"])
            if line["infer_gmacs"]:
                gmacs.setdefault(key, _number(line, "infer_gmacs", file))
            speed = TimmSpeed(
                machine=machine,
                images_per_s=_number(line, "infer_samples_per_sec", file),
                batch=int(_number(line, "infer_batch_size", file)),
            )
            speeds.setdefault(key, []).append(speed)
    found = []
    for line in lines:
        key = (line["model"].partition(".")[0], line["img_size"])
        result = TimmResult(
            name=line["model"],
            img_size=int(_number(line, "img_size", results)),
            top1=_number(line, "top1", results),
            params_m=_number(line, "param_count", results),
            gmacs=gmacs.get(key),
            speeds=tuple(speeds.get(key, ())),
        )
        found.append(result)
    return tuple(found)


def is_imagenet1k(data: str) -> bool:
    """Returns whether a data set's name, as ``lamzoo eval --data`` takes it, looks like ImageNet-1k.

    ``imagefolder:/data/imagenet/val`` and ``hfds:ILSVRC/imagenet-1k`` do; Tiny ImageNet, Imagenette, ImageNet-100,
    ImageNet-21k and the variants (-V2, -A, -R, -C) do not.
    """
    names = re.split(r"[/\\:]", data.lower())
    return any(
        re.fullmatch(r"(imagenet|ilsvrc)([-_.]?(1k|2012|wds|val|validation|train|\{.*|\d+\.tar.*))*", n) for n in names
    )


def _read(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    if not path.is_file():
        raise DataError(f"timm's results cannot be read from {path}; give the folder of its {_RESULTS}.")
    table = open_table(path)
    missing = [column for column in columns if not table.rows or column not in table.headings]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r} and is not one of timm's files; give timm's {_RESULTS}.")
    return [line for _, line in table.select(table.headings)]


def _number(line: dict[str, str], column: str, path: Path) -> float:
    try:
        return parse_float(line[column].replace(",", ""))  # timm writes "1,013.01"
    except ValueError as error:
        raise DataError(
            f"{path}: {column} of {line['model']} is {line[column]!r}, which is not a number; download the file again."
        ) from error
