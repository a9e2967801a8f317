"""What a trained network sees in pictures, from the command line."""

import csv
import json

import numpy as np
import predict
import pytest
import torch
from data_helpers import dark_and_light
from PIL import Image

import data
import main_repopt
import repopt
from repopt import checkpoint
from repopt.description import NetworkDescription
from repopt.errors import UserError
from repopt.images import Preprocessing, to_rgb

ARCH = "RepOpt-VGG-nano-target-norepopt"
CPU = torch.device("cpu")
# By such arguments timm would fetch a file.
HOSTILE = {"task": "classify", "name": "timm/resnet10t", "mode": "plain", "arguments": {"pretrained_cfg": {"url": "x"}}}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return dark_and_light(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    options = {"DATA.DATASET": "folder", "DATA.IMG_SIZE": 48, "TEST.CROP": True, "DATA.NUM_WORKERS": 0}
    options |= {"DATA.BATCH_SIZE": 4, "TRAIN.EPOCHS": 1, "TRAIN.WARMUP_EPOCHS": 0, "DATA.INTERPOLATION": "bicubic"}
    argv = ["--arch", ARCH, "--output", str(output), "--data-path", str(pictures), "--opts"]
    assert main_repopt.main(argv + [str(part) for pair in options.items() for part in pair]) == 0
    return output / ARCH / "default" / "latest.pth"


def found_in(tmp_path, file, *arguments):
    out = tmp_path / "found.json"
    assert predict.main([str(a) for a in (file, *arguments, "--out", out)]) == 0
    return json.loads(out.read_text())


def test_scores_are_those_of_the_evaluation(trained, pictures, tmp_path):
    found = found_in(tmp_path, trained, pictures / "val", "--batch-size", 3)
    images = data.Classification(
        data.Source("folder", str(pictures)), image_size=48, num_classes=2, interpolation="bicubic", crop=True
    )
    loader = data.eval_loader(images, batch_size=8, device=CPU, num_workers=0, pin_memory=False)
    network = repopt.load(trained).network
    ((batch, labels),) = loader
    with torch.inference_mode():
        expected = network(batch).softmax(1)
    assert [row["picture"].split("/")[-2] for row in found] == ["dark"] * 4 + ["light"] * 4
    assert labels.tolist() == [0] * 4 + [1] * 4
    for row, scores in zip(found, expected, strict=True):
        by_class = {one["class"]: one["score"] for one in row["found"]}
        assert [by_class["dark"], by_class["light"]] == pytest.approx(scores.tolist(), abs=1e-6)
        assert row["found"][0]["score"] == max(by_class.values())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_is_turned_once(tmp_path, kind):
    """Stored upside down, with the tag that says so, it is what it was."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[274] = 3
    path = tmp_path / f"turned.{kind.lower()}"
    picture.save(path, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(path) as stored:
        once = to_rgb(stored)
    assert np.array_equal(to_rgb(once), once)
    if kind != "JPEG":
        assert np.array_equal(once, picture.transpose(Image.Transpose.ROTATE_180))


def test_files_folders_and_patterns(trained, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(pictures)
    hidden = pictures / "val" / ".checkpoints"
    hidden.mkdir()
    Image.new("RGB", (8, 8)).save(hidden / "0.png")
    found = found_in(tmp_path, trained, "val/light/3.png", "val/*/0.png", "val/light", "--top-k", 1)
    expected = ["val/light/3.png", "val/dark/0.png", "val/light/0.png", "val/light/1.png", "val/light/2.png"]
    assert [row["picture"] for row in found] == expected  # each once
    assert all(len(row["found"]) == 1 for row in found)
    assert capsys.readouterr().out.splitlines()[0].startswith("val/light/3.png  ")
    assert len(found_in(tmp_path, trained, "val")) == 8
    assert predict.main([str(trained), "val/*/9.png"]) == 2
    assert "there are no pictures at 'val/*/9.png'" in capsys.readouterr().err


def test_unreadable_pictures_are_named(trained, pictures, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes((pictures / "val" / "dark" / "0.png").read_bytes()[:500])
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tiff")
    found = found_in(
        tmp_path, trained, tmp_path / "bad.png", pictures / "val" / "dark" / "1.png", tmp_path / "float.tiff"
    )
    assert ["error" in row for row in found] == [True, False, True]
    error = capsys.readouterr().err
    assert f"cannot read '{tmp_path / 'bad.png'}' (" in error
    assert "values without a range, in Pillow's mode F" in error
    assert predict.main([str(trained), str(tmp_path / "bad.png")]) == 2
    assert "none of 1 pictures can be read" in capsys.readouterr().err


def test_a_table_for_other_programs(trained, pictures, tmp_path):
    out = tmp_path / "new" / "found.csv"
    assert predict.main([str(trained), str(pictures / "val" / "dark"), "--out", str(out)]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert rows[0].keys() == {"picture", "class", "score"}
    assert float(rows[0]["score"]) + float(rows[1]["score"]) == pytest.approx(1)


def test_the_moving_average_is_asked_where_it_is_better(trained, pictures, tmp_path):
    content = checkpoint.read(trained)
    average = {n: -v if n.startswith("linear") else v for n, v in content["model"].items()}
    checkpoint.write(content | {"ema": average, "max_accuracy": 1.0, "max_ema_accuracy": 2.0}, tmp_path / "a.pth")
    plain, best = (
        found_in(tmp_path, tmp_path / "a.pth", pictures / "val", "--weights", which) for which in ("model", "best")
    )
    assert [row["found"][0]["class"] for row in plain] != [row["found"][0]["class"] for row in best]


def test_an_onnx_file_says_all_that_it_takes(trained, pictures, tmp_path):
    export = pytest.importorskip("export", exc_type=UserError)
    assert export.main(["--resume", str(trained), "--out", str(tmp_path), "--formats", "onnx", "safetensors"]) == 0
    expected = found_in(tmp_path, trained, pictures / "val")
    found = found_in(tmp_path, tmp_path / "fp32.onnx", pictures / "val")
    for row, other in zip(found, expected, strict=True):
        assert [one["class"] for one in row["found"]] == [one["class"] for one in other["found"]]
        assert [one["score"] for one in row["found"]] == pytest.approx(
            [one["score"] for one in other["found"]], abs=1e-4
        )
    from safetensors import safe_open

    with safe_open(tmp_path / "fp32.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["classes"]) == ["dark", "light"]
    images = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic"}
    assert json.loads(metadata["images"]) == images | {"size": [48, 48], "short_side": 54, "long_side": None}
    assert metadata["task"] == "classify"


def test_another_size_of_an_exported_file_is_in_it(trained, tmp_path):
    export = pytest.importorskip("export", exc_type=UserError)
    argv = ["--resume", str(trained), "--out", str(tmp_path), "--formats", "onnx", "--image-size", "96"]
    assert export.main(argv) == 0
    transform = repopt.load(tmp_path / "fp32.onnx").transform
    assert (transform.size, transform.short_side) == ((96, 96), 108)


def dense(tmp_path, task, **arguments):
    """The checkpoint of a fresh network."""
    torch.manual_seed(0)
    description = NetworkDescription(task, "RepOpt-VGG-nano", "target", arguments | {"num_classes": 3, "channels": 32})
    images = Preprocessing((0.5,) * 3, (0.5,) * 3) if task == "segment" else Preprocessing((0.0,) * 3, (1.0,) * 3)
    content = {"model": description.create().state_dict(), "network": description.as_data()}
    content |= {"images": images.as_data(), "classes": ["sky", "road", "tree"]}
    checkpoint.write(content, tmp_path / "dense.pth")
    return tmp_path / "dense.pth"


def test_a_segmentation_network_draws_its_classes(pictures, tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    file, drawn = dense(tmp_path, "segment"), tmp_path / "drawn"
    found = found_in(tmp_path, file, pictures / "val" / "dark", "--draw", drawn)
    network, classes, transform, _ = repopt.load(file)
    for number, row in enumerate(found):
        with Image.open(row["picture"]) as picture, Image.open(drawn / f"{number}_{number}.png") as overlay:
            assert overlay.size == picture.size
            image = transform(picture)
        assert sum(one["share"] for one in row["found"]) == pytest.approx(1)
        with torch.inference_mode():
            labels = repopt.segmentation.predict(network, image[None]).argmax(1)
        for one in row["found"]:
            assert one["share"] == pytest.approx((labels == classes.index(one["class"])).double().mean().item())


@pytest.mark.parametrize("side", [64, 32])
def test_an_onnx_file_of_a_segmentation_network_takes_every_size(pictures, tmp_path, side):
    """It sees windows of the one size that it has; a picture that is smaller is padded."""
    pytest.importorskip("segmentation_models_pytorch")
    export = pytest.importorskip("repopt.export", exc_type=UserError)
    file = dense(tmp_path, "segment")
    network, classes, images, task = repopt.load(file)
    metadata = repopt.description.InOut(task, classes, images).as_metadata()
    export.write_onnx(network, torch.randn(2, 3, side, side), tmp_path / "net.onnx", metadata)
    (row,) = found_in(tmp_path, tmp_path / "net.onnx", pictures / "val" / "dark" / "3.png", "--draw", tmp_path)
    assert sum(one["share"] for one in row["found"]) == pytest.approx(1)
    if side == 64:  # the whole picture, padded as for the network itself
        (expected,) = found_in(tmp_path, file, pictures / "val" / "dark" / "3.png", "--draw", tmp_path)
        assert [one["class"] for one in row["found"]] == [one["class"] for one in expected["found"]]


def test_a_detector_draws_its_objects(pictures, tmp_path):
    sizes = {"sizes": [64], "max_size": 96, "mean": [0.5] * 3, "std": [0.5] * 3, "hidden": 32, "head": "mask"}
    file, drawn = dense(tmp_path, "detect", **sizes), tmp_path / "drawn"
    found = found_in(tmp_path, file, pictures / "val" / "light", "--draw", drawn, "--min-score", 0.0)
    assert len(list(drawn.iterdir())) == 4
    network, classes, transform, _ = repopt.load(file)
    for row in found:
        with Image.open(row["picture"]) as picture, torch.inference_mode():
            (expected,) = network([transform(picture)])
        assert [one["class"] for one in row["found"]] == [classes[label - 1] for label in expected["labels"]]
        boxes = [[one[side] for side in ("x1", "y1", "x2", "y2")] for one in row["found"]]
        assert torch.allclose(torch.tensor(boxes).view(-1, 4), expected["boxes"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"network": {"task": "classify"}}, "this is no description of a network"),
        ({"network": None}, "this is no description of a network"),
        ({"network": HOSTILE}, "networks are described without 'pretrained_cfg'"),
        ({"images": {"mean": [0.5]}}, "this is no way to make images"),
        ({"images": [1, 2]}, "this is no way to make images"),
        ({"classes": {"a": 1}}, "these are no names of classes"),
        ({"network": ("classify", "RepOpt-VGG-nano", "target", {"num_classes": -1})}, "this is no description"),
    ],
)
def test_a_file_that_says_something_else_is_refused(trained, pictures, tmp_path, capsys, edit, message):
    checkpoint.write(checkpoint.read(trained) | edit, tmp_path / "a.pth")
    assert predict.main([str(tmp_path / "a.pth"), str(pictures / "val")]) == 2
    error = capsys.readouterr().err
    assert f"'{tmp_path / 'a.pth'}': {message}" in error
    assert error.count("\n") == 1


def test_wrong_arguments_of_a_network_are_one_line(trained, tmp_path):
    content = checkpoint.read(trained)
    for arguments in ({"num_classes": -1}, {"num_classes": "a"}, {"nonsense": 1}, {"num_classes": 2, "strides": 5}):
        network = content["network"] | {"arguments": arguments}
        checkpoint.write(content | {"network": network}, tmp_path / "a.pth")
        with pytest.raises(UserError, match=r"a\.pth"):
            repopt.load(tmp_path / "a.pth")


def test_a_file_is_of_its_architecture(trained, pictures, capsys):
    assert predict.main([str(trained), str(pictures), "--arch", "RepOpt-VGG-A0-target"]) == 2
    assert "it is of RepOpt-VGG-nano in target mode, not of RepOpt-VGG-A0-target" in capsys.readouterr().err


def test_weights_alone_need_an_architecture(trained, tmp_path):
    torch.save(checkpoint.read(trained)["model"], tmp_path / "a.pth")
    with pytest.raises(UserError, match="does not say of which network it is: name its architecture"):
        repopt.load(tmp_path / "a.pth")
    network, classes, transform, _ = repopt.load(tmp_path / "a.pth", ARCH)
    assert network.num_classes == 2
    assert classes == ()
    assert transform.size == (224, 224)
