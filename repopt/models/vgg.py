"""RepOpt-VGG (table 1 of the paper): stages of 3x3 convolutions, each standing for a 3x3, a 1x1 and an identity."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from repopt.layers import MODES, run
from repopt.models.registry import register
from repopt.models.vgg_blocks import RepVGGBlock, VGGBlock


class RepOptVGG(nn.Module):
    """The network, (N, 3, H, W) -> (N, num_classes): one stem block, four stages, global average pooling, linear.

    Args:
        layers: blocks per stage.
        widths: multipliers of the stages' 64, 128, 256 and 512 channels.
        block: ``block(in_channels, out_channels, stride, initial_scale)`` makes one.
        num_classes: outputs of the classifier.
        use_checkpoint: recompute every block's activations in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        layers: Sequence[int],
        widths: Sequence[float],
        block: Callable[[int, int, int, float], nn.Module],
        *,
        num_classes: int,
        use_checkpoint: bool,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        channels = [int(base * width) for base, width in zip((64, 128, 256, 512), widths, strict=True)]
        self.stage0 = block(3, min(64, channels[0]), 2, 1.0)
        in_channels = min(64, channels[0])
        stages = []
        for depth, out_channels in zip(layers, channels, strict=True):
            # Table 9 of the paper: the scales start by depth, 1 in a stage's first block, then sqrt(2 / i).
            scales = [1.0] + [math.sqrt(2 / i) for i in range(1, depth)]
            stages.append(nn.Sequential(block(in_channels, out_channels, 2, scales[0])))
            stages[-1].extend(block(out_channels, out_channels, 1, scale) for scale in scales[1:])
            in_channels = out_channels
        self.stage1, self.stage2, self.stage3, self.stage4 = stages
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(in_channels, num_classes)

    def blocks(self) -> Iterator[nn.Module]:
        """All blocks, in the order in which an image meets them."""
        yield self.stage0
        for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
            yield from stage

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        for block in self.blocks():
            x = run(block, x, checkpointed=self.use_checkpoint)
        return self.linear(self.gap(x).flatten(1))


def build_vgg(
    *,
    mode: str,
    num_classes: int,
    layers: Sequence[int],
    widths: Sequence[float],
    se: bool = False,
    use_checkpoint: bool = False,
) -> RepOptVGG:
    """A RepOpt-VGG in the mode hs, csla or target, or its baseline RepVGG (mode repvgg)."""
    block = functools.partial(RepVGGBlock, se=se) if mode == "repvgg" else functools.partial(VGGBlock, mode=mode, se=se)
    return RepOptVGG(layers, widths, block, num_classes=num_classes, use_checkpoint=use_checkpoint)


_B, _L = (4, 6, 16, 1), (8, 14, 24, 1)
_CONFIGS = {
    "RepOpt-VGG-nano": {"layers": _B, "widths": (0.25, 0.25, 0.25, 0.5)},
    "RepOpt-VGG-A0": {"layers": (2, 4, 14, 1), "widths": (0.75, 0.75, 0.75, 2.5)},
    "RepOpt-VGG-A1": {"layers": (2, 4, 14, 1), "widths": (1, 1, 1, 2.5)},
    "RepOpt-VGG-A2": {"layers": (2, 4, 14, 1), "widths": (1.5, 1.5, 1.5, 2.75)},
    "RepOpt-VGG-B0": {"layers": _B, "widths": (1, 1, 1, 2.5)},
    "RepOpt-VGG-B1": {"layers": _B, "widths": (2, 2, 2, 4)},
    "RepOpt-VGG-B2": {"layers": _B, "widths": (2.5, 2.5, 2.5, 5)},
    "RepOpt-VGG-L1": {"layers": _L, "widths": (2, 2, 2, 4)},
    "RepOpt-VGG-L2": {"layers": _L, "widths": (2.5, 2.5, 2.5, 5)},
    "RepOpt-VGG-L2-se": {"layers": _L, "widths": (2.5, 2.5, 2.5, 5), "se": True},
}

register(_CONFIGS, build_vgg, modes=(*MODES, "repvgg"))
