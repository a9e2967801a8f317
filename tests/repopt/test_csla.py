"""The algebra against its definition, written out."""

from dataclasses import dataclass

import pytest
import torch
from check_equivalency import ALL_BLOCKS, BLOCKS, FIXED, FUNCTIONS

from repopt.csla import (
    Block,
    ConvBranch,
    FilterBranch,
    FrozenConvBranch,
    FunctionBlock,
    GradMult,
    IdentityBranch,
    PriorBranch,
    Target,
    average_filter,
    dct_filters,
)
from repopt.errors import UserError

torch.manual_seed(0)


def random_scales(block):
    return {b.searched_name: torch.randn(block.target.shape[0], dtype=torch.float64) for b in block.branches}


def column(values, kernel):
    return values.view(-1, *[1] * (kernel.dim() - 1))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("degree", [0, 1])
def test_grad_mult_is_the_sum_over_branches(name, degree):
    block = BLOCKS[name].block
    scales = random_scales(block)
    expected = torch.zeros(block.target.shape, dtype=torch.float64)
    for branch in block.branches:
        ones = torch.ones(branch.kernel_shape(block.target), dtype=torch.float64)
        constant = scales[branch.scale].abs() ** (1 + degree) if branch.scale else torch.ones_like(scales["identity"])
        expected += branch.embed(column(constant, ones) * ones, block.target)
    mult = block.grad_mult(scales, degree)
    torch.testing.assert_close(mult.dense(), expected, rtol=1e-14, atol=0)
    gradient = torch.randn(block.target.shape, dtype=torch.float64)
    before = gradient.clone()
    torch.testing.assert_close(mult(gradient), gradient * expected, rtol=1e-14, atol=0)
    assert torch.equal(gradient, before)


LINEAR = sorted(ALL_BLOCKS.keys() - FUNCTIONS.keys())


