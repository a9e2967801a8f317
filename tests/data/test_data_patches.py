"""The crops of scikit-learn's two photographs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_helpers import eval_loader, train_loader
from sklearn.datasets import load_sample_images
from torchvision.transforms import functional as TF

from data import Augmentation, DatasetInfo, Source, describe, patches
from data.on_device import Normalize

CPU = torch.device("cpu")
COMMON = {"image_size": 32, "interpolation": "bilinear", "num_classes": 8, "device": CPU}
NORMALIZE = Normalize(patches.MEAN, patches.STD, CPU, torch.contiguous_format)


def by_hand():
    """(split, crop, label) of every crop, and in how many of them each pixel is."""
    photographs = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    uses = torch.zeros(2, 427, 640)
    crops, label = [], 0
    for photograph in range(2):
        for top, left in ((0, 0), (0, 320), (213, 0), (213, 320)):
            for row in range(13):
                for column in range(20):
                    y, x = top + 16 * row, left + 16 * column
                    uses[photograph, y : y + 16, x : x + 16] += 1
                    crop = photographs[photograph, :, y : y + 16, x : x + 16]
                    crops.append(("val" if (column + 2 * row) % 4 else "train", crop, label))
            label += 1
    return crops, uses


@pytest.fixture(scope="module", name="by_hand")
def _by_hand():
    return by_hand()


@pytest.mark.parametrize(("split", "per_class"), [("train", 65), ("val", 195)])
def test_the_crops_of_a_split_are_those_of_the_regions(by_hand, split, per_class):
    images, labels = patches.load(split)
    assert (images.shape, images.dtype) == ((8 * per_class, 3, 32, 32), torch.uint8)
    assert (labels.bincount().tolist(), labels.dtype) == ([per_class] * 8, torch.int64)
    expected = [(crop, label) for where, crop, label in by_hand[0] if where == split]
    enlarged = F.interpolate(torch.stack([crop for crop, _ in expected]).float(), size=32, mode="bilinear")
    assert torch.equal(images, enlarged.round().to(torch.uint8))
    assert labels.tolist() == [label for _, label in expected]
    assert torch.equal(patches.load(split)[0], images)


def test_no_pixel_is_in_two_crops_and_most_are_in_one(by_hand):
    crops, uses = by_hand
    assert len(crops) == patches.NUM_TRAIN + patches.NUM_VAL == 2080
    assert uses.max() == 1
    assert uses.mean() > 0.97


def test_mean_and_deviation_are_those_of_the_training_images():
    pixels = patches.load("train")[0].double() / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(patches.MEAN, abs=1e-3)  # JPEG decoders round differently
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(patches.STD, abs=1e-3)


def test_training_images_are_cropped_and_half_of_them_mirrored():
    source = Source("patches")
    assert describe(source) == DatasetInfo(num_classes=8, image_size=32)
    loader = train_loader(source, Augmentation(), batch_size=52, label_smoothing=0.1, **COMMON)
    assert (len(loader), loader.num_images) == (10, 520)
    images, targets = map(torch.cat, zip(*loader, strict=True))
    raw, labels = patches.load("train")
    order = torch.cat(tuple(loader._sampler.batches(0)))
    assert torch.equal(targets, labels[order])
    (ys, xs), mirrored = loader._crop.draw(0)
    assert 200 < mirrored.sum() < 320
    for image, i in zip(images[:60], order[:60], strict=True):
        crop = TF.crop(TF.pad(raw[i], [4] * 4), int(ys[i]), int(xs[i]), 32, 32)
        assert torch.equal(image, NORMALIZE((TF.hflip(crop) if mirrored[i] else crop)[None])[0])


def test_evaluation_takes_every_test_crop_as_it_is():
    images, targets = map(
        torch.cat, zip(*eval_loader(Source("patches"), crop=False, batch_size=500, **COMMON), strict=True)
    )
    raw, labels = patches.load("val")
    assert torch.equal(images, NORMALIZE(raw))
    assert torch.equal(targets, labels)
