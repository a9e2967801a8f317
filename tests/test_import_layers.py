"""Imports go down only, what is light stays light, and a newcomer opens few files."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# From the ground up: a file may import from its own layer and from those above it in this list.
LAYERS = [
    {"repopt.errors", "repopt.archive"},
    {"repopt.images"},
    {"repopt.csla", "repopt.drawn", "repopt.torchfile", "repopt.onnx_graph", "repopt.nms", "repopt.runtime"},
    {"repopt.optim", "repopt.checkpoint"},
    {"repopt.layers", "repopt.transposed", "repopt.priors"},
    {"repopt.blocks"},
    {"repopt.scales"},
    {"repopt.reparam"},
    {"repopt.branches", "repopt.declare", "repopt.models", "repopt.convert", "repopt.deploy", "repopt.merge"},
    {"repopt.quantization", "repopt.export", "repopt.openvino"}
    | {"repopt.segmentation", "repopt.detection", "repopt.integrations"},
    {"repopt.description"},
    {"repopt.load"},
    {"data"},
    {"train"},
    {"scripts", "main_repopt"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = [*itertools.chain(*((ROOT / folder).rglob("*.py") for folder in ("repopt", "train", "data", "scripts")))]
FILES = sorted([*FILES, ROOT / "main_repopt.py"])
SCRIPTS = {path.stem for path in (ROOT / "scripts").iterdir()}  # they import each other by bare names


def layer_of(module):
    """The layer's name of a dotted module, or None for one of others and for the library's public face."""
    top, *rest = module.split(".")
    if top == "repopt":
        return f"repopt.{rest[0]}" if rest and f"repopt.{rest[0]}" in LEVEL else None
    return "scripts" if top in SCRIPTS | {"scripts"} and top not in LEVEL else top if top in LEVEL else None


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path):
    """Modules that a file imports anywhere, dotted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_of_the_library_has_a_layer():
    parts = {
        f"repopt.{path.relative_to(ROOT / 'repopt').parts[0].removesuffix('.py')}"
        for path in FILES
        if "repopt/" in str(path)
    }
    assert parts - {"repopt.__init__"} == {name for name in LEVEL if name.startswith("repopt.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    own = layer_of(module_of(path))
    for module in imported(path):
        layer = layer_of(module)
        if own is not None and layer is not None:
            assert LEVEL[layer] <= LEVEL[own], f"{own} imports {module}, which is above it"


APPLICATION = {"yacs", "yaml", "tensorboard", "tqdm", "train", "data"}


@pytest.mark.parametrize("path", [p for p in FILES if module_of(p).startswith("repopt")], ids=lambda path: path.name)
def test_the_library_knows_nothing_of_the_application(path):
    assert not {module.split(".")[0] for module in imported(path)} & APPLICATION


def test_data_knows_little_of_the_library():
    for path in (ROOT / "data").rglob("*.py"):
        ours = {".".join(m.split(".")[:2]) for m in imported(path) if m.startswith("repopt.")}
        assert ours <= {"repopt.archive", "repopt.errors", "repopt.images"}, path


def test_from_the_command_to_the_gradients_a_newcomer_opens_four_files():
    """The shortest way over imports to the file whose `train_step` calls ``backward``, both ends included."""

    def trains(path):
        steps = (
            n
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.FunctionDef) and n.name == "train_step"
        )
        calls = (n for step in steps for n in ast.walk(step) if isinstance(n, ast.Call))
        return any(isinstance(call.func, ast.Attribute) and call.func.attr == "backward" for call in calls)

    opened, reached = [{ROOT / "main_repopt.py"}], set()
    while not any(map(trains, opened[-1])):
        reached |= opened[-1]
        found = {
            ROOT.joinpath(*module.split(".")).with_suffix(".py") for path in opened[-1] for module in imported(path)
        }
        opened.append({path for path in found - reached if path.is_file()})
        assert opened[-1], "no step is trained"
    assert len(opened) <= 4


def python(code):
    """What a new process prints."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import repopt", {"matplotlib", "sklearn", "yacs", "tensorboard", "torchao", "onnx", "openvino"}),
        ("import train.run", {"matplotlib", "sklearn", "tensorboard"}),
    ],
)
def test_nothing_is_imported_before_it_is_needed(code, absent):
    assert python(f"{code}\nimport sys; print(sorted({absent} & set(sys.modules)))").splitlines()[-1] == "[]"


@pytest.mark.parametrize("order", ["import repopt, timm", "import timm, repopt", "import train.run, timm"])
def test_models_stand_in_timms_registry_in_whatever_order_the_two_are_imported(order):
    assert "repopt_vgg_b1" in python(f"{order}; print(timm.list_models('repopt_vgg*'))")


def test_the_package_offers_its_functions_though_modules_have_their_names():
    assert python("import repopt, repopt.deploy; print(callable(repopt.deploy))") == "True"


def test_there_is_no_gpu_for_tests_that_are_not_about_one():
    assert not torch.cuda.is_available()
    assert python("import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))") == "''"
