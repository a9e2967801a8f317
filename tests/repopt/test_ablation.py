"""What the paper's ablations change (tables 4, 6 and 9), as switches of the models and of the command line."""

import pytest
import torch

import main_repopt
import repopt
from repopt import checkpoint
from repopt.errors import UserError
from repopt.models.network import Network
from train.command import EXIT_INTERRUPTED

NANO, GHOST, LK = "RepOpt-VGG-nano", "RepOpt-GhostNet-0.5x", "RepOpt-LK-nano"
STRIDES = (2, 1, 2, 1, 1)


def create(name=NANO, mode="target", **arguments):
    return repopt.create_model(name, mode=mode, num_classes=10, **arguments)


@pytest.fixture(scope="module")
def searched():
    """Scales unlike any others."""
    torch.manual_seed(1)
    return {name: 1 + torch.rand_like(values) for name, values in repopt.extract_scales(create(mode="hs")).items()}


@pytest.mark.parametrize("name", [NANO, GHOST, LK])
def test_where_constants_come_from(name):
    search = create(name, "hs")
    fresh = repopt.extract_scales(search)
    model = create(name)
    constants = {source: repopt.constant_scales(model, source) for source in ("initial", "one")}
    searched = {key: torch.randn_like(values) for key, values in fresh.items()}
    for source in ("searched", "channel-mean"):
        constants[source] = repopt.constant_scales(model, source, searched)
    for key, values in fresh.items():
        assert torch.equal(constants["initial"][key], values)
        assert torch.equal(constants["one"][key], torch.ones_like(values))
        assert torch.equal(constants["searched"][key], searched[key])
        torch.testing.assert_close(constants["channel-mean"][key], searched[key].mean().expand_as(values))
    assert all(scales.keys() == fresh.keys() for scales in constants.values())


def test_constants_that_do_not_go_together(searched):
    with pytest.raises(UserError, match="no search: leave"):
        repopt.constant_scales(create(), "one", searched)
    with pytest.raises(UserError, match="its scales are needed"):
        repopt.constant_scales(create(), "channel-mean")
    with pytest.raises(UserError, match="did you mean 'initial'"):
        repopt.constant_scales(create(), "initia")


