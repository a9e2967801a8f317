"""The two rules over a whole model: every declared block is found by the name of its module, never by position."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from repopt.csla import GradMult
from repopt.errors import UserError, shown, unknown
from repopt.layers import Mode, ModuleWrapper, RepConv2d
from repopt.optim import (
    PLAIN_ONLY,
    RULES,
    WITHOUT_MULTIPLIERS,
    BranchOptimizer,
    HeldBranches,
    Implementation,
    clip_grad_norm_,
    plain_rule,
)

IdentityInit = Literal["searched", "one"]
ScaleSource = Literal["searched", "channel-mean", "initial", "one"]

# Scales are kept in the type that they have; the rules compute in float64 or in the model's own type.
_SCALE_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class BoundScales:
    """Scales that `bind` has matched with a model's declared blocks and validated; both rules follow from them.

    Attributes:
        model: the model itself, not its wrappers.
        scales: (O,) each by name, those of the model's blocks and no others.
    """

    model: nn.Module
    scales: dict[str, Tensor]

    @torch.no_grad()
    def initialize(self, *, identity: IdentityInit = "searched") -> None:
        """Apply the Rule of Initialization to the model, in place; see `repopt.initialize`."""
        for path, module in declared_blocks(self.model, "csla", "target"):
            like = module.kernel()
            values = {name: scale.to(like) for name, scale in self.block_scales(path, module).items()}
            kernels = module.block.init_kernels(values if identity == "searched" else {})
            kernels = {name: kernel.to(like) for name, kernel in kernels.items()}
            if module.mode == "target":
                module.values(module.block.target.name).copy_(module.block.merge(kernels, values))
            else:
                for name, tensor in (values | kernels).items():
                    module.values(name).copy_(tensor)

    def grad_mults(self, degree: int) -> dict[str, GradMult]:
        """Return the multipliers of the Rule of Iteration by parameter name; see `repopt.grad_mults`."""
        mults: dict[str, GradMult] = {}
        for name, path, module in trained_kernels(self.model):
            scales = {own: scale.double() for own, scale in self.block_scales(path, module).items()}
            mult = module.block.grad_mult(scales, degree).to_like(module.kernel())  # rounded once, here
            shared = mults.setdefault(name, mult)
            if any(not torch.equal(a, b) for a, b in zip(shared.tensors(), mult.tensors(), strict=True)):
                raise UserError(
                    f"block {path!r} shares its kernel with {name!r}, but has other scales: one kernel can "
                    "follow one set of branches only"
                )
        return mults

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the model's gradients in place so that those of the equivalent multi-branch network are clipped.

        Args:
            max_norm: bound of the 2-norm over all gradients of that network (`repopt.clip_grad_norm_`).

        Returns:
            The norm before clipping, a scalar tensor; nothing waits for the device.
        """
        return clip_grad_norm_(self.model.named_parameters(), max_norm, self._squares)

    @functools.cached_property
    def _squares(self) -> dict[str, GradMult]:
        return self.grad_mults(degree=1)

    def block_scales(self, path: str, module: RepConv2d) -> dict[str, Tensor]:
        """Return a block's scales by the names of its declaration."""
        return {
            branch.searched_name: self.scales[key_of(path, branch.searched_name)] for branch in module.block.branches
        }


