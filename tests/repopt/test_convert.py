"""Converted networks: the declarations compute what timm's blocks do, and the equivalence holds for them."""

import copy
import dataclasses
import functools
import math
import re
from pathlib import Path

import check_equivalency
import pytest
import timm
import torch
from check_equivalency import BOUND, SETTINGS, SIGNS, largest_difference
from timm.models.byobnet import ByoBlockCfg, MobileOneBlock, RepVggBlock
from timm.models.repghost import RepGhostModule
from timm.utils import reparameterize_model
from torch import nn
from train_helpers import run_epoch

import data
import repopt
from repopt import Block, ConvBranch, Declaration, IdentityBranch, Target, UserError
from repopt.convert import declaration
from repopt.convert import model as converting
from repopt.convert.check import check_declaration
from repopt.layers import MODES, batch_norm_as_affine

DOCS = Path(__file__).resolve().parents[2] / "docs" / "converting.md"
SE = {"attn_layer": "se"}


def vgg_cfg(channels, depth=2, **kwargs):
    return ByoBlockCfg(type="rep", d=depth, c=channels, **kwargs)


def one_cfg(channels_in, channels_out, branches=3, **kwargs):
    """A depthwise and a pointwise block."""
    return [
        ByoBlockCfg(type="one", d=1, c=channels_in, gs=1, block_kwargs={"num_conv_branches": branches}, **kwargs),
        ByoBlockCfg(
            type="one",
            d=1,
            c=channels_out,
            gs=0,
            s=1,
            block_kwargs={"kernel_size": 1, "num_conv_branches": branches},
            **kwargs,
        ),
    ]


def one_stage(channels_in, channels_out):
    depthwise, pointwise = one_cfg(channels_in, channels_out)
    first = [copy.deepcopy(depthwise), pointwise]
    again = one_cfg(channels_out, channels_out)
    return [*first, *again]


VGG = {"stem_chs": 8, "blocks": (vgg_cfg(8), vgg_cfg(12, 3), vgg_cfg(16), vgg_cfg(24, 1))}
ONE = {"stem_chs": 8, "blocks": (one_stage(8, 8), one_stage(8, 12), one_stage(12, 16), one_cfg(16, 24))}
NETWORKS = {
    "repvgg": ("repvgg_a0", VGG),
    "repvgg, groups": ("repvgg_b1g4", {**VGG, "blocks": tuple(vgg_cfg(c, gs=4) for c in (8, 16, 16, 32))}),
    "repvgg, attention": ("repvgg_d2se", VGG),
    "repvgg, dilated": ("repvgg_a0", {**VGG, "output_stride": 8}),
    "repvgg, features": ("repvgg_a0", {**VGG, "output_stride": 16, "features_only": True}),
    "mobileone": ("mobileone_s0", ONE),
    "mobileone, one branch": ("mobileone_s1", {**ONE, "blocks": tuple(one_cfg(8, 8, 1) for _ in range(4))}),
    "mobileone, attention": ("mobileone_s4", {**ONE, "blocks": tuple(one_cfg(8, 8, 2, **SE) for _ in range(4))}),
    "mobileone, features": ("mobileone_s0", {**ONE, "features_only": True}),
    "repghost": ("repghostnet_050", {}),
    "repghost, features": ("repghostnet_050", {"features_only": True}),
}
FAMILIES = ["repvgg", "mobileone", "repghost"]
BLOCK_TYPES = (RepVggBlock, MobileOneBlock, RepGhostModule)


@pytest.fixture(autouse=True)
def _registrations_for_one_test(monkeypatch):
    declared = dict(declaration.DECLARE)
    for module in (declaration, converting):
        monkeypatch.setattr(module, "DECLARE", declared)


def create(name):
    """One of `NETWORKS`, in float64, with batch norms as after training."""
    model, options = NETWORKS[name]
    network = timm.create_model(model, **({} if "features_only" in options else {"num_classes": 4}), **options)
    return trained_norms(network.double())


def trained_norms(network):
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
    return network


def images(number=2, size=64):
    return torch.randn(number, 3, size, size, dtype=torch.float64)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@functools.singledispatch
