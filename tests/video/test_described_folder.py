"""A folder of descriptions: damaged records are made again, errors come early, and processes share one listing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import lamzoo
from lamzoo.errors import DataError
from lamzoo.video import described_folder
from lamzoo.video.features import extract_features
from lamzoo.video.processes import Processes
from tests.videos import write_clip

pytest.importorskip("open_clip")
from tests.video.shared import DESCRIBER, TOWERS


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A describer and its towers."""
    torch.manual_seed(0)
    towers = lamzoo.create_model("lam_clip4clip_micro", clip=TOWERS, head_layers=1, max_frames=2, fps=1, lam=False)
    return lamzoo.create_model("lam_describer_micro", **DESCRIBER), towers


@pytest.fixture
def film(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "film.mp4", 5, fps=5)


@pytest.mark.parametrize("damage", [{"windows": None}, {"windows": [{"start": 0}]}, {"duration": None}])
def test_a_record_that_lacks_something_is_made_again(
    models: tuple[Any, Any], film: Path, tmp_path: Path, damage: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def describe() -> Any:
        return lamzoo.describe_videos([film], tmp_path / "out", models[0], towers=models[1], device="cpu")

    describe()
    path = tmp_path / "out" / "film.json"
    whole = path.read_bytes()
    record = {**json.loads(whole), **damage}
    path.write_text(json.dumps({name: value for name, value in record.items() if value is not None}))
    assert describe().new == 1 and "described again" in caplog.text
    assert path.read_bytes() == whole


def test_a_video_that_is_replaced_while_it_is_described_is_noticed(
    models: tuple[Any, Any], film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(*args: Any, **kwargs: Any) -> Any:
        found = describe_windows(*args, **kwargs)
        write_clip(film, 20, fps=5)
        return found

    describe_windows = described_folder.describe_windows
    monkeypatch.setattr(described_folder, "describe_windows", replaced)
    with pytest.raises(DataError, match="film.json was made of or with another video of this name"):
        lamzoo.describe_videos([film], tmp_path / "out", models[0], towers=models[1], device="cpu")


def test_a_folder_that_cannot_be_made_is_an_error_before_the_work(
    models: tuple[Any, Any], film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(described_folder, "describe_windows", lambda *args, **kwargs: pytest.fail("described"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file can't be created .*--out"):
        lamzoo.describe_videos([film], tmp_path / "file", models[0], towers=models[1], device="cpu")


@dataclass(frozen=True)
class Second(Processes):
    """Process 1 of 2, which gets the answers of process 0."""

    rank: int = 1
    count: int = 2
    answers: list[Any] = field(default_factory=list)

    def on_main(self, function: Any) -> Any:
        return self.answers.pop(0)

    def gather(self, value: Any) -> list[Any]:
        return [value]


def test_the_videos_are_those_that_process_0_sees(models: tuple[Any, Any], film: Path, tmp_path: Path) -> None:
    describer, towers = models
    other = write_clip(tmp_path / "more.mp4", 5, fps=5)
    out, paths = tmp_path / "features", {}
    for path in (film, other):
        paths[out / "clip_features" / f"{path.stem}.npz"] = path
    second = Second(answers=[(paths, {}), [], list(paths.items())])
    assert extract_features([film], out, towers, device="cpu", processes=second).videos == 2
    assert [path.name for path in (out / "clip_features").iterdir()] == ["more.npz"]
    out = tmp_path / "described"
    lamzoo.describe_videos([film], out, describer, towers=towers, device="cpu")
    records = {out / f"{path.stem}.json": path for path in (film, other)}
    second = Second(answers=[records, list(records)])
    made = lamzoo.describe_videos([film], out, describer, towers=towers, device="cpu", processes=second)
    assert len(made.records) == 2
