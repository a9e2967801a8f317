"""Files of others are data: whatever stands in them, a reader returns what it promises or refuses in one line.

HYPOTHESIS_PROFILE=soak python -m pytest tests/repopt/test_hostile.py    # many more examples
"""

import contextlib
import functools
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import repopt
from data import Source, describe
from data.zipped import ZippedImages
from repopt import checkpoint
from repopt.errors import UserError
from train import config
from train.config import KEYS

ROOT = Path(__file__).resolve().parents[2]
NUM_CLASSES = 3
MODEL = "RepOpt-VGG-nano"


class Trap:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Where all files of this module lie; nothing but what a test writes may appear in it."""
    path = tmp_path_factory.mktemp("hostile")
    before = Path.cwd()
    os.chdir(path)
    yield path
    os.chdir(before)
    assert not (path / "executed").exists()


@contextlib.contextmanager
def refusals(errors=None):
    """A refusal is one short line; any other exception comes through."""
    try:
        yield
    except UserError as error:
        message = str(error)
        assert message
        assert message.splitlines() == [message]
        assert message.isprintable()
        assert len(message) < 500
        if errors is not None:
            errors.append(message)


def refused(read, *arguments):
    errors = []
    with refusals(errors):
        read(*arguments)
    assert errors, "it was accepted"
    return errors[0]


# ---------------------------------------------------------------------------------------------------- checkpoints


def torch_zip(pickled, records=(), method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("a/data.pkl", pickled)
        for name, content in records:
            archive.writestr(name, content)
    return file.getvalue()


def torch_legacy(pickled):
    heads = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(head, 2) for head in heads) + pickled + pickle.dumps([], 2)


def saved(content, **settings):
    file = io.BytesIO()
    torch.save(content, file, **settings)
    return file.getvalue()


def text(value):
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value):
    encoded = pickle.encode_long(value)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def rebuilt(size, stride, offset=0, count=4, name="_rebuild_tensor_v2", location="cpu", key="0", kind="FloatStorage"):
    """The pickle of {"w": tensor} with shapes of one's own."""

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text(location) + number(count) + b"tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    call = f"ctorch._utils\n{name}\n".encode() + b"("
    return (
        b"\x80\x02}" + text("w") + call + storage + number(offset) + numbers(size) + numbers(stride) + hooks + b"tRs."
    )


def called(module, name, *arguments):
    return b"\x80\x02}" + text("w") + f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tRs."


FOUR = [("a/data/0", b"\0" * 16)]  # bytes of four floats
BOMB = (
    b"\x80\x02}"
    + text("w")
    + b"(]q\0"
    + b"".join(b"](" + b"h%c" % i * 20 + b"eq%c" % (i + 1) for i in range(30))
    + b"ts."
)
PICKLES = {
    "calls": pickle.dumps({"w": Trap()}, 2),
    "calls, protocol 4": pickle.dumps({"w": Trap()}, 4),
    "calls, protocol 5": pickle.dumps({"w": Trap()}, 5),
    "eval": called("builtins", "eval", text("__import__('os').mkdir('executed')")),
    "attribute of a class": b"\x80\x04}" + text("w") + b"\x8c\x02os\x8c\x05mkdir\x93" + text("executed") + b"\x85Rs.",
    "a pickle within": called("pickle", "loads", text(pickle.dumps(Trap(), 0).decode())),
    "a file to open": called("torch.serialization", "load", text("/etc/passwd")),
    "protocol 4": pickle.dumps({"w": "a" * 300}, 4),
    "a deep tuple as key": b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.",
    "a deep tuple": b"\x80\x02}" + text("w") + b")" + b"\x85" * 100_000 + b"s.",
    "deep lists": b"\x80\x02}" + text("w") + b"]" * 100_000 + b"a" * 99_999 + b"s.",
    "many marks": b"\x80\x02" + b"(" * 100_000 + b".",
    "itself": b"\x80\x02}q\0" + text("w") + b"h\0s.",
    "laughs": BOMB,
    "a huge integer": b"\x80\x02}" + text("w") + b"\x8a\xff" + b"\x01" * 255 + b"s.",
    "an integer of gigabytes": b"\x80\x02}" + text("w") + b"\x8b\xff\xff\xff\x7f\x01s.",
    "text of gigabytes": b"\x80\x02}X\xff\xff\xff\xffw",
    "bytes of exabytes": b"\x80\x04}" + text("w") + b"\x8e" + b"\xff" * 7 + b"\x7fas.",
    "a bytearray of exabytes": b"\x80\x05}" + text("w") + b"\x96" + b"\xff" * 7 + b"\x7fas.",
    "a frame of exabytes": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}.",
    "a far memo": b"\x80\x02}r\xff\xff\xff\x7f" + text("w") + b"j\xff\xff\xff\x7fs.",
    "a large bytearray": called("__builtin__", "bytearray", number(2**40)),
    "a large tensor": called("torch", "FloatTensor", number(2**40)),
    "a large storage": called("torch", "UntypedStorage", number(2**40)),
    "a large text": called("_codecs", "encode", text("a"), text("latin1")),
    "attributes": b"\x80\x02}" + text("w") + b"ctorch\nTensor\n)\x81}" + text("shape") + b"K\x01sbs.",
    "a class as value": b"\x80\x02}" + text("w") + b"ccollections\nOrderedDict\ns.",
    "a list as key": b"\x80\x02}]K\x01s.",
    "sparse": called("torch._utils", "_rebuild_sparse_tensor", b"ctorch.serialization\n_get_layout\n", b")"),
    "meta": called("torch._utils", "_rebuild_meta_tensor_no_storage", b"ctorch\nfloat32\n", b"))\x89"),
    "quantized": rebuilt((4,), (1,), name="_rebuild_qtensor", kind="QInt8Storage"),
    "subclass": called("torch._tensor", "_rebuild_from_type_v2", b"N))}"),
    "nothing": b"",
    "an empty stack": b"\x80\x02.",
    "underflow": b"\x80\x02}asub\x87t.",
}
TENSORS = {
    "beyond": rebuilt((5,), (1,)),
    "beyond by the stride": rebuilt((2,), (4,)),
    "beyond by the offset": rebuilt((1,), (1,), offset=4),
    "before": rebuilt((1,), (1,), offset=-1),
    "backwards": rebuilt((4,), (-1,), offset=3),
    "a negative size": rebuilt((-4,), (1,)),
    "expanded": rebuilt((2**40,), (0,)),
    "expanded in many dimensions": rebuilt((2**20,) * 6, (0,) * 6),
    "of 2**60 elements": rebuilt((2**60,), (1,), count=2**60),
    "of 2**200 elements": rebuilt((1,), (1,), count=2**200),
    "a negative count": rebuilt((1,), (1,), count=-4),
    "a smaller count": rebuilt((1,), (1,), count=1),
    "a missing record": rebuilt((4,), (1,), key="1"),
    "a record above": rebuilt((4,), (1,), key="../../x"),
    "more strides than sizes": rebuilt((4,), (1, 1)),
    "a thousand dimensions": rebuilt((1,) * 1000, (1,) * 1000),
    "empty and absurd": rebuilt((0, 2**47, 2**47), (1, 1, 1)),
    "another type": rebuilt((1,), (1,), kind="DoubleStorage"),
    "an unknown type": rebuilt((1,), (1,), kind="StrangeStorage"),
}


