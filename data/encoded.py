"""The common face of images that lie encoded (JPEG, PNG, ...) on a disk, in a zip or in memory."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class EncodedImages(Protocol):
    """A split's images, not yet decoded; shared with worker processes, so it holds arrays rather than many objects."""

    labels: Tensor
    """int64 [N]"""

    def read(self, index: int) -> bytes:
        """The encoded bytes of one image; OSError where they cannot be read."""
        ...

    def name(self, index: int) -> str:
        """What to call the image in a message."""
        ...
