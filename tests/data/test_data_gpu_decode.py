"""Decoding on the device, here on the CPU: all but nvJPEG itself is the same."""

import io
import itertools
import logging
import random
import shutil

import numpy as np
import pytest
import torch
from data_helpers import EPOCH, assert_equal, batches, error_of, global_generators_at_rest, tagged, train_loader
from PIL import Image
from test_data_unreadable import DAMAGES
from torchvision import transforms as T

from data import Augmentation, Source, gpu_decode, raug15, raug15_batched, seeding
from data.decoded import Unreadable
from data.gpu_decode import Encoded, EncodedDataset, EncodedLoader
from data.transforms import CropAndFlip
from data.types import EncodedImages
from repopt.errors import UserError
from train.logging import logger

CPU = torch.device("cpu")


@pytest.fixture
def on_device(monkeypatch):
    """Decoding on the device is allowed on the CPU as well."""
    monkeypatch.setattr(gpu_decode, "wanted", lambda decode, *_: decode == "gpu")


def make(root, decode, preset="raug15", batch_size=4, workers=0, on_bad_image="skip", channels=3, **changes):
    return train_loader(
        Source("folder", str(root), on_bad_image=on_bad_image, channels=channels),
        Augmentation(preset=preset),
        **{"image_size": 24, "interpolation": "random", "num_classes": 12, "device": CPU}
        | {"batch_size": batch_size, "num_workers": workers, "decode": decode}
        | changes,
    )


