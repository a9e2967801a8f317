"""`benchmark.py data` measures pipelines that do the same."""

import argparse
import io

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import baseline
from benchmarks import data as subject

CPU = torch.device("cpu")


def run(*arguments):
    """The tables of a run."""
    parser = argparse.ArgumentParser()
    subject.add_arguments(parser)
    return dict(subject.run(parser.parse_args(arguments), CPU))


def test_every_pipeline_is_a_row():
    threads = torch.get_num_threads()
    presets, reading, workers, small = run("--images", "64", "--small-images", "256", "--rounds", "1").values()
    names = ["weak: textbook", "weak: our decoder, torchvision v2", "weak: uint8", "weak: normalised"]
    names += ["raug15: textbook", "raug15: uint8", "raug15: normalised"]
    assert [row["pipeline"] for row in presets] == names
    for rows in (presets[:4], presets[4:]):
        for row in rows:
            assert row["images/s"] * row["ms per image"] == pytest.approx(1000)
            assert row["speed / textbook"] == pytest.approx(row["images/s"] / rows[0]["images/s"])
    assert [row["images"] for row in reading] == [
        "class folders",
        *(f"zip, cache {mode}" for mode in ("no", "full", "part (of 2 processes)")),
    ]
    assert [row["worker processes"] for row in workers] == [1, 2][: len(workers)]
    assert [(row["images"], row["pipeline"]) for row in small] == [
        (images, pipeline) for images in ("cf100", "digits") for pipeline in ("textbook", "resident")
    ]
    assert torch.get_num_threads() == threads


def test_small_images_alone():
    (rows,) = run("--only", "small-images", "--small-images", "256", "--rounds", "1").values()
    assert [row["images"] for row in rows] == ["cf100", "cf100", "digits", "digits"]


def test_photographs_differ_and_have_imagenets_size():
    encoded = subject.photographs(4)
    assert len(set(encoded)) == 4
    assert all(Image.open(io.BytesIO(data)).size == subject.SIZE for data in encoded)
    assert encoded == subject.photographs(4)


def test_batches_are_alike():
    """The textbook's and ours, of images of one colour, whose crops are all the same."""
    buffer = io.BytesIO()
    Image.new("RGB", subject.SIZE, (200, 100, 50)).save(buffer, "JPEG")
    encoded = [buffer.getvalue()] * 3
    normalised = [
        subject.one_by_one(encoded, baseline.imagenet())()[0],
        subject.ours(encoded, "weak", normalised=True)(),
    ]
    plain = [subject.one_by_one(encoded, subject.torchvision_v2())()[0], subject.ours(encoded, "weak")()]
    assert [images.dtype for images in (*normalised, *plain)] == [torch.float32] * 2 + [torch.uint8] * 2
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for images in (*((images * std + mean) * 255 for images in normalised), *plain):
        assert images.shape == (subject.BATCH, 3, 224, 224)
        assert (images.float() - torch.tensor([200.0, 100, 50]).view(3, 1, 1)).abs().max() < 2


def test_small_images_are_cropped_alike():
    pixels = np.zeros((256, 32, 32, 3), np.uint8)
    pixels[:, 8:24, 8:24] = 255  # lies within every crop
    transform = baseline.small("cf100")
    one = torch.stack([transform(image) for image in pixels])
    loader = subject.resident_loader("cf100", pixels, CPU)
    other = torch.cat([images for images, _ in loader])
    assert one.shape == other.shape
    torch.testing.assert_close(one.sum((0, 2, 3)), other.sum((0, 2, 3)), rtol=1e-4, atol=0)
    for images in (one, other):
        bright = images.amax(1) > 0
        assert set(bright.any(2).int().argmax(1).tolist()) == set(range(4, 13))  # from corner to corner of the padding
        assert set(bright.any(1).int().argmax(1).tolist()) == set(range(4, 13))
