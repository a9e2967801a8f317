"""Branches that an optimizer holds for a plain model: how they begin, and the multi-branch network that they are of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from repopt.csla import Block
from repopt.errors import UserError, shown
from repopt.layers import RepConv2d
from repopt.optim.held import HeldBranches
from repopt.reparam import Scales, bind, declared_blocks, key_of, unwrapped


@torch.no_grad()
def hold_branches(
    model: nn.Module,
    scales: Scales | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
    keep_weights: bool = False,
) -> dict[str, HeldBranches]:
    """Return branches for every declared kernel of a plain model, and write the kernels that they add up to.

    Args:
        model: in target mode; changed in place.
        scales: constant scales, from `load_scales`, `extract_scales` or `bind`; None = the scales are searched, from
            the values of the declaration on.
        state: the state dict of the same network in hs or csla mode, whose kernels and scales are taken; else the
            kernels are drawn, as `initialize` draws them.
        keep_weights: the model's kernels stay what they are: a block's first kernel of the whole size becomes
            ``W / s``, and the other kernels begin as zeros.

    Returns:
        By the names of `nn.Module.named_parameters`, as `BranchOptimizer` takes them; kernels that are not trained
        have none, and blocks that share a kernel share its branches.

    Raises:
        UserError: the model is in another mode; scales or state are not those of its blocks; or weights are to be kept
            in a block that has no branch of the whole size, or a scale of 0 there.
    """
    if state is not None and keep_weights:
        raise UserError("branches begin with the kernels of a state dict or with the model's weights, not with both")
    constants = None if scales is None else bind(model, scales)
    held: dict[str, HeldBranches] = {}
    for name, path, module in _trained_kernels(model):
        if name in held:
            continue
        block, kernel = module.block, module.kernel()
        given = {} if constants is None else constants.of_block(path, module)
        if state is not None:
            given |= _entries(block, path, state)
        if keep_weights:
            given = _split(block, path, kernel, given) | given
        numbers = {b.scale: given.get(b.scale, kernel.new_full(kernel.shape[:1], b.initial)) for b in block.branches}
        fresh = block.fresh_kernels(given)
        held[name] = HeldBranches(
            block,
            {own: _parameter(given.get(own, drawn), kernel) for own, drawn in fresh.items()},
            {own: _parameter(numbers[own], kernel) for own in numbers if own is not None},
            searched=scales is None,
        )
        if not keep_weights:
            kernel.copy_(held[name].merged())
    return held


@torch.no_grad()
def multi_branch_state_dict(model: nn.Module, branches: Mapping[str, HeldBranches]) -> dict[str, Tensor]:
    """Return the state dict of the multi-branch network (mode hs or csla) that a plain model and its branches are."""
    state = dict(unwrapped(model).state_dict())
    for name, path, module in _trained_kernels(model):
        del state[key_of(path, module.block.target.name)]
        held = branches[name]
        state |= {key_of(path, own): tensor.detach() for own, tensor in (held.kernels | held.scales).items()}
    return state


def _trained_kernels(model: nn.Module) -> Iterator[tuple[str, str, RepConv2d]]:
    """Yield the name of every declared kernel that is trained, with the path of its block, and the block."""
    names: dict[Tensor, str] = {param: name for name, param in unwrapped(model).named_parameters()}
    for path, module in declared_blocks(model, "target"):
        if module.kernel().requires_grad:
            yield names[module.kernel()], path, module


def _entries(block: Block, path: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a block's kernels and scales from a state dict of the multi-branch network."""
    found: dict[str, Tensor] = {}
    for branch in block.branches:
        shapes = {branch.kernel: branch.kernel_shape(block.target)}
        if branch.scale is not None:
            shapes[branch.scale] = block.target.shape[:1]
        for own, shape in shapes.items():
            value = state.get(key_of(path, own))
            if value is None or tuple(value.shape) != shape:
                what = "lacks" if value is None else f"has as {shown(tuple(value.shape))}"
                raise UserError(f"the state is not that of the model's branches: it {what} {key_of(path, own)!r}")
            found[own] = value
    return found


def _split(block: Block, path: str, kernel: Tensor, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return kernels that add up to one: the first of its shape takes all of it."""
    for first in block.branches:
        if first.scale is not None and first.kernel_shape(block.target) == tuple(kernel.shape):
            scale = scales.get(first.scale, kernel.new_full(kernel.shape[:1], first.initial)).to(kernel)
            if not scale.all():
                raise UserError(f"block {path!r} has a scale of 0, so its weights cannot be kept")
            zeros = {b.kernel: kernel.new_zeros(b.kernel_shape(block.target)) for b in block.branches}
            return zeros | {first.kernel: kernel / scale.view(-1, *[1] * (kernel.dim() - 1))}
    raise UserError(f"block {path!r} has no branch of the whole size, so its weights cannot be kept")


def _parameter(value: Tensor, kernel: Tensor) -> nn.Parameter:
    """Return a copy on the kernel's device, in its precision, but at least in float32."""
    dtype = torch.promote_types(kernel.dtype, torch.float32)
    return nn.Parameter(value.detach().to(kernel.device, dtype, copy=True))
