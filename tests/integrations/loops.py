"""The training loops of frameworks as their users write them, around RepOpt-VGG-nano on scikit-learn's digits.

A loop takes a `Task` and a folder, and returns the network that it has trained in it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from branch_by_branch import run_branch_by_branch
from sklearn.datasets import load_digits
from torch import nn

import repopt
from repopt.layers import RepConv2d

NANO = {"num_classes": 10, "in_chans": 1, "layers": (2, 2, 2, 1), "widths": (0.25, 0.25, 0.25, 0.25)}
SETTINGS = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "eps": 1e-30}  # AdamW is exact but for epsilon
BATCH, STEPS = 8, 4


class Classifier(nn.Module):
    """A network and its loss, as a larger model has it: ``{"loss", "logits"}`` of images and labels."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.net = repopt.create_model("RepOpt-VGG-nano", mode=mode, **NANO)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@functools.cache
def start() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Scales of both signs of the network, and all that is not in a block."""
    torch.manual_seed(0)
    model = Classifier("csla").double()
    scales = repopt.extract_scales(model.net)
    return {name: torch.randn_like(value) for name, value in scales.items()}, model.state_dict()


def begun(mode: str) -> Classifier:
    """The network at the start of training, the same function in both modes."""
    scales, state = start()
    model = Classifier(mode).double()
    model.load_state_dict(state, strict=False)
    torch.manual_seed(1)
    repopt.initialize(model.net, scales)
    return model


@functools.cache
def images() -> list[dict[str, torch.Tensor]]:
    """The digits of all steps, one by one."""
    digits = load_digits()
    pixels = nn.functional.interpolate(torch.tensor(digits.images / 16).unsqueeze(1), size=64, mode="bilinear")
    # Noise, for of gradients that are zero but for rounding, AdamW without an epsilon would make large steps.
    pixels += 0.1 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor(digits.target)
    return [{"images": pixels[i], "labels": labels[i]} for i in range(BATCH * STEPS)]


def batches(start: int = 0, stop: int = STEPS) -> list[dict[str, torch.Tensor]]:
    """The batches of some steps."""
    return [
        {key: torch.stack([image[key] for image in members]) for key in members[0]}
        for members in (images()[i * BATCH : (i + 1) * BATCH] for i in range(start, stop))
    ]


class Task(NamedTuple):
    """What is trained: a form of a rule, and what the loop does besides.

    Attributes:
        parts: batches whose gradients a step accumulates.
        max_norm: of the clip, or None.
        scale: of the loss, or None.
        stops: whether training stops after half of the steps, and another process goes on.
    """

    form: str
    rule: str
    parts: int = 1
    max_norm: float | None = None
    scale: float | None = None
    stops: bool = False

    def optimizer(self, model: Classifier, *, clips: bool = True) -> torch.optim.Optimizer:
        """An optimizer of our own, for frameworks that take one."""
        own: dict[str, Any] = SETTINGS | {"max_norm": self.max_norm if clips else None}
        if self.form == "held":
            return repopt.build_optimizer(self.rule, model, branches=self.branches(model), **own)
        return repopt.build_optimizer(self.rule, model, repopt.bind(model, start()[0], prefix="net"), **own)

    def branches(self, model: Classifier) -> dict[str, repopt.HeldBranches]:
        """Branches that begin as those of the network with branches."""
        return repopt.share_branches(begun("csla").to(next(model.parameters()).dtype), model)

    def scaler(self) -> torch.amp.GradScaler | None:
        """What multiplies the loss."""
        return None if self.scale is None else torch.amp.GradScaler("cpu", init_scale=self.scale)

    def spans(self) -> list[tuple[int, int]]:
        """Which steps are trained without a stop."""
        return [(0, STEPS // 2), (STEPS // 2, STEPS)] if self.stops else [(0, STEPS)]


@functools.cache
def expected(rule: str, parts: int, max_norm: float | None) -> Classifier:
    """The network with branches after the plain rule: every branch a convolution of its own, torch's clip."""
    model = begun("csla")
    for module in model.modules():
        if isinstance(module, RepConv2d):
            run_branch_by_branch(module)
    optimizer = repopt.build_optimizer(rule, model, **SETTINGS)
    for group in grouped(batches(), parts):
        optimizer.zero_grad()
        for batch in group:
            (model(**batch)["loss"] / parts).backward()
        if max_norm is not None:
            assert nn.utils.clip_grad_norm_(model.parameters(), max_norm) > max_norm
        optimizer.step()
    return model


def grouped(items: list[Any], count: int) -> Iterator[list[Any]]:
    """So many at a time."""
    return (items[i : i + count] for i in range(0, len(items), count))


