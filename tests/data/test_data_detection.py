"""Images with boxes and masks: COCO's layout, and scenes of digits."""

import copy
import itertools
import json
import logging
import pickle
import random
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_helpers import AS_STORED, error_of, global_generators_at_rest, tagged
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

import data
from data import Detection, Source, coco, digits, scenes
from data.decoded import DecodedLoader
from data.registry import IMAGENET_MEAN, IMAGENET_STD
from repopt.errors import UserError
from train.logging import logger

CPU = torch.device("cpu")
COMMON = {"device": CPU, "num_workers": 0}
EPOCH = 3
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}, {"id": 3, "name": "bird"}]
COUNTS = {"train": 8, "val": 5}  # images; the last two of train have nothing to train on


def size(number):
    return 40 + 2 * number, 30 + number  # width, height


def polygon(left, top, width, height):
    return [[left, top, left + width, top, left + width, top + height, left + width / 2, top + height / 3]]


def uncompressed(mask):
    flat = mask.flatten("F").tolist()
    counts = [0] if flat[0] else []
    return {"size": list(mask.shape), "counts": counts + [len(list(run)) for _, run in itertools.groupby(flat)]}


def annotations_of(number):
    """One box as a polygon, two as run lengths, a crowd; not sorted by image, and of some images none."""
    width, height = size(number)
    mask = np.zeros((height, width), np.uint8)
    mask[5 + number : 20, 3:11] = 1
    mask[:3, :2] = 1
    return [
        {"category_id": 7, "bbox": [2.5, 3.25, 20.125, 9.0], "segmentation": polygon(2.5, 3.25, 20.125, 9.0)},
        {"category_id": 90, "bbox": [0, 0, 11, 20], "segmentation": uncompressed(mask)},
        {"category_id": 3, "bbox": [-2, 10, 2000, 12.5], "segmentation": uncompressed(1 - mask)},
        {"category_id": 7, "bbox": [0, 0, 30, 20], "segmentation": uncompressed(mask), "iscrowd": 1},
    ]


def content_of(split):
    images, annotations = [], []
    for number in range(COUNTS[split]):
        width, height = size(number)
        image_id = 1000 - 7 * number
        name = f"{split}{number:03}.png"
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        of_image = annotations_of(number)[: 1 + number % 4] if number < 6 else annotations_of(number)[3:][: 7 - number]
        annotations += [{"iscrowd": 0, "area": 99.5, "image_id": image_id} | annotation for annotation in of_image]
    np.random.default_rng(0).shuffle(annotations)
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = 10 * number
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    for split in COUNTS:
        content = content_of(split)
        write(root, content, split)
        (root / f"{split}2017").mkdir()
        for number, image in enumerate(content["images"]):
            pixels = np.random.default_rng(number).integers(0, 256, (image["height"], image["width"], 3), np.uint8)
            pixels[0, 0] = 255
            Image.fromarray(pixels).save(root / f"{split}2017" / image["file_name"])
    return root


def annotation_file(root, split="train"):
    return root / "annotations" / f"instances_{split}2017.json"


def write(root, content, split="train"):
    annotation_file(root, split).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def root(made, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(made, tmp_path / "copy")


@pytest.fixture
def few_scenes(monkeypatch, tmp_path):
    monkeypatch.setattr(scenes, "_COUNTS", {"train": 6, "val": 3})
    return Source("scenes", str(tmp_path / "scenes"))


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.WARNING, logger.name)
    return lambda: [record.getMessage() for record in caplog.records if record.name == logger.name]


def source_at(root, on_bad_image="skip"):
    return Source("coco", str(root), on_bad_image=on_bad_image)


def train(root, on_bad_image="skip", **changes):
    return train_on(source_at(root, on_bad_image), **changes)


def train_on(source, masks=True, **changes):
    return data.train_loader(Detection(source, masks), **(COMMON | {"batch_size": 2} | changes))


