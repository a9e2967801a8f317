"""Trained multi-branch networks as plain ones: the same function, the batch norms of training, and scales."""

import functools
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from test_convert import (
    NETWORKS,
    Full,
    _registrations_for_one_test,  # noqa: F401  a fixture
    branches_of,
    create,
    declaration_of,
    trained_norms,
)
from timm.utils import reparameterize_model
from torch import nn

import repopt
from repopt import UserError, quantization
from repopt.layers import Baseline
from repopt.models.vgg import RepVGGBlock
from repopt.segmentation import create_segmenter

NANO = functools.partial(repopt.create_model, "RepOpt-VGG-nano", num_classes=10)
SE = functools.partial(NANO, se=True)
GHOST = functools.partial(repopt.create_model, "RepOpt-GhostNet-0.5x", num_classes=10)
LK = functools.partial(repopt.create_model, "RepOpt-LK-nano", num_classes=10)
OURS = {
    "vgg": (NANO, "repvgg"),
    "vgg, attention": (SE, "repvgg"),
    "qarepvgg": (NANO, "qarepvgg"),
    "ghost": (GHOST, "rep"),
    "lk": (LK, "rep"),
}
TIMM = ("repvgg_a0", "mobileone_s0", "repghostnet_050")
FAMILIES = (*OURS, *(name for name in NETWORKS if "features" not in name))
SMALL = {"layers": (2, 1, 1, 1), "widths": (0.2, 0.2, 0.2, 0.2)}


def trained(name, dtype=torch.float64):
    """A multi-branch network as after training; some weights of its batch norms are negative, and some 0."""
    if name in OURS:
        of_ours, mode = OURS[name]
        network = of_ours(mode=mode)
    elif name in NETWORKS:
        network = create(name)
    else:
        network = timm.create_model(name, num_classes=10)
    return as_after_training(network).to(dtype)


@torch.no_grad()
def as_after_training(network):
    for norm in trained_norms(network).modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight[0], norm.weight[1] = -norm.weight[0], 0.0
    return network.train()


def images(count=8, size=32, dtype=torch.float64):
    return torch.randn(count, 3, size, size, dtype=dtype)


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def assert_same_function(network, model, x, tolerance=1e-12):
    expected = outputs(network.eval(), x)
    assert expected.std() > 0
    assert (outputs(model.eval(), x) - expected).norm() <= tolerance * expected.norm()


def norm_of(block):
    """The batch norm after the sum of a block's branches."""
    (norm,) = (child for child in block.children() if isinstance(child, nn.BatchNorm2d))
    return norm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", [*OURS, *TIMM])
def test_it_is_the_same_function_in_eval_mode(name, dtype, tolerance):
    network, x = trained(name, dtype), images(dtype=dtype)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    model, _ = repopt.merge_branches(network, x.split(3))
    assert all(module.training for module in [*network.modules(), *model.modules()])
    assert {p.dtype for p in model.parameters()} == {dtype}
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert_same_function(network, model, images(dtype=dtype), tolerance)
    assert_same_function(network, repopt.deploy(model), images(dtype=dtype), tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_target_network_in_all_but_numbers(name):
    network = trained(name)
    target = OURS[name][0](mode="target") if name in OURS else repopt.convert_model(network, "target")
    model, _ = repopt.merge_branches(network, [images()])
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in target.state_dict().items()
    }
    for (path, block), (other, expected) in zip(
        repopt.declared_blocks(model, "target"), repopt.declared_blocks(target, "target"), strict=True
    ):
        assert (path, block.block, block.stride) == (other, expected.block, expected.stride)
        assert type(block) is type(expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_norms_have_the_statistics_that_training_mode_has(name):
    """The new ones; so training mode begins with the same function."""
    network, x = trained(name), images(size=64)
    model, _ = repopt.merge_branches(network, x.split(3))
    expected = outputs(model.eval(), x)
    inputs, kept = {}, {}
    for path, block in repopt.declared_blocks(model):
        norm = norm_of(block).train()
        norm.momentum = None  # statistics of the first batch alone
        norm.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]}))
        kept[path] = norm, norm.running_mean.clone(), norm.running_var.clone()
    torch.testing.assert_close(outputs(model, x), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    for path, (norm, mean, variance) in kept.items():
        count = inputs[norm][:, 0].numel()
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-8, atol=1e-8 * float(mean.abs().max()), msg=path)
        torch.testing.assert_close(norm.running_var * (count - 1) / count, variance, rtol=1e-8, atol=1e-12, msg=path)


def modules_of(block):
    """The convolution (None: an identity) and batch norm of the branches, by name of the kernel."""
    if isinstance(block, Baseline):
        return block.branches()
    return {name: (conv, norm) for name, conv, norm in branches_of(block)}


