"""What a file says of its network, as plain data: of what it is made, what it takes, what its answers are called."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from repopt.errors import UserError, shown, unknown
from repopt.images import Preprocessing
from repopt.models import create_model

CLASSIFY, SEGMENT, DETECT = TASKS = ("classify", "segment", "detect")


# That a training writes. A file can name no others: timm's would fetch weights from anywhere.
_ARGUMENTS = {
    *("num_classes", "in_chans", "strides", "initial_scales", "use_checkpoint", "channels", "head", "neck", "hidden"),
    *("rois", "sizes", "max_size", "anchor_scale", "freeze_batch_norm", "mean", "std"),
}


class NetworkDescription(NamedTuple):
    """Of what a network is made.

    Attributes:
        task: one of `TASKS`.
        name, mode: of the network, or of its backbone, as `create_model` takes them.
        arguments: the other ones of `create_model`, `create_segmenter` or `create_detector`.
    """

    task: str
    name: str
    mode: str
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, content: object) -> NetworkDescription:
        """Return what `as_data` has made plain data of.

        Raises:
            UserError: it is something else.
        """
        if not isinstance(content, Mapping) or set(content) != set(cls._fields):
            raise UserError(f"this is no description of a network: {shown(content)}")
        found = cls(**content)
        if isinstance(found.arguments, Mapping) and (other := sorted(map(str, {*found.arguments} - _ARGUMENTS))):
            raise UserError(f"networks are described without {shown(other[0])}: that is no argument of a file")
        if not all(isinstance(text, str) for text in found[:3]) or not isinstance(found.arguments, Mapping):
            raise UserError(f"this is no description of a network: {shown(content)}")
        return found

    def as_data(self) -> dict[str, Any]:
        """Return the attributes as plain data, for a file."""
        return self._asdict() | {"arguments": dict(self.arguments)}

    def create(self) -> nn.Module:
        """Create the network with default initialization.

        Raises:
            UserError: there is no such one.
        """
        if self.task not in TASKS:
            raise unknown("task", self.task, TASKS)
        return _creator(self.task)(self.name, mode=self.mode, **self.arguments)


def _creator(task: str) -> Any:
    if task == CLASSIFY:
        return create_model
    if task == SEGMENT:
        from repopt.segmentation import create_segmenter  # an extra

        return create_segmenter
    from repopt.detection import create_detector

    return create_detector


class InOut(NamedTuple):
    """What a network takes and gives, as exported files say it in their metadata.

    Attributes:
        task: one of `TASKS`.
        classes: names of the classes, by index; empty where they are not known.
        images: how a picture becomes its input.
    """

    task: str
    classes: Sequence[str]
    images: Preprocessing

    def as_metadata(self) -> dict[str, str]:
        """Return the attributes as texts: JSON, but for the task."""
        images = json.dumps(self.images.as_data())
        return {"task": self.task, "classes": json.dumps(list(self.classes), ensure_ascii=False), "images": images}

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str]) -> InOut:
        """Return what `as_metadata` has made texts of.

        Raises:
            UserError: the texts are others.
        """
        try:
            classes, images = json.loads(metadata["classes"]), json.loads(metadata["images"])
        except (KeyError, ValueError, RecursionError):
            raise UserError("it does not say what its classes are called and how its images are made") from None
        if (task := metadata.get("task", CLASSIFY)) not in TASKS:
            raise unknown("task", task, TASKS)
        return cls(task, names(classes), Preprocessing.of(images))


def names(content: object) -> tuple[str, ...]:
    """Return names of classes from a file.

    Raises:
        UserError: they are none.
    """
    if not isinstance(content, Sequence) or not all(isinstance(name, str) for name in content):
        raise UserError(f"these are no names of classes: {shown(content)}")
    return tuple(content)