def evaluation(root, **changes):
    return data.eval_loader(Detection(source_at(root)), **(COMMON | {"batch_size": 2} | changes))


def batches(loader, epoch=EPOCH, seen=()):
    loader.set_epoch(epoch, seen)
    found = list(loader)
    assert len(found) == len(loader)
    return found


def pairs(found):
    """Every image of some batches with its target."""
    return [pair for images, targets in found for pair in zip(images, targets, strict=True)]


def ids(found):
    return [int(target["image_id"]) for _, target in pairs(found)]


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for (image, target), (other, expected_target) in zip(pairs(actual), pairs(expected), strict=True):
        assert torch.equal(image, other)
        assert target.keys() == expected_target.keys()
        assert all(torch.equal(target[key], expected_target[key]) for key in target)


def refusal(root, **changes):
    with pytest.raises(UserError) as error:
        train(root, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_labels_are_the_categories_in_the_order_of_their_ids(made, few_scenes):
    images = Detection(source_at(made))
    assert (images.class_names, images.category_ids) == (("bird", "cat", "dog"), (3, 7, 90))
    assert images.annotations == annotation_file(made, "val")
    assert (images.spec.mean, images.spec.std) == (IMAGENET_MEAN, IMAGENET_STD)
    images = Detection(few_scenes)
    assert (images.class_names, images.category_ids) == (tuple("0123456789"), tuple(range(1, 11)))
    assert images.annotations.is_file()
    spec = Detection(Source("scenes", "nowhere")).spec
    assert (spec.mean, spec.std) == (digits.MEAN, digits.STD)


def test_annotations_of_the_test_images_are_read_once(made, monkeypatch):
    files = []
    parse = coco._parse
    monkeypatch.setattr(coco, "_parse", lambda file: files.append(file) or parse(file))
    images = Detection(source_at(made), masks=True)
    assert images.class_names
    assert images.ground_truth is images.ground_truth
    for make in (data.train_loader, data.eval_loader):
        assert len(make(images, batch_size=2, **COMMON)) == 3
    assert sorted(files) == [annotation_file(made, split) for split in ("train", "val")]


@pytest.mark.parametrize("masks", (False, True))
def test_targets_are_those_of_pycocotools(made, masks):
    reference = COCO(annotation_file(made))
    loader = train(made, masks=masks, batch_size=1)
    assert (len(loader), loader.num_images) == (6, 6)
    mirrored = 0
    for epoch in range(6):
        found = batches(loader, epoch)
        assert sorted(ids(found)) == sorted(1000 - 7 * number for number in range(6))
        for image, target in pairs(found):
            image_id = int(target["image_id"])
            info = reference.imgs[image_id]
            path = made / "train2017" / info["file_name"]
            pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
            flipped = not torch.allclose(image, pixels)
            mirrored += flipped
            torch.testing.assert_close(image.flip(2) if flipped else image, pixels, rtol=0, atol=1e-6)
            expected = [a for a in reference.imgToAnns[image_id] if not a["iscrowd"]]
            width, height = info["width"], info["height"]
            boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in expected)])
            boxes[:, 0::2].clamp_(0, width), boxes[:, 1::2].clamp_(0, height)
            if flipped:
                boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
            assert torch.equal(target["boxes"], boxes)
            assert target["labels"].tolist() == [(3, 7, 90).index(a["category_id"]) + 1 for a in expected]
            if masks:
                every = torch.from_numpy(np.stack([reference.annToMask(a) for a in expected]))
                assert torch.equal(target["masks"], every.flip(2) if flipped else every)
            kinds = {"image_id": torch.int64, "boxes": torch.float32, "labels": torch.int64, "masks": torch.uint8}
            assert {key: value.dtype for key, value in target.items()} == {
                key: kind for key, kind in kinds.items() if masks or key != "masks"
            }
            assert all(type(value) is torch.Tensor for value in (image, *target.values()))
            assert image.dtype == torch.float32
    assert 8 < mirrored < 28


