"""The two rules over a whole model."""

import pytest
import torch

import repopt
from repopt.errors import UserError
from repopt.layers import RepConv2d

NANO = "RepOpt-VGG-nano"


def create(mode, **arguments):
    return repopt.create_model(NANO, mode=mode, num_classes=10, **arguments)


@pytest.fixture
def scales():
    return {name: torch.randn_like(values) for name, values in repopt.extract_scales(create("hs")).items()}


def test_target_keeps_the_rest_of_its_initialization(scales):
    model = create("target")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    repopt.initialize(model, scales)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{path}.conv.weight" for path, m in model.named_modules() if isinstance(m, RepConv2d)}


def test_multipliers_by_name_and_their_size(scales):
    model = create("target")
    mults = repopt.grad_mults(model, scales, degree=1)
    parameters = dict(model.named_parameters())
    assert mults.keys() == {name for name in parameters if name.endswith("conv.weight")}
    name = "stage3.4.conv.weight"
    s3, s1 = scales["stage3.4.scale_conv.weight"], scales["stage3.4.scale_1x1.weight"]
    expected = (s3**2).view(-1, 1, 1, 1).expand(parameters[name].shape).clone()
    expected[:, :, 1, 1] += (s1**2).view(-1, 1) + torch.eye(len(s1))
    torch.testing.assert_close(mults[name].dense(), expected)


@pytest.mark.parametrize("name", ["B1", "B2", "L1", "L2"])
def test_released_scales_fit_their_targets(shared, name):
    scales = repopt.load_scales(shared / "released_scales" / f"RepOpt-VGG-{name}-scales.pth")
    model = repopt.create_model(f"RepOpt-VGG-{name}", mode="target")
    repopt.initialize(model, scales)
    mults = repopt.grad_mults(model, scales, degree=1)
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(tensor.numel() for mult in mults.values() for tensor in mult.tensors()) < 0.003 * parameters
    assert sum(int((values < 0).sum()) for values in scales.values()) > 0
    if name == "B1":
        searched = [values for name, values in scales.items() if "identity" not in name]
        assert sum(int((values < 0).sum()) for values in searched) == 156
        assert sum(values.numel() for values in searched) == 24704
        other = repopt.create_model("RepOpt-VGG-B2", mode="target")
        with pytest.raises(UserError, match=r"block 'stage1.0' expects .* \(160,\), found \(128,\)"):
            repopt.initialize(other, scales)


def test_files_written_here_read_as_the_published_ones(shared, tmp_path):
    published = torch.load(shared / "released_scales" / "RepOpt-VGG-B1-scales.pth", weights_only=True)
    model = repopt.create_model("RepOpt-VGG-B1", mode="hs")
    repopt.save_scales(repopt.extract_scales(model), tmp_path / "scales.pth")
    written = torch.load(tmp_path / "scales.pth", weights_only=True)
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in published.items()}


def test_a_whole_search_state_serves_as_scales():
    hs = create("hs")
    for module in hs.modules():
        if isinstance(module, RepConv2d):
            for branch in module.block.branches:
                torch.nn.init.normal_(module.values(branch.searched_name))
    scales = {name: value for name, value in hs.state_dict().items() if value.dim() == 1}
    a, b = create("target"), create("target")
    for model, given in ((a, scales), (b, repopt.extract_scales(hs))):
        torch.manual_seed(1)
        repopt.initialize(model, given)
    assert torch.equal(a.stage2[3].conv.weight, b.stage2[3].conv.weight)


def test_scales_that_do_not_fit_are_named(scales):
    model = create("target")
    with pytest.raises(UserError, match=r"the model has no such block"):
        repopt.initialize(model, {**scales, "stage3.16.scale_conv.weight": torch.ones(64)})
    del scales["stage2.1.scale_1x1.weight"]
    with pytest.raises(UserError, match=r"block 'stage2.1' needs 'stage2.1.scale_1x1.weight'"):
        repopt.grad_mults(model, scales, degree=1)
    with pytest.raises(UserError, match="needs a model in target mode, not csla"):
        repopt.grad_mults(create("csla"), scales, degree=1)
    with pytest.raises(UserError, match="csla or target mode, not hs"):
        repopt.initialize(create("hs"), scales)


def test_a_model_without_blocks_is_no_silent_success(scales):
    for model in (create("repvgg"), torch.nn.Linear(2, 2)):
        for call in (
            lambda m: repopt.initialize(m, scales),
            lambda m: repopt.build_optimizer("sgd", m, scales, lr=0.1),
            repopt.extract_scales,
        ):
            with pytest.raises(UserError, match="no declared blocks"):
                call(model)


