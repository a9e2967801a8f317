"""Semantic segmentation on our backbones: UPerNet (arXiv 1807.10221) of segmentation_models_pytorch.

    model = create_segmenter("RepOpt-VGG-B1", mode="target", num_classes=19)

The package is the extra downstream.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from repopt.errors import UserError, one_line
from repopt.models import zoo
from repopt.models.registry import timm_name

BODY = "encoder.model"  # where the backbone stands in the network
IGNORED = 255  # label of pixels that count neither in training nor in evaluation
MULTIPLE = 32  # of which height and width of what the network sees have to be
REDUCTIONS = [4, 8, 16, 32]  # of the features that UPerNet takes
NEEDS = "segmentation needs {} (pip install 'repopt[downstream]')"


def create_segmenter(name: str, *, mode: str, num_classes: int, channels: int = 256, **backbone: Any) -> nn.Module:
    """Create UPerNet on a backbone, (N, 3, H, W) -> logits (N, num_classes, H, W), H and W multiples of 32.

    Args:
        name: name of the backbone, one of ours or "timm/NAME".
        mode: see `repopt.create_model`.
        num_classes: classes of a pixel.
        channels: channels of the decoder.
        backbone: arguments of the backbone (strides, initial_scales, use_checkpoint ...).

    Raises:
        UserError: a backbone that gives no features, or none that are 4, 8, 16 and 32 times smaller than the image.
    """
    try:
        from segmentation_models_pytorch import UPerNet
    except ImportError:
        raise UserError(NEEDS.format("segmentation_models_pytorch")) from None
    of_library = zoo.is_name(name)
    if of_library:
        encoder = zoo.name_in_timm(name)
    else:
        encoder, backbone = timm_name(name), {"mode": mode, **backbone}
    checkpointed = backbone.pop("use_checkpoint", False)
    try:
        model = UPerNet(
            f"tu-{encoder}", encoder_weights=None, decoder_channels=channels, classes=num_classes, **backbone
        )
        if of_library:
            model.set_submodule(BODY, zoo.in_mode(model.get_submodule(BODY), mode))
        if checkpointed:
            model.get_submodule(BODY).set_grad_checkpointing()
    except UserError:
        raise
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, AssertionError) as error:
        # networks of timm's that give no features, or take no such arguments
        raise UserError(f"{name} cannot be a backbone: {one_line(error)}") from None
    found = model.get_submodule(BODY).feature_info.reduction()[-4:]
    if found != REDUCTIONS:
        raise UserError(
            f"UPerNet takes features 4, 8, 16 and 32 times smaller than the image, and those of {name} are "
            f"{', '.join(map(str, found))} times smaller"
        )
    if of_library:
        zoo.check_features(name, model.get_submodule(BODY))
    return model


def predict(
    model: nn.Module,
    images: Tensor,
    window: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
) -> Tensor:
    """Return logits (N, num_classes, H, W) of images (N, 3, H, W) of any size.

    Args:
        model: a segmenter; it sees `padded` images.
        images: normalised images.
        window: height and width of what it sees at once; where windows overlap, the logits are their mean. None = all.
        stride: steps from a window to the next, in both directions; the last windows end with the image. None = two
            thirds of a window.
    """
    height, width = images.shape[2:]
    if window is None:
        return model(padded(images))[:, :, :height, :width]
    steps = stride or tuple(max(1, 2 * side // 3) for side in window)
    starts = [_starts(*sides) for sides in zip((height, width), window, steps, strict=True)]
    total, times = None, images.new_zeros(1, 1, height, width)
    for top, left in itertools.product(*starts):
        place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
        logits = predict(model, images[place]).float()
        total = logits.new_zeros(len(images), logits.shape[1], height, width) if total is None else total
        total[place] += logits
        times[place] += 1
    assert total is not None
    return total / times


def padded(images: Tensor) -> Tensor:
    """Return images with zeros below and right, up to multiples of 32 in height and width."""
    height, width = images.shape[2:]
    return F.pad(images, (0, -width % MULTIPLE, 0, -height % MULTIPLE))


def _starts(length: int, window: int, step: int) -> list[int]:
    """Return where windows start that cover a length; the last one ends with it."""
    last = max(0, length - window)
    return [*range(0, last, step), last]