def branches_of(module):
    """Convolution (None for the identity) and batch norm of a timm block's branches, by the name of the kernel."""
    raise NotImplementedError


@branches_of.register
def _(module: RepVggBlock):
    yield "conv", module.conv_kxk.conv, module.conv_kxk.bn
    yield "conv_1x1", module.conv_1x1.conv, module.conv_1x1.bn
    if module.identity is not None:
        yield "scale_identity", None, module.identity


@branches_of.register
def _(module: MobileOneBlock):
    for i, branch in enumerate(module.conv_kxk):
        yield f"conv_{i}", branch.conv, branch.bn
    if module.conv_scale is not None:
        yield "conv_1x1", module.conv_scale.conv, module.conv_scale.bn
    if module.identity is not None:
        yield "scale_identity", None, module.identity


@branches_of.register
def _(module: RepGhostModule):
    yield "cheap_operation.0", *module.cheap_operation
    yield "fusion_scale", None, module.fusion_bn[0]


@torch.no_grad()
def take_over(block, module):
    """A batch norm in eval mode is a scale and a shift: a timm module's, as a declared block's."""
    kernels, scales, shift = {}, {}, 0
    names = {branch.kernel: branch.scale for branch in block.block.branches}
    for name, conv, norm in branches_of(module):
        scale, bias = batch_norm_as_affine(norm)
        shift = shift + bias
        if conv is None:
            kernels[name] = scale
        else:
            kernels[name], scales[names[name]] = conv.weight, scale
    assert kernels.keys() == names.keys()
    if block.mode == "target":
        block.values(block.block.target.name).copy_(block.block.merge(kernels, scales))
    else:
        for name, values in (kernels | scales).items():
            block.values(name).copy_(values)
    block.bn.running_var.fill_(1 - block.bn.eps)
    block.bn.bias.copy_(shift)