def test_values_of_images_are_from_0_to_1(made):
    for image, _ in pairs(list(evaluation(made))):
        assert image.max() == 1
        assert 0 <= image.min() < 0.02


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_images_lie_in_memory_as_asked_for(made, memory_format):
    for make in (train, evaluation):
        for image, _ in pairs(list(make(made, memory_format=memory_format))):
            assert image[None].is_contiguous(memory_format=memory_format)


def test_digits_are_not_mirrored(few_scenes):
    reference = COCO(Detection(few_scenes).annotations.with_name("instances_train2017.json"))
    loader = train_on(few_scenes)
    for epoch in range(4):
        for _, target in pairs(batches(loader, epoch)):
            expected = reference.imgToAnns[int(target["image_id"])]
            assert torch.equal(target["masks"], torch.tensor(np.stack([reference.annToMask(a) for a in expected])))


def test_masks_of_scenes_lie_in_their_boxes(few_scenes):
    for _, target in pairs(list(train_on(few_scenes, batch_size=3))):
        for mask, box in zip(target["masks"], target["boxes"], strict=True):
            rows, columns = mask.nonzero().unbind(1)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("world", (1, 2, 3))
def test_evaluation_takes_every_image_once(made, world):
    found = [list(evaluation(made, rank=rank, world_size=world)) for rank in range(world)]
    assert sorted(i for of_rank in found for i in ids(of_rank)) == sorted(1000 - 7 * number for number in range(5))
    assert all(target.keys() == {"image_id"} for of_rank in found for _, target in pairs(of_rank))
    assert evaluation(made).num_images == 5


def test_training_images_as_in_evaluation(made):
    every = list(evaluation(made, split="train"))
    assert len(ids(every)) == 8  # those without boxes too
    some = ids(list(evaluation(made, split="train", max_images=3, seed=1)))
    assert len(set(some)) == 3
    assert set(some) <= set(ids(every))


def test_the_ground_truth_is_the_annotation_file(made, capsys, few_scenes):
    for source in (source_at(made), few_scenes):
        found = Detection(source, masks=True).ground_truth
        assert capsys.readouterr() == ("", "")
        reference = COCO(Detection(source).annotations)
        capsys.readouterr()
        assert (found.anns, found.imgs, found.cats) == (reference.anns, reference.imgs, reference.cats)
        assert (found.imgToAnns, found.catToImgs) == (reference.imgToAnns, reference.catToImgs)


@pytest.mark.parametrize("workers", (0, 2))
def test_a_stopped_epoch_goes_on_bit_for_bit(made, workers):
    whole = batches(train(made))
    stopped = train(made, num_workers=workers)
    stopped.set_epoch(EPOCH)
    first = list(itertools.islice(iter(stopped), 1))
    seen = json.loads(json.dumps(stopped.position_after(1)))
    fresh = train(made, num_workers=workers)
    assert_equal(first + batches(fresh, seen=seen), whole)
    assert (len(fresh), fresh.images_seen) == (2, 2)


def test_batches_follow_from_seed_epoch_and_images_alone(made):
    expected = batches(train(made))
    workers = train(made, num_workers=2)
    batches(workers, epoch=0)
    assert_equal(batches(workers), expected)
    ranks = [batches(train(made, batch_size=1, rank=rank, world_size=2)) for rank in range(2)]
    joined = [([*a, *b], [*s, *t]) for (a, s), (b, t) in zip(*ranks, strict=True)]
    assert_equal(joined, expected)
    assert ids(batches(train(made), epoch=4)) != ids(expected) != ids(batches(train(made, seed=1)))
    assert_equal(list(evaluation(made, num_workers=2)), list(evaluation(made)))


def test_the_global_generators_are_neither_used_nor_moved(made):
    with global_generators_at_rest():
        first = batches(train(made))
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert_equal(batches(train(made)), first)


