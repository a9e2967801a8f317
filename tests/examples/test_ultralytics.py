"""The trainer for ultralytics: its path is that of the network with branches, and all around it goes on working."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import repopt

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ultralytics_repopt.py"
TINY = """\
nc: 2
backbone:
  - [-1, 1, Conv, [8, 3, 4]]
  - [-1, 2, RepConv, [8, 8, 3, 1, 1, 1, 1, True, True]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 2, RepConv, [16, 16, 3, 1, 1, 2, 1, True, True]] # 3, stride 8
  - [-1, 1, RepConv, [16, 16, 3, 2]]
  - [-1, 1, C2fCIB, [16, True, True]]
  - [-1, 1, RepC3, [16]] # 6, stride 16
head:
  - [[3, 6], 1, Detect, [nc]]
"""


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example as a module; what ultralytics writes goes to a folder of the test's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("config")))
        patch.setenv("YOLO_OFFLINE", "true")
        pytest.importorskip("ultralytics")
        spec = importlib.util.spec_from_file_location("ultralytics_repopt", EXAMPLE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Of a short training on pictures with a bright rectangle of either class."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / part).mkdir(parents=True)
        for number in range(6):
            picture, lines = generator.integers(0, 60, (64, 64, 3), dtype=np.uint8), []
            for label in range(2):
                (x, y), (width, height) = generator.integers(0, 20, 2), generator.integers(30, 44, 2)
                picture[y : y + height, x : x + width, label] = 255
                box = np.array([x + width / 2, y + height / 2, width, height]) / 64
                lines.append(" ".join(map(str, (label, *box))))
            Image.fromarray(picture).save(tmp_path / "images" / part / f"{number}.png")
            (tmp_path / "labels" / part / f"{number}.txt").write_text("\n".join(lines))
    data = {"path": str(tmp_path), "train": "images/train", "val": "images/val", "names": {0: "a", 1: "b"}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    (tmp_path / "tiny.yaml").write_text(TINY)
    return {
        "model": str(tmp_path / "tiny.yaml"),
        "data": str(tmp_path / "data.yaml"),
        "project": str(tmp_path / "runs"),
        "imgsz": 64,
        "epochs": 4,
        "batch": 2,
        "nbs": 4,  # two batches a step, once warm
        "warmup_epochs": 1,
        "mosaic": 0.0,
        "box": 15.0,  # gradients above the bound
        "optimizer": "SGD",
        "device": "cpu",
        "amp": False,
        "plots": False,
    }


def recorded(example, settings, scaler):
    """Train in float64; return the trainer, the network with branches at the start, and what happened."""
    events = []

    class Recording(example.RepOptDetectionTrainer):
        def get_model(self, cfg=None, weights=None, verbose=True):
            plain = super().get_model(cfg, weights, verbose).double()
            branched = example.DetectionTrainer.get_model(self, cfg, weights, verbose)
            self.branched = repopt.convert_model(branched, "hs").double()
            self.branched.load_state_dict(plain.state_dict(), strict=False)
            return plain

        def build_optimizer(self, *args, **kwargs):
            optimizer = super().build_optimizer(*args, **kwargs)
            with torch.no_grad():
                for path, block in repopt.declared_blocks(self.branched):
                    held = optimizer.branches[f"{path}.conv.weight"]
                    for name, value in (held.kernels | held.scales).items():
                        block.values(name).copy_(value)
            self.scaler = torch.amp.GradScaler("cpu", enabled=scaler)
            return optimizer

        def preprocess_batch(self, batch):
            batch = super().preprocess_batch(batch)
            batch["img"] = batch["img"].double()
            events.append(copy.deepcopy(batch))
            return batch

        def optimizer_step(self):
            events.append((copy.deepcopy(hyper_parameters(self.optimizer)), self.scales is None))
            super().optimizer_step()
            events.append(self.optimizer.norm)

        def validate(self):  # which is in float32
            return {}, 0.0

        def final_eval(self):
            pass

    trainer = Recording(overrides=settings, search_epochs=2)
    trainer.train()
    return trainer, events


def hyper_parameters(optimizer):
    keys = ("lr", "momentum", "betas", "weight_decay")
    return [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]


def branched_groups(branched, optimizer):
    """The parameters of a network with branches in the plain one's groups: of each those that decay, and scales."""
    named, blocks = dict(branched.named_parameters()), dict(repopt.declared_blocks(branched))
    for group in optimizer.param_groups:
        decayed, scales = [], []
        for name in group["param_names"]:
            module = blocks.get(name.removesuffix(".conv.weight"))
            if module is None:
                decayed.append(named[name])
                continue
            branches = module.block.branches
            decayed += [module.values(branch.kernel) for branch in branches]
            scales += [module.values(branch.scale) for branch in branches if branch.scale is not None]
        yield {"params": decayed}
        yield {"params": scales}


