"""What `torch.save` writes, read as data: tensors and plain Python values.

`torch.load(weights_only=True)` runs no code of a file either, but a file can make it call constructors, allocate what
it likes, and crash (a tuple that is nested a million times as a key). So the pickle is interpreted here: a machine of
the few instructions that `torch.save` writes, which calls no function but those below, and tensors that lie within
bytes which the file has.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import torch
from torch import Tensor

from repopt import archive
from repopt.errors import UserError, one_line, shown

_MAX_INSTRUCTIONS = 2**21  # about 35 make a tensor
_MAX_VALUES = 2**21  # of the content, written out without references
_MAX_DEPTH = 64
_MAX_DIMS = 64
_MAX_BITS = 256  # of an integer
_BLOCK = 2**20

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001


class _RefusedError(Exception):
    """What the file holds beyond tensors and plain data; or what is wrong with it."""


class _Builder(NamedTuple):
    """What a pickle may call."""

    build: Callable[..., Any]


class _Storage(NamedTuple):
    """The bytes of a storage, uint8 (N,), and the type of its elements."""

    data: Tensor
    dtype: torch.dtype


def load(path: Path) -> Any:
    """The content of a file of `torch.save`, of the format of today (zip) or that before torch 1.6.

    Returns:
        Nested dicts, lists, tuples, strings, numbers, dtypes and strided tensors on the CPU. Of subclasses of dicts
        the entries are kept, of parameters the tensor, of sets the list of items.

    Raises:
        UserError: no such file, or one that holds anything else.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\3\4"
        content = _load_zip(path) if zipped else _load_legacy(path)
        _check_plain(content)
    except _RefusedError as error:
        raise UserError(f"{str(path)!r} is refused, it is no file of tensors and plain data: {error}") from None
    except UserError:
        raise
    # Of a pickle or an archive that is noise.
    except (*archive.ERRORS, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} cannot be read as a torch file: {one_line(error)}") from None
    return content


def _load_zip(path: Path) -> Any:
    with archive.open_zip(path) as file:
        records = _records(file)
        if "byteorder" in records and (order := file.read(records["byteorder"])).decode() != sys.byteorder:
            _refuse(f"its byte order is {shown(order)}")
        storages: dict[str, Tensor] = {}

        def storage(dtype: torch.dtype, key: str, count: int) -> _Storage:
            info = records[f"data/{key}"]
            if info.file_size != count * dtype.itemsize:
                _refuse(f"storage {shown(key)} has {info.file_size} bytes, not {shown(count)} of {dtype}")
            if key not in storages:
                storages[key] = _read_record(file, info)
            return _Storage(storages[key], dtype)

        return _interpret(io.BytesIO(file.read(records["data.pkl"])), storage)


