"""Detectors on our backbones: the equivalence in them, their parts beside torchvision's, and their evaluation."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from model_helpers import with_statistics
from pycocotools.coco import COCO
from torch import nn
from torch.nn.functional import softplus
from torchvision.ops import MultiScaleRoIAlign, box_iou, clip_boxes_to_image

import repopt.detection
from repopt.detection import BODY, FCOS, HEADS, NECKS, WITH_MASKS, create_detector
from repopt.detection.cascade import STAGES, CascadeHeads
from repopt.errors import UserError
from repopt.layers import RepConv2d
from train.evaluation.detection import Detection, evaluate
from train.precision import Precision

SMALL = {
    "num_classes": 3,
    "channels": 16,
    "hidden": 32,
    "rois": 16,
    "sizes": (96,),
    "max_size": 128,
    "anchor_scale": 4,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
}
BOXES = [[8.0, 8.0, 60.0, 50.0], [30.0, 20.0, 90.0, 90.0]]
PRECISION = Precision(torch.device("cpu"))


def detector(name="RepOpt-VGG-nano", seed=1, **arguments):
    """In float64, from the same seed."""
    torch.manual_seed(seed)
    return create_detector(name, **{"mode": "target", **SMALL, **arguments}).double()


def batch(objects=2, dtype=torch.float64):
    """Two images with the same objects."""
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(3, 96, 96, generator=generator, dtype=dtype) for _ in range(2)]
    boxes = torch.tensor(BOXES, dtype=dtype)[:objects]
    target = {"boxes": boxes, "labels": torch.tensor([1, 3])[:objects], "masks": filled(boxes)}
    return images, [target] * 2


def filled(boxes, size=96):
    """Masks of the rectangles."""
    masks = torch.zeros(len(boxes), size, size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return masks


def train(model, optimizer, steps=5, of=None):
    """The losses of every step on one batch."""
    images, targets = of or batch()
    every = []
    for step in range(steps):
        torch.manual_seed(step)  # of the boxes that are sampled
        losses = model(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        every.append({name: loss.item() for name, loss in losses.items()})
    return every


def searched(**arguments):
    """Scales of both signs by a detector's names."""
    scales = repopt.extract_scales(detector(mode="hs", **arguments))
    return {name: values + torch.randn_like(values) for name, values in scales.items()}


SGD = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}


def csla_and_target(scales, head, **arguments):
    """Both detectors as the same function."""
    models = []
    for mode in ("csla", "target"):
        models.append(detector(mode=mode, head=head, neck="declared", **arguments))
        models[-1].load_state_dict(models[0].state_dict(), strict=False)
        torch.manual_seed(5)
        repopt.initialize(models[-1], scales)
    return models


def differences(csla, target):
    """Of all that is trained, relative, by name."""
    kernels = {path: module.kernel() for path, module in repopt.declared_blocks(csla)}
    pairs = {path: (kernels[path], module.kernel()) for path, module in repopt.declared_blocks(target)}
    others = dict(csla.named_parameters())
    pairs |= {n: (others[n], p) for n, p in target.named_parameters() if n.rpartition(".conv.weight")[0] not in kernels}
    return {name: ((a - b).norm() / a.norm().clamp(min=1)).item() for name, (a, b) in pairs.items()}


def assert_target_follows(csla, target, scales, rule, settings, **training):
    """Losses and parameters are the same, and all of them are trained."""
    start = {name: p.detach().clone() for name, p in target.named_parameters()}
    losses = [
        train(csla, repopt.build_optimizer(rule, csla, **settings), **training),
        train(target, repopt.build_optimizer(rule, target, scales, **settings), **training),
    ]
    for a, b in zip(*losses, strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-2)
    found = differences(csla, target)
    assert len(found) == len(start)
    assert max(found.values()) < 1e-10, found
    for name, p in target.named_parameters():
        assert not torch.equal(p, start[name]), f"{name} is not trained"


@pytest.mark.parametrize("head", WITH_MASKS)
def test_target_detector_follows_the_csla_detector(head):
    scales = searched(head=head, neck="declared")
    csla, target = csla_and_target(scales, head)
    assert_target_follows(csla, target, scales, "sgd", SGD)


def test_without_the_multipliers_it_does_not():
    scales = searched(head="mask", neck="declared")
    csla, target = csla_and_target(scales, "mask")
    for model in (csla, target):
        train(model, repopt.build_optimizer("sgd", model, **SGD))
    assert max(differences(csla, target).values()) > 1e-3