@pytest.mark.parametrize(
    ("rule", "scaler", "bound"), [("SGD", False, 1e-12), ("SGD", True, 1e-12), ("AdamW", False, 1e-9)]
)
def test_the_path_is_that_of_the_network_with_branches(rule, scaler, bound, example, settings):
    trainer, events = recorded(example, settings | {"optimizer": rule}, scaler)
    assert isinstance(trainer.optimizer, repopt.RepSGD if rule == "SGD" else repopt.BranchOptimizer)
    branched = trainer.branched.train()
    branched.args = trainer.args
    own = {"nesterov": True, "momentum": 0.9} if rule == "SGD" else {}
    optimizer = getattr(torch.optim, rule)([*branched_groups(branched, trainer.optimizer)], lr=1.0, **own)
    scales = [scale for group in optimizer.param_groups[1::2] for scale in group["params"]]
    norms, clipped = [], set()
    for event in events:
        if isinstance(event, dict):
            branched(event)[0].sum().backward()
        elif isinstance(event, tuple):
            hyper, searching = event
            for group, (decayed, rest) in zip(
                hyper, zip(*[iter(optimizer.param_groups)] * 2, strict=True), strict=True
            ):
                decayed |= group
                rest |= group | {"weight_decay": 0.0}
            if not searching:
                for scale in scales:
                    scale.grad = None
            norms.append(torch.nn.utils.clip_grad_norm_(branched.parameters(), 10.0))
            optimizer.step()
            optimizer.zero_grad()
        else:
            assert event == pytest.approx(norms[-1].item(), rel=1e-9)
            clipped.add((searching, bool(event > 10)))
    assert {(True, True), (False, True)} <= clipped
    batches = sum(isinstance(event, dict) for event in events)
    assert len(norms) < batches  # some steps take two
    plain = trainer.model.state_dict()
    expected = {name: value for name, value in branched.state_dict().items() if name in plain}
    for path, block in repopt.declared_blocks(branched):
        expected[f"{path}.conv.weight"] = block.kernel().detach()
    assert expected.keys() == plain.keys()
    for name, value in expected.items():
        assert difference(plain[name], value) < bound, name


def difference(one, other):
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-300))


class InterruptionError(Exception):
    """What ends a run before its time."""


def run_until(trainer, event, epoch):
    """Train until something happens in an epoch."""

    def interrupt(trainer):
        if trainer.epoch == epoch:
            raise InterruptionError

    trainer.add_callback(event, interrupt)
    with pytest.raises(InterruptionError):
        trainer.train()
    return trainer


def contents(trainer):
    return copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()["state"], trainer.scales))


