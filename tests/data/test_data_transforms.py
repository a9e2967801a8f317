import io
import random
import struct

import numpy as np
import pytest
import simplejpeg
import torch
from data_helpers import AS_STORED, tagged
from PIL import Image, ImageOps
from torchvision import transforms as T

from data import decode, raug15, seeding
from data.transforms import check_interpolation, check_preset, eval_transform, train_transform
from data.types import Augmentation
from repopt.errors import UserError


@pytest.fixture(params=[(90, 60), (60, 90), (64, 64), (30, 41)])
def image(request, photograph):
    return photograph(request.param[0], *request.param)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def draws(transform, image, seeds=range(12)):
    with seeding.preserved():
        out = []
        for seed in seeds:
            seeding.reseed(seed)
            out.append(transform(encoded(image)))
    assert all(t.dtype == torch.uint8 and t.is_contiguous() for t in out)
    return torch.stack(out)


def assert_pillows(actual, expected, interpolation="bilinear"):
    """Equal to Pillow's but for rounding, which both do in fixed point and after each direction."""
    difference = (actual.int() - expected.int()).abs()
    assert difference.max() <= {"bilinear": 1, "bicubic": 3}[interpolation]  # whose weights add up to more than 1
    assert difference.double().mean() < 0.35


@pytest.mark.parametrize("crop", (False, True))
@pytest.mark.parametrize("interpolation", ("bilinear", "bicubic", "random"))
def test_evaluation_resizes_the_short_side_and_takes_the_centre(image, interpolation, crop):
    size = 56
    short = 64 if crop else 56  # 56 * 256 / 224 = 64
    scale = short / min(image.size)
    width, height = (short if side == min(image.size) else int(side * scale) for side in image.size)
    method = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC, "random": Image.BICUBIC}
    left, top = round((width - size) / 2), round((height - size) / 2)
    expected = image.resize((width, height), method[interpolation]).crop((left, top, left + size, top + size))

    actual = eval_transform(size, interpolation, crop=crop)(encoded(image))
    assert actual.dtype == torch.uint8
    assert np.array_equal(actual, np.asarray(expected))


def test_evaluation_short_side_is_256_for_224():
    image = Image.new("RGB", (512, 256))
    resize, centre = eval_transform(224, "bilinear", crop=True).transform.transforms
    assert resize(image).size == (512, 256)
    assert centre(image).size == (224, 224)


def test_none_is_the_evaluation_transform(image):
    transform = train_transform(Augmentation(preset="none"), 32, "bilinear")
    expected = eval_transform(32, "bilinear", crop=False)(encoded(image))
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
    return torch.from_numpy(np.array(image))


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
            assert_pillows(actual, expected, interpolation)
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


@pytest.mark.parametrize("preset", ["weak", "raug15"])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (300, 1)])
def test_images_of_hardly_a_pixel(preset, size):
    colour = Image.new("RGB", size, (9, 99, 199))
    made = draws(train_transform(Augmentation(preset=preset), 8, "random"), colour, range(60))
    assert made.shape == (60, 8, 8, 3)
    if preset == "weak":
        assert (made == torch.tensor([9, 99, 199])).all()


def test_random_interpolation_draws_both(photograph):
    image = photograph(3, 50, 50)

    def crops(interpolation):
        return draws(train_transform(Augmentation(preset="weak"), 24, interpolation), image, range(40))

    # It is drawn after the crop and before the flip, which has a generator of its own.
    either = {name: crops(name) for name in ("bilinear", "bicubic")}
    assert sum(torch.equal(*pair) for pair in zip(*either.values(), strict=True)) < 3
    chosen = []
    for k, sample in enumerate(crops("random")):
        chosen.append([name for name in either if torch.equal(sample, either[name][k])])
    assert all(chosen)
    assert 10 < chosen.count(["bilinear"]) < 30 > chosen.count(["bicubic"]) > 10