def test_worker_processes_may_be_spawned(made):
    samples = train(made)._workers.dataset
    (image, target, _), (other, same, _) = samples[3, 2], pickle.loads(pickle.dumps(samples))[3, 2]
    assert torch.equal(image, other)
    assert all(torch.equal(target[key], same[key]) for key in target)


def test_a_worker_sends_nothing_but_the_image_and_its_target(made):
    for loader in (train(made), evaluation(made)):
        image, target, _ = loader._workers.dataset[0, 0]
        for tensor in (image, *target.values()):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("what", ("id", "box", "label", "order"))
def test_the_fingerprint_follows_from_the_annotations(made, root, what):
    one = train(made).fingerprint
    assert one == train(root, rank=1, world_size=2).fingerprint == train(root, masks=False).fingerprint
    content = content_of("train")
    match what:
        case "id":
            for thing in (*content["images"], *content["annotations"]):
                key = "image_id" if "image_id" in thing else "id"
                thing[key] += thing[key] == 1000
        case "box":
            next(a for a in content["annotations"] if not a["iscrowd"])["bbox"][0] += 0.001
        case "label":
            next(a for a in content["annotations"] if a["category_id"] == 90)["category_id"] = 7
        case "order":
            content["images"].reverse()
    write(root, content)
    assert train(root).fingerprint != one


@pytest.mark.parametrize("workers", (0, 2))
def test_unreadable_images(root, workers):
    for split in ("train", "val"):
        path = root / f"{split}2017" / f"{split}002.png"
        path.write_bytes(path.read_bytes()[:-40])
    path = str(root / "train2017" / "train002.png")
    loader = train(root, num_workers=workers)
    found = list(loader)
    assert len(ids(found)) == 6
    assert 1000 - 14 not in ids(found)
    assert list(loader.unreadable) == [path]
    refused = error_of(train(root, "raise", num_workers=workers))
    assert refused.startswith(f"cannot read image {path!r} (")
    refused = error_of(evaluation(root, num_workers=workers))
    assert refused.startswith(f"cannot read image {path.replace('train', 'val')!r} (")
    assert "\n" not in refused


@pytest.mark.parametrize("workers", (0, 2))
def test_an_image_of_another_size_than_the_file_says(root, workers):
    for split, make in (("train", train), ("val", evaluation)):
        path = root / f"{split}2017" / f"{split}002.png"
        Image.new("RGB", (32, 44)).save(path)
        assert error_of(make(root, num_workers=workers)) == (
            f"image {str(path)!r} has 32 x 44 pixels, {annotation_file(root, split)} says 44 x 32"
        )


@pytest.mark.parametrize("kind", ("PNG", "JPEG"))
def test_boxes_and_masks_are_of_the_image_that_is_shown(tmp_path, kind):
    """Whatever a tag says of how it is stored: the annotated rectangle is the one that is red."""
    width, height, (left, top, right, bottom) = 64, 48, (8, 16, 40, 24)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[top:bottom, left:right, 0] = 255
    images = [{"id": o, "file_name": f"{o}.{kind}", "width": width, "height": height} for o in AS_STORED]
    outline = [[left, top, right, top, right, bottom, left, bottom]]
    box = {"bbox": [left, top, right - left, bottom - top], "segmentation": outline, "area": 256, "iscrowd": 0}
    annotations = [{"id": o, "image_id": o, "category_id": 7} | box for o in AS_STORED]
    (tmp_path / "annotations").mkdir()
    for split in COUNTS:
        write(tmp_path, {"images": images, "annotations": annotations, "categories": CATEGORIES}, split)
        (tmp_path / f"{split}2017").mkdir()
        for o, image in zip(AS_STORED, images, strict=True):
            (tmp_path / f"{split}2017" / image["file_name"]).write_bytes(tagged(pixels, o, kind, quality=95))
    for image, _ in pairs(list(evaluation(tmp_path))):
        assert ((image[0] > 0.5) == torch.from_numpy(pixels[..., 0] > 0)).all()
    trained_on = pairs(list(train(tmp_path)))
    assert sorted(int(target["image_id"]) for _, target in trained_on) == [*AS_STORED]
    for image, target in trained_on:
        red = image[0] > 0.5
        rows, columns = red.nonzero().unbind(1)
        assert target["boxes"].tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
        assert torch.equal(target["masks"][0] > 0, red)