def difference(model: Classifier, other: Classifier) -> float:
    """The largest relative difference of a block's kernel from another network's."""
    pairs = zip(repopt.declared_blocks(model), repopt.declared_blocks(other), strict=True)
    with torch.no_grad():
        kernels = [(a.kernel().double(), b.kernel()) for (_, a), (_, b) in pairs]
        kernels.append((model.net.linear.weight.double(), other.net.linear.weight))
        return max(float((a - b).norm() / b.norm()) for a, b in kernels)


# ------------------------------------------------------------------------------------------------------ the loops


def own_loop(task: Task, folder: Any, dtype: torch.dtype = torch.float64) -> Classifier:
    for number, (first, last) in enumerate(task.spans()):
        model = begun("target").to(dtype)
        optimizer, scaler = task.optimizer(model), task.scaler()
        if number:
            saved = torch.load(folder / "own.pt")
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        for group in grouped(batches(first, last), task.parts):
            optimizer.zero_grad()
            for batch in group:
                loss = model(batch["images"].to(dtype), batch["labels"])["loss"] / task.parts
                (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "own.pt")
    return model


def lightning(task: Task, folder: Any) -> Classifier:
    import pytorch_lightning
    from pytorch_lightning.plugins.precision import DoublePrecision, MixedPrecision

    from repopt.integrations.lightning import ClipInStep

    class Scaled(MixedPrecision):
        """Of 16-mixed the loss scaling alone."""

        def autocast_context_manager(self) -> Any:
            return nullcontext()

    class Module(ClipInStep, pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = begun("target")
            self.optimizer = task.optimizer(self.model, clips=False)

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer

    for number, (first, last) in enumerate(task.spans()):
        module = Module()
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu",
            max_epochs=number + 1,
            accumulate_grad_batches=task.parts,
            gradient_clip_val=task.max_norm,
            plugins=Scaled("16-mixed", "cpu", task.scaler()) if task.scale else DoublePrecision(),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        loader = torch.utils.data.DataLoader(batches(first, last), batch_size=None)
        trainer.fit(module, loader, ckpt_path=folder / "a.ckpt" if number else None, weights_only=True)
        trainer.save_checkpoint(folder / "a.ckpt")
    return module.model


def accelerate(task: Task, folder: Any) -> Classifier:
    from accelerate import Accelerator

    for number, (first, last) in enumerate(task.spans()):
        model = begun("target")
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=task.parts)
        accelerator.scaler = task.scaler()
        prepared, optimizer = accelerator.prepare(model, task.optimizer(model))
        if number:
            accelerator.load_state(folder / "state")
        for batch in batches(first, last):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(folder / "state")
    return model


def transformers(task: Task, folder: Any) -> Classifier:
    from transformers import TrainingArguments

    from repopt.integrations.transformers import RepOptTrainer

    class Trainer(RepOptTrainer):
        """Takes the images in their order."""

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(images())

    for number, (_, last) in enumerate(task.spans()):
        model = begun("target")
        own = {"branches": task.branches(model)} if task.form == "held" else {"scales": start()[0], "prefix": "net"}
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                per_device_train_batch_size=BATCH,
                gradient_accumulation_steps=task.parts,
                max_steps=last // task.parts,
                learning_rate=SETTINGS["lr"],
                weight_decay=SETTINGS["weight_decay"],
                adam_epsilon=SETTINGS["eps"],
                max_grad_norm=task.max_norm or 0,
                lr_scheduler_type="constant",
                save_strategy="steps",
                save_steps=2,
                logging_steps=1,
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=images(),
            rule=task.rule,
            rule_settings={"momentum": SETTINGS["momentum"]},
            **own,
        )
        trainer.accelerator.scaler = task.scaler()
        trainer.train(resume_from_checkpoint=number > 0)
        if task.max_norm is not None:
            assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    return model


def timm(task: Task, folder: Any) -> Classifier:
    """The loop of timm's training script: its scaler calls backward and step."""
    from timm.optim import create_optimizer_v2
    from timm.utils import CheckpointSaver, NativeScaler

    from repopt.integrations.timm import register

    path = folder / "scales.pth"
    repopt.save_scales(start()[0], path)
    for number, (first, last) in enumerate(task.spans()):
        model = begun("target")
        if task.form == "held":
            optimizer = task.optimizer(model)
        else:
            register(model)
            own = {"scales": path, "prefix": "net", "max_norm": task.max_norm}
            optimizer = create_optimizer_v2(
                model, f"rep{task.rule}", **SETTINGS, **own, **({"nesterov": False} if task.rule == "sgd" else {})
            )
        scaler = NativeScaler("cpu") if task.scale else None
        if number:
            saved = torch.load(folder / "last.pth.tar", weights_only=False)
            model.load_state_dict(saved["state_dict"])
            optimizer.load_state_dict(saved["optimizer"])
        for group in grouped(batches(first, last), task.parts):
            optimizer.zero_grad()
            for position, batch in enumerate(group, 1):
                loss = model(**batch)["loss"] / task.parts
                if scaler is None:
                    loss.backward()
                else:
                    scaler(loss, optimizer, parameters=model.parameters(), need_update=position == task.parts)
            if scaler is None:
                optimizer.step()
        CheckpointSaver(model, optimizer, checkpoint_dir=folder, recovery_dir=folder).save_checkpoint(number)
    return model


