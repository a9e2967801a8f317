"""MMEngine: an optimizer wrapper whose optimizer is that of the multi-branch network."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

import repopt
from repopt.blocks import unwrapped
from repopt.errors import UserError, unknown


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class RepOptWrapperConstructor:
    """Builds the wrapper of a RepOptimizer from the settings of a config::

        custom_imports = dict(imports=["repopt.integrations.mmengine"])
        optim_wrapper = dict(
            constructor="RepOptWrapperConstructor",
            optimizer=dict(type="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4),
            clip_grad=dict(max_norm=35),
            paramwise_cfg=dict(scales="scales.pth", prefix="backbone", others=dict(type="AdamW", lr=1e-4)),
        )

    The optimizer's type is the name of an update rule (`repopt.build_optimizer`). It clips within its step, by the norm
    of all gradients of the multi-branch network.

    Args:
        optim_wrapper_cfg: of any wrapper, `AmpOptimWrapper` too.
        paramwise_cfg: ``scales`` (see `repopt.bind`); ``prefix``, where in the model the network is that they were
            searched with; ``others``, the optimizer of all that is not under the prefix (default: the rule); ``held``,
            whether the branches are held, as every rule can have them.

    Raises:
        UserError: another setting, no scales, or a clip by something else than the 2-norm.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        self._wrapper = dict(optim_wrapper_cfg)
        self._rule: dict[str, Any] = dict(self._wrapper.pop("optimizer"))
        clip: dict[str, Any] = dict(self._wrapper.pop("clip_grad", None) or {})
        self._max_norm: float | None = clip.pop("max_norm", None)
        if clip.pop("type", "norm") != "norm" or clip.pop("norm_type", 2) != 2:
            raise UserError("clip_grad: the equivalence is kept by a clip by the 2-norm alone: dict(max_norm=...)")
        own = dict(paramwise_cfg or {})
        self._scales, self._prefix = own.pop("scales", None), own.pop("prefix", "")
        self._others: dict[str, Any] | None = own.pop("others", None)
        self._held: bool = own.pop("held", False)
        for key in own:
            raise unknown("setting of paramwise_cfg", key, ("scales", "prefix", "others", "held"))

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Return the wrapper of the optimizer of a model."""
        model = unwrapped(model)
        if self._others is None:
            optimizer = self._by_rule(model, repopt.bind(model, self._scales, prefix=self._prefix), self._max_norm)
        else:
            inner = model.get_submodule(self._prefix)
            own = {*inner.parameters()}
            rest = [param for param in model.parameters() if param.requires_grad and param not in own]
            if not rest:
                raise UserError("others: there is nothing else in the model than what is under the prefix")
            optimizers = {
                self._prefix: self._by_rule(inner, repopt.bind(inner, self._scales), None),
                "others": OPTIMIZERS.build(self._others | {"params": rest}),
            }
            optimizer = repopt.JointOptimizer(optimizers, max_norm=self._max_norm)
        return OPTIM_WRAPPERS.build({"type": "OptimWrapper"} | self._wrapper, default_args={"optimizer": optimizer})

    def _by_rule(self, model: nn.Module, scales: repopt.BoundScales, max_norm: float | None) -> torch.optim.Optimizer:
        settings = self._rule | {"max_norm": max_norm}
        if self._held:
            branches = repopt.hold_branches(model, scales, keep_weights=True)
            return repopt.build_optimizer(settings.pop("type"), model, branches=branches, **settings)
        return repopt.build_optimizer(settings.pop("type"), model, scales, **settings)
