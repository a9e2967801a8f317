"""Classifiers of timm and torchvision, to train beside ours: "timm/efficientnet_b2", "torchvision/vgg16_bn".

They come without pretrained weights, and as the libraries make them: in the mode "plain". Those that have blocks of
registered types are converted in the other modes (`repopt.convert_model`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models import FeatureInfo
from torch import nn
from torchvision import models

from repopt.convert import convert_model
from repopt.convert.declaration import registered_type
from repopt.errors import UserError, one_line, unknown
from repopt.layers import MODES, Mode

MODE = "plain"


class Library(NamedTuple):
    """A library of networks.

    Attributes:
        names: lists the names of its classifiers.
        create: ``create(name, num_classes=..., **arguments)``.
    """

    names: Callable[[], Sequence[str]]
    create: Callable[..., nn.Module]


def _create_of_torchvision(name: str, **arguments: Any) -> nn.Module:
    if name in ("googlenet", "inception_v3"):  # which else have more outputs in training, and a warning to give
        arguments = {"aux_logits": False, "init_weights": True, **arguments}
    return models.get_model(name, **arguments)


LIBRARIES = {
    "timm": Library(timm.list_models, timm.create_model),
    # Those of detection, segmentation and so on are in modules of their own.
    "torchvision": Library(functools.partial(models.list_models, module=models), _create_of_torchvision),
}


def is_name(name: str) -> bool:
    """Return whether a model's name is of a library, and not one of ours."""
    return "/" in name


def check_name(name: str) -> None:
    """Raise a UserError unless a name is a library, a slash, and the library's name of a classifier."""
    library, _, model = name.partition("/")
    if library not in LIBRARIES:
        raise unknown("library of networks", library, LIBRARIES)
    names = LIBRARIES[library].names()
    if model not in names:
        raise unknown("architecture", name, (f"{library}/{known}" for known in names))


def modes(name: str) -> tuple[str, ...]:
    """Return the modes of a network: `MODE`, and those of `convert_model` where it has registered blocks."""
    return (MODE, *MODES) if any(map(registered_type, _module_types(name))) else (MODE,)


@functools.cache
def _module_types(name: str) -> frozenset[type[nn.Module]]:
    """Return the types of the modules of a network."""
    return frozenset(map(type, without_values(lambda: create(name, num_classes=1)).modules()))


def without_values(create: Callable[[], nn.Module]) -> nn.Module:
    """Return a network made for its shapes and types: on the meta device, if that can be, and without drawing."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return create()
        except (RuntimeError, UserError):  # some compute their widths with tensors, or are tried on an image
            return create()


def create(
    name: str, *, mode: str = MODE, num_classes: int, use_checkpoint: bool = False, **arguments: Any
) -> nn.Module:
    """Create a network by its name, (N, 3, H, W) -> (N, num_classes), in training too.

    With `use_checkpoint`, batch norms of timm's meet every batch twice: gradients are the same, running statistics move
    faster.

    Raises:
        UserError: a mode that it lacks, or arguments that it does not take.
    """
    if mode != MODE and mode not in (allowed := modes(name)):
        raise unknown(f"mode of {name}", mode, allowed)
    library, _, model_name = name.partition("/")
    try:
        model: Any = LIBRARIES[library].create(model_name, num_classes=num_classes, **arguments)
    except TypeError as error:
        if not arguments:
            raise
        raise UserError(f"{name} cannot be made as you say: {one_line(error)}") from None
    if use_checkpoint:
        try:
            model.set_grad_checkpointing()
        except (AttributeError, AssertionError):  # torchvision has no such thing, and some of timm refuse it
            raise UserError(f"{name} cannot compute activations again: leave activation checkpointing out") from None
    return in_mode(model, mode)


def in_mode(model: nn.Module, mode: str) -> nn.Module:
    """Return a library's network in a mode: as it is in `MODE`, else converted (`convert_model`)."""
    return model if mode == MODE else convert_model(model, cast(Mode, mode))


def name_in_timm(name: str) -> str:
    """Return the name in timm's registry of a library's network that is to be a backbone.

    Raises:
        UserError: it is one of torchvision's.
    """
    library, _, model = name.rpartition("/")
    if library == "torchvision":
        raise UserError(f"a backbone is one of ours or timm/NAME, not {name}, which gives no features")
    return model


def check_features(name: str, body: nn.Module) -> None:
    """Try a fresh backbone on an image: some are made for one size, others give features of another layout.

    Raises:
        UserError: it does not take images of 64 px, or its features are not (N, C, H, W).
    """
    features = _try(body, (3, 64, 64), f"{name} cannot be a backbone")
    if [feature.shape[1] for feature in features] != feature_info(body).channels():
        raise UserError(f"{name} cannot be a backbone: its features are not (N, C, H, W)")


def check_image_size(name: str, model: nn.Module, channels: int, size: int) -> None:
    """Try a fresh network on an image: some are made for one size, others not for small ones.

    Raises:
        UserError: it does not take (N, channels, size, size).
    """
    _try(model, (channels, size, size), f"{name} does not take images of {size} px")


@torch.no_grad()
def _try(model: nn.Module, shape: tuple[int, int, int], complaint: str) -> Any:
    """Return the outputs for an image; UserError where there are none."""
    try:
        outputs = model.eval()(torch.zeros(1, *shape))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"{complaint}: {one_line(error)}") from None
    model.train()
    return outputs


def feature_info(body: nn.Module) -> FeatureInfo:
    """Return what a backbone that gives features says of them."""
    assert isinstance(body.feature_info, FeatureInfo)
    return body.feature_info
