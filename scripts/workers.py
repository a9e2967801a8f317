"""Command lines run side by side, each in a process of its own that ends with this one."""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Protocol


class Job(Protocol):
    """A command line of a script, which may need others done before; what is not among the jobs is done already."""

    @property
    def script(self) -> str:
        """The script whose `main` takes the command line."""

    @property
    def command(self) -> list[str]:
        """The arguments."""

    @property
    def needs(self) -> Sequence[Job]:
        """The jobs that come before."""


def run_side_by_side(jobs: Sequence[Job], watch: Callable[[], object]) -> None:
    """Run jobs, each as soon as those that it needs are done, and call `watch` every second.

    Raises:
        RuntimeError: one failed; with what it said.
    """
    todo, running, done = list(jobs), dict[Future[None], Job](), set[Job]()
    with workers(len(jobs)) as pool:
        while todo or running:
            for job in [job for job in todo if all(other in done or other not in jobs for other in job.needs)]:
                todo.remove(job)
                running[pool.submit(run_captured, module_of(job.script), job.command)] = job
            finished, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()  # raises what went wrong in it
                done.add(running.pop(future))
            watch()


@contextlib.contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Around jobs: as many processes as there are cores, or jobs; where one fails, what has not begun is left."""
    os.environ["OMP_NUM_THREADS"] = "1"  # one thread per job, as many jobs at a time as there are cores
    context = multiprocessing.get_context("spawn")
    count = max(1, min(jobs, os.cpu_count() or 1))
    with ProcessPoolExecutor(count, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def module_of(script: str) -> str:
    """Return the name by which a script is imported: scripts/downstream/detect.py is downstream.detect."""
    return ".".join(part for part in Path(script).with_suffix("").parts if part != "scripts")


def run_captured(program: str, argv: Sequence[str]) -> None:
    """Run the `main` of a module and print nothing; its log is in its folder.

    Raises:
        RuntimeError: its exit code is not 0; with what it said.
    """
    main = importlib.import_module(program).main
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(argv)
    if code:
        raise RuntimeError(errors.getvalue().strip() or f"{program} ended with exit code {code}")


def _end_with(parent: int) -> None:
    """Let this process end when its parent does, however that ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
