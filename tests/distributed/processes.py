"""Runs a function on several gloo processes and brings back what each returned."""

from __future__ import annotations

import datetime
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """Call ``function(rank, world, *arguments)`` on ``world`` forked processes; exceptions come back as values."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_main, (function, world, Path(folder), arguments), nprocs=world, start_method="fork")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _main(rank: int, function: Callable[..., Any], world: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # a forked process must not wake the parent's OpenMP pool
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
    try:
        result = function(rank, world, *arguments)
    except Exception as error:
        traceback.print_exc()
        result = error
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()
