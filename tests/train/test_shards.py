"""A training on shards is the training on class folders: from the command line, in one process and in two."""

import multiprocessing
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from shard_helpers import FORMS, served, write
from soak.training import free_port
from torch import nn

from main_repopt import main
from repopt import checkpoint

ARCH = "RepOpt-VGG-nano-hs"
STEPS = 3  # of an epoch
OPTIONS = [
    "DATA.IMG_SIZE", 32, "DATA.NUM_WORKERS", 1, "TRAIN.EPOCHS", 2, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.BASE_LR", 0.2,
    "AUG.PRESET", "raug15", "AUG.MIXUP", 0.2, "SAVE_EVERY_STEPS", 1,
]  # fmt: skip


class Killed(BaseException):
    """Nothing that a run knows of."""


def killed_at(step):
    """A loss that is the last thing in a process's life."""
    forward, calls = nn.CrossEntropyLoss.forward, []

    def loss(criterion, *arguments):
        calls.append(1)
        if len(calls) == step:
            raise Killed
        return forward(criterion, *arguments)

    return loss


def train(rank, processes, runs, ports):
    """Run command lines one after the other; those with a step are killed there, and run again."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the loaders' workers, as from a command line
    warnings.simplefilter("ignore")
    ports = iter(ports)
    for command, step in runs:
        for kill in filter(None, (step, -1)):
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(next(ports))}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(nn.CrossEntropyLoss, "forward", killed_at(kill))
                if kill < 0:
                    assert main(command) == 0
                else:
                    with pytest.raises(Killed):
                        main(command)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    for split, count in (("train", 2 * STEPS), ("val", 2)):
        for label in ("bird", "cat"):
            (folder / split / label).mkdir(parents=True)
            for k in range(count):
                pixels = Image.fromarray(draw.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((50 + k, 48))
                pixels.save(folder / split / label / f"{k:02}.jpg")
    beside = tmp_path_factory.mktemp("beside")
    return {"folder": folder} | {form: write(folder, beside / form, form, per_shard=5) for form in FORMS[1:]}


@pytest.mark.parametrize("processes", [1, 2])
def test_every_form_trains_to_the_same_weights_also_where_it_is_killed(roots, processes, tmp_path):
    with served(roots["wds"], lambda request: request % 10 == 3) as server:
        places = {**{form: (form, roots[form]) for form in FORMS}, "store": ("wds", server.url)}
        runs = []
        for name, (form, root) in places.items():
            command = ["--arch", ARCH, "--output", tmp_path, "--tag", name, "--data-path", root]
            command += ["--batch-size", 4 // processes, *(["--zip", "--cache-mode", "no"] if form == "zip" else [])]
            command += ["--opts", "DATA.DATASET", "folder" if form == "zip" else form, *OPTIONS]
            # Within the second epoch; where processes are several, a loss is computed before the first step.
            runs.append(([*map(str, command)], None if name == "folder" else STEPS + 3))
        ports = [free_port() for _ in range(2 * len(runs))]
        torch.multiprocessing.spawn(train, (processes, runs, ports), nprocs=processes)
    files = {name: tmp_path / ARCH / name for name in places}
    assert "(epoch 2" in (text := (files["wds"] / "log_rank0.txt").read_text()) or "goes on" in text
    contents = {name: checkpoint.read(folder / "latest.pth") for name, folder in files.items()}
    for name, content in contents.items():
        assert content["data"] == contents["folder"]["data"]
        for key, tensor in contents["folder"]["model"].items():
            assert torch.equal(content["model"][key], tensor), (name, key)