Scales = Mapping[str, Tensor] | BoundScales


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile`, DistributedDataParallel and `ModuleWrapper`, whose names are its own."""
    while isinstance(model, (OptimizedModule, DistributedDataParallel, ModuleWrapper)):
        if isinstance(model, ModuleWrapper):
            model = model.wrapped_module
        else:
            model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model


def declared_blocks(model: nn.Module, *modes: Mode) -> list[tuple[str, RepConv2d]]:
    """Return every declared block of a model, with the path of its module.

    Raises:
        UserError: modes are asked for, and there is no block, or one in another mode.
    """
    found = [(path, module) for path, module in unwrapped(model).named_modules() if isinstance(module, RepConv2d)]
    if modes and not found:
        raise UserError(f"{type(model).__name__} has no declared blocks: this needs one in {' or '.join(modes)} mode")
    for path, module in found:
        if modes and module.mode not in modes:
            raise UserError(f"this needs a model in {' or '.join(modes)} mode, not {module.mode} ({path})")
    return found


def trained_kernels(model: nn.Module) -> Iterator[tuple[str, str, RepConv2d]]:
    """Yield the name of every trained kernel of a model in target mode, with the path of its block, and the block.

    Blocks that share a kernel yield the same name.
    """
    names: dict[Tensor, str] = {param: name for name, param in unwrapped(model).named_parameters()}
    for path, module in declared_blocks(model, "target"):
        if module.kernel().requires_grad:
            yield names[module.kernel()], path, module


def extract_scales(model: nn.Module, branches: Mapping[str, HeldBranches] | None = None) -> dict[str, Tensor]:
    """Return what a hyper-search found, as the scale file stores it: (O,) tensors by name, on the CPU.

    An identity branch is listed too, though what was searched there is a kernel (its constant scale is 1).

    Args:
        model: in hs or csla mode; in target mode if `branches` are given.
        branches: that the model's optimizer holds (`hold_branches`).

    Raises:
        UserError: the model is in another mode.
    """
    if branches is None:
        values = [(path, module.block, module.values) for path, module in declared_blocks(model, "hs", "csla")]
    else:
        values = [(path, module.block, branches[name].values) for name, path, module in trained_kernels(model)]
    return {
        key_of(path, branch.searched_name): values_of(branch.searched_name).detach().cpu().clone()
        for path, block, values_of in values
        for branch in block.branches
    }


def bind(model: nn.Module, scales: Scales | None = None, *, source: ScaleSource = "searched") -> BoundScales:
    """Match scales with the declared blocks of a model and validate them, once for everything that follows from them.

    Entries of other modules are passed over, as a whole hyper-search state dict has them; and those of stages that have
    been emptied, as a feature extractor's are after its last feature.

    Args:
        model: in any mode of declared blocks.
        scales: by name, (O,) each, from `load_scales` or `extract_scales`; None where there was no search. Scales that
            are bound to this model already are not matched again.
        source: which scales are meant (table 4 of the paper): "searched"; "channel-mean", where every channel of a
            branch has the mean of its searched scales; "initial", those at which a hyper-search of the model begins;
            "one".

    Raises:
        UserError: a block without its scales, scales of another shape or type or not finite, or scales of a block that
            the model lacks; another source, one that needs a search where there is none or has no use for one.
    """
    model = unwrapped(model)
    if source not in get_args(ScaleSource):
        raise unknown("source of constants", source, get_args(ScaleSource))
    if source in ("initial", "one"):
        if scales is not None:
            raise UserError(f"constants that are {source!r} come from no search: leave the searched scales out")
        return BoundScales(model, _initial_scales(model, one=source == "one"))
    if scales is None:
        raise UserError(f"constants that are {source!r} come from a hyper-search: its scales are needed")
    if not isinstance(scales, BoundScales):
        scales = BoundScales(model, _matched(model, scales))
    elif scales.model is not model:
        scales = BoundScales(model, _matched(model, scales.scales))
    if source == "searched":
        return scales
    means = {name: s.double().mean().to(s.dtype).expand_as(s).clone() for name, s in scales.scales.items()}
    return BoundScales(model, means)


def _initial_scales(model: nn.Module, *, one: bool) -> dict[str, Tensor]:
    return {
        key_of(path, branch.searched_name): torch.full(module.block.target.shape[:1], 1.0 if one else branch.initial)
        for path, module in declared_blocks(model)
        for branch in module.block.branches
    }


def _matched(model: nn.Module, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those scales that belong to the model's blocks, all of them, after validation."""
    blocks = declared_blocks(model)
    found: dict[str, Tensor] = {}
    for path, module in blocks:
        expected = (module.block.target.shape[0],)
        for branch in module.block.branches:
            key = key_of(path, branch.searched_name)
            if key not in scales:
                raise UserError(f"the scales do not fit the model: block {path!r} needs {key!r}, which is not there")
            shape = tuple(scales[key].shape) if isinstance(scales[key], Tensor) else expected
            if shape != expected:
                raise UserError(
                    f"the scales do not fit the model: block {path!r} expects {key!r} of the shape {expected}, "
                    f"found {shown(shape)}"
                )
            if problem := invalid_reason(scales[key]):
                raise UserError(f"the scales do not fit the model: {key!r} of block {path!r} {problem}")
            found[key] = scales[key]
    endings = {key_of("", branch.searched_name) for _, module in blocks for branch in module.block.branches}
    for key in scales:
        if not isinstance(key, str):
            raise UserError(f"the scales do not fit the model: {shown(key)} is no name of a block's scales")
        if key not in found and any(not _emptied(model, path) for path in _block_paths(key, endings)):
            raise UserError(f"the scales do not fit the model: they hold {shown(key)}, and the model has no such block")
    return found


def _block_paths(key: str, endings: set[str]) -> list[str]:
    """Return the paths of the blocks whose branch a state-dict key would be, given how the keys of branches end."""
    splits = (key.rsplit(".", count) for count in {ending.count(".") + 1 for ending in endings})
    return [path for path, *ending in splits if ".".join(ending) in endings]


def _emptied(model: nn.Module, path: str) -> bool:
    """Return whether a path leads into an empty `nn.Sequential`."""
    module = model
    for part in path.split("."):
        children = dict(module.named_children())
        if part not in children:
            break
        module = children[part]
    return isinstance(module, nn.Sequential) and not len(module)


def invalid_reason(scale: object) -> str | None:
    """Return why something cannot be the scales of one branch ("is of the type int, not a tensor"), or None."""
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


def fit_scales(model: nn.Module, scales: Scales) -> dict[str, Tensor]:
    """Return those scales that belong to the model's blocks, all of them; see `bind`, which raises the same errors."""
    return bind(model, scales).scales


def constant_scales(model: nn.Module, source: ScaleSource, searched: Scales | None = None) -> dict[str, Tensor]:
    """Return the scales of one of the sources that table 4 of the paper compares; see `bind`."""
    return bind(model, searched, source=source).scales


def initialize(model: nn.Module, scales: Scales, *, identity: IdentityInit = "searched") -> None:
    """Draw new kernels, weighted by the searched scales, in place (Rule of Initialization). For new trainings only.

    Under the same seed a csla and a target model come out as the same function.

    Args:
        model: in target mode, where the kernels are merged, or csla mode, where kernels and scales are set.
        scales: from `load_scales`, `extract_scales` or `bind`.
        identity: the identity branch enters with its searched values, or with the 1 that the paper names.

    Raises:
        UserError: the scales are not those of this model; the message names the block.
    """
    declared_blocks(model, "csla", "target")  # refuses another mode before it looks at the scales
    bind(model, scales).initialize(identity=identity)


def grad_mults(model: nn.Module, scales: Scales, *, degree: int) -> dict[str, GradMult]:
    """Return the multiplier of every declared block's gradient, by parameter name (Rule of Iteration).

    Args:
        model: in target mode.
        scales: from `load_scales`, `extract_scales` or `bind`.
        degree: of the update rule: 1 for SGD, 0 for AdamW (``RepSGD.degree``).

    Returns:
        Multipliers by the names of `nn.Module.named_parameters`; kernels that are not trained have none. Blocks that
        share a kernel share its multiplier.

    Raises:
        UserError: the scales are not those of this model, or those of two blocks with one kernel differ; the message
            names the block.
    """
    declared_blocks(model, "target")  # refuses another mode before it looks at the scales
    return bind(model, scales).grad_mults(degree)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups of named parameters: decayed, and not decayed (biases and all else of one dimension).

    One-dimensional kernels of identity branches stand for weights: they are decayed where their declaration says so,
    and always in csla mode, where the equivalence needs it.
    """
    kernels = {
        key_of(path, branch.kernel)
        for path, module in declared_blocks(model)
        for branch in module.block.branches
        if module.mode == "csla" or (module.mode == "hs" and branch.scale is None and branch.decay_in_search)
    }
    decayed: list[tuple[str, nn.Parameter]] = []
    rest: list[tuple[str, nn.Parameter]] = []
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
    branches: Mapping[str, HeldBranches] | None = None,
    max_norm: float | None = None,
    **settings: Any,
) -> torch.optim.Optimizer:
    """Build an optimizer over the model's parameter groups.

    Args:
        name: of the update rule, one of `RULES` ("sgd", "adamw" ...), or without scales of `PLAIN_ONLY` ("muon" ...).
        model: in target mode if scales or branches are given, else any.
        scales: from `load_scales`, `extract_scales` or `bind`: a RepOptimizer, which keeps their multipliers.
        lr: learning rate.
        weight_decay: of the decayed group (`param_groups`).
        implementation: of a RepOptimizer's step (`RepOptimizer`).
        branches: from `hold_branches` or `share_branches`: the rule is on the multi-branch network (`BranchOptimizer`).
        max_norm: to which the gradients of the multi-branch network are clipped, where branches are given.
        settings: hyper-parameters of the rules (momentum, nesterov, betas, eps ...). Those of other rules are passed
            over, so that one set of settings serves every rule.

    Raises:
        UserError: an unknown rule or setting, a value that the rule refuses, or scales that are not this model's.
    """
    if name not in RULES and name not in PLAIN_ONLY:
        raise unknown("optimizer", name, (*RULES, *PLAIN_ONLY))
    if scales is not None and name in WITHOUT_MULTIPLIERS:
        raise UserError(
            f"optimizer {name!r} has no form with multipliers: {WITHOUT_MULTIPLIERS[name]}; with branches that it "
            "holds it is exact (branches=repopt.hold_branches(model, scales))"
        )
    if scales is not None and branches is not None:
        raise UserError("an optimizer multiplies gradients by constants of scales or holds branches, not both")
    known = set().union(*(rule.hyperparameters for rule in RULES.values()))
    for key in settings:
        if key not in known:
            raise unknown("optimizer setting", key, known)
    groups, arguments = param_groups(model, weight_decay), dict[str, Any](lr=lr)
    if scales is not None:
        rule = RULES[name]
        arguments |= {key: value for key, value in settings.items() if key in rule.hyperparameters}
        mults = grad_mults(model, scales, degree=rule.rep.degree)
        return rule.rep(groups, grad_mults=mults, implementation=implementation, **arguments)
    plain, hyperparameters = plain_rule(name)
    arguments |= {key: value for key, value in settings.items() if key in hyperparameters}
    try:
        if branches is not None:
            return BranchOptimizer(groups, plain, branches, max_norm=max_norm, **arguments)
        return plain(groups, **arguments)
    except ValueError as error:
        raise UserError(f"optimizer {name!r}: {error}") from None


def key_of(path: str, name: str) -> str:
    """Return the state-dict key of a declared name in the block at `path`."""
    return f"{path}.{name}.weight" if path else f"{name}.weight"
