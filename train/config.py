"""Configuration: from a command line and recipes to the values of all keys (train/keys.py).

Precedence: defaults < ``--cfg`` file (its ``BASE`` files first) < flags that were given < ``--opts KEY VALUE ...``.
A key also goes before one that it excludes: steps of warm-up on the command line before epochs of warm-up in a recipe.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import sys
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from repopt.errors import UserError, one_line, shown, unknown
from train.command import MAIN, Program, parse_flags
from train.keys import KEYS, RENAMED, Key

_MAX_RECIPE_BYTES = 2**16
_MAX_LITERAL = 1000  # characters; Python's parser has no bound of its own
_MAX_BASES = 20  # recipes above one another


class Settings(NamedTuple):
    """A configuration that is not resolved yet.

    Attributes:
        cfg: The values of all keys, frozen.
        given: The keys that a user set.
    """

    cfg: CfgNode
    given: frozenset[str]

    def with_values(self, values: Mapping[str, Any]) -> Settings:
        """Return the settings with other values (by dotted key), which count as not set by a user.

        Raises:
            UserError: A value is not one of its key's.
        """
        flat = dict(flatten(self.cfg)) | {name: _coerce(name, value) for name, value in values.items()}
        return Settings(_nest(flat), self.given)

    def with_defaults(self, values: Mapping[str, Any]) -> Settings:
        """Return the settings with other values for those of these keys that no user set."""
        return self.with_values({name: value for name, value in values.items() if name not in self.given})


def parse(argv: Sequence[str] | None = None, program: Program = MAIN) -> Settings:
    """Return the configuration that a command line asks for; see `read`.

    Raises:
        SystemExit: An unknown flag, or --help.
    """
    return read(parse_flags(sys.argv[1:] if argv is None else argv, program), program)


def read(flags: argparse.Namespace, program: Program) -> Settings:
    """Return the configuration that the flags of a command line ask for (`train.command.parse_flags`).

    Raises:
        UserError: An unknown key (with the nearest one), a value of the wrong kind, a recipe that is not there.
    """
    arguments = vars(flags)
    recipe, opts = arguments["cfg"] or program.recipe, arguments["opts"]
    recipes = _read_recipe(Path(recipe)) if recipe else ()
    values = {name: arguments[name] for name in program.flags.values() if arguments[name] is not None}
    if len(opts) % 2:
        raise UserError(f"--opts takes pairs of KEY and VALUE; the last one, {opts[-1]!r}, stands alone")
    values |= zip(map(_current_name, opts[::2]), opts[1::2], strict=True)
    if "BASE" in values:
        raise UserError("BASE stands in a recipe; on the command line give --cfg")
    settings = build(functools.reduce(_over, (*recipes, values), {}))
    if not arguments["cfg"]:  # the program's own recipe is no user's
        settings = settings._replace(given=frozenset(values))
    return settings.with_defaults({"TASK": program.task})


def build(values: Mapping[str, Any]) -> Settings:
    """Return the defaults with `values` (by dotted key) over them; strings are read as on a command line."""
    defaults = Settings(_nest({name: key.default for name, key in KEYS.items()}), frozenset(values))
    return defaults.with_values(values)


def _over(values: Mapping[str, Any], higher: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with others over them, and without what these exclude."""
    excluded = {KEYS[name].excludes for name, value in higher.items() if name in KEYS and value not in (None, "None")}
    return {name: value for name, value in values.items() if name not in excluded} | dict(higher)


def as_dict(cfg: CfgNode) -> dict[str, Any]:
    """Return a configuration as plain nested dicts."""
    return {name: as_dict(value) if isinstance(value, CfgNode) else value for name, value in cfg.items()}


def lookup(cfg: object, name: str) -> Any:
    """Return the value of a dotted key in nested mappings, such as a configuration in a checkpoint; None if absent."""
    for part in name.split("."):
        cfg = cfg.get(part) if isinstance(cfg, Mapping) else None
    return cfg


def _current_name(name: str) -> str:
    """Return what a key is called now, with a warning where an earlier version called it otherwise."""
    if name in RENAMED:
        warnings.warn(f"{name} is called {RENAMED[name]} now", FutureWarning, stacklevel=2)
    return RENAMED.get(name, name)


def _nest(flat: Mapping[str, Any]) -> CfgNode:
    root = CfgNode()
    for name, value in flat.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            node = node.setdefault(part, CfgNode())
        node[leaf] = value
    root.freeze()
    return root