@pytest.mark.parametrize("name", FAMILIES)
def test_scales_are_those_of_the_batch_norms(name):
    network = trained(name)
    model, scales = repopt.merge_branches(network, [images()])
    assert {scale.device.type for scale in scales.values()} == {"cpu"}
    mults = {degree: repopt.grad_mults(model, repopt.bind(model, scales), degree=degree) for degree in (0, 1)}
    assert mults[0]
    seen = set()
    for path, module in repopt.declared_blocks(model):
        block, modules = module.block, modules_of(network.get_submodule(path))
        shape = block.target.shape
        middle = shape[2] // 2
        expected = {degree: torch.zeros(shape, dtype=torch.float64) for degree in mults}
        for branch in block.branches:
            conv, norm = modules[branch.kernel]
            if norm is None:
                scale = torch.ones(shape[0], dtype=torch.float64)
            else:
                scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
                assert scale[0] != 0 == scale[1]
            key = f"{path}.{branch.searched_name}.weight"
            seen.add(key)
            torch.testing.assert_close(scales[key], scale, rtol=1e-14, atol=0)
            for degree, whole in expected.items():
                if conv is None:
                    for channel in range(shape[0]):
                        whole[channel, channel % shape[1], middle, middle] += 1
                else:
                    reach = conv.kernel_size[0] // 2
                    centre = whole[:, :, middle - reach : middle + reach + 1, middle - reach : middle + reach + 1]
                    centre += scale.abs().pow(1 + degree).view(-1, 1, 1, 1)
        for degree, whole in expected.items():
            found = mults[degree][f"{path}.{block.target.name}.weight"].dense()
            torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)
    assert seen == scales.keys()


@pytest.mark.parametrize("name", ["vgg", "ghost", "mobileone"])
def test_it_trains_on(name):
    network, x, labels = trained(name), images(16), torch.arange(16) % 4
    model, scales = repopt.merge_branches(network, [x])
    optimizer = repopt.build_optimizer("sgd", model.train(), scales, lr=1e-3, momentum=0.9, max_norm=5.0)
    assert isinstance(optimizer, repopt.RepSGD)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_channel_without_variance_works():
    network, x = trained("vgg"), images()
    for path in ("stage0", "stage1.1"):  # without an identity, and with one that still gives it variance
        for conv, _ in network.get_submodule(path).branches().values():
            if conv is not None:
                nn.init.zeros_(conv.weight[2])
    model, scales = repopt.merge_branches(network, x.split(3))
    assert model.stage0.bn.running_var[2] == 0 < model.stage1[1].bn.running_var[2]
    assert_same_function(network, model, images())
    assert_same_function(network, model, torch.ones_like(x))
    optimizer = repopt.build_optimizer("sgd", model.train(), scales, lr=1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["vgg", "qarepvgg", "ghost", "lk", "repvgg"])
def test_settings_of_batch_norms_go_over(name):
    network = trained(name)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps, norm.momentum = 1e-2, 0.03
    model, _ = repopt.merge_branches(network, [images()])
    norms = [norm_of(block) for _, block in repopt.declared_blocks(model)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-2, 0.03)}
    assert_same_function(network, model, images())


def test_parts_of_blocks_are_copies():
    network, x = trained("vgg, attention"), images()
    expected = outputs(network.eval(), x)
    model, _ = repopt.merge_branches(network, [x])
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor += 1
    assert torch.equal(outputs(network, x), expected)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["repopt_vgg_nano", *(name for name in NETWORKS if "features" in name)])