@pytest.mark.parametrize("neck", NECKS)
def test_multipliers_are_those_of_the_declared_kernels(neck):
    model = detector(neck=neck)
    mults = repopt.grad_mults(model, searched(neck=neck), degree=1)
    body = {f"{BODY}.{name}" for name, module in model.backbone.body.named_modules() if isinstance(module, RepConv2d)}
    assert len(body) == 28
    layers = {f"backbone.fpn.layer_blocks.{level}" for level in range(4)} if neck == "declared" else set()
    assert mults.keys() == {f"{path}.conv.weight" for path in body | layers}
    assert all((mults[f"{path}.conv.weight"].diagonal is not None) for path in layers)


def test_from_the_search_to_the_training(tmp_path):
    search = detector(mode="hs", head="cascade", neck="declared")
    train(search, repopt.build_optimizer("sgd", search, **SGD), steps=2)
    repopt.save_scales(repopt.extract_scales(search), tmp_path / "scales.pth")
    scales = repopt.load_scales(tmp_path / "scales.pth")
    assert scales["backbone.fpn.layer_blocks.0.scale_1x1.weight"].mean() == pytest.approx(math.sqrt(2), abs=0.1)
    target = detector(head="cascade", neck="declared")
    repopt.initialize(target, scales)
    losses = train(target, repopt.build_optimizer("sgd", target, scales, **SGD))
    assert sum(losses[-1].values()) < sum(losses[0].values())


def test_scales_of_a_classifier_train_the_body():
    scales = repopt.extract_scales(repopt.create_model("RepOpt-VGG-nano", mode="hs"))
    scales = {f"{BODY}.{name}": values for name, values in scales.items()}
    model = detector()
    repopt.initialize(model, scales)
    assert len(repopt.grad_mults(model, scales, degree=1)) == 28


@pytest.mark.parametrize(("name", "mode"), [("RepOpt-VGG-nano", "repvgg"), ("RepOpt-VGG-nano", "target")])
def test_deployed_detector_finds_the_same(name, mode):
    model = detector(name, mode=mode, neck="declared", head="cascade")
    images, targets = batch()
    with_statistics(model, lambda: model(images, targets)).eval()
    deployed = repopt.deploy(model)
    assert not any(isinstance(m, nn.BatchNorm2d | repopt.RepConv2d) for m in deployed.modules())
    assert deployed.masks
    for a, b in zip(model(images), deployed(images), strict=True):
        assert len(a["boxes"]) > 10
        for key in ("boxes", "labels", "scores", "masks"):
            torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("RepOpt-GhostNet-0.5x", {"neck": "declared"}),
        ("ghost", {"mode": "rep", "neck": "declared", "head": "faster"}),
        ("RepOpt-VGG-nano", {"mode": "repvgg", "neck": "declared"}),
        ("RepOpt-VGG-nano", {"mode": "qarepvgg", "neck": "declared"}),
        ("timm/mobilenetv3_small_050", {"mode": "plain"}),
        ("timm/mobilenetv3_small_050", {"mode": "plain", "neck": "declared"}),
        ("timm/repghostnet_050", {"neck": "declared"}),
    ],
)
def test_backbones(name, arguments):
    model = detector(name, **arguments)
    train(model, repopt.build_optimizer("sgd", model, lr=1e-3), steps=1)
    assert all(p.grad is not None for p in model.parameters())
    assert model.backbone.reductions == [4, 8, 16, 32]
    assert all(name.startswith(("body.", "fpn.")) for name in model.backbone.state_dict())
    features = model.backbone(torch.zeros(2, 3, 128, 64, dtype=torch.float64))
    assert {key: tuple(f.shape) for key, f in features.items()} == {
        "0": (2, 16, 32, 16),
        "1": (2, 16, 16, 8),
        "2": (2, 16, 8, 4),
        "3": (2, 16, 4, 2),
        "pool": (2, 16, 2, 1),
    }


@pytest.mark.parametrize(("strides", "smallest"), [((2, 2, 2, 2, 2), 4), ((2, 1, 2, 2, 2), 2)])
def test_anchors_follow_the_reductions(strides, smallest):
    model = detector(strides=strides)
    sides = [size for (size,) in model.regions.anchor_generator.sizes]
    assert sides == [4 * smallest * 2**level for level in range(5)]
    areas = [(w * h).mean() for a in model.regions.anchor_generator.cell_anchors for w, h in [(a[:, 2:] - a[:, :2]).T]]
    assert [area.sqrt().item() for area in areas] == pytest.approx(sides, rel=0.05)
    assert model.transform.size_divisible == 8 * smallest
    train(model, repopt.build_optimizer("sgd", model, lr=1e-3), steps=1)


