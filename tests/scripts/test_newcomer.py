"""A newcomer with pictures in a folder and a trained network does what the README says, as it stands."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import main_repopt

pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("zero", "one", "two", "three", "four")
PER_CLASS = 40


def readme_commands():
    """The commands of the section about one's own pictures."""
    section = (ROOT / "README.md").read_text().split("## Your own pictures\n")[1].split("\n## ")[0]
    return re.findall(r"^    (python .*)$", section, flags=re.MULTILINE)


def save(pixels, path, number):
    """A picture (48, 64) in one of the kinds that people have."""
    grey = Image.fromarray(pixels)
    match number % 6:
        case 0:
            Image.fromarray(pixels.astype(np.uint16) * 257).save(path.with_suffix(".png"))  # 16 bits
        case 1:
            grey.convert("RGBA").save(path.with_suffix(".png"))
        case 2:
            grey.convert("RGB").quantize(64).save(path.with_suffix(".png"))  # a palette
        case 3:
            grey.convert("CMYK").save(path.with_suffix(".jpg"), quality=95)
        case 4:
            grey.save(path.with_suffix(".tiff"))
        case _:
            grey.convert("RGB").save(path.with_suffix(".JPG"), "JPEG", quality=95)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders of five classes and nothing else, with what lies about in such folders."""
    root, digits = tmp_path_factory.mktemp("pictures"), load_digits()
    for label, name in enumerate(NAMES):
        (root / name).mkdir()
        for number, index in enumerate(np.flatnonzero(digits.target == label)[:PER_CLASS]):
            small = Image.fromarray((digits.images[index] * 255 / 16).astype(np.uint8))
            save(np.asarray(small.resize((64, 48), Image.Resampling.BILINEAR)), root / name / f"{number}", number)
    (root / ".ipynb_checkpoints").mkdir()
    (root / "one" / "._1.jpg").write_bytes(b"of a file system")
    (root / "one" / "notes.txt").write_text("not a picture")
    (root / "two" / "broken.png").write_bytes((root / "two" / "1.png").read_bytes()[:200])
    return root


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The checkpoint of a network that was trained on all ten digits, with its scales."""
    output = tmp_path_factory.mktemp("file")
    argv = [
        "--cfg",
        str(ROOT / "configs/digits/train.yaml"),
        "--arch",
        "RepOpt-VGG-nano-target",
        "--output",
        str(output),
    ]
    assert main_repopt.main([*argv, "--opts", "TRAIN.EPOCHS", "20", "TRAIN.SEARCH_EPOCHS", "2"]) == 0
    return output / "RepOpt-VGG-nano-target" / "default" / "latest.pth"


def test_from_pictures_and_weights_to_a_prediction_in_int8(pictures, file, tmp_path):
    for name in ("main_repopt.py", "scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = readme_commands()
    assert [command.split()[1] for command in commands] == [
        "main_repopt.py",
        "scripts/predict.py",
        "scripts/quantize.py",
        "scripts/predict.py",
    ]
    shares = []
    for number, command in enumerate(commands):
        places = {"FILE": str(file), "DIR": str(pictures), "PICTURES": str(pictures)}
        words = [places.get(word, word) for word in shlex.split(command)[1:]]
        if "predict" in command:
            words += ["--out", f"found{number}.csv"]
        run = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        if "predict" in command:
            assert "broken.png" in run.stderr  # it is named
            with (tmp_path / f"found{number}.csv").open(newline="") as found:
                best = {}
                for row in csv.DictReader(found):
                    best.setdefault(row["picture"], row["class"])
            assert len(best) == len(NAMES) * PER_CLASS
            shares.append(np.mean([Path(picture).parent.name == name for picture, name in best.items()]))
    assert min(shares) > 0.85  # chance is 0.2
    log = (tmp_path / "output" / "RepOpt-VGG-nano-target" / "default" / "log_rank0.txt").read_text()
    assert "new: linear.weight, linear.bias" in log
    assert "161 training and 40 test images" in log  # with the broken one
    assert "DATA.IMG_SIZE 32 as it was trained" in log
