"""Runs functions on several gloo processes and brings back what each returned.

Processes are never forked from this one: a fork of a process whose OpenMP threads exist waits for them for ever in its
first parallel region. They are forks of a server that has only imported what they need, since importing torch takes
longer than any of these tests, and are kept for the calls to come.
"""

from __future__ import annotations

import datetime
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 120.0
"""Time limit of a call in seconds, including the start of the processes."""

_pools: dict[int, _Pool] = {}
_context = mp.get_context("forkserver")
_context.set_forkserver_preload(
    # An optimizer's first step imports torch._dynamo.
    [__name__, "dst.methods", "pytest", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"]
)


def run(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """Call ``function(rank, world, *arguments)`` on ``world`` processes; exceptions come back as values.

    Args:
        function: A function of a module, which the processes import.
        world: Number of processes.
        arguments: Passed on, pickled.

    Raises:
        TimeoutError: The call took longer than ``LIMIT``; the processes are gone then.
    """
    if world not in _pools:
        _pools[world] = _Pool(world)
    try:
        return _pools[world].call(function, arguments)
    except BaseException:
        _pools.pop(world).close()
        raise


def exit_code_of(function: Callable[..., Any], *arguments: Any) -> int | None:
    """Call a function of a module in a new process; return its exit code, which is minus the signal if one killed it."""
    process = _context.Process(target=function, args=arguments)
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"{function.__name__} has not ended within {LIMIT:.0f} s")
    return process.exitcode


def close() -> None:
    """End all processes and the server that forks them."""
    while _pools:
        _pools.popitem()[1].close()
    forkserver._forkserver._stop()


def check_server() -> None:
    """Assert, on Linux, that the server has one thread: a fork of a process with more can hang in its first parallel region."""
    threads = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/task")
    if threads.is_dir():
        count = len(list(threads.iterdir()))
        assert count == 1, f"the server of processes has {count} threads: one of its imports starts threads"


class _Pool:
    def __init__(self, world: int) -> None:
        pipes = [_context.Pipe() for _ in range(world)]
        self._ends = [ours for ours, _ in pipes]
        self._processes = [
            _context.Process(target=_serve, args=(rank, world, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        check_server()

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        deadline = time.monotonic() + LIMIT
        with tempfile.TemporaryDirectory() as folder:
            for end in self._ends:
                end.send((function, folder, arguments))
            results = []
            for rank, end in enumerate(self._ends):
                if not end.poll(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"{function.__name__}: process {rank} has not answered within {LIMIT:.0f} s")
                end.recv()
                results.append(torch.load(Path(folder) / f"{rank}.pt", weights_only=False))
            return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process, end in zip(self._processes, self._ends, strict=True):
            process.join()
            end.close()


def _serve(rank: int, world: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    while True:
        try:
            function, folder, arguments = pipe.recv()
        except EOFError:  # the parent is gone
            return
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
        try:
            result = function(rank, world, *arguments)
        except Exception as error:
            traceback.print_exc()
            result = error
        torch.save(result, Path(folder) / f"{rank}.pt")
        dist.destroy_process_group()
        pipe.send("done")
