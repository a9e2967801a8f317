"""A trained network from its checkpoint: as it was trained, or as it was quantized."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

import repopt
from repopt import checkpoint
from repopt.description import InOut, names
from repopt.detection import EndToEnd
from repopt.errors import UserError, shown
from repopt.images import Preprocessing
from repopt.load import count_classes, error_context
from repopt.models import Arch, parse_arch, same_arch
from train import config, tasks
from train.distributed import World
from train.keys import DENSE, OF_IMAGES, OF_NETWORK

if TYPE_CHECKING:
    from repopt import quantization


class Exported(NamedTuple):
    """What is exported of a network.

    Attributes:
        whole: the network; of a quantized one what is quantized.
        predictor: see `Task.predictor`.
        end_to_end: see `Task.end_to_end`.
        in_out: what they take and give.
    """

    whole: nn.Module
    predictor: nn.Module
    end_to_end: EndToEnd | None
    in_out: InOut


class LoadedCheckpoint(NamedTuple):
    """A checkpoint, and whose it is.

    Attributes:
        path: of the file.
        name: of the architecture, as ``--arch`` takes it.
        arch: what it stands for.
        content: of the file.
        weights: which of its weights are taken, a key of `checkpoint.WEIGHTS`.
    """

    path: str
    name: str
    arch: Arch
    content: Mapping[str, Any]
    weights: str

    def setting(self, key: str) -> Any:
        """Return what the run that wrote it was configured with; None where it does not say."""
        return config.lookup(self.content.get("config"), key)

    @property
    def quantized(self) -> bool:
        """Return whether it is of scripts/quantize.py."""
        return self.setting("QUANT.METHOD") is not None

    def network(self, num_classes: int | None = None) -> nn.Module:
        """Return the trained network, in eval mode.

        Args:
            num_classes: outputs of its classifier; None = as many as its weights say.

        Raises:
            UserError: the weights are not those of its architecture; or it is quantized.
        """
        if self.quantized:
            raise UserError(f"{self.path!r} holds a quantized network: give the checkpoint that it was made of")
        with error_context(self.path):
            weights = checkpoint.state_dict_of(self.content, self.weights)
            model = self._build(self._classes(weights) if num_classes is None else num_classes)
            repopt.load_weights(model, weights)
        return model.eval()

    def _int8(self, task: tasks.Task, model: nn.Module) -> quantization.Int8:
        """Return what is quantized of a network, for images of `image_size`.

        Raises:
            UserError: the content is not what scripts/quantize.py writes.
        """
        from repopt import quantization  # an extra

        keys = ("QUANT.METHOD", "QUANT.PRESET", "QUANT.CALIBRATOR", "QUANT.FLOAT_LAYERS")
        cfg, images = self.settings(*keys), torch.zeros(1, *self.input_shape)
        quant, float_layers, predictor = cfg.QUANT, float_layers_of(cfg), task.predictor(model)
        observed = quantization.prepare(predictor, images, quant.METHOD, quant.PRESET, quant.CALIBRATOR, float_layers)
        quantization.load(observed, checkpoint.state_dict_of(self.content), task.with_predictor(model, observed))
        return quantization.convert(observed)

    def exported(self, size: tuple[int, int]) -> Exported:
        """Return what is exported of the trained network, deployed or quantized.

        Args:
            size: height and width of the images.

        Raises:
            UserError: see `network`; or the content is not what scripts/quantize.py writes.
        """
        task = self._task(self.settings("TASK", "DATA.DATASET", "MODEL.NUM_CLASSES", *OF_NETWORK, *OF_IMAGES))
        if self.quantized:
            model = self._build(task.cfg.MODEL.NUM_CLASSES)
            whole: nn.Module = self._int8(task, model)
            predictor = whole
        else:
            model = whole = repopt.deploy(self.network())
            predictor = task.predictor(model)
        in_out = self.in_out._replace(images=task.exported_images(self.in_out.images))
        return Exported(whole, predictor, task.end_to_end(model, predictor, size), in_out)

    @property
    def in_out(self) -> InOut:
        """Return what the network takes and gives, as its training evaluated it.

        Raises:
            UserError: the content is not what a training writes.
        """
        cfg = self.settings("TASK", "DATA.DATASET", "MODEL.IN_CHANS", *OF_IMAGES)
        images = self.content.get("images")
        made = self._task(cfg).images(training=False).preprocessing if images is None else Preprocessing.of(images)
        return InOut(cfg.TASK, names(self.content.get("classes", ())), made)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of what the network saw in evaluation; see `image_size`."""
        return self.settings("MODEL.IN_CHANS").MODEL.IN_CHANS, *self.image_size

    @property
    def image_size(self) -> tuple[int, int]:
        """Return height and width of what the network saw in evaluation; the default where nothing says it.

        Raises:
            UserError: the content says something else.
        """
        if "image_size" in self.content:  # of a quantized one
            size = self.content["image_size"]
            if not isinstance(size, list) or len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
                raise UserError(f"{self.path!r} holds the image_size {shown(size)}, not a height and a width")
            return size[0], size[1]
        of_tasks = ("DATA.IMG_SIZE", "DATA.TEST_SIZE", "SEGMENT.CROP", "SEGMENT.WINDOW", "DETECT.MAX_SIZE")
        cfg = self.settings("TASK", *of_tasks)
        return self._task(cfg).image_size()

    @property
    def multiple(self) -> int:
        """Return the number that height and width of an image have to be multiples of."""
        return tasks.task_class(self.settings("TASK").TASK).multiple

    def settings(self, *keys: str) -> CfgNode:
        """Return the defaults, and these keys as the content says, checked."""
        return self._settings(keys, {})

    def _settings(self, keys: Iterable[str], values: dict[str, Any]) -> CfgNode:
        kept = {key: value for key in keys if (value := self.setting(key)) is not None}
        return config.build(kept | {"MODEL.ARCH": self.name} | values).cfg

    def _classes(self, weights: Mapping[str, Tensor]) -> int:
        """Return the number of classes: as the run was configured; of a classifier as its weights have them."""
        if self.setting("TASK") in DENSE:
            return self.settings("MODEL.NUM_CLASSES").MODEL.NUM_CLASSES
        return count_classes(weights, self._build)

    def _build(self, num_classes: int) -> nn.Module:
        keys = ("TASK", *OF_NETWORK, *OF_IMAGES)  # a detector normalises its images itself
        return self._task(self._settings(keys, {"MODEL.NUM_CLASSES": num_classes})).network()

    def _task(self, cfg: CfgNode) -> tasks.Task:
        return tasks.create(cfg, World(0, 1, torch.device("cpu")))


