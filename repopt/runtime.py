"""Networks in files that other libraries run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override


class FileNetwork(nn.Module):
    """A network in a file, (N, C, H, W) -> (N, num_classes), always in eval mode; run on the CPU.

    Of a network with several outputs it gives a dict of them by name.

    Args:
        input_shape: channels, height and width of an image; None where any will do.
        output_names: names of what it gives.
        metadata: what the file says of itself.

    Attributes:
        input_shape, output_names, metadata: as given.
    """

    def __init__(
        self, input_shape: Iterable[int | None], output_names: Iterable[str], metadata: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.input_shape, self.output_names, self.metadata = tuple(input_shape), tuple(output_names), metadata
        self.training = False

    @abstractmethod
    def compute(self, images: Any) -> Iterable[Any]:
        """Return the outputs, in the order of their names, of images: NumPy's arrays."""

    @torch.no_grad()
    @override
    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        found = [torch.from_numpy(output).to(x.device) for output in self.compute(x.cpu().numpy())]
        return found[0] if len(found) == 1 else dict(zip(self.output_names, found, strict=True))
