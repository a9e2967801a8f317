"""Checkpoints, ours and those of the published release: files of others are data, nothing in them is executed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from repopt import torchfile
from repopt.errors import UserError, one_line, shown, unknown


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a ``.pth`` file, or the tensors of a safetensors file, on the CPU.

    Raises:
        UserError: there is no such file, it is damaged, or it holds objects beyond tensors and plain Python data.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    if _is_safetensors(path):
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise UserError(f"{str(path)!r} is a damaged safetensors file: {one_line(error)}") from None
    content = torchfile.load(path)
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} holds a {type(content).__name__}, not a checkpoint or a state dict")
    return content


def _is_safetensors(path: Path) -> bool:
    """Return whether a file begins as they do: with the length of a JSON header, and the header."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size


def write(
    content: Mapping[str, Any], path: str | os.PathLike[str], *, before_replacing: Callable[[Path], None] | None = None
) -> None:
    """Write a ``.pth`` file whole or not at all: beside first, synced to the disk, then renamed.

    Args:
        content: tensors and plain data.
        path: where.
        before_replacing: called with the written file before it replaces what stands at `path`.

    Raises:
        UserError: it cannot be written; what stood there before is whole.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.writing")
    temporary.unlink(missing_ok=True)  # that of a process that was killed may have got other names already
    try:
        torch.save(dict(content), temporary)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        if before_replacing is not None:
            before_replacing(temporary)
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise UserError(f"cannot write {str(path)!r}: {reason}; what was saved before is whole") from None


def _sync_folder(folder: Path) -> None:
    """Make renamings last; a file system that cannot sync a folder does so by itself."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def state_dict_of(content: Mapping[str, Any], key: str = "model") -> dict[str, Tensor]:
    """Return the state dict of a checkpoint, without the prefixes of DDP.

    It stands under `key`, under "state_dict", or is the content itself.

    Raises:
        UserError: there is none.
    """
    state = next((content[k] for k in (key, "state_dict") if k in content), content)
    if not isinstance(state, Mapping) or not state or not all(map(_is_weight, state, state.values())):
        raise UserError(f"the file holds no state dict of tensors (its entries: {shown(list(content))})")
    weights = {name.removeprefix("module."): value for name, value in state.items()}
    if len(weights) < len(state):
        raise UserError("the file holds weights of the same name with and without the prefix 'module.'")
    return weights


WEIGHTS = {"model": "the model's weights", "ema": "the moving average of the weights"}


def choose_weights(content: Mapping[str, Any], wanted: str = "best") -> str:
    """Return which of a checkpoint's weights are meant, a key of `WEIGHTS`.

    Args:
        content: of the checkpoint.
        wanted: one of the keys, or "best": the moving average where there is one that has reached a higher accuracy.

    Raises:
        UserError: the moving average is wanted, and there is none; or something else.
    """
    if wanted not in (*WEIGHTS, "best"):
        raise unknown("weights", wanted, (*WEIGHTS, "best"))
    averaged = isinstance(content.get("ema"), Mapping)
    if wanted == "ema" and not averaged:
        raise UserError("there is no moving average of the weights in it: take --weights model")
    if wanted != "best":
        return wanted
    model, ema = (content.get(key) for key in ("max_accuracy", "max_ema_accuracy"))
    better = isinstance(model, int | float) and isinstance(ema, int | float) and ema > model
    return "ema" if averaged and better else "model"


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state dict of the published names into a model; every name and shape has to fit, floats of any width.

    Raises:
        UserError: there are missing or unknown names, or shapes or types that differ; it says the first of each.
    """
    own = model.state_dict()
    problems = []
    if missing := [name for name in own if name not in state]:
        problems.append(f"{len(missing)} missing such as {missing[0]!r}")
    if unknown := [name for name in state if name not in own]:
        problems.append(f"{len(unknown)} unknown such as {shown(unknown[0])}")
    if other := [name for name in own if name in state and own[name].shape != state[name].shape]:
        found, expected = tuple(state[other[0]].shape), tuple(own[other[0]].shape)
        problems.append(
            f"{len(other)} of another shape such as {other[0]!r}, {shown(found)} in the file, {expected} expected"
        )
    if other := [name for name in own if name in state and _kind(own[name]) != _kind(state[name])]:
        problems.append(
            f"{len(other)} of another type such as {other[0]!r}, {state[other[0]].dtype} in the file, "
            f"{own[other[0]].dtype} expected"
        )
    if problems:
        raise UserError(f"the weights are not those of this model: {'; '.join(problems)}")
    model.load_state_dict(state)


def _is_weight(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided


def _kind(value: Tensor) -> str:
    """Return the kind of number: types of one kind convert into each other without a loss of meaning."""
    return "float" if value.is_floating_point() else "complex" if value.is_complex() else "integer"