ENDLESS = [b"\x80\x02}" + text("w") + b"]" * count + b"s." for count in (2**20, 2**22)]


def read_checkpoint(content):
    Path("a.pth").write_bytes(content)
    return checkpoint.read("a.pth")


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickles(name, recwarn):
    for content in (torch_zip(PICKLES[name]), torch_legacy(PICKLES[name]), PICKLES[name]):
        assert "'a.pth'" in refused(read_checkpoint, content)
    assert not recwarn


@pytest.mark.parametrize("name", TENSORS)
def test_hostile_tensors(name):
    assert "'a.pth'" in refused(read_checkpoint, torch_zip(TENSORS[name], FOUR))
    legacy = torch_legacy(TENSORS[name])[: -len(pickle.dumps([], 2))] + pickle.dumps(["0"], 2)
    assert "'a.pth'" in refused(read_checkpoint, legacy + struct.pack("<q", 4) + b"\0" * 16)


def test_the_hostile_files_are_otherwise_whole():
    good = rebuilt((2, 2), (2, 1))
    assert read_checkpoint(torch_zip(good, FOUR))["w"].tolist() == [[0, 0], [0, 0]]
    legacy = torch_legacy(good)[: -len(pickle.dumps([], 2))] + pickle.dumps(["0"], 2)
    assert read_checkpoint(legacy + struct.pack("<q", 4) + b"\0" * 16)["w"].shape == (2, 2)
    for location in ("cuda:7", "meta", "nonsense"):  # whatever it says: on the CPU
        assert read_checkpoint(torch_zip(rebuilt((4,), (1,), location=location), FOUR))["w"].device.type == "cpu"