@pytest.mark.parametrize("name", raug15.OPERATIONS)
def test_batched_operations_are_those_of_single_images(name, photograph):
    """To a grey level, and in nearly all pixels exactly: two programs truncate what is whole but for rounding."""
    images, drawn, expected = [], [], []
    for m, seed in itertools.product(range(15), range(4)):
        random.seed(seed)
        pixels = np.array(photograph(seed, 61, 40))
        drawn.append([(name, raug15.OPERATIONS[name].draw(m, *pixels.shape[:2]))])
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
        expected.append(torch.from_numpy(raug15.apply(pixels, drawn[-1])).permute(2, 0, 1))
    images = torch.stack(images)
    before = images.clone()
    actual = raug15_batched.apply(images, drawn)
    assert torch.equal(images, before)
    difference = (actual.int() - torch.stack(expected).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 1e-3


def test_every_image_of_a_batch_has_its_own_operations(photograph):
    pixels = np.array(photograph(3, 40, 40))
    random.seed(0)
    drawn = [raug15.draw(40, 40) for _ in range(200)]
    expected = torch.stack([torch.from_numpy(raug15.apply(pixels, one)) for one in drawn]).permute(0, 3, 1, 2)
    actual = raug15_batched.apply(torch.from_numpy(pixels).permute(2, 0, 1).expand(200, -1, -1, -1), drawn)
    difference = (actual.int() - expected.int()).abs().double().mean((1, 2, 3))
    assert difference.median() == 0
    assert difference.max() < 2  # where equalizing follows an operation that is a level off


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Rotate", "ShearX", "TranslateYRel", "Sharpness"])
def test_one_grey_level_is_left_as_it_is(name):
    flat = torch.full((1, 3, 9, 7), 128, dtype=torch.uint8)
    random.seed(0)
    assert (raug15_batched.apply(flat, [[(name, raug15.OPERATIONS[name].draw(9, 9, 7))]]) == 128).all()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_crops_and_mirrorings_are_those_of_single_images(interpolation, photograph):
    transform = CropAndFlip(24, interpolation, Augmentation(preset="weak"))
    pixels = torch.from_numpy(np.array(photograph(4, 90, 61)))
    with seeding.preserved():
        seeding.reseed(0)
        drawn = [transform.draw(61, 90) for _ in range(40)]
    assert len({one.mirrored for one in drawn}) == 2
    expected = torch.stack([transform.vary(pixels, one) for one in drawn]).permute(0, 3, 1, 2)
    actual = gpu_decode.vary([(pixels.permute(2, 0, 1), one) for one in drawn], 24)
    difference = (actual.int() - expected.int()).abs()
    assert difference.max() <= {"bilinear": 1}.get(interpolation, 3)  # bicubic weights add up to more than 1
    assert difference.double().mean() < 0.35


def test_statistics_are_those_of_pillows_pipeline(photograph):
    """By place and channel: the means over images within 5 standard errors of torchvision's classic transforms."""
    image, count = photograph(5, 90, 60), 1000
    classic = T.Compose([T.RandomResizedCrop(24), T.RandomHorizontalFlip(), T.PILToTensor()])
    expected = torch.stack([classic(image) for _ in range(count)]).double()
    transform = CropAndFlip(24, "bilinear", Augmentation(preset="weak"))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    actual = gpu_decode.vary([(pixels, transform.draw(60, 90)) for _ in range(count)], 24).double()
    error = (expected.var(0) / count + actual.var(0) / count).sqrt()
    assert ((expected.mean(0) - actual.mean(0)).abs() < 5 * error).all()
    torch.testing.assert_close(actual.std(0), expected.std(0), rtol=0.1, atol=1)


@pytest.mark.parametrize("preset", gpu_decode.PRESETS)
@pytest.mark.parametrize("channels", [3, 1])
def test_batches_are_those_of_the_cpu(on_device, image_folder, preset, channels):
    loader = make(image_folder, "gpu", preset, channels=channels)
    assert isinstance(loader, EncodedLoader)
    with global_generators_at_rest():
        actual = batches(loader)
    expected = batches(make(image_folder, "cpu", preset, channels=channels))
    assert len(actual) == len(expected) == 6
    exact = 0
    for (images, labels), (others, other_labels) in zip(actual, expected, strict=True):
        assert torch.equal(labels, other_labels)
        assert (images.shape, images.dtype) == ((4, channels, 24, 24), torch.float32)
        difference = (images - others).abs() * 255 * 0.23  # of grey levels
        assert difference.mean() < 1
        exact += (difference.amax((1, 2, 3)) == 0).sum()
    assert 8 <= exact < 24  # the PNGs are the workers'


def test_neither_workers_nor_a_stop_make_a_difference(on_device, image_folder):
    whole = batches(make(image_folder, "gpu"))
    for workers in (1, 2):
        assert_equal(batches(make(image_folder, "gpu", workers=workers)), whole)
    stopped = make(image_folder, "gpu", workers=1)
    stopped.set_epoch(EPOCH)
    first = list(itertools.islice(iter(stopped), 2))  # while others are being decoded
    assert_equal(first + batches(stopped, seen=stopped.position_after(2)), whole)
    assert not torch.equal(batches(stopped, EPOCH + 1)[0][0], whole[0][0])


class InMemory(EncodedImages):
    def __init__(self, *encoded):
        self.encoded, self.labels = encoded, torch.arange(len(encoded))

    def __len__(self):
        return len(self.encoded)

    def read(self, index):
        return self.encoded[index]

    def name(self, index):
        return f"image {index}"


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def dataset(*encoded, size=24):
    return EncodedDataset(InMemory(*encoded), CropAndFlip(size, "bilinear", Augmentation(preset="weak")), 0)


def test_what_is_no_plain_jpeg_is_the_workers(photograph):
    image = photograph(1, 61, 47)
    png = io.BytesIO()
    image.save(png, "PNG")
    plain = [jpeg(image), jpeg(image, progressive=True), jpeg(image, subsampling=0), jpeg(image.convert("L"))]
    others = [
        *(png.getvalue(), jpeg(image.convert("CMYK")), tagged(np.asarray(image), 6, "JPEG")),
        jpeg(image, keep_rgb=True),
        jpeg(image) + b"\0",  # perhaps cut
        jpeg(image.resize((24 * 16 + 1, 8))),
    ]
    made = dataset(*plain, *others)
    samples = made.__getitems__([(0, index) for index in range(len(made))])
    for index, (found, label, own) in enumerate(samples):
        assert label == own == index
        if index < len(plain):
            assert isinstance(found, Encoded)
            assert found.data.numpy().tobytes() == plain[index]
        else:
            assert (found.shape, found.dtype) == ((24, 24, 3), torch.uint8)
    # Sent and received, all have the pixels of the CPU.
    arrived = gpu_decode.unpack(gpu_decode.pack(samples), made, CPU)
    for (found, *rest), (image, *expected) in zip(arrived, samples, strict=True):
        assert rest == expected
        if isinstance(image, Encoded):
            image = made.transform.vary(gpu_decode.to_pixels(image.data.numpy().tobytes()), image.variation)
        assert (found.shape, found.dtype) == (image.shape, image.dtype)
        assert (found.int() - image.int()).abs().max() <= 2


def test_files_that_are_stored_as_red_green_and_blue(photograph):
    stored = jpeg(photograph(1, 61, 47), keep_rgb=True)
    at = stored.index(b"\xff\xee\x00\x0eAdobe")
    unmarked = stored[:at] + stored[at + 16 :]
    for data in (stored, unmarked):
        assert gpu_decode.plain_jpeg_size(data) == (47, 61)
        assert not gpu_decode._is_sound(data)
    assert np.array_equal(gpu_decode.to_pixels(unmarked), gpu_decode.to_pixels(stored))


def decoder_that_refuses(monkeypatch, *bad):
    """As nvJPEG does it: a batch with a damaged image is refused, and it is not said which one is."""
    calls, decode = [], gpu_decode.decode_jpegs

    def refusing(encoded, device):
        calls.append(len(encoded))
        if any(one.numpy().tobytes() in bad for one in encoded):
            raise RuntimeError("nvjpegDecodeBatched failed: 4")
        return decode(encoded, device)

    monkeypatch.setattr(gpu_decode, "decode_jpegs", refusing)
    return calls


def test_one_damaged_image_is_found_in_its_batch(monkeypatch, photograph):
    good = [jpeg(photograph(k, 61, 47)) for k in range(5)]
    scan = good[1].index(b"\xff\xda")
    damaged = good[1][: scan + 2] + bytes(20) + gpu_decode._END
    odd = good[3]  # which the device refuses, and the CPU takes
    made = dataset(good[0], damaged, good[2], odd, good[4])
    samples = made.__getitems__([(0, index) for index in range(5)])
    calls = decoder_that_refuses(monkeypatch, damaged, odd)
    arrived = gpu_decode.unpack(gpu_decode.pack(samples), made, CPU)
    assert calls == [5, 1, 1, 1, 1, 1]
    assert isinstance(arrived[1], Unreadable)
    assert (arrived[1].index, arrived[1].name) == (1, "image 1")
    with pytest.raises(OSError) as reason:
        gpu_decode.to_pixels(damaged)
    assert arrived[1].reason == " ".join(str(reason.value).split())
    assert torch.equal(arrived[3][0], made.transform.vary(gpu_decode.to_pixels(odd), samples[3][0].variation))
    assert [sample[2] for sample in arrived if not isinstance(sample, Unreadable)] == [0, 2, 3, 4]


@pytest.mark.parametrize("damage", DAMAGES)
def test_unreadable_images_are_treated_as_on_the_cpu(on_device, image_folder, tmp_path, damage, caplog, monkeypatch):
    shutil.copytree(image_folder, tmp_path / "images")
    paths = sorted((tmp_path / "images" / "train").glob("*/*"))
    bad = [path for path in paths if path.suffix == ".JPEG"][1:4:2]
    for path in bad:
        path.write_bytes(DAMAGES[damage][0](path.read_bytes()))
    decoder_that_refuses(monkeypatch, *(path.read_bytes() for path in bad))
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.WARNING, logger.name)
    found, messages = [], []
    for decode in ("cpu", "gpu"):
        loader = make(tmp_path / "images", decode)
        found.append(batches(loader))
        assert len(loader.unreadable) == 2
        messages.append((loader.unreadable, [record.getMessage() for record in caplog.records]))
        caplog.clear()
    assert messages[0] == messages[1]
    for (images, labels), (others, other_labels) in zip(*found, strict=True):
        assert torch.equal(labels, other_labels)
        assert (images - others).abs().mean() < 0.02
    errors = [error_of(make(tmp_path / "images", decode, on_bad_image="raise")) for decode in ("cpu", "gpu")]
    assert errors[0] == errors[1] and "cannot read image" in errors[0]