@pytest.mark.parametrize("name", [NANO, GHOST, LK])
@pytest.mark.parametrize("mode", ["hs", "csla", "target"])
def test_a_search_at_other_strides_is_the_same_network_on_larger_maps(name, mode):
    model, other = create(name, mode), create(name, mode, strides=STRIDES)
    other.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for network in (model.eval(), other.eval()):
        with torch.no_grad():
            features = network.forward_intermediates(images, intermediates_only=True)
        for feature, info in zip(features, network.feature_info, strict=True):
            assert feature.shape[1:] == (info["num_chs"], 64 // info["reduction"], 64 // info["reduction"])
    assert (model.feature_info[-1]["reduction"], other.feature_info[-1]["reduction"]) == (32, 4)
    if mode == "hs":
        assert repopt.bind(create(name), repopt.extract_scales(other)).scales


@pytest.mark.parametrize("strides", [(2, 2, 2, 2), (2, 2, 2, 2, 3), (2, 2, 2, 2, 2.0), (2, 2, 2, 2, True)])
def test_strides_that_there_are_not(strides):
    with pytest.raises(UserError, match="five downsampling layers are 1 or 2 each"):
        create(strides=strides)


@pytest.mark.parametrize("name", [NANO, GHOST, LK])
def test_a_search_that_begins_with_ones(name):
    scales = repopt.extract_scales(create(name, "hs", initial_scales="one"))
    assert all(torch.equal(values, torch.ones_like(values)) for values in scales.values())
    assert any((values != 1).any() for values in repopt.extract_scales(create(name, "hs")).values())


def train(output, tag, *arguments, arch=f"{NANO}-target", options=(), code=0):
    """The weights after an epoch of the command line."""
    keys = ("--opts", "DATA.DATASET", "digits", "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.BASE_LR", 0.1)
    command = ("--arch", arch, "--output", output, "--tag", tag, *arguments, *keys, *options)
    assert main_repopt.main([*map(str, command)]) == code
    return checkpoint.read(output / arch / tag / "latest.pth")["model"]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert torch.equal(values, other[name]), name


@pytest.fixture(scope="module")
def scale_file(searched, tmp_path_factory):
    path = tmp_path_factory.mktemp("scales") / "scales.pth"
    repopt.save_scales(searched, path)
    return path


def write_weights(path, model):
    checkpoint.write({"model": model.state_dict()}, path)
    return path


@pytest.mark.parametrize("constants", ["channel-mean", "initial", "one"])
def test_constants_are_as_if_a_search_had_found_them(tmp_path, searched, scale_file, constants):
    needed = constants == "channel-mean"
    given = ("--scales-path", scale_file) if needed else ()
    repopt.save_scales(
        repopt.constant_scales(create(), constants, searched if needed else None), tmp_path / "constants.pth"
    )
    assert_equal(
        train(tmp_path, "a", *given, options=("TRAIN.CONSTANTS", constants)),
        train(tmp_path, "b", "--scales-path", tmp_path / "constants.pth"),
    )


def test_without_either_rule(tmp_path, searched, scale_file):
    torch.manual_seed(0)
    fresh = create()
    torch.manual_seed(0)
    initialized = create()
    repopt.initialize(initialized, searched)
    given, plain = ("--scales-path", scale_file), f"{NANO}-target-norepopt"
    old_init = ("TRAIN.CHANGE_INITIALIZATION", False)
    old_gradients = ("TRAIN.CHANGE_GRADIENTS", False)
    assert_equal(
        train(tmp_path, "a", *given, options=old_init),
        train(tmp_path, "b", *given, "--resume", write_weights(tmp_path / "fresh.pth", fresh)),
    )
    assert_equal(
        train(tmp_path, "c", *given, options=(*old_gradients, "TRAIN.CLIP_GRAD", 1.0)),
        train(tmp_path, "d", "--resume", write_weights(tmp_path / "init.pth", initialized), arch=plain,
              options=("TRAIN.CLIP_GRAD", 1.0)),
    )  # fmt: skip
    assert_equal(train(tmp_path, "e", *given, options=(*old_init, *old_gradients)), train(tmp_path, "f", arch=plain))


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        (f"{NANO}-target-norepopt", ("TRAIN.CHANGE_GRADIENTS", False), "trained without: leave it out"),
        (f"{NANO}-hs", ("TRAIN.CONSTANTS", "one"), "trained without: leave it out"),
        (f"{NANO}-target", ("TRAIN.CONSTANTS", "channel-mean"), "needs searched scales"),
        (
            f"{NANO}-target",
            ("TRAIN.OPTIMIZER.NAME", "adafactor", "TRAIN.CONSTANTS", "one", "TRAIN.CHANGE_INITIALIZATION", False),
            "holds branches, which make the initial kernels",
        ),
        (f"{NANO}-hs", ("MODEL.STRIDES", "(2, 2, 2, 2, 4)"), "1 or 2 each"),
    ],
)
def test_switches_without_a_meaning(tmp_path, in_one_line, arch, options, message):
    command = ("--arch", arch, "--output", tmp_path, "--opts", "DATA.DATASET", "digits", *options)
    assert main_repopt.main([*map(str, command)]) == 2
    in_one_line("main_repopt.py", message, {})


def test_adafactor_goes_on_where_it_was_stopped(tmp_path, stopping):
    options = ("TRAIN.OPTIMIZER.NAME", "adafactor", "DATA.BATCH_SIZE", 100, "SAVE_EVERY_STEPS", 2)
    arch = f"{NANO}-target-norepopt"
    whole = train(tmp_path, "whole", arch=arch, options=options)
    with stopping():
        train(tmp_path, "stopped", arch=arch, options=options, code=EXIT_INTERRUPTED)
    assert_equal(train(tmp_path, "stopped", arch=arch, options=options), whole)


def test_a_network_of_other_strides_comes_back_from_its_checkpoint(tmp_path):
    from train import trained

    arch = f"{NANO}-hs"
    weights = train(tmp_path, "t", arch=arch, options=("MODEL.STRIDES", STRIDES, "MODEL.INITIAL_SCALES", "one"))
    network: Network = trained.read(tmp_path / arch / "t" / "latest.pth").network()
    assert_equal(network.state_dict(), weights)
    assert network.feature_info[-1]["reduction"] == 4
