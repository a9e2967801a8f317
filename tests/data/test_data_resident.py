"""The sets that live on the device: digits, cf100, fake."""

import random

import numpy as np
import pytest
import torch
from data_helpers import eval_loader, global_generators_at_rest, train_loader
from torchvision.transforms import functional as TF

from data import Augmentation, Source, cifar, describe, digits, fake
from data.on_device import Normalize
from data.resident import InMemoryDataset, InMemoryLoader, RandomCropFlip
from data.sampler import EvalSampler, TrainSampler
from repopt.errors import UserError

CPU = torch.device("cpu")


def make_train(dataset="digits", augmentation=None, **changes):
    arguments = {
        "image_size": 32,
        "interpolation": "bilinear",
        "batch_size": 50,
        "num_classes": 10,
        "label_smoothing": 0.1,
        "device": CPU,
    } | changes
    return train_loader(Source(dataset), augmentation or Augmentation(), **arguments)


def make_eval(dataset="digits", **changes):
    arguments = {
        "image_size": 32,
        "interpolation": "bilinear",
        "crop": False,
        "batch_size": 50,
        "num_classes": 10,
        "device": CPU,
    } | changes
    return eval_loader(Source(dataset), **arguments)


def epoch_of(loader, epoch=0):
    loader.set_epoch(epoch)
    images, targets = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(targets)


