"""What tests share."""

import contextlib
import gc
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from train.checkpoint import RunFolder

ROOT = Path(__file__).resolve().parents[1]

_FUZZING = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", max_examples=150, derandomize=True, **_FUZZING)
settings.register_profile("soak", max_examples=5000, **_FUZZING)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


GPU = torch.cuda.is_available()
DEVICE = torch.device(os.environ.get("REPOPT_TEST_DEVICE", "cuda"))  # of CUDA tests, where those run on a CPU as well


@pytest.fixture(autouse=True)
def _where_it_runs(request, monkeypatch):
    """CUDA tests run on a GPU or are skipped; for all others, and processes that they start, there is none."""
    if request.node.get_closest_marker("cuda") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    elif not GPU and not (DEVICE.type == "cpu" and "device" in request.fixturenames):
        pytest.skip("needs a GPU")


@pytest.fixture(scope="module", autouse=True)
def _little_for_the_garbage_collector():
    """What the modules before have left is not gone through again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def device():
    """Where a CUDA test runs that is true on a CPU as well: a GPU, or what REPOPT_TEST_DEVICE names."""
    return DEVICE


@pytest.fixture(autouse=True)
def _same_randomness():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared():
    """The folder of the published facts, which lies beside the project where it is developed."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the published release's files are not here")
    return folder


@pytest.fixture(scope="session")
def published_keys(shared):
    """Names and shapes of the published models' state dicts."""
    return json.loads((shared / "contract" / "state_dict_keys.json").read_text())


@pytest.fixture
def stopping(monkeypatch):
    """A context in which a training gets SIGTERM after every checkpoint."""
    save = RunFolder.save

    def save_and_stop(folder, content, names=()):
        save(folder, content, names)
        os.kill(os.getpid(), signal.SIGTERM)

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save", save_and_stop)
            yield

    return context


@pytest.fixture
def in_one_line(capsys):
    """Checks that a program has said one line on stderr: a pattern, in which {names} stand for paths."""

    def check(program, pattern, places):
        error = capsys.readouterr().err
        assert error.startswith(f"{program}: ")
        assert len(error.splitlines()) == 1
        for place, path in places.items():
            pattern = pattern.replace(f"{{{place}}}", str(path))
        assert re.search(pattern, error), error

    return check
