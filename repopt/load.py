"""A trained network from a file, ready for pictures."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from repopt import checkpoint
from repopt.description import CLASSIFY, DETECT, InOut, NetworkDescription, names
from repopt.errors import UserError, one_line
from repopt.images import Preprocessing
from repopt.models import create_model, parse_arch, without_values

if TYPE_CHECKING:
    from repopt.export import OnnxNetwork

logger = logging.getLogger("repopt")

# Of a file that does not say it: the evaluation of the published release.
MAX_SIDE = 2**14  # pixels, of images that a file of a detector takes
OF_IMAGENET = Preprocessing(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, size=(224, 224), short_side=224)


class Loaded(NamedTuple):
    """A trained network.

    Attributes:
        network: in eval mode: of a classifier (N, C, H, W) -> (N, num_classes).
        classes: names of the classes, by index (of a detector label 1 is index 0); empty where the file has none.
        transform: a Pillow image -> its float32 input (C, H, W), as in the evaluation of the training.
        task: "classify", "segment" or "detect".
    """

    network: nn.Module
    classes: tuple[str, ...]
    transform: Callable[[Image.Image], Tensor]
    task: str


def load(path: str | os.PathLike[str], arch: str | None = None, *, weights: str = "best") -> Loaded:
    """Load a trained network.

        network, classes, transform, _ = repopt.load("best_ckpt.pth")
        scores = network(transform(Image.open("cat.jpg"))[None]).softmax(1)[0]

    Args:
        path: of a checkpoint of a training, of the published release's (with `arch`), or of an ONNX file of
            scripts/export.py or quantize.py, which onnxruntime runs on the CPU (the extra deploy).
        arch: such as "RepOpt-VGG-B1-target", where the file does not say it.
        weights: "model", "ema" (their moving average), or "best", the one of higher accuracy.

    Raises:
        UserError: there is no such file, or nothing in it says which network it is; or it is of another.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        return _load_onnx(path)
    content = checkpoint.read(path)
    with error_context(str(path)):
        if "image_size" in content:
            raise UserError("it holds a quantized network: give its ONNX file (int8.onnx)")
        state = checkpoint.state_dict_of(content, checkpoint.choose_weights(content, weights))
        if "network" in content:
            description = NetworkDescription.of(content["network"])
            if arch is not None and parse_arch(arch)[:2] != (description.name, description.mode):
                raise UserError(f"it is of {description.name} in {description.mode} mode, not of {arch}")
        else:
            description = _described_by_weights(content, arch, state)
        try:
            network = description.create()
        except UserError:
            raise
        except (TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:  # at arguments of a file
            raise UserError(f"{description.name} cannot be made as described: {one_line(error)}") from None
        checkpoint.load_weights(network, state)
        if "images" not in content:
            logger.warning("%s does not say how its images are made: 224 px, normalized as ImageNet", path)
        images = Preprocessing.of(content["images"]) if "images" in content else OF_IMAGENET
        return Loaded(network.eval(), names(content.get("classes", ())), images, description.task)


def _load_onnx(path: Path) -> Loaded:
    from repopt.export import OnnxNetwork  # an extra

    network = OnnxNetwork(path)
    with error_context(str(path)):
        task, classes, images = InOut.of_metadata(network.metadata)
        if task == DETECT:
            return Loaded(_as_detector(network, images), tuple(classes), images, task)
    return Loaded(network, tuple(classes), images, task)


def _as_detector(network: OnnxNetwork, images: Preprocessing) -> nn.Module:
    """Return a detector in a file, which images are padded for."""
    from repopt.detection import EndToEndDetector, Transform
    from repopt.detection.end_to_end import OUTPUTS

    if network.output_names != OUTPUTS:
        raise UserError(
            "it gives the raw predictions of a detector: load its checkpoint, or the file that ends with "
            "_detections.onnx, which gives objects"
        )
    channels, height, width = network.input_shape
    if channels != len(images.mean) or not height or not width or max(height, width) > MAX_SIDE:
        raise UserError(f"it takes {network.input_shape}, which are no colours, height and width of images")
    longest = min(height, width, images.long_side or MAX_SIDE)
    # Its images are normalized by then.
    transform = Transform((images.short_side,), longest, [0.0] * channels, [1.0] * channels, multiple=1)
    transform.size = height, width
    return EndToEndDetector(network, transform)


def _described_by_weights(
    content: Mapping[str, Any], arch: str | None, state: Mapping[str, Tensor]
) -> NetworkDescription:
    """Return the classifier of an architecture that has so many classes as its weights say."""
    if isinstance(content.get("data"), str):
        raise UserError(
            "it does not say of what its network is made: an earlier version wrote it, or it is one for INT8"
        )
    config = content.get("config")  # of the published release
    of_model = config.get("MODEL") if isinstance(config, Mapping) else None
    arch = arch or (of_model.get("ARCH") if isinstance(of_model, Mapping) else None)
    if not isinstance(arch, str):
        raise UserError("it does not say of which network it is: name its architecture")
    model, mode, _ = parse_arch(arch)
    number = count_classes(state, lambda classes: create_model(model, mode=mode, num_classes=classes))
    return NetworkDescription(CLASSIFY, model, mode, {"num_classes": number})


def count_classes(state: Mapping[str, Tensor], create: Callable[[int], nn.Module]) -> int:
    """Return the number of classes of a classifier's weights: its head alone has another shape in one of one class.

    Args:
        state: its weights by name.
        create: makes the network with so many classes.
    """
    own = without_values(lambda: create(1)).state_dict()
    other = (state[name] for name in own if name in state and state[name].shape != own[name].shape)
    sizes = {len(weight) for weight in other if weight.dim()}
    return sizes.pop() if len(sizes) == 1 else 1


@contextmanager
def error_context(path: str) -> Iterator[None]:
    """Let a mistake in what a file holds name the file."""
    try:
        yield
    except UserError as error:
        raise error if path in str(error) else UserError(f"{path!r}: {error}") from None
