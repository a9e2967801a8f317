"""The house: imports go down only, and the import of the library stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# From the ground up: a file may import from its own floor and from those above it in this list.
FLOORS = [
    {"errors", "_with_timm"},
    {"archive", "distributed", "logging", "config", "seeding"},
    {"csla"},
    {"optim"},
    {"layers"},
    {"reparam"},
    {"models"},
    {"torchfile", "checkpoint", "run_folder", "scales", "deploy", "convert", "quantization", "export"},
    {"engine"},
    {"segmentation", "detection"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
FILES = sorted((ROOT / "repopt").rglob("*.py"))


def part_of(path):
    """The floor's name of a file in repopt/, or None for the public face."""
    name = path.relative_to(ROOT / "repopt").parts[0].removesuffix(".py")
    return None if name == "__init__" else name


def imported(path):
    """Modules that a file imports, dotted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_a_floor():
    assert {part_of(path) for path in FILES} - {None} == LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    own = part_of(path)
    for module in imported(path):
        top, *rest = module.split(".")
        assert top not in {"data", "configs", "entrance", "main_repopt", "scripts", "tests"}, f"{path} imports {module}"
        if top == "repopt" and own is not None and rest and rest[0] in LEVEL:
            assert LEVEL[rest[0]] <= LEVEL[own], f"{own} imports {module}, which is above it"


@pytest.mark.parametrize(
    ("folder", "above"),
    [("data", {"configs", "entrance", "main_repopt", "scripts"}), ("entrance", {"main_repopt", "scripts"})],
)
def test_imports_of_the_upper_floors_go_down(folder, above):
    scripts = {path.stem for path in (ROOT / "scripts").iterdir()}
    for path in (ROOT / folder).rglob("*.py"):
        assert not {module.split(".")[0] for module in imported(path)} & (above | scripts), path


def test_configuration_stays_at_the_entrance():
    for path in FILES:
        assert part_of(path) == "config" or not {"yacs", "train.config"} & set(imported(path)), path


def test_data_knows_little_of_the_package():
    for path in (ROOT / "data").rglob("*.py"):
        ours = {m for m in imported(path) if m.startswith("repopt.")}
        assert all(m.split(".")[1] in {"archive", "errors", "distributed", "logging", "seeding"} for m in ours), path


def python(code):
    """What a new process prints."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import repopt", {"torch", "timm"}),
        ("import repopt; [getattr(repopt, name) for name in repopt.__all__]", {"matplotlib", "sklearn", "yacs"}),
        ("import train.run", {"matplotlib", "sklearn", "tensorboard"}),
        ("import main_repopt, pytest; pytest.raises(SystemExit, main_repopt.main, ['--help'])", {"torch"}),
        ("import main_repopt; main_repopt.main(['--flag'])", {"torch"}),
        ("import main_repopt; main_repopt.main(['--opts', 'TRAIN.EPOKS', '1'])", {"torch"}),
    ],
)
def test_nothing_is_imported_before_it_is_needed(code, absent):
    assert python(f"{code}\nimport sys; print(sorted({absent} & set(sys.modules)))").splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "order",
    [
        "import repopt, timm",
        "import timm, repopt",
        "import train.engine, timm",
        "import repopt, importlib.util; importlib.util.find_spec('timm'); import timm",
    ],
)
def test_models_stand_in_timms_registry_in_whatever_order_the_two_are_imported(order):
    assert "repopt_vgg_b1" in python(f"{order}; print(timm.list_models('repopt_vgg*'))")


def test_the_package_offers_what_its_stub_declares():
    assert (
        python("import repopt, repopt.deploy; print(callable(repopt.deploy), 'deploy' in dir(repopt))") == "True True"
    )


def test_there_is_no_gpu_for_tests_that_are_not_about_one():
    assert not torch.cuda.is_available()
    assert python("import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))") == "''"
