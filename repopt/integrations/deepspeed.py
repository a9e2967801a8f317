"""DeepSpeed: a RepOptimizer in its engine, as far as that leaves parameters and gradients alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from repopt.errors import UserError
from repopt.integrations.clip import hand_over


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any], **settings: Any) -> Any:
    """Return what ``deepspeed.initialize`` returns; the bound of the clip goes from its config to the optimizer.

    Without ``gradient_clipping`` in the config the optimizer keeps its own bound; DeepSpeed by itself would take 1.0.

    Args:
        model: in target mode.
        optimizer: a `repopt.RepOptimizer`, or one that holds branches.
        config: DeepSpeed's, with ZeRO's stage 0, in float32 or under its ``torch_autocast``.
        settings: other arguments of ``deepspeed.initialize``.

    Raises:
        UserError: a config under which DeepSpeed steps flat copies of the parameters, or with an optimizer of its own;
            a bound, and an optimizer that does not clip.
    """
    import deepspeed

    own = dict(config)
    if stage := own.get("zero_optimization", {}).get("stage", 0):
        raise UserError(
            f"zero_optimization.stage {stage} steps flat partitions, in which kernels cannot be told apart: train with "
            "stage 0, or shard by FSDP2's fully_shard"
        )
    for key in ("fp16", "bf16"):
        if own.get(key, {}).get("enabled"):
            raise UserError(f"{key} steps flat master copies of the parameters: take torch_autocast in its place")
    if "optimizer" in own:
        raise UserError("an optimizer in DeepSpeed's config would take the place of the one that is given")
    if max_norm := own.get("gradient_clipping"):
        hand_over(max_norm, optimizer, "DeepSpeed")
    own["gradient_clipping"] = 0.0  # else it clips to 1, unseen
    return deepspeed.initialize(model=model, optimizer=optimizer, config=own, **settings)