def test_annotations_of_an_image_as_it_is_stored(root):
    """It lies on its side: the sizes tell."""
    path = root / "val2017" / "val002.png"
    path.write_bytes(tagged(np.array(Image.open(path)).swapaxes(0, 1), 6))
    assert error_of(evaluation(root)) == (
        f"image {str(path)!r} has 32 x 44 pixels, {annotation_file(root, 'val')} says 44 x 32; its EXIF tag turns it: "
        "annotate it as viewers show it, or store it turned, without the tag"
    )


def changed(content, path, value):
    """A copy in which the place that a path of keys leads to has a value; `...` removes it."""
    content = copy.deepcopy(content)
    *parents, last = path
    place = content
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


FIRST = content_of("train")["annotations"][0]["id"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "{file} is no JSON: Expecting property name"),
        ("", "{file} is no JSON: Expecting value"),
        ("[" * 100_000, "{file} is no JSON: maximum recursion depth"),
        ("1" * 5000, "{file} is no JSON: Exceeds the limit"),
        ("[1]", "{file} holds [1], not images, annotations and categories"),
        ("{}", "{file} has no list 'images'"),
    ],
)
def test_files_that_are_none(root, text, message):
    write(root, text)
    assert refusal(root).startswith(message.format(file=annotation_file(root)))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["images"], {}, "{file} has no list 'images'"),
        (["images"], [], "{file}: the list 'images' is empty"),
        (["categories"], [], "{file}: the list 'categories' is empty"),
        (["annotations"], ..., "{file} has no list 'annotations'"),
        (["images", 2], 3, "{file}: images[2] lacks 'id' (an integer): 3"),
        (["images", 2, "id"], ..., "{file}: images[2] lacks 'id' (an integer): {{'file_name': 'train002.png'"),
        (["images", 2, "id"], "7", "{file}: images[2] lacks 'id' (an integer): {{"),
        (["images", 2, "id"], True, "{file}: images[2] lacks 'id' (an integer): {{"),
        (["images", 2, "id"], 10**30, "{file}: images[2] lacks 'id' (an integer): {{"),
        (["images", 2, "id"], 1000, "{file}: images has the id 1000 more than once"),
        (["images", 2, "width"], 0, "{file}: images[2] lacks 'width' (an integer from 1 on): {{"),
        (["images", 2, "height"], 32.5, "{file}: images[2] lacks 'height' (an integer from 1 on): {{"),
        (["images", 2, "width"], 10**9, "{file}: image 986 has more than 268435456 pixels"),
        (["images", 2, "file_name"], None, "{file}: images[2] lacks 'file_name' (text): {{"),
        (["categories", 1, "name"], 5, "{file}: categories[1] lacks 'name' (text): {{"),
        (["categories", 1, "id"], 7, "{file}: categories has the id 7 more than once"),
        (["annotations", 0, "id"], 0, "{file}: annotations[0] lacks 'id' (an integer from 1 on): {{"),
        (["annotations", 0, "id"], 20, "{file}: annotations has the id 20 more than once"),
        (["annotations", 0, "iscrowd"], ..., "{file}: annotations[0] lacks 'iscrowd' (an integer from 0 on): {{"),
        (["annotations", 0, "area"], None, "{file}: annotations[0] lacks 'area' (a number): {{"),
        (["annotations", 0, "bbox"], [1, 2, 3], "{file}: annotations[0] lacks 'bbox' (four numbers): {{"),
        (["annotations", 0, "bbox"], [1, 2, 3, "4"], "{file}: annotations[0] lacks 'bbox' (four numbers): {{"),
        (["annotations", 0, "bbox"], [1, 2, 3, float("nan")], "{file}: annotations[0] lacks 'bbox' (four numbers)"),
        (["annotations", 0, "bbox"], [1, 2, 3, float("inf")], "{file}: annotations[0] lacks 'bbox' (four numbers)"),
        (["annotations", 0, "bbox"], [1, 2, 3, 10**400], "{file}: annotations[0] lacks 'bbox' (four numbers)"),
        (["annotations", 0, "bbox"], 5, "{file}: annotations[0] lacks 'bbox' (four numbers): {{"),
        (
            ["annotations", 0, "image_id"],
            999,
            f"{{file}}: annotation {FIRST} is of image 999, which the file does not list (1 such)",
        ),
        (
            ["annotations", 0, "category_id"],
            8,
            f"{{file}}: annotation {FIRST} is of category 8, which the file does not list (1 such)",
        ),
    ],
)
@pytest.mark.parametrize("split", ("train", "val"))
def test_records_that_are_not_sound(root, path, value, message, split):
    content = content_of(split)
    first, own = content["annotations"][0]["id"], message.replace("train002", f"{split}002")
    assert first == FIRST
    write(root, changed(content, path, value), split)
    assert refusal(root).startswith(own.format(file=annotation_file(root, split)))
    if split == "val":
        for use in ("class_names", "ground_truth"):
            with pytest.raises(UserError):
                getattr(Detection(source_at(root)), use)


