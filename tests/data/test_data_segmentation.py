"""Images with a class for every pixel: Cityscapes' layout, and scenes of digits."""

import itertools
import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import EPOCH, assert_equal, batches, error_of, global_generators_at_rest, tagged
from PIL import Image
from torchvision.datasets import Cityscapes
from torchvision.transforms import v2

import data
from data import Segmentation, Source, digits, scenes
from data.on_device import Normalize
from data.registry import IMAGENET_MEAN, IMAGENET_STD
from data.segmentation import JointTransform
from repopt.errors import UserError

CPU = torch.device("cpu")
COMMON = {"device": CPU, "num_workers": 0}
NORMALIZE = Normalize(IMAGENET_MEAN, IMAGENET_STD, CPU, torch.contiguous_format)
WIDTH, HEIGHT = 48, 32
COUNTS = {"train": 12, "val": 5}


def place(root, split, kind, number):
    """Path of an image ('leftImg8bit') or label image ('gtFine'), which alternate between two cities."""
    city = ("ulm", "bern")[number % 2]
    suffix = {"leftImg8bit": "leftImg8bit", "gtFine": "gtFine_labelIds"}[kind]
    return root / kind / split / city / f"{city}_{number:06}_000019_{suffix}.png"


@pytest.fixture(scope="session")
def made(tmp_path_factory, request):
    root = tmp_path_factory.mktemp("cityscapes")
    for split, count in COUNTS.items():
        for number in range(count):
            rng = np.random.default_rng((number, count))
            image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            labels = rng.integers(0, 34, (HEIGHT, WIDTH)).astype(np.uint8)
            labels[:2] = 255
            for kind, pixels in (("leftImg8bit", image), ("gtFine", labels)):
                path = place(root, split, kind, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
                if kind == "gtFine":  # as the real set has them
                    path.with_name(path.name.replace("labelIds", "color")).write_bytes(b"")
    return root


@pytest.fixture
def root(made, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(made, tmp_path / "copy")


@pytest.fixture
def few_scenes(monkeypatch, tmp_path):
    monkeypatch.setattr(scenes, "_COUNTS", {"train": 6, "val": 3})
    return Source("scenes", str(tmp_path / "scenes"))


def train(root, **changes):
    return train_on(Source("cityscapes", str(root)), **changes)


def train_on(source, crop=(24, 40), scales=(0.5, 2.0), **changes):
    return data.train_loader(Segmentation(source, crop, scales), **(COMMON | {"batch_size": 4} | changes))


def evaluation(root, source=None, **changes):
    source = source or Source("cityscapes", str(root))
    return data.eval_loader(Segmentation(source), **(COMMON | {"batch_size": 2} | changes))


def test_the_classes_are_the_nineteen_of_cityscapes():
    images = Segmentation(Source("cityscapes"))
    assert (images.spec.mean, images.spec.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert len(images.class_names) == 19
    assert (images.class_names[0], images.class_names[13], images.class_names[18]) == ("road", "car", "bicycle")
    images = Segmentation(Source("scenes"))
    assert images.class_names == ("background", *"0123456789")
    assert (images.spec.mean, images.spec.std) == (digits.MEAN, digits.STD)


def test_evaluation_equals_torchvisions_images_with_their_ids_mapped(made):
    textbook = Cityscapes(str(made), "val", "fine", "semantic")
    train_ids = {c.id % 256: c.train_id % 256 for c in Cityscapes.classes}
    expected = {Path(path).name: textbook[k] for k, path in enumerate(textbook.images)}
    loader = evaluation(made)
    assert (len(loader), loader.num_images) == (3, 5)
    assert [len(labels) for _, labels in loader] == [2, 2, 1]
    images, labels = map(torch.cat, zip(*loader, strict=True))
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    for image, label, name in zip(images, labels, sorted(expected), strict=True):
        pixels, ids = (np.array(found) for found in expected[name])
        assert torch.equal(image, NORMALIZE(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0])
        assert label.tolist() == [[train_ids[value] for value in row] for row in ids.tolist()]
    assert labels.unique().tolist() == [*range(19), 255]


@pytest.mark.parametrize("world", (1, 2, 3))
def test_evaluation_takes_every_image_once(made, world):
    whole = [image for images, _ in evaluation(made) for image in images]
    found = [
        image
        for rank in range(world)
        for images, _ in evaluation(made, rank=rank, world_size=world)
        for image in images
    ]
    assert len(found) == len(whole)
    assert all(sum(torch.equal(image, other) for other in found) == 1 for image in whole)


def test_training_images_as_in_evaluation(made):
    every = torch.cat([images for images, _ in evaluation(made, split="train")])
    some = torch.cat([images for images, _ in evaluation(made, split="train", max_images=5)])
    assert (len(every), len(some)) == (12, 5)
    assert all(any(torch.equal(image, other) for other in every) for image in some)


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_training_batches_are_as_asked_for(made, memory_format):
    loader = train(made, memory_format=memory_format)
    assert (len(loader), loader.num_images, loader.images_per_batch) == (3, 12, 4)
    for images, labels in loader:
        assert (images.shape, images.dtype) == ((4, 3, 24, 40), torch.float32)
        assert images.is_contiguous(memory_format=memory_format)
        assert (labels.shape, labels.dtype) == ((4, 24, 40), torch.int64)
        assert type(images) is type(labels) is torch.Tensor
        assert set(labels.unique().tolist()) <= {*range(19), 255}


def test_smaller_images_are_padded_by_the_mean_and_by_what_is_ignored(made):
    for images, labels in train(made, scales=(0.5, 0.5), crop=(20, 30)):
        assert (labels[:, 16:] == 255).all()
        assert (labels[:, :, 24:] == 255).all()
        for padding in (images[:, :, 16:], images[:, :, :, 24:]):
            assert padding.abs().max() < 0.5 / 255 / min(IMAGENET_STD) + 1e-6
        assert (labels[:, 2:16, :24] != 255).any()


def coded(height=HEIGHT, width=WIDTH):
    """A smooth image whose red says the row and whose green says the column, and labels that say both."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([4 * rows, 4 * columns, 0 * rows], 2).to(torch.uint8)
    return pixels, (rows // 8 * 8 + columns // 8).to(torch.uint8)


@pytest.mark.parametrize("scales", ((1.0, 1.0), (2.0, 2.0), (0.5, 2.0)))
def test_labels_stay_on_their_pixels(monkeypatch, scales):
    monkeypatch.setattr(v2, "ColorJitter", lambda **strengths: v2.Identity())
    pixels, labels = coded()
    vary = JointTransform((24, 40), scales, flip=True, colour=(255, 255, 255))
    mirrored, corners = [], set()
    for _ in range(200):
        image, label = vary(pixels, labels)
        inside = label != 255
        rows, columns = image[..., 0] / 4, image[..., 1] / 4
        exact = ((rows / 8).floor() * 8 + (columns / 8).floor()).long()
        near = ((rows % 8 - 4).abs() < 2.9) & ((columns % 8 - 4).abs() < 2.9)  # where interpolation mixes no two labels
        assert near[inside].float().mean() > 0.2
        assert torch.equal(exact[near & inside], label.long()[near & inside])
        mirrored.append(bool(columns[0, 0] > columns[0, inside[0].sum() - 1]))
        corners.add((int(rows[0, 0]), int(columns[0].min())))
    assert 60 < sum(mirrored) < 140
    assert len(corners) > 40


def test_at_scale_one_an_image_is_cropped_only(monkeypatch):
    monkeypatch.setattr(v2, "ColorJitter", lambda **strengths: v2.Identity())
    pixels, labels = coded()
    for _ in range(20):
        image, label = JointTransform((24, 40), (1.0, 1.0), flip=False, colour=(0, 0, 0))(pixels, labels)
        top, left = int(image[0, 0, 0]) // 4, int(image[0, 0, 1]) // 4
        assert torch.equal(image, pixels[top : top + 24, left : left + 40])
        assert torch.equal(label, labels[top : top + 24, left : left + 40])


def test_colours_are_distorted_and_labels_are_not(made, few_scenes):
    still = {"scales": (1.0, 1.0), "crop": (HEIGHT, WIDTH)}
    one, other = (batches(train(made, **still), epoch) for epoch in (0, 1))
    as_they_are = torch.cat([images for images, _ in evaluation(made, split="train")])
    for images, _ in one:
        assert not any(torch.equal(image, plain) for image in images[:2] for plain in as_they_are)
    by_labels = {label.sort().values.numpy().tobytes() for _, labels in one for label in labels.flatten(1)}
    assert by_labels == {label.sort().values.numpy().tobytes() for _, labels in other for label in labels.flatten(1)}


def test_digits_are_not_mirrored(few_scenes):
    whole = [label for _, labels in evaluation(None, few_scenes, split="train") for label in labels]
    assert [image.shape for images, _ in evaluation(None, few_scenes) for image in images] == [
        (3, scenes.SIZE, scenes.SIZE)
    ] * 3
    loader = train_on(few_scenes, (scenes.SIZE, scenes.SIZE), (1.0, 1.0), batch_size=2)
    for epoch in range(4):
        for _, labels in batches(loader, epoch):
            assert all(any(torch.equal(label, plain) for plain in whole) for label in labels)


@pytest.mark.parametrize("workers", (0, 2))
def test_a_stopped_epoch_goes_on_bit_for_bit(made, workers):
    whole = batches(train(made, batch_size=2))
    stopped = train(made, batch_size=2, num_workers=workers)
    stopped.set_epoch(EPOCH)
    first = list(itertools.islice(iter(stopped), 2))
    seen = json.loads(json.dumps(stopped.position_after(2)))
    fresh = train(made, batch_size=2, num_workers=workers)
    assert_equal(first + batches(fresh, seen=seen), whole)
    assert (len(fresh), fresh.images_seen) == (4, 4)


def test_batches_follow_from_seed_epoch_and_images_alone(made):
    expected = batches(train(made))
    workers = train(made, num_workers=2)
    batches(workers, epoch=0)
    assert_equal(batches(workers), expected)
    ranks = [batches(train(made, batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert_equal([tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*ranks, strict=True)], expected)
    for other in (batches(train(made), epoch=4), batches(train(made, seed=1))):
        assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(other, expected, strict=True))
    assert_equal(list(evaluation(made, num_workers=2)), list(evaluation(made)))


def test_the_global_generators_are_neither_used_nor_moved(made):
    with global_generators_at_rest():
        first = batches(train(made))
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert_equal(batches(train(made)), first)


def test_worker_processes_may_be_spawned(made):
    samples = train(made)._workers.dataset
    copied = pickle.loads(pickle.dumps(samples))
    for one, other in zip(copied[3, 7], samples[3, 7], strict=True):
        assert one == other if isinstance(one, int) else torch.equal(one, other)


def test_the_fingerprint_follows_from_the_names(made, root):
    one = train(made).fingerprint
    assert one == train(root, rank=1, world_size=2).fingerprint != evaluation(made).fingerprint
    for kind in ("leftImg8bit", "gtFine"):
        place(root, "train", kind, 4).rename(place(root, "train", kind, 40))
    assert train(root).fingerprint != one


@pytest.mark.parametrize("workers", (0, 2))
@pytest.mark.parametrize("kind", ("leftImg8bit", "gtFine"))
def test_unreadable_images(root, kind, workers):
    for split in ("train", "val"):
        damaged = place(root, split, kind, 3)
        damaged.write_bytes(damaged.read_bytes()[:-40])
    image = str(place(root, "train", "leftImg8bit", 3))
    loader = train(root, num_workers=workers)
    assert sum(len(images) for images, _ in loader) == 12
    (reason,) = [loader.unreadable.pop(image)]
    assert not loader.unreadable
    assert "truncated" in reason
    assert (str(place(root, "train", kind, 3)) in reason) == (kind == "gtFine")

    strict = Source("cityscapes", str(root), on_bad_image="raise")
    refused = error_of(train_on(strict, num_workers=workers))
    assert refused.startswith(f"cannot read image {image!r} (")
    refused = error_of(evaluation(root, num_workers=workers))
    assert refused.startswith(f"cannot read image {str(place(root, 'val', 'leftImg8bit', 3))!r} (")
    assert "\n" not in refused


def replace_labels(path, how):
    values = np.array(Image.open(path))
    Image.fromarray(how(values)).save(path)


def one_pixel(value):
    def change(values):
        values[20, 30] = value
        return values

    return change


BAD_LABELS = {
    "value": (one_pixel(34), r"label image '{path}' has the value 34: 0 to 33 and 255 are allowed"),
    "largest": (one_pixel(254), r"label image '{path}' has the value 254: 0 to 33 and 255 are allowed"),
    "size": (
        lambda v: v[:-1],
        f"label image '{{path}}' has {WIDTH} x {HEIGHT - 1} pixels, its image {WIDTH} x {HEIGHT}",
    ),
    "turned": (
        lambda v: v.T.copy(),
        f"label image '{{path}}' has {HEIGHT} x {WIDTH} pixels, its image {WIDTH} x {HEIGHT}",
    ),
    "colours": (lambda v: v[..., None].repeat(3, 2), "'{path}' is no label image: one channel of 8 bits is expected"),
    "16 bits": (lambda v: v.astype(np.uint16), "'{path}' is no label image: one channel of 8 bits is expected"),
    "1 bit": (lambda v: v > 9, "'{path}' is no label image: one channel of 8 bits is expected"),
}


@pytest.mark.parametrize("workers", (0, 2))
@pytest.mark.parametrize("what", BAD_LABELS)
def test_malformed_label_images_are_refused_in_one_line(root, what, workers):
    how, message = BAD_LABELS[what]
    for split, make in (("train", train), ("val", evaluation)):
        path = place(root, split, "gtFine", 3)
        replace_labels(path, how)
        loader = make(root, num_workers=workers)  # although unreadable images are skipped
        assert error_of(loader) == message.format(path=path)
        assert loader.unreadable == {}


def test_label_images_are_of_the_image_that_is_shown(made, root):
    """Neither tag of an image and its label image changes anything: both may lie in their files in any way."""
    for split, count in COUNTS.items():
        for number in range(count):
            image, labels = (place(root, split, kind, number) for kind in ("leftImg8bit", "gtFine"))
            orientation, other = 1 + number % 8, 1 + 5 * number % 8
            image.write_bytes(tagged(np.array(Image.open(image)), orientation))
            labels.write_bytes(tagged(np.array(Image.open(labels)), other))
    assert_equal(list(evaluation(root)), list(evaluation(made)))
    assert_equal(batches(train(root)), batches(train(made)))


def test_a_label_image_of_an_image_as_it_is_stored(root):
    image, labels = (place(root, "val", kind, 3) for kind in ("leftImg8bit", "gtFine"))
    image.write_bytes(tagged(np.array(Image.open(image)).swapaxes(0, 1), 6))
    assert error_of(evaluation(root)) == (
        f"label image {str(labels)!r} has {WIDTH} x {HEIGHT} pixels, its image {HEIGHT} x {WIDTH}; its EXIF tag "
        "turns it: annotate it as viewers show it, or store it turned, without the tag"
    )


def test_palette_images_hold_their_indices(root):
    path = place(root, "val", "gtFine", 0)
    before = [labels for _, labels in evaluation(root)]
    indices = Image.open(path)
    indices.putpalette([value for k in range(256) for value in (k, 255 - k, 7)])
    assert indices.mode == "P"
    indices.save(path)
    assert all(map(torch.equal, before, [labels for _, labels in evaluation(root)]))


def test_values_that_a_set_of_scenes_does_not_have(few_scenes):
    evaluation(None, few_scenes)
    path = next(Path(few_scenes.root, "cityscapes", "gtFine", "val", "scenes").iterdir())
    replace_labels(path, one_pixel(11))
    expected = f"label image {str(path)!r} has the value 11: 0 to 10 and 255 are allowed"
    assert error_of(evaluation(None, few_scenes)) == expected


def test_an_image_without_a_label_image(root):
    for number in (3, 5):
        place(root, "train", "gtFine", number).unlink()
    with pytest.raises(UserError) as error:
        train(root)
    image, label = (place(root, "train", kind, 3) for kind in ("leftImg8bit", "gtFine"))
    assert str(error.value) == f"image {str(image)!r} has no label image {str(label)!r} (nor have 1 more images theirs)"


def test_images_of_different_sizes_go_one_by_one(root):
    for kind in ("leftImg8bit", "gtFine"):
        path = place(root, "val", kind, 3)
        pixels = np.asarray(Image.open(path))
        Image.fromarray(pixels[:20]).save(path)
    assert error_of(evaluation(root)) == (
        f"an evaluation batch has images of {WIDTH} x 20 and {WIDTH} x {HEIGHT} pixels: set DATA.TEST_BATCH_SIZE 1"
    )
    assert sum(len(images) for images, _ in evaluation(root, batch_size=1)) == 5
    assert sum(len(images) for images, _ in train(root)) == 12


def test_other_files_beside_the_images_do_not_matter(made, root):
    for split in ("train", "val"):
        (root / "leftImg8bit" / split / "ulm" / ".DS_Store").write_bytes(b"")
        (root / "leftImg8bit" / split / "ulm" / "Thumbs.db").write_bytes(b"")
    assert_equal(batches(train(root)), batches(train(made)))


def remove(*parts):
    return lambda root: shutil.rmtree(root.joinpath(*parts))


def empty(root):
    for city in (root / "leftImg8bit" / "train").iterdir():
        shutil.rmtree(city)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(), r"data folder '{root}' does not exist: give --data-path"),
        (remove("leftImg8bit", "train"), r"no folder leftImg8bit/train/ in '{root}': it is not in Cityscapes' layout"),
        (remove("gtFine"), r"no folder gtFine/train/ in '{root}': it is not in Cityscapes' layout"),
        (empty, r"no images in '{root}/leftImg8bit/train': <city>/\*_leftImg8bit.png are expected"),
        (
            lambda root: (root / "leftImg8bit" / "train" / "city.zip").write_bytes(b""),
            r"'{root}' is not in Cityscapes' layout: .*Not a directory.*city.zip.*",
        ),
    ],
)
def test_folders_that_are_not_in_the_layout(root, damage, message):
    damage(root)
    with pytest.raises(UserError, match=f"^{message.format(root=root)}$"):
        train(root)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            Source("cityscape"),
            r"unknown data set 'cityscape'; did you mean 'cityscapes'\? \(allowed: cityscapes, scenes\)",
        ),
        (Source("imagenet"), r"unknown data set 'imagenet' \(allowed: cityscapes, scenes\)"),
        (Source("cityscapes"), r"data folder '' does not exist: give --data-path"),
        (Source("cityscapes", on_bad_image="skipp"), r"unknown way with unreadable images 'skipp'"),
        (Source("scenes", zip_mode=True), r"--zip is for imagenet and folder: data set 'scenes' is in no zip"),
    ],
)
def test_sources_that_do_not_exist(source, message):
    with pytest.raises(UserError, match=message):
        evaluation(None, source)


@pytest.mark.parametrize("scales", ((0.0, 1.0), (2.0, 0.5), (-1.0, 1.0), (float("nan"), 1.0)))
def test_scales_that_are_none(made, scales):
    with pytest.raises(UserError, match=r"^images are resized by factors from one above 0 to one no smaller, not \("):
        train(made, scales=scales)


def test_fewer_images_than_a_step_takes(made):
    with pytest.raises(UserError, match=r"12 images, fewer than one step takes \(batch size 7 x 2 processes\)"):
        train(made, batch_size=7, world_size=2)


def test_without_a_crop_training_images_are_as_in_evaluation(made):
    found = batches(train(made, crop=None))
    whole = [image for images, _ in evaluation(made, split="train") for image in images]
    assert all(any(torch.equal(image, other) for other in whole) for images, _ in found for image in images)