def mmengine(task: Task, folder: Any) -> Classifier:
    from mmengine.model import BaseModel
    from mmengine.optim import AmpOptimWrapper
    from mmengine.registry import OPTIM_WRAPPERS
    from mmengine.runner import Runner

    import repopt.integrations.mmengine

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = begun("target").net

        def forward(self, images: torch.Tensor, labels: torch.Tensor, mode: str) -> dict[str, torch.Tensor]:
            assert mode == "loss"
            return {"loss": nn.functional.cross_entropy(self.net(images), labels)}

    class Scaled(AmpOptimWrapper):
        """The step of its mixed precision, on a CPU, without a cast."""

        def __init__(self, **settings: Any) -> None:
            super(AmpOptimWrapper, self).__init__(**settings)
            self._scale_update_param, self.loss_scaler = None, task.scaler()

        def optim_context(self, model: nn.Module) -> Any:
            return super(AmpOptimWrapper, self).optim_context(model)

    OPTIM_WRAPPERS.register_module(name="Scaled", module=Scaled, force=True)
    path = folder / "scales.pth"
    repopt.save_scales(start()[0], path)
    for number, (first, last) in enumerate(task.spans()):
        wrapper = {
            "type": "Scaled" if task.scale else "OptimWrapper",
            "constructor": "RepOptWrapperConstructor",
            "optimizer": {"type": task.rule} | SETTINGS,
            "accumulative_counts": task.parts,
            "clip_grad": {"max_norm": task.max_norm} if task.max_norm else None,
            "paramwise_cfg": {"scales": path, "prefix": "net", "held": task.form == "held"},
        }
        model = Model()
        runner = Runner(
            model,
            str(folder),
            train_dataloader=torch.utils.data.DataLoader(images()[first * BATCH : last * BATCH], BATCH),
            train_cfg={"by_epoch": True, "max_epochs": number + 1},
            optim_wrapper=wrapper,
            default_hooks={"logger": None, "timer": None, "checkpoint": {"type": "CheckpointHook", "interval": 1}},
            log_level="ERROR",
            load_from=str(folder / "epoch_1.pth") if number else None,
            resume=number > 0,
            experiment_name=folder.name,
        )
        with mock.patch.dict(os.environ, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1"):  # its checkpoints hold its own types
            runner.train()
    return model


def deepspeed(task: Task, folder: Any) -> Classifier:
    """In float32: it takes no other gradients on a CPU."""
    import deepspeed as ds

    from repopt.integrations.deepspeed import initialize

    if not torch.distributed.is_initialized():
        # Its own exchange in shared memory would be compiled here, for minutes.
        with mock.patch("deepspeed.comm.torch.build_shm_op", return_value=None):
            ds.init_distributed(dist_backend="gloo", verbose=False)
    for number, (first, last) in enumerate(task.spans()):
        model = begun("target").float()
        config = {"train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": task.parts}
        config |= {"gradient_clipping": task.max_norm or 0, "fp16": {"enabled": task.scale is not None}}
        optimizer = task.optimizer(model, clips=False)
        engine, *_ = initialize(model, optimizer, config, dist_init_required=False)
        if number:
            engine.load_checkpoint(str(folder))
        for batch in batches(first, last):
            engine.backward(engine(batch["images"].float(), batch["labels"])["loss"])
            engine.step()
        engine.save_checkpoint(str(folder))
    return model


LOOPS = {
    "a loop of one's own": own_loop,
    "Lightning": lightning,
    "Accelerate": accelerate,
    "transformers": transformers,
    "timm": timm,
    "MMEngine": mmengine,
    "DeepSpeed, stage 0": deepspeed,
}
COLUMNS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "accumulation": {"parts": 2},
    "clip": {"max_norm": 0.5},
    "fp16": {"scale": 2.0**10, "max_norm": 0.5},
    "resume": {"stops": True, "max_norm": 0.5},
}
FORMS = [("compact", "sgd"), ("compact", "adamw"), ("held", "sgd"), ("held", "adamw")]
