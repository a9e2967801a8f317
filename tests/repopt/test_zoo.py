"""Networks of timm and torchvision: as their libraries have them, and trained like ours."""

import re
import socket

import pytest
import timm
import torch
from torch import nn

import main_repopt
import repopt
from repopt import checkpoint
from repopt.errors import UserError
from repopt.models import Arch, list_archs, parse_arch, same_arch, zoo
from train import trained

TINY = "timm/test_efficientnet"
GHOST = "timm/repghostnet_050"  # with blocks that `convert_model` takes
DIGITS = ("DATA.DATASET", "digits", "DATA.BATCH_SIZE", 60)


def create(name, num_classes=10, **arguments):
    return repopt.create_model(name, mode="plain", num_classes=num_classes, **arguments)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vgg16", 138_357_544),
        ("vgg16_bn", 138_365_992),
        ("efficientnet_b2", 9_109_994),
        ("efficientnet_b3", 12_233_232),
        ("efficientnet_b4", 19_341_616),
        ("efficientnet_b5", 30_389_784),
    ],
)
def test_networks_that_the_paper_compares_with(library, name, parameters):
    with torch.device("meta"):
        model = create(f"{library}/{name}", num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("timm/efficientnet_b0", 64),
        ("timm/vgg11_bn", 64),
        ("timm/inception_v3", 96),
        ("torchvision/vgg11_bn", 64),
        ("torchvision/googlenet", 64),
        ("torchvision/inception_v3", 96),
    ],
)
def test_one_output_in_training(name, size):
    with torch.device("meta"):
        model = create(name)
        assert model.training
        assert model(torch.empty(2, 3, size, size)).shape == (2, 10)
    assert not getattr(model, "transform_input", False)


@pytest.mark.parametrize("name", [TINY, "torchvision/squeezenet1_1"])
def test_fresh_weights_of_the_seed_without_a_network_connection(monkeypatch, name):
    def refuse(*arguments):
        raise AssertionError("no connection is needed")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(create(name).state_dict())
    one, same, other = states
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_deploying_leaves_it_as_it_is():
    model = create(TINY).eval()
    deployed, images = repopt.deploy(model), torch.randn(2, 3, 32, 32)
    assert [*map(type, deployed.modules())] == [*map(type, model.modules())]
    assert torch.equal(deployed(images), model(images))


def test_activation_checkpointing():
    plain, checkpointed = (create(TINY, use_checkpoint=use).double() for use in (False, True))
    checkpointed.load_state_dict(plain.state_dict())
    images, forwards = torch.randn(4, 3, 32, 32, dtype=torch.float64), []
    for model in (plain, checkpointed):
        model.blocks[0][0].register_forward_pre_hook(lambda *_, model=model: forwards.append(model))
        model(images).square().mean().backward()
    assert (forwards.count(plain), forwards.count(checkpointed)) == (1, 2)
    for p, q in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-13)


def main(*arguments):
    return main_repopt.main([*map(str, arguments)])


def train(output, tag, epochs, *options):
    """The content of the last checkpoint."""
    command = ("--arch", TINY, "--tag", tag, "--output", output, "--opts", *DIGITS, "TRAIN.LR_SCHEDULER.NAME", "step")
    assert main(*command, "TRAIN.EPOCHS", epochs, *options) == 0
    return checkpoint.read(output / TINY / tag / "latest.pth")


def test_training_resuming_and_evaluating(tmp_path, capsys):
    whole = train(tmp_path, "whole", 2, "TRAIN.EMA_ALPHA", 0.01)
    log = (tmp_path / TINY / "whole" / "log_rank0.txt").read_text()
    assert train(tmp_path, "part", 1, "TRAIN.EMA_ALPHA", 0.01)["epoch"] == 0
    part = train(tmp_path, "part", 2, "TRAIN.EMA_ALPHA", 0.01)
    assert part["epoch"] == 1
    for key in ("model", "ema"):
        for name, value in whole[key].items():
            assert torch.equal(value, part[key][name]), name
    capsys.readouterr()
    weights = tmp_path / TINY / "part" / "latest.pth"
    assert main("--arch", TINY, "--output", tmp_path, "--eval", "--resume", weights, "--opts", *DIGITS) == 0
    text = capsys.readouterr().out
    for key in ("val", "ema"):
        found = re.search(rf"{key}: top-1 .* on 1497 images", text)[0]
        assert found in log[log.rindex("epoch 2 val") :]


def test_training_with_activation_checkpointing(tmp_path):
    options = ("TRAIN.USE_CHECKPOINT", True, "TRAIN.ACCUMULATION_STEPS", 2, "TRAIN.CLIP_GRAD", 1.0)
    assert train(tmp_path, "t", 1, *options, "TRAIN.OPTIMIZER.NAME", "adamw")["epoch"] == 0


def test_throughput(tmp_path, capsys):
    arguments = ("--arch", "torchvision/squeezenet1_1", "--output", tmp_path, "--throughput", "--batch-size", 2)
    assert main(*arguments, "--opts", "DATA.IMG_SIZE", 32) == 0
    assert re.search(r"torchvision/squeezenet1_1 deployed: [\d.]+ images/s", capsys.readouterr().out)