def test_what_is_found_does_not_depend_on_the_images_before():
    """torchvision takes the scales of the features from the first batch."""
    model = detector(sizes=(64,), max_size=66).eval()
    image = torch.rand(3, 64, 64, dtype=torch.float64)
    (fresh,) = model([image])
    model([torch.rand(3, 21, 66, dtype=torch.float64)])
    (again,) = model([image])
    assert all(torch.equal(fresh[key], again[key]) for key in fresh)
    by_itself = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2)
    features, boxes = model.backbone(image[None]), [torch.tensor(BOXES, dtype=torch.float64)]
    ours = model.roi_heads.box_roi_pool(features, boxes, [(64, 64)])
    torch.testing.assert_close(ours, by_itself(features, boxes, [(64, 64)]))


@pytest.mark.parametrize("freeze", [False, True])
def test_frozen_batch_norms_and_checkpointing(freeze):
    plain = detector(freeze_batch_norm=freeze, neck="declared")
    checkpointed = detector(freeze_batch_norm=freeze, neck="declared", use_checkpoint=True)
    before = {name: buffer.clone() for name, buffer in plain.named_buffers()}
    for model in (plain, checkpointed):
        train(model, repopt.build_optimizer("sgd", model, lr=1e-3), steps=1)
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=name)
    for (name, a), b in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, before[name]) == (freeze and name.startswith(BODY)), name
    body = [m for m in plain.backbone.body.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.training != freeze for m in body)
    assert not any(m.training for m in plain.eval().modules())


