"""RepOpt-VGG: names and shapes of the published release, and the registry."""

import math

import pytest
import torch

import repopt
from repopt.errors import UserError
from repopt.models import list_archs, parse_arch

NANO = "RepOpt-VGG-nano"


@pytest.mark.parametrize(
    ("key", "name", "arguments"),
    [
        ("RepOpt-VGG-B1 target", "RepOpt-VGG-B1", {"mode": "target"}),
        ("RepOpt-VGG-B1 hs", "RepOpt-VGG-B1", {"mode": "hs", "num_classes": 100}),
        ("RepOpt-VGG-B1 repvgg", "RepOpt-VGG-B1", {"mode": "repvgg"}),
        ("RepOpt-VGG-B1 target, use_post_se", "RepOpt-VGG-B1", {"mode": "target", "se": True}),
    ],
)
def test_published_names_and_shapes(published_keys, key, name, arguments):
    with torch.device("meta"):
        state = repopt.create_model(name, **arguments).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == published_keys[key]


def test_csla_and_hs_have_the_same_names():
    hs, csla = (repopt.create_model(NANO, mode=mode) for mode in ("hs", "csla"))
    assert hs.state_dict().keys() == csla.state_dict().keys()
    trained = {name for name, _ in hs.named_parameters()} - {name for name, _ in csla.named_parameters()}
    assert trained == {k for k in hs.state_dict() if k.endswith(("scale_conv.weight", "scale_1x1.weight"))}


@pytest.mark.parametrize(
    ("name", "layers", "channels", "params"),
    [
        ("RepOpt-VGG-B1", [4, 6, 16, 1], [128, 256, 512, 2048], 51.8),
        ("RepOpt-VGG-B2", [4, 6, 16, 1], [160, 320, 640, 2560], 80.3),
        ("RepOpt-VGG-L1", [8, 14, 24, 1], [128, 256, 512, 2048], 76.0),
        ("RepOpt-VGG-L2", [8, 14, 24, 1], [160, 320, 640, 2560], 118.1),
    ],
)
def test_table_1(name, layers, channels, params):
    model = repopt.create_model(name, mode="target")
    stages = [model.stage1, model.stage2, model.stage3, model.stage4]
    assert [len(stage) for stage in stages] == layers
    assert [stage[0].bn.num_features for stage in stages] == channels
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == params


@pytest.mark.parametrize(("name", "mode"), sorted({arch[:2] for arch in list_archs().values()}))
def test_every_architecture(name, mode):
    with torch.device("meta"):
        model = repopt.create_model(name, mode=mode, num_classes=7)
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 7)
    buffers = dict(model.named_buffers())
    kept = {key: value.numel() for key, value in model.state_dict().items() if key not in buffers}
    assert kept == {key: parameter.numel() for key, parameter in model.named_parameters()}
    assert sum(kept.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_scales_start_by_depth():
    scales = repopt.extract_scales(repopt.create_model(NANO, mode="hs"))
    for name, values in scales.items():
        stage, _, block = name.split(".")[0], *name.split(".")[:2]
        index = int(block) if stage != "stage0" else 0
        expected = 1.0 if index == 0 or "scale_identity" in name else math.sqrt(2 / index)
        assert torch.equal(values, torch.full_like(values, expected)), name


@pytest.mark.parametrize("mode", ["hs", "csla", "target", "repvgg", "qarepvgg"])
@pytest.mark.parametrize("se", [False, True])
def test_parameters_of_the_deployed_network(mode, se):
    """Those of the target less one number per channel: a batch norm's two become a bias."""
    target = repopt.create_model(NANO, mode="target", se=se)
    norms = sum(m.num_features for m in target.modules() if isinstance(m, torch.nn.BatchNorm2d))
    deployed = repopt.deploy(repopt.create_model(NANO, mode=mode, se=se))
    assert sum(p.numel() for p in deployed.parameters()) == sum(p.numel() for p in target.parameters()) - norms


def test_every_arch_is_named_once():
    archs = list_archs()
    assert {"RepOpt-VGG-L2-se-target", "RepOpt-VGG-A0-hs", "RepOpt-VGG-B1-target-norepopt"} <= archs.keys()
    assert parse_arch("RepOpt-VGG-B1-target-norepopt") == ("RepOpt-VGG-B1", "target", False)
    assert parse_arch("RepOpt-VGG-B1-target").repopt
    assert not any(parse_arch(f"RepOpt-VGG-B1-{mode}").repopt for mode in ("repvgg", "qarepvgg"))


def test_unknown_names_get_the_nearest():
    with pytest.raises(UserError, match="did you mean 'RepOpt-VGG-B1-target'"):
        parse_arch("repopt-vgg-b1-targt")
    with pytest.raises(UserError, match="needs a mode"):
        parse_arch("RepOpt-VGG-B1")
    with pytest.raises(UserError, match="did you mean 'RepOpt-VGG-B1'"):
        repopt.create_model("RepOpt-VGG-B11", mode="hs")
    with pytest.raises(UserError, match="allowed: csla, hs, qarepvgg, repvgg, target"):
        repopt.create_model("RepOpt-VGG-B1", mode="rep")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("arch", ["RepOpt-VGG-nano", "RepOpt-GhostNet-0.5x", "RepOpt-LK-nano"])
@pytest.mark.parametrize("form", ["target", "deployed", "features"])
def test_torchscript(arch, form):
    model = repopt.create_model(arch, mode="target", num_classes=3).eval()
    model = repopt.deploy(model) if form == "deployed" else model
    model = model.to_features([1, -1]) if form == "features" else model
    scripted = torch.jit.script(model)
    assert scripted.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(scripted(x), model(x))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_torchscript_of_other_forms_is_refused():
    model = repopt.create_model("RepOpt-VGG-nano", mode="hs", num_classes=3)
    with pytest.raises(UserError, match=r"^torch.jit.script takes a network in target mode, or one after repopt.deplo"):
        torch.jit.script(model)
    with pytest.raises(UserError, match=r"^torch.jit.script takes another network with declared blocks after repopt.d"):
        torch.jit.script(torch.nn.Sequential(model.stage1, torch.nn.Flatten()))


@pytest.mark.parametrize("form", ["networks", "images"])
def test_many_networks_at_once(form):
    """torch.func: an ensemble of hyper-searches, and the gradients of every image of a batch."""
    models = [repopt.create_model("RepOpt-VGG-nano", mode="hs", num_classes=3).double().eval() for _ in range(2)]
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def loss(params, buffers, x):
        return torch.func.functional_call(models[0], (params, buffers), (x,)).square().sum()

    if form == "networks":
        params, buffers = torch.func.stack_module_state(models)
        pairs = [(model, images) for model in models]
        found = torch.func.vmap(torch.func.grad(loss), in_dims=(0, 0, None))(params, buffers, images)
    else:
        params, buffers = (dict(named) for named in (models[0].named_parameters(), models[0].named_buffers()))
        pairs = [(models[0], image[None]) for image in images]
        of_one = torch.func.grad(lambda params, buffers, image: loss(params, buffers, image[None]))
        found = torch.func.vmap(of_one, in_dims=(None, None, 0))(params, buffers, images)
    for number, (model, x) in enumerate(pairs):
        model.zero_grad()
        model(x).square().sum().backward()
        for name, param in model.named_parameters():
            torch.testing.assert_close(found[name][number], param.grad, rtol=1e-10, atol=1e-12)