@pytest.mark.parametrize("name", [TINY, "torchvision/squeezenet1_1", "torchvision/regnet_y_400mf"])
@pytest.mark.parametrize("classes", [1, 7])
def test_back_from_its_weights_alone(tmp_path, name, classes):
    model = create(name, num_classes=classes)
    checkpoint.write(model.state_dict(), tmp_path / "weights.pth")
    source = trained.read(tmp_path / "weights.pth", name)
    assert source.arch == (name, "plain", False)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(source.network()(images), model.eval()(images))


def test_the_weights_of_another_are_refused(tmp_path):
    checkpoint.write(create("timm/test_resnet").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match="weights are not those of this model"):
        trained.read(tmp_path / "weights.pth", TINY).network()


def test_which_architectures_are_the_same():
    ghost = parse_arch("ghost-target")
    assert same_arch("RepOpt-GhostNet-0.5x-target", ghost)
    assert not same_arch("ghost-target-norepopt", ghost)
    assert not same_arch("timm/no_such", ghost)
    tiny = parse_arch(TINY)
    assert tiny == Arch(TINY, "plain", False)
    assert same_arch(TINY, tiny)
    assert not same_arch("timm/test_resnet", tiny)
    assert not any(same_arch(arch, tiny) for arch in list_archs())
    target = parse_arch(f"{GHOST}-target")
    assert same_arch(f"{GHOST}-target", target)
    assert not any(same_arch(f"{GHOST}{ending}", target) for ending in ("", "-hs", "-target-norepopt", "-x"))


def test_what_the_endings_stand_for():
    endings = {"": ("plain", False), "-hs": ("hs", False), "-csla": ("csla", False), "-target": ("target", True)}
    for ending, stands_for in (endings | {"-target-norepopt": ("target", False)}).items():
        assert parse_arch(f"{GHOST}{ending}") == (GHOST, *stands_for)
    assert not parse_arch(f"{GHOST}-target").takes_prior
    for name in (TINY, "torchvision/regnet_y_400mf"):  # of which the second cannot be made without values
        assert parse_arch(f"{name}-target") == (name, "plain", True)
        assert parse_arch(f"{name}-target").takes_prior


def test_a_network_is_looked_into_for_an_ending_only(monkeypatch):
    monkeypatch.setattr(zoo, "modes", lambda name: pytest.fail(f"{name} was looked into"))
    parse_arch(GHOST)
    create(TINY)