def _records(file: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The entries of a torch archive, without the folder that all of them lie in."""
    names = file.namelist()
    folder = names[0].partition("/")[0] + "/" if names else ""
    if f"{folder}constants.pkl" in names:
        _refuse("it is a TorchScript program")
    records = {}
    for info in file.infolist():
        if not info.filename.startswith(folder) or ".." in info.filename.split("/"):
            _refuse(f"its entry {shown(info.filename)} does not lie below {shown(folder)}")
        if info.compress_type != zipfile.ZIP_STORED:
            _refuse(f"its entry {shown(info.filename)} is compressed")
        if reason := archive.flaw(info):
            _refuse(f"its entry {shown(info.filename)} {reason}")
        records[info.filename.removeprefix(folder)] = info
    if "data.pkl" not in records:
        _refuse("it is a zip without a data.pkl")
    return records


def _read_record(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> Tensor:
    data = torch.empty(info.file_size, dtype=torch.uint8)
    with file.open(info) as record:
        _fill(data, record)
    return data


def _load_legacy(path: Path) -> Any:
    # Mapped, because reads of declared lengths then end where the file does.
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        if _interpret(file) != _LEGACY_MAGIC:
            raise ValueError("it does not begin as one")
        if (version := _interpret(file)) != _LEGACY_VERSION:
            _refuse(f"its version is {shown(version)}")
        system = _interpret(file)
        if not isinstance(system, dict) or system.get("little_endian") is not (sys.byteorder == "little"):
            _refuse("its byte order is another one")
        storages: dict[str, _Storage] = {}
        free = len(file)

        def storage(dtype: torch.dtype, key: str, count: int, view: object = None) -> _Storage:
            nonlocal free
            if view is not None:
                _refuse("it has views of storages")
            if key not in storages:
                free -= count * dtype.itemsize
                if free < 0:
                    _refuse("its storages are larger than the file")
                storages[key] = _Storage(torch.empty(count * dtype.itemsize, dtype=torch.uint8), dtype)
            found = storages[key]
            if len(found.data) != count * dtype.itemsize:
                _refuse(f"it has two sizes for storage {shown(key)}")
            return _Storage(found.data, dtype)

        content = _interpret(file, storage)
        keys = _interpret(file)
        if not isinstance(keys, list) or sorted(keys) != sorted(storages):
            _refuse("its list of storages is not that of its tensors")
        for key in keys:  # the bytes follow, in this order
            data, dtype = storages[key]
            if int.from_bytes(file.read(8), "little") * dtype.itemsize != len(data):
                _refuse(f"storage {shown(key)} has another size than its tensors say")
            _fill(data, file)
        return content


def _fill(data: Tensor, file: BinaryIO | mmap.mmap) -> None:
    view = memoryview(data.numpy())
    for at in range(0, len(view), _BLOCK):
        block = file.read(min(_BLOCK, len(view) - at))
        if len(block) != len(view[at : at + _BLOCK]):
            raise EOFError("it ends too early")
        view[at : at + _BLOCK] = block


def _no_storage(*_: object) -> NoReturn:
    _refuse("it has a tensor where none belongs")


def _interpret(stream: BinaryIO | mmap.mmap, storage: Callable[..., _Storage] = _no_storage) -> Any:
    """The value of the next pickle in a stream.

    Args:
        stream: stands behind the pickle afterwards.
        storage: from the element type, the key, the number of elements (and a fourth entry in legacy files), as the
            pickle says, to the bytes.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_items(count: int | None = None) -> list[Any]:
        at = marks.pop() if count is None else len(stack) - count
        if not 0 <= at <= len(stack):
            raise IndexError("the pickle takes from an empty stack")
        items = stack[at:]
        del stack[at:]
        return items

    for number, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
        if number > _MAX_INSTRUCTIONS:
            _refuse(f"its pickle has more than {_MAX_INSTRUCTIONS} instructions")
        match instruction.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_items()))
            case "TUPLE1":
                stack.append(tuple(pop_items(1)))
            case "TUPLE2":
                stack.append(tuple(pop_items(2)))
            case "TUPLE3":
                stack.append(tuple(pop_items(3)))
            case "APPEND":
                _extend(*pop_items(1), into=stack[-1])
            case "APPENDS":
                _extend(*pop_items(), into=stack[-1])
            case "SETITEM":
                _set(*pop_items(2), into=stack[-1])
            case "SETITEMS":
                _set(*pop_items(), into=stack[-1])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                if argument not in _GLOBALS:
                    _refuse(f"it names {shown(argument.replace(' ', '.'))}")
                stack.append(_GLOBALS[argument])
            case "REDUCE" | "NEWOBJ":
                function, arguments = pop_items(2)
                if type(function) is not _Builder or type(arguments) is not tuple:
                    _refuse("its pickle calls what is no function")
                stack.append(function.build(*arguments))
            case "BUILD":
                # Attributes of a dict: the versions of modules in a state dict, whether a configuration is frozen.
                if type(pop_items(1)[0]) is not dict or type(stack[-1]) is not dict:
                    _refuse("it has an object with attributes")
            case "BINPERSID":
                stack.append(_storage(storage, stack.pop()))
            case name:
                _refuse(f"its pickle has the instruction {name}, which torch does not write")
    raise EOFError("it ends too early")


def _extend(*items: object, into: object) -> None:
    if type(into) is not list:
        _refuse("its pickle appends to what is no list")
    into.extend(items)


