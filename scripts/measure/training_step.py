"""A step of training on random images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import repopt
from measure.placement import memory_format_on, precision_on
from repopt.seeding import generator


def unchanged(model: nn.Module) -> nn.Module:
    """The model itself."""
    return model


class TrainingStep:
    """A target network and an SGD; a call is a step on images that stay the same.

    Args:
        arch: the model, whose initial weights are the same every time.
        device: where, and thereby in which number and memory format, it is trained.
        batch_size, image_size: images are (batch_size, 3, image_size, image_size).
        seed: of the images and labels.
        wrap: makes of the model what is called, such as DDP.
        exchange: is called with the model after the backward pass.
    """

    def __init__(
        self,
        arch: str,
        device: torch.device,
        *,
        batch_size: int,
        image_size: int,
        seed: int = 0,
        wrap: Callable[[nn.Module], nn.Module] = unchanged,
        exchange: Callable[[nn.Module], object] = unchanged,
    ) -> None:
        torch.manual_seed(0)
        layout, source = memory_format_on(device), generator(seed)
        self.model = repopt.create_model(arch, mode="target").to(device, memory_format=layout)
        images = torch.randn(batch_size, 3, image_size, image_size, generator=source)
        self._images = images.to(device).contiguous(memory_format=layout)
        self._labels = torch.randint(1000, (batch_size,), generator=source).to(device)
        self._called, self._exchange, self._precision = wrap(self.model), exchange, precision_on(device)
        self._optimizer = torch.optim.SGD(
            self.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=4e-5, fused=True
        )

    def backward(self) -> None:
        """Forward pass, backward pass and exchange: the gradients are there afterwards."""
        with self._precision.autocast():
            loss = cross_entropy(self._called(self._images), self._labels)
        loss.backward()
        self._exchange(self.model)

    def __call__(self) -> None:
        """The whole step."""
        self.backward()
        self._optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad(set_to_none=True)