@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
@pytest.mark.parametrize("epoch", [0, 2])  # scales are searched until 2
def test_a_run_goes_on_from_its_checkpoint(rule, epoch, example, settings):
    first = example.RepOptDetectionTrainer(overrides=settings | {"optimizer": rule}, search_epochs=2)
    run_until(first, "on_model_save", epoch)
    kept = []
    second = example.RepOptDetectionTrainer(overrides={"resume": str(first.last)})
    second.add_callback("on_train_start", lambda trainer: kept.append(contents(trainer)))
    second.train()
    torch.testing.assert_close(kept[0], contents(first), rtol=0, atol=0)
    assert second.start_epoch == epoch + 1
    assert second.scales is not None
    assert isinstance(second.optimizer, repopt.RepSGD) == (rule == "SGD")


def test_it_recovers_from_a_loss_that_is_no_number(example, settings):
    models, states = [], []

    def lose(trainer):
        if trainer.epoch == 2 and len(states) == 1:
            trainer.loss = torch.tensor(torch.nan)

    def start(trainer):
        if trainer.epoch == 2:
            models.append(copy.deepcopy(trainer.model.state_dict()))
            states.append(copy.deepcopy(trainer.optimizer.state_dict()["state"]))

    trainer = example.RepOptDetectionTrainer(overrides=settings, search_epochs=2)
    trainer.add_callback("on_train_epoch_start", start)  # the search has ended before
    trainer.add_callback("on_train_epoch_end", lose)
    trainer.train()
    assert len(states) == 2
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    torch.testing.assert_close(models[1], models[0], rtol=0, atol=0)


def test_from_a_yaml_to_an_export(example, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = [f"{key}={settings[key]}" for key in ("batch", "nbs", "project", "device", "amp", "plots", "mosaic")]
    own += ["lr0=0.05", "warmup_epochs=0"]
    path = example.main(["--data", settings["data"], "--imgsz", "64", "--epochs", "6", "--search", "1", *own])
    trained = example.YOLO(path.with_suffix(".pt")).model.eval()
    plain = example.YOLO(path.with_name("plain.pt")).model.eval()
    assert not any(isinstance(module, example.RepConv | example.RepVGGDW) for module in trained.modules())
    assert {type(module).__module__.partition(".")[0] for module in plain.modules()} == {"torch", "ultralytics"}
    images = 100 * torch.rand(1, 3, 64, 64)  # so that features weigh as much as biases
    with torch.no_grad():
        expected, other = trained(images)[0], trained(images.flip(3))[0]
        exported = torch.jit.load(path)(images)
    for part in (slice(4), slice(4, None)):  # boxes, classes
        assert difference(exported[:, part], expected[:, part]) < 1e-5
        assert difference(other[:, part], expected[:, part]) > 1e-4

    tuned = example.RepOptDetectionTrainer(overrides=settings | {"model": str(path.with_suffix(".pt"))})
    run_until(tuned, "on_train_epoch_start", 0)
    torch.testing.assert_close(tuned.model.state_dict(), trained.state_dict(), rtol=0, atol=0)


def test_what_is_refused(example, settings, tmp_path, monkeypatch):
    ultralytics_own = run_until(example.DetectionTrainer(overrides=settings), "on_model_save", 0)
    with pytest.raises(repopt.UserError, match=r"last\.pt holds no branches to go on with"):
        example.RepOptDetectionTrainer(overrides={"resume": str(ultralytics_own.last)}).train()
    with pytest.raises(SystemExit, match=r"MuSGD .* has no rule for scales: set optimizer to SGD"):
        own = [f"{key}={settings[key]}" for key in ("batch", "project", "device", "amp", "plots")]
        example.main(["--model", settings["model"], "--data", settings["data"], "optimizer=MuSGD", *own])
    fused = example.RepConv(4, 4), example.RepVGGDW(4)
    fused[0].fuse_convs()
    fused[1].fuse()
    for block in fused:
        with pytest.raises(repopt.UserError, match=r"'0' .* fused already"):
            repopt.convert_model(nn.Sequential(block), "target")
    monkeypatch.setattr(example.DetectionTrainer, "__init__", lambda trainer: setattr(trainer, "world_size", 2))
    with pytest.raises(repopt.UserError, match="on one device, not on 2"):
        example.RepOptDetectionTrainer()
