"""Images in class folders, decoded by worker processes."""

import io
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from data_helpers import eval_loader, global_generators_at_rest, train_loader
from PIL import Image
from torchvision import transforms as T

from data import Augmentation, DatasetInfo, Source, describe
from data.decode import to_pixels
from repopt.errors import UserError

CPU = torch.device("cpu")
NUM_CLASSES = 12
RAUG15, WEAK, NONE = (Augmentation(preset=preset) for preset in ("raug15", "weak", "none"))
COMMON = {"image_size": 24, "interpolation": "bilinear", "num_classes": NUM_CLASSES, "device": CPU, "num_workers": 0}


def make_train(root, augmentation=WEAK, dataset="folder", **changes):
    settings = COMMON | {"batch_size": 8, "label_smoothing": 0.1} | changes
    return train_loader(Source(dataset, str(root)), augmentation, **settings)


def make_eval(root, **changes):
    return eval_loader(Source("imagenet", str(root)), **(COMMON | {"batch_size": 5, "crop": False} | changes))


def by_index(loader, epoch=0):
    """Every image of the epoch by its index in the data set."""
    loader.set_epoch(epoch)
    order = torch.cat(tuple(loader._sampler.batches(epoch)))
    images = torch.cat([images for images, _ in loader])
    return dict(zip(order.tolist(), images, strict=True))


def same(a, b):
    assert sorted(a) == sorted(b)
    return all(torch.equal(a[i], b[i]) for i in a)


def test_describe_counts_the_class_folders(image_folder):
    for dataset in ("folder", "imagenet"):
        assert describe(Source(dataset, str(image_folder))) == DatasetInfo(NUM_CLASSES, None)


def test_what_is_hidden_is_no_class_and_no_image(image_folder, tmp_path):
    root = tmp_path / ".pictures"
    shutil.copytree(image_folder, root)
    picture = next((root / "val").glob("*/*"))
    for split in ("train", "val"):
        for place in (".ipynb_checkpoints", ".git", f"{picture.parent.name}/.thumbnails"):
            (root / split / place).mkdir()
            shutil.copy(picture, root / split / place)
    shutil.copy(picture, picture.with_name(f"._{picture.name}"))
    assert describe(Source("folder", str(root))) == DatasetInfo(NUM_CLASSES, None)
    assert make_eval(root).num_images == NUM_CLASSES
    assert make_train(root).num_images == make_train(image_folder).num_images


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_a_split_under_another_name(image_folder, tmp_path, name):
    root = tmp_path / "pictures"
    shutil.copytree(image_folder, root)
    (root / "val").rename(root / name)
    with pytest.raises(
        UserError, match=rf"^no folder val/ in '.*pictures': .* \(there is {name}/: rename it, or link it"
    ):
        describe(Source("folder", str(root)))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_grey_pictures_of_16_bits(suffix):
    """Their upper 8 bits, as of 16 bits in three channels: 127 of 255 where there are 127 * 257 of 65,535."""
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 127 * 257], [258, 65535]], np.uint16)).save(file, suffix)
    expected = np.repeat(np.array([[0, 127], [1, 255]], np.uint8)[..., None], 3, axis=2)
    assert np.array_equal(to_pixels(file.getvalue()).numpy(), expected)