def float_layers_of(cfg: CfgNode) -> list[str]:
    """Return the names of the layers that stay in float, as QUANT.FLOAT_LAYERS lists them."""
    return [name for name in cfg.QUANT.FLOAT_LAYERS.split(",") if name]


def read(
    path: str | os.PathLike[str], name: str | None = None, *, fallback: str | None = None, weights: str = "best"
) -> LoadedCheckpoint:
    """Read a checkpoint, ours or one that holds weights alone.

    Args:
        path: of the file.
        name: of its architecture; None = as the checkpoint says.
        fallback: the architecture of one that does not say.
        weights: which of its weights are taken; see `checkpoint.choose_weights`.

    Raises:
        UserError: it is no checkpoint, or one of another architecture; or nothing says of which; or it lacks those
            weights.
    """
    path, content = os.fspath(path), checkpoint.read(path)
    with error_context(path):
        return _parse(path, content, name, fallback, weights)


def _parse(
    path: str, content: Mapping[str, Any], name: str | None, fallback: str | None, weights: str
) -> LoadedCheckpoint:
    own = config.lookup(content.get("config"), "MODEL.ARCH")
    if own is None:
        name = name or fallback
    if name is None and own is None:
        raise UserError(f"{path!r} does not say of which network it is: give --arch")
    arch = parse_arch(str(own) if name is None else name)
    if own is not None and not same_arch(str(own), arch):
        raise UserError(f"{path!r} is a checkpoint of {shown(own)}, not of {name}")
    taken = checkpoint.choose_weights(content, weights)
    return LoadedCheckpoint(path, str(own) if name is None else name, arch, content, taken)
