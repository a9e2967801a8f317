"""The processes of a run: who this one is, and how it meets the others (torch.distributed underneath)."""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from repopt.errors import UserError

T = TypeVar("T")

HEARTBEAT_VARIABLE = "REPOPT_HEARTBEAT_TIMEOUT"
HEARTBEAT_TIMEOUT = 45  # seconds without a heartbeat, after which a process is given up
RENDEZVOUS_TIMEOUT = 300.0  # seconds that the first process may take to come to the others


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
        """Return whether this process writes and prints for all."""
        return self.rank == 0


@contextmanager
def world() -> Iterator[World]:
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs), and part from them at the end.

    Where another process ends before all have parted, this one ends within a minute, wherever it waits: the others of a
    run are never left hanging. REPOPT_HEARTBEAT_TIMEOUT in the environment is another number of seconds, 0 for never.

    Raises:
        UserError: more processes on this node than GPUs, or an environment that is not torchrun's.
    """
    rank, size, timeout = _number("RANK", 0), _number("WORLD_SIZE", 1), _heartbeat_timeout()
    if torch.cuda.is_available():
        on_node, gpus = _number("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count()
        if on_node > gpus:
            raise UserError(f"{on_node} processes on a node with {gpus} GPUs: every process needs one of its own")
        device = torch.device("cuda", _number("LOCAL_RANK", 0))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    here = World(rank, size, device)
    if size == 1:
        yield here
        return
    global _cpu_group
    backend, heartbeat, ended = "nccl" if device.type == "cuda" else "gloo", None, False
    try:
        try:
            dist.init_process_group(backend, store=_rendezvous(rank, size), rank=rank, world_size=size)
            _cpu_group = _new_cpu_group()
            heartbeat = _Heartbeat(timeout)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"cannot meet the other {size - 1} processes (start with torchrun): {error}") from None
        yield here
        heartbeat.shutdown()
        ended = True
    finally:
        _cpu_group = None
        waits = backend == "nccl" and not ended  # for the others' kernels: then the error would not be told
        if heartbeat is not None and not ended:
            heartbeat.abort(kill=waits)
        if dist.is_initialized() and not waits:
            dist.destroy_process_group()


_cpu_group: dist.ProcessGroup | None = None  # for what processes say to each other beside their devices' work


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, on each of them."""
    if _cpu_group is not None:
        dist.all_reduce(values)
    return values


def run_on_main(decide: Callable[[], T]) -> T:
    """Return what the first process decides, on all of them; also raise its UserError on all."""
    if _cpu_group is None:
        return decide()
    decision: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            decision = [decide()]
        except UserError as error:
            decision = [error]
    dist.broadcast_object_list(decision, src=0, group=_cpu_group)
    if isinstance(decision[0], UserError):
        raise decision[0]
    return decision[0]


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank, on the first; an empty list on the others."""
    if _cpu_group is None:
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=_cpu_group)
    return values or []


class AsyncMax:
    """The largest of what all processes say: known to all at the same step, without waiting for the device.

    What is said in one step is known in the next one: the message travels while the next step is computed.
    """

    def __init__(self) -> None:
        self._travelling: tuple[Tensor, dist.Work] | None = None

    def push(self, number: int) -> int:
        """Return the largest of what was said in the last call (0 in the first one); in a process alone, `number`."""
        if _cpu_group is None:
            return number
        known = self._arrived()
        message = torch.tensor(number)
        self._travelling = message, dist.all_reduce(message, dist.ReduceOp.MAX, group=_cpu_group, async_op=True)
        return known

    def sync(self, number: int) -> int:
        """Return the largest of what was said in the last call and in this one; waits for the others."""
        return max(self.push(number), self._arrived() if _cpu_group is not None else 0)

    def _arrived(self) -> int:
        if self._travelling is None:
            return 0
        message, work = self._travelling
        self._travelling = None
        work.wait()
        return int(message)


def _rendezvous(rank: int, size: int) -> dist.Store:
    """Return a store that the processes which are alive share, and no others.

    torchrun has one store for all its restarts. There, processes would find the addresses of those before them, and
    wait for dead ones. So the first one opens a rendezvous of a new name, and begins when the others have answered;
    they know that it is not one of before because it names them as present.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("rendezvous", own)
        present = [store.get(f"{own}/{other}") for other in range(1, size)]
        store.set(f"{own}/present", b" ".join(present))
        return dist.PrefixStore(own, store)
    rendezvous, deadline = "", time.monotonic() + RENDEZVOUS_TIMEOUT
    while time.monotonic() < deadline:
        if (newest := store.get("rendezvous").decode()) != rendezvous:
            rendezvous = newest
            store.set(f"{rendezvous}/{rank}", own)
        if store.check([f"{rendezvous}/present"]) and own.encode() in store.get(f"{rendezvous}/present").split():
            return dist.PrefixStore(rendezvous, store)
        time.sleep(0.1)
    raise RuntimeError(f"the first one has not opened a rendezvous within {RENDEZVOUS_TIMEOUT:.0f} s")


class _Heartbeat(threading.Thread):
    """Exchanges heartbeats with the other processes, and ends this one when one of them is gone.

    A process whose peer is gone may wait for it in a kernel of its GPU, where no error ever reaches it.

    Args:
        timeout: Seconds without a heartbeat after which a process is given up, the smallest of all processes; 0: never.
    """

    def __init__(self, timeout: int) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._ends, self._aborts = threading.Event(), False
        smallest = torch.tensor(timeout)
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group=_cpu_group)
        self._timeout = int(smallest)
        if self._timeout:
            self._group = _new_cpu_group(timedelta(seconds=self._timeout))
            self.start()

    def run(self) -> None:
        all_end = torch.zeros((), dtype=torch.int64)
        while not all_end:
            self._ends.wait(self._timeout / 9)
            if self._aborts:
                return
            all_end.fill_(self._ends.is_set())
            try:
                dist.all_reduce(all_end, dist.ReduceOp.MIN, group=self._group)
            except RuntimeError:
                if not self._aborts:
                    print("another process of this run has ended, so this one ends too", file=sys.stderr, flush=True)
                    os._exit(1)
                return

    def shutdown(self) -> None:
        """Wait until all processes end, so that nobody's end is taken for a failure."""
        self._ends.set()
        if self._timeout:
            self.join()

    def abort(self, *, kill: bool) -> None:
        """Send no more heartbeats: this process ends by an error of its own; with `kill`, if that hangs, in a while."""
        self._aborts = True
        self._ends.set()
        if kill and self._timeout:
            end = threading.Timer(self._timeout, os._exit, [1])
            end.daemon = True
            end.start()


def _new_cpu_group(timeout: timedelta | None = None) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), "every process is a member"
    return group


def _heartbeat_timeout() -> int:
    debugged = sys.gettrace() is not None  # a debugger stops all threads
    if sys.version_info >= (3, 12):
        debugged = debugged or sys.monitoring.get_tool(sys.monitoring.DEBUGGER_ID) is not None
    return 0 if debugged else _number(HEARTBEAT_VARIABLE, HEARTBEAT_TIMEOUT, "give seconds, or 0 for no heartbeat")


def _number(variable: str, default: int, hint: str = "start with torchrun") -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment's {variable} is {text!r}, not a number: {hint}")
    return int(text)
