"""The prior of branches for networks that nobody made for it: which convolutions are to train as if they had them."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import get_args

from torch import fx, nn

from repopt.blocks import DeclaredConv, unwrapped
from repopt.errors import UserError, one_line, unknown
from repopt.priors import PRIORS, Conv, Prior

CONVS = get_args(Conv)


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
    convs = {path: module for path, module in model.named_modules() if isinstance(module, CONVS)}
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
        return isinstance(m, (*CONVS, nn.modules.batchnorm._BatchNorm)) or super().is_leaf_module(
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
        if isinstance(module_of(node), CONVS)
        and node.users
        and all(isinstance(module_of(user), nn.modules.batchnorm._BatchNorm) for user in node.users)
    ]