@pytest.mark.parametrize("mode", ["csla", "target"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_declarations_compute_what_timm_does(name, mode):
    network = create(name).eval()
    converted, x = repopt.convert_model(network, mode), images()
    blocks = dict(repopt.declared_blocks(converted, mode))
    assert blocks.keys() == {path for path, module in network.named_modules() if isinstance(module, BLOCK_TYPES)}
    for path, block in blocks.items():
        take_over(block, network.get_submodule(path))
    with torch.no_grad():
        assert_same(converted(x), network(x))


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("rule", SETTINGS)
@pytest.mark.parametrize("name", [*FAMILIES, "repvgg, dilated"])
def test_plain_network_follows_the_csla_network(name, rule, signs):
    network = create(name)
    csla, target = (repopt.convert_model(network, mode) for mode in ("csla", "target"))
    assert largest_difference(csla, target, rule, SIGNS[signs], images(4), steps=3) < BOUND


def test_the_script_takes_networks_of_timm():
    assert repopt.extract_scales(check_equivalency.create("timm/repghostnet_050", "csla"))


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_stand_at_the_same_paths_in_all_modes(name):
    network = create(name)
    hs, csla, target = (repopt.convert_model(network, mode) for mode in MODES)
    scales = {key: torch.rand_like(value) + 0.5 for key, value in repopt.extract_scales(hs).items()}
    assert repopt.bind(target, scales).scales.keys() == scales.keys()
    for model in (csla, target):
        torch.manual_seed(1)
        repopt.initialize(model, scales)
    for (path, a), (other, b) in zip(repopt.declared_blocks(csla), repopt.declared_blocks(target), strict=True):
        assert path == other
        assert_same(a.kernel(), b.kernel())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_deployed_is_the_same_function(name, mode):
    converted = trained_norms(repopt.convert_model(create(name), mode)).eval()
    deployed, x = repopt.deploy(converted), images()
    assert not list(repopt.declared_blocks(deployed))
    with torch.no_grad():
        assert_same(deployed(x), converted(x))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_given_network_stays_and_the_rest_is_kept(name):
    network = create(name)
    before = copy.deepcopy(network)
    converted = repopt.convert_model(network, "target")
    with torch.no_grad():
        for tensor in [*converted.parameters(), *converted.buffers()]:
            tensor += 1
    assert str(network) == str(before)
    for (key, a), b in zip(network.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    kept = {
        key
        for path, module in before.named_modules()
        if not list(module.children())
        for key in (f"{path}.{name}" for name in module.state_dict())
        if not any(path.startswith(f"{block}.") for block, m in before.named_modules() if isinstance(m, BLOCK_TYPES))
    }
    assert len(kept) > 1
    for key in kept:
        assert torch.equal(converted.state_dict()[key], before.state_dict()[key] + 1), key


def test_parts_of_a_block_are_kept():
    module = create("repghost").blocks[0][0].ghost1
    converted = repopt.convert_model(module, "hs")
    for key, values in module.primary_conv.state_dict().items():
        assert torch.equal(converted.before.state_dict()[key], values), key
    module = create("repvgg, attention").stages[0][0]
    converted = repopt.convert_model(module, "hs")
    for key, values in module.attn.state_dict().items():
        assert torch.equal(converted.after[0].state_dict()[key], values), key


def test_what_a_module_is_goes_over():
    network = create("repvgg").eval()
    network.stages[0][1].train()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps, norm.momentum = 1e-3, 0.02
    converted = repopt.convert_model(network, "target")
    assert {p.dtype for p in converted.parameters()} == {torch.float64}
    assert not converted.stages[0][0].bn.training and converted.stages[0][1].bn.training
    assert {(m.eps, m.momentum) for m in converted.modules() if isinstance(m, nn.BatchNorm2d)} == {(1e-3, 0.02)}


def test_names_and_first_scales_are_those_of_our_models():
    """Up to the stage's own names, timm's RepVGG-A0 is our RepOpt-VGG-A0."""
    theirs = repopt.extract_scales(repopt.convert_model(timm.create_model("repvgg_a0"), "hs"))
    ours = repopt.extract_scales(repopt.create_model("RepOpt-VGG-A0", mode="hs"))
    for (name, a), (own_name, b) in zip(theirs.items(), ours.items(), strict=True):
        assert name.split(".")[-2:] == own_name.split(".")[-2:]
        torch.testing.assert_close(a, b)


def test_scales_start_by_depth():
    searched = repopt.extract_scales(repopt.convert_model(create("mobileone"), "hs"))
    first = {name.removesuffix(".weight"): value.unique().item() for name, value in searched.items()}
    # stride 2, then wider, then two blocks that keep both
    by_depth = [1, 1, math.sqrt(2), 1]
    for i, scale in enumerate(by_depth):
        assert first[f"stages.1.{i}.scale_conv_0"] == pytest.approx(scale / math.sqrt(3))
    assert first["stages.1.2.scale_1x1"] == pytest.approx(math.sqrt(2))
    assert first["stages.1.2.scale_identity"] == 1
    assert "stages.1.1.scale_1x1" not in first and "stages.1.1.scale_identity" not in first
    searched = repopt.extract_scales(repopt.convert_model(create("repghost"), "hs"))
    numbers = {name: value.unique().item() for name, value in searched.items() if "cheap_operation" in name}
    stage = [value for name, value in numbers.items() if name.startswith("blocks.6.")]
    assert stage == pytest.approx([1.0] + [math.sqrt(2 / i) for i in range(1, 10)])


def test_equal_branches_start_as_one():
    """MobileOne's n kernels of the scale 1 / sqrt(n) have the variance, and the multiplier, of one of the scale 1."""
    converted = repopt.convert_model(create("mobileone"), "hs").stages[1][0]
    assert [b.kernel for b in converted.block.branches] == ["conv_0", "conv_1", "conv_2", "conv_1x1"]
    scales = {b.scale: converted.values(b.scale) for b in converted.block.branches}
    corner = converted.block.grad_mult(scales, 1).dense()[:, :, 0, 0]
    torch.testing.assert_close(corner, torch.ones_like(corner), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "identity", "decayed"), [("repvgg", "scale_identity", 1), ("repghost", "fusion_scale", 0)]
)
def test_identities_decay_in_a_search_as_in_our_models(name, identity, decayed):
    groups = repopt.param_groups(repopt.convert_model(create(name), "hs"), weight_decay=1e-4)
    found = {bool(group["weight_decay"]) for group in groups for key, _ in group["params"] if identity in key}
    assert found == {bool(decayed)}


def fenced_code(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.fixture
def documented():
    """What the document's second example leaves behind."""
    namespace = {}
    exec(fenced_code(DOCS)[1], namespace)
    return namespace


def test_the_documented_block(documented):
    network = trained_norms(documented["network"].double()).eval()
    csla, target = (repopt.convert_model(network, mode) for mode in ("csla", "target"))
    assert len(repopt.extract_scales(documented["model"])) == 6
    x = images(size=16)
    with torch.no_grad():
        for path, block in repopt.declared_blocks(csla):
            shift = 0
            for name in ("square", "row", "column"):
                conv, norm = network.get_submodule(f"{path}.{name}")
                scale, bias = batch_norm_as_affine(norm)
                block.values(name).copy_(conv.weight)
                block.values(f"scale_{name}").copy_(scale)
                shift = shift + bias
            block.bn.running_var.fill_(1 - block.bn.eps)
            block.bn.bias.copy_(shift)
        assert_same(csla(x), network(x))
    for model in (csla.train(), target.train()):
        assert len(list(repopt.declared_blocks(model))) == 2
    assert largest_difference(csla, target, "sgd", 0.5, images(4, 16), steps=10) < BOUND


def test_the_documented_use():
    namespace = {}
    exec(fenced_code(DOCS)[0], namespace)
    assert isinstance(namespace["optimizer"], repopt.RepSGD)
    assert list(repopt.declared_blocks(namespace["model"], "target"))


def test_the_documented_merge():
    namespace = {}
    exec(fenced_code(DOCS)[2], namespace)
    model, network, batches = (namespace[name] for name in ("model", "network", "batches"))
    assert isinstance(namespace["optimizer"], repopt.RepSGD)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(batches[0]), network.eval()(batches[0]), rtol=1e-4, atol=1e-5)


class Small(nn.Module):
    """A 1x1 convolution and, at stride 1, the identity."""

    def __init__(self, before=None, stride=1):
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 3, 1, stride, bias=False), before or nn.Identity()

    def forward(self, x):
        x = self.inner(x)
        return self.conv(x) + x if self.conv.stride == (1, 1) else self.conv(x)


def declare_small(module, kernel="conv"):
    branches = ConvBranch(kernel, "scale"), IdentityBranch("identity")
    branches = branches[: 2 if module.conv.stride == (1, 1) else 1]
    return Declaration(Block(Target(kernel, (3, 3, 1, 1)), branches), module.conv.stride[0], before=module.inner)


def test_a_block_in_a_block_and_a_block_at_two_places():
    repopt.register_block(Small)(declare_small)
    shared = Small(Small())
    converted = repopt.convert_model(nn.Sequential(shared, nn.ReLU(), shared), "hs")
    assert [path for path, _ in repopt.declared_blocks(converted)] == ["0", "0.before"]
    assert converted[0] is converted[2]
    assert converted(torch.randn(2, 3, 5, 5)).shape == (2, 3, 5, 5)


def test_depth_without_a_container():
    repopt.register_block(Small)(declare_small)
    network = nn.ModuleDict({name: Small(stride=stride) for name, stride in zip("abcd", (1, 1, 2, 1), strict=True)})
    searched = repopt.extract_scales(repopt.convert_model(network, "hs"))
    found = [searched[f"{name}.scale.weight"][0].item() for name in "abcd"]
    assert found == pytest.approx([1, math.sqrt(2), 1, math.sqrt(2)])


def test_the_last_registration_counts():
    repopt.register_block(Small)(lambda module: pytest.fail("superseded"))
    repopt.register_block(Small)(declare_small)
    assert repopt.extract_scales(repopt.convert_model(Small(), "hs")).keys() == {"scale.weight", "identity.weight"}


def vgg(**options):
    return timm.create_model("repvgg_a0", **{**VGG, **options})


def even_padding():
    network = vgg()
    network.stages[0][0].conv_kxk.conv.padding = (0, 0)
    return network


def other_stride():
    network = vgg()
    network.stages[0][0].conv_1x1.conv.stride = (1, 1)
    return network


def hooked():
    network = vgg()
    network.stages[0][0].register_forward_hook(lambda *_: None)
    return network


class Derived(RepVggBlock):
    pass


def derived():
    network = vgg()
    network.stages[0][0].__class__ = Derived
    return network


REFUSED = {
    "fused": (lambda: reparameterize_model(vgg()), "'stem' (RepVggBlock): its branches are fused already"),
    "mobileone, fused": (
        lambda: reparameterize_model(timm.create_model("mobileone_s0", **ONE)),
        "'stem' (MobileOneBlock): its branches are fused already",
    ),
    "inference mode": (
        lambda: vgg(blocks=(vgg_cfg(8, block_kwargs={"inference_mode": True}), vgg_cfg(8))),
        "'stages.0.0' (RepVggBlock): its branches are fused already",
    ),
    "ghost, fused": (
        lambda: reparameterize_model(timm.create_model("repghostnet_050")),
        "'blocks.0.0.ghost1' (RepGhostModule): it has no branches",
    ),
    "ghost, none": (
        lambda: timm.create_model("repghostnet_050", reparam=False),
        "'blocks.0.0.ghost1' (RepGhostModule): it has no branches",
    ),
    "drop_path": (lambda: vgg(drop_path_rate=0.1), "'stages.0.1' (RepVggBlock): drop_path drops branches"),
    "drop_path, mobileone": (
        lambda: timm.create_model("mobileone_s0", **ONE, drop_path_rate=0.1),
        "(MobileOneBlock): drop_path drops branches",
    ),
    "drop_block": (lambda: vgg(drop_block_rate=0.1), "its branch 'conv' is not a convolution and a batch norm, and"),
    "norm": (lambda: vgg(norm_layer="groupnorm1"), "'stem' (RepVggBlock): its branch 'conv' is not a convolution"),
    "anti-aliasing": (
        lambda: vgg(aa_layer="avg"),
        "its branch 'conv' is not a convolution and a batch norm, and nothing else",
    ),
    "padding": (even_padding, "'stages.0.0' (RepVggBlock): its branch 'conv' does not keep the size"),
    "stride": (other_stride, "its branches 'conv_1x1' and 'conv' differ in stride or groups"),
    "hooks": (hooked, "'stages.0.0' (RepVggBlock): its forward hooks would be lost"),
    "derived": (derived, "'stages.0.0' (Derived): its type derives from RepVggBlock"),
    "none": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3)),
        "(timm.models.byobnet.MobileOneBlock, timm.models.byobnet.RepVggBlock, timm.models.",
    ),
    "converted already": (lambda: repopt.convert_model(vgg(), "hs"), "ByobNet has no block of a registered type"),
}