def test_labels_are_in_the_order_of_given_classes(made):
    """As a network has them; one that the file lacks has an id that it lacks."""
    order = ("dog", "bird", "fish", "cat")
    images = Detection(replace(source_at(made), classes=order))
    assert images.class_names == order
    assert images.category_ids == (90, 3, 91, 7)
    split, other = images._val, Detection(source_at(made))._val
    names = [images.class_names[label - 1] for label in split.labels]
    assert names == [other.class_names[label - 1] for label in other.labels]
    with pytest.raises(UserError, match=r"category 'bird' is no class of those .* \(1 of 3 categories are none\)"):
        Detection(replace(source_at(made), classes=("dog", "cat"))).class_names  # noqa: B018


def test_splits_with_different_categories(root):
    write(root, changed(content_of("val"), ["categories", 0, "name"], "lion"), "val")
    assert refusal(root) == (f"{annotation_file(root)} and {annotation_file(root, 'val')} have different categories")


@pytest.mark.parametrize(
    "name", ["absent.png", "../val2017/val000.png", "/etc/passwd", "a\0b", "\ud800", "", "folder/x.png"]
)
def test_images_that_the_folder_lacks(root, name):
    write(root, changed(content_of("train"), ["images", 2, "file_name"], name))
    (root / "train2017" / "train004.png").unlink()
    folder = root / "train2017"
    message = refusal(root)
    assert message.startswith(f"{str(folder)!r} lacks 2 of 8 images that {annotation_file(root)} lists: ")
    assert message.isprintable()


def test_images_in_folders_of_their_own(made, root):
    (root / "train2017" / "more").mkdir()
    (root / "train2017" / "train002.png").rename(root / "train2017" / "more" / "x.png")
    write(root, changed(content_of("train"), ["images", 2, "file_name"], "more/x.png"))
    assert_equal(batches(train(root)), batches(train(made)))


