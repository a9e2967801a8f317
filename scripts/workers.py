"""Command lines run side by side, each in a process of its own that ends with this one."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Run:
    """A job that writes to the folder <output>/<arch>/<tag>.

    Attributes:
        script: whose `main` takes the command line.
        cfg, arch, tag, output: of the command line.
        arguments: the rest of it; --opts comes last.
        needs: the runs that come before.
    """

    script: str
    cfg: str
    arch: str
    tag: str
    output: Path
    arguments: tuple[str, ...]
    needs: tuple[Run, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder that it writes to."""
        return self.output / self.arch / self.tag

    @property
    def command(self) -> list[str]:
        """The arguments."""
        own = {"--arch": self.arch, "--tag": self.tag, "--output": str(self.output), "--cfg": self.cfg}
        return [*itertools.chain(*own.items()), *self.arguments]


def run_side_by_side(jobs: Sequence[Job], watch: Callable[[], object]) -> None:
    """Run jobs, each as soon as those that it needs are done, and call `watch` every second.

    As many run at a time as there are cores, each with one thread; where one fails, what has not begun is left.

    Raises:
        RuntimeError: one failed; with what it said.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    todo, running = list(jobs), dict[Future[None], Job]()
    count = max(1, min(len(jobs), os.cpu_count() or 1))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            while todo or running:
                unfinished = {*todo, *running.values()}
                for job in [job for job in todo if unfinished.isdisjoint(job.needs)]:
                    todo.remove(job)
                    running[pool.submit(_run, job.script, job.command)] = job
                finished, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()  # raises what went wrong in it
                    del running[future]
                watch()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _run(script: str, argv: Sequence[str]) -> None:
    """Run the `main` of a script and print nothing; its log is in its folder."""
    # scripts/downstream/detect.py is imported as downstream.detect
    module = ".".join(part for part in Path(script).with_suffix("").parts if part != "scripts")
    main = importlib.import_module(module).main
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(argv)
    if code:
        raise RuntimeError(errors.getvalue().strip() or f"{module} ended with exit code {code}")


def _end_with_parent() -> None:
    """Let this process end when its parent does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a process of the pool

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
