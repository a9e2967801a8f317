"""Layers of a network, each with a learning rate of its own: the equivalence holds with one rate per declared block."""

import pytest
import torch
from train_helpers import three_blocks

import repopt
from repopt import declared_blocks
from train.finetuning import parameters_by_layer

RULES = {"sgd": {"momentum": 0.9, "nesterov": True}, "adamw": {"eps": 1e-30}}


def factors_of(model):
    """Half the rate from layer to layer, from the last one back."""
    return {name: 0.5**depth for depth, names in enumerate(reversed(parameters_by_layer(model))) for name in names}


def train(model, optimizer, steps=10):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        images = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
        labels = torch.randint(10, (4,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("held", [False, True])
def test_one_rate_per_block_keeps_the_equivalence(rule, held):
    csla, target = three_blocks("csla"), three_blocks("target")
    generator = torch.Generator().manual_seed(0)
    scales = {name: torch.rand(s.shape, generator=generator) + 0.5 for name, s in repopt.extract_scales(csla).items()}
    target.load_state_dict({n: v for n, v in csla.state_dict().items() if n in target.state_dict()}, strict=False)
    for model in (csla, target):
        torch.manual_seed(0)
        repopt.initialize(model, scales)
    settings = {"lr": 0.05, "weight_decay": 1e-2, **RULES[rule]}
    branches = repopt.hold_branches(target, scales) if held else None
    if held:
        blocks = dict(declared_blocks(csla))
        for path, module in declared_blocks(target):
            name = next(name for name in branches if name.startswith(f"{path}."))
            for own, kernel in branches[name].kernels.items():
                kernel.data.copy_(blocks[path].values(own))
            module.kernel().data.copy_(branches[name].merged())
    multiplied = None if held else scales
    ours = repopt.build_optimizer(
        rule, target, multiplied, branches=branches, lr_factors=factors_of(target), **settings
    )
    assert len({group["lr"] for group in ours.param_groups}) == 4
    plain = repopt.build_optimizer(rule, csla, lr_factors=factors_of(csla), **settings)
    train(target, ours)
    train(csla, plain)
    merged = {path: block.kernel() for path, block in declared_blocks(csla)}
    for path, block in declared_blocks(target):
        assert torch.allclose(block.kernel(), merged[path], rtol=1e-10, atol=1e-12)


def test_a_declared_block_is_one_layer_in_every_mode():
    """With what belongs to it: batch norm, squeeze-and-excitation."""
    for mode in ("hs", "csla", "target"):
        model = repopt.create_model("RepOpt-VGG-nano", mode=mode, se=True)
        found = parameters_by_layer(model)
        assert len(found) == 28 + 1
        assert sorted(name for names in found for name in names) == sorted(dict(model.named_parameters()))
        for (path, _), names in zip(declared_blocks(model), found, strict=False):
            assert all(name.startswith(f"{path}.") for name in names)
        assert found[-1] == ["linear.weight", "linear.bias"]


def test_other_libraries_networks_have_a_layer_for_every_kernel():
    model = repopt.create_model("timm/resnet10t", mode="plain")
    kernels = [name for name, param in model.named_parameters() if param.dim() > 1]
    found = parameters_by_layer(model)
    assert [names[0] for names in found] == kernels
    assert sum(map(len, found)) == len(list(model.parameters()))
