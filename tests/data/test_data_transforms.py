import random

import numpy as np
import pytest
import torch
from PIL import Image

from data import raug15
from data.transforms import check_interpolation, check_preset, eval_transform, train_transform
from data.types import Augmentation
from repopt import seeding
from repopt.errors import UserError


@pytest.fixture(params=[(90, 60), (60, 90), (64, 64), (30, 41)])
def image(request):
    width, height = request.param
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def draws(transform, image, seeds=range(12)):
    with seeding.preserved():
        out = []
        for seed in seeds:
            seeding.reseed(seed)
            out.append(transform(image))
    assert all(t.dtype == torch.uint8 for t in out)
    return torch.stack(out)


@pytest.mark.parametrize("crop", (False, True))
@pytest.mark.parametrize("interpolation", ("bilinear", "bicubic", "nearest", "random"))
def test_evaluation_resizes_the_short_side_and_takes_the_centre(image, interpolation, crop):
    size = 56
    short = 64 if crop else 56  # 56 * 256 / 224 = 64
    scale = short / min(image.size)
    width, height = (short if side == min(image.size) else int(side * scale) for side in image.size)
    method = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC, "nearest": Image.NEAREST, "random": Image.BICUBIC}
    left, top = round((width - size) / 2), round((height - size) / 2)
    expected = image.resize((width, height), method[interpolation]).crop((left, top, left + size, top + size))

    actual = eval_transform(size, interpolation, crop=crop)(image)
    assert actual.dtype == torch.uint8
    assert np.array_equal(actual.permute(1, 2, 0), np.asarray(expected))


def test_evaluation_short_side_is_256_for_224():
    image = Image.new("RGB", (512, 256))
    resize, centre, _ = eval_transform(224, "bilinear", crop=True).transforms
    assert resize(image).size == (512, 256)
    assert centre(image).size == (224, 224)


def test_none_is_the_evaluation_transform(image):
    transform = train_transform(Augmentation(preset="none"), 32, "bilinear")
    expected = eval_transform(32, "bilinear", crop=False)(image)
    assert (draws(transform, image) == expected).all()


def reference_weak(image, size, resample):
    """Random resized crop and flip, written out: area 8 to 100 %, aspect ratio 3/4 to 4/3, log-uniform."""
    for _ in range(10):
        area = random.uniform(0.08, 1.0) * image.width * image.height
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if width <= image.width and height <= image.height:
            top = random.randint(0, image.height - height)
            left = random.randint(0, image.width - width)
            break
    else:
        return None  # timm's fallback is its own affair
    image = image.crop((left, top, left + width, top + height)).resize((size, size), resample)
    if torch.rand(1) < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize(("interpolation", "resample"), [("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)])
def test_weak_is_a_random_resized_crop_and_a_flip(image, interpolation, resample):
    transform = train_transform(Augmentation(preset="weak"), 24, interpolation)
    compared = 0
    for seed, actual in enumerate(draws(transform, image)):
        with seeding.preserved():
            seeding.reseed(seed)
            expected = reference_weak(image, 24, resample)
        if expected is not None:
            compared += 1
            assert torch.equal(actual, expected)
    assert compared > 6


def test_raug15_is_weak_followed_by_two_operations(image, monkeypatch):
    weak = draws(train_transform(Augmentation(preset="weak"), 24, "bilinear"), image)
    transform = train_transform(Augmentation(preset="raug15"), 24, "bilinear")
    assert not torch.equal(draws(transform, image), weak)
    inverse_twice = {"Invert": raug15.OPERATIONS["Invert"]}
    monkeypatch.setattr(raug15, "OPERATIONS", inverse_twice)
    assert torch.equal(draws(transform, image), weak)
    monkeypatch.setattr(raug15, "NUM_OPERATIONS", 1)
    assert torch.equal(draws(transform, image), 255 - weak)


def test_random_interpolation_draws_both():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8))

    def crops(interpolation):
        return draws(train_transform(Augmentation(preset="weak"), 24, interpolation), image, range(1))

    # Interpolation is drawn after the crop, so the crop is the same in all three.
    fixed = {name: crops(name) for name in ("bilinear", "bicubic")}
    transform = train_transform(Augmentation(preset="weak"), 24, "random")
    crop, *_ = transform.transforms
    seen = set()
    for seed in range(20):
        random.seed(seed)
        i, j, h, w = crop.get_params(image, crop.scale, crop.ratio)
        region = image.crop((j, i, j + w, i + h))
        random.seed(seed)
        actual = crop(image).tobytes()
        seen |= {r for r in (Image.BILINEAR, Image.BICUBIC) if region.resize((24, 24), r).tobytes() == actual}
    assert seen == {Image.BILINEAR, Image.BICUBIC}
    assert not torch.equal(fixed["bilinear"], fixed["bicubic"])


def test_default_is_timms_pipeline(image):
    from timm.data.transforms_factory import transforms_imagenet_train

    for policy, expected_policy, jitter in (
        ("rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1", 0.4),
        ("original", "original", 0.4),
        ("none", None, 0.4),
        ("", None, 0.0),
    ):
        timm_transform = transforms_imagenet_train(
            24, auto_augment=expected_policy, color_jitter=jitter or None, interpolation="bilinear", use_prefetcher=True
        )
        augmentation = Augmentation(auto_augment=policy, color_jitter=jitter)
        actual = draws(train_transform(augmentation, 24, "bilinear"), image)
        with seeding.preserved():
            for seed, sample in enumerate(actual):
                seeding.reseed(seed)
                assert np.array_equal(np.asarray(timm_transform(image)), sample)
        weak = draws(train_transform(Augmentation(preset="weak"), 24, "bilinear"), image)
        assert torch.equal(actual, weak) == (expected_policy is None and not jitter)


@pytest.mark.parametrize("policy", ("rand-q3", "foo", "augmix-z1"))
def test_unknown_policy(policy):
    with pytest.raises(UserError, match=policy):
        train_transform(Augmentation(auto_augment=policy), 24, "bilinear")


def test_unknown_names():
    with pytest.raises(UserError, match=r"unknown interpolation 'bilinaer'.*'bilinear'"):
        check_interpolation("bilinaer")
    with pytest.raises(UserError, match=r"unknown augmentation preset 'raug51'.*'raug15'"):
        check_preset("raug51")
    for name in (None, "weak", "raug15", "none"):
        check_preset(name)
