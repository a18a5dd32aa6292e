"""The processes of ``torchrun`` that share the videos of a folder."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lamzoo.errors import LamzooError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_LONGEST = timedelta(days=1)  # for which a process that is done waits for the others


@dataclass(frozen=True)
class Processes:
    """The processes of a run, of which each works on its share of the files; by default this process alone.

    Attributes:
        rank: number of this process, from 0; process 0 merges the results.
        count: number of processes.
        group: their process group; None for a single process.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def share(self, items: Sequence[_Item]) -> list[_Item]:
        """Returns the items of this process: every ``count``-th, in order."""
        return list(items[self.rank :: self.count])

    def on_main(self, function: Callable[[], _Result]) -> _Result:
        """Calls a function on process 0; all processes return its result or raise its :class:`LamzooError`."""
        if self.count == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome = [function(), None]
            except LamzooError as error:
                outcome = [None, error]
        with _reporting_ends():
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        result, failure = outcome
        if failure is not None:
            raise failure
        return result

    def gather(self, value: _Result) -> list[_Result]:
        """Returns the values of all processes, in their order, once all of them have come here."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with _reporting_ends():
            dist.all_gather_object(values, value, group=self.group)
        return values


@contextmanager
def launched_processes() -> Iterator[Processes]:
    """Connects the processes that ``torchrun`` started, through gloo; without it, yields this process alone.

    Each process computes on the GPU of its local rank, if there are GPUs. The default group of ``torch.distributed`` is
    used if there is one, such as that of accelerate; otherwise it is initialised, once, and kept until the program
    ends, because ``torchrun`` connects the processes only once.

    When a process ends, the others end as soon as they wait for it. A machine that fails without closing its
    connections, as without power, is noticed after a day: torchrun's own heartbeat does not end the other processes.

    Raises:
        LamzooError: the processes can't find one another.
    """
    joined = dist.is_available() and dist.is_initialized()
    count = dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    try:
        if not joined:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            dist.init_process_group("gloo")
            atexit.register(_leave)
        group = dist.new_group(backend="gloo", timeout=_LONGEST)
    except (ValueError, RuntimeError) as error:
        raise LamzooError(
            f"the {count} processes of this run can't connect ({' '.join(str(error).split())}); use torchrun"
        ) from error
    try:
        yield Processes(dist.get_rank(), count, group)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group(group)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _reporting_ends() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's, after a closed connection or the time limit
        raise LamzooError(
            "another process of this run has ended, and its message says why, or has not answered for a day; start the "
            "command again, which continues where it stopped"
        ) from error
