"""Command lines run side by side, each in a process of its own that ends with this one."""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor


@contextlib.contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """As many processes as there are cores, or jobs; where something fails, what has not begun is left."""
    os.environ["OMP_NUM_THREADS"] = "1"  # one thread per job, as many jobs at a time as there are cores
    context = multiprocessing.get_context("spawn")
    count = max(1, min(jobs, os.cpu_count() or 1))
    with ProcessPoolExecutor(count, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def quietly(program: str, argv: Sequence[str]) -> None:
    """Run the `main` of a module; its log is in its folder.

    Raises:
        RuntimeError: its exit code is not 0; with what it said.
    """
    main = importlib.import_module(program).main
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(argv)
    if code:
        raise RuntimeError(errors.getvalue().strip())


def _end_with(parent: int) -> None:
    """Let this process end when its parent does, however that ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