@pytest.mark.parametrize(("dtype", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_values_without_a_range_are_unreadable(dtype, mode):
    file = io.BytesIO()
    Image.fromarray(np.full((2, 2), 0.5, dtype)).save(file, "tiff")
    with pytest.raises(
        OSError, match=f"values without a range, in Pillow's mode {mode}: convert them to 8 or 16 bits$"
    ):
        to_pixels(file.getvalue())


def test_evaluation_equals_the_textbook_pipeline(image_folder):
    for crop, short in ((False, 24), (True, 27)):  # 24 * 256 / 224 = 27.4
        textbook = T.Compose(
            [
                T.Resize(short),
                T.CenterCrop(24),
                T.ToTensor(),
                T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        loader = make_eval(image_folder, crop=crop)
        assert (len(loader), loader.num_images) == (3, NUM_CLASSES)
        images, labels = map(torch.cat, zip(*loader, strict=True))
        paths = sorted((image_folder / "val").glob("*/*"))
        expected = torch.stack([textbook(Image.open(path).convert("RGB")) for path in paths])
        torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
        assert labels.tolist() == list(range(NUM_CLASSES))


def test_training_images_transformed_as_in_evaluation(image_folder):
    some = list(make_eval(image_folder, split="train", max_images=5, batch_size=2))
    assert [len(labels) for _, labels in some] == [2, 2, 1]
    every = torch.cat([images for images, _ in make_eval(image_folder, split="train")])
    assert len(every) == 24
    for image in torch.cat([images for images, _ in some]):
        assert any(torch.equal(image, other) for other in every)


@pytest.mark.parametrize("world", (1, 2, 3, 4))
def test_evaluation_takes_every_image_once(image_folder, world):
    labels = [
        label
        for rank in range(world)
        for _, targets in make_eval(image_folder, rank=rank, world_size=world, batch_size=2)
        for label in targets.tolist()
    ]
    assert sorted(labels) == list(range(NUM_CLASSES))


@pytest.mark.parametrize(
    "augmentation", [RAUG15, Augmentation(reprob=0.5, color_jitter=0.4)], ids=["raug15", "timm, erasing"]
)
def test_an_images_augmentation_depends_on_seed_epoch_and_index_alone(image_folder, augmentation):
    alone = by_index(make_train(image_folder, augmentation), epoch=1)
    assert len(alone) == 24

    workers = make_train(image_folder, augmentation, num_workers=2)
    by_index(workers, epoch=0)  # what the workers did before leaves no trace
    assert same(by_index(workers, epoch=1), alone)
    assert same(by_index(make_train(image_folder, augmentation, num_workers=1), epoch=1), alone)

    together = {}
    for rank in range(2):
        loader = make_train(image_folder, augmentation, rank=rank, world_size=2, batch_size=4)
        together |= by_index(loader, epoch=1)
    assert same(together, alone)

    for other in (
        by_index(make_train(image_folder, augmentation), epoch=2),
        by_index(make_train(image_folder, augmentation, seed=1), epoch=1),
    ):
        assert sum(torch.equal(other[i], alone[i]) for i in alone) <= 1


def test_equal_images_are_augmented_differently(image_folder, tmp_path):
    path = next((image_folder / "train" / "class00").iterdir())
    for name in "abcdefgh":
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        shutil.copy(path, folder)
    crops = by_index(make_train(tmp_path, WEAK, batch_size=8))
    assert len({image.numpy().tobytes() for image in crops.values()}) == 8


def test_the_global_generators_are_neither_used_nor_moved(image_folder):
    augmentation = Augmentation(reprob=0.9, mixup=0.5)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with global_generators_at_rest():
        first = torch.cat([images for images, _ in make_train(image_folder, augmentation)])
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert torch.equal(torch.cat([images for images, _ in make_train(image_folder, augmentation)]), first)


def test_targets_are_the_class_indices(image_folder):
    loader = make_train(image_folder, NONE)
    order = torch.cat(tuple(loader._sampler.batches(0)))
    batches = list(loader)
    assert all(targets.dtype == torch.int64 for _, targets in batches)
    assert torch.equal(torch.cat([targets for _, targets in batches]), order // 2)  # two images per class
    images = torch.cat([images for images, _ in batches])
    paths = sorted((image_folder / "train").glob("*/*"))
    textbook = T.Compose(
        [T.Resize(24), T.CenterCrop(24), T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    expected = torch.stack([textbook(Image.open(paths[i]).convert("RGB")) for i in order])
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_batches_are_as_asked_for(image_folder, memory_format):
    loader = make_train(image_folder, Augmentation(mixup=0.2), memory_format=memory_format)
    for images, targets in loader:
        assert (images.shape, images.dtype) == ((8, 3, 24, 24), torch.float32)
        assert images.is_contiguous(memory_format=memory_format)
        assert (targets.shape, targets.dtype) == ((8, NUM_CLASSES), torch.float32)


def test_random_erasing_is_for_the_default_preset_only(image_folder):
    def images(preset, reprob, count=1):
        augmentation = Augmentation(
            preset=preset, auto_augment="none", color_jitter=0.0, reprob=reprob, remode="const", recount=count
        )
        return by_index(make_train(image_folder, augmentation))

    plain, erased = images(None, 0.0), images(None, 1.0)
    areas = []
    for i, image in erased.items():
        changed = (image != plain[i]).any(0)
        (ys,), (xs,) = changed.any(1).numpy().nonzero(), changed.any(0).numpy().nonzero()
        rectangle = image[:, ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
        assert (rectangle == 0).all()
        assert changed.sum() == rectangle[0].numel()
        areas.append(rectangle[0].numel() / image[0].numel())
    assert 0.01 < min(areas) < 0.15 < max(areas) < 0.4
    assert not same(images(None, 1.0, count=3), erased)
    for i, image in images("weak", 1.0).items():  # the same crops; Pillow's resizing rounds otherwise
        torch.testing.assert_close(image, plain[i], rtol=0, atol=2.5 / 255 / 0.224)
    half = images(None, 0.5)
    assert 0 < sum(torch.equal(half[i], plain[i]) for i in plain) < 24


def test_greyscale_palette_and_transparent_images_become_rgb(tmp_path):
    for k, mode in enumerate(("L", "P", "RGBA", "CMYK", "1")):
        folder = tmp_path / "val" / str(k)
        folder.mkdir(parents=True)
        Image.new("RGB", (30, 30), (255, 0, 0)).convert(mode).save(folder / ("a.jpg" if mode == "CMYK" else "a.png"))
    images = torch.cat([images for images, _ in make_eval(tmp_path)])
    assert images.shape == (5, 3, 24, 24)


def test_evaluation_needs_no_training_folder(image_folder, tmp_path):
    shutil.copytree(image_folder / "val", tmp_path / "val")
    source = Source("imagenet", str(tmp_path))
    assert describe(source, splits=("val",)).num_classes == NUM_CLASSES
    assert sum(len(targets) for _, targets in make_eval(tmp_path)) == NUM_CLASSES
    with pytest.raises(UserError, match=r"no folder train/ in"):
        describe(source)


def broken_folders(root):
    """(folder made, message expected) of each way to get the class folders wrong."""
    (root / "no classes" / "train").mkdir(parents=True)
    (root / "no images" / "train" / "a").mkdir(parents=True)
    for split, classes in (("train", "abc"), ("val", "abd")):
        for name in classes:
            (root / "different" / split / name).mkdir(parents=True)
    (root / "file").write_text("")
    return {
        "missing": r"data folder '.*missing' does not exist: give --data-path",
        "file": r"data folder '.*file' does not exist",
        "no classes": r"no class folders in '.*train'",
        "different": r"val/ in '.*different' has a folder 'd', which is no class of train's \(1 of 3 folders",
    }


def test_folder_errors(tmp_path):
    for name, message in broken_folders(tmp_path).items():
        with pytest.raises(UserError, match=message):
            describe(Source("folder", str(tmp_path / name)))
    with pytest.raises(UserError, match=r"data folder '' does not exist"):
        describe(Source("folder"))
    with pytest.raises(UserError, match=r"no images.*\ba\b"):
        make_train(tmp_path / "no images")


@pytest.mark.parametrize(
    ("augmentation", "changes", "message"),
    [
        (Augmentation(preset="raug51"), {}, r"unknown augmentation preset 'raug51'; did you mean 'raug15'"),
        (WEAK, {"interpolation": "bicubik"}, r"unknown interpolation 'bicubik'; did you mean 'bicubic'"),
        (Augmentation(auto_augment="foo"), {}, r"auto-augment policy 'foo'"),
        (Augmentation(remode="pixels"), {}, r"unknown random erasing mode 'pixels'; did you mean 'pixel'"),
        (WEAK, {"batch_size": 25}, r"24 images.*25 x 1"),
        (WEAK, {"batch_size": 13, "world_size": 2}, r"24 images.*13 x 2"),
        (Augmentation(cutmix=1.0), {"batch_size": 3}, r"even, not 3"),
        (WEAK, {"num_classes": 11}, r"12 classes.*11"),
    ],
)
def test_user_errors(image_folder, augmentation, changes, message):
    with pytest.raises(UserError, match=message):
        make_train(image_folder, augmentation, **changes)


@pytest.mark.parametrize(
    "augmentation", [RAUG15, NONE, Augmentation(), Augmentation(auto_augment="none")], ids=lambda a: str(a.preset)
)
def test_worker_processes_may_be_spawned(image_folder, augmentation):
    """What a worker receives survives pickling, as spawned workers (unlike forked ones) need."""
    dataset = make_train(image_folder, augmentation)._workers.dataset
    copied = pickle.loads(pickle.dumps(dataset))
    for item in ((0, 0), (3, 7)):
        assert torch.equal(copied[item][0], dataset[item][0])
        assert copied[item][1:] == dataset[item][1:]
