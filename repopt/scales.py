"""Scales: found by a hyper-search, kept in files, matched with a model and validated once (`bind`)."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from repopt import checkpoint
from repopt.blocks import DeclaredBlock, declared_blocks, key_of, trained_kernels, unwrapped
from repopt.csla import Multiplier
from repopt.errors import UserError, shown, unknown
from repopt.optim import HeldBranches, clip_grad_norm_

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

    def grad_mults(self, degree: int) -> dict[str, Multiplier]:
        """Return the multipliers of the Rule of Iteration by parameter name; see `repopt.grad_mults`."""
        mults: dict[str, Multiplier] = {}
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
    def _squares(self) -> dict[str, Multiplier]:
        return self.grad_mults(degree=1)

    def block_scales(self, path: str, module: DeclaredBlock) -> dict[str, Tensor]:
        """Return a block's scales by the names of its declaration."""
        return {
            branch.searched_name: self.scales[key_of(path, branch.searched_name)] for branch in module.block.branches
        }


Scales = Mapping[str, Tensor] | BoundScales | str | os.PathLike[str]


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


def bind(
    model: nn.Module, scales: Scales | None = None, *, source: ScaleSource = "searched", prefix: str = ""
) -> BoundScales:
    """Match scales with the declared blocks of a model and validate them, once for everything that follows from them.

    Entries of other modules are passed over, as a whole hyper-search state dict has them; and those of stages that have
    been emptied, as a feature extractor's are after its last feature.

    Args:
        model: in any mode of declared blocks.
        scales: by name, (O,) each, from `load_scales` or `extract_scales`, or the path of a file (`load_scales`); None
            where there was no search. Scales that are bound to this model already are not matched again.
        source: which scales are meant (table 4 of the paper): "searched"; "channel-mean", where every channel of a
            branch has the mean of its searched scales; "initial", those at which a hyper-search of the model begins;
            "one".
        prefix: where in the model the network is that the scales were searched with: "backbone" of a detector, say.

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
    if not isinstance(scales, BoundScales) or scales.model is not model:
        if isinstance(scales, str | os.PathLike):
            scales = load_scales(scales)
        given = scales.scales if isinstance(scales, BoundScales) else scales
        scales = BoundScales(model, _matched(model, given, prefix))
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


def _matched(model: nn.Module, scales: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return those scales that belong to the model's blocks, all of them, after validation."""
    for key in scales:
        if not isinstance(key, str):
            raise UserError(f"the scales do not fit the model: {shown(key)} is no name of a block's scales")
    scales = {f"{prefix}.{name}": value for name, value in scales.items()} if prefix else scales
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


def load_scales(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return searched scales by name, of a scale file, a hyper-search's checkpoint, or any that keeps its scales.

    From a hyper-search all 1-D floating tensors of its state dict are returned; a model picks its own among them.

    Returns:
        Tensors of the shape (O,), on the CPU, of the type that the file has: float32, float64, float16 or bfloat16.

    Raises:
        UserError: no such file, or none of these; a scale that is of another type or shape, or not finite.
    """
    return scales_of(checkpoint.read(path), path)


def scales_of(content: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the searched scales of what `path` holds; see `load_scales`."""
    kept = kept_scales(content)
    state = checkpoint.state_dict_of(content) if kept is None else checkpoint.state_dict_of({"scales": kept}, "scales")
    if any(value.dim() > 2 for value in state.values()):  # kernels: a whole state dict
        state = {name: value for name, value in state.items() if value.dim() == 1 and value.is_floating_point()}
    if not state:
        raise UserError(f"{os.fspath(path)!r} holds no searched scales")
    for name, value in state.items():
        if problem := invalid_reason(value):
            raise UserError(f"{os.fspath(path)!r} cannot give scales: {shown(name)} {problem}")
    return state


def kept_scales(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the entry with the scales of a target's training, constants or still searched, if there is one."""
    search = content.get("search")
    entries = (content.get("scales"), search.get("scales") if isinstance(search, Mapping) else None)
    return next((entry for entry in entries if isinstance(entry, Mapping) and entry), None)


def save_scales(scales: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a scale file, which the published code reads too."""
    checkpoint.write({name: value.detach().cpu().clone() for name, value in scales.items()}, path)