@pytest.mark.parametrize("photo_size", [(90, 60), (300, 200)])
def test_statistics_are_those_of_pillows_pipeline(photograph, photo_size):
    """Crops, mirrorings and pixels of many images, against torchvision's classic transforms on Pillow images."""
    image, count = photograph(5, *photo_size), 1000
    classic = T.Compose([T.RandomResizedCrop(24), T.RandomHorizontalFlip(), T.PILToTensor()])
    expected = torch.stack([classic(image) for _ in range(count)]).permute(0, 2, 3, 1).double()
    actual = draws(train_transform(Augmentation(preset="weak"), 24, "bilinear"), image, range(count)).double()
    # By place and channel: the mean over images within 5 standard errors, in 24 x 24 x 3 places.
    error = (expected.var(0) / count + actual.var(0) / count).sqrt()
    assert ((expected.mean(0) - actual.mean(0)).abs() < 5 * error).all()
    torch.testing.assert_close(actual.std(0), expected.std(0), rtol=0.1, atol=1)
    # Mirrored as often as not: the halves of an image and of its mirror image have the same means.
    left, right = actual[:, :, :12].mean((1, 2, 3)), actual[:, :, 12:].mean((1, 2, 3))
    assert ((left - right).mean().abs() < 5 * (left - right).std() / count**0.5).all()


def segment(content):
    """A JPEG's segment of metadata."""
    return b"\xff\xe1" + struct.pack(">H", 2 + len(content)) + content


def exif(*tags):
    """A segment with tags: number, type, count, and 4 bytes of value."""
    entries = b"".join(struct.pack(">HHI", *tag) + value for *tag, value in tags)
    return segment(b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(tags)) + entries + bytes(4))


def orientation(value):
    return (0x0112, 3, 1, struct.pack(">HH", value, 0))


XMP = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='%d' tiff:Orientation=\"%d\"/>"
METADATA = {
    "exif 1": exif(orientation(1)),
    "exif 6": exif(orientation(6)),
    "exif 9": exif(orientation(9)),
    "exif text": exif((0x0112, 2, 2, b"6\0\0\0")),
    "exif garbage": segment(b"Exif\0\0garbage, garbage"),
    "exif empty": segment(b"Exif\0\0"),
    "xmp 1": segment(XMP % (6, 1)),
    "xmp 6": segment(XMP % (1, 6)),
    "another tag is text": exif(orientation(6), (0x011A, 2, 4, b"abc\0")),
    "another tag lies nowhere": exif(orientation(6), (0x011A, 5, 1, b"\0\0\xff\xff")),
}


def jpegs(photograph):
    image = photograph(11, 61, 47)
    pixels, plain = np.asarray(image), encoded(image, "JPEG")
    yield "baseline", encoded(image, "JPEG", quality=90)
    yield "no subsampling", encoded(image, "JPEG", quality=95, subsampling=0)
    yield "half subsampling", encoded(image, "JPEG", quality=95, subsampling=1)
    yield "progressive", encoded(image, "JPEG", progressive=True)
    yield "grey", encoded(image.convert("L"), "JPEG")
    yield "cmyk", encoded(image.convert("CMYK"), "JPEG")
    yield "rgb", encoded(image, "JPEG", keep_rgb=True)
    for orientation in AS_STORED:
        for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            yield f"{kind} {orientation}", tagged(pixels, orientation, kind)
    yield "grey 6", tagged(pixels[..., 0], 6, "JPEG")
    yield "16 bits 8", tagged(pixels[..., 0].astype(np.uint16) << 8, 8)
    for name, metadata in METADATA.items():
        yield name, plain[:2] + metadata + plain[2:]
    at = plain.index(b"\xff\xc4")  # behind the frame
    yield "late 6", plain[:at] + METADATA["exif 6"] + plain[at:]
    yield "restarts", encoded(image, "JPEG", restart_marker_rows=1)
    yield "comment", encoded(image, "JPEG", comment=b"\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03" * 9)
    yield "bytes before", b"\xff\xd8\xff" + encoded(image, "JPEG")[2:]
    yield "png", encoded(image)
    yield "palette", encoded(image.convert("P"))
    yield "webp", encoded(image, "WEBP")


