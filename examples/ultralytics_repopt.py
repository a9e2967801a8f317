"""Train a detector of ultralytics (AGPL-3.0) whose RepConv and RepVGGDW blocks are plain from the first step on.

    python examples/ultralytics_repopt.py --data coco8.yaml --epochs 100 --search 10 batch=16 lr0=0.01
    python examples/ultralytics_repopt.py --resume runs/detect/train/weights/last.pt

The optimizer holds the branches of the blocks and searches their scales in the first epochs; then they are constants.
What is trained, exported and deployed has one convolution in the place of each block.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override
from ultralytics import YOLO
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.modules.block import RepVGGDW
from ultralytics.nn.modules.conv import Conv, RepConv
from ultralytics.optim import MuSGD
from ultralytics.utils.torch_utils import unwrap_model

import repopt
from repopt import Block, ConvBranch, Declaration, IdentityBranch, Target, UserError

MAX_NORM = 10.0  # to which ultralytics clips gradients
MODEL = """\
nc: 80
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 2, RepConv, [32, 32, 3, 1, 1, 1, 1, True, True]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 4, RepConv, [64, 64, 3, 1, 1, 1, 1, True, True]] # 4, stride 8
  - [-1, 1, Conv, [128, 3, 2]]
  - [-1, 4, RepConv, [128, 128, 3, 1, 1, 2, 1, True, True]] # 6, stride 16
  - [-1, 1, Conv, [256, 3, 2]]
  - [-1, 1, C2fCIB, [256, True, True]] # 8, stride 32
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 6], 1, Concat, [1]]
  - [-1, 2, RepC3, [128]] # 11
  - [[4, 11, 8], 1, Detect, [nc]]