def numbered(n=40, **changes):
    """A cf100-like loader whose labels number its images."""
    images = torch.randint(1, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings = {"batch_size": 8, "rank": 0, "world_size": 1, "seed": 0} | changes
    crop = RandomCropFlip(images, padding=4, flip=True, seed=settings["seed"])
    identity = Normalize((0, 0, 0), (1 / 255, 1 / 255, 1 / 255), CPU, torch.contiguous_format)
    loader = InMemoryLoader(InMemoryDataset(images, torch.arange(n), crop), TrainSampler(n, **settings), identity)
    return images, crop, loader


def by_index(loader, epoch=0):
    images, labels = epoch_of(loader, epoch)
    return dict(zip(labels.tolist(), images, strict=True))


@pytest.mark.parametrize("epoch", (0, 5))
def test_crops_equal_torchvisions_at_the_same_corners(epoch):
    images, crop, loader = numbered()
    (ys, xs), mirrored = crop.draw(epoch)
    seen = by_index(loader, epoch)
    assert sorted(seen) == list(range(40))
    for i, actual in seen.items():
        expected = TF.crop(TF.pad(images[i], [4, 4, 4, 4]), int(ys[i]), int(xs[i]), 32, 32)
        expected = TF.hflip(expected) if mirrored[i] else expected
        assert torch.equal(actual.round().to(torch.uint8), expected)
    assert len(set(ys.tolist())) > 1 < len(set(xs.tolist()))
    assert 0 < mirrored.sum() < 40


def test_corners_are_uniform_and_half_the_images_are_mirrored():
    n = 81_000
    (ys, xs), mirrored = RandomCropFlip(torch.zeros(n, 3, 1, 1, dtype=torch.uint8), padding=4, flip=True, seed=0).draw(
        0
    )
    counts = torch.bincount(ys * 9 + xs, minlength=81).double()
    assert len(counts) == 81
    assert ((counts - 1000) ** 2 / 1000).sum() < 80 + 5 * (2 * 80) ** 0.5
    assert abs(mirrored.double().mean() - 0.5) < 5 * 0.5 / n**0.5
    assert abs(np.corrcoef(np.stack([ys, xs, mirrored]))[np.triu_indices(3, 1)]).max() < 5 / n**0.5


@pytest.mark.parametrize("world", (2, 4))
def test_an_images_augmentation_does_not_depend_on_world_or_batch_size(world):
    alone = by_index(numbered()[2], epoch=3)
    together = {}
    for rank in range(world):
        together |= by_index(numbered(batch_size=5, rank=rank, world_size=world)[2], epoch=3)
    assert sorted(together) == list(range(40))
    assert all(torch.equal(together[i], alone[i]) for i in alone)


def test_augmentation_follows_from_seed_and_epoch():
    first = by_index(numbered()[2], 0)
    assert all(torch.equal(first[i], again) for i, again in by_index(numbered()[2], 0).items())
    for other in (by_index(numbered()[2], 1), by_index(numbered(seed=1)[2], 0)):
        assert sum(torch.equal(first[i], other[i]) for i in first) < 4  # 1 of 162 by chance


def test_batches_are_as_asked_for():
    loader = make_train(memory_format=torch.channels_last)
    assert (len(loader), loader.num_images) == (6, 300)
    for images, targets in loader:
        assert images.shape == (50, 3, 32, 32)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert (targets.shape, targets.dtype) == ((50,), torch.int64)


def test_normalisation_equals_the_textbook_pipeline():
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        actual = Normalize(cifar.MEAN, cifar.STD, CPU, memory_format)(images)
        expected = torch.stack(
            [TF.normalize(TF.to_tensor(TF.to_pil_image(image)), cifar.MEAN, cifar.STD) for image in images]
        )
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        assert actual.is_contiguous(memory_format=memory_format)


def test_digits_are_scikit_learns_enlarged():
    from sklearn.datasets import load_digits

    assert describe(Source("digits")) == describe(Source("digits"), splits=("val",))
    info = describe(Source("digits"))
    assert (info.num_classes, info.image_size) == (10, 32)
    (train, train_labels), (val, val_labels) = digits.load("train"), digits.load("val")
    assert train.shape == (300, 3, 32, 32)
    assert val.shape == (1497, 3, 32, 32)
    assert train.dtype == val.dtype == torch.uint8
    # Together they are the whole set: each 4x4 block's mean tells the small image.
    original = load_digits()
    small = torch.cat([train, val]).float()[:, 0].reshape(-1, 8, 4, 8, 4)[:, :, 1:3, :, 1:3].mean((2, 4))
    labels = torch.cat([train_labels, val_labels])
    assert torch.equal(labels.bincount(), torch.from_numpy(original.target).bincount())
    distances = torch.cdist(small.flatten(1), torch.from_numpy(original.data).float() * 255 / 16)
    nearest = distances.argmin(1)
    assert len(set(nearest.tolist())) > 1780  # some are near-twins
    assert torch.equal(torch.from_numpy(original.target)[nearest], labels)
    # Stratified: each class's share is 300 / 1797 of it, to one image.
    share = torch.from_numpy(original.target).bincount() * 300 / 1797
    assert (train_labels.bincount() - share).abs().max() < 1
    assert (train[:, :1] == train).all()
    pixels = train.double() / 255
    assert pixels.mean() == pytest.approx(digits.MEAN[0], abs=1e-4)
    assert pixels.std() == pytest.approx(digits.STD[0], abs=1e-4)


def test_digits_split_is_fixed():
    images, labels = digits.load("train")
    assert labels[:12].tolist() == [0, 6, 4, 2, 8, 9, 1, 0, 3, 4, 6, 0]
    assert torch.equal(images, digits.load("train")[0])


def test_digits_are_cropped_but_not_mirrored():
    """Every training image, over some epochs, is a crop of the padded original, never of its mirror image."""
    raw, _ = digits.load("train")
    normalize = Normalize(digits.MEAN, digits.STD, CPU, torch.contiguous_format)
    black = normalize(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0, 0, 0, 0]
    loader = make_train(batch_size=300)
    images, _ = epoch_of(loader)
    order = torch.cat(tuple(loader._sampler.batches(0)))
    padded = normalize(torch.nn.functional.pad(raw, [4] * 4))
    for image, index in zip(images[:40], order[:40].tolist(), strict=True):
        windows = padded[index].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
        assert (windows == image).all((2, 3, 4)).any()
    assert (images == black).any()


def test_evaluation_covers_every_digit_once_in_any_world():
    raw, labels = digits.load("val")
    expected = Normalize(digits.MEAN, digits.STD, CPU, torch.contiguous_format)(raw)
    for world in (1, 2, 3):
        loaders = [make_eval(rank=rank, world_size=world, batch_size=64) for rank in range(world)]
        assert {loader.num_images for loader in loaders} == {1497}
        for rank, loader in enumerate(loaders):
            images, targets = epoch_of(loader)
            assert len(list(loader)) == len(loader)
            assert torch.equal(images, expected[rank::world])
            assert torch.equal(targets, labels[rank::world])


def test_a_rank_without_images_evaluates_nothing():
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
    normalize = Normalize((0, 0, 0), (1, 1, 1), CPU, torch.contiguous_format)
    loader = InMemoryLoader(InMemoryDataset(images, labels), EvalSampler(2, 4, rank=2, world_size=3), normalize)
    assert (len(loader), list(loader)) == (0, [])


def test_fake_is_deterministic_and_of_any_size():
    info = describe(Source("fake"))
    assert (info.num_classes, info.image_size) == (None, None)
    loader = make_train("fake", image_size=48, num_classes=7, batch_size=128)
    images, targets = epoch_of(loader)
    assert images.shape == (fake.NUM_TRAIN, 3, 48, 48)
    assert set(targets.tolist()) == set(range(7))
    again, _ = epoch_of(make_train("fake", image_size=48, num_classes=7, batch_size=128))
    assert torch.equal(images, again)
    order = torch.cat(tuple(loader._sampler.batches(0)))
    raw, labels = fake.load("train", image_size=48, num_classes=7)
    assert torch.equal(loader._normalize(raw[order]), images)  # as they are: no crop, no flip
    assert torch.equal(labels[order], targets)
    val, _ = epoch_of(make_eval("fake", image_size=48, num_classes=7))
    assert len(val) == fake.NUM_VAL
    assert not torch.equal(val[:10], loader._normalize(raw[:10]))


def smoothed(labels, classes, smoothing):
    return torch.nn.functional.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_mixup_mixes_images_and_smoothed_targets_alike(smoothing):
    plain = make_train()
    mixed = make_train(augmentation=Augmentation(mixup=0.8), label_smoothing=smoothing)
    ratios = []
    for (x, y), (images, targets) in zip(plain, mixed, strict=True):
        assert (targets.shape, targets.dtype) == ((50, 10), torch.float32)
        torch.testing.assert_close(targets.sum(1), torch.ones(50))
        difference = x - x.flip(0)
        lam = ((images - x.flip(0)) * difference).sum() / difference.square().sum()
        torch.testing.assert_close(images, lam * x + (1 - lam) * x.flip(0), rtol=1e-4, atol=1e-4)
        soft = smoothed(y, 10, smoothing)
        torch.testing.assert_close(targets, lam * soft + (1 - lam) * soft.flip(0), rtol=1e-4, atol=1e-4)
        ratios.append(float(lam))
    assert len(set(ratios)) == len(ratios) == 6
    assert all(0 <= lam <= 1 for lam in ratios)


def test_cutmix_targets_tell_the_share_of_pixels():
    plain = make_train("fake")
    mixed = make_train("fake", Augmentation(cutmix=1.0), label_smoothing=0.0)
    for (x, y), (images, targets) in zip(plain, mixed, strict=True):
        own, other = (images == x).all(1), (images == x.flip(0)).all(1)
        assert (own | other).all()
        lam = own.double().mean((1, 2))
        soft = smoothed(y, 10, 0.0)
        expected = lam[:, None] * soft + (1 - lam[:, None]) * soft.flip(0)
        torch.testing.assert_close(targets.double(), expected, rtol=0, atol=1e-5)


def test_cutmix_minmax_alone_switches_cutmix_on():
    plain = make_train("fake")
    mixed = make_train("fake", Augmentation(cutmix_minmax=(0.4, 0.6)), label_smoothing=0.0)
    for (x, _), (images, targets) in zip(plain, mixed, strict=True):
        other = (images != x).any(1).double().mean((1, 2))
        assert ((other >= 0.36**2) & (other <= 0.6**2)).all()
        assert targets.shape == (50, 10)


def test_mixing_follows_from_seed_and_epoch():
    augmentation = Augmentation(mixup=0.8, cutmix=1.0)
    first, _ = epoch_of(make_train(augmentation=augmentation), 2)
    assert torch.equal(epoch_of(make_train(augmentation=augmentation), 2)[0], first)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert torch.equal(epoch_of(make_train(augmentation=augmentation), 2)[0], first)


def test_steps_and_ranks_mix_in_their_own_ratios():
    def ratios(rank):
        loader = make_train("fake", Augmentation(mixup=1.0), rank=rank, world_size=2, label_smoothing=0.0)
        # A row's greatest entry is lam or 1 - lam, save where an image meets its own class.
        return {round(float(targets.amax(1).min()), 4) for _, targets in loader}

    assert len(ratios(0) | ratios(1)) == 10  # five steps on each rank


@pytest.mark.parametrize("mode", ("batch", "pair", "elem"))
def test_every_mixup_mode_works_and_leaves_the_global_generators_alone(mode):
    with global_generators_at_rest():
        images, targets = epoch_of(make_train(augmentation=Augmentation(mixup=0.8, cutmix=1.0, mixup_mode=mode)))
        assert images.isfinite().all()
        torch.testing.assert_close(targets.sum(1), torch.ones(300))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "digit"}, r"unknown data set 'digit'; did you mean 'digits'"),
        ({"interpolation": "bicubik"}, r"unknown interpolation 'bicubik'; did you mean 'bicubic'"),
        ({"augmentation": Augmentation(preset="week")}, r"unknown augmentation preset 'week'; did you mean 'weak'"),
        ({"image_size": 224}, r"'digits' has images of size 32, not 224"),
        ({"batch_size": 301}, r"300 images.*301 x 1"),
        ({"batch_size": 75, "world_size": 5}, r"300 images.*75 x 5"),
        ({"augmentation": Augmentation(mixup=1.0), "batch_size": 25}, r"even, not 25"),
        ({"augmentation": Augmentation(mixup=1.0, mixup_mode="bach")}, r"unknown mixup mode 'bach'.*'batch'"),
    ],
)
def test_user_errors(changes, message):
    with pytest.raises(UserError, match=message):
        make_train(**changes)


def test_zip_is_refused_where_there_are_no_files():
    for call in (describe, lambda source: eval_loader(source, **EVAL_ARGUMENTS)):
        with pytest.raises(UserError, match="--zip is for imagenet and folder: data set 'cf100'"):
            call(Source("cf100", zip_mode=True))


EVAL_ARGUMENTS = {
    "image_size": 32,
    "interpolation": "bilinear",
    "crop": False,
    "batch_size": 50,
    "num_classes": 100,
    "device": CPU,
}