@pytest.mark.parametrize("objects", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
def test_all_parameters_get_gradients(head, dtype, objects):
    """Also where there is nothing to be found, so that DDP waits for none; and under autocast."""
    model, precision = detector(head=head).to(torch.promote_types(dtype, torch.float32)), PRECISION
    if dtype in (torch.bfloat16, torch.float16):
        precision = Precision(torch.device("cpu"), dtype)
    images, targets = batch(objects, next(model.parameters()).dtype)
    with precision.autocast():
        losses = model(images, targets)
    assert all(loss.isfinite() for loss in losses.values())
    assert len(losses) == {"faster": 4, "mask": 5, "cascade": 11, "fcos": 3}[head]
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any() or not objects or head == FCOS, name  # of which a level may be without
    with precision.autocast():
        found = model.eval()(images)
    for detections in found:
        assert model.masks == ("masks" in detections) == (head in WITH_MASKS)
        assert detections["boxes"].dtype == detections["scores"].dtype == images[0].dtype
        assert not model.masks or detections["masks"].shape == (len(detections["boxes"]), 1, 96, 96)


def test_coordinates_keep_their_precision_under_autocast():
    model = detector(sizes=(1000,), max_size=1000, head="faster").float().eval()
    nn.init.zeros_(model.rpn.head.bbox_pred.weight)
    proposals = []
    model.regions.register_forward_hook(lambda module, inputs, output: proposals.append(output[0][0]))
    image = torch.rand(3, 96, 96)
    with torch.autocast("cpu", torch.bfloat16):
        model([image])
    assert proposals[0].dtype == torch.float32
    widths, heights = (proposals[0][:, 2:] - proposals[0][:, :2]).T
    inside = (proposals[0].amin(1) > 0) & (proposals[0].amax(1) < 1000)
    cells = torch.cat(model.regions.anchor_generator.cell_anchors)
    for width, height in zip(widths[inside].tolist(), heights[inside].tolist(), strict=True):
        assert (cells[:, 2:] - cells[:, :2] - torch.tensor([width, height])).abs().amax(1).min() < 1e-3


IMAGE_SHAPES = [(64, 80), (64, 80)]


def features():
    """Of images of 64 x 80 px, padded to 64 x 96."""
    generator = torch.Generator().manual_seed(4)
    return {
        str(level): torch.randn(2, 16, 16 >> level, 24 >> level, generator=generator, dtype=torch.float64)
        for level in range(4)
    }


def proposals(count=12):
    generator = torch.Generator().manual_seed(6)
    corners = torch.rand(2, count, 2, 2, generator=generator, dtype=torch.float64) * torch.tensor([70.0, 54.0])
    first, second = corners.sort(2).values.unbind(2)
    return list(torch.cat((first, second + 8), 2))


def objects():
    """One in each image; their masks are all of it."""
    boxes = [torch.tensor([[10.0, 5.0, 50.0, 45.0]]), torch.tensor([[20.0, 10.0, 78.0, 60.0]])]
    return [
        {"boxes": b.double(), "labels": torch.tensor([label]), "masks": torch.ones(1, 64, 80, dtype=torch.uint8)}
        for b, label in zip(boxes, (2, 3), strict=True)
    ]


DELTAS = [0.5, -0.25, 0.5, -0.5]
MASK_LOGITS = [-1.0, 0.5, 2.0]


def constant_cascade():
    """Heads that say the same of every box: class logits by stage, `DELTAS`, and `MASK_LOGITS`."""
    heads = detector(head="cascade").roi_heads
    for stage, mask_logit in zip(heads.stages, MASK_LOGITS, strict=True):
        for layer in (stage.box_predictor.cls_score, stage.box_predictor.bbox_pred, stage.mask_predictor[-1]):
            nn.init.zeros_(layer.weight)
        nn.init.normal_(stage.box_predictor.cls_score.bias)
        stage.box_predictor.bbox_pred.bias.data.copy_(torch.tensor(DELTAS))
        nn.init.constant_(stage.mask_predictor[-1].bias, mask_logit)
    return heads


def moved(boxes, stage, size):
    """By `DELTAS`, by hand."""
    dx, dy, dw, dh = (delta / weight for delta, weight in zip(DELTAS, stage.coder_weights, strict=True))
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    x, y = left + width / 2 + dx * width, top + height / 2 + dy * height
    half_width, half_height = width * math.exp(dw) / 2, height * math.exp(dh) / 2
    return clip_boxes_to_image(torch.stack((x - half_width, y - half_height, x + half_width, y + half_height), 1), size)


def distance(boxes, others):
    """The largest of any box to the nearest of the others."""
    return (boxes[:, None] - others).abs().amax(2).amin(1).max()


def test_a_cascade_of_one_stage_is_that_head():
    stage = detector(head="cascade").roi_heads.stages[0]
    cascade = CascadeHeads([stage], [0.5])
    for module in (stage, cascade):
        module.train()
    torch.manual_seed(1)
    _, losses = cascade(features(), proposals(), IMAGE_SHAPES, objects())
    torch.manual_seed(1)
    _, of_stage = stage(features(), proposals(), IMAGE_SHAPES, objects())
    assert losses == {f"{name}_1": 0.5 * loss for name, loss in of_stage.items()}
    assert len(losses) == 3
    for module in (stage, cascade):
        module.eval()
    detections, nothing = cascade(features(), proposals(), IMAGE_SHAPES)
    of_stage, _ = stage(features(), proposals(), IMAGE_SHAPES)
    assert nothing == {}
    for a, b in zip(detections, of_stage, strict=True):
        assert a.keys() == b.keys()
        assert len(a["boxes"]) > 5
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_cascade_finds_by_hand():
    heads = constant_cascade().eval()
    detections, _ = heads(features(), proposals(), IMAGE_SHAPES)
    logits = torch.stack([stage.box_predictor.cls_score.bias for stage in heads.stages]).mean(0)
    scores = logits.softmax(0)
    for found, boxes, size in zip(detections, proposals(), IMAGE_SHAPES, strict=True):
        for stage in STAGES:
            boxes = moved(boxes, stage, size)
        assert len(found["boxes"]) > 5
        torch.testing.assert_close(found["scores"], scores[found["labels"]])
        assert distance(found["boxes"], boxes) < 1e-9
        probability = torch.tensor(MASK_LOGITS, dtype=torch.float64).sigmoid().mean()
        assert found["masks"].shape == (len(found["boxes"]), 1, 28, 28)
        torch.testing.assert_close(found["masks"], probability.expand_as(found["masks"]))


def test_a_cascade_without_refinement_keeps_its_boxes():
    heads = constant_cascade().eval()
    for stage in heads.stages:
        nn.init.zeros_(stage.box_predictor.bbox_pred.bias)
    detections, _ = heads(features(), proposals(), IMAGE_SHAPES)
    for found, boxes, size in zip(detections, proposals(), IMAGE_SHAPES, strict=True):
        assert distance(found["boxes"], clip_boxes_to_image(boxes, size)) < 1e-9


def test_a_cascade_learns_by_hand(monkeypatch):
    heads = constant_cascade()
    given, sampled = [], []

    def watched(select):
        def select_and_remember(boxes, targets):
            given.append(boxes)
            sampled.append(select(boxes, targets))
            return sampled[-1]

        return select_and_remember

    for stage in heads.stages:
        monkeypatch.setattr(stage, "select_training_samples", watched(stage.select_training_samples))
    _, losses = heads(features(), proposals(), IMAGE_SHAPES, objects())
    for number, (stage, head) in enumerate(zip(STAGES, heads.stages, strict=True), start=1):
        boxes, _, labels, deltas_wanted = sampled[number - 1]
        if number > 1:
            for now, before, size in zip(given[number - 1], sampled[number - 2][0], IMAGE_SHAPES, strict=True):
                assert not now.requires_grad
                torch.testing.assert_close(now, moved(before, STAGES[number - 2], size))
        for b, of_image, target in zip(boxes, labels, objects(), strict=True):
            near = box_iou(b, target["boxes"])[:, 0] >= stage.iou
            assert torch.equal(of_image, near * target["labels"])
            assert (b == target["boxes"]).all(1).any()  # the object itself
        labels, deltas_wanted = torch.cat(labels), torch.cat(deltas_wanted)
        assert (labels > 0).sum() >= 2
        log_probabilities = head.box_predictor.cls_score.bias.log_softmax(0)
        error = (torch.tensor(DELTAS) - deltas_wanted[labels > 0]).abs()
        smooth = torch.where(error < 1 / 9, 4.5 * error.square(), error - 1 / 18)
        expected = {
            "loss_classifier": -log_probabilities[labels].mean(),
            "loss_box_reg": smooth.sum() / len(labels),
            "loss_mask": softplus(torch.tensor(-MASK_LOGITS[number - 1], dtype=torch.float64)),
        }
        for name, value in expected.items():
            torch.testing.assert_close(losses[f"{name}_{number}"], stage.loss_weight * value, msg=f"{name}_{number}")
    assert len(losses) == 9


@pytest.mark.parametrize("training", [True, False])
def test_a_cascade_of_no_boxes(training):
    heads = detector(head="cascade").roi_heads.train(training)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 64, 80)}
    maps = {key: f.requires_grad_() for key, f in features().items()}
    no_boxes = list(torch.zeros(2, 0, 4, dtype=torch.float64))
    detections, losses = heads(maps, no_boxes, IMAGE_SHAPES, [nothing] * 2 if training else None)
    if training:
        assert detections == []
        assert [loss.item() for loss in losses.values()] == [0] * 9
        sum(losses.values()).backward()
        for tensor in (*heads.parameters(), *maps.values()):
            assert tensor.grad is not None
            assert not tensor.grad.any()
    else:
        assert losses == {}
        shapes = {"boxes": (0, 4), "labels": (0,), "scores": (0,), "masks": (0, 1, 28, 28)}
        assert [{key: tuple(value.shape) for key, value in found.items()} for found in detections] == [shapes] * 2


