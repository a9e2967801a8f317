"""The algebra of Constant-Scale Linear Addition: tensors in, tensors out.

A CSLA block computes ``y = sum_k s_k * (A_k(w_k) conv x)``: branch k has a kernel ``w_k``, a constant scale ``s_k``
per output channel, and a constant linear map ``A_k`` of the kernel into the target kernel's shape. From one
declaration, a `Block`, follow the two rules of the paper (arXiv 2205.15242, section 3.1 and appendix A):

    W0 = sum_k  s_k         * A_k(w_k)      Rule of Initialization   `Block.merge`
    M  = sum_k |s_k|^(1+d)  * A_k(1)        Rule of Iteration        `Block.grad_mult`, of placements
    P  = sum_k  s_k A_k A_k^T s_k           the same of any A_k, for linear rules (d = 1)

where d is the update rule's degree of homogeneity, ``update(c g) = sign(c) |c|^d update(g)``: 1 for SGD, 0 for Adam. A
placement copies every entry of a kernel to one place of its own.

Kernels have the shape (O, I, *k): O output channels, I input channels per group, and any number of spatial dimensions,
none of them for a linear layer.
"""

from repopt.csla.block import Block, FunctionBlock
from repopt.csla.branch import Branch, ConvBranch, IdentityBranch, PlacedBranch, Target
from repopt.csla.fixed import (
    LAPLACIAN,
    SOBEL_X,
    SOBEL_Y,
    FilterBranch,
    FrozenConvBranch,
    PriorBranch,
    average_filter,
    dct_filters,
    distance_prior,
)
from repopt.csla.functions import dbb_block, orepa_block, repmlp_block
from repopt.csla.mult import GradMap, GradMult, Multiplier, Shape

__all__ = [
    "LAPLACIAN",
    "SOBEL_X",
    "SOBEL_Y",
    "Block",
    "Branch",
    "ConvBranch",
    "FilterBranch",
    "FrozenConvBranch",
    "FunctionBlock",
    "GradMap",
    "GradMult",
    "IdentityBranch",
    "Multiplier",
    "PlacedBranch",
    "PriorBranch",
    "Shape",
    "Target",
    "average_filter",
    "dbb_block",
    "dct_filters",
    "distance_prior",
    "orepa_block",
    "repmlp_block",
]
