"""The processes of a run: how they meet, part, and learn that one is gone."""

import threading

import pytest
import torch
import torch.distributed as dist
from soak.training import free_port

from repopt.errors import UserError
from train import distributed
from train.distributed import gather, run_on_main, sum_over_processes, world


def beats():
    return [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def work(rank, ports):
    """What follows happens in one interpreter: runs of two processes, with and without an error, and of one."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("MASTER_ADDR", "localhost")
        patch.setenv("MASTER_PORT", str(ports[0]))
        with pytest.raises(UserError, match="a mistake in both"), world():
            assert gather(rank) == ([0, 1] if rank == 0 else [])
            assert beats()
            run_on_main(lambda: (_ for _ in ()).throw(UserError("a mistake in both")))
        patch.setenv("WORLD_SIZE", "1")
        with world() as alone:  # the group of before is gone
            assert (alone.size, dist.is_initialized()) == (1, False)
            assert run_on_main(lambda: rank) == rank
            assert sum_over_processes(torch.ones(1)) == 1
            assert gather(rank) == [rank]
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("MASTER_PORT", str(ports[1]))
        patch.setenv("REPOPT_HEARTBEAT_TIMEOUT", "600" if rank == 0 else "300")
        with world():
            assert sum_over_processes(torch.ones(1)) == 2
            assert max(thread._timeout for thread in beats()) == 300
        patch.setenv("MASTER_PORT", str(ports[2]))
        if rank == 0:  # one that has none, as under a debugger, would be given up by the other
            patch.setenv("REPOPT_HEARTBEAT_TIMEOUT", "0")
        before = set(threading.enumerate())  # one that was aborted may still wait for an answer
        with world():
            assert not set(beats()) - before
            assert run_on_main(lambda: "first" if rank == 0 else None) == "first"


def test_runs_of_two_processes_and_of_one_in_one_interpreter():
    torch.multiprocessing.spawn(work, ([free_port() for _ in range(3)],), nprocs=2)


def test_no_heartbeat_under_a_debugger(monkeypatch):
    monkeypatch.setattr("sys.gettrace", lambda: None)
    assert distributed._heartbeat_timeout() == distributed.HEARTBEAT_TIMEOUT
    monkeypatch.setattr("sys.gettrace", lambda: print)
    assert distributed._heartbeat_timeout() == 0


def test_an_odd_timeout_is_a_mistake(monkeypatch):
    monkeypatch.setenv("REPOPT_HEARTBEAT_TIMEOUT", "1.5")
    with pytest.raises(UserError, match=r"REPOPT_HEARTBEAT_TIMEOUT is '1.5', not a number: give seconds"), world():
        pass