class Oracle(nn.Module):
    """Finds what it is told to, by the first pixel of an image."""

    def __init__(self, answers, masks=True):
        super().__init__()
        self.answers, self.masks = answers, masks

    def forward(self, images):
        assert not self.training
        return [self.answers[int(image[0, 0, 0])] for image in images]


CATEGORIES = [7, 3, 90]  # by label, from 1 on


def annotated(boxes_and_labels, size=128, masks=None):
    """A COCO data set of images from 1 on, as `evaluate` takes it, and the answers that are right."""
    annotations, answers = [], {}
    for image_id, found in enumerate(boxes_and_labels, start=1):
        boxes = torch.tensor([box for box, _ in found], dtype=torch.float64).reshape(-1, 4)
        labels = torch.tensor([label for _, label in found], dtype=torch.int64)
        scores = torch.linspace(0.9, 0.5, len(boxes))
        answers[image_id] = {
            "boxes": boxes,
            "labels": labels,
            "scores": scores,
            "masks": filled(boxes, size)[:, None].double() * 0.75,
        }
        for (left, top, right, bottom), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORIES[label - 1],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                    "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                }
            )
    return coco_of(annotations, len(boxes_and_labels), size), answers


def coco_of(annotations, images, size=128):
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image_id, "height": size, "width": size} for image_id in range(1, images + 1)],
        "categories": [{"id": category, "name": str(category)} for category in CATEGORIES],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


