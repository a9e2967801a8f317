"""A declaration is checked against the module that it stands for: it is run."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repopt.convert.declaration import Declaration, Rewrite
from repopt.csla import Block, IdentityBranch
from repopt.errors import UserError, one_line
from repopt.layers import BranchModules, FusedBranches, conv2d_of, fuse_branches

ANOTHER = "it is declared to be another function: "


class _Call(NamedTuple):
    """What a convolution or batch norm took (as it was then), and what it returned."""

    module: Any
    x: Tensor
    value: Tensor
    y: Tensor


class Original(NamedTuple):
    """What a declared module is with its trained branches.

    Attributes:
        fused: returns its branches in eval mode.
        sum_norm: the batch norm after their sum, where there is one.
    """

    fused: Callable[[], FusedBranches]
    sum_norm: nn.BatchNorm2d | None


@torch.no_grad()
def check_declaration(original: nn.Module, declaration: Declaration) -> Original:
    """Refuse a declaration that is another function than its module in eval mode, on random statistics and input.

    Returns:
        What the module's branches are. Which convolutions and batch norms they are is seen by running it.

    Raises:
        UserError: another function, other branches, or a module that does not run.
    """
    module, declaration = copy.deepcopy((original, declaration))
    target = declaration.block.target
    parts = nn.ModuleList([module, declaration.before, declaration.after])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _randomize(parts)
        size = 4 * declaration.stride + declaration.dilation * max(target.shape[2:])
        x = torch.randn(1, _in_channels(declaration), size, size, device="cpu", dtype=torch.float32)
    parts.eval()
    others = {*declaration.before.modules(), *declaration.after.modules()}
    try:
        y, calls = _run(module, x, others)
    except Exception as error:  # whatever a module of others raises
        raise UserError(f"it cannot be run on an input of {tuple(x.shape)}: {one_line(error)}") from error
    u = declaration.before(x.clone())
    branches, sum_norm = ({}, None) if declaration.fuse else _branches(declaration.block, calls, u)
    fused = declaration.fuse(module) if declaration.fuse else fuse_branches(declaration.block, branches)
    kernel = declaration.block.merge(fused.kernels, fused.scales)
    conv = conv2d_of(kernel, fused.bias, declaration.stride, target.groups, declaration.dilation)
    declared = declaration.after((sum_norm or nn.Identity())(conv(u)))
    if declared.shape != y.shape:
        raise UserError(
            f"{ANOTHER}of {tuple(x.shape)} it makes {tuple(y.shape)}, and the "
            f"declaration {tuple(declared.shape)} (its stride?)"
        )
    _check_close(declared, y, "a branch, an identity, or what comes before or after that was forgotten?")
    if declaration.fuse:
        return Original(functools.partial(declaration.fuse, original), None)
    originals: dict[Any, Any] = {part: original.get_submodule(path) for path, part in module.named_modules()}
    modules = {name: (originals.get(conv), originals.get(bn)) for name, (conv, bn) in branches.items()}
    return Original(functools.partial(fuse_branches, declaration.block, modules), originals.get(sum_norm))


@torch.no_grad()
def rewrite_container(module: nn.Module, rewrite: Rewrite) -> None:
    """Rewrite a module in place (`register_container`), where it has branches.

    Raises:
        UserError: it would be another function in eval mode, on random statistics and input.
    """
    original = copy.deepcopy(module)
    if (channels := rewrite(module)) is None:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _randomize(original)
        x = torch.randn(1, channels, 16, 16, device="cpu", dtype=torch.float32)
    rewritten = copy.deepcopy(original.eval())
    rewrite(rewritten)
    outputs = [part.eval()(x.clone()) for part in (rewritten, original)]
    for a, b in zip(*(y if isinstance(y, tuple) else (y,) for y in outputs), strict=True):
        _check_close(a, b, "this release of the library computes something else")


def _check_close(declared: Tensor, y: Tensor, why: str) -> None:
    difference = float((declared - y).norm() / y.norm())
    if not difference < 1e-3:
        raise UserError(
            f"{ANOTHER}on random statistics and input the outputs differ by {difference:.1g} of their norm ({why})"
        )


def _in_channels(declaration: Declaration) -> int:
    """Return how many channels a module takes: those of the first convolution that runs."""
    first = next((m for m in declaration.before.modules() if isinstance(m, nn.Conv2d)), None)
    return first.in_channels if first else declaration.block.target.shape[1] * declaration.block.target.groups


def _randomize(module: nn.Module) -> None:
    """Bring a module to the CPU, in float32, with random statistics, and kernels that are not zero."""
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        module.to_empty(device="cpu")
        for param in module.parameters():
            nn.init.normal_(param, std=0.1)
    module.to("cpu", torch.float32)
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and not part.weight[-1].any():
            nn.init.normal_(part.weight, std=1 / math.sqrt(part.weight[0].numel()))
        elif isinstance(part, nn.BatchNorm2d):
            for tensor, draw in (
                (part.weight, nn.init.uniform_),
                (part.running_var, nn.init.uniform_),
                (part.bias, nn.init.normal_),
                (part.running_mean, nn.init.normal_),
            ):
                if tensor is not None:
                    draw(tensor)
            if part.running_var is not None:
                part.running_var += 0.5
        elif type(part) not in vars(nn).values():  # a layer scale may begin so small that it hides what it multiplies
            for param in part.parameters(recurse=False):
                nn.init.uniform_(param, 0.5, 1.5)


def _run(module: nn.Module, x: Tensor, others: set[nn.Module]) -> tuple[Tensor, list[_Call]]:
    """Run a module; return its output, and the calls of its convolutions and batch norms that are none of `others`."""
    calls: list[_Call] = []
    handles = [
        part.register_forward_hook(lambda part, args, y: calls.append(_Call(part, args[0], args[0].clone(), y)))
        for part in module.modules()
        if isinstance(part, nn.Conv2d | nn.BatchNorm2d) and part not in others
    ]
    y = module(x)
    for handle in handles:
        handle.remove()
    return y, calls


def _branches(block: Block, calls: list[_Call], u: Tensor) -> tuple[BranchModules, nn.BatchNorm2d | None]:
    """Return what was run as the declared branches, and the batch norm after their sum.

    A batch norm belongs to the convolution whose output it takes, or to the identity if it takes the branches' input;
    one that takes something else is that of the sum.
    """
    convs = [call for call in calls if isinstance(call.module, nn.Conv2d)]
    norms = [call for call in calls if isinstance(call.module, nn.BatchNorm2d)]
    found: dict[str, tuple[nn.Conv2d | None, nn.BatchNorm2d | None]] = {}
    for branch in block.branches:
        shape = branch.kernel_shape(block.target)
        if isinstance(branch, IdentityBranch):
            norm = next((call for call in norms if call.value.shape == u.shape and torch.allclose(call.value, u)), None)
            found[branch.kernel] = None, norm and norm.module
            continue
        conv = next((call for call in convs if call.module.weight.shape == shape), None)
        if conv is None:
            raise UserError(f"branch {branch.kernel!r} is declared with a kernel of {shape}, and no such one was run")
        convs.remove(conv)
        norm = next((call for call in norms if call.x is conv.y), None)
        found[branch.kernel] = conv.module, norm and norm.module
    if convs:
        raise UserError(f"its convolution with a kernel of {tuple(convs[0].module.weight.shape)} is not declared")
    rest = [call.module for call in norms if all(call.module is not bn for _, bn in found.values())]
    affine = len(rest) == 1 and rest[0].affine and rest[0].track_running_stats  # in eval mode
    return found, rest[0] if affine else None
