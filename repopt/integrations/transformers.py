"""transformers: a Trainer whose rule and clip are those of the multi-branch network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer
from typing_extensions import override

import repopt
from repopt.optim import RULES
from repopt.scales import Scales


class RepOptTrainer(Trainer):
    """A Trainer that trains a plain network by a RepOptimizer, or by one that holds branches.

    Learning rate, weight decay, betas, epsilon and the bound of the clip (``max_grad_norm``, 1.0 by default) are those
    of its `TrainingArguments`.

    Args:
        args: as a Trainer's; the model is in target mode.
        rule: name of the update rule; see `repopt.build_optimizer`.
        scales: as `repopt.bind` takes them; None with branches.
        prefix: where in the model the network is that the scales were searched with.
        branches: from `repopt.hold_branches`, in the place of scales.
        rule_settings: other hyper-parameters of the rule, such as the momentum.
        kwargs: a Trainer's.

    Raises:
        UserError: as `repopt.bind` and `repopt.build_optimizer`.
    """

    def __init__(
        self,
        *args: Any,
        rule: str,
        scales: Scales | None = None,
        prefix: str = "",
        branches: dict[str, repopt.HeldBranches] | None = None,
        rule_settings: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._rule, self._branches, self._rule_settings = rule, branches, rule_settings or {}
        self._scales, self._prefix = scales, prefix

    @override
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if self.optimizer is None and model is not None:
            of_adam = {"betas": (self.args.adam_beta1, self.args.adam_beta2), "eps": self.args.adam_epsilon}
            known = RULES[self._rule].hyperparameters if self._rule in RULES else set()
            settings: dict[str, Any] = {key: value for key, value in of_adam.items() if key in known}
            self.optimizer = repopt.build_optimizer(
                self._rule,
                model,
                None if self._scales is None else repopt.bind(model, self._scales, prefix=self._prefix),
                branches=self._branches,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                max_norm=self.args.max_grad_norm or None,
                **(settings | self._rule_settings),
            )
        return super().create_optimizer(model)

    @override
    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Leave the clip to the step."""

    @override
    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Leave the norm to the step."""

    @override
    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Log the norm of the step that was done."""
        prepared: Any = self.optimizer  # by Accelerate
        norm = getattr(prepared.optimizer, "norm", None)
        super()._maybe_log_save_evaluate(tr_loss, norm, *args, **kwargs)