def test_a_batch_without_a_readable_image_is_refused(on_device, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    for path in (tmp_path / "images" / "train").glob("*/*"):
        path.write_bytes(b"")
    assert error_of(make(tmp_path / "images", "gpu")) == error_of(make(tmp_path / "images", "cpu")) != ""


def test_where_it_is_wanted():
    augmentation, cuda = Augmentation(preset="raug15"), torch.device("cuda")
    assert gpu_decode.wanted("gpu", augmentation, cuda)
    assert not gpu_decode.wanted("auto", augmentation, cuda)
    assert not gpu_decode.wanted("cpu", Augmentation(), cuda)
    with pytest.raises(UserError, match="needs a CUDA device, and this training is on cpu: set auto or cpu"):
        gpu_decode.wanted("gpu", augmentation, CPU)
    for preset in (None, "none"):
        with pytest.raises(UserError, match=f"AUG.PRESET weak and raug15, not of {preset}"):
            gpu_decode.wanted("gpu", Augmentation(preset=preset), cuda)
    with pytest.raises(UserError, match="unknown place to decode 'gqu'; did you mean 'gpu'"):
        gpu_decode.wanted("gqu", augmentation, cuda)


def test_a_decoder_that_is_not_there_is_told_before_an_epoch(on_device, image_folder, monkeypatch):
    def absent(encoded, device):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr(gpu_decode, "decode_jpegs", absent)
    with pytest.raises(UserError, match=r"cannot decode a JPEG on cpu \(.*not compiled with nvJPEG support\)"):
        make(image_folder, "gpu")


@pytest.fixture
def smooth_folder(tmp_path, photograph):
    """JPEGs without noise or subsampled colours, for what decoders make of these differs."""
    for index in range(24):
        image = photograph(index, 6, 5).resize((80 + index, 70), Image.BICUBIC)
        image = image.convert("L") if index % 6 == 5 else image
        folder = tmp_path / "train" / f"class{index % 12:02}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index}.jpg", quality=95, subsampling=0, progressive=index % 4 == 3)
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    return tmp_path


