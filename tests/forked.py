"""Processes of a test's own, forked from one that has imported timm, and with it torch, but nothing of lamzoo.

Importing torch and timm takes ten seconds of CPU time where no bytecode is cached. Here it is paid once for a session.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch.distributed import TCPStore

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["timm"])


class Done(NamedTuple):
    """The exit code of a process and what it wrote."""

    returncode: int | None
    stdout: str
    stderr: str


def run_code(code: str, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 300) -> Done:
    """Runs code as ``python -c`` would, with ``env`` added to the environment."""
    (done,) = _run([({**os.environ, **(env or {})}, code, ("-c", *arguments))], timeout)
    return done


def run_module_in_two(module: str, *arguments: str, timeout: float = 300) -> list[Done]:
    """Does :func:`run_in_two` with a module, as ``-m`` would."""
    code = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return run_in_two(code, module, *arguments, timeout=timeout)


def run_in_two(code: str, name: str, *arguments: str, timeout: float = 300) -> list[Done]:
    """Runs code as ``torchrun --nproc-per-node=2`` would without a GPU; returns what became of each rank.

    ``name`` is the first of ``sys.argv``.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # like the one of torchrun itself
    jobs = []
    for rank in ("0", "1"):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        env = {**os.environ, **ranks, **shared}
        jobs.append((env, code, (name, *arguments)))
    return _run(jobs, timeout)


def _run(jobs: Sequence[tuple[Mapping[str, str], str, Sequence[str]]], timeout: float) -> list[Done]:
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder) / f"out{number}", Path(folder) / f"err{number}") for number in range(len(jobs))]
        processes = [
            _CONTEXT.Process(target=_child, args=(env, code, argv, *map(str, output)))
            for (env, code, argv), output in zip(jobs, outputs, strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
            process.kill()
            process.join()
        return [
            Done(process.exitcode, out.read_text(), err.read_text())
            for process, (out, err) in zip(processes, outputs, strict=True)
        ]


def _child(env: Mapping[str, str], code: str, argv: Sequence[str], out: str, err: str) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[:] = argv
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
