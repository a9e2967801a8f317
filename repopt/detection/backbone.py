"""A backbone's features as a feature pyramid (arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from typing_extensions import override

from repopt.errors import UserError, one_line, unknown
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
        neck: whether the 3x3 convolutions of the pyramid are "plain", or "declared": blocks of RepOpt-VGG in the mode
            of the body (batch norm and ReLU included).
        channels: channels of every map.
        strides, initial_scales: arguments of our bodies; others have none to choose.
        use_checkpoint: recompute the body's activations in the backward pass instead of keeping them.
        freeze_batch_norm: batch norms of the body stay in eval mode: they normalise by the statistics that they have.

    Attributes:
        reductions: how much smaller than the image `LEVELS` are: r, 2r, 4r, 8r.
        out_channels: channels of every map.

    Raises:
        UserError: a body whose features are none for a pyramid, an unknown neck, or one that the body's mode lacks.
    """

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
        if neck == DECLARED and mode == zoo.MODE:
            raise UserError(f"the neck {DECLARED!r} has blocks in the mode of the backbone, and {name} has none")
        if zoo.is_name(name):
            if (tuple(strides), initial_scales) != (STRIDES, "depth"):
                raise UserError(f"strides and initial scales are those of our backbones; {name} has its own")
            self.body = _body_of_library(name, mode, use_checkpoint)
        else:
            arguments = {"strides": strides, "initial_scales": initial_scales, "use_checkpoint": use_checkpoint}
            body = create_model(name, mode=mode, num_classes=0, **arguments)
            assert isinstance(body, Network)
            self.body = body.to_features((1, 2, 3, 4))
        features = zoo.feature_info(self.body)
        self.reductions = features.reduction()
        if self.reductions != [self.reductions[0] << level for level in range(len(LEVELS))]:
            raise UserError(
                "a feature pyramid needs features that are 4, 8, 16 and 32 times smaller than the image (or another "
                f"four, each half of the one before), and those of {name} are {', '.join(map(str, self.reductions))}"
            )
        self.fpn = FeaturePyramidNetwork(features.channels(), channels, extra_blocks=LastLevelMaxPool())
        if neck == DECLARED:
            scale = initial_scale(1, initial_scales)
            for level in range(len(LEVELS)):
                self.fpn.layer_blocks[level] = block_of(mode)(
                    channels, channels, stride=1, identity=True, initial_scale=scale
                )
        self.out_channels = channels
        self.freeze_batch_norm = freeze_batch_norm
        self.train()  # freezes batch norms

    @override
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(dict(zip(LEVELS, self.body(x), strict=True)))

    @override
    def train(self, mode: bool = True) -> PyramidBackbone:
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.body.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):  # SyncBatchNorm too
                    module.eval()
        return self


def _body_of_library(name: str, mode: str, use_checkpoint: bool) -> nn.Module:
    """Return a network of timm's that gives its last four features."""
    zoo.name_in_timm(name)
    last = {"features_only": True, "out_indices": (-4, -3, -2, -1)}
    try:
        body = create_model(name, mode=mode, num_classes=0, use_checkpoint=use_checkpoint, **last)
    except (AssertionError, IndexError, RuntimeError) as error:
        raise UserError(f"{name} cannot be a backbone: {one_line(error)}") from None
    zoo.check_features(name, body)
    return body