def test_a_backbone(name):
    ours = functools.partial(timm.create_model, mode="repvgg", features_only=True)
    network = as_after_training((create if name in NETWORKS else ours)(name).double()).eval()
    x = images(size=64)
    model, scales = repopt.merge_branches(network, [x])
    for found, expected in zip(outputs(model, x), outputs(network, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert repopt.bind(model, scales)


def test_inside_a_larger_model():
    pytest.importorskip("segmentation_models_pytorch")
    network = as_after_training(create_segmenter("RepOpt-VGG-nano", mode="repvgg", num_classes=4).double())
    model, scales = repopt.merge_branches(network, [images(size=64)])
    assert_same_function(network, model, images(2, size=64))
    alone = repopt.extract_scales(NANO(mode="hs"))
    assert scales.keys() == repopt.bind(model, alone, prefix="encoder.model").scales.keys()


def block_of(channels):
    return RepVGGBlock(channels, channels, stride=1, identity=True, initial_scale=1.0, se=False, sum_norm=False)


def test_a_block_at_two_places():
    shared = block_of(3)
    network = as_after_training(nn.Sequential(shared, nn.MaxPool2d(2), shared).double())
    x = images()
    model, scales = repopt.merge_branches(network, x.split(3))
    assert model[0] is model[2] and len(scales) == 3
    assert_same_function(network, model, x)
    inputs = []
    model[0].bn.register_forward_pre_hook(lambda module, args: inputs.append(args[0].transpose(0, 1).flatten(1)))
    outputs(model, x)
    together = torch.cat(inputs, 1)
    torch.testing.assert_close(model[0].bn.running_mean, together.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[0].bn.running_var, together.var(1, correction=0), rtol=1e-12, atol=1e-12)


def test_a_block_alone_in_a_wrapper():
    network = as_after_training(block_of(3).double())
    model, scales = repopt.merge_branches(torch.compile(network), [images()])
    assert scales.keys() == {"scale_conv.weight", "scale_1x1.weight", "scale_identity.weight"}
    assert_same_function(network, model, images())


@pytest.mark.parametrize("stride", [1, 2])
def test_a_registered_block_with_a_bias_in_a_branch(stride):
    repopt.register_block(Full)(declaration_of)
    network = as_after_training(nn.Sequential(Full(stride)).double())
    model, scales = repopt.merge_branches(network, images().split(3))
    assert_same_function(network, model, images())
    assert len(scales) == 4 - stride


def test_a_declared_batch_norm_that_cannot_be_set():
    repopt.register_block(Full)(functools.partial(declaration_of, bn=nn.BatchNorm2d(4, affine=False)))
    with pytest.raises(UserError, match=r"^the batch norm that is declared for '0' has no weight or no statistics"):
        repopt.merge_branches(nn.Sequential(Full()), [BATCH])


def test_trained_for_int8_with_its_batch_norms():
    network = as_after_training(baseline())
    x = images(16, dtype=torch.float32)
    model, scales = repopt.merge_branches(network, [x])
    observed = quantization.prepare(model, x, "qat", "default")
    assert [*dict(observed.network.named_parameters())] == [*dict(model.named_parameters())]
    with observed.calibrating():  # in float
        found, expected = outputs(observed, x), outputs(network.eval(), x)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    optimizer = repopt.build_optimizer("sgd", observed.train(), scales, lr=1e-3)
    assert len(optimizer.grad_mults) == len(repopt.declared_blocks(model))
    F.cross_entropy(observed(x), torch.arange(16) % 10).backward()
    optimizer.step()


def baseline():
    return NANO(mode="repvgg", **SMALL)


def hooked():
    network = baseline()
    network.stage0.register_forward_hook(lambda *_: None)
    return network


class Unused(nn.Module):
    """One block that runs and one that does not."""

    def __init__(self):
        super().__init__()
        self.one, self.other = block_of(3), block_of(3)

    def forward(self, x):
        return self.one(x)


BATCH = torch.zeros(2, 3, 32, 32)
NO_BRANCHES = "RepOptVGG has no branches with batch norms to merge: this needs a baseline (repvgg, qarepvgg, rep), or "
BATCHES = "images come in batches, tensors (N, C, H, W), and here is one "
REFUSED = {
    "target": (lambda: NANO(mode="target", **SMALL), [BATCH], NO_BRANCHES),
    "search": (lambda: NANO(mode="hs", **SMALL), [BATCH], NO_BRANCHES),
    "folded": (lambda: repopt.deploy(baseline()), [BATCH], NO_BRANCHES),
    "another": (lambda: nn.Conv2d(3, 4, 1), [BATCH], "Conv2d has no branches with batch norms to merge"),
    "timm, folded": (
        lambda: reparameterize_model(timm.create_model("repvgg_a0")),
        [BATCH],
        "cannot convert 'stem' (RepVggBlock): its branches are fused already",
    ),
    "hooks": (hooked, [BATCH], "cannot convert 'stage0' (RepVGGBlock): its forward hooks would be lost"),
    "no images": (baseline, [], "there are no images to take the statistics of batch norms from"),
    "empty batch": (baseline, [BATCH[:0]], BATCHES + "of the shape (0, 3, 32, 32)"),
    "one batch": (baseline, BATCH, BATCHES + "of the shape (3, 32, 32): of a loader of pairs give (images for"),
    "pairs": (baseline, [(BATCH, BATCH)], BATCHES + "a tuple: of a loader of pairs give (images for"),
    "not reached": (Unused, [BATCH], "the images do not reach block 'other', so its batch norm has no statistics"),
    "not finite": (baseline, [BATCH / 0], "block 'stage0' has outputs that are not finite on these images"),
}


@pytest.mark.parametrize(("network", "batches", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(network, batches, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        repopt.merge_branches(network(), batches)
    assert "\n" not in str(error.value)
