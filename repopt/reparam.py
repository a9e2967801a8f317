"""The two rules over a whole model: every declared block is found by the name of its module, never by position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from repopt.csla import GradMult
from repopt.errors import UserError, shown, unknown
from repopt.layers import Around, Mode, RepConv2d
from repopt.optim import PLAIN_ONLY, REFUSED, RULES, Implementation

Scales = Mapping[str, Tensor]
IdentityInit = Literal["searched", "one"]
Constants = Literal["searched", "channel-mean", "initial", "one"]

# Of scales; they are kept as they are, and the rules compute with them in float64 or the model's own type.
_SCALE_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where `torch.compile`, DistributedDataParallel or `Around` is: names are those within."""
    while isinstance(model, (OptimizedModule, DistributedDataParallel, Around)):
        if isinstance(model, Around):
            model = model.around
        else:
            model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model


def declared_blocks(model: nn.Module, *modes: Mode) -> Iterator[tuple[str, RepConv2d]]:
    """Every declared block of a model, with the path of its module.

    Raises:
        UserError: modes are asked for, and there is no block, or one in another mode.
    """
    found = [(path, module) for path, module in unwrapped(model).named_modules() if isinstance(module, RepConv2d)]
    if modes and not found:
        raise UserError(f"{type(model).__name__} has no declared blocks: this needs one in {' or '.join(modes)} mode")
    for path, module in found:
        if modes and module.mode not in modes:
            raise UserError(f"this needs a model in {' or '.join(modes)} mode, not {module.mode} ({path})")
        yield path, module


def extract_scales(model: nn.Module) -> dict[str, Tensor]:
    """What a hyper-search found, as the scale file stores it: (O,) tensors by name, on the CPU.

    An identity branch is listed too, though what was searched there is a kernel (its constant scale is 1).
    """
    return {
        key_of(path, branch.searched): module.values(branch.searched).detach().cpu().clone()
        for path, module in declared_blocks(model, "hs", "csla")
        for branch in module.block.branches
    }


def fit_scales(model: nn.Module, scales: Scales) -> dict[str, Tensor]:
    """Those scales that belong to the model's blocks, all of them; entries of other modules are passed over.

    So are those of stages that have been emptied, as a feature extractor's are after its last feature.

    Args:
        model: in any mode of declared blocks.
        scales: by name, (O,) each; or a whole hyper-search state dict, which has more.

    Raises:
        UserError: a block without its scales, scales of another shape or type or not finite, or scales of a block that
            the model lacks.
    """
    found: dict[str, Tensor] = {}
    endings: set[str] = set()
    for path, module in declared_blocks(model):
        expected = (module.block.target.shape[0],)
        for branch in module.block.branches:
            key = key_of(path, branch.searched)
            endings.add(key_of("", branch.searched))
            if key not in scales:
                raise UserError(f"the scales do not fit the model: block {path!r} needs {key!r}, which is not there")
            shape = tuple(scales[key].shape) if isinstance(scales[key], Tensor) else expected
            if shape != expected:
                raise UserError(
                    f"the scales do not fit the model: block {path!r} expects {key!r} of the shape {expected}, "
                    f"found {shown(shape)}"
                )
            if problem := flaw_of(scales[key]):
                raise UserError(f"the scales do not fit the model: {key!r} of block {path!r} {problem}")
            found[key] = scales[key]
    for key in scales:
        if not isinstance(key, str):
            raise UserError(f"the scales do not fit the model: {shown(key)} is no name of a block's scales")
        if (
            key not in found
            and any(key.endswith(f".{ending}") for ending in endings)
            and not _emptied(unwrapped(model), key)
        ):
            raise UserError(f"the scales do not fit the model: they hold {shown(key)}, and the model has no such block")
    return found


