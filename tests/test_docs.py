"""The documents' examples run, in the order in which they stand, and do what the text says."""

import ast
import contextlib
import copy
import functools
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import check_equivalency
import numpy as np
import pytest
import study_branches
import study_prior
import test_families
import test_optim
import torch
from benchmarks.report import as_table
from check_equivalency import BOUND, SIGNS, largest_difference
from PIL import Image
from reproduction.result import table_of
from reproduction.tables import EXPERIMENTS
from test_convert import fenced_code

import repopt
from repopt import quantization
from repopt.export import relative_difference
from repopt.layers import MODES
from repopt.models import list_archs, registry
from repopt.optim import RULES

DOCS = Path(__file__).resolve().parents[1] / "docs"


def run(name):
    """What the python examples of a document leave behind."""
    namespace = {"__name__": name}
    for code in fenced_code(DOCS / f"{name}.md"):
        exec(compile(code, f"{name}.md", "exec"), namespace)
    return namespace


def test_every_document_is_tested():
    tested = {
        "converting",
        "data",
        "downstream",
        "glyphs",
        "finetuning",
        "frameworks",
        "equivalence",
        "index",
        "one_run",
        "api",
        "caveats",
        "adding_a_model",
        "adding_an_update_rule",
        "training_loop",
        "quantization",
        "performance",
        "reliability",
        "reproduction",
    }
    # The first in test_convert, data in test_make_shards, frameworks in test_loops, reliability in test_soak; all links
    # and the API by the site.
    assert {path.stem for path in DOCS.glob("*.md")} == tested


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=DOCS.parent, env=environment, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stderr) == (0, "")
    assert "repopt.bind" in (tmp_path / "api.html").read_text()
    pages = [page.read_text() for page in tmp_path.glob("*.html")]
    loaded = r"<script[^>]* src=\"?https?:|<link[^>]* rel=\"?stylesheet\"?[^>]* href=\"?https?:"
    assert not any(re.search(loaded, page) for page in pages)  # it works without a network


def test_the_api_page_has_every_public_name():
    listed = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert {name.split(".")[-1] for name in listed} >= set(repopt.__all__)


def test_index():
    assert type(run("index")["optimizer"]).__name__ == "RepSGD"


