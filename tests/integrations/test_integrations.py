"""What the integrations take, and what they refuse in one line."""

import subprocess
import sys
from pathlib import Path

import loops
import pytest
import torch
from test_ecosystem import SGD, batches, loss_of, net, of_form, scales
from torch import nn

import repopt
from repopt.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_accelerate_under_fsdp2(rule, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setenv("PYTHONPATH", ":".join(str(ROOT / part) for part in ("", "tests/integrations", "scripts")))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, Path(__file__).parent / "fsdp2.py", rule], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the same\n")


# ---------------------------------------------------------------------------------------------------------- Lightning


@pytest.fixture
def module():
    lightning = pytest.importorskip("pytorch_lightning")
    from repopt.integrations.lightning import ClipInStep

    class Module(ClipInStep, lightning.LightningModule):
        pass

    return Module()


@pytest.mark.parametrize("form", ["compact", "held"])
def test_lightning_hands_the_bound_over(module, form):
    optimizer = of_form(form, "adamw", net(), lr=0.01)
    module.configure_gradient_clipping(optimizer, None, None)
    assert optimizer.max_norm is None
    module.configure_gradient_clipping(optimizer, 0.5, "norm")
    assert optimizer.max_norm == 0.5


def test_lightning_refuses_what_breaks_the_equivalence(module):
    optimizer = of_form("compact", "sgd", net(), lr=0.01)
    with pytest.raises(UserError, match=r"^gradient_clip_algorithm 'value' breaks the equivalence: clip by the norm$"):
        module.configure_gradient_clipping(optimizer, 0.5, "value")
    with pytest.raises(UserError, match=r"^SGD does not clip within its step: set Lightning's own clip for it$"):
        module.configure_gradient_clipping(torch.optim.SGD(net().parameters()), 0.5)


def test_lightnings_documented_override_under_16_mixed(tmp_path):
    """Gradients are multiplied by the loss scale there: clipping them is refused, where training stood still."""
    lightning = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.plugins.precision import MixedPrecision

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = net().float()

        def training_step(self, batch, _):
            return loss_of(self.model, batch.float())

        def configure_optimizers(self):
            return of_form("compact", "sgd", self.model, **SGD)

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            mults = repopt.grad_mults(self.model, scales(), degree=1)
            repopt.clip_grad_norm_(self.model.named_parameters(), gradient_clip_val, mults)

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=0.05,
        plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(UserError, match=r"^the gradients were clipped while they were multiplied by the loss scale"):
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.stack(batches(2)), batch_size=None))


# --------------------------------------------------------------------------------------------------------------- timm


def test_timm_has_every_rule():
    import timm.optim

    from repopt.integrations.timm import register

    model = net()
    repopt.initialize(model, scales())
    names = register(model)
    assert set(names) == {"repsgd", "repadamw", "repadam", "reprmsprop", "replion"}
    assert set(names) <= set(timm.optim.list_optimizers())
    for name in names:
        own = {"decoupled_weight_decay": True} if name == "repadam" else {}
        optimizer = timm.optim.create_optimizer_v2(model, name, lr=0.01, weight_decay=0.1, scales=scales(), **own)
        assert isinstance(optimizer, repopt.RepOptimizer)
        assert optimizer.grad_mults.keys() == {"first.conv.weight", "second.conv.weight"}
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    assert timm.optim.create_optimizer_v2(model, "repsgd", lr=0.01, scales=scales()).param_groups[0]["nesterov"]


def test_timm_refuses():
    import timm.optim

    from repopt.integrations.timm import register

    model = net()
    register(model)
    with pytest.raises(UserError, match=r"^repsgd needs the scales of a network: register\(model\), and scales=PATH"):
        timm.optim.create_optimizer_v2(model, "repsgd", lr=0.01)
    with pytest.raises(UserError, match=r"^repsgd is registered for another network: register\(model\)$"):
        timm.optim.create_optimizer_v2(net(), "repsgd", lr=0.01, scales=scales())