@pytest.mark.parametrize("name", ["timm/repghostnet_050", "timm/mobileone_s0", "timm/repvit_m0_9", "timm/fastvit_t8"])
def test_modes_of_networks_with_registered_blocks(name):
    """As `convert_model` makes them of the network of the same seed; looking into a network draws nothing."""
    zoo._module_types.cache_clear()
    torch.manual_seed(3)
    expected = repopt.convert_model(timm.create_model(name.removeprefix("timm/"), num_classes=7), "target")
    torch.manual_seed(3)
    model = repopt.create_model(name, mode="target", num_classes=7)
    for (key, value), other in zip(expected.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    with pytest.raises(UserError, match=r"unknown mode of .*'targt'; did you mean 'target'.*csla, hs, plain, target"):
        repopt.create_model(name, mode="targt")
    with pytest.raises(UserError, match=f"{name} cannot be made as you say: .*'strides'"):
        repopt.create_model(name, mode="target", strides=(1, 1, 1, 1, 1))


@pytest.mark.parametrize("name", ["timm/repghostnet_050", "timm/mobileone_s0"])
def test_csla_and_target_of_one_seed_are_the_same_function_and_stay_it(name):
    searched = repopt.extract_scales(repopt.create_model(name, mode="hs", num_classes=7))
    scales = {key: value.double() * (0.5 + torch.rand(len(value))) for key, value in searched.items()}
    images, labels = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.arange(8) % 7
    outputs = {"csla": [], "target": []}
    for mode, found in outputs.items():
        torch.manual_seed(3)
        model = repopt.create_model(name, mode=mode, num_classes=7).double()
        torch.manual_seed(4)
        repopt.initialize(model, scales)
        settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}
        optimizer = repopt.build_optimizer("sgd", model, scales if mode == "target" else None, **settings)
        for seed in range(3):
            torch.manual_seed(seed)  # of dropout
            found.append(model(images))
            optimizer.zero_grad()
            nn.functional.cross_entropy(found[-1], labels).backward()
            optimizer.step()
    for csla, target in zip(*outputs.values(), strict=True):
        torch.testing.assert_close(csla, target, rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        assert (outputs["csla"][0] - outputs["csla"][2]).norm() > 0.1 * outputs["csla"][0].norm()


MISTAKES = {
    "name": (["--arch", "timm/efficientnet_b22"], "did you mean 'timm/efficientnet_b2'"),
    "search without blocks": (
        ["--arch", "timm/efficientnet_b2-hs"],
        "timm/efficientnet_b2 has no multi-branch blocks .* no timm/efficientnet_b2-hs: timm/efficientnet_b2-target ",
    ),
    "csla without blocks": (["--arch", f"{TINY}-csla"], f"{TINY} has no multi-branch blocks .* no {TINY}-csla"),
    "norepopt without blocks": (
        ["--arch", f"{TINY}-target-norepopt"],
        f"{TINY} is the plain network itself, trained by the plain rule: leave -target-norepopt out",
    ),
    "name with an ending": (["--arch", "timm/repghostnet_05-hs"], "'timm/repghostnet_05'; did you mean 'timm/repghost"),
    "ending": (["--arch", "timm/repghostnet_050-targt"], "did you mean 'timm/repghostnet_050'"),
    "no scales": (["--arch", f"{GHOST}-target"], "needs searched scales: give --scales-path"),
    "name with pretrained weights": (["--arch", "timm/efficientnet_b2.ra_in1k"], "did you mean 'timm/efficientnet_b2'"),
    "name of torchvision": (["--arch", "torchvision/vgg16bn"], "did you mean 'torchvision/vgg16_bn'"),
    "library": (["--arch", "tim/vgg16"], r"library of networks 'tim'; did you mean 'timm'\? \(allowed: timm, "),
    "ours in timm": (["--arch", "timm/repopt_vgg_nano"], "needs a mode: RepOpt-VGG-nano-hs, "),
    "segmentation": (["--arch", "torchvision/fcn_resnet50"], "unknown architecture 'torchvision/fcn_resnet50'"),
    "detection": (["--arch", "torchvision/ssd300_vgg16"], "unknown architecture 'torchvision/ssd300_vgg16'"),
    "quantized": (["--arch", "torchvision/quantized_resnet18"], "unknown architecture 'torchvision/quantized_"),
    "video": (["--arch", "torchvision/r3d_18"], "unknown architecture 'torchvision/r3d_18'"),
    "scales": (["--arch", TINY, "--scales-path", "scales.pth"], "takes no searched scales"),
    "strides": (["--arch", TINY, "--opts", "MODEL.STRIDES", "(1, 1, 1, 1, 1)"], "MODEL.STRIDES is of our networks"),
    "strides of one with blocks": (
        ["--arch", f"{GHOST}-target", "--opts", "MODEL.STRIDES", "(1, 1, 1, 1, 1)"],
        f"MODEL.STRIDES is of our networks, and {GHOST}-target is of another library: leave it out",
    ),
    "initial scales": (
        ["--arch", f"{GHOST}-hs", "--opts", "MODEL.INITIAL_SCALES", "one"],
        f"MODEL.INITIAL_SCALES is of our networks, and {GHOST}-hs is of another library: leave it out",
    ),
    "prior": (
        ["--arch", f"{GHOST}-target", "--opts", "MODEL.PRIOR", "acnet"],
        f"MODEL.PRIOR is of another library's network without branches of its own .* not of {GHOST}-target",
    ),
    "checkpointing": (["--arch", "timm/pit_ti_224", "--use-checkpoint"], "timm/pit_ti_224 cannot compute activations"),
    "checkpointing in torchvision": (
        ["--arch", "torchvision/squeezenet1_1", "--use-checkpoint"],
        "torchvision/squeezenet1_1 cannot compute activations",
    ),
    "size": (["--arch", "timm/vit_tiny_patch16_224"], "timm/vit_tiny_patch16_224 does not take images of 32 px: "),
    "size of torchvision": (["--arch", "torchvision/alexnet"], "torchvision/alexnet does not take images of 32 px: "),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(name, tmp_path, in_one_line):
    arguments, message = MISTAKES[name]
    assert main("--output", tmp_path, *arguments, "--opts", *DIGITS) == 2
    in_one_line("main_repopt.py", message, {})


def test_a_run_goes_on_with_its_own_architecture_only(tmp_path, in_one_line):
    train(tmp_path, "t", 1)
    weights = tmp_path / TINY / "t" / "latest.pth"
    assert main("--arch", "timm/test_resnet", "--output", tmp_path, "--resume", weights, "--opts", *DIGITS) == 2
    in_one_line("main_repopt.py", "MODEL.ARCH was 'timm/test_efficientnet' .* 'timm/test_resnet' now", {})


def test_mistakes_of_who_creates_one():
    with pytest.raises(UserError, match=r"unknown mode of timm/vgg16 'target' \(allowed: plain\)"):
        repopt.create_model("timm/vgg16", mode="target")
    with pytest.raises(UserError, match="did you mean 'repvgg'"):
        repopt.create_model("RepOpt-VGG-nano", mode="repvg")


def test_a_library_that_changed_is_no_mistake_of_the_users(monkeypatch):
    def create_without_classes(name):
        return nn.Identity()

    library = zoo.Library(lambda: ["vgg16"], create_without_classes)
    monkeypatch.setitem(zoo.LIBRARIES, "timm", library)
    with pytest.raises(TypeError):
        create("timm/vgg16")


def test_trying_an_image_leaves_no_trace():
    model = create(TINY)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    zoo.check_image_size(TINY, model, 3, 32)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
