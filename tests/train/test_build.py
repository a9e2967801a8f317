"""What a configuration builds."""

import logging

import pytest
import torch
from data_helpers import global_generators_at_rest
from torch import nn

from repopt.errors import UserError
from train import build, compilation, config, tasks
from train.distributed import World
from train.logging import logger

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("choice", "device", "checkpointed", "mode"),
    [
        ("auto", CPU, False, None),
        ("auto", GPU, False, "default"),
        ("auto", GPU, True, None),
        ("off", GPU, False, None),
        ("default", CPU, False, "default"),
        ("reduce-overhead", GPU, True, "reduce-overhead"),
    ],
)
def test_where_a_training_is_compiled(monkeypatch, choice, device, checkpointed, mode):
    asked = []
    monkeypatch.setattr(
        compilation, "compiled", lambda model, where, mode: asked.append((where, mode)) or nn.Identity()
    )
    cfg, _ = config.build({"TRAIN.COMPILE": choice, "TRAIN.USE_CHECKPOINT": checkpointed})
    model = nn.Linear(2, 2)
    trained = build.compiled(cfg, World(0, 1, device), model)
    assert asked == ([(device, mode)] if mode else [])
    assert (trained is model) == (mode is None)


@pytest.mark.parametrize(
    ("device", "processes", "changed", "mode"),
    [
        (GPU, 1, {}, "reduce-overhead"),
        (CPU, 1, {}, "off"),
        (GPU, 2, {}, "default"),
        (GPU, 1, {"DATA.IMG_SIZE": 224}, "default"),
        (GPU, 1, {"DATA.IMG_SIZE": 224, "DATA.BATCH_SIZE": 8}, "reduce-overhead"),
        (GPU, 1, {"TRAIN.ACCUMULATION_STEPS": 2}, "default"),
        (GPU, 1, {"TRAIN.USE_CHECKPOINT": True}, "off"),
        (GPU, 1, {"TASK": "detect"}, "default"),
        (GPU, 1, {"TRAIN.COMPILE": "off"}, None),
    ],
)
def test_the_mode_suits_the_work_and_the_log_says_it(monkeypatch, device, processes, changed, mode):
    said = []
    monkeypatch.setattr(compilation, "compiled", lambda model, *_: model)
    monkeypatch.setattr(logger, "info", said.append)
    cfg = config.build({"DATA.IMG_SIZE": 32} | changed).cfg
    build.compiled(cfg, World(0, processes, device), nn.Linear(2, 2))
    assert said == ([f"TRAIN.COMPILE auto: {mode}"] if mode else [])


def test_where_compiling_does_not_work(monkeypatch, caplog):
    def broken(*arguments):
        raise UserError("torch.compile does not work here: no compiler found")

    monkeypatch.setattr(compilation, "compiled", broken)
    monkeypatch.setattr(logger, "propagate", True)
    model = nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING, logger.name):
        assert build.compiled(config.build({}).cfg, World(0, 1, GPU), model) is model
    assert "no compiler found; so training goes on without" in caplog.text
    with pytest.raises(UserError, match="no compiler found"):
        build.compiled(config.build({"TRAIN.COMPILE": "default"}).cfg, World(0, 1, CPU), model)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_do_not_go_with_accumulation(mode):
    cfg = config.build({"TRAIN.COMPILE": mode, "TRAIN.ACCUMULATION_STEPS": 2}).cfg
    with pytest.raises(UserError, match=f"TRAIN.COMPILE {mode} runs CUDA graphs"):
        build.compiled(cfg, World(0, 1, GPU), nn.Linear(2, 2))


def classifier(batch_size, image_size, processes=1):
    """A task whose network's last features are 32 times smaller than its images, and the network."""
    keys = {"DATA.BATCH_SIZE": batch_size, "DATA.IMG_SIZE": image_size, "TRAIN.SYNC_BN": processes > 1}
    task = tasks.create(config.build(keys | {"MODEL.ARCH": "RepOpt-VGG-nano-hs"}).cfg, World(0, processes, CPU))
    return task, task.network()


@pytest.mark.parametrize(("batch_size", "image_size", "processes"), [(1, 33, 1), (2, 32, 1), (1, 32, 2)])
def test_batch_norms_that_meet_two_values_leave_no_trace(batch_size, image_size, processes):
    task, model = classifier(batch_size, image_size, processes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with global_generators_at_rest():
        build.check_batch_norms(task, model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batch_norms_that_meet_one_value_are_refused():
    with pytest.raises(UserError, match=r"^a batch norm would see one value per channel"):
        build.check_batch_norms(*classifier(1, 32))


def test_other_errors_of_a_network_stay_loud():
    def fails(images):
        raise ValueError("a defect")

    task, model = classifier(1, 32)
    model.forward = fails
    with pytest.raises(ValueError, match="a defect"):
        build.check_batch_norms(task, model)