@pytest.mark.cuda
@pytest.mark.parametrize("preset", gpu_decode.PRESETS)
def test_batches_of_the_device_are_those_of_the_cpu(on_device, smooth_folder, preset, device):
    actual = batches(make(smooth_folder, "gpu", preset, workers=1, device=device))
    expected = batches(make(smooth_folder, "cpu", preset))
    differences = []
    for (images, labels), (others, other_labels) in zip(actual, expected, strict=True):
        assert images.device.type == labels.device.type == device.type
        assert torch.equal(labels.cpu(), other_labels)
        differences += ((images.cpu() - others).abs() * 255 * 0.23).mean((1, 2, 3)).tolist()  # of grey levels
    assert np.median(differences) < 1
    assert np.mean(differences) < 3  # a level is much to some operations: solarizing, equalizing
    assert_equal(batches(make(smooth_folder, "gpu", preset, device=device)), actual)


@pytest.mark.cuda
def test_a_damaged_image_is_found_on_the_device(device, photograph):
    good = [jpeg(photograph(k, 61, 47)) for k in range(3)]
    scan = good[1].index(b"\xff\xda")
    made = dataset(good[0], good[1][: scan + 2] + bytes(20) + gpu_decode._END, good[2])
    samples = gpu_decode.pack(made.__getitems__([(0, index) for index in range(3)]))
    arrived = gpu_decode.unpack(samples, made, device)
    assert [isinstance(sample, Unreadable) for sample in arrived] == [False, True, False]
    assert all(arrived[k][0].device.type == device.type for k in (0, 2))


@pytest.mark.cuda
def test_operations_on_the_device_are_those_of_the_cpu(device, photograph):
    images = torch.stack([torch.from_numpy(np.array(photograph(k, 61, 40))).permute(2, 0, 1) for k in range(400)])
    random.seed(0)
    drawn = [raug15.draw(40, 61)[:1] for _ in images]
    difference = raug15_batched.apply(images.to(device), drawn).cpu().int() - raug15_batched.apply(images, drawn).int()
    assert difference.abs().max() <= 1
    assert (difference != 0).double().mean() < 1e-3
