"""What several tests of loaders do."""

import random
from contextlib import contextmanager

import numpy as np
import torch

from repopt.errors import UserError


def error_of(loader):
    """The message alone: a traceback would keep the loader, and garbage collection takes 5 s to end a worker."""
    try:
        list(loader)
    except UserError as error:
        return str(error)
    return ""


@contextmanager
def global_generators_at_rest():
    """What is done within leaves them where they were."""
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    yield
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