def test_links_lead_somewhere():
    for path in DOCS.glob("*.md"):
        for link in re.findall(r"\]\(([\w./]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
        for test in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", path.read_text()):
            file, function = test
            assert not function or f"def {function}(" in (DOCS.parent / file).read_text(), f"{path.name}: {test}"


@pytest.mark.parametrize("file", sorted((DOCS.parent / "benchmarks").glob("*-*.json")), ids=lambda file: file.stem)
def test_performance_is_what_was_measured(file):
    measured = json.loads(file.read_text())
    text = (DOCS / "performance.md").read_text()
    for rows in measured["tables"].values():
        assert as_table(rows) in text
    assert f"`{measured['command']}`, {measured['machine']}, torch {measured['torch']}" in text


def test_quantization_is_what_was_measured():
    text = (DOCS / "quantization.md").read_text()
    for rows in json.loads((DOCS.parent / "benchmarks" / "int8.json").read_text()).values():
        assert as_table(rows) in text


@pytest.mark.parametrize(
    "file", sorted((DOCS.parent / "benchmarks" / "reproduction").glob("table*.json")), ids=lambda file: file.stem
)
def test_reproduction_is_what_was_run(file):
    content, text = json.loads(file.read_text()), (DOCS / "reproduction.md").read_text()
    for part in (f"## {content['name'].capitalize()}: {content['title']}", table_of(content), *content["orderings"]):
        assert part in text
    assert content["name"] in EXPERIMENTS


def test_the_table_of_int8_is_what_was_run():
    content = json.loads((DOCS.parent / "benchmarks" / "reproduction" / "int8.json").read_text())
    assert table_of(content) in (DOCS / "quantization.md").read_text()


@pytest.mark.parametrize(
    "file", sorted((DOCS.parent / "benchmarks" / "reproduction").glob("study*.json")), ids=lambda file: file.stem
)
def test_studies_are_what_was_run(file):
    assert table_of(json.loads(file.read_text())) in (DOCS / "one_run.md").read_text()


def test_the_study_of_priors_is_what_was_run():
    kept = json.loads((DOCS.parent / "benchmarks" / "prior.json").read_text())
    found = {study_prior.Run(*entry["run"]): entry["top1"] for entry in kept}
    assert study_prior.as_markdown(found) in (DOCS / "one_run.md").read_text()


def test_the_study_of_branches_is_what_was_run():
    kept = json.loads((DOCS.parent / "benchmarks" / "branches.json").read_text())
    found = {study_branches.Run(*entry["run"]): entry["top1"] for entry in kept}
    assert study_branches.as_markdown(found) in (DOCS / "one_run.md").read_text()


def test_quantization_names_every_preset():
    text = (DOCS / "quantization.md").read_text()
    for name, preset in quantization.PRESETS.items():
        row = re.search(rf"^\| `{name}` .*$", text, re.MULTILINE)[0]
        for low, high in (preset.weights, preset.activations):
            assert f"{low}..{high}" in row


def test_glyphs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("glyphs")
    drawn, shown = (np.asarray(Image.open(file), int) for file in ("glyphs.png", DOCS / "images" / "glyphs.png"))
    assert np.abs(drawn - shown).mean() < 1  # other versions of Pillow may round otherwise


def test_quantization(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    if not torch.cpu._is_vnni_supported():
        pytest.skip("OpenVINO's integers need VNNI")
    monkeypatch.chdir(tmp_path)
    documented = run("quantization")
    assert (tmp_path / "int8.onnx").is_file()
    expected = documented["int8"](documented["images"])
    for found in (documented["logits"], documented["logits_of_openvino"]):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=1e-3)
    float_logits = documented["model"](documented["images"])
    assert relative_difference(documented["logits_of_nncf"], float_logits) < 0.1
    assert documented["OpenVinoNetwork"]("nncf.onnx").count_integer_convolutions() == 28
    assert documented["optimizer"].grad_mults


def test_downstream_is_what_was_measured():
    text = (DOCS / "downstream.md").read_text()
    for rows in json.loads((DOCS.parent / "benchmarks" / "downstream.json").read_text())["tables"].values():
        assert as_table(rows) in text


def test_downstream(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documented = run("downstream")
    names = documented["optimizer"].grad_mults.keys()
    assert {name.split(".")[1] for name in names} == {"body", "fpn"}
    assert all(name.endswith(".conv.weight") for name in names)
    assert documented["found"][0].keys() == {"boxes", "labels", "scores", "masks"}


def test_equivalence(capsys):
    run("equivalence")
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^# ([01] \[.*\])  ", (DOCS / "equivalence.md").read_text(), re.MULTILINE)
    assert printed == promised


class TestAddingAModel:
    @pytest.fixture(scope="class", autouse=True)
    def documented(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry, "_families", dict(registry._families))
            patch.setattr(registry, "register_model", lambda entrypoint: entrypoint)
            yield run("adding_a_model")

    def test_it_trains_and_deploys(self, documented):
        assert documented["losses"][-1] < 0.5 * documented["losses"][0]
        assert {"stage0.0.scale_5x5.weight", "stage0.1.identity.weight"} <= documented["scales"].keys()
        model, x = documented["model"].eval(), documented["images"]
        torch.testing.assert_close(documented["deployed"].eval()(x), model(x), rtol=1e-4, atol=1e-4)
        assert {"Wide-tiny-hs", "Wide-tiny-target"} <= list_archs().keys()
        assert "wide_tiny" in registry.default_cfgs

    @pytest.mark.parametrize("signs", SIGNS)
    @pytest.mark.parametrize("rule", check_equivalency.SETTINGS)
    def test_the_check_takes_it(self, rule, signs):
        csla, target = (check_equivalency.create("Wide-tiny", mode).double() for mode in ("csla", "target"))
        images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
        assert largest_difference(csla, target, rule, SIGNS[signs], images, steps=5) < BOUND

    def test_the_tests_of_families_take_it(self, monkeypatch):
        monkeypatch.setitem(test_families.SIZES, "Wide-tiny", 16)
        for mode in MODES:
            test_families.test_deployed_network_is_the_same_function("Wide-tiny", mode)
            test_families.test_activation_checkpointing_changes_nothing("Wide-tiny", mode)
        test_families.test_csla_and_target_start_as_the_same_function("Wide-tiny", "searched")


class TestAddingAnUpdateRule:
    @pytest.fixture(scope="class", autouse=True)
    def documented(self):
        with pytest.MonkeyPatch.context() as patch:
            for name in RULES.keys() | {"adagrad"}:
                patch.setitem(RULES, name, RULES.get(name))
            row = re.search(r'"adagrad": (\(.*\)),\n', (DOCS / "adding_an_update_rule.md").read_text())
            patch.setitem(check_equivalency.SETTINGS, "adagrad", ast.literal_eval(row[1]))
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                namespace = run("adding_an_update_rule")
            yield namespace | {"printed": printed.getvalue().splitlines()}

    def test_what_is_refused(self, documented):
        promised = re.search(r"```text\n(.*)\n```", (DOCS / "adding_an_update_rule.md").read_text())[1]
        assert documented["printed"][0] == promised

    def test_it_follows_the_csla_network(self, documented):
        assert documented["moved"] > 0.1
        assert documented["apart"] < BOUND * documented["moved"]

    @pytest.mark.parametrize("signs", SIGNS)
    @pytest.mark.parametrize("block", check_equivalency.BLOCKS)
    def test_the_rows_are_enough(self, block, signs):
        setup = check_equivalency.BLOCKS[block]
        csla, target = (check_equivalency.one_block(setup, mode).double() for mode in ("csla", "target"))
        images = torch.randn(setup.input_shape(), dtype=torch.float64)
        assert largest_difference(csla, target, "adagrad", SIGNS[signs], images, steps=20) < BOUND

    @pytest.mark.parametrize("settings", [{"lr": 0.1}, {"lr": 0.1, "lr_decay": 0.1, "eps": 1e-3}])
    @pytest.mark.parametrize("implementation", ["eager", "compiled"])
    def test_it_is_torchs_own_and_takes_its_state(self, documented, settings, implementation):
        a, b = (test_optim.network() for _ in range(2))
        rep = functools.partial(documented["RepAdagrad"], grad_mults={}, implementation=implementation, **settings)
        first = rep(a.named_parameters())
        plain = torch.optim.Adagrad(b.named_parameters(), **settings)
        test_optim.steps(a, first, 3)
        test_optim.steps(b, plain, 3)
        test_optim.assert_same(a, b)
        second = rep(a.named_parameters())
        second.load_state_dict(copy.deepcopy(plain.state_dict()))
        test_optim.steps(a, second, 3)
        test_optim.steps(b, plain, 3)
        test_optim.assert_same(a, b)


class TestTrainingLoop:
    @pytest.fixture(scope="class", autouse=True)
    def documented(self):
        return run("training_loop")

    def test_it_learns(self, documented):
        assert documented["found"] > 0.9
        assert documented["accuracy"] > 0.9

    def test_one_run_does_too(self, documented):
        assert type(documented["optimizer"]).__name__ == "RepSGD"
        images, labels, test = (documented[name] for name in ("images", "labels", "test"))
        with torch.no_grad():
            assert (documented["model"].eval()(images[test]).argmax(1) == labels[test]).float().mean() > 0.9


def test_finetuning(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    found = run("finetuning")
    assert found["scores"].shape == (1, 10)
    assert found["task"] == "classify"
    assert "does not say how its images are made" in caplog.text