def flaw_of(scale: object) -> str | None:
    """Why something cannot be the scales of one branch ("is no tensor"), or None."""
    if not isinstance(scale, Tensor):
        return f"is of the type {type(scale).__name__}, not a tensor"
    if scale.layout is not torch.strided or scale.is_meta:
        return f"has the layout {scale.layout} on {scale.device.type}, not one of numbers in memory"
    if scale.dtype not in _SCALE_TYPES:
        return f"has the type {scale.dtype}, not one of {', '.join(map(str, _SCALE_TYPES))}"
    if scale.dim() != 1 or not len(scale):
        return f"has the shape {shown(tuple(scale.shape))}, not (O,), one number per output channel"
    if not torch.isfinite(scale).all():
        return "has values that are not finite"
    return None


def constant_scales(model: nn.Module, constants: Constants, searched: Scales | None = None) -> dict[str, Tensor]:
    """The scales that the two rules take, from the sources that table 4 of the paper compares.

    Args:
        model: in any mode of declared blocks.
        constants: "searched"; "channel-mean", where every channel of a branch has the mean of its searched scales;
            "initial", those at which a hyper-search of the model begins; "one".
        searched: from `load_scales` or `extract_scales`; None where there was no search.

    Returns:
        (O,) each by name, as `extract_scales` gives them.

    Raises:
        UserError: another source, one that needs a search where there is none or has no use for one, or scales that
            are not those of this model.
    """
    if constants not in get_args(Constants):
        raise unknown("source of constants", constants, get_args(Constants))
    if constants in ("initial", "one"):
        if searched is not None:
            raise UserError(f"constants that are {constants!r} come from no search: leave the searched scales out")
        return {
            key_of(path, branch.searched): torch.full(
                module.block.target.shape[:1], branch.initial if constants == "initial" else 1.0
            )
            for path, module in declared_blocks(model)
            for branch in module.block.branches
        }
    if searched is None:
        raise UserError(f"constants that are {constants!r} come from a hyper-search: its scales are needed")
    scales = fit_scales(model, searched)
    if constants == "channel-mean":
        return {name: scale.double().mean().to(scale.dtype).expand_as(scale).clone() for name, scale in scales.items()}
    return scales


@torch.no_grad()
def initialize(model: nn.Module, scales: Scales, *, identity: IdentityInit = "searched") -> None:
    """Rule of Initialization, in place: fresh kernels, weighted by the searched scales. For fresh training only.

    Under the same seed a csla and a target model come out as the same function.

    Args:
        model: in target mode, where the kernels are merged, or csla mode, where kernels and scales are set.
        scales: from `load_scales` or `extract_scales`.
        identity: the identity branch enters with its searched values, or with the 1 that the paper names.

    Raises:
        UserError: the scales are not those of this model; the message names the block.
    """
    blocks = list(declared_blocks(model, "csla", "target"))
    scales = fit_scales(model, scales)
    for path, module in blocks:
        like = module.kernel()
        values = {name: tensor.to(like) for name, tensor in _of_block(path, module, scales).items()}
        kernels = module.block.fresh_kernels(values if identity == "searched" else {})
        kernels = {name: kernel.to(like) for name, kernel in kernels.items()}
        if module.mode == "target":
            module.values(module.block.target.name).copy_(module.block.merge(kernels, values))
        else:
            for name, tensor in (values | kernels).items():
                module.values(name).copy_(tensor)