@pytest.mark.parametrize("name", LINEAR)
def test_merge_is_the_sum_over_branches(name):
    block = ALL_BLOCKS[name].block
    scales = random_scales(block)
    kernels = {
        b.kernel: torch.randn(b.kernel_shape(block.target), dtype=torch.float64, requires_grad=True)
        for b in block.branches
    }
    for scale in scales.values():
        scale.requires_grad_()
    expected = 0
    for branch in block.branches:
        kernel = kernels[branch.kernel]
        whole = branch.embed(kernel, block.target)
        expected = expected + (column(scales[branch.scale], whole) * whole if branch.scale else whole)
    merged = block.merge(kernels, scales)
    torch.testing.assert_close(merged, expected, rtol=1e-14, atol=1e-15)
    leaves = [*kernels.values(), *(scales[b.scale] for b in block.branches if b.scale)]
    gradient = torch.randn(block.target.shape, dtype=torch.float64)
    actual = torch.autograd.grad(merged, leaves, gradient)
    for one, other in zip(actual, torch.autograd.grad(expected, leaves, gradient), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


@dataclass(frozen=True)
class Transposed(ConvBranch):
    """Lies across the target kernel."""

    def scatter_view(self, whole, target):
        return whole.transpose(2, 3)


@dataclass(frozen=True)
class PerChannel(ConvBranch):
    """One number per filter, with a scale."""

    def kernel_shape(self, target):
        return target.shape[:1]

    def scatter_view(self, whole, target):
        return whole[:, 0, 1, 1]

    def grad_mult(self, scale, target, degree):
        kernel = scale.new_zeros(target.shape[0], 1, 3, 3)
        kernel[:, :, 1, 1] = scale[:, None].abs() ** (1 + degree)
        return GradMult(kernel, None, target.shape)


@pytest.mark.parametrize("compiling", [False, True])
def test_branches_of_other_kinds_are_merged_as_they_are_embedded(monkeypatch, compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    block = Block(Target("w", (3, 1, 3, 3)), (Transposed("a", "s", size=3), PerChannel("b", "t")))
    kernels = {b.kernel: torch.randn(b.kernel_shape(block.target), requires_grad=True) for b in block.branches}
    scales = {b.scale: torch.randn(3, requires_grad=True) for b in block.branches}
    expected = (column(scales["s"], kernels["a"]) * kernels["a"]).transpose(2, 3).clone()
    expected[:, 0, 1, 1] += scales["t"] * kernels["b"]
    merged = block.merge(kernels, scales)
    torch.testing.assert_close(merged, expected)
    leaves, gradient = [*kernels.values(), *scales.values()], torch.randn(3, 1, 3, 3)
    torch.testing.assert_close(
        torch.autograd.grad(merged, leaves, gradient), torch.autograd.grad(expected, leaves, gradient)
    )


@pytest.mark.parametrize("compiling", [False, True])
def test_a_merged_kernel_and_its_gradients_lie_in_memory_as_the_largest_branch(monkeypatch, compiling):
    """Otherwise every gradient of a channels_last network is copied once more."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    block = BLOCKS["3x3 + 1x1 + identity"].block
    kernels = {b.kernel: torch.randn(b.kernel_shape(block.target)) for b in block.branches}
    largest = block.branches[0].kernel
    kernels[largest] = kernels[largest].contiguous(memory_format=torch.channels_last).requires_grad_()
    scales = {b.scale: torch.randn(block.target.shape[0]) for b in block.branches if b.scale}
    merged = block.merge(kernels, scales)
    upstream = torch.randn(block.target.shape).contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(merged, kernels[largest], upstream)
    assert merged.stride() == gradient.stride() == kernels[largest].stride()


def test_merging_leaves_kernels_and_gradients_alone():
    block = Block(Target("w", (4, 4, 1, 1)), (IdentityBranch("i"), ConvBranch("a", "s", size=1)))
    kernels = {b.kernel: torch.randn(b.kernel_shape(block.target), requires_grad=True) for b in block.branches}
    before = {name: kernel.detach().clone() for name, kernel in kernels.items()}
    gradient = torch.randn(block.target.shape)
    kept = gradient.clone()
    block.merge(kernels, {"s": torch.ones(4)}).backward(gradient)
    kernels["i"].grad.add_(1)
    assert torch.equal(gradient, kept)
    assert all(torch.equal(kernels[name], kernel) for name, kernel in before.items())


@pytest.mark.parametrize("name", BLOCKS)
def test_an_embedding_writes_every_entry_once(name):
    block = BLOCKS[name].block
    for branch in block.branches:
        kernel = torch.randn(branch.kernel_shape(block.target), dtype=torch.float64)
        whole = branch.embed(kernel, block.target)
        assert whole.shape == block.target.shape
        assert torch.equal(branch.scatter_view(whole, block.target).reshape(kernel.shape), kernel)
        assert whole.count_nonzero() == kernel.numel()


@pytest.mark.parametrize("shape", [(6, 6), (6, 6, 3), (6, 6, 3, 3), (6, 6, 3, 3, 3)])
def test_any_number_of_spatial_dimensions(shape):
    block = Block(Target("w", shape), (ConvBranch("a", "s", size=1), IdentityBranch("i")))
    s = torch.randn(6, dtype=torch.float64)
    dense = block.grad_mult({"s": s}, degree=1).dense()
    centre = (slice(None), slice(None), *[k // 2 for k in shape[2:]])
    torch.testing.assert_close(dense[centre], (s**2).view(-1, 1) + torch.eye(6, dtype=torch.float64))
    assert dense.sum() == pytest.approx(float(dense[centre].sum()))


def test_a_multiplier_is_small():
    block = Block(Target("w", (256, 256, 3, 3)), (ConvBranch("a", "s", size=3), IdentityBranch("i")))
    mult = block.grad_mult({"s": torch.ones(256)}, degree=1)
    assert sum(tensor.numel() for tensor in mult.tensors()) == 256 * 9 + 256
    assert mult.dense().numel() == 256 * 256 * 9


def test_channels_last_gradients():
    block = BLOCKS["3x3 + 1x1 + identity, 2 groups"].block
    mult = block.grad_mult(random_scales(block), 1)
    gradient = torch.randn(block.target.shape, dtype=torch.float64).to(memory_format=torch.channels_last)
    torch.testing.assert_close(mult(gradient), gradient * mult.dense(), rtol=1e-14, atol=0)


def test_initial_kernels_are_what_the_framework_draws():
    block = Block(Target("w", (8, 4, 3, 3)), (ConvBranch("a", "s", size=3), ConvBranch("b", "t", size=1)))
    torch.manual_seed(3)
    kernels = block.init_kernels({})
    torch.manual_seed(3)
    assert torch.equal(kernels["a"], torch.nn.Conv2d(4, 8, 3, bias=False).weight)
    assert torch.equal(kernels["b"], torch.nn.Conv2d(4, 8, 1, bias=False).weight)


def test_identity_kernels_start_searched_or_at_one():
    block = Block(Target("w", (4, 4, 1, 1)), (IdentityBranch("i"),))
    searched = torch.arange(4.0)
    assert torch.equal(block.init_kernels({"i": searched})["i"], searched)
    assert torch.equal(block.init_kernels({})["i"], torch.ones(4))


@dataclass(frozen=True)
class Squared(ConvBranch):
    """No linear map."""

    def embed(self, kernel, target):
        return super().embed(kernel**2, target)


@dataclass(frozen=True)
class Forgetful(ConvBranch):
    """The adjoint forgets what the map doubles."""

    def embed(self, kernel, target):
        return super().embed(2 * kernel, target)


@dataclass(frozen=True)
class Shared(ConvBranch):
    """All input channels have the same entries: those of one."""

    def scatter_view(self, whole, target):
        return super().scatter_view(whole, target)[:, :1].expand(-1, target.shape[1], -1, -1)


@dataclass(frozen=True)
class Partial(ConvBranch):
    """A place for fewer entries than the kernel has."""

    def scatter_view(self, whole, target):
        return super().scatter_view(whole, target)[:, 1:]


@pytest.mark.parametrize(
    ("branch", "why"),
    [
        (Squared("w", "s"), "constant linear map"),
        (Forgetful("w", "s"), "its adjoint"),
        (Shared("w", "s"), "does not take a kernel"),
        (Partial("w", "s"), "does not take a kernel"),
    ],
)
def test_what_is_not_the_map_that_it_says_is_refused(branch, why):
    with pytest.raises(UserError, match=why):
        Block(Target("w", (4, 4, 3, 3)), (branch,))


@dataclass(frozen=True)
class Miscounted(ConvBranch):
    """Its multiplier is not what its embedding says."""

    wrong: int = 1

    def grad_mult(self, scale, target, degree):
        return super().grad_mult(2 * scale if degree == self.wrong else scale, target, degree)


@pytest.mark.parametrize("degree", [0, 1])
def test_a_multiplier_that_is_not_that_of_the_map_is_refused(degree):
    with pytest.raises(UserError, match=f"grad_mult of degree {degree} is not"):
        Block(Target("w", (4, 4, 3, 3)), (Miscounted("a", "s", size=3, wrong=degree),))


@pytest.mark.parametrize("branches", [(), (ConvBranch("a", "a"),), (ConvBranch("a", "s"), ConvBranch("a", "t"))])
def test_names_of_their_own(branches):
    with pytest.raises(UserError, match="names of their own"):
        Block(Target("w", (4, 4, 3, 3)), branches)


@pytest.mark.parametrize(
    ("target", "branch"),
    [
        (Target("w", (4, 4, 3, 3)), ConvBranch("a", "s", size=5)),
        (Target("w", (4, 4, 3, 3)), ConvBranch("a", "s", size=2)),
        (Target("w", (4, 2, 3, 3)), IdentityBranch("i")),
        (Target("w", (8, 4, 3, 3)), IdentityBranch("i")),
        (Target("w", (4, 4, 2, 2)), IdentityBranch("i")),
    ],
)
def test_branches_without_a_place_are_refused(target, branch):
    with pytest.raises(UserError, match="no place"):
        Block(target, (branch,))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_part_of_a_multiplier_is_that_part_of_it(groups):
    """Wherever it is cut, within a group of the identity's diagonal too."""
    target = Target("w", (12, 12 // groups, 3, 3), groups)
    block = Block(target, (ConvBranch("a", "s", size=3), IdentityBranch("i")))
    mult = block.grad_mult({"s": torch.randn(12, dtype=torch.float64)}, 1)
    whole = mult.dense()
    identity = torch.zeros(target.shape, dtype=torch.float64)
    identity[torch.arange(12), torch.arange(12) % (12 // groups), 1, 1] = 1
    assert torch.equal(whole, mult.filter + identity)
    for start in range(12):
        for stop in range(start + 1, 13):
            assert torch.equal(mult.rows(start, stop).dense(), whole[start:stop]), (start, stop)


@pytest.mark.parametrize("name", LINEAR)
def test_of_degree_1_it_is_the_map_after_its_adjoint(name):
    """P = sum_k s_k A_k A_k^T s_k, its quadratic form and its diagonal, against matrices written out."""
    block = ALL_BLOCKS[name].block
    scales, size = random_scales(block), torch.Size(block.target.shape).numel()
    units = torch.eye(size, dtype=torch.float64).view(size, *block.target.shape)
    if size > 700:  # 31 x 31: some of the columns
        units = units[torch.randperm(size)[:50]]
    mult, expected = block.grad_mult(scales, 1), torch.zeros_like(units)
    for branch in block.branches:
        scale = scales[branch.scale] if branch.scale else torch.ones(block.target.shape[0], dtype=torch.float64)
        for unit, column_of_p in zip(units, expected, strict=True):
            kernel = branch.adjoint(column(scale, unit) * unit, block.target).reshape(branch.kernel_shape(block.target))
            column_of_p += column(scale, unit) * branch.embed(kernel, block.target)
    found = torch.stack([mult(unit) for unit in units])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.stack([mult.dense()[unit.bool()].squeeze() for unit in units]),
        (expected * units).flatten(1).sum(1),
        rtol=1e-12,
        atol=1e-12,
    )
    gradient = torch.randn(block.target.shape, dtype=torch.float64)
    square = sum((c * v.square()).sum() for c, v in mult.squares(gradient, torch.float64))
    torch.testing.assert_close(square, (gradient * mult(gradient)).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inputs", [2, 16])  # patterns one by one, and a matrix per filter
def test_a_part_of_a_map_is_that_part_of_it(inputs):
    average = FilterBranch("a", "s", filter=average_filter((3, 3)))
    block = Block(Target("w", (inputs, inputs, 3, 3)), (average, ConvBranch("b", "t", size=3), IdentityBranch("i")))
    mult = block.grad_mult(random_scales(block), 1)
    assert (mult.matrices is None) == (inputs == 2)
    gradient = torch.randn(block.target.shape, dtype=torch.float64)
    whole = mult(gradient)
    for start, stop in ((0, 1), (1, inputs), (0, inputs)):
        torch.testing.assert_close(mult.rows(start, stop)(gradient[start:stop]), whole[start:stop], rtol=1e-13, atol=0)


def test_a_map_that_mixes_filters_has_no_parts():
    block = FIXED["3x3 + 1x1 before a frozen 3x3"].block
    with pytest.raises(UserError, match="train with DDP"):
        block.grad_mult(random_scales(block), 1).rows(0, 2)


@pytest.mark.parametrize("name", ["3x3 + 1x1 + average pooling", "3x3 + 1x1 before a frozen 3x3"])
def test_no_constants_of_degree_0_where_entries_are_mixed(name):
    block = FIXED[name].block
    with pytest.raises(UserError, match=r"constants follow SGD alone where branch .* \(repopt.hold_branches"):
        block.grad_mult(random_scales(block), 0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_kernels_has_the_gradients_of_autograd_and_no_constants(name):
    block = FUNCTIONS[name].block
    kernels = {own: kernel.double().requires_grad_() for own, kernel in block.init_kernels({}).items()}
    gradient = torch.randn(block.target.shape, dtype=torch.float64)
    expected = torch.autograd.grad(block.merge(kernels, {}), [*kernels.values()], gradient)
    found = block.branch_gradients(gradient, kernels, {})
    for own, value in zip(kernels, expected, strict=True):
        torch.testing.assert_close(found[own], value, rtol=1e-13, atol=1e-14)
    with pytest.raises(UserError, match="no constants follow a block that is a function"):
        block.grad_mult({}, 1)


def test_a_frequency_basis_is_orthonormal():
    for size in ((3,), (3, 3), (2, 3, 5)):
        basis = torch.tensor(dct_filters(size), dtype=torch.float64).flatten(1)
        assert basis.shape == (torch.Size(size).numel(),) * 2
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("branch", "what"),
    [
        (ConvBranch("a", "s", size=3, dilation=2), r"size \(3, 3\) and dilation 2 .* has no place"),
        (FilterBranch("a", "s", filter=average_filter((5, 5))), r"\(5, 5\), and the target kernel \(3, 3\)"),
        (PriorBranch("a", "s", prior=(1.0, 2.0)), r"\(2,\), and the target kernel"),
        (FrozenConvBranch("a", "s", frozen=torch.ones(3, 2, 3, 3)), r"is \(3, 2, 3, 3\)"),
    ],
)
def test_fixed_numbers_of_another_size_are_refused(branch, what):
    with pytest.raises(UserError, match=what):
        Block(Target("w", (4, 4, 3, 3)), (branch,))


def test_a_function_of_another_shape_is_refused():
    with pytest.raises(UserError, match=r"returns \(4, 4\), not \(4, 3\)"):
        FunctionBlock(Target("w", (4, 3)), function=lambda theta: theta["a"], shapes={"a": (4, 4)})
    with pytest.raises(UserError, match="unknown kernel of a function"):
        FunctionBlock(Target("w", (4, 4)), function=lambda theta: theta["a"], shapes={"a": (4, 4)}, initial={"b": 1.0})


def test_a_map_takes_gradients_of_less_precision():
    block = FIXED["3x3 + Sobel x + Sobel y + Laplacian"].block
    mult = block.grad_mult(random_scales(block), 1).to_like(torch.ones((), dtype=torch.bfloat16))
    gradient = torch.randn(block.target.shape).bfloat16()
    assert mult(gradient).dtype == torch.float32
    assert torch.equal(mult(gradient), mult(gradient.float()))
