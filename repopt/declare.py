"""The prior of branches for networks that nobody made for it: which convolutions are to train as if they had them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence

from torch import fx, nn

from repopt.blocks import DeclaredConv, unwrapped
from repopt.csla import Block, Branch, ConvBranch, IdentityBranch, Target
from repopt.errors import UserError, one_line, unknown

Prior = Callable[[nn.Conv2d], Block | None]


def repvgg_prior(conv: nn.Conv2d) -> Block | None:
    """Return RepVGG's branches for a k x k convolution, k odd and above 1: its own, a 1x1, and an identity.

    The identity is there where it has a place: as many input as output channels, and stride 1. None for others.
    """
    shape = tuple(conv.weight.shape)
    if all(k == 1 for k in shape[2:]) or any(k % 2 == 0 for k in shape[2:]):
        return None
    branches: list[Branch] = [ConvBranch("conv", "scale_conv", size=shape[2:]), ConvBranch("conv_1x1", "scale_1x1")]
    if conv.in_channels == conv.out_channels and all(step == 1 for step in conv.stride):
        branches.append(IdentityBranch("scale_identity"))
    return Block(Target("weight", shape, conv.groups), tuple(branches))


def acnet_prior(conv: nn.Conv2d) -> Block | None:
    """Return ACNet's branches (arXiv 1908.03930) for a k x k convolution, k odd and above 1: it, a 1 x k, a k x 1."""
    shape = tuple(conv.weight.shape)
    height, width = shape[2:]
    if any(k == 1 or k % 2 == 0 for k in (height, width)):
        return None
    sizes = {"conv": (height, width), "conv_wide": (1, width), "conv_high": (height, 1)}
    branches = tuple(ConvBranch(name, f"scale_{name.removeprefix('conv_')}", size=size) for name, size in sizes.items())
    return Block(Target("weight", shape, conv.groups), branches)


PRIORS: Mapping[str, Prior] = {"repvgg": repvgg_prior, "acnet": acnet_prior}


def declare(model: nn.Module, prior: str | Prior = "repvgg", *, names: str | Sequence[str] | None = None) -> list[str]:
    """Say which branches the convolutions of a plain network train with; the network itself stays as it is.

    What takes a model with declared blocks takes it afterwards, in target mode: `hold_branches`, `bind`,
    `extract_scales`, `build_optimizer`. A scale is called ``<path of the convolution>.scale_conv.weight``.

    Args:
        model: a network; what was declared before is declared anew.
        prior: of `PRIORS`, or a function that returns the branches of a convolution, None for none.
        names: paths of the convolutions, with * and ? as in file names; None = those with nothing but a batch norm
            behind them, which takes up what scales do.

    Returns:
        The paths of the convolutions that have branches now.

    Raises:
        UserError: an unknown prior, a pattern without a convolution, a network whose operations cannot be traced, or
            no convolution for which the prior has branches.
    """
    model = unwrapped(model)
    if isinstance(prior, str):
        if prior not in PRIORS:
            raise unknown("prior", prior, PRIORS)
        prior = PRIORS[prior]
    convs = {path: module for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    if names is None:
        convs = {path: convs[path] for path in _before_batch_norms(model)}
    else:
        patterns = [names] if isinstance(names, str) else names
        for pattern in patterns:
            if not fnmatch.filter(convs, pattern):
                raise UserError(f"no convolution of {type(model).__name__} is called {pattern!r}")
        convs = {path: conv for path, conv in convs.items() if any(fnmatch.fnmatch(path, p) for p in patterns)}
    blocks = {path: block for path, conv in convs.items() if (block := prior(conv)) is not None}
    if not blocks:
        raise UserError(f"{type(model).__name__} has no convolution that this prior has branches for")
    for path, block in blocks.items():
        shape = tuple(convs[path].weight.shape)
        if block.target.shape != shape:
            raise UserError(f"the branches of {path!r} add up to {block.target.shape}, not {shape}")
    for module in model.modules():
        DeclaredConv.forget(module)
    for path, block in blocks.items():
        DeclaredConv.mark(convs[path], block)
    return [*blocks]


class _Tracer(fx.Tracer):
    """Looks into all modules but convolutions and batch norms, whoever made those."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.modules.batchnorm._BatchNorm) or super().is_leaf_module(
            m, module_qualified_name
        )


def _before_batch_norms(model: nn.Module) -> list[str]:
    """Return the paths of the convolutions whose output goes to a batch norm alone."""
    modules = dict(model.named_modules())
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever the network's own code raises when it meets a proxy
        raise UserError(
            f"{type(model).__name__} cannot be traced ({one_line(error)}), so its convolutions before batch norms are "
            "not known: say by names=[...] which they are"
        ) from None

    def module_of(node: fx.Node) -> nn.Module | None:
        return modules.get(str(node.target)) if node.op == "call_module" else None

    return [
        str(node.target)
        for node in graph.nodes
        if isinstance(module_of(node), nn.Conv2d)
        and node.users
        and all(isinstance(module_of(user), nn.modules.batchnorm._BatchNorm) for user in node.users)
    ]
