"""The trainer for ultralytics: its path is that of the network with branches, and all around it goes on working."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

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
        "mosaic": 0.0,  # large objects
        "optimizer": "SGD",
        "device": "cpu",
        "amp": False,
        "plots": False,
    }


@pytest.fixture
def _in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def recorded(example, settings, scaler):
    """Train in float64; return the trainer, the network with branches at the start, and what happened."""
    events = []

    class Recording(example.RepOptDetectionTrainer):
        def get_model(self, cfg=None, weights=None, verbose=True):
            plain = super().get_model(cfg, weights, verbose)
            self.branched = repopt.convert_model(example.DetectionTrainer.get_model(self, cfg, None, False), "hs")
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
    """The parameters of a network with branches, in the plain network's groups: of each those that decay, and scales."""
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


@pytest.mark.usefixtures("_in_float64")
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
    norms, clipped, searched = [], [], []
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
            searched.append(searching)
        else:
            assert event == pytest.approx(norms[-1].item(), rel=1e-9)
            clipped.append(event > 10)
    print([round(float(n), 2) for n in norms])
    assert any(clipped)
    assert len(set(searched)) == 2
    batches = sum(isinstance(event, dict) for event in events)
    assert len(norms) < batches  # some steps take two
    plain = trainer.model.state_dict()
    expected = {name: value for name, value in branched.state_dict().items() if name in plain}
    for path, block in repopt.declared_blocks(branched):
        expected[f"{path}.conv.weight"] = block.kernel().detach()
    print(len(norms), batches, sum(clipped), max(norms), max(difference(plain[n], v) for n, v in expected.items()))
    assert expected.keys() == plain.keys()
    for name, value in expected.items():
        assert difference(plain[name], value) < bound, name


def difference(one, other):
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-300))


class Interruption(Exception):
    """What ends a run before its time."""


@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
@pytest.mark.parametrize("epoch", [0, 2])  # scales are searched until 2
def test_a_run_goes_on_from_its_checkpoint(rule, epoch, example, settings):
    def contents(trainer):
        return copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()["state"], trainer.scales))

    def interrupt(trainer):
        if trainer.epoch == epoch:
            kept.append(contents(trainer))
            raise Interruption

    kept = []
    first = example.RepOptDetectionTrainer(overrides=settings | {"optimizer": rule}, search_epochs=2)
    first.add_callback("on_model_save", interrupt)
    with pytest.raises(Interruption):
        first.train()
    second = example.RepOptDetectionTrainer(overrides={"resume": str(first.last)})
    second.add_callback("on_train_start", lambda trainer: kept.append(contents(trainer)))
    second.train()
    torch.testing.assert_close(kept[1], kept[0], rtol=0, atol=0)
    assert second.start_epoch == epoch + 1
    assert second.scales is not None
    assert isinstance(second.optimizer, repopt.RepSGD) == (rule == "SGD")
    assert not any(torch.isnan(value).any() for value in second.model.state_dict().values())


def test_from_a_yaml_to_an_export(example, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = [f"{key}={settings[key]}" for key in ("batch", "project", "device", "amp", "plots")]
    path = example.main(["--data", settings["data"], "--imgsz", "64", "--epochs", "2", "--search", "1", *own])
    trained = example.YOLO(path.with_suffix(".pt")).model.eval()
    plain = example.YOLO(path.with_name("plain.pt")).model.eval()
    assert {type(module).__module__.partition(".")[0] for module in plain.modules()} == {"torch", "ultralytics"}
    assert not any(isinstance(module, example.RepConv | example.RepVGGDW) for module in trained.modules())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = trained(images)[0]
        exported = torch.jit.load(path)(images)
        print(expected.abs().max(), (exported - expected).abs().max(), (plain(images)[0] - expected).abs().max())
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-4)


def test_what_is_refused(example, settings, monkeypatch):
    pass
