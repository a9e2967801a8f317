"""The prior of branches for networks as they are: the same path as the network that has the branches."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import repopt
from repopt.csla import FunctionBlock
from repopt.priors import PRIORS
from repopt.reparam import param_groups
from train.keys import KEYS

RULES = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "adamw": {"lr": 0.01},
    "adafactor": {"lr": 0.01},
}


class Plain(nn.Module):
    """Three convolutions before batch norms, one of them grouped and one with a stride, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.body_norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, (3, 5), stride=2, padding=(1, 2))
        self.down_norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 3)

    def features(self, x, conv):
        x = torch.relu(self.stem_norm(conv("stem", x)))
        x = torch.relu(self.body_norm(conv("body", x)))
        x = torch.relu(self.down_norm(conv("down", x)))
        return self.head(x).mean((2, 3))

    def forward(self, x):
        return self.features(x, lambda name, x: getattr(self, name)(x))


class Branched(Plain):
    """The same, computed branch by branch from kernels and scales that are parameters of its own."""

    def __init__(self, plain, branches):
        super().__init__()
        self.double().load_state_dict(plain.state_dict())
        self.held = {name.removesuffix(".weight"): held for name, held in copy.deepcopy(branches).items()}
        for path, held in self.held.items():
            del self._modules[path].weight
            for name, tensor in held.trained().items():
                self.register_parameter(f"{path}_{name}", tensor)

    def forward(self, x):
        def conv(path, x):
            module, held, total = getattr(self, path), self.held.get(path), 0
            if held is None:
                return module(x)
            if isinstance(held.block, FunctionBlock):
                kernel = held.block.function(held.kernels)
                return F.conv2d(x, kernel, module.bias, module.stride, module.padding, 1, module.groups)
            for branch in held.block.branches:
                kernel = branch.embed(held.kernels[branch.kernel], held.block.target)
                y = F.conv2d(x, kernel, None, module.stride, module.padding, 1, module.groups)
                total = total + (y if branch.scale is None else y * held.scales[branch.scale].view(-1, 1, 1))
            return total if module.bias is None else total + module.bias.view(-1, 1, 1)

        return self.features(x, conv)


def train(model, optimizer, steps=5):
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        images = torch.randn(6, 3, 12, 12, dtype=torch.float64)
        loss = F.cross_entropy(model(images), torch.arange(6) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def plain(prior="repvgg"):
    torch.manual_seed(0)
    model = Plain().double()
    repopt.declare(model, prior)
    return model


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("prior", sorted(PRIORS.keys() - {"dilated"}))  # which is of larger kernels
def test_it_follows_the_network_that_has_the_branches(prior, rule):
    model = plain(prior)
    branches = repopt.hold_branches(model)
    reference = Branched(model, branches)
    optimizer = repopt.build_optimizer(rule, model, branches=branches, **RULES[rule])
    rule_class, settings = repopt.optim.plain_rule(rule)
    settings = {key: value for key, value in RULES[rule].items() if key in settings or key == "lr"}
    other = rule_class(reference.parameters(), weight_decay=0.0, **settings)
    assert train(model, optimizer) == pytest.approx(train(reference, other), rel=1e-12)
    for path, held in reference.held.items():
        torch.testing.assert_close(getattr(model, path).weight, held.merged(), rtol=1e-10, atol=1e-13)


def test_constants_are_a_compact_repoptimizer():
    """Scales that were searched so train it again, by multipliers alone: the path of held constants."""
    model = plain()
    branches = repopt.hold_branches(model)
    train(model, repopt.build_optimizer("sgd", model, branches=branches, lr=0.1))
    scales = repopt.extract_scales(model, branches)
    assert set(scales) == {
        *("stem.scale_conv.weight", "stem.scale_1x1.weight", "down.scale_conv.weight", "down.scale_1x1.weight"),
        *("body.scale_conv.weight", "body.scale_1x1.weight", "body.scale_identity.weight"),
    }
    held, compact = plain(), plain()
    torch.manual_seed(2)
    constant = repopt.hold_branches(held, scales)
    torch.manual_seed(2)
    repopt.initialize(compact, scales)
    losses = train(held, repopt.build_optimizer("sgd", held, branches=constant, **RULES["sgd"], weight_decay=0.01))
    again = train(compact, repopt.build_optimizer("sgd", compact, scales, **RULES["sgd"], weight_decay=0.01))
    assert losses == pytest.approx(again, rel=1e-10)


def test_weights_of_a_trained_network_stay():
    model = plain()
    before = copy.deepcopy(model.state_dict())
    branches = repopt.hold_branches(model, keep_weights=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not branches["body.weight"].kernels["conv_1x1"].any()


def test_what_is_declared():
    """Convolutions of more than 1 x 1 that go to a batch norm alone; identities where they have a place."""
    model = Plain()
    assert repopt.declare(model) == ["stem", "body", "down"]
    kinds = {path: len(block.block.branches) for path, block in repopt.declared_blocks(model)}
    assert kinds == {"stem": 2, "body": 3, "down": 2}
    assert repopt.declare(model, names="head") == ["head"]
    assert [path for path, _ in repopt.declared_blocks(model)] == ["head"]
    assert repopt.declare(model, names=["s*", "b*"]) == ["stem", "body"]
    assert copy.deepcopy(model).state_dict().keys() == Plain().state_dict().keys()


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (lambda: torchvision.models.vgg11_bn(num_classes=2), 8),
        (lambda: torchvision.models.resnet18(num_classes=2), 17),
        (lambda: timm.create_model("resnet18", num_classes=2), 17),
        (lambda: timm.create_model("mobilenetv2_050", num_classes=2), 18),  # BatchNormAct2d
    ],
)
def test_networks_of_libraries(model, count):
    model = model()
    assert len(repopt.declare(model)) == count
    groups = param_groups(model, 0.1)
    assert sum(len(group["params"]) for group in groups) == len([*model.parameters()])


class Untraceable(Plain):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: repopt.declare(Plain(), "resnet"), "prior 'resnet'"),
        (lambda: repopt.declare(Plain(), names="tail*"), "no convolution of Plain is called 'tail\\*'"),
        (lambda: repopt.declare(Untraceable()), "Untraceable cannot be traced.*say by names="),
        (lambda: repopt.declare(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))), "no convolution that this"),
        (
            lambda: repopt.declare(Plain(), lambda conv: PRIORS["repvgg"](nn.Conv2d(2, 2, 3))),
            "'stem' add up to .* not",
        ),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(repopt.UserError, match=message):
        call()


def test_the_command_line_offers_every_prior():
    assert KEYS["MODEL.PRIOR"].choices == tuple(PRIORS)


def test_names_of_an_untraceable_network_are_enough():
    assert repopt.declare(Untraceable(), names="*") == ["stem", "body", "down", "head"]
