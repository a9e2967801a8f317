"""Architectures by name. A new family is one file beside this one and one line in `models/__init__.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from repopt.errors import UserError, unknown
from repopt.models import timm_registry
from repopt.models.network import Network


@dataclass(frozen=True)
class Family:
    """Models that share a builder.

    Attributes:
        configs: by model name ("RepOpt-VGG-B1"), the arguments that the builder takes for it.
        build: ``build(mode=..., num_classes=..., **config)``.
        modes: every mode that the builder knows: those of `repopt.layers` and the family's own baseline.
        aliases: other names of models.
    """

    configs: Mapping[str, Mapping[str, Any]]
    build: Callable[..., Network]
    modes: tuple[str, ...]
    aliases: Mapping[str, str]


class Arch(NamedTuple):
    """What an ``--arch`` stands for: a model, its mode, and whether a RepOptimizer trains it."""

    model: str
    mode: str
    repopt: bool


_families: dict[str, Family] = {}


def register(
    configs: Mapping[str, Mapping[str, Any]],
    build: Callable[..., Network],
    *,
    network: type[Network],
    modes: tuple[str, ...],
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Make the models of a family known by name, here and in timm's registry.

    Args:
        configs, build, modes, aliases: see `Family`.
        network: the class of what `build` returns.
    """
    family = Family(configs, build, modes, aliases or {})
    for name in (*family.configs, *family.aliases):
        assert name not in _families, f"{name} is registered twice"
        _families[name] = family
    for name in family.configs:
        timm_registry.register(name, network, functools.partial(create_model, name))


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return sorted(_families)


def list_archs() -> dict[str, Arch]:
    """Every ``--arch`` of the command line: a model's name, a dash, and a mode or ``target-norepopt``."""
    archs = {}
    for name, family in _families.items():
        model = family.aliases.get(name, name)
        archs |= {f"{name}-{ending}": Arch(model, mode, repopt) for ending, (mode, repopt) in _endings(family).items()}
    return archs


def _endings(family: Family) -> dict[str, tuple[str, bool]]:
    """How an ``--arch`` of the family ends: the mode, and whether a RepOptimizer trains it."""
    return {mode: (mode, mode == "target") for mode in family.modes} | {"target-norepopt": ("target", False)}


def parse_arch(arch: str) -> Arch:
    """What an ``--arch`` stands for; UserError with the nearest valid one."""
    archs = list_archs()
    if arch in _families:
        names = ", ".join(f"{arch}-{ending}" for ending in _endings(_families[arch]))
        raise UserError(f"architecture {arch!r} needs a mode: {names}")
    if arch not in archs:
        raise unknown("architecture", arch, archs)
    return archs[arch]


def create_model(name: str, *, mode: str, num_classes: int = 1000, **overrides: Any) -> Network:
    """A model with the framework's default initialization.

    Args:
        name: one of `list_models`.
        mode: "hs", "csla", "target", or the family's baseline ("repvgg").
        num_classes: outputs of the classifier.
        overrides: of the builder's arguments, such as ``use_checkpoint=True``.

    Raises:
        UserError: an unknown name or mode.
    """
    if name not in _families:
        raise unknown("model", name, _families)
    family = _families[name]
    if mode not in family.modes:
        raise unknown(f"mode of {name}", mode, family.modes)
    config = family.configs[family.aliases.get(name, name)]
    return family.build(mode=mode, num_classes=num_classes, **{**config, **overrides})
