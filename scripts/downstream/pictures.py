"""predictions.png of a run: some images of the evaluation, what is in them, and what the network predicts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from overlays import MIN_SCORE, boxed, colored, outlined
from torch import Tensor, nn
from torchvision.ops import box_convert
from yacs.config import CfgNode

import data
import repopt
from repopt import checkpoint, segmentation
from train import tasks
from train.distributed import World
from train.file_names import PREDICTIONS
from train.keys import DETECT
from train.placement import to_device
from train.tasks.base import source_of

IMAGES = 6  # that are shown

Rows = dict[str, list[Tensor]]  # uint8 (3, H, W) by what they show


@torch.inference_mode()
def draw(cfg: CfgNode) -> None:
    """Draw what the newest checkpoint of a run predicts, or the one that was evaluated."""
    here = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    task = tasks.create(cfg, here)
    model = to_device(task.network(), here)
    path = cfg.MODEL.RESUME if cfg.EVAL_MODE else Path(cfg.OUTPUT, "latest.pth")
    repopt.load_weights(model, checkpoint.state_dict_of(checkpoint.read(path)))
    batches = task.eval_loader(split="val", max_images=IMAGES)
    rows = (detected if cfg.TASK == DETECT else segmented)(cfg, model.eval(), batches)
    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(2.4 * columns, 2.6 * len(rows)))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for of_row, (title, pictures) in zip(axes, rows.items(), strict=True):
        of_row[0].set_title(title, loc="left", fontsize=10)
        for axis, picture in zip(of_row, pictures, strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy())
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(Path(cfg.OUTPUT, PREDICTIONS), dpi=100)


def segmented(cfg: CfgNode, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Rows:
    """Return images, their labels, and the predicted ones."""
    source = data.Segmentation(source_of(cfg))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (source.spec.mean, source.spec.std))
    rows: Rows = {"image": [], "labels": [], "prediction": []}
    for images, labels in batches:
        predicted = segmentation.predict(model, images, cfg.SEGMENT.WINDOW, cfg.SEGMENT.STRIDE).argmax(1)
        for image, *maps in zip(images.cpu(), labels.cpu(), predicted.cpu(), strict=True):
            picture = (255 * (image * std + mean)).round().clamp(0, 255).byte()
            drawn = [colored(picture, classes, len(source.class_names)) for classes in maps]
            for row, shown in zip(rows.values(), (picture, *drawn), strict=True):
                row.append(shown)
    return rows


def detected(cfg: CfgNode, model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> Rows:
    """Return images with the objects in them, and with those that are found."""
    source = data.Detection(source_of(cfg))
    truth = source.ground_truth
    there, found = [], []
    for images, targets in batches:
        for image, target, output in zip(images, targets, model(images), strict=True):
            picture = (255 * image).round().byte().cpu()
            objects = truth.loadAnns(truth.getAnnIds(imgIds=[int(target["image_id"])]))
            boxes = box_convert(torch.tensor([thing["bbox"] for thing in objects]).view(-1, 4), "xywh", "xyxy")
            classes = [source.category_ids.index(thing["category_id"]) for thing in objects]
            there.append(boxed(picture, boxes, classes, source.class_names))
            found.append(outlined(picture, output, source.class_names, MIN_SCORE))
    return {"objects": there, f"found (score of {MIN_SCORE} and more)": found}