def test_folders_that_are_absent(root, tmp_path):
    shutil.rmtree(root / "val2017")
    with pytest.raises(UserError, match=r"no folder '.*val2017', whose images instances_val2017.json lists"):
        Detection(source_at(root)).class_names  # noqa: B018
    annotation_file(root, "val").unlink()
    with pytest.raises(
        UserError, match=r"no annotation file '.*val2017.json': the data folder is not in COCO's layout"
    ):
        Detection(source_at(root)).class_names  # noqa: B018
    with pytest.raises(UserError, match=r"data folder '.*nothing' does not exist: give --data-path"):
        Detection(source_at(tmp_path / "nothing")).class_names  # noqa: B018


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source("cocoa"), r"unknown data set 'cocoa'; did you mean 'coco'\? \(allowed: coco, scenes\)"),
        (Source("coco"), r"data folder '' does not exist: give --data-path"),
        (Source("coco", on_bad_image="skipp"), r"unknown way with unreadable images 'skipp'"),
        (Source("coco", zip_mode=True), r"--zip is for imagenet and folder: data set 'coco' is in no zip"),
    ],
)
def test_sources_that_do_not_exist(source, message):
    for use in ("class_names", "ground_truth"):
        with pytest.raises(UserError, match=message):
            getattr(Detection(source), use)


def with_boxes(split, *boxes):
    content = content_of(split)
    for annotation, box in zip((a for a in content["annotations"] if a["category_id"] == 90), boxes, strict=False):
        annotation["bbox"] = box
    return content


EMPTY = ([5, 5, 0, 10], [5, 5, 10, 0.0009], [-30, 5, 30, 10], [5, 5, 10, -3])


def test_empty_boxes_are_left_out_with_one_warning_or_refused(root, warnings):
    content = with_boxes("train", *EMPTY[:3])
    write(root, content)
    first = next(a["id"] for a in content["annotations"] if a["category_id"] == 90)
    message = f"{annotation_file(root)}: 3 boxes are empty or outside their images, the first of annotation {first}"
    found = list(train(root))
    assert warnings() == [f"{message}; they are left out"]
    everything = [int(label) for _, target in pairs(found) for label in target["labels"]]
    assert len(everything) == sum(not a["iscrowd"] for a in content["annotations"]) - 3
    assert all((target["boxes"][:, 2:] > target["boxes"][:, :2]).all() for _, target in pairs(found))
    assert refusal(root, on_bad_image="raise") == message


@pytest.mark.parametrize("box", EMPTY)
def test_an_image_whose_only_box_is_empty_is_left_out(root, box):
    content = content_of("train")
    (only,) = (a for a in content["annotations"] if a["image_id"] == 1000)
    only["bbox"] = box
    write(root, content)
    assert sorted(ids(list(train(root, batch_size=1)))) == sorted(1000 - 7 * number for number in range(1, 6))


def test_a_box_of_a_crowd_may_be_empty(root, warnings):
    content = content_of("train")
    next(a for a in content["annotations"] if a["iscrowd"])["bbox"] = [0, 0, 0, 0]
    write(root, content)
    assert len(train(root, "raise")) == 3
    assert warnings() == []


def sides(width, height):
    return {"size": [height, width]}