def _coerce(name: str, value: Any) -> Any:
    """Return `value` as the key's type; text is read as a Python literal where the type is not text."""
    if name not in KEYS:
        raise unknown("config key", name, KEYS)
    key = KEYS[name]
    kind = key.type or type(key.default)
    if value in key.words:
        return value
    if isinstance(value, str) and kind is not str:
        value = _literal(value)
    elif value == "None" and key.default is None:
        value = None
    if kind is list and isinstance(value, str):
        value = value.split(",")
    if kind is float and type(value) is int and abs(value) <= sys.maxsize:
        value = float(value)
    if kind in (tuple, list) and isinstance(value, (tuple, list)):
        value = kind(value)
    if type(value) is not kind and not (value is None and key.default is None):
        words = "".join(f" or {word!r}" for word in key.words)
        raise UserError(f"{name} takes a value of type {kind.__name__}{words}, not {shown(value)}")
    if value is not None:
        _check_range(name, key, value)
    if key.choices and value not in key.choices:
        raise unknown(f"value of {name}", str(value), map(str, key.choices))
    return value


def _check_range(name: str, key: Key, value: Any) -> None:
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{name} takes text without NUL characters, not {shown(value)}")
    if isinstance(value, list) and not all(isinstance(text, str) and text and "\0" not in text for text in value):
        raise UserError(f"{name} takes texts, such as one,two, not {shown(value)}")
    if isinstance(value, list) and len({*value}) < len(value) and any(value):
        raise UserError(f"{name} takes texts that differ, not {shown(value)}")
    if type(value) in (int, float) and not key.minimum <= value <= key.maximum:
        limit = f"from {key.minimum} on" if key.maximum == sys.maxsize else f"from {key.minimum} to {key.maximum}"
        raise UserError(f"{name} is a number {limit}, not {shown(value)}")
    if isinstance(value, tuple):
        is_one = _is_integer if key.integer else _is_number
        if (
            len(value) != (key.length or len(value))
            or not value
            or any(not is_one(v) or v < key.minimum for v in value)
        ):
            count, numbers = key.length or "one or more", "integers" if key.integer else "numbers"
            least = f" from {key.minimum} on" if key.minimum else ""
            raise UserError(f"{name} takes {count} {numbers}{least}, not {shown(value)}")


def _literal(text: str) -> Any:
    """`text` as a Python literal; what is none stays text, and whoever wants another type says so."""
    if len(text) <= _MAX_LITERAL:
        unreadable = contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
        with unreadable, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in strings
            return ast.literal_eval(text)
    return text


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.maxsize  # NaN is not


def _is_integer(value: object) -> bool:
    return type(value) is int and _is_number(value)


def _read_recipe(path: Path) -> Iterator[dict[str, Any]]:
    """Dotted keys and values of a YAML recipe, behind those of each of its BASE recipes.

    Raises:
        UserError: a recipe that is not there, is no plain YAML, has unknown keys or builds upon itself.
    """
    yield from _recipe_and_bases(path, above=(), done=set())


def _recipe_and_bases(path: Path, above: tuple[Path, ...], done: set[Path]) -> Iterator[dict[str, Any]]:
    try:
        found = path.is_file()
    except OSError:  # a name that is too long
        found = False
    if not found:
        raise UserError(f"there is no recipe {shown(str(path))}")
    path = path.resolve()
    if path in done:  # two recipes may build upon the same one
        return
    if path in above:
        raise UserError(f"recipe {shown(str(path))} builds upon itself")
    if len(above) > _MAX_BASES:
        raise UserError(f"recipe {shown(str(path))} stands below {len(above)} others, and {_MAX_BASES} are allowed")
    content = _load_yaml(path)
    bases = content.pop("BASE", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"BASE of recipe {shown(str(path))} lists recipes, not {shown(bases)}")
    for base in map(path.parent.joinpath, filter(None, bases)):
        yield from _recipe_and_bases(base, (*above, path), done)
    values: dict[str, Any] = {}
    for old, value in flatten(content):
        name = _current_name(old)
        if name not in KEYS:
            raise UserError(f"{unknown('config key', name, KEYS)} in {shown(str(path))}")
        if name in values:
            raise UserError(f"{name} stands twice in {shown(str(path))}")
        values[name] = value
    yield values
    done.add(path)


def _load_yaml(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _MAX_RECIPE_BYTES:
        raise UserError(f"recipe {shown(str(path))} has {size} bytes, and {_MAX_RECIPE_BYTES} are allowed")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_PlainLoader)
    except RecursionError:
        raise UserError(f"recipe {shown(str(path))} is no plain YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # no YAML, no UTF-8, no such date or number
        raise UserError(f"recipe {shown(str(path))} is no plain YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"recipe {shown(str(path))} holds no keys")
    return content


class _PlainLoader(yaml.SafeLoader):
    """YAML without tags and references, whose expansion has no bound, and with text as keys, each once."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if event.anchor is not None or (isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)) and event.tag):
            raise yaml.composer.ComposerError(None, None, "recipes have no tags and aliases", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # type: ignore[override]
        names = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str" or key.value in names:
                problem = f"{shown(key.value)} is no text, or stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested values by dotted key."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