@pytest.mark.parametrize("mode", ["hs", "csla", "target", "repvgg"])
def test_what_is_decayed(mode):
    model = create(mode, se=True)
    decayed, rest = repopt.param_groups(model, 0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {name for name, _ in decayed["params"]}
    expected = {n for n, p in model.named_parameters() if p.dim() > 1 or n.endswith("scale_identity.weight")}
    assert names == expected
    assert ("stage1.1.scale_identity.weight" in names) == (mode in ("hs", "csla"))
    assert names | {name for name, _ in rest["params"]} == {name for name, _ in model.named_parameters()}


def test_frozen_parameters_are_left_out():
    model = create("target")
    model.linear.requires_grad_(requires_grad=False)
    names = {name for group in repopt.param_groups(model, 0.1) for name, _ in group["params"]}
    assert names == {name for name, _ in model.named_parameters()} - {"linear.weight", "linear.bias"}


def test_build_optimizer(scales):
    model = create("target")
    optimizer = repopt.build_optimizer("sgd", model, scales, lr=0.1, momentum=0.9, nesterov=True, eps=1.0)
    assert isinstance(optimizer, repopt.RepSGD)
    assert optimizer.defaults["momentum"] == 0.9
    assert optimizer.grad_mults.keys() == repopt.grad_mults(model, scales, degree=1).keys()
    assert type(repopt.build_optimizer("adamw", model, lr=0.1, momentum=0.9)) is torch.optim.AdamW
    with pytest.raises(UserError, match="unknown optimizer 'sdg'; did you mean 'sgd'"):
        repopt.build_optimizer("sdg", model, lr=0.1)
    with pytest.raises(UserError, match="did you mean 'momentum'"):
        repopt.build_optimizer("sgd", model, lr=0.1, momentun=0.9)
    with pytest.raises(UserError, match=r"optimizer 'sgd': .*-1"):
        repopt.build_optimizer("sgd", model, lr=-1)


def test_scales_of_a_part_of_the_model(scales):
    model = create("target")
    whole = torch.nn.ModuleDict({"backbone": model, "head": torch.nn.Linear(2, 2)})
    mults = repopt.grad_mults(model, scales, degree=1)
    of_whole = repopt.bind(whole, scales, prefix="backbone").grad_mults(degree=1)
    assert list(of_whole) == [f"backbone.{name}" for name in mults]
    assert all(torch.equal(of_whole[f"backbone.{name}"].dense(), mult.dense()) for name, mult in mults.items())
    with pytest.raises(UserError, match=r"needs 'backbone\.stage0"):
        repopt.bind(whole, scales, prefix="neck")


def test_scales_are_bound_once(scales, monkeypatch):
    """What follows from bound scales is what follows from plain ones, and nothing looks at them again."""
    model, other = create("target"), create("target")
    bound = repopt.bind(torch.compile(model), scales | {"linear.bias": torch.ones(10)})
    assert bound.model is model
    assert bound.scales.keys() == scales.keys()
    monkeypatch.setattr("repopt.scales.invalid_reason", None)  # cannot be called
    assert repopt.bind(model, bound) is bound
    assert repopt.bind(model, bound).scales == bound.scales
    torch.manual_seed(0)
    repopt.initialize(model, bound, identity="one")
    optimizer = repopt.build_optimizer("adamw", model, bound, lr=0.1)
    means = repopt.constant_scales(model, "channel-mean", bound)
    monkeypatch.undo()
    torch.manual_seed(0)
    repopt.initialize(other, scales, identity="one")
    assert torch.equal(model.stage2[3].conv.weight, other.stage2[3].conv.weight)
    for degree, found in ((0, optimizer.grad_mults), (1, bound.grad_mults(1))):
        expected = repopt.grad_mults(other, scales, degree=degree)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].dense(), mult.dense()) for name, mult in expected.items())
    for name, values in means.items():
        torch.testing.assert_close(values, scales[name].mean().expand_as(values))


def test_bound_scales_clip_as_the_function_does(scales):
    model = create("target")
    bound = repopt.bind(model, scales)
    gradients = [torch.randn_like(param) for param in model.parameters()]
    found = []
    for clip in (
        lambda: bound.clip_grad_norm_(2.0),
        lambda: repopt.clip_grad_norm_(model.named_parameters(), 2.0, repopt.grad_mults(model, scales, degree=1)),
    ):
        for param, gradient in zip(model.parameters(), gradients, strict=True):
            param.grad = gradient.clone()
        found.append([clip(), *(param.grad for param in model.parameters())])
    assert found[0][0] > 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_scales_that_are_bound_to_another_model_are_matched_again(scales):
    bound = repopt.bind(create("csla"), scales)
    model = create("target")
    assert repopt.bind(model, bound).model is model
    with pytest.raises(UserError, match="do not fit the model"):
        repopt.initialize(repopt.create_model("RepOpt-VGG-A0", mode="target"), bound)
    with pytest.raises(UserError, match="target mode, not csla"):
        bound.grad_mults(1)
