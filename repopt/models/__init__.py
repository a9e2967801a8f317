"""Networks: declarations turned into modules, and a baseline beside each. Importing a family registers it."""

from repopt.models import ghost as _ghost  # noqa: F401
from repopt.models import lk as _lk  # noqa: F401
from repopt.models import vgg as _vgg  # noqa: F401
from repopt.models.registry import Arch, baselines, create_model, list_archs, list_models, parse_arch, same_arch
from repopt.models.zoo import without_values

__all__ = [
    "Arch",
    "baselines",
    "create_model",
    "list_archs",
    "list_models",
    "parse_arch",
    "same_arch",
    "without_values",
]
