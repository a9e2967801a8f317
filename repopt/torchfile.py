"""Files of `torch.save`, read as data: tensors and plain Python values; nothing of a file is executed.

Reading does not use `torch.load(weights_only=True)`: it refuses the configurations (yacs) of published checkpoints,
does not look at checksums, and can be made to crash the interpreter (a tuple nested a million times as a key). Python's
own unpickler is restricted instead: to the instructions that `torch.save` writes, to the callables in `_GLOBALS`, to
keys that hash without recursion, and to tensors within bytes that the file really has.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar, NoReturn, cast

import torch
from torch import Tensor
from typing_extensions import override

from repopt import archive
from repopt.errors import UserError, one_line, shown

_MAX_PICKLE = 2**22  # bytes; about 150 per tensor are usual, and each of them may become an object of 72
_MAX_VALUES = 2**21  # of the content, written out without references
_MAX_DEPTH = 64
_MAX_DIMS = 64
_MAX_BITS = 256  # of an integer
_BLOCK = 2**20  # bytes

# Of protocol 2: what makes and fills plain containers, and calls.
_INSTRUCTIONS = (
    pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.REDUCE, pickle.BINPERSID, pickle.BINPUT,
    pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT,
    pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINSTRING,
    pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.EMPTY_TUPLE, pickle.TUPLE,
    pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
)  # fmt: skip
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001


class _RefusedError(Exception):
    """Raised when a file holds more than tensors and plain data, or contradicts itself."""


def load(path: Path) -> Any:
    """Return the content of a file of `torch.save`, of the format of today (zip) or that before torch 1.6.

    It is read once, and the checksums of a zip are verified on the way.

    Returns:
        Nested dicts, lists, tuples, strings, numbers, dtypes and strided tensors on the CPU. Dicts stand for their
        subclasses and for `argparse.Namespace`, tensors for parameters, lists for sets, strings for devices.

    Raises:
        UserError: the file is damaged, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            zipped = file.peek(4).startswith(b"PK\3\4")
            content = _load_zip(path) if zipped else _load_legacy(file)
        _check_plain(content)
    except _RefusedError as error:
        raise UserError(f"{str(path)!r} is refused, it is no file of tensors and plain data: {error}") from None
    except UserError:
        raise
    # Raised by noise in place of a pickle or an archive.
    except (*archive.ERRORS, pickle.UnpicklingError, AttributeError, LookupError, TypeError) as error:
        raise UserError(f"{str(path)!r} cannot be read as a torch file: {one_line(error)}") from None
    return content


def _load_zip(path: Path) -> Any:
    with archive.open_zip(path) as file:
        records = _records(file)
        if "byteorder" in records and (order := file.read(records["byteorder"])).decode() != sys.byteorder:
            _refuse(f"its byte order is {shown(order)}")
        if (size := records["data.pkl"].file_size) > _MAX_PICKLE:
            _refuse(f"its pickle has {size} bytes, and {_MAX_PICKLE} are allowed")
        storages: dict[str, Tensor] = {}

        def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
            info = records[f"data/{key}"]
            if info.file_size != count * dtype.itemsize:
                _refuse(f"storage {shown(key)} has {info.file_size} bytes, not {shown(count)} of {dtype}")
            if key not in storages:
                storages[key] = torch.empty(info.file_size, dtype=torch.uint8)
                with file.open(info) as record:
                    _fill(storages[key], cast(io.BufferedIOBase, record))
            return storages[key].view(dtype)

        return _Unpickler(io.BytesIO(file.read(records["data.pkl"])), storage).load()


