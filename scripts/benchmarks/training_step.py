"""A step of training on random images, and what the benchmarks take of train/: networks as a training runs them that
asks for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import repopt
from data.seeding import generator
from train import build, config, placement
from train.compilation import COMPILE_MODES, compiled
from train.distributed import World
from train.precision import Precision

MODES = ("off", *COMPILE_MODES)
AS_IN_TRAINING = "as TRAIN.COMPILE auto chooses"
SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 4e-5}


def precision_on(device: torch.device) -> Precision:
    """Return autocast to bf16 on GPUs, fp32 on CPUs, where bf16 convolutions of this torch have corrupted memory."""
    return placement.precision_of(config.build({}).cfg, World(0, 1, device))


def memory_format_on(device: torch.device) -> torch.memory_format:
    """Return channels_last on GPUs."""
    return placement.memory_format_of(World(0, 1, device))


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model on a device, in its memory format."""
    return placement.to_device(model, World(0, 1, device))


def mode_on(device: torch.device, batch_size: int, image_size: int, processes: int = 1) -> str:
    """Return the mode of torch.compile that a training chooses which asks for none."""
    cfg = config.build({"DATA.BATCH_SIZE": batch_size, "DATA.IMG_SIZE": image_size}).cfg
    return build.compile_mode(cfg, World(0, processes, device))


def under(mode: str, model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model as `TRAIN.COMPILE` of this value trains it."""
    return model if mode == "off" else compiled(model, device, mode)


class TrainingStep:
    """A network and an SGD; a call is a step on images that stay the same.

    Args:
        arch: the model, whose initial weights are the same every time.
        device: where, and thereby in which number and memory format, it is trained.
        mode: of the model; "target" is trained by RepSGD, the others by SGD. "search" is the plain network, too, for
            which SGD holds the branches.
        batch_size, image_size: images are (batch_size, 3, image_size, image_size).
        num_classes: of the model.
        seed: of the images and labels.
        textbook: as textbooks do it: fp32, contiguous, torch's default SGD, and the loss read after every step.
        compile_mode: of torch.compile, or "off".
        wrap: makes of the model what is called, such as DDP.
        exchange: is called with the model after the backward pass.
    """

    def __init__(
        self,
        arch: str,
        device: torch.device,
        *,
        mode: str = "target",
        batch_size: int,
        image_size: int,
        num_classes: int = 1000,
        seed: int = 0,
        textbook: bool = False,
        compile_mode: str = "off",
        wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
        exchange: Callable[[nn.Module], object] = lambda model: None,
    ) -> None:
        torch.manual_seed(0)
        source = torch.Generator(device).manual_seed(generator(seed).initial_seed())
        self.device, self._reads_loss = device, textbook
        layout = torch.contiguous_format if textbook else memory_format_on(device)
        self._precision = Precision(device) if textbook else precision_on(device)
        of_model = "target" if mode == "search" else mode
        self.model = repopt.create_model(arch, mode=of_model, num_classes=num_classes).to(device)
        self.model.to(memory_format=layout)
        images = torch.randn(batch_size, 3, image_size, image_size, generator=source, device=device)
        self._images = images.contiguous(memory_format=layout)
        self._labels = torch.randint(num_classes, (batch_size,), generator=source, device=device)
        self._called, self._exchange = wrap(under(compile_mode, self.model, device)), exchange
        if textbook:
            self._optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), **SGD)
        else:
            scales = repopt.bind(self.model, source="initial") if mode == "target" else None
            if scales is not None:
                scales.initialize()
            branches = repopt.hold_branches(self.model) if mode == "search" else None
            self._optimizer = repopt.build_optimizer("sgd", self.model, scales, branches=branches, **SGD)

    def backward(self) -> Tensor:
        """Do the forward pass, the backward pass and the exchange, and return the loss."""
        with self._precision.autocast():
            loss = cross_entropy(self._called(self._images), self._labels)
        loss.backward()
        self._exchange(self.model)
        return loss

    def __call__(self) -> None:
        """Do the whole step."""
        loss = self.backward()
        self._optimizer.step()
        self.zero_grad()
        if self._reads_loss:
            loss.item()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def flops(self) -> int:
        """Return the FLOPs of the convolutions and matrix products of a step, forward and backward."""
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            self.backward()
        self.zero_grad()
        return counter.get_total_flops()

    def kept_bytes(self) -> int:
        """Return the bytes of the network, the optimizer and the images between two steps."""
        tensors = [*self.model.parameters(), *self.model.buffers(), self._images, self._labels]
        tensors += [v for state in self._optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)
