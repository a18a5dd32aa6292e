"""Files that several processes write: leftovers of killed ones are removed, those of running ones are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lamzoo.errors import WeightsError
from lamzoo.files import atomic_files, file_lock

WRITER = """
import sys, time
from pathlib import Path
from lamzoo.errors import WeightsError
from lamzoo.files import atomic_files, file_lock
with file_lock(Path("lock")) as held, atomic_files() as stage:
    Path("other").write_text("half")
    Path("other").replace(stage(Path("file")))  # as safetensors writes
    print(held, flush=True)
    time.sleep(600)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_name_as_long_as_the_file_system_allows_is_written(tmp_path: Path) -> None:
    name = "é" * 125 + ".txt"  # 254 bytes
    with atomic_files() as stage:
        stage(tmp_path / name).write_text("whole")
    assert names(tmp_path) == [name]


@pytest.mark.skipif(sys.platform == "win32", reason="without locks, nothing is swept")
def test_a_write_removes_what_killed_writers_left_and_nothing_of_running_ones(tmp_path: Path) -> None:
    (tmp_path / "notes.tmp").write_text("of another program")
    writer = subprocess.Popen([sys.executable, "-c", WRITER], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "True\n"
        with atomic_files() as stage:
            stage(tmp_path / "file").write_text("whole")
        assert len(names(tmp_path)) == 5  # with the lock, the temporary file and its lock
        with file_lock(tmp_path / "lock") as held:
            assert held is False
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    with file_lock(tmp_path / "lock") as held:
        assert held is True
    # The folder is swept once by each process.
    again = "from pathlib import Path; from lamzoo.files import atomic_files\nwith atomic_files() as s: s(Path('new'))"
    subprocess.run([sys.executable, "-c", again], cwd=tmp_path, check=True)
    assert names(tmp_path) == ["file", "new", "notes.tmp"]
    assert (tmp_path / "file").read_text() == "whole"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forked processes")
def test_a_forked_worker_does_not_keep_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    (ready, set_ready), (done, set_done) = os.pipe(), os.pipe()
    owner = os.fork()
    if owner == 0:
        with file_lock(tmp_path / "lock"):
            if os.fork() == 0:  # the worker, which outlives the owner
                os.write(set_ready, b"x")
                os.read(done, 1)
                os._exit(0)
            signal.pause()
    try:
        os.read(ready, 1)
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        with file_lock(tmp_path / "lock") as held:
            assert held
    finally:
        os.write(set_done, b"x")
        for descriptor in (ready, set_ready, done, set_done):
            os.close(descriptor)


def test_where_no_lock_can_be_made_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with file_lock(tmp_path / "file" / "lock") as held:
        assert held is None


def test_names_of_the_full_length_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    with atomic_files() as stage:
        stage(path).write_text("whole")
    assert names(tmp_path) == [path.name]


def test_of_several_files_the_one_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")

    def write() -> None:
        with atomic_files() as stage:
            stage(tmp_path / "one").write_text("1")
            stage(tmp_path / "file" / "two")

    with pytest.raises(WeightsError, match=r"two cannot be written \(File exists\)"):
        write()
    assert names(tmp_path) == ["file"]
