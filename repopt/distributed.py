"""The processes of a run: who this one is, and how it meets the others (torch.distributed underneath)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from repopt.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among all of a run.

    Attributes:
        rank, size: its number among all processes, and how many there are.
        device: its own: a GPU each, or the CPU.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0


@contextmanager
def world() -> Iterator[World]:
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs), and part from them at the end.

    Raises:
        UserError: more processes on this node than GPUs, or an environment that is not torchrun's.
    """
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if torch.cuda.is_available():
        here, gpus = _number("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count()
        if here > gpus:
            raise UserError(f"{here} processes on a node with {gpus} GPUs: every process needs one of its own")
        device = torch.device("cuda", _number("LOCAL_RANK", 0))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size > 1:
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:
            raise UserError(f"cannot meet the other {size - 1} processes (start with torchrun): {error}") from None
    try:
        yield World(rank, size, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on each of them."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment's {variable} is {text!r}, not a number: start with torchrun")
    return int(text)
