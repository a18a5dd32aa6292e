"""Processes that share a folder of videos write to the bit what one writes, also after one of them was killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lamzoo
from lamzoo.video.processes import Processes
from tests.forked import run_module_in_two
from tests.videos import write_clip

pytest.importorskip("open_clip")
from tests.video.shared import DESCRIBER, TOWERS, work


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three short videos, a broken one, and three queries."""
    videos = tmp_path / "videos"
    (videos / "more").mkdir(parents=True)
    for number in range(3):
        write_clip(videos / ("more" if number % 2 else ".") / f"film{number}.mp4", 4 + 2 * number, fps=5)
    (videos / "film1.mp4").write_bytes(b"nothing")
    (videos / "more" / "film1.mp4").rename(videos / "more" / "film9.mp4")
    lines = [json.dumps({"qid": number, "query": f"a cup {number}"}) for number in range(3)]
    (tmp_path / "queries.jsonl").write_text("\n".join(lines))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes of torchrun; the last digits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def share(folder: Path, died: str) -> None:
    first, second = run_module_in_two("tests.video.shared", str(folder), died)
    if not died:
        assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
        return
    assert (first.returncode, second.returncode) == (1, 9), first.stderr + second.stderr
    assert "another process of this run has ended" in first.stderr


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("died", "again"),
    [
        ("described", False),
        *(pytest.param(died, True, marks=pytest.mark.slow) for died in ("queries", "videos", "index", "described")),
    ],
)
def test_processes_write_what_one_writes_though_one_was_killed(folder: Path, died: str, again: bool) -> None:
    share(folder, died)
    assert contents(folder / "two"), "the first process kept what it had done"
    if again:
        share(folder, "")
    else:
        work(folder, folder / "two", Processes())
    made, index, described = work(folder, folder / "two", Processes())
    assert (made.new_videos, made.new_queries, index.embedded, described.new) == (0, 0, 0, 0)
    assert len(made.unreadable) == len(index.unreadable) == len(described.unreadable) == 1
    work(folder, folder / "one", Processes())
    two, one = contents(folder / "two"), contents(folder / "one")
    assert sorted(two) == sorted(one), "no parts are left"
    assert len(one) == 3 + 3 + 1 + 6  # features of videos and queries, the index, descriptions with subtitles
    assert not [name for name, data in one.items() if two[name] != data]


@pytest.mark.slow
def test_torchrun_shares_each_command(folder: Path) -> None:
    lamzoo.save_pretrained(
        lamzoo.create_model("lam_clip4clip_micro", clip=TOWERS, head_layers=1, max_frames=4, fps=1), folder / "clip"
    )
    lamzoo.save_pretrained(lamzoo.create_model("lam_describer_micro", **DESCRIBER), folder / "describer")
    skip = ("--on-bad-input", "skip", "--device", "cpu", "--json")
    commands = {
        "extract-features": ("videos", "--model", "clip", "--out", "OUT/features"),
        "search": ("a cup", "--videos", "videos", "--model", "clip", "--index", "OUT/index.safetensors", "--no-sheet"),
        "describe": ("videos", "--model", "./describer", "--features", "clip", "--out", "OUT/described"),
    }
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    for name, arguments in commands.items():
        records = []
        for out, launch in (("two", torchrun), ("one", ())):
            line = (name, *(each.replace("OUT", out) for each in arguments), *skip)
            done = subprocess.run(
                [sys.executable, *launch, "-m", "lamzoo", *line],
                cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            records.append(json.loads(done.stdout.replace(f'"{out}/', '"OUT/')))
        two, one = records
        for record in records:
            for answer in record.get("queries", []) if name == "search" else []:
                del answer["seconds"]
        assert two == one
    assert contents(folder / "two") == contents(folder / "one")
