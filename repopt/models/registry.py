"""Architectures by name, here and in timm's registry, for everything that is built on timm's backbones.

    timm.create_model("repopt_vgg_b1", features_only=True, out_indices=(1, 2, 3, 4))
    timm.create_model("repopt_ghostnet_050", mode="hs", num_classes=100)

The keywords there are those of timm's models and of `create_model`; the mode is "target" unless another is named.
A new family is one file beside this one and one line in `models/__init__.py`. Networks of other libraries are in `zoo`.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from repopt.errors import UserError, unknown
from repopt.layers import MODES
from repopt.models import zoo
from repopt.models.network import Network


class Family(NamedTuple):
    """Models that share a network; see `register`."""

    configs: Mapping[str, Mapping[str, Any]]
    network: Callable[..., Network]
    modes: tuple[str, ...]
    aliases: Mapping[str, str]


class Arch(NamedTuple):
    """What an ``--arch`` stands for: a model, its mode, and whether a RepOptimizer trains it."""

    model: str
    mode: str
    repopt: bool

    @property
    def of_library(self) -> bool:
        """Return whether the model is one of `zoo`."""
        return zoo.is_name(self.model)

    @property
    def takes_prior(self) -> bool:
        """Return whether it is a library's network as it is, whose branches are to be declared (`repopt.declare`)."""
        return self.repopt and self.mode == zoo.MODE


_families: dict[str, Family] = {}
default_cfgs: dict[str, Any] = {}  # timm looks for this name in the module of an entrypoint