def _records(file: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the entries of a torch archive by their names within the folder that all of them lie in."""
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
        if reason := archive.invalid_reason(info):
            _refuse(f"its entry {shown(info.filename)} {reason}")
        records[info.filename.removeprefix(folder)] = info
    if "data.pkl" not in records:
        _refuse("it is a zip without a data.pkl")
    return records


def _load_legacy(file: io.BufferedReader) -> Any:
    """Return the content of five pickles (magic, version, system, content, keys), behind which the storages lie."""
    storages: dict[str, Tensor] = {}
    free = os.fstat(file.fileno()).st_size

    def storage(dtype: torch.dtype, key: str, count: int, view: object = None) -> Tensor:
        nonlocal free
        if view is not None:
            _refuse("it has views of storages")
        if key not in storages:
            free -= count * dtype.itemsize
            if free < 0:
                _refuse("its storages are larger than the file")
            storages[key] = torch.empty(count, dtype=dtype)
        if (storages[key].dtype, len(storages[key])) != (dtype, count):
            _refuse(f"it has two types or sizes for storage {shown(key)}")
        return storages[key]

    pickles = io.BytesIO(file.read(_MAX_PICKLE))
    if _Unpickler(pickles).load() != _LEGACY_MAGIC:
        raise ValueError("it does not begin as one")
    if (version := _Unpickler(pickles).load()) != _LEGACY_VERSION:
        _refuse(f"its version is {shown(version)}")
    if _Unpickler(pickles).load()["little_endian"] is not (sys.byteorder == "little"):
        _refuse("its byte order is another one")
    content = _Unpickler(pickles, storage).load()
    keys = _Unpickler(pickles).load()
    if not isinstance(keys, list) or sorted(keys) != sorted(storages):
        _refuse("its list of storages is not that of its tensors")
    file.seek(pickles.tell())
    for key in keys:
        if int.from_bytes(file.read(8), "little") != len(storages[key]):
            _refuse(f"storage {shown(key)} has another size than its tensors say")
        _fill(storages[key].view(torch.uint8), file)
    return content


def _fill(data: Tensor, file: io.BufferedIOBase) -> None:
    """Read the bytes of a storage, in blocks: zipfile would hold all of them twice."""
    view = data.numpy().data
    while len(view):
        count = file.readinto(view[:_BLOCK])
        if not count:
            raise EOFError("it ends too early")
        view = view[count:]


class _Unpickler(pickle._Unpickler):  # the one in C has no table of instructions to restrict
    """A reader of one pickle.

    Args:
        file: the stream; it stands behind the pickle afterwards.
        storage: returns the elements of a storage, 1-D, for what the pickle says of it: the element type, the key, the
            number of elements, and in legacy files whether it is a view; None = the pickle has no tensors.
    """

    stack: list[Any]
    pop_mark: Callable[..., list[Any]]

    def __init__(self, file: IO[bytes], storage: Callable[..., Tensor] | None = None) -> None:
        super().__init__(file, encoding="latin-1")
        self._storage = storage

    @override
    def find_class(self, module: str, name: str) -> Any:
        if f"{module} {name}" not in _GLOBALS:
            _refuse(f"it names {shown(f'{module}.{name}')}")
        return _GLOBALS[f"{module} {name}"]

    @override
    def persistent_load(self, pid: Any) -> Tensor:
        if self._storage is None:
            _refuse("it has a tensor where none belongs")
        kind, dtype, key, _location, count, *view = pid
        if kind != "storage" or type(dtype) is not torch.dtype or type(key) is not str or type(count) is not int:
            _refuse("it has a storage of no known type or size")
        return self._storage(dtype, key, count, *view)

    def _set_item(self) -> None:
        self._set(self.stack.pop(-2), self.stack.pop())

    def _set_items(self) -> None:
        self._set(*self.pop_mark())

    def _set(self, *items: Any) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            _refuse("its pickle sets items of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, float, bool, type(None)):  # hashing a tuple recurses without a bound
                _refuse(f"it has a dict with a key of the type {type(key).__name__}")
            target[key] = value

    def _set_attributes(self) -> None:
        """Keep those of namespaces; leave out those of dicts (versions of modules, whether they are frozen)."""
        state = self.stack.pop()
        match self.stack[-1]:
            case dict() as target if type(state) is dict:
                if type(target) is _Namespace:
                    target.update(state)
            case torch.dtype() if type(state) is tuple and state[1] in ("<", "|"):  # the byte order of numpy's types
                pass
            case _:
                _refuse("it has an object with attributes")

    def _refuse_instruction(self) -> NoReturn:
        _refuse("its pickle has an instruction that torch does not write")

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **dict.fromkeys(range(256), _refuse_instruction),
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in _INSTRUCTIONS},
        pickle.NEWOBJ[0]: pickle._Unpickler.dispatch[pickle.REDUCE[0]],  # `_GLOBALS` has functions, no classes
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.BUILD[0]: _set_attributes,
    }


class _Namespace(dict[str, Any]):
    """The attributes of an `argparse.Namespace`, such as the arguments that timm's checkpoints keep."""


def _new_dict() -> dict[Any, Any]:
    return {}  # takes no arguments, unlike dict: items come one by one, and their keys are looked at


def _tensor(
    storage: Tensor,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    _requires_grad: bool = False,
    _hooks: object = None,
    *rest: Any,
) -> Tensor:
    """Return a view of a storage that is no larger than it; torch refuses those that are not within.

    `rest` has the element type where torch has no storage of it, and what kind of view it is of complex numbers.
    """
    if rest and type(rest[0]) is torch.dtype:
        storage, rest = storage.view(rest[0]), rest[1:]
    if any(rest):
        _refuse("it has a conjugated or negated view")
    if not all(type(number) is int for number in (offset, *size, *stride)) or len(size) > _MAX_DIMS:
        _refuse("it has a tensor without a shape")
    if math.prod(size) > len(storage) or math.prod(filter(None, size)) >= 2**62:
        _refuse(f"it has a tensor of the size {shown(size)} in a storage of {len(storage)}")
    return storage.as_strided(size, stride, offset)


def _numpy_scalar(dtype: torch.dtype, data: bytes) -> float:
    if type(data) is not bytes:
        _refuse("it has a number without its bytes")
    return torch.frombuffer(bytearray(data), dtype=dtype).item()


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
            case tuple() | list():
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


_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
)
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "ComplexDouble": "complex128",
    "ComplexFloat": "complex64", "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool",
}  # fmt: skip
_NUMPY_DTYPES = {"f8": "float64", "f4": "float32", "i8": "int64", "i4": "int32", "u1": "uint8", "b1": "bool"}
# What a pickle may name: element types, and functions that stand for what it calls.
_GLOBALS: dict[str, Any] = {
    **{f"torch {name}": getattr(torch, name) for name in _DTYPES},
    **{f"torch {name}Storage": getattr(torch, dtype) for name, dtype in _STORAGES.items()},
    "torch.storage UntypedStorage": torch.uint8,
    "torch Size": lambda size: size,
    "torch device": lambda kind, *index: ":".join((kind, *map(str, index))),
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor,
    "torch._utils _rebuild_parameter": lambda data, *_: data,
    "torch._utils _rebuild_parameter_with_state": lambda data, *_: data,
    "collections OrderedDict": _new_dict,
    "collections Counter": lambda counts: counts,  # of schedules with milestones
    "__builtin__ set": lambda items: items,
    "argparse Namespace": lambda: _Namespace(),  # without arguments, too
    "yacs.config CfgNode": _new_dict,
    "numpy dtype": lambda code, *_: getattr(torch, _NUMPY_DTYPES[code]),
    "numpy.core.multiarray scalar": _numpy_scalar,
    "numpy._core.multiarray scalar": _numpy_scalar,
    "_codecs encode": lambda text, _: text.encode("latin-1"),  # of the bytes of numpy's scalars
}