@pytest.mark.parametrize(("network", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(network, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        repopt.convert_model(network(), "hs")
    assert "\n" not in str(error.value)


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="unknown mode 'targt'; did you mean 'target'"):
        repopt.convert_model(vgg(), "targt")


def test_refusals_of_a_declaration_name_the_module():
    repopt.register_block(Small)(functools.partial(declare_small, kernel="bn"))
    with pytest.raises(UserError, match=re.escape("cannot convert '0' (Small): 'bn' is no name")):
        repopt.convert_model(nn.Sequential(Small()), "hs")

    @repopt.register_block(Small)
    def _(module):
        raise UserError("not this one")

    with pytest.raises(UserError, match=re.escape("cannot convert Small: not this one")):
        repopt.convert_model(Small(), "hs")


def test_mistakes_of_a_declaration_name_the_module():
    @repopt.register_block(Small)
    def _(module):
        return module.no_such_thing

    with pytest.raises(
        UserError, match=r"cannot convert '0' \(Small\): its declaration raised AttributeError: "
    ) as error:
        repopt.convert_model(nn.Sequential(Small()), "hs")
    assert isinstance(error.value.__cause__, AttributeError)  # with its traceback


@pytest.mark.parametrize("name", ["kernel", "block", "forward", "part.training", "training.part"])
@pytest.mark.parametrize("mode", ["hs", "target"])
def test_names_that_are_taken(name, mode):
    block = Block(
        Target(name if mode == "target" else "conv", (4, 4, 3, 3)), (ConvBranch(name + "1", "scale", size=3),)
    )
    if mode == "hs":
        block = Block(Target("conv", (4, 4, 3, 3)), (ConvBranch(name, "scale", size=3),))
    with pytest.raises(UserError, match=f"{name!r} is no name for a kernel or scale: '[a-z]+' is an attribute of "):
        repopt.layers.RepConv2d(block, mode)


def test_what_a_framework_has_noted_on_a_module_stays():
    network = vgg()
    block = network.stages[0][0]
    block.f, block.out_channels, block.type, block.training, block.kernel = -1, 8, "a method", False, 3
    converted = repopt.convert_model(network, "target").stages[0][0]
    assert (converted.f, converted.out_channels, converted.type, converted.training) == (-1, 8, "a method", False)
    assert converted.kernel().shape == (8, 8, 3, 3)


@pytest.mark.parametrize("mode", ["hs", "target"])
def test_another_default_type(mode):
    torch.set_default_dtype(torch.float64)
    try:
        converted = repopt.convert_model(vgg(), mode)
    finally:
        torch.set_default_dtype(torch.float32)
    assert next(converted.parameters()).dtype is torch.float64


def test_from_a_search_to_a_deployed_network(tmp_path):
    network = vgg(num_classes=10)
    images = data.Classification(data.Source("digits"), image_size=32, num_classes=10)
    loader = data.train_loader(images, batch_size=50, device=torch.device("cpu"))
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
    searched = repopt.convert_model(network, "hs")
    start = repopt.extract_scales(searched)
    optimizer = repopt.build_optimizer("sgd", searched, **settings)
    for _ in range(2):
        run_epoch(searched, loader, optimizer)
    repopt.save_scales(repopt.extract_scales(searched), tmp_path / "scales.pth")
    scales = repopt.load_scales(tmp_path / "scales.pth")
    assert scales.keys() == start.keys()
    assert all(not torch.equal(scales[name], start[name]) for name in scales)

    model = repopt.convert_model(network, "target")
    repopt.initialize(model, scales)
    optimizer = repopt.build_optimizer("sgd", model, scales, **settings)
    losses = []
    for number in range(5):
        loader.set_epoch(number)
        losses.append(run_epoch(model, loader, optimizer))
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.8 * losses[0]

    again = repopt.convert_model(network, "target")
    again.load_state_dict(model.state_dict())
    batch = next(iter(loader))[0]
    with torch.no_grad():
        expected = model.eval()(batch)
        assert torch.equal(again.eval()(batch), expected)
        torch.testing.assert_close(repopt.deploy(model)(batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_run_of_a_converted_network(name):
    """Held branches search as the network with branches does; frozen, they go on as multipliers."""
    network, x, settings = create(name), images(4), {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
    searched, plain = (repopt.convert_model(network, mode) for mode in ("hs", "target"))
    branches = repopt.share_branches(copy.deepcopy(searched), plain)
    optimizer = repopt.build_optimizer("sgd", plain, branches=branches, **settings)
    for model, own in ((searched, repopt.build_optimizer("sgd", searched, **settings)), (plain, optimizer)):
        check_equivalency.train(model, own, x, steps=3)
    assert difference(searched, plain) < BOUND
    optimizer.freeze_scales()
    other, held = copy.deepcopy((plain, optimizer))
    check_equivalency.train(plain, optimizer.collapsed(), x, steps=3)
    check_equivalency.train(other, held, x, steps=3)
    assert difference(other, plain) < BOUND


@torch.no_grad()
def difference(a, b):
    pairs = zip(repopt.declared_blocks(a), repopt.declared_blocks(b), strict=True)
    return max(float((x.kernel() - y.kernel()).norm() / y.kernel().norm()) for (_, x), (_, y) in pairs)


class Full(nn.Module):
    """All that a declaration can forget: something before, three branches at a stride, something after."""

    def __init__(self, stride=1, act=None):
        super().__init__()
        self.before = nn.Conv2d(3, 4, 1)
        self.wide = nn.Sequential(nn.Conv2d(4, 4, 3, stride, 2, dilation=2, bias=False), nn.BatchNorm2d(4, eps=0.1))
        self.narrow = nn.Sequential(nn.Conv2d(4, 4, 1, stride), nn.BatchNorm2d(4))
        self.norm, self.act = nn.BatchNorm2d(4), act or nn.SiLU(inplace=True)

    def forward(self, x):
        x = self.before(x)
        y = self.wide(x) + self.narrow(x)
        return self.act(y + self.norm(x) if self.wide[0].stride == (1, 1) else y)


def declaration_of(module, without=(), **changes):
    stride = module.wide[0].stride[0]
    branches = (ConvBranch("wide", "scale_wide", size=3), ConvBranch("narrow", "scale_narrow"))
    branches += (IdentityBranch("identity"),) * (stride == 1)
    block = Block(Target("conv", (4, 4, 3, 3)), tuple(b for b in branches if b.kernel not in without))
    whole = {"stride": stride, "dilation": 2, "before": module.before, "after": module.act}
    return Declaration(block, **(whole | changes))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_declaration_that_is_right(stride, device):
    repopt.register_block(Full)(declaration_of)
    network = nn.Sequential(Full(stride)).to(device)
    generator = torch.get_rng_state()
    check_declaration(network[0], declaration_of(network[0]))
    assert torch.equal(torch.get_rng_state(), generator)
    assert network[0].wide[1].running_mean.is_meta or not network[0].wide[1].running_mean.any()


OTHER = "it is declared to be another function: "
DIFFER = OTHER + "on random statistics and input the outputs differ by"


@pytest.mark.parametrize(
    ("stride", "forgotten", "message"),
    [
        (2, {"stride": 1}, OTHER + r"of \(1, 3, \d+, \d+\) it makes \(1, 4, .*\(its stride\?\)$"),
        (1, {"dilation": 1}, DIFFER),
        (1, {"after": nn.Identity()}, DIFFER),
        (1, {"after": nn.ReLU()}, DIFFER),
        (1, {"without": ["identity"]}, DIFFER),
        (1, {"without": ["narrow"]}, r"its convolution with a kernel of \(4, 4, 1, 1\) is not declared$"),
        (1, {"before": nn.Conv2d(3, 4, 1)}, "its convolution with a kernel of "),
    ],
)
@pytest.mark.parametrize("mode", ["hs", "csla", "target"])
def test_a_declaration_of_another_function_is_refused(stride, forgotten, message, mode):
    repopt.register_block(Full)(functools.partial(declaration_of, **forgotten))
    with pytest.raises(UserError, match=rf"^cannot convert '1' \(Full\): {message}"):
        repopt.convert_model(nn.Sequential(nn.ReLU(), Full(stride)), mode)


class Normed(Small):
    """With a batch norm after the sum, as QARepVGG's."""

    def __init__(self, **settings):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, **settings)

    def forward(self, x):
        return self.norm(super().forward(x))


def test_a_batch_norm_after_the_sum():
    repopt.register_block(Normed)(declare_small)
    network, x = trained_norms(nn.Sequential(Normed()).double()), images(size=8)
    merged, scales = repopt.merge_branches(network, [images(size=8)])
    with torch.no_grad():
        assert_same(merged.eval()(x), network.eval()(x))
    assert torch.equal(
        scales["0.scale.weight"], torch.ones(3, dtype=torch.float64)
    )  # what the sum is scaled by is not in
    with pytest.raises(UserError, match=DIFFER):
        repopt.convert_model(Normed(track_running_stats=False), "hs")


def test_a_branch_that_is_not_there_is_refused():
    def declare(module):
        block = declaration_of(module).block
        more = ConvBranch("row", "scale_row", size=(1, 3))
        return dataclasses.replace(declaration_of(module), block=Block(block.target, (*block.branches, more)))

    repopt.register_block(Full)(declare)
    message = r"branch 'row' is declared with a kernel of \(4, 4, 1, 3\), and no such one was run$"
    with pytest.raises(UserError, match=message):
        repopt.convert_model(Full(), "hs")


def test_a_module_that_does_not_run_is_refused():
    repopt.register_block(Full)(declaration_of)
    network = Full(act=nn.Linear(5, 5))
    with pytest.raises(
        UserError, match=r"^cannot convert Full: it cannot be run on an input of \(1, 3, 10, 10\): mat1"
    ):
        repopt.convert_model(network, "hs")
