"""Which branches a plain convolution trains with: the blocks of the field, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from repopt.csla import (
    LAPLACIAN,
    SOBEL_X,
    SOBEL_Y,
    Block,
    Branch,
    ConvBranch,
    FilterBranch,
    IdentityBranch,
    PriorBranch,
    Shape,
    Target,
    average_filter,
    dbb_block,
    dct_filters,
    distance_prior,
    orepa_block,
)

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Prior = Callable[[Any], Block | None]  # of a convolution (`Conv`)


def repvgg_prior(conv: Conv) -> Block | None:
    """Return RepVGG's branches (arXiv 2101.03697): the convolution, a 1x1, and an identity.

    The identity is there where it has a place: as many input as output channels, and stride 1. This and the other
    priors are for kernels of odd sizes that are not 1x1, and None for others.
    """
    branches: list[Branch] = [_whole(conv), ConvBranch("conv_1x1", "scale_1x1")]
    if conv.in_channels == conv.out_channels and all(step == 1 for step in conv.stride):
        branches.append(IdentityBranch("scale_identity"))
    return _block(conv, *branches)


def acnet_prior(conv: Conv) -> Block | None:
    """Return ACNet's branches (arXiv 1908.03930): the convolution, a 1 x k and a k x 1, of two dimensions."""
    size = _size(conv)
    if len(size) != 2 or 1 in size:
        return None
    wide, high = (1, size[1]), (size[0], 1)
    return _block(
        conv,
        _whole(conv),
        ConvBranch("conv_wide", "scale_wide", size=wide),
        ConvBranch("conv_high", "scale_high", size=high),
    )


def average_prior(conv: Conv) -> Block | None:
    """Return the convolution, a 1x1, and a 1x1 before an average pooling (Diverse Branch Block, arXiv 2103.13425)."""
    average = FilterBranch("conv_average", "scale_average", filter=average_filter(_size(conv)))
    return _block(conv, _whole(conv), ConvBranch("conv_1x1", "scale_1x1"), average)


def edge_prior(conv: Conv) -> Block | None:
    """Return the branches of edge-oriented super-resolution (ECBSR, ACM MM 2021), for 3x3 convolutions.

    The convolution, and 1x1 convolutions before Sobel's filters and Laplace's.
    """
    if _size(conv) != (3, 3):
        return None
    filters = {"sobel_x": SOBEL_X, "sobel_y": SOBEL_Y, "laplacian": LAPLACIAN}
    edges = (FilterBranch(f"conv_{name}", f"scale_{name}", filter=filter) for name, filter in filters.items())
    return _block(conv, _whole(conv), *edges)


def frequency_prior(conv: Conv) -> Block | None:
    """Return a 1x1 convolution before every frequency of a cosine transform of the kernel's size, and nothing else."""
    bases = enumerate(dct_filters(_size(conv)))
    return _block(conv, *(FilterBranch(f"frequency_{i}", f"scale_{i}", filter=basis) for i, basis in bases))


def distance_weighted_prior(conv: Conv) -> Block | None:
    """Return the convolution, its places weighted by their distance from the centre (RepUX-Net, arXiv 2303.05785)."""
    return _block(conv, PriorBranch("conv", "scale_conv", prior=distance_prior(_size(conv))))


def dilated_prior(conv: Conv) -> Block | None:
    """Return the convolution and dilated 3x3 within it (UniRepLKNet, arXiv 2311.15599); of kernels from 5x5 on."""
    dilations = range(2, (min(_size(conv)) - 1) // 2 + 1)
    if not dilations:
        return None
    dilated = (ConvBranch(f"conv_dilated_{d}", f"scale_dilated_{d}", size=3, dilation=d) for d in dilations)
    return _block(conv, _whole(conv), *dilated)


def dbb_prior(conv: Conv) -> Block | None:
    """Return Diverse Branch Block's sum, `repopt.csla.dbb_block`; of convolutions without groups."""
    return dbb_block(_target(conv)) if conv.groups == 1 and _has_place(conv) else None


def orepa_prior(conv: Conv) -> Block | None:
    """Return OREPA's sum, `repopt.csla.orepa_block`; of convolutions without groups."""
    return orepa_block(_target(conv)) if conv.groups == 1 and _has_place(conv) else None


PRIORS: Mapping[str, Prior] = {
    "repvgg": repvgg_prior,
    "acnet": acnet_prior,
    "average": average_prior,
    "edge": edge_prior,
    "frequency": frequency_prior,
    "distance": distance_weighted_prior,
    "dilated": dilated_prior,
    "dbb": dbb_prior,
    "orepa": orepa_prior,
}


def _size(conv: Conv) -> Shape:
    return tuple(conv.weight.shape[2:])


def _target(conv: Conv) -> Target:
    return Target("weight", tuple(conv.weight.shape), conv.groups)


def _has_place(conv: Conv) -> bool:
    """Return whether a kernel has a centre, and is more than that."""
    return any(k > 1 for k in _size(conv)) and all(k % 2 for k in _size(conv))


def _whole(conv: Conv) -> ConvBranch:
    return ConvBranch("conv", "scale_conv", size=_size(conv))


def _block(conv: Conv, *branches: Branch) -> Block | None:
    return Block(_target(conv), branches) if _has_place(conv) else None