"""


@repopt.register_block(RepConv)
def declare_rep_conv(block: RepConv) -> Declaration:
    """Declare a 3x3 and a 1x1 convolution, with an identity where the block has one."""
    if hasattr(block, "conv"):
        raise UserError("its branches are fused already")
    return declaration(block.conv1, block.conv2, block.act, identity=block.bn is not None)


@repopt.register_block(RepVGGDW)
def declare_rep_vgg_dw(block: RepVGGDW) -> Declaration:
    """Declare a 7x7 and a 3x3 depthwise convolution."""
    if not hasattr(block, "conv1"):
        raise UserError("its branches are fused already")
    return declaration(block.conv, block.conv1, block.act)


def declaration(large: Conv, small: Conv, act: nn.Module, *, identity: bool = False) -> Declaration:
    """Return what two convolutions side by side, an identity and the activation of their sum are."""
    conv, bn = large.conv, large.bn
    branches = [ConvBranch("conv", "scale_conv", size=conv.kernel_size)]
    branches += [ConvBranch("conv_small", "scale_small", size=small.conv.kernel_size)]
    branches += [IdentityBranch("scale_identity")] if identity else []
    block = Block(Target("conv", tuple(conv.weight.shape), conv.groups), tuple(branches))
    bn = nn.BatchNorm2d(bn.num_features, bn.eps, bn.momentum)
    return Declaration(block, stride=conv.stride[0], bn=bn, after=act)


def with_notes_of(before: nn.Module, after: nn.Module) -> nn.Module:
    """Return a model with what ultralytics has noted on the layers of another: their places, and what they read."""
    for old, new in zip(before.model, after.model, strict=True):
        for key in ("i", "f", "np", "type"):
            setattr(new, key, getattr(old, key))
    return after


class RepOptTrainer(BaseTrainer):
    """What makes a trainer of ultralytics train plain networks, as the base before that trainer.

    Training follows the network whose branches have trained scales for some epochs, and constant ones after them. Of
    weights that are given, those of plain blocks are kept; blocks that had branches of their own begin anew.

    Args:
        search_epochs: for how many epochs scales are searched.

    Raises:
        UserError: there are several devices, whose branches would differ; the rule is one that no branches can follow;
            or a run that held none is to be resumed.
    """

    def __init__(self, *args: Any, search_epochs: int = 3, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.world_size > 1:
            raise UserError(f"branches are held on one device, not on {self.world_size}: name one (device=0)")
        self.search_epochs = search_epochs
        self.scales: dict[str, Tensor] | None = None  # once they are constants
        self.keep_weights = False
        self.add_callback("on_train_epoch_start", lambda trainer: trainer.end_search())

    @override
    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        branched = super().get_model(cfg, None, verbose)
        model = with_notes_of(branched, repopt.convert_model(branched, "target"))
        if weights is not None:
            model.load(weights)
            self.keep_weights = any(isinstance(module, repopt.RepConv2d) for module in weights.modules())
        return model

    @override
    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> Optimizer:
        plain = super().build_optimizer(model, *args, **kwargs)
        if isinstance(plain, MuSGD):
            raise UserError("MuSGD (of auto, too) has no rule for scales: set optimizer to SGD, AdamW or another")
        names = {param: name for name, param in unwrap_model(model).named_parameters()}
        self.groups = [group | {"params": [(names[p], p) for p in group["params"]]} for group in plain.param_groups]
        self.rule = type(plain)
        return self.hold_branches()

    def hold_branches(self) -> repopt.BranchOptimizer:
        """Return an optimizer with new branches, whose scales are searched, or those that were found."""
        model = unwrap_model(self.model)
        branches = repopt.hold_branches(model, self.scales, keep_weights=self.keep_weights)
        order = [name for name, _ in model.named_parameters()]
        return repopt.BranchOptimizer(self.groups, self.rule, branches, max_norm=MAX_NORM, order=order)

    def go_on_with(self, optimizer: repopt.BranchOptimizer) -> None:
        """Train by another optimizer; of SGD's branches with constant scales only multipliers are left."""
        constant = self.scales is not None and self.rule is torch.optim.SGD
        self.optimizer = self.scheduler.optimizer = optimizer.collapsed() if constant else optimizer

    def end_search(self) -> None:
        """Make constants of the scales if their epochs are over."""
        if self.scales is None and self.epoch >= self.search_epochs:
            self.optimizer.freeze_scales()
            self.scales = repopt.extract_scales(unwrap_model(self.model), self.optimizer.branches)
            self.go_on_with(self.optimizer)

    @override
    def optimizer_step(self) -> None:
        self.scaler.step(self.optimizer)  # it unscales, and clips by the norm of the network with branches
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)

    @override
    def save_model(self) -> bool:
        optimizer, model = self.optimizer, unwrap_model(self.model)
        run = {"optimizer": optimizer.state_dict(), "model": model.state_dict()}
        run |= {"scales": self.scales, "search_epochs": self.search_epochs}
        # Ultralytics would round what stands under "state" to half precision, and keeps the averaged weights only.
        self.optimizer = SimpleNamespace(state_dict=lambda: {"state": {}, "repopt": run})
        try:
            return super().save_model()
        finally:
            self.optimizer = optimizer

    @override
    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        run = (ckpt.get("optimizer") or {}).get("repopt")
        if run is None:
            raise UserError(f"{self.args.model} holds no branches to go on with: resume a run of this trainer")
        self.scales, self.search_epochs, self.keep_weights = run["scales"], run["search_epochs"], False
        self.go_on_with(self.hold_branches())
        unwrap_model(self.model).load_state_dict(run["model"])
        super()._load_checkpoint_state(ckpt | {"optimizer": run["optimizer"]})


class RepOptDetectionTrainer(RepOptTrainer, DetectionTrainer):
    """Trains a plain detector."""


def deployed(weights: str | Path) -> YOLO:
    """Return a trained network in layers of torch and ultralytics alone, to be saved or exported."""
    yolo = YOLO(weights)
    yolo.model = with_notes_of(yolo.model, repopt.deploy(yolo.model))
    return yolo


def main(arguments: Sequence[str] | None = None) -> Path:
    """Train, and return the path of the exported network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="repconv.yaml", help="default: a small one, written where there is none")
    parser.add_argument("--data", default="coco8.yaml")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--search", type=int, default=10, help="epochs in which scales are searched")
    parser.add_argument("--resume", help="last.pt of an interrupted run, which knows all of the above")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of ultralytics: batch=16 optimizer=AdamW ...")
    args = parser.parse_args(arguments)
    settings = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in args.settings)}
    if args.resume:
        settings["resume"] = args.resume
    else:
        if args.model == parser.get_default("model") and not Path(args.model).exists():
            Path(args.model).write_text(MODEL)
        own = {key: getattr(args, key) for key in ("model", "data", "epochs", "imgsz")}
        settings = {"optimizer": "SGD"} | settings | own
    try:
        trainer = RepOptDetectionTrainer(overrides=settings, search_epochs=args.search)
        trainer.train()
    except UserError as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    network = deployed(trainer.best)
    network.save(trainer.best.with_name("plain.pt"))
    return Path(network.export(format="torchscript"))


if __name__ == "__main__":
    print(main())
