"""Being asked to stop: signals, which only leave a note, so that the step under way is finished and saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupted(Exception):  # noqa: N818 (as KeyboardInterrupt, it is no error)
    """A training was stopped by a signal and has been saved: started again, it goes on as if it never stopped."""


class Request:
    """Whether this process has been asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_requests() -> Iterator[Request]:
    """Note SIGTERM, SIGUSR1 (preemption) and SIGINT (Ctrl-C; a second one is not waited for) instead of ending."""
    request = Request()
    if threading.current_thread() is not threading.main_thread():  # only there are signals handled
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)

    heeded = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