def patched_zip(content, name, **values):
    """A zip whose directory says something else of an entry: its size, packed size, place, flags or attributes."""
    fields = {"flags": (8, "<H"), "packed": (20, "<I"), "size": (24, "<I"), "attributes": (38, "<I"), "at": (42, "<I")}
    content = bytearray(content)
    at = content.index(b"PK\1\2")
    while content[at + 46 : at + 46 + len(name)] != name.encode():
        at = content.index(b"PK\1\2", at + 1)
    for field, value in values.items():
        offset, form = fields[field]
        struct.pack_into(form, content, at + offset, value)
    return bytes(content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_archives():
    good = rebuilt((4,), (1,))
    zeros = b"\0" * 16
    for records, message in (
        ([*FOUR, ("a/data/0", b"\1" * 16)], "two of its entries are named 'a/data/0'"),
        ([*FOUR, ("../../x", b"")], "'../../x' does not lie below 'a/'"),
        ([*FOUR, ("a/../../x", b"")], "does not lie below"),
        ([*FOUR, ("a/constants.pkl", b""), ("a/code/a.py", b"import os; os.mkdir('executed')")], "TorchScript"),
        ([*FOUR, ("a/byteorder", b"big")], "byte order"),
        ([*FOUR, ("a/byteorder", b"\xff")], "cannot be read"),
        ([("a/data/0", b"\0" * 12)], "has 12 bytes, not 4"),
    ):
        assert message in refused(read_checkpoint, torch_zip(good, records))
    assert "is compressed" in refused(
        read_checkpoint, torch_zip(good, [("a/data/0", b"\0" * 2**20)], zipfile.ZIP_DEFLATED)
    )
    whole = torch_zip(good, [*FOUR, ("a/data/1", zeros)])
    for values, message in (
        ({"at": 0}, "shares bytes"),
        ({"size": 2**31}, "is stored in 16 bytes and said to have"),
        ({"size": 2**31, "packed": 2**31}, "longer than the file"),
        ({"flags": 1}, "encrypted"),
        ({"attributes": 0o120777 << 16}, "is a symbolic link"),
        ({"at": 2**31}, "longer than the file"),
    ):
        assert message in refused(read_checkpoint, patched_zip(whole, "a/data/1", **values))
    assert not list(Path("..").glob("x"))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_is_not_run():
    torch.jit.script(torch.nn.Linear(2, 2)).save("script.pt")
    assert "TorchScript" in refused(checkpoint.read, "script.pt")
    Path("script.pt").unlink()


def test_what_is_no_regular_file():
    os.mkfifo("pipe")
    for path in ("/dev/zero", "pipe", "."):
        for read in (checkpoint.read, repopt.load_scales, lambda path: config.parse(["--cfg", path])):
            assert "there is no" in refused(read, path)
    Path("pipe").unlink()


def test_odd_entries_of_a_checkpoint(recwarn):
    weights = {"w": torch.ones(3)}
    named = ({}, {1: torch.ones(3)}, {"w": None}, {"w" * 10**5: 3}, {"a\n": 3})
    for state in (3, [], "text", None, *named, torch.ones(3)):
        for key in ("model", "state_dict"):
            refused(checkpoint.state_dict_of, read_checkpoint(saved({key: state})))
    assert "with and without the prefix" in refused(
        checkpoint.state_dict_of, {"w": torch.ones(3), "module.w": torch.ones(3)}
    )
    model = torch.nn.Linear(3, 1, bias=False)
    for state, message in (
        ({"weight": torch.ones(1, 3, dtype=torch.complex64)}, "1 of another type such as 'weight', torch.complex64"),
        ({"weight": torch.ones(1, 3, dtype=torch.int32)}, "torch.int32 in the file, torch.float32 expected"),
        ({"weight": torch.ones(1, 3), "\n" * 10**5: weights["w"]}, "1 unknown such as"),
        ({"weight": torch.ones(1).expand(2**40)}, "(1099511627776,) in the file"),
    ):
        assert message in refused(checkpoint.load_weights, model, state)
    for dtype in (torch.float16, torch.float64, torch.float8_e5m2):
        checkpoint.load_weights(model, {"weight": torch.ones(1, 3).to(dtype)})
        assert model.weight.dtype == torch.float32
    assert not recwarn


# ---------------------------------------------------------------------------------------------------------- scales

ODD_SCALES = {
    "integers": (torch.ones(4, dtype=torch.int64), "has the type torch.int64, not one of torch.float32"),
    "bools": (torch.ones(4, dtype=torch.bool), "has the type torch.bool"),
    "complex": (torch.ones(4, dtype=torch.complex64), "has the type torch.complex64"),
    "float8": (torch.ones(4).to(torch.float8_e4m3fn), "has the type torch.float8_e4m3fn"),
    "nan": (torch.tensor([1.0, float("nan")]), "has values that are not finite"),
    "inf": (torch.tensor([1.0, -float("inf")]), "has values that are not finite"),
    "no values": (torch.ones(0), "has the shape (0,), not (O,)"),
    "a number": (torch.tensor(1.0), "has the shape (), not (O,)"),
    "2-D": (torch.ones(2, 2), "has the shape (2, 2), not (O,)"),
}


@pytest.mark.parametrize("name", ODD_SCALES)
def test_odd_scales(name):
    value, message = ODD_SCALES[name]
    for content in ({"s": value}, {"scales": {"t": torch.ones(3), "s": value}}):
        Path("s.pth").write_bytes(saved(content))
        assert refused(
            repopt.load_scales, "s.pth"
        ) == f"'s.pth' cannot give scales: 's' {message}" or message in refused(repopt.load_scales, "s.pth")


def safetensors(header, values=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + values


def test_a_safetensors_file_is_read():
    state = repopt.create_model(MODEL, mode="target", num_classes=NUM_CLASSES).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, "weights.safetensors")
    found = checkpoint.read("weights.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(value, found[name]) for name, value in state.items())
    repopt.load_weights(repopt.create_model(MODEL, mode="target", num_classes=NUM_CLASSES), found)
    scales = repopt.extract_scales(repopt.create_model(MODEL, mode="hs"))
    save_file(scales, "scales.safetensors")
    assert repopt.load_scales("scales.safetensors").keys() == scales.keys()


FLOATS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        safetensors({"w": FLOATS}, b"\0" * 4),
        safetensors({"w": FLOATS | {"shape": [2**40]}}, b"\0" * 8),
        safetensors({"w": FLOATS | {"data_offsets": [0, 2**60]}}, b"\0" * 8),
        safetensors({"w": FLOATS | {"data_offsets": [8, 0]}}, b"\0" * 8),
        safetensors({"w": FLOATS | {"dtype": "F3"}}, b"\0" * 8),
        safetensors({"a": FLOATS, "b": FLOATS}, b"\0" * 8),
        safetensors(b'{"w": ', b"\0" * 8),
        safetensors(b"{" * 5000),
        safetensors(b"{\xff\xff}"),
    ],
)
def test_damaged_safetensors_files(content):
    Path("bad.safetensors").write_bytes(content)
    assert refused(checkpoint.read, "bad.safetensors").startswith("'bad.safetensors' is a damaged safetensors file: ")


