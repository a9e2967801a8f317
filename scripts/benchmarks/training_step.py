"""A step of training on random images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import repopt
from benchmarks.as_trained import Precision, memory_format_on, precision_on, under
from data.seeding import generator

SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 4e-5}


class TrainingStep:
    """A network and an SGD; a call is a step on images that stay the same.

    Args:
        arch: the model, whose initial weights are the same every time.
        device: where, and thereby in which number and memory format, it is trained.
        mode: of the model; "target" is trained by RepSGD, the others by SGD.
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
        layout = memory_format_on(device)
        source = torch.Generator(device).manual_seed(generator(seed).initial_seed())
        self.device, self._precision, self._reads_loss = device, precision_on(device), textbook
        if textbook:
            layout, self._precision = torch.contiguous_format, Precision(device)
        self.model = repopt.create_model(arch, mode=mode, num_classes=num_classes).to(device)
        self.model.to(memory_format=layout)
        images = torch.randn(batch_size, 3, image_size, image_size, generator=source, device=device)
        self._images = images.contiguous(memory_format=layout)
        self._labels = torch.randint(num_classes, (batch_size,), generator=source, device=device)
        self._called, self._exchange = wrap(under(compile_mode, self.model, device)), exchange
        if textbook:
            self._optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), **SGD)
        else:
            scales = repopt.constant_scales(self.model, "initial") if mode == "target" else None
            self._optimizer = repopt.build_optimizer("sgd", self.model, scales, **SGD)

    def backward(self) -> Tensor:
        """Forward pass, backward pass and exchange: the gradients are there afterwards. The loss."""
        with self._precision.autocast():
            loss = cross_entropy(self._called(self._images), self._labels)
        loss.backward()
        self._exchange(self.model)
        return loss

    def __call__(self) -> None:
        """The whole step."""
        loss = self.backward()
        self._optimizer.step()
        self.zero_grad()
        if self._reads_loss:
            loss.item()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def flops(self) -> int:
        """Floating-point operations of the convolutions and matrix products of a step, forward and backward."""
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            self.backward()
        self.zero_grad()
        return counter.get_total_flops()

    def kept_bytes(self) -> int:
        """Return the bytes of the network, the optimizer and the images between two steps."""
        tensors = [*self.model.parameters(), *self.model.buffers(), self._images, self._labels]
        tensors += [v for state in self._optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)
