"""Trained multi-branch networks as plain ones that train on: branches are merged, and batch norms kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from repopt.blocks import DeclaredBlock, declared_blocks, key_of, unwrapped
from repopt.convert.declaration import registered_types
from repopt.convert.model import Depth, check_complete, convert_block, replace_modules
from repopt.errors import UserError
from repopt.layers import Baseline, FusedBranches, RepConv2d, batch_norm_as_affine, fuse_branches


class PlainNetwork(NamedTuple):
    """What `merge_branches` makes of a trained multi-branch network.

    Attributes:
        model: in target mode; in eval mode the same function.
        scales: (O,) each by name, on the CPU, as `bind` takes them.
    """

    model: nn.Module
    scales: dict[str, Tensor]


@torch.no_grad()
def merge_branches(network: nn.Module, images: Iterable[Tensor]) -> PlainNetwork:
    """Return a trained multi-branch network as a plain one that can be trained on, and the scales for it.

    In eval mode the batch norm of a branch is a scale s_k = weight / sqrt(running_var + eps) and a shift, so a block is
    one convolution with the kernel ``sum_k s_k E_k(w_k)`` and a bias. `deploy` leaves it at that. Here a batch norm
    follows the convolution instead of the bias: it has the statistics of the convolution's outputs on the images, and
    the weight and bias with which it adds the block's bias in eval mode, and nothing else but a batch norm that stood
    after the sum of the branches (QARepVGG's). So training mode, which takes those statistics from the batch, begins
    with the same function, up to what batches differ from all images.

    The scales are the s_k, by the names that `bind` takes; multipliers are made of |s_k|^(1+d), so the sign of a batch
    norm's weight does not matter to them, and a branch whose weight is 0 has no share. An identity's constant scale is
    1, as in a search, and its s_k is listed as its kernel.

    Args:
        network: trained, with batch norms in the branches of its blocks: a baseline of ours ("repvgg", "qarepvgg",
            "rep"), a network with blocks of registered types (`register_block`; those that timm folds are), or a larger
            one that holds such a network. It stays as it is; what is no such block is copied with its weights, batch
            norms and their statistics among them.
        images: training images as training sees them, in batches (N, C, H, W); they are gone through once, and moved
            to the network's device.

    Raises:
        UserError: there is no such block, or one that `convert_model` refuses or that would keep its branches; there
            are no images, or not in batches; they do not reach a block, or its outputs are not finite.
    """
    merged: dict[DeclaredBlock, tuple[nn.BatchNorm2d, FusedBranches, nn.BatchNorm2d | None]] = {}

    def merge(module: nn.Module, path: str, depth: Depth) -> nn.Module:
        block: RepConv2d
        if isinstance(module, Baseline):
            (block, bn), sum_norm = module.as_target(), module.sum_norm()
            fused = fuse_branches(block.block, module.branches())
        elif (converted := convert_block(module, path, "target", depth)) is not None:
            block, bn = converted.block, converted.block.bn
            fused, sum_norm = converted.original.fused(), converted.original.sum_norm
            if not (bn.affine and bn.track_running_stats):
                raise UserError(
                    f"the batch norm that is declared for {path!r} has no weight or no statistics to be set"
                )
        else:
            return module
        merged[block] = bn, fused, sum_norm
        return block

    model = replace_modules(unwrapped(network), merge)
    if not merged:
        raise UserError(
            f"{type(network).__name__} has no branches with batch norms to merge: this needs a baseline (repvgg, "
            f"qarepvgg, rep), or a network with blocks of a registered type ({registered_types()})"
        )
    check_complete(model)
    blocks = [(path, block, *merged[block]) for path, block in declared_blocks(model) if block in merged]
    for _, block, bn, (kernels, scales, bias), sum_norm in blocks:
        block.kernel().copy_(block.block.merge(kernels, scales))
        _set_batch_norm(bn, torch.zeros_like(bias), torch.ones_like(bias), bias, sum_norm)
    # The function does not depend on the statistics, so all of them are found at once.
    statistics = _observe(model, [bn for bn, *_ in merged.values()], images)
    found: dict[str, Tensor] = {}
    for path, block, bn, (kernels, scales, bias), sum_norm in blocks:
        outputs = statistics[bn]
        if not outputs.count:
            raise UserError(f"the images do not reach block {path!r}, so its batch norm has no statistics")
        if not outputs.variance.isfinite().all():
            raise UserError(f"block {path!r} has outputs that are not finite on these images")
        _set_batch_norm(bn, outputs.mean, outputs.variance, bias, sum_norm)
        values = {**kernels, **scales}
        for branch in block.block.branches:
            found[key_of(path, branch.searched_name)] = values[branch.searched_name].detach().cpu().clone()
    return PlainNetwork(model, found)


def _set_batch_norm(
    bn: nn.BatchNorm2d, mean: Tensor, variance: Tensor, shift: Tensor, then: nn.BatchNorm2d | None
) -> None:
    """Give a batch norm statistics, and the weight and bias with which in eval mode it adds a shift, (C,) each.

    Where another one is to follow, it does in eval mode what both do.
    """
    assert bn.running_mean is not None and bn.running_var is not None, "a batch norm without statistics"
    bn.running_mean.copy_(mean)
    bn.running_var.copy_(variance)
    weight, bias = (bn.running_var.double() + bn.eps).sqrt(), shift.double() + bn.running_mean
    if then is not None:
        factor, more = batch_norm_as_affine(then)
        weight, bias = factor * weight, factor * bias + more
    bn.weight.copy_(weight)
    bn.bias.copy_(bias)


class _Statistics:
    """How many numbers every channel has in a batch norm's inputs, and their mean and variance, (C,) in float64.

    The variance is that of the numbers themselves, by which training mode divides.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.variance = 0, torch.zeros(()), torch.zeros(())

    def add(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Take in a batch norm's input, as a forward pre-hook."""
        x = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))
        variance, mean = (value.double() for value in torch.var_mean(x, (0, 2, 3), correction=0))
        count = x[:, 0].numel()
        self.count += count
        share, difference = count / self.count, mean - self.mean
        self.mean = self.mean + share * difference
        between = (1 - share) * difference.square()
        self.variance = self.variance + share * (variance - self.variance + between)


def _observe(model: nn.Module, norms: Iterable[nn.Module], images: Iterable[Tensor]) -> dict[nn.Module, _Statistics]:
    """Run a model in eval mode on all images; return the statistics of the inputs of its batch norms."""
    found = {norm: _Statistics() for norm in norms}
    handles = [norm.register_forward_pre_hook(statistics.add) for norm, statistics in found.items()]
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    model.eval()
    batches = 0
    for batch in images:
        if not isinstance(batch, Tensor) or batch.dim() != 4 or not len(batch):
            kind = f"of the shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
            raise UserError(
                f"images come in batches, tensors (N, C, H, W), and here is one {kind}: of a loader of pairs give "
                "(images for images, _ in loader), of a single batch [images]"
            )
        model(batch.to(device))
        batches += 1
    if not batches:
        raise UserError("there are no images to take the statistics of batch norms from")
    for handle in handles:
        handle.remove()
    for module, mode in training.items():
        module.training = mode
    return found
