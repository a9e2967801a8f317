"""Branches that an optimizer holds for a plain model: how they begin, and what of them goes to files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repopt.blocks import declared_blocks, trained_kernels, unwrapped
from repopt.csla import Block
from repopt.errors import UserError
from repopt.optim.held import BranchOptimizer, HeldBranches
from repopt.reparam import param_groups
from repopt.scales import IdentityInit, Scales, bind


@torch.no_grad()
def hold_branches(
    model: nn.Module, scales: Scales | None = None, *, identity: IdentityInit = "searched", keep_weights: bool = False
) -> dict[str, HeldBranches]:
    """Return fresh branches for every declared kernel of a plain model, and write the kernels that they add up to.

    Args:
        model: in target mode; changed in place.
        scales: constant scales, from `load_scales`, `extract_scales` or `bind`; None = the scales are searched, from
            the values of the declaration on.
        identity: how identity branches enter where scales are given (`initialize`).
        keep_weights: the model's kernels stay what they are, a block's first kernel of the whole size becomes
            ``W / s``, and the other kernels begin as zeros. Else kernels are drawn, as `initialize` draws them.

    Returns:
        By the names of `nn.Module.named_parameters`, as `BranchOptimizer` takes them; kernels that are not trained
        have none, and blocks that share a kernel share its branches.

    Raises:
        UserError: the model is in another mode; the scales are not those of its blocks; or weights are to be kept in a
            block that has no branch of the whole size, or a scale of 0 there.
    """
    constants = None if scales is None else bind(model, scales)
    held: dict[str, HeldBranches] = {}
    for name, path, module in trained_kernels(model):
        if name in held:
            continue
        block, kernel = module.block, module.kernel()
        given = {} if constants is None else constants.block_scales(path, module)
        start = {b.scale: kernel.new_full(kernel.shape[:1], b.initial) for b in block.branches if b.scale is not None}
        start = {own: given.get(own, initial).to(kernel) for own, initial in start.items()}
        if keep_weights:
            kernels = _split(block, path, kernel, start)
        else:
            kernels = block.init_kernels(given if identity == "searched" else {})
        held[name] = HeldBranches(
            block,
            {own: _parameter(value, kernel) for own, value in kernels.items()},
            {own: _parameter(value, kernel) for own, value in start.items()},
            searched=scales is None,
        )
        if not keep_weights:
            kernel.copy_(held[name].merged())
    return held


@torch.no_grad()
def share_branches(branched: nn.Module, plain: nn.Module) -> dict[str, HeldBranches]:
    """Let a plain model stand for a multi-branch one: they are the same function, and stay it.

    All parameters and buffers of the plain model but its declared kernels become those of the other, whose kernels and
    scales are what is held. So `BranchOptimizer` on the plain model trains the other, too.

    Args:
        branched: in hs mode (the scales are searched) or csla mode (they are constants).
        plain: the same network in target mode, on the same device; changed in place, so an optimizer's groups are made
            of it afterwards.

    Returns:
        By the names of the plain kernels, as `BranchOptimizer` takes them.
    """
    blocks = dict(declared_blocks(branched, "hs", "csla"))
    held = {}
    for name, path, module in trained_kernels(plain):
        other, names = blocks[path], module.block.names()
        held[name] = HeldBranches(
            module.block,
            {kernel: other.values(kernel) for kernel, _ in names},
            {scale: other.values(scale) for _, scale in names if scale is not None},
            searched=other.mode == "hs",
        )
        module.kernel().copy_(held[name].merged())
    for path, module in unwrapped(plain).named_modules():
        for kind in ("_parameters", "_buffers"):
            own = getattr(module, kind)
            for leaf in own:
                if own[leaf] is not None and (f"{path}.{leaf}" if path else leaf) not in held:
                    own[leaf] = getattr(branched.get_submodule(path), kind)[leaf]
    return held


def held_state(optimizer: BranchOptimizer, branched: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a plain rule on the multi-branch network as that of the optimizer that holds its branches.

    Args:
        optimizer: on the plain model that shares its parameters with `branched` (`share_branches`).
        branched: the multi-branch network.
        state_dict: of an optimizer over ``param_groups(branched, ...)``; not copied.

    Raises:
        ValueError, KeyError: the state is of other parameters.
    """
    of_rule: dict[Tensor, Mapping[str, Any]] = {}
    groups = state_dict["param_groups"]
    for group, saved in zip(param_groups(branched, 0.0), groups, strict=True):
        for (_, param), index in zip(group["params"], saved["params"], strict=True):
            of_rule[param] = state_dict["state"].get(index, {})
    return optimizer.pack(of_rule, groups)


def _split(block: Block, path: str, kernel: Tensor, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return kernels that add up to one: the first of its shape takes all of it."""
    first = block.whole_branch()
    if first is None or first.scale is None:
        raise UserError(f"block {path!r} has no branch of the whole size, so its weights cannot be kept")
    scale = scales[first.scale]
    if not scale.all():
        raise UserError(f"block {path!r} has a scale of 0, so its weights cannot be kept")
    zeros = {b.kernel: kernel.new_zeros(b.kernel_shape(block.target)) for b in block.branches}
    return zeros | {first.kernel: kernel / scale.view(-1, *[1] * (kernel.dim() - 1))}


def _parameter(value: Tensor, kernel: Tensor) -> nn.Parameter:
    """Return a copy on the kernel's device, in its memory format and precision, but at least in float32."""
    dtype = torch.promote_types(kernel.dtype, torch.float32)
    value = value.detach().to(kernel.device, dtype, copy=True)
    if value.dim() == kernel.dim() > 3 and not kernel.is_contiguous():
        value = value.contiguous(memory_format=torch.channels_last if kernel.dim() == 4 else torch.channels_last_3d)
    return nn.Parameter(value)
