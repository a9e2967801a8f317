"""A backbone's features as a feature pyramid: top-down (arXiv 1612.03144), or bottom-up too (arXiv 1803.01534)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from typing_extensions import override

from repopt.errors import UserError, one_line, shown, unknown
from repopt.layers import InitialScales, initial_scale
from repopt.models import create_model, zoo
from repopt.models.network import Network
from repopt.models.vgg import block_of

PLAIN, DECLARED = NECKS = ("plain", "declared")
LEVELS = ("0", "1", "2", "3")  # of the pyramid, those that features of the body lead to; "pool" comes on top
STRIDES = (2, 2, 2, 2, 2)


class PyramidBackbone(nn.Module):
    """A feature pyramid, (N, 3, H, W) -> five maps by name: `LEVELS`, and "pool" of half the last one's size.

    Args:
        name: name of the body, one of ours or "timm/NAME".
        mode: see `repopt.create_model`.
        neck: whether the 3x3 convolutions of the pyramid are "plain", or "declared": see `block`.
        channels: channels of every map.
        strides, initial_scales: arguments of our bodies; others have none to choose.
        use_checkpoint: recompute the body's activations in the backward pass instead of keeping them.
        freeze_batch_norm: batch norms of the body stay in eval mode: they normalise by the statistics that they have.

    Attributes:
        levels: names of the maps that features of the body lead to.
        pooled: whether "pool" comes on top.
        reductions: how much smaller than the image `levels` are: r, 2r, 4r ...
        out_channels: channels of every map.

    Raises:
        UserError: a body whose features are none for a pyramid, or an unknown neck.
    """

    levels: ClassVar[tuple[str, ...]] = LEVELS
    pooled: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        *,
        mode: str,
        neck: str = PLAIN,
        channels: int,
        strides: Sequence[int] = STRIDES,
        initial_scales: InitialScales = "depth",
        use_checkpoint: bool = False,
        freeze_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if neck not in NECKS:
            raise unknown("neck", neck, NECKS)
        if zoo.is_name(name):
            if (tuple(strides), initial_scales) != (STRIDES, "depth"):
                raise UserError(f"strides and initial scales are those of our backbones; {name} has its own")
            self.body = _body_of_library(name, mode, len(self.levels), use_checkpoint)
        else:
            arguments = {"strides": strides, "initial_scales": initial_scales, "use_checkpoint": use_checkpoint}
            body = create_model(name, mode=mode, num_classes=0, **arguments)
            assert isinstance(body, Network)
            self.body = body.to_features(len(self.levels))
        features = zoo.feature_info(self.body)
        self.reductions = features.reduction()
        if self.reductions != [self.reductions[0] << level for level in range(len(self.levels))]:
            raise UserError(
                "a feature pyramid needs features of which each is half as large as the one before (such as 8, 16 and "
                f"32 times smaller than the image), and those of {name} are {', '.join(map(str, self.reductions))}"
            )
        extra = LastLevelMaxPool() if self.pooled else None
        self.fpn = FeaturePyramidNetwork(features.channels(), channels, extra_blocks=extra)
        if neck == DECLARED:
            for level in range(len(self.levels)):
                self.fpn.layer_blocks[level] = block(mode, channels, 1, initial_scales)
        self.out_channels = channels
        self.freeze_batch_norm = freeze_batch_norm
        self.train()  # freezes batch norms

    @override
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(dict(zip(self.levels, self.body(x), strict=True)))

    @override
    def train(self, mode: bool = True) -> PyramidBackbone:
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.body.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):  # SyncBatchNorm too
                    module.eval()
        return self


class PathAggregation(PyramidBackbone):
    """A pyramid whose maps also go bottom-up, (N, 3, H, W) -> three maps by name: the last three of `LEVELS`.

    As in PANet a map is halved by a 3x3 convolution, added to the smaller one beside it, and another 3x3 follows. All
    are declared blocks (`block`).

    Args:
        name, mode, channels, initial_scales: see `PyramidBackbone`.
        neck: "declared".
        body: the other arguments of `PyramidBackbone`.

    Raises:
        UserError: another neck, or see `PyramidBackbone`.
    """

    levels = LEVELS[1:]
    pooled = False

    def __init__(
        self,
        name: str,
        *,
        mode: str,
        neck: str = DECLARED,
        channels: int,
        initial_scales: InitialScales = "depth",
        **body: Any,
    ) -> None:
        if neck != DECLARED:
            raise UserError(f"a pyramid that goes bottom-up has a {DECLARED} neck, not a {shown(neck)} one")
        super().__init__(name, mode=mode, neck=neck, channels=channels, initial_scales=initial_scales, **body)
        self.halving, self.merged = (
            nn.ModuleDict({level: block(mode, channels, layer, initial_scales) for level in self.levels[1:]})
            for layer in (0, 1)
        )

    @override
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = super().forward(x)
        larger = maps[self.levels[0]]
        for level in self.levels[1:]:
            larger = maps[level] = self.merged[level](maps[level] + self.halving[level](larger))
        return maps


def block(mode: str, channels: int, layer: int, initial_scales: InitialScales) -> nn.Module:
    """Return a block of RepOpt-VGG, (N, channels, H, W) -> the same, or half of H and W where it is layer 0.

    It is in the mode of the body; beside another library's network as it is a plain convolution, batch norm and ReLU.

    Args:
        mode: of the body.
        channels: of what it takes and gives.
        layer, initial_scales: see `initial_scale`.
    """
    kind = block_of("target" if mode == zoo.MODE else mode)
    scale = initial_scale(layer, initial_scales)
    return kind(channels, channels, stride=1 if layer else 2, identity=layer > 0, initial_scale=scale)


def _body_of_library(name: str, mode: str, levels: int, use_checkpoint: bool) -> nn.Module:
    """Return a network of timm's that gives its last features."""
    zoo.name_in_timm(name)
    last = {"features_only": True, "out_indices": tuple(range(-levels, 0))}
    try:
        body = create_model(name, mode=mode, num_classes=0, use_checkpoint=use_checkpoint, **last)
    except (AssertionError, IndexError, RuntimeError) as error:
        raise UserError(f"{name} cannot be a backbone: {one_line(error)}") from None
    zoo.check_features(name, body)
    return body