def register(
    configs: Mapping[str, Mapping[str, Any]],
    network: type[Network],
    *,
    modes: tuple[str, ...],
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Make the models of a family known by name, here and in timm's registry.

    Args:
        configs: the arguments that the network takes for a model, by the model's name ("RepOpt-VGG-B1").
        network: ``network(mode=..., num_classes=..., **config)`` creates one.
        modes: every mode that the network has: those of `repopt.layers` and the family's own baselines.
        aliases: other names of models.
    """
    family = Family(configs, network, modes, aliases or {})
    for name in (*family.configs, *family.aliases):
        assert name not in _families, f"{name} is registered twice"
        _families[name] = family
    for name in family.configs:
        _register_in_timm(name, network)


def timm_name(name: str) -> str:
    """Return a model's name as timm writes it: "RepOpt-VGG-B1" -> repopt_vgg_b1, "RepOpt-GhostNet-0.5x" -> ..._050."""
    name = re.sub(r"(\d+\.\d+)x$", lambda width: f"{round(100 * float(width[1])):03d}", name)
    return name.lower().replace("-", "_")


def _register_in_timm(name: str, network: type[Network]) -> None:
    """Make a model of ours known to timm, under `timm_name`."""

    def entrypoint(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        *,
        mode: str = "target",
        output_stride: int = 32,
        **arguments: Any,
    ) -> nn.Module:
        if output_stride != 32:
            raise UserError(f"{variant} has the output stride 32 only, not {output_stride}")
        source = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
        if pretrained and not source.has_weights and source.state_dict is None:
            raise UserError(
                f"no weights of {variant} are published through timm: leave `pretrained` out and load a checkpoint "
                "by repopt.load_weights(model, state_dict), or name its file in pretrained_cfg_overlay={'file': ...}"
            )
        return build_model_with_cfg(
            functools.partial(create_model, name, mode=mode),
            variant,
            pretrained,
            pretrained_cfg,
            pretrained_cfg_overlay,
            feature_cfg={"feature_cls": Network.to_features},
            **arguments,
        )

    variant = entrypoint.__name__ = timm_name(name)
    entrypoint.__doc__ = f"{name}; see the module."
    default_cfg = {
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "interpolation": "bilinear",
        "crop_pct": 224 / 256,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "num_classes": 1000,
        "first_conv": network.first_conv,
        "classifier": network.classifier_name,
    }
    default_cfgs.update(generate_default_cfgs({variant: default_cfg}))
    register_model(entrypoint)


def list_models() -> list[str]:
    """Return the names of our models; `create_model` takes others', too."""
    return sorted(_families)


def list_archs() -> dict[str, Arch]:
    """Return every ``--arch`` of ours by name: a model's name, a dash, and a mode or ``target-norepopt``."""
    return {
        f"{name}-{ending}": Arch(family.aliases.get(name, name), mode, repopt)
        for name, family in _families.items()
        for ending, (mode, repopt) in _endings(family.modes).items()
    }


def _endings(modes: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Return, by how the ``--arch`` of a model with these modes ends, the mode and whether a RepOptimizer trains it."""
    return {mode: (mode, mode == "target") for mode in modes} | {"target-norepopt": ("target", False)}


def baselines(model: str) -> dict[str, Arch]:
    """Return, by ``--arch``, the multi-branch networks with which a model's declared one is compared."""
    if zoo.is_name(model):
        return {model: Arch(model, zoo.MODE, repopt=False)} if len(zoo.modes(model)) > 1 else {}
    modes = (mode for mode in _families[model].modes if mode not in MODES)
    return {f"{model}-{mode}": Arch(model, mode, repopt=False) for mode in modes}


def parse_arch(arch: str) -> Arch:
    """Return what an ``--arch`` stands for: one of `list_archs`, or a name of `zoo`, with or without an ending.

    Raises:
        UserError: there is no such one; it names the nearest.
    """
    if zoo.is_name(arch):
        return _arch_of_library(arch)
    archs = list_archs()
    if arch in _families:
        raise _needs_mode(arch, arch)
    if arch not in archs:
        raise unknown("architecture", arch, archs)
    return archs[arch]


def same_arch(name: str, arch: Arch) -> bool:
    """Return whether an ``--arch``, which may be any text, stands for this one: of ours there are aliases."""
    try:
        return parse_arch(name) == arch
    except UserError:
        return False


def _arch_of_library(arch: str) -> Arch:
    """Return what the name of a library's network stands for, with or without an ending.

    With registered blocks the endings are those of ours. Without, a RepOptimizer trains the network as it is where
    ``-target`` stands behind its name.

    Raises:
        UserError: no such network, or an ending that needs registered blocks.
    """
    endings = _endings(MODES)
    ending = next((ending for ending in endings if arch.endswith(f"-{ending}")), None)
    name = arch if ending is None else arch.removesuffix(f"-{ending}")
    _check_library_name(name)
    if ending is None:
        return Arch(name, zoo.MODE, repopt=False)
    mode, repopt = endings[ending]
    if mode in zoo.modes(name):
        return Arch(name, mode, repopt)
    if ending == "target":
        return Arch(name, zoo.MODE, repopt)
    if mode == "target":
        raise UserError(f"{name} is the plain network itself, trained by the plain rule: leave -{ending} out")
    raise UserError(
        f"{name} has no multi-branch blocks that repopt.convert_model knows, so there is no {arch}: {name}-target "
        "trains it with branches that its optimizer holds and searches (TRAIN.SEARCH_EPOCHS, MODEL.PRIOR)"
    )


def _check_library_name(name: str) -> None:
    """Refuse what `zoo.check_name` refuses, and ours under the names that they have in timm's registry."""
    for own in _families:
        if name == f"timm/{timm_name(own)}":
            raise _needs_mode(name, own)
    zoo.check_name(name)


def _needs_mode(name: str, model: str) -> UserError:
    """Return the error for an architecture that names a model of ours alone."""
    archs = ", ".join(f"{model}-{ending}" for ending in _endings(_families[model].modes))
    return UserError(f"architecture {name!r} needs a mode: {archs}")


def create_model(name: str, *, mode: str, num_classes: int = 1000, **overrides: Any) -> nn.Module:
    """Create a model with the default initialization of its framework: a `Network`, or what a library makes.

    Args:
        name: one of `list_models`, or of a library ("timm/efficientnet_b2", "torchvision/vgg16_bn").
        mode: "hs", "csla", "target", or a baseline of the family ("repvgg"). A library's network is as the library
            makes it in "plain", and has the other three if it has blocks of registered types (`repopt.convert_model`).
        num_classes: outputs of the classifier.
        overrides: arguments of the network, such as ``use_checkpoint=True``.

    Raises:
        UserError: an unknown name or mode, or arguments that the network does not take.
    """
    if zoo.is_name(name):
        _check_library_name(name)
        return zoo.create(name, mode=mode, num_classes=num_classes, **overrides)
    if name not in _families:
        raise unknown("model", name, _families)
    family = _families[name]
    if mode not in family.modes:
        raise unknown(f"mode of {name}", mode, family.modes)
    config = family.configs[family.aliases.get(name, name)]
    of_both = (inspect.signature(cls).parameters.values() for cls in (family.network, Network))
    known = {parameter.name for own in of_both for parameter in own if parameter.kind is not parameter.VAR_KEYWORD}
    for key in overrides:
        if key not in known:
            raise unknown(f"argument of {name}", key, known)
    return family.network(mode=mode, num_classes=num_classes, **{**config, **overrides})
