"""Our models in timm's registry, for everything that is built on timm's backbones.

    timm.create_model("repopt_vgg_b1", features_only=True, out_indices=(1, 2, 3, 4))
    timm.create_model("repopt_ghostnet_050", mode="hs", num_classes=100)

The keywords are those of timm's models and of `repopt.create_model`; the mode is "target" unless another is named.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from repopt.errors import UserError
from repopt.models.network import Network

default_cfgs: dict[str, Any] = {}  # timm looks for this name in the module of an entrypoint


def timm_name(name: str) -> str:
    """Return a model's name as timm writes it: "RepOpt-VGG-B1" -> repopt_vgg_b1, "RepOpt-GhostNet-0.5x" -> ..._050."""
    name = re.sub(r"(\d+\.\d+)x$", lambda width: f"{round(100 * float(width[1])):03d}", name)
    return name.lower().replace("-", "_")


def register(name: str, network: type[Network], build: Callable[..., nn.Module]) -> None:
    """Make a model known to timm, under `timm_name`.

    Args:
        name: our name of it.
        network: the class that is built.
        build: ``build(mode=..., **arguments)``.
    """

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
            functools.partial(build, mode=mode),
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