@pytest.mark.filterwarnings("ignore:Truncated File Read")  # of Pillow's own function
def test_pixels_are_pillows_whatever_decodes_them(photograph, monkeypatch):
    by_pillow = []
    to_pillow = decode.to_pillow
    monkeypatch.setattr(decode, "to_pillow", lambda data: by_pillow.append(name) or to_pillow(data))
    for name, data in jpegs(photograph):
        pixels = decode.to_pixels(data)
        assert pixels.dtype == torch.uint8
        assert np.array_equal(pixels, shown(data)), name
        assert np.array_equal(pixels, np.asarray(to_pillow(data))), name
    by_simplejpeg = {name for name, _ in jpegs(photograph)} - {*by_pillow}
    assert by_simplejpeg == {
        *("baseline", "no subsampling", "half subsampling", "progressive", "grey", "rgb", "restarts", "comment"),
        *("JPEG 1", "exif 1", "exif 9", "exif text", "exif garbage", "exif empty", "xmp 1"),
    }


def shown(data):
    """The pixels that viewers show, by Pillow's own function where it can."""
    image = Image.open(io.BytesIO(data))
    try:
        image = ImageOps.exif_transpose(image)
    except TypeError:  # at the other tag
        image = image.transpose(Image.Transpose.ROTATE_270)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("orientation", AS_STORED)
def test_what_is_shown_is_what_was_to_be_seen(photograph, orientation):
    """In pixels, in values, and in what every transform begins with."""
    pixels = np.asarray(photograph(12, 61, 47))
    data = tagged(pixels, orientation)
    assert np.array_equal(decode.to_pixels(data), pixels)
    assert np.array_equal(decode.to_values(tagged(pixels[..., 0], orientation)), pixels[..., 0])
    for preset in ("weak", "raug15", "none", None):
        transform = train_transform(Augmentation(preset=preset), 24, "bilinear")
        made = []
        for encoded_image in (data, encoded(Image.fromarray(pixels))):
            with seeding.preserved():
                seeding.reseed(0)
                made.append(transform(encoded_image))
        assert torch.equal(*made)


def test_damaged_tags_are_no_warnings(recwarn, photograph):
    plain = encoded(photograph(11, 61, 47), "JPEG")
    for metadata in METADATA.values():
        decode.to_pixels(plain[:2] + metadata + plain[2:])
    assert not recwarn.list


@pytest.mark.parametrize("skipped", [b"\xff\xff\xc0", b"\xff\x01", b"\xff\xd0", b"\xff\xc3\x00\x11", b"\x00"])
def test_a_frame_that_a_decoder_may_not_see_is_not_believed(skipped):
    frame, scan = b"\xff\xc0\x00\x11\x08\x00\x01\x00\x01\x03" + bytes(9), b"\xff\xda" + bytes(99)
    none = (0, 0, 0, 0, False)
    assert decode._jpeg_frame(b"\xff\xd8" + frame + scan) == (8, 1, 1, 3, False)
    for metadata in (exif(), segment(b"")):
        for data in (metadata + frame + scan, frame + metadata + scan):
            assert decode._jpeg_frame(b"\xff\xd8" + data) == (8, 1, 1, 3, True)
    assert decode._jpeg_frame(b"\xff\xd8" + frame + scan + exif()) == (8, 1, 1, 3, False)
    for data in (skipped + frame + scan, frame + skipped + scan, frame + frame + scan, scan + frame, frame, b""):
        assert decode._jpeg_frame(b"\xff\xd8" + data) == none


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_never_reach_a_decoder(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    for kind in ("JPEG", "PNG"):
        with pytest.raises(OSError, match="1600 pixels, more than the limit of 1000"):
            decode.to_pixels(encoded(Image.new("RGB", (40, 40)), kind))


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
                assert np.array_equal(np.asarray(timm_transform(image)).transpose(1, 2, 0), sample)
        weak = draws(train_transform(Augmentation(preset="weak"), 24, "bilinear"), image)
        if expected_policy is None and not jitter:
            assert_pillows(weak, actual)
        else:
            assert not torch.equal(weak, actual)


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