def _set(*items: Any, into: object) -> None:
    if type(into) is not dict or len(items) % 2:
        _refuse("its pickle sets items of what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Hashing a tuple recurses without a bound.
        if type(key) not in (str, int, float, bool, type(None)):
            _refuse(f"it has a dict with a key of the type {type(key).__name__}")
        into[key] = value


def _storage(storage: Callable[..., _Storage], identity: object) -> _Storage:
    if type(identity) is not tuple or len(identity) < 5 or identity[0] != "storage":
        _refuse("its pickle refers to what is no storage")
    _, dtype, key, _location, count, *view = identity
    if type(dtype) is not torch.dtype or type(key) is not str or type(count) is not int or count < 0:
        _refuse("it has a storage of no known type or size")
    return storage(dtype, key, count, *view)


def _tensor(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    """A view of a storage's bytes, all of it within, and no larger than the storage."""
    numbers = (offset, *size, *stride)
    if type(storage) is not _Storage or len(size) != len(stride) or len(size) > _MAX_DIMS:
        _refuse("it has a tensor without a storage or a shape")
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        _refuse(f"it has a tensor of the size {shown(size)}, strides {shown(stride)}, offset {shown(offset)}")
    available, rest = divmod(len(storage.data), storage.dtype.itemsize)
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if rest or (count and (count > available or last >= available)) or math.prod(filter(None, size)) >= 2**62:
        _refuse(f"it has a tensor of the size {shown(size)} in a storage of {available}")
    # An empty one may point anywhere.
    return storage.data.view(storage.dtype).as_strided(size, stride, offset if count else 0)


def _tensor_v2(
    storage: _Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    _requires_grad: bool,
    _hooks: object,
    metadata: object = None,
) -> Tensor:
    if metadata:
        _refuse("it has a conjugated or negated view")
    return _tensor(storage, offset, size, stride)


def _tensor_v3(
    storage: _Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: object,
    dtype: torch.dtype,
    metadata: object = None,
) -> Tensor:
    """Of a storage of bytes, and an element type for which torch has no storage."""
    if type(storage) is not _Storage or type(dtype) is not torch.dtype:
        _refuse("it has a tensor without a storage or a type")
    return _tensor_v2(storage._replace(dtype=dtype), offset, size, stride, requires_grad, hooks, metadata)


def _empty_dict() -> dict[Any, Any]:
    return {}  # takes no arguments, unlike dict: items come one by one, and their keys are looked at


def _check_plain(content: object) -> None:
    """Refuse what is no plain data, or grows when it is walked or printed: cycles, references to references."""
    rest, done = [(content, 0)], 0
    while rest:
        value, depth = rest.pop()
        done += 1
        if depth > _MAX_DEPTH or done + len(rest) > _MAX_VALUES:
            _refuse(f"it has more than {_MAX_DEPTH} levels, or {_MAX_VALUES} values")
        match value:
            case dict():
                rest.extend((item, depth + 1) for item in value.values())
            case tuple() | list() if type(value) in (tuple, list):
                rest.extend((item, depth + 1) for item in value)
            case int():
                if value.bit_length() > _MAX_BITS:
                    _refuse(f"it has {shown(value)}")
            case None | str() | float() | torch.dtype() | Tensor():
                pass
            case _:
                _refuse("it has a type or function among its values")


def _refuse(reason: str) -> NoReturn:
    raise _RefusedError(reason)


_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    )
}
_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_GLOBALS: dict[str, Any] = {
    **{f"torch {name}": dtype for name, dtype in _DTYPES.items()},
    **{f"torch {name}Storage": dtype for name, dtype in _STORAGES.items()},
    "torch.storage UntypedStorage": torch.uint8,
    "torch Size": _Builder(lambda size: size),
    "torch._utils _rebuild_tensor": _Builder(_tensor),
    "torch._utils _rebuild_tensor_v2": _Builder(_tensor_v2),
    "torch._utils _rebuild_tensor_v3": _Builder(_tensor_v3),
    "torch._utils _rebuild_parameter": _Builder(lambda data, *_: data),
    "torch._utils _rebuild_parameter_with_state": _Builder(lambda data, *_: data),
    "collections OrderedDict": _Builder(_empty_dict),
    "collections Counter": _Builder(lambda counts: counts),  # of schedules with milestones
    "__builtin__ set": _Builder(lambda items: items),
    # Old checkpoints pickle their configuration.
    "yacs.config CfgNode": _Builder(_empty_dict),
}
