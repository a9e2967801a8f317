"""Our models stand in timm's registry wherever both packages are imported, and neither imports the other for that."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def watch() -> None:
    """Register the models: now if timm is there, else as soon as it has been imported."""
    if "timm" in sys.modules:
        importlib.import_module("repopt.models")
    else:
        sys.meta_path.insert(0, _AfterTimm())


class _AfterTimm(MetaPathFinder):
    """Finds nothing by itself; lets the import of timm end with that of our models."""

    def __init__(self) -> None:
        self._looks = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm" or self._looks:
            return None
        self._looks = True
        try:
            spec = find_spec(fullname)
        finally:
            self._looks = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:  # others may have looked timm up without importing it
                sys.meta_path.remove(self)
            importlib.import_module("repopt.models")

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
