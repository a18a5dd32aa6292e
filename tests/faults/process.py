"""Edges of a process: closed and full streams, narrow terminals, signals, limits, plug-ins, a folder that is gone."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.driver import Row, Run, limited, put

ROOT = Path(__file__).resolve().parents[2]
LAMZOO = f'exec "{sys.executable}" -m lamzoo'


def shell(line: str, **env: str) -> Callable[[], Run]:
    """Runs a line of a shell, where ``lamzoo`` is the command."""

    def run() -> Run:
        command = line.replace("lamzoo", f'"{sys.executable}" -m lamzoo', 1)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, env={**os.environ, "PYTHONPATH": path, **env}, timeout=60,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        code = done.returncode if done.returncode >= 0 else 128 - done.returncode
        return Run(code, done.stdout.decode("utf-8"), done.stderr.decode("utf-8"))

    return run


def plugin(code: str, name: str = "odd") -> Callable[[], None]:
    """A plug-in, as an installer leaves it, in ``plugins/``."""

    def make() -> None:
        put(f"plugins/{name}_zoo.py", code)
        put(f"plugins/{name}_zoo-1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}-zoo\nVersion: 1\n")
        put(f"plugins/{name}_zoo-1.dist-info/entry_points.txt", f"[lamzoo.models]\n{name} = {name}_zoo\n")

    return make


def with_plugin(name: str, code: str, *says: str, line: str = "lamzoo list lam_vit_micro", **more: Any) -> Row:
    path = os.pathsep.join(("plugins", str(ROOT)))
    call = shell(f"PYTHONPATH={path} {line}")
    return Row(f"plug-in: {name}", call, says or ("odd", "lam_vit_micro"), make=plugin(code),
               **{"code": 0, "out": True, **more})  # fmt: skip


def interrupted(name: str) -> Callable[[], Path]:
    """A stand-in for typer, so that a signal arrives before the command line is there."""
    code = f"import os, signal, time\nos.kill(os.getpid(), signal.{name})\ntime.sleep(30)"
    return partial(put, "slow/typer.py", code)


SLOW = f"PYTHONPATH=slow:{ROOT} lamzoo list"
FULL = "cannot write to the standard output"
ROWS = [
    Row("process: stdout closed", shell("lamzoo list >&-"), code=0),
    Row("process: stdout and stderr closed", shell("lamzoo list >&- 2>&-"), code=0),
    Row("process: all streams closed", shell("lamzoo list <&- >&- 2>&-"), code=0),
    Row("process: stderr closed and an error", shell("lamzoo list nothing* 2>&-; [ $? = 2 ]"), code=0),
    Row("process: list to a full disk", shell("lamzoo list > /dev/full"), FULL),
    Row("process: list --json to a full disk", shell("lamzoo list --json > /dev/full"), FULL),
    Row("process: info to a full disk", shell("lamzoo info lam_vit_micro > /dev/full"), FULL),
    Row("process: --version to a full disk", shell("lamzoo --version > /dev/full"), FULL),
    Row("process: --help to a full disk", shell("lamzoo --help > /dev/full"), FULL),
    Row("process: stderr to a full disk", shell("lamzoo list nothing* 2> /dev/full; [ $? = 2 ]"), code=0),
    Row("process: a closed pipe", shell("lamzoo list | true"), code=0),
    Row("process: 20 columns", shell("lamzoo list lam_vit_micro", COLUMNS="20"), "lam_vit_micro", code=0, out=True),
    Row("process: 1 column", shell("lamzoo list lam_vit_micro", COLUMNS="1"), "lam_vit_micro", code=0, out=True),
    Row("process: 0 columns", shell("lamzoo list lam_vit_micro", COLUMNS="0"), "lam_vit_micro", code=0, out=True),
    Row("process: columns of text", shell("lamzoo list lam_vit_micro", COLUMNS="many"), "lam_vit_micro", code=0,
        out=True),
    Row("process: a dumb terminal", shell("lamzoo list lam_vit_micro", TERM="dumb"), "lam_vit_micro", code=0, out=True),
    Row("process: ASCII and a name of another script",
        shell("lamzoo list '写真*'", PYTHONIOENCODING="ascii", LC_ALL="C"), "no model matches"),
    Row("process: no home", shell("env -u HOME -u XDG_CACHE_HOME lamzoo list lam_vit_micro"), "lam_vit_micro", code=0,
        out=True),
    Row("process: a folder that is gone", shell("mkdir gone; cd gone; rmdir ../gone; lamzoo list lam_vit_micro"),
        "current folder"),
    Row("process: a home that is a file", shell("lamzoo list lam_vit_micro", HOME="/dev/null", XDG_CACHE_HOME=""),
        "lam_vit_micro", code=0, out=True),
    Row("process: TMPDIR is missing", shell("lamzoo list lam_vit_micro", TMPDIR="/nowhere"), "lam_vit_micro", code=0,
        out=True),
    Row("process: a umask of 777", shell("umask 777; lamzoo list lam_vit_micro"), "lam_vit_micro", code=0, out=True),
    Row("process: Ctrl-C before the command line is there", shell(f"{SLOW}; [ $? = 130 ]"),
        make=interrupted("SIGINT"), code=0),
    Row("process: SIGTERM before the command line is there", shell(f"{SLOW}; [ $? = 143 ]"),
        make=interrupted("SIGTERM"), code=0),
    with_plugin("Ctrl-C while it is imported", "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\n"
                "time.sleep(30)", "", line="lamzoo list; [ $? = 130 ]", out=False),
    Row("process: eval writes beyond the limit of a file",
        "eval local-dir:model --data photos --device cpu --output x.json", "x.json", "model photos",
        within=partial(limited, resource.RLIMIT_FSIZE, 300)),
    Row("process: explain writes beyond the limit of a file",
        "explain local-dir:model photo.png --out masks.png", "masks.png", "model photo",
        within=partial(limited, resource.RLIMIT_FSIZE, 300)),
    Row("process: search writes beyond the limit of a file",
        "search red --videos clips --model local-dir:retriever --no-sheet --device cpu --index i.safetensors",
        "i.safetensors", "retriever clips", within=partial(limited, resource.RLIMIT_FSIZE, 300)),
    with_plugin("calls sys.exit", "import sys; sys.exit(3)"),
    with_plugin("raises an error", "1 / 0"),
    with_plugin("raises KeyboardInterrupt's base", "class Odd(BaseException): pass\nraise Odd('no')"),
    with_plugin("has a syntax error", "def ("),
    with_plugin("is nested too deeply", "def f(): f()\nf()"),
    with_plugin("has a name that steers the terminal", "raise ValueError('\\x1b[31mred\\x1b]52;c;YWJj\\x07')"),
    with_plugin("registers a model of another name", "import lamzoo\nlamzoo.register_model('a b/../c')"),
    with_plugin("needs a package that is missing", "import no_such_package_of_anyone"),
]  # fmt: skip
