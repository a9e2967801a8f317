"""`benchmark.py data` measures pipelines that do the same."""

import argparse
import io
import itertools
import os

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import baseline, other_loaders, photographs, workers
from benchmarks import data as subject

CPU = torch.device("cpu")


def run(*arguments):
    """The tables of a run."""
    parser = argparse.ArgumentParser()
    subject.add_arguments(parser)
    return dict(subject.run(parser.parse_args(arguments), CPU))


def test_every_pipeline_is_a_row():
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    *sets, reading, loaded, small = run("--images", "64", "--small-images", "256", "--rounds", "1").values()
    assert len(sets) == 2
    for presets in sets:
        names = [row["pipeline"] for row in presets]
        assert [name for name in names if not any(other in name for other in ("torchcodec", "DALI", "SPDL"))] == [
            *("weak: textbook", "weak: timm's loader", "weak: torchvision's decoder, torchvision v2"),
            *("weak: our decoder, torchvision v2", "weak: uint8", "weak: normalised"),
            *("raug15: textbook", "raug15: uint8", "raug15: normalised"),
        ]
        for rows in (presets[:-3], presets[-3:]):
            for row in rows:
                assert row["images/s"] * row["ms per image"] == pytest.approx(1000)
                assert row["speed / textbook"] == pytest.approx(row["images/s"] / rows[0]["images/s"])
    assert [row["images"] for row in reading] == [
        "class folders",
        *(f"zip, cache {mode}" for mode in ("no", "full", "part (of 2 processes)")),
        *("shards, parquet", "shards, wds"),
    ]
    rows = {(row["pipeline"], row["workers"], row["number"]): row for row in loaded}
    assert {key[:2] for key in rows} == set(itertools.product(("weak", "raug15", "timm's"), ("processes", "threads")))
    for (name, kind, number), row in rows.items():
        assert row["efficiency"] == pytest.approx(row["images/s"] / rows[name, kind, 1]["images/s"] / number)
    assert [(row["images"], row["pipeline"]) for row in small] == [
        (images, pipeline) for images in ("cf100", "digits") for pipeline in ("textbook", "resident")
    ]
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (threads, cores)


def test_small_images_alone():
    (rows,) = run("--only", "small-images", "--small-images", "256", "--rounds", "1").values()
    assert [row["images"] for row in rows] == ["cf100", "cf100", "digits", "digits"]


@pytest.mark.parametrize("make", [photographs.of_one_size, photographs.as_imagenet])
def test_photographs_differ_and_are_the_same_again(make):
    encoded = make(4)
    assert len(set(encoded)) == 4
    assert encoded == make(4)


def test_photographs_have_imagenets_sizes():
    assert all(Image.open(io.BytesIO(data)).size == photographs.SIZE for data in photographs.of_one_size(4))
    encoded = photographs.as_imagenet(256)
    sizes = np.array([Image.open(io.BytesIO(data)).size for data in encoded])
    assert sizes.mean(0) == pytest.approx((400, 350), rel=0.1)
    assert np.mean([len(data) for data in encoded]) == pytest.approx(110e3, rel=0.1)
    assert photographs.described(encoded) == "408 x 366 (114 kB)"  # what the documents' table is of
    longer = sizes.max(1)
    assert (longer == 500).mean() > 0.5 > (longer < 500).mean() > 0.1 > (longer > 500).mean() > 0


def test_batches_are_alike():
    """The textbook's, others' and ours, of images of one colour, whose crops are all the same."""
    buffer = io.BytesIO()
    Image.new("RGB", photographs.SIZE, (200, 100, 50)).save(buffer, "JPEG")
    encoded = [buffer.getvalue()] * 32
    normalised = [
        subject.one_by_one(encoded, baseline.imagenet())()[0],
        subject.ours(encoded, "weak", normalised=True)(),
    ]
    others = other_loaders.others(encoded, subject.batches, 224)
    plain = [*(step() for step in others.values()), subject.ours(encoded, "weak")()]
    assert [images.dtype for images in (*normalised, *plain)] == [torch.float32] * 2 + [torch.uint8] * len(plain)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for images in (*((images * std + mean) * 255 for images in normalised), *plain):
        assert images.shape == (subject.BATCH, 3, 224, 224)
        assert (images.float() - torch.tensor([200.0, 100, 50]).view(3, 1, 1)).abs().max() < 2


def test_what_is_not_installed_is_left_out_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr(other_loaders, "_INSTALLED", {"Nothing": ("not-a-distribution", lambda: None)})
    found = other_loaders.others(photographs.of_one_size(32), subject.batches, 224)
    assert set(found) == {"timm's loader", "torchvision's decoder, torchvision v2"}
    assert "left out: Nothing" in capsys.readouterr().out


def test_a_thread_makes_what_a_process_makes():
    dataset = workers.augmented(subject.InMemory(photographs.of_one_size(8)), "raug15", 32)
    epoch = [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4), (0, 5)], [(0, 6), (0, 7)]]
    pairs = zip(workers.processes(dataset, epoch, 1), workers.Threads(dataset, epoch, 1), strict=True)
    for (one, _), (other, _) in pairs:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


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