# ------------------------------------------------------------------------------------------------------------ MMEngine


def test_mmengine_trains_the_rest_by_another_rule():
    pytest.importorskip("mmengine")
    from mmengine.optim import build_optim_wrapper

    import repopt.integrations.mmengine

    searched, _ = loops.start()
    model, other = loops.begun("target"), loops.begun("target")
    for each in (model, other):
        each.neck = nn.Linear(10, 10).double()
    other.load_state_dict(model.state_dict())
    wrapper = build_optim_wrapper(
        model,
        {
            "constructor": "RepOptWrapperConstructor",
            "optimizer": {"type": "sgd"} | loops.SETTINGS,
            "clip_grad": {"max_norm": 0.5, "norm_type": 2},
            "paramwise_cfg": {"scales": searched, "prefix": "net", "others": {"type": "AdamW", "lr": 0.001}},
        },
    )
    assert isinstance(wrapper.optimizer, repopt.JointOptimizer)
    expected = repopt.JointOptimizer(
        {
            "net": repopt.build_optimizer("sgd", other.net, searched, **loops.SETTINGS),
            "others": torch.optim.AdamW(other.neck.parameters(), lr=0.001),
        },
        max_norm=0.5,
    )
    for batch in loops.batches():
        wrapper.update_params(nn.functional.cross_entropy(model.neck(model.net(batch["images"])), batch["labels"]))
        expected.zero_grad()
        nn.functional.cross_entropy(other.neck(other.net(batch["images"])), batch["labels"]).backward()
        expected.step()
    assert wrapper.get_lr()["lr"] == [0.01, 0.01, 0.001]
    for (name, param), value in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(param, value, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"clip_grad": {"clip_value": 1, "type": "value"}},
            "clip_grad: the equivalence is kept by a clip by the 2-norm",
        ),
        ({"clip_grad": {"max_norm": 1, "norm_type": 1}}, "clip_grad: the equivalence is kept by a clip by the 2"),
        ({"paramwise_cfg": {"scale": {}}}, "unknown setting of paramwise_cfg 'scale'; did you mean 'scales'"),
        (
            {"paramwise_cfg": {"scales": {}, "others": {"type": "AdamW"}}},
            "others: there is nothing else in the model than what is under the prefix",
        ),
        ({"paramwise_cfg": None}, "constants that are 'searched' come from a hyper-search: its scales are needed"),
    ],
)
def test_mmengine_refuses(changes, message):
    pytest.importorskip("mmengine")
    from mmengine.optim import build_optim_wrapper

    import repopt.integrations.mmengine  # noqa: F401

    config = {"constructor": "RepOptWrapperConstructor", "optimizer": {"type": "sgd", "lr": 0.1}} | changes
    with pytest.raises(UserError, match=f"^{message}"):
        build_optim_wrapper(net(), config)


# ----------------------------------------------------------------------------------------------------------- DeepSpeed


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"zero_optimization": {"stage": 1}},
            "zero_optimization.stage 1 steps flat partitions, in which kernels cannot",
        ),
        ({"bf16": {"enabled": True}}, "bf16 steps flat master copies of the parameters: take torch_autocast in its"),
        ({"optimizer": {"type": "Adam"}}, "an optimizer in DeepSpeed's config would take the place of the one that is"),
    ],
)
def test_deepspeed_refuses(config, message):
    pytest.importorskip("deepspeed")
    from repopt.integrations.deepspeed import initialize

    model = net()
    with pytest.raises(UserError, match=f"^{message}"):
        initialize(model, of_form("compact", "sgd", model, **SGD), config)


def test_deepspeed_leaves_no_bound_to_an_optimizer_that_has_none():
    pytest.importorskip("deepspeed")
    from repopt.integrations.deepspeed import initialize

    model = net()
    with pytest.raises(UserError, match=r"^SGD does not clip within its step: set DeepSpeed's own clip for it$"):
        initialize(model, torch.optim.SGD(model.parameters()), {"gradient_clipping": 1.0})