@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_safetensors_header(header, length):
    Path("any.safetensors").write_bytes(safetensors(b"{" + header, length=length))
    with refusals():
        checkpoint.read("any.safetensors")


def test_scale_files_without_scales():
    for content in ({}, {"scales": {}}, {"s": "text"}, {3: torch.ones(3)}, {"scales": {"s": 1}}):
        Path("s.pth").write_bytes(saved(content))
        refused(repopt.load_scales, "s.pth")


def test_scales_that_do_not_fit():
    model = repopt.create_model(MODEL, mode="hs")
    scales = repopt.extract_scales(model)
    key = "stage0.scale_conv.weight"
    like = scales[key]
    for value, message in (
        (like.long(), f"{key!r} of block 'stage0' has the type torch.int64"),
        (like * float("nan"), "has values that are not finite"),
        (like[None], "of the shape"),
        (torch.ones(1).expand(2**40), "found (1099511627776,)"),
        (like.to_sparse(), "has the layout torch.sparse_coo"),
        (like.to("meta"), "on meta"),
        (like.tolist(), "is of the type list"),
        (None, "is of the type NoneType"),
    ):
        assert message in refused(repopt.bind, model, scales | {key: value})
    assert "3 is no name" in refused(repopt.bind, model, scales | {3: like})
    assert "no such block" in refused(repopt.bind, model, scales | {"x" * 10**5 + ".scale_conv.weight": like})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_of_other_widths_are_kept_as_they_are(dtype):
    scales = {
        name: value.to(dtype) for name, value in repopt.extract_scales(repopt.create_model(MODEL, mode="hs")).items()
    }
    repopt.save_scales(scales, "s.pth")
    loaded = repopt.load_scales("s.pth")
    assert all(loaded[name].dtype == dtype and torch.equal(loaded[name], value) for name, value in scales.items())
    model = repopt.create_model(MODEL, mode="target")
    repopt.initialize(model, loaded)
    mults = repopt.grad_mults(model, loaded, degree=1)
    exact = repopt.grad_mults(model, {name: value.double() for name, value in scales.items()}, degree=1)
    assert all(
        torch.equal(a, b) for name in mults for a, b in zip(mults[name].tensors(), exact[name].tensors(), strict=True)
    )


# ------------------------------------------------------------------------------------------------------------ zips