SMALL_BOX, MEDIUM_BOX, LARGE_BOX = [4.0, 8.0, 24.0, 30.0], [20.0, 30.0, 80.0, 90.0], [10.0, 4.0, 124.0, 120.0]
SCENES = [[(SMALL_BOX, 1), (MEDIUM_BOX, 3)], [(LARGE_BOX, 2)], [], [(MEDIUM_BOX, 2), (SMALL_BOX, 2)]]


def loader(images, batch_size=2):
    numbers = torch.arange(1, images + 1)
    for some in numbers.split(batch_size):
        yield [torch.full((3, 8, 8), float(n)) for n in some], [{"image_id": n} for n in some]


def evaluated(model, ground_truth, **arguments):
    batches = loader(len(ground_truth.getImgIds()))
    return evaluate(model, batches, PRECISION, ground_truth=ground_truth, category_ids=CATEGORIES, **arguments)


def test_perfect_detections(capsys):
    ground_truth, answers = annotated(SCENES)
    capsys.readouterr()
    model = Oracle(answers)
    for _ in range(2):  # it leaves the ground truth as it is
        found = evaluated(model, ground_truth)
        assert found == Detection(*[pytest.approx(100)] * 6, 4, *[pytest.approx(100)] * 6)
    assert capsys.readouterr() == ("", "")
    assert not model.training
    assert found.score == found.box_map == found.numbers()["box_map"]
    assert found.numbers() == found._asdict()
    numbers = "mAP 100.00 AP50 100.00 AP75 100.00 small 100.00 medium 100.00 large 100.00"
    assert str(found) == f"box {numbers} mask {numbers} on 4 images"


def test_boxes_alone():
    ground_truth, answers = annotated(SCENES)
    found = evaluated(
        Oracle({n: {k: v for k, v in a.items() if k != "masks"} for n, a in answers.items()}, False), ground_truth
    )
    assert found == Detection(*[pytest.approx(100)] * 6, 4)
    assert found.mask_map is None
    assert set(found.numbers()) == {
        *(f"box_{n}" for n in ("map", "ap50", "ap75", "small", "medium", "large")),
        "images",
    }
    assert "mask" not in str(found)


def test_no_detections():
    ground_truth, answers = annotated(SCENES)
    nothing = {key: value[:0] for key, value in answers[1].items()}
    found = evaluated(Oracle(dict.fromkeys(answers, nothing)), ground_truth)
    assert found == Detection(*[0] * 6, 4, *[0] * 6)


def test_labels_of_other_categories_are_wrong():
    ground_truth, answers = annotated(SCENES)
    for answer in answers.values():
        answer["labels"] = answer["labels"] % 3 + 1
    assert evaluated(Oracle(answers), ground_truth).box_map < 1


def test_half_is_found():
    """At a recall of a half the precision is 1, beyond it 0: 51 of 101 recalls; there are no large objects."""
    ground_truth, answers = annotated([[(MEDIUM_BOX, 1)], [(MEDIUM_BOX, 1)]])
    answers[2] = {key: value[:0] for key, value in answers[2].items()}
    found = evaluated(Oracle(answers), ground_truth)
    for value in (found.box_map, found.box_ap50, found.box_medium, found.mask_map):
        assert value == pytest.approx(100 * 51 / 101)
    assert math.isnan(found.box_large)
    assert math.isnan(found.mask_small)


def test_boxes_and_masks_are_not_the_same():
    """Boxes of the right place at the wrong size: an IoU of 0.64, 0.72 for the mask of them."""
    ground_truth, answers = annotated([[([0.0, 0.0, 100.0, 100.0], 1)]])
    answers[1]["boxes"] *= 0.8
    answers[1]["masks"][0, 0, :, :28] = 0
    found = evaluated(Oracle(answers), ground_truth)
    assert (found.box_ap50, found.box_ap75, found.box_map) == pytest.approx((100, 0, 30))
    assert (found.mask_ap50, found.mask_ap75, found.mask_map) == pytest.approx((100, 0, 50))


