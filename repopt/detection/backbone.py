"""A backbone's features as a feature pyramid (arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from repopt.errors import UserError, one_line, unknown
from repopt.layers import InitialScales, initial_scale
from repopt.models import create_model, zoo
from repopt.models.vgg import block_of

PLAIN, DECLARED = NECKS = ("plain", "declared")
LEVELS = ("0", "1", "2", "3")  # of the pyramid, those that features of the body lead to; "pool" comes on top
STRIDES = (2, 2, 2, 2, 2)


class PyramidBackbone(nn.Module):
    """Images (N, 3, H, W) -> five maps of `out_channels` by name: `LEVELS`, and "pool" of half the last one's size.

    Args:
        name: of the body, one of ours or "timm/NAME".
        mode: of `repopt.create_model`.
        neck: whether the 3x3 convolutions of the pyramid are "plain", or "declared": blocks of RepOpt-VGG in the mode
            of the body (batch norm and ReLU included).
        channels: of the pyramid.
        strides, initial_scales: of our bodies; others have none to choose.
        use_checkpoint: recompute the body's activations in the backward pass instead of keeping them.
        freeze_batch_norm: batch norms of the body stay in eval mode: they normalise by the statistics that they have.

    Attributes:
        reductions: of `LEVELS`, how much smaller than the image they are: r, 2r, 4r, 8r.
        out_channels: of every map.

    Raises:
        UserError: a body whose features are none for a pyramid, an unknown neck, or one that the body's mode lacks.
    """

    def __init__(
        self,
        name: str,
        *,
        mode: str,
        neck: str,
        channels: int,
        strides: Sequence[int] = STRIDES,
        initial_scales: InitialScales = "depth",
        use_checkpoint: bool = False,
        freeze_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if neck not in NECKS:
            raise unknown("neck", neck, NECKS)
        if mode == zoo.MODE:
            if neck == DECLARED:
                raise UserError(f"the neck {DECLARED!r} has blocks in the mode of the backbone, and {name} has none")
            if (tuple(strides), initial_scales) != (STRIDES, "depth"):
                raise UserError(f"strides and initial scales are those of our backbones; {name} has its own")
            self.body = _body_of_library(name, use_checkpoint)
        else:
            self.body = create_model(
                name,
                mode=mode,
                num_classes=0,
                strides=strides,
                initial_scales=initial_scales,
                use_checkpoint=use_checkpoint,
            ).to_features((1, 2, 3, 4))
        self.reductions = self.body.feature_info.reduction()
        if self.reductions != [self.reductions[0] << level for level in range(len(LEVELS))]:
            raise UserError(
                "a feature pyramid needs features that are 4, 8, 16 and 32 times smaller than the image (or another "
                f"four, each half of the one before), and those of {name} are {', '.join(map(str, self.reductions))}"
            )
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), channels, extra_blocks=LastLevelMaxPool())
        if neck == DECLARED:
            arguments = {"stride": 1, "identity": True, "initial_scale": initial_scale(1, initial_scales)}
            for level in range(len(LEVELS)):
                self.fpn.layer_blocks[level] = block_of(mode)(channels, channels, **arguments)
        self.out_channels = channels
        self.freeze_batch_norm = freeze_batch_norm
        self.train()  # as of a fresh module, but batch norms that are frozen

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # noqa: D102
        return self.fpn(dict(zip(LEVELS, self.body(x), strict=True)))

    def train(self, mode: bool = True) -> PyramidBackbone:  # noqa: D102
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.body.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):  # SyncBatchNorm too
                    module.eval()
        return self


def _body_of_library(name: str, use_checkpoint: bool) -> nn.Module:
    """The last four features of a network of timm's."""
    zoo.name_in_timm(name)
    last = {"features_only": True, "out_indices": (-4, -3, -2, -1)}
    try:
        body = create_model(name, mode=zoo.MODE, num_classes=0, use_checkpoint=use_checkpoint, **last)
    except (AssertionError, IndexError, RuntimeError) as error:
        raise UserError(f"{name} cannot be a backbone: {one_line(error)}") from None
    zoo.check_features(name, body)
    return body