def image_zip(entries=(), method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for i in range(NUM_CLASSES):
            archive.writestr(f"{i}.png", bytes([i]) * 50)
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


MAP = b"".join(b"%d.png\t%d\n" % (i, i) for i in range(NUM_CLASSES))


def read_zip(archive, map_=MAP):
    Path("zips").mkdir(exist_ok=True)
    Path("zips/val.zip").write_bytes(archive)
    Path("zips/val_map.txt").unlink(missing_ok=True)
    if map_ is not None:
        Path("zips/val_map.txt").write_bytes(map_)
    assert describe(Source("imagenet", "zips", zip_mode=True), splits=("val",)).num_classes <= 10**6
    for cache_mode in ("no", "full"):
        images = ZippedImages("zips", "val", num_classes=NUM_CLASSES, cache_mode=cache_mode, rank=0, world_size=1)
        for i in range(len(images.labels)):
            assert 0 <= images.labels[i] < NUM_CLASSES
            assert isinstance(images.name(i), str)
            with contextlib.suppress(OSError):
                assert isinstance(images.read(i), bytes)
    return images


def test_entries_that_climb_out_are_never_written():
    entries = [("../../climbed.png", b"x"), ("/climbed.png", b"y"), ("a\\..\\climbed.png", b"z")]
    images = read_zip(image_zip(entries), MAP + b"../../climbed.png\t0\n/climbed.png\t0\n")
    assert [images.read(3), images.read(4)] == [b"x", b"y"]  # they are names in the zip and nothing more
    assert sorted(path.name for path in Path("zips").iterdir()) == ["val.zip", "val_map.txt"]
    assert not [*Path("/").glob("climbed*"), *Path("..").glob("climbed*"), *Path("../..").glob("climbed*")]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_zips():
    for values, message in (
        ({"size": 10**9}, "line 2: '1.png' is stored in 50 bytes and said to have 1000000000"),
        ({"flags": 1}, "line 2: '1.png' is encrypted"),
        ({"attributes": 0o120777 << 16}, "line 2: '1.png' is a symbolic link"),
        ({"at": 0}, "is refused: its entry '1.png' shares bytes"),
        ({"packed": 2**31}, "is refused"),
        ({"size": 2**32 - 1}, "zip"),
    ):
        assert message in refused(read_zip, patched_zip(image_zip(), "1.png", **values))
    deflated = image_zip(method=zipfile.ZIP_DEFLATED)
    assert "cannot unpack from" in refused(read_zip, patched_zip(deflated, "1.png", size=2**31))
    assert "two of its entries are named '1.png'" in refused(read_zip, image_zip([("1.png", b"")]))
    bomb = image_zip([("bomb.png", b"\0" * 2**24)], zipfile.ZIP_DEFLATED)
    assert "its images unpack to" in refused(read_zip, bomb, MAP + b"bomb.png\t0\n")
    bomb = image_zip([("val_map.txt", b"\0" * 2**20)], zipfile.ZIP_DEFLATED)
    assert "is no map file" in refused(read_zip, patched_zip(bomb, "val_map.txt", size=2**31), None)
    assert "line 1: expected" in refused(read_zip, bomb, None)
    assert "is encrypted" in refused(read_zip, patched_zip(bomb, "val_map.txt", flags=1), None)


@pytest.mark.parametrize(
    "line",
    [
        b"a\0b\t0", b"\xf0\x9f\x98\x80" * 10**5 + b"\t0", b"a\rb\t0", b"\xe2\x80\xa8\t0", b"\x1b[2J\t1",
        b"0.png\t9999999",
    ],
    ids=range(6),
)  # fmt: skip
def test_hostile_map_lines(line):
    assert "line" in refused(read_zip, image_zip(), MAP + line + b"\n")


def test_a_long_name_costs_its_own_length_only():
    """An array of names is as wide as its longest one."""
    long = "x" * 60_000
    count = 3000
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name in (long, *map(str, range(count))):
            file.writestr(name, b"")
    lines = "".join(f"{name}\t0\n" for name in (long, *range(count)))
    images = read_zip(archive.getvalue(), lines.encode())
    assert len(pickle.dumps(images)) < 10**6
    assert images.name(count).endswith(f"/{count - 1}")


# --------------------------------------------------------------------------------------------------------- recipes

RECIPES = {
    "a call": "TAG: !!python/object/apply:os.mkdir [executed]",
    "a name": "TAG: !!python/name:os.mkdir",
    "another tag": "TAG: !boom x",
    "aliases": "a: &a [x]\nb: &b [*a, *a]\n",
    "itself": "&a TRAIN: *a",
    "merged": "<<: {TAG: x}",
    "deep": "TAG: " + "[" * 30_000,
    "deep mappings": "{a: " * 10_000,
    "deep blocks": "\n".join(" " * i + "a:" for i in range(300)),
    "large": "TAG: " + "x" * 100_000,
    "digits": "SEED: " + "9" * 50_000,
    "hexadecimal digits": "SEED: 0x" + "f" * 50_000,
    "base 60": "SEED: 1" + ":1" * 20_000,
    "a huge float": "TRAIN.BASE_LR: 0x" + "f" * 1000,
    "nan": "TRAIN: {BASE_LR: .nan}",
    "inf": "TRAIN: {BASE_LR: .inf}",
    "minus inf": "TRAIN: {BASE_LR: -.inf}",
    "nan in a pair": "TRAIN: {OPTIMIZER: {BETAS: [.nan, 0.9]}}",
    "a bool for an int": "SEED: true",
    "a bool for a float": "TRAIN: {BASE_LR: true}",
    "bools in a pair": "TRAIN: {OPTIMIZER: {BETAS: [true, false]}}",
    "a number as key": "3: x",
    "nothing as key": "~: x",
    "a list as key": "? [a]\n: x",
    "a mapping as key": "? {a: b}\n: x",
    "a long key": "x" * 1000 + ": 3",
    "twice": "TAG: a\nTAG: b",
    "twice, dotted": "TRAIN.EPOCHS: 3\nTRAIN: {EPOCHS: 4}",
    "nul": "TAG: a\0b",
    "an escaped nul": 'TAG: "a\\0b"',
    "a set": "TAG: !!set {a, b}",
    "bytes": "TAG: !!binary aGVsbG8=",
    "a date": "TAG: 2026-01-01",
    "a mapping for a value": "TAG: {a: b}",
    "two documents": "TAG: a\n---\nTAG: b",
    "a base that is a device": "BASE: /dev/zero",
    "a base that is a folder": "BASE: .",
    "a base with a nul": 'BASE: "a\\0"',
    "a base that is long": "BASE: " + "x" * 10_000,
    "a base that is a link to itself": "BASE: loop.yaml",
    "a base that is this by a link": "BASE: link.yaml",
    "bases that are no text": "BASE: [3]",
}


def read_recipe(content):
    Path("a.yaml").write_bytes(content)
    return config.parse(["--cfg", "a.yaml"]).cfg


@pytest.mark.parametrize("name", RECIPES)
def test_hostile_recipes(name):
    for link, target in (("loop.yaml", "loop.yaml"), ("link.yaml", "a.yaml")):
        if not Path(link).is_symlink():
            Path(link).symlink_to(target)
    refused(read_recipe, RECIPES[name].encode())


def test_a_byte_order_mark_is_no_part_of_a_key():
    assert read_recipe(b"\xef\xbb\xbfTAG: a").TAG == "a"


def test_bases_of_bases():
    """Shared ones are read once: without that, this would be 8**16 readings."""
    for i in range(16):
        Path(f"{i}.yaml").write_text(f"BASE: [{', '.join([f'{i + 1}.yaml', f'./x/../{i + 1}.yaml'] * 4)}]\nSEED: {i}")
    Path("x").mkdir(exist_ok=True)
    Path("16.yaml").write_text("TAG: bottom")
    assert config.parse(["--cfg", "0.yaml"]).cfg.TAG == "bottom"
    for i in range(40):
        Path(f"{i}.yaml").write_text(f"BASE: {i + 1}.yaml")
    assert "are allowed" in refused(config.parse, ["--cfg", "0.yaml"])


@pytest.mark.parametrize(
    "key", ["TRAIN.BASE_LR", "SEED", "TRAIN.OPTIMIZER.BETAS", "TRAIN.AUTO_RESUME", "DATA.TEST_SIZE"]
)
@pytest.mark.parametrize(
    "value",
    [
        "(" * 200, "-" * 10**6 + "1", "[" * 10**5, "9" * 5000, "0x" + "f" * 900, "1e999", "nan", "'\\d'", "{1: [2]}",
        "(True, False)", "(1e999, 1)", f"({'9' * 400}, 1)", "a\nb", "\ud800", "1" + "+1" * 400, "__import__('os')",
    ],
    ids=range(16),
)  # fmt: skip
def test_hostile_values_of_the_command_line(key, value, recwarn):
    refused(config.parse, ["--opts", key, value])
    assert not recwarn


# ---------------------------------------------------------------------------------------------------------- memory


def test_bombs_need_little_memory():
    """Every hostile file above in one process that may take half a gigabyte more than it begins with."""
    Path("bombs").mkdir()
    for i, content in enumerate(
        [torch_zip(p) for p in ENDLESS]
        + [torch_legacy(ENDLESS[-1])]
        + [torch_zip(p) for p in PICKLES.values()]
        + [torch_legacy(p) for p in PICKLES.values()]
        + [torch_zip(t, FOUR) for t in TENSORS.values()]
        + [torch_legacy(t) for t in TENSORS.values()]
    ):
        Path(f"bombs/{i}.pth").write_bytes(content)
    for i, recipe in enumerate(RECIPES.values()):
        Path(f"bombs/{i}.yaml").write_bytes(recipe.encode())
    zips = {
        "size": patched_zip(image_zip(), "1.png", size=2**31),
        "deflated": patched_zip(image_zip(method=zipfile.ZIP_DEFLATED), "1.png", size=2**31),
        "large": image_zip([("bomb.png", b"\0" * 2**29)], zipfile.ZIP_DEFLATED),
        "map": image_zip([("val_map.txt", b"\n" * 2**26)], zipfile.ZIP_DEFLATED),
    }
    for name, archive in zips.items():
        Path(f"bombs/{name}").mkdir()
        Path(f"bombs/{name}/val.zip").write_bytes(archive)
        if name != "map":
            Path(f"bombs/{name}/val_map.txt").write_bytes(MAP + (b"bomb.png\t0\n" if name == "large" else b""))
    code = """
import resource, sys
from pathlib import Path
from data.zipped import ZippedImages
from repopt import checkpoint
from train import config
from repopt.errors import UserError
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**29
resource.setrlimit(resource.RLIMIT_AS, (size, size))
for path in sorted(Path("bombs").iterdir()):
    try:
        if path.suffix == ".pth":
            checkpoint.read(path)
        elif path.suffix == ".yaml":
            config.parse(["--cfg", str(path)])
        else:
            ZippedImages(str(path), "val", num_classes=9, cache_mode="full", rank=0, world_size=1)
        print(path, "was accepted")
    except UserError:
        pass
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


# --------------------------------------------------------------------------------------------------------- fuzzing

MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(("flip", "set", "delete", "insert", "truncate", "copy")),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.one_of(
            st.binary(min_size=1, max_size=12), st.sampled_from([b"\xff" * 4, b"\xff" * 8, b"\0" * 4, b"PK\1\2"])
        ),
    ),
    min_size=1,
    max_size=6,
)


def mutated(content, mutations):
    content = bytearray(content)
    for kind, where, other, new in mutations:
        at, to = int(where * len(content)), int(other * len(content))
        match kind:
            case "flip" if content:
                content[at] ^= 1 << new[0] % 8
            case "set":
                content[at : at + len(new)] = new
            case "delete":
                del content[at : at + new[0] % 16 + 1]
            case "insert":
                content[at:at] = new
            case "truncate":
                del content[at:]
            case "copy":
                content[at : at + 16] = content[to : to + 16]
    return bytes(content)


def is_plain(value):
    match value:
        case dict():
            return all(isinstance(key, (str, int, float, bool, type(None))) for key in value) and all(
                map(is_plain, value.values())
            )
        case list() | tuple():
            return all(map(is_plain, value))
        case torch.Tensor():
            inside = value.numel() * value.element_size() <= value.untyped_storage().nbytes()
            return value.device.type == "cpu" and value.layout is torch.strided and inside
    return value is None or isinstance(value, (str, int, float, bool, torch.dtype))


def check_checkpoint(content):
    with refusals():
        read = read_checkpoint(content)
        assert isinstance(read, dict)
        assert is_plain(read)
        state = checkpoint.state_dict_of(read)
        assert all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())
        for value in state.values():
            value.double() if value.is_floating_point() else value.clone()  # nothing points outside
        checkpoint.load_weights(torch.nn.Linear(3, 1), state)


def check_scales(content):
    Path("s.pth").write_bytes(content)
    with refusals():
        scales = repopt.load_scales("s.pth")
        assert scales
        for name, value in scales.items():
            assert isinstance(name, str)
            assert value.dim() == 1
            assert len(value)
            assert value.is_floating_point()
            assert torch.isfinite(value).all()


def check_recipe(content):
    with refusals():
        cfg = read_recipe(content)
        for name, key in KEYS.items():
            value = config.lookup(cfg, name)
            assert type(value) in (key.type, type(key.default))
            assert not isinstance(value, float) or 0 <= value < float("inf")


def check_zip(archive, map_):
    with refusals():
        read_zip(archive, map_)


@functools.cache
def whole_files():
    """Valid files, and ones that set the trap."""
    generator = torch.Generator().manual_seed(0)
    weights = {"weight": torch.randn(1, 3, generator=generator), "bias": torch.ones(1), "n": torch.tensor(3)}
    whole = {
        "model": weights,
        "epoch": 3,
        "config": {"TAG": "x", "B": (0.9, 0.99)},
        "optimizer": {"state": {0: weights}},
    }
    scales = {"a.scale.weight": torch.rand(4, generator=generator), "b.scale.weight": torch.ones(7)}
    trap = {"model": weights, "trap": Trap()}
    recipe = "# x\nBASE: ['']\nTRAIN:\n  EPOCHS: 3\n  OPTIMIZER: {BETAS: [0.9, 0.99]}\nTAG: 'a'\nAUG: {PRESET: null}\n"
    return {
        "checkpoint": saved(whole),
        "legacy": saved(whole, _use_new_zipfile_serialization=False),
        "trap": saved(trap),
        "legacy trap": saved(trap, _use_new_zipfile_serialization=False),
        "scales": saved(scales),
        "recipe": recipe.encode(),
        "zip": image_zip(),
        "deflated": image_zip([("val_map.txt", MAP)], zipfile.ZIP_DEFLATED),
    }


@pytest.mark.parametrize("kind", ["checkpoint", "legacy", "trap", "legacy trap"])
@given(mutations=MUTATIONS)
def test_mutated_checkpoints(kind, mutations):
    check_checkpoint(mutated(whole_files()[kind], mutations))


@given(mutations=MUTATIONS, legacy=st.booleans())
def test_mutated_pickles(mutations, legacy):
    """The pickle alone, in an archive that is whole: deeper than the checksums."""
    check_checkpoint(
        (torch_legacy if legacy else functools.partial(torch_zip, records=FOUR))(
            mutated(rebuilt((4,), (1,)), mutations)
        )
    )


@given(mutations=MUTATIONS)
def test_mutated_scales(mutations):
    check_scales(mutated(whole_files()["scales"], mutations))


@given(mutations=MUTATIONS)
def test_mutated_recipes(mutations):
    check_recipe(mutated(whole_files()["recipe"], mutations))


@pytest.mark.parametrize("kind", ["zip", "deflated"])
@given(in_zip=MUTATIONS, in_map=st.one_of(st.none(), MUTATIONS), beside=st.booleans())
def test_mutated_zips(kind, in_zip, in_map, beside):
    map_ = mutated(MAP, in_map) if in_map else MAP
    check_zip(mutated(whole_files()[kind], in_zip), map_ if beside or kind == "zip" else None)


DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8, torch.complex64,
]  # fmt: skip
TENSOR = st.builds(
    lambda dtype, size, change: change(torch.ones(size).to(dtype)),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from(
        [
            lambda t: t,
            lambda t: t.T if t.dim() == 2 else t,
            lambda t: t.expand(3, *t.shape),
            lambda t: t[..., ::2] if t.dim() else t,
            lambda t: t.to_sparse() if t.dim() and t.dtype is torch.float32 else t,
            lambda t: t.to("meta"),
            lambda t: torch.nn.Parameter(t) if t.is_floating_point() else t,
            lambda t: t * float("nan"),
            lambda t: t.conj(),
        ]
    ),
)  # fmt: skip
TEXT = st.text(st.characters(), max_size=20)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXT, TENSOR, st.binary(max_size=8), st.complex_numbers()
)
NAMES = st.sampled_from(["model", "state_dict", "scales", "weight", "bias", "module.weight", "config", "epoch", "ema"])
KEY = st.one_of(NAMES, TEXT, st.integers(), st.none(), st.floats(), st.tuples(st.integers()), st.binary(max_size=3))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(KEY, inner, max_size=4),
        st.tuples(inner, inner),
        st.sets(st.integers()),
    ),
    max_leaves=12,
)


@pytest.mark.filterwarnings("ignore")  # of torch on saving odd tensors
@given(content=st.one_of(VALUES, st.dictionaries(NAMES, VALUES)), legacy=st.booleans())
def test_arbitrary_content(content, legacy):
    try:
        written = saved(content, _use_new_zipfile_serialization=not legacy)
    except (RuntimeError, NotImplementedError, OverflowError, AttributeError):  # no layout of the legacy format
        return
    check_checkpoint(written)
    check_scales(written)


YAML_PARTS = [
    "\n", ": ", "- ", "  ", "[", "]", "{", "}", "&a ", "*a", "!!int ", "!!python/name:os.mkdir ", "'\"", "|", ">", "? ",
    "---", "#", ".nan", ".inf", "<<", "~", "%",
]  # fmt: skip
YAML_TEXT = st.lists(st.one_of(st.sampled_from(list(KEYS)), st.sampled_from(YAML_PARTS), TEXT), max_size=20).map(
    "".join
)
YAML_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.dates(), st.binary(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(TEXT, st.integers()), inner, max_size=3)
    ),
    max_leaves=5,
)
KNOWN = [name for name in KEYS if name != "BASE"]


@given(text=YAML_TEXT)
def test_arbitrary_recipes(text):
    check_recipe(text.encode("utf-8", "surrogatepass"))


@given(values=st.dictionaries(st.sampled_from(KNOWN), YAML_VALUES, min_size=1, max_size=2))
def test_arbitrary_values_in_recipes(values):
    with contextlib.suppress(yaml.YAMLError):
        check_recipe(yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass"))


@given(key=st.sampled_from(KNOWN), value=st.one_of(TEXT, st.integers(), st.floats(), YAML_VALUES.map(repr)))
def test_arbitrary_values_on_the_command_line(key, value):
    with refusals():
        config.parse(["--opts", key, str(value)])


@given(
    map_=st.one_of(
        st.binary(max_size=60),
        st.lists(st.tuples(TEXT, TEXT)).map(
            lambda rows: "\n".join(map("\t".join, rows)).encode("utf-8", "surrogatepass")
        ),
    )
)
def test_arbitrary_maps(map_):
    check_zip(image_zip(), map_)