def test_masks_have_areas_of_their_own():
    """A wrong detection of a small mask in a box that is not counts among the small ones."""
    ground_truth, answers = annotated([[(SMALL_BOX, 1)]])
    wrong = torch.zeros(1, 1, 128, 128, dtype=torch.float64)
    wrong[0, 0, 60:120, 60:62] = 1
    answers[1] = {
        "boxes": torch.tensor([[60.0, 60.0, 120.0, 120.0], SMALL_BOX]).double(),
        "labels": torch.tensor([1, 1]),
        "scores": torch.tensor([0.9, 0.8]),
        "masks": torch.cat((wrong, answers[1]["masks"])),
    }
    found = evaluated(Oracle(answers), ground_truth)
    assert found.box_small == pytest.approx(100)
    assert found.mask_small == pytest.approx(50)


def test_an_image_that_comes_twice_counts_once():
    ground_truth, answers = annotated(SCENES)
    twice = [*loader(4), *loader(4)]
    found = evaluate(Oracle(answers), twice, PRECISION, ground_truth=ground_truth, category_ids=CATEGORIES)
    assert (found.box_map, found.images) == (pytest.approx(100), 4)


def test_evaluation_gives_up():
    ground_truth, answers = annotated(SCENES)
    asked = iter((False, True))
    assert evaluated(Oracle(answers), ground_truth, stops=lambda: next(asked)) is None


def test_a_detector_is_evaluated():
    model = detector().float()
    ground_truth, _ = annotated([[(SMALL_BOX, 1)], []], size=96)
    batches = [([torch.rand(3, 96, 96)], [{"image_id": n}]) for n in (1, 2)]
    found = evaluate(
        model,
        batches,
        Precision(torch.device("cpu"), torch.bfloat16),
        ground_truth=ground_truth,
        category_ids=CATEGORIES,
    )
    assert 0 <= found.box_map <= 100
    assert found.mask_map is not None


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "RepOpt-VGG-nano",
            {"head": "retina"},
            r"unknown detection head 'retina'.*allowed: cascade, faster, fcos, mask",
        ),
        ("RepOpt-VGG-nano", {"neck": "plan"}, r"unknown neck 'plan'; did you mean 'plain'.*declared, plain"),
        (
            "RepOpt-VGG-nano",
            {"mode": "plain"},
            r"unknown mode of RepOpt-VGG-nano 'plain'.*allowed: csla, hs, qarepvgg, repvgg",
        ),
        ("RepOpt-VGG-nan", {}, "unknown model .*did you mean 'RepOpt-VGG-nano'"),
        ("RepOpt-VGG-nano", {"strides": (2, 2, 1, 2, 2)}, "those of RepOpt-VGG-nano are 4, 4, 8, 16"),
        ("RepOpt-VGG-nano", {"strides": (2, 2)}, "strides of the five downsampling layers"),
        ("timm/resnet18", {"mode": "target"}, r"unknown mode of timm/resnet18 'target'.*allowed: plain"),
        ("RepOpt-VGG-nano", {"head": "fcos", "neck": "plain"}, "has a declared neck, not a 'plain' one"),
        ("timm/resnet18", {"mode": "plain", "strides": (1, 2, 2, 2, 2)}, "strides and initial scales are those of our"),
        ("timm/resnet81", {"mode": "plain"}, "unknown architecture 'timm/resnet81'; did you mean 'timm/resnet"),
        ("timm/repopt_vgg_nano", {"mode": "plain"}, "'timm/repopt_vgg_nano' needs a mode"),
        ("torchvision/resnet18", {"mode": "plain"}, "one of ours or timm/NAME, not torchvision/resnet18"),
        ("timm/vit_tiny_patch16_224", {"mode": "plain"}, "cannot be a backbone: Input height"),
        ("timm/levit_128s", {"mode": "plain"}, "timm/levit_128s cannot be a backbone: "),
        ("timm/mambaout_femto", {"mode": "plain"}, r"its features are not \(N, C, H, W\)"),
    ],
)
def test_mistakes(name, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        detector(name, **arguments)
    assert "\n" not in str(caught.value)


def test_without_pycocotools(monkeypatch):
    for module in ("pycocotools", "pycocotools.mask"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "train.evaluation.coco", raising=False)
    monkeypatch.delattr("train.evaluation.coco", raising=False)
    with pytest.raises(UserError, match=r"pip install 'repopt\[downstream\]'\)") as caught:
        evaluate(SimpleNamespace(), [], PRECISION, ground_truth=None, category_ids=CATEGORIES)
    assert "\n" not in str(caught.value)