W, H = size(0)
BAD_MASKS = {
    "absent": (..., "is missing: None"),
    "null": (None, "is missing: None"),
    "no polygons": ([], "has no polygon of three points or more: []"),
    "an empty polygon": ([[]], "has no polygon of three points or more: [[]]"),
    "two points": ([[1, 1, 5, 5]], "has no polygon of three points or more: [[1, 1, 5, 5]]"),
    "an empty second one": ([[1, 1, 5, 1, 5, 5], []], "has a polygon that is no list of x, y, x, y ...: [[1, "),
    "odd": ([[1, 1, 5, 1, 5, 5, 7]], "has a polygon that is no list of x, y, x, y ...: [[1, "),
    "text within": ([[1, 1, 5, 1, 5, "5"]], "has a polygon that is no list of x, y, x, y ...: [[1, "),
    "not a number": ([[1, 1, float("nan"), 1, 5, 5]], "has a polygon far outside the image: [[1, "),
    "endless": ([[1, 1, float("inf"), 1, 5, 5]], "has a polygon far outside the image: [[1, "),
    "far": ([[1, 1, 10**9, 1, 5, 5]], "has a polygon far outside the image: [[1, "),
    "text": ("polygon", "is neither polygons nor run lengths: 'polygon'"),
    "no counts": (sides(W, H), "is neither polygons nor run lengths: {'size': "),
    "other size": (
        sides(H, W) | {"counts": [W * H]},
        f"is not of the image's size, [{H}, {W}]: {{'counts': [{W * H}], 'size'",
    ),
    "size of floats": ({"size": [float(H), float(W)], "counts": [W * H]}, f"is not of the image's size, [{H}, {W}]: "),
    "too few": (sides(W, H) | {"counts": [9, 9]}, "has run lengths that are not those of the image's pixels: "),
    "too many": (sides(W, H) | {"counts": [9, W * H]}, "has run lengths that are not those of the image's pixels: "),
    "negative": (
        sides(W, H) | {"counts": [-9, 9, W * H]},
        "has run lengths that are not those of the image's pixels: ",
    ),
    "none": (sides(W, H) | {"counts": []}, "has run lengths that are not those of the image's pixels: "),
    "no list": (sides(W, H) | {"counts": 7}, "has run lengths that are not those of the image's pixels: "),
    "compressed": (
        sides(W, H) | {"counts": "0123"},
        "has compressed run lengths, where polygons or a list of run lengths are expected: {'counts': '0123', ",
    ),
}


@pytest.mark.parametrize("what", BAD_MASKS)
def test_malformed_masks_are_refused_where_masks_are_wanted(root, what):
    value, message = BAD_MASKS[what]
    content = content_of("train")
    number = next(k for k, a in enumerate(content["annotations"]) if a["image_id"] == 1000)
    bad = changed(content, ["annotations", number, "segmentation"], value)
    where = f"annotation {content['annotations'][number]['id']}: its segmentation "
    write(root, bad)
    assert refusal(root).startswith(f"{annotation_file(root)}: {where}{message}")
    assert len(train(root, masks=False)) == 3

    content = content_of("val")
    number = next(k for k, a in enumerate(content["annotations"]) if a["image_id"] == 1000)
    write(root, changed(content, ["annotations", number, "segmentation"], value), "val")
    assert len(Detection(source_at(root)).ground_truth.anns) == len(content["annotations"])
    with pytest.raises(UserError, match="its segmentation "):
        Detection(source_at(root), masks=True).ground_truth  # noqa: B018


def test_masks_are_those_that_pycocotools_reads():
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(1, 60, 2).tolist()
        mask = np.asfortranarray(rng.random((height, width)) < rng.choice([0.0, 0.02, 0.5, 1.0]), np.uint8)
        lengths = uncompressed(mask)
        assert not coco._invalid_reason(lengths, width, height)
        assert (rle.decode(rle.frPyObjects(lengths, height, width)) == mask).all()
    assert not coco._invalid_reason(sides(20_000, 10_000) | {"counts": [200_000_000]}, 20_000, 10_000)


def test_a_set_in_which_nothing_is_annotated(root):
    write(root, content_of("train") | {"annotations": []})
    assert "has 0 images, fewer than one step takes" in refusal(root, masks=False)
    assert len(ids(list(evaluation(root, split="train")))) == 8


def test_without_pycocotools(made, monkeypatch):
    for name in ("pycocotools", "pycocotools.coco", "pycocotools.mask"):
        monkeypatch.setitem(sys.modules, name, None)
    needs = r"^detection needs pycocotools \(pip install 'repopt\[downstream\]'\)$"
    with pytest.raises(UserError, match=needs):
        Detection(source_at(made)).ground_truth  # noqa: B018
    with pytest.raises(UserError, match=needs):
        train(made)
    assert len(list(train(made, masks=False))) == len(list(evaluation(made))) == 3


def test_the_loader_decodes_in_worker_processes(made):
    assert isinstance(train(made), DecodedLoader)