def grad_mults(model: nn.Module, scales: Scales, *, degree: int) -> dict[str, GradMult]:
    """Rule of Iteration: the multiplier of every declared block's gradient, by parameter name.

    Args:
        model: in target mode.
        scales: from `load_scales` or `extract_scales`.
        degree: of the update rule: 1 for SGD, 0 for AdamW (``RepSGD.degree``).

    Returns:
        Multipliers by the names of `nn.Module.named_parameters`; kernels that are not trained have none. Blocks that
        share a kernel share its multiplier.

    Raises:
        UserError: the scales are not those of this model, or those of two blocks with one kernel differ; the message
            names the block.
    """
    blocks = list(declared_blocks(model, "target"))
    scales = {name: scale.double() for name, scale in fit_scales(model, scales).items()}  # rounded once, at the end
    names = {param: name for name, param in unwrapped(model).named_parameters()}
    mults: dict[str, GradMult] = {}
    for path, module in blocks:
        kernel = module.kernel()
        if not kernel.requires_grad:
            continue
        mult = module.block.grad_mult(_of_block(path, module, scales), degree).beside(kernel)
        shared = mults.setdefault(names[kernel], mult)
        if any(not torch.equal(a, b) for a, b in zip(shared.tensors(), mult.tensors(), strict=True)):
            raise UserError(
                f"block {path!r} shares its kernel with {names[kernel]!r}, but has other scales: one kernel can follow "
                "one set of branches only"
            )
    return mults


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of named parameters: decayed, and not decayed (biases and everything else of one dimension).

    One-dimensional kernels of identity branches stand for weights: they are decayed where their declaration says so,
    and always in csla mode, where the equivalence needs it.
    """
    kernels = {
        key_of(path, branch.kernel)
        for path, module in declared_blocks(model)
        for branch in module.block.branches
        if module.mode == "csla" or (module.mode == "hs" and branch.scale is None and branch.decay_in_search)
    }
    decayed, rest = [], []
    for name, param in unwrapped(model).named_parameters():
        if param.requires_grad:
            (decayed if param.dim() > 1 or name in kernels else rest).append((name, param))
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def build_optimizer(
    name: str,
    model: nn.Module,
    scales: Scales | None = None,
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    implementation: Implementation = "auto",
    **settings: Any,
) -> torch.optim.Optimizer:
    """An optimizer over the model's parameter groups: a RepOptimizer where scales are given, else the plain rule.

    Args:
        name: of the update rule, one of `RULES`: "sgd", "adamw" ...; without scales one of `PLAIN_ONLY`, too.
        model: in target mode if scales are given, else any.
        scales: from `load_scales` or `extract_scales`.
        lr: learning rate.
        weight_decay: of the decayed group (`param_groups`).
        implementation: of a RepOptimizer's step (`RepOptimizer`).
        settings: hyper-parameters of the rules (momentum, nesterov, betas, eps ...). Those of other rules are passed
            over, so that one set of settings serves every rule.

    Raises:
        UserError: an unknown rule or setting, a value that the rule refuses, or scales that are not this model's.
    """
    if scales is None and name in PLAIN_ONLY:
        return PLAIN_ONLY[name](param_groups(model, weight_decay), lr=lr)
    if scales is not None and name in REFUSED:
        raise UserError(f"optimizer {name!r} cannot be re-parameterized: {REFUSED[name]}")
    if name not in RULES:
        raise unknown("optimizer", name, (*RULES, *PLAIN_ONLY))
    rule, known = RULES[name], set().union(*(rule.hyperparameters for rule in RULES.values()))
    for key in settings:
        if key not in known:
            raise unknown("optimizer setting", key, known)
    arguments = {"lr": lr} | {key: value for key, value in settings.items() if key in rule.hyperparameters}
    groups = param_groups(model, weight_decay)
    if scales is not None:
        mults = grad_mults(model, scales, degree=rule.rep.degree)
        return rule.rep(groups, grad_mults=mults, implementation=implementation, **arguments)
    try:
        return rule.plain(groups, **arguments)
    except ValueError as error:
        raise UserError(f"optimizer {name!r}: {error}") from None


def key_of(path: str, name: str) -> str:
    """The state-dict key of a declared name in the block at `path`."""
    return f"{path}.{name}.weight" if path else f"{name}.weight"


def _emptied(model: nn.Module, name: str) -> bool:
    """Whether a dotted name leads into an empty `nn.Sequential`."""
    module = model
    for part in name.split("."):
        children = dict(module.named_children())
        if part not in children:
            break
        module = children[part]
    return isinstance(module, nn.Sequential) and not len(module)


def _of_block(path: str, module: RepConv2d, scales: Scales) -> dict[str, Tensor]:
    """A block's scales by the names of its declaration."""
    return {branch.searched: scales[key_of(path, branch.searched)] for branch in module.block.branches}
