"""Networks of other libraries, built with structural re-parameterization: to search on, to check, to train.

A block type is declared once, in the function that `register_block` decorates (`timm/` for examples).
"""

from repopt.convert import timm  # noqa: F401  its import registers timm's blocks
from repopt.convert.declaration import Declaration, register_block
from repopt.convert.model import convert_model

__all__ = ["Declaration", "convert_model", "register_block"]
