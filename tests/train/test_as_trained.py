"""What a checkpoint says of its images is the default of whoever evaluates or quantizes it."""

import re
import shutil

import pytest
from data_helpers import dark_and_light

import main_repopt
from repopt import checkpoint
from repopt.errors import UserError
from train import config
from train.as_trained import as_trained
from train.resolve import resolve

ARCH = "RepOpt-VGG-nano-target-norepopt"
FOLDER = ("DATA.DATASET", "folder", "DATA.NUM_WORKERS", 0, "DATA.BATCH_SIZE", 4)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return dark_and_light(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    options = (*FOLDER, "DATA.IMG_SIZE", 64, "TEST.CROP", True, "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0)
    assert main("--arch", ARCH, "--output", output, "--data-path", pictures, "--opts", *options) == 0
    return output / ARCH / "default" / "latest.pth"


def main(*arguments):
    return main_repopt.main([*map(str, arguments)])


def evaluated(trained, pictures, tmp_path, *options):
    common = ("--arch", ARCH, "--output", tmp_path, "--data-path", pictures, "--eval", "--resume", trained)
    assert main(*common, "--opts", *FOLDER, *options) == 0
    return (tmp_path / ARCH / "default" / "eval_log_rank0.txt").read_text()


def test_an_evaluation_makes_the_images_of_the_training(trained, pictures, tmp_path):
    log = evaluated(trained, pictures, tmp_path)
    assert "DATA.IMG_SIZE 64 as it was trained; DATA.TEST_SIZE 64 as it was trained" in log
    assert "TEST.CROP True as it was trained" in log
    line = re.search("val: (.*)", log)[1]
    assert line in (trained.parent / "log_rank0.txt").read_text()


def test_what_a_user_sets_goes_before(trained, pictures, tmp_path):
    log = evaluated(trained, pictures, tmp_path, "DATA.IMG_SIZE", 96, "TEST.CROP", False)
    assert "DATA.IMG_SIZE 96, where it was trained with 64; DATA.TEST_SIZE 96, where it was trained with 64" in log
    assert "TEST.CROP False, where it was trained with True" in log


@pytest.mark.parametrize("job", ["resume", "eval", "quantize"])
def test_other_classes_are_refused_by_name(trained, pictures, tmp_path, capsys, job):
    """Equally many, with equally many images: their answers would be of other classes."""
    renamed = tmp_path / "renamed"
    shutil.copytree(pictures, renamed)
    for split in ("train", "val"):
        (renamed / split / "dark").rename(renamed / split / "shade")
    assert checkpoint.read(trained)["classes"] == ["dark", "light"]
    arguments = ["--arch", ARCH, "--output", tmp_path / "out", "--data-path", renamed, "--resume", trained]
    arguments += {"resume": [], "eval": ["--eval"], "quantize": ["--method", "ptq"]}[job]
    options = (*FOLDER, "DATA.IMG_SIZE", 64, "TEST.CROP", True) + (("TRAIN.EPOCHS", 2) if job == "resume" else ())
    program = pytest.importorskip("quantize", exc_type=UserError) if job == "quantize" else main_repopt
    assert program.main([*map(str, (*arguments, "--opts", *options))]) == 2
    error = capsys.readouterr().err
    expected = "has a folder 'shade', which is no class of those that the network was trained on (1 of 2 folders"
    assert expected in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "size"),
    [
        ({"EVAL_MODE": True}, 64),
        ({"QUANT.METHOD": "ptq"}, 64),
        ({"EVAL_MODE": True, "DATA.TEST_SIZE": 96}, 96),
        ({"EVAL_MODE": True, "DATA.IMG_SIZE": 96}, 96),
        ({}, 224),  # a training that goes on says by itself what it trains
    ],
)
def test_sizes(trained, pictures, values, size):
    own = {"MODEL.ARCH": ARCH, "MODEL.RESUME": str(trained), "DATA.DATASET": "folder", "DATA.DATA_PATH": str(pictures)}
    assert size == resolve(as_trained(config.build(own | values))).DATA.TEST_SIZE


@pytest.mark.parametrize("mean", [5, (), ("a", "b"), "abc"])
def test_a_mean_that_is_none_is_refused(pictures, tmp_path, mean):
    checkpoint.write({"model": {}, "config": {"DATA": {"MEAN": mean}}}, tmp_path / "a.pth")
    own = {"MODEL.ARCH": ARCH, "MODEL.RESUME": str(tmp_path / "a.pth"), "DATA.DATASET": "folder", "EVAL_MODE": True}
    with pytest.raises(UserError, match=r"^DATA\.MEAN takes "):
        as_trained(config.build(own | {"DATA.DATA_PATH": str(pictures)}))


def test_a_size_that_is_none_is_refused(pictures, tmp_path):
    checkpoint.write({"model": {}, "config": {"DATA": {"IMG_SIZE": "large"}}}, tmp_path / "a.pth")
    own = {"MODEL.ARCH": ARCH, "MODEL.RESUME": str(tmp_path / "a.pth"), "DATA.DATASET": "folder", "EVAL_MODE": True}
    with pytest.raises(UserError, match=r"^DATA.IMG_SIZE takes a value of type int, not 'large'$"):
        as_trained(config.build(own | {"DATA.DATA_PATH": str(pictures)}))
