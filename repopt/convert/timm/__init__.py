"""The declarations of timm's re-parameterized blocks, one file per file of `timm.models`."""

import importlib
from importlib.util import find_spec

# Older releases of timm lack the last ones. An import registers a file's blocks.
for name in (
    "byobnet",
    "fastvit",
    "ghostnet",
    "repghost",
    "repvit",
    "shvit",
    "efficientvim",
    "iformer",
    "lcnetv2",
):
    if find_spec(f"timm.models.{name}"):
        importlib.import_module(f"{__name__}.{name}")
