"""What report.py makes of runs and tables: a page that stands by itself, and one line about what it cannot read."""

import base64
import itertools
import json
from html.parser import HTMLParser

import pytest
import report
import torch
from PIL import Image
from runs import epochs_of, steps_of

import repopt
from repopt import checkpoint
from train import config

NANO = "RepOpt-VGG-nano"
VOID = {"meta", "img", "br", "link", "input"}
SCRIPT = "<script>alert('$x$')</script>"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 90 40" {}</svg>'


class Page(HTMLParser):
    """A parsed page: its elements with their attributes and text, which are nested as they should be."""

    def __init__(self, text):
        super().__init__()
        self.source, self.open, self.elements, self.words = text, [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        element = {"": tag, **dict(attributes), "text": ""}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.remove(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[""] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element[""] == tag]

    @property
    def text(self):
        return self.all("body")[0]["text"]

    def rows(self, *names):
        """Cells of the one row of a table that has these heads."""
        (row,) = (cells for tr in self.all("tr") if (cells := cells_of(tr["text"]))[: len(names)] == list(names))
        return row[len(names) :]


def cells_of(text):
    return [cell.strip() for cell in text.strip().split("\n")]


# --- what the page is made of


def metrics(accuracies, **extra):
    """Lines of metrics.jsonl: two steps per epoch, and an evaluation after every one."""
    for epoch, top1 in enumerate(accuracies, start=1):
        for step in (2 * epoch - 1, 2 * epoch):
            yield {"step": step, "train": {"loss": 2 / step, "learning_rate": 0.1, "images_per_second": 1e3}}
        yield {"step": 2 * epoch, "epoch": epoch, "train_seconds": 40.0, "val": {"top1": top1, "top5": 99.0}, **extra}


def make_run(folder, arch, records, settings=()):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cfg = config.as_dict(config.build({"MODEL.ARCH": arch, "TRAIN.EPOCHS": 3, **dict(settings)}).cfg)
    (folder / "config.json").write_text(json.dumps(cfg))
    (folder / "log_rank0.txt").write_text(
        f"2026-01-02 03:04:05 main_repopt.py --arch {arch} --opts SEED 0\n"
        "2026-01-02 03:04:05 torch 9.8.7, 1 process(es), cpu\n"
        f"2026-01-02 03:04:06 {arch}: 0.88 M parameters, 300 training and 1497 test images\n"
        "2026-01-02 03:04:07 epoch 1/3 batch 4/4 loss 2.35\n"
    )
    return folder


def save(folder, mode):
    network = repopt.create_model(NANO, mode=mode, num_classes=10)
    content = {"model": network.state_dict(), "config": {"MODEL": {"ARCH": f"{NANO}-{mode}"}}}
    checkpoint.write(content, folder / "latest.pth")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders by name: a search, two seeds of a plain network, a baseline, and a quantization."""
    root = tmp_path_factory.mktemp("runs")
    model = repopt.create_model(NANO, mode="hs", num_classes=10)
    scales = repopt.extract_scales(model)
    means = {name: float(values.mean()) for name, values in scales.items()}
    search = make_run(root / f"{NANO}-hs" / "seed0", f"{NANO}-hs", metrics([20.0, 60.0, 70.0], scales=means))
    repopt.save_scales(scales, search / "scales.pth")
    target, second, baseline = (
        make_run(root / f"{NANO}-{mode}" / seed, f"{NANO}-{mode}", metrics(accuracies), {"SEED": int(seed[-1])})
        for mode, seed, accuracies in [
            ("target", "seed0", [31.0, 92.5, 91.25]),
            ("target", "seed1", [30.0, 80.0, 90.0]),
            ("repvgg", "seed0", [40.0, 50.0, 60.0]),
        ]
    )
    save(target, "target")
    save(baseline, "repvgg")
    quantized = root / "int8" / f"{NANO}-target" / "ptq"
    (quantized / "artifacts").mkdir(parents=True)
    rows = {
        name: {"top1": top1, "top5": 99.5, "loss": 0.25, "images": 1497}
        for name, top1 in (("fp32", 95.5), ("INT8", 94))
    }
    (quantized / "artifacts" / "results.json").write_text(json.dumps(rows))
    (quantized / "artifacts" / "signal_to_noise.json").write_text(
        json.dumps({"stage0.conv": 41.5, "stage1.0.conv": None, "linear": 12.25})
    )
    return {"search": search, "target": target, "second": second, "baseline": baseline, "quantized": quantized}


def cell(quantity, paper, mean, std, values, difference):
    numbers = {"mean": mean, "std": std, "values": values, "difference": difference}
    return {"quantity": quantity, "paper": paper, **numbers}


def table_of(runs, /, **changes):
    """The JSON of a table."""
    return {
        "name": "table 4",
        "title": "Ablation",
        "scale": "demo",
        "notes": ["Three seeds share one search."],
        "labels": ["optimizer", "constants"],
        "rows": [
            {
                "labels": ["RepOptimizer", "Hyper-Search"],
                "cells": [
                    cell("top1", "78.47±0.03", 95.204, 0.1049, [95.1, 95.2, 95.312], 16.734),
                    cell("std", "0.0089", 0.0123, None, [0.0123], 0.0034),
                ],
            },
            {
                "labels": ["SGD", None],
                "cells": [cell("top1", None, 51.95, 13, [], None), cell("std", "0.01", None, None, [], None)],
            },
            {
                "labels": ["Adam", "none"],
                "cells": [
                    cell("top1", "96", 51.951, None, [52, 51.9], -44.049),
                    cell("std", 1, "yes", None, ["yes"], 0),
                ],
            },
        ],
        "orderings": ["top1: 40 of 55 pairs are ordered as in the paper"],
        "pictures": [],
        "runs": {
            "search": [str(runs["search"])],
            "plain": [str(runs["target"]), str(runs["second"])],
            "RepVGG": [str(runs["baseline"])],
            "gone": ["not/there"],
        },
        "commands": ["python main_repopt.py --cfg a.yaml", "python main_repopt.py --cfg b.yaml"],
        "environment": {"machine": "a computer", "torch": "9.8.7"},
        **changes,
    }


def page_of(folder, *sources):
    out = folder / "page.html"
    assert report.main([*map(str, sources), "--out", str(out)]) == 0
    return Page(out.read_text())


def write(file, content):
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    """Of a table, and of every kind of run."""
    folder = tmp_path_factory.mktemp("page")
    Image.new("RGB", (30, 20), "red").save(folder / "figure.png")
    (folder / "own.svg").write_text(SVG.format('><path d="M0 0" style="fill: #123456"/>'))
    (folder / "figure.svg").write_text(
        SVG.format(
            'onload="alert(1)"><script>alert(1)</script><foreignObject><p>x</p></foreignObject><style>p {}</style>'
            '<defs><clipPath id="a"><rect x="1.23456789" y="0" width="9" height="9"/></clipPath></defs>'
            '<g id="b" clip-path="url(#a)" style="stroke: #1f77b4; fill: currentColor" onclick="alert(1)">'
            '<path d="M 0 1.23456 L 2 3"/><text style="fill: url(http://x)">1 &lt; <tspan>2</tspan> &amp; 3</text></g>'
            '<use xlink:href="#b"/><use xlink:href="http://x/y.svg#z"/><image href="http://x/y.png"/>'
        )
    )
    pictures = [{"title": f"Figure {file}", "file": file} for file in ("figure.png", "figure.svg", "own.svg")]
    table = write(folder / "table4.json", table_of(runs, pictures=pictures))
    sources = [table, *(runs[name] for name in ("search", "target", "quantized"))]
    return page_of(folder, *sources)


# --- the page


def test_the_page_stands_by_itself(page):
    assert page.source.startswith("<!DOCTYPE html>")
    assert page.all("html")[0]["lang"] == "en"
    assert not page.all("script") + page.all("link") + page.all("iframe") + page.all("object")
    for element in page.elements:
        for name, value in element.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith(("#", "data:image/"))
    assert "http" not in page.source.replace("http-equiv", "")
    assert "url(" not in page.source.replace("url(#", "")
    assert "#010203" not in page.source  # pictures have the page's colours
    assert len(page.source) < 1e6


def test_ids_are_of_one_and_links_lead_to_them(page):
    ids = [element["id"] for element in page.elements if "id" in element]
    assert len(set(ids)) == len(ids)
    links = [element["href"] for element in page.elements if "href" in element]
    assert len(links) > 50
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    used = {
        value.split("url(#")[1].split(")")[0] for e in page.elements for value in e.values() if "url(#" in (value or "")
    }
    assert used <= set(ids)


def test_the_page_is_for_everyone(page):
    levels = [int(element[""][1]) for element in page.elements if element[""] in {"h1", "h2", "h3", "h4"}]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(element["scope"] in ("col", "row", "colgroup") for element in page.all("th"))
    assert all(element["alt"] for element in page.all("img"))
    assert all(element["role"] == "img" and element["aria-label"] for element in page.all("svg"))
    contents = page.all("nav")[0]["text"]
    assert all(element["text"] in contents for element in page.all("h2") + page.all("h3"))


def test_the_table_beside_the_paper(page):
    heads = [head["text"] for head in page.all("th") if head["scope"] != "row"][:10]
    assert heads == ["optimizer", "constants", "top1", "std", *["paper", "this run", "difference"] * 2]
    assert page.rows("RepOptimizer", "Hyper-Search") == [
        *("78.47±0.03", "95.20 ± 0.1095.10 · 95.20 · 95.31", "+16.73"),
        *("0.0089", "0.0123", "+0.0034"),
    ]
    assert page.rows("SGD", "–") == ["–", "51.95 ± 13.00", "–", "0.01", "–", "–"]
    assert page.rows("Adam", "none") == ["96", "51.9552.00 · 51.90", "−44.05", "1", "yes", "0.0000"]


def test_all_else_that_a_table_says(page):
    assert "table 4: Ablation (demo)" in page.text
    for text in ("Three seeds share one search.", "top1: 40 of 55 pairs are ordered as in the paper", "not/there"):
        assert text in [item["text"] for item in page.all("li")]
    assert page.all("pre")[0]["text"] == "python main_repopt.py --cfg a.yaml\npython main_repopt.py --cfg b.yaml"
    assert page.rows("machine") == ["a computer"]


def test_the_runs_in_numbers(page, runs):
    assert page.rows("plain", str(runs["target"])) == ["91.25 %", "92.50 % (epoch 2)", "3 of 3", "0:02:00"]
    facts = dict(zip((e["text"] for e in page.all("dt")), (e["text"] for e in page.all("dd")), strict=True))
    assert facts["final top-1"] == "91.25 %"  # of the run that comes last
    assert facts["parameters"] == "0.88 M"
    assert facts["test images"] == "1497"
    assert [item["text"] for item in page.all("li")].count("torch 9.8.7, 1 process(es), cpu") == 2
    assert f"main_repopt.py --arch {NANO}-hs --opts SEED 0" in [pre["text"] for pre in page.all("pre")]


def test_charts_say_what_they_show(page):
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert "top-1 by epoch; at the end: search 70.0 %, plain 90.6 %, RepVGG 60.0 %." in labels
    assert "top-1 by epoch: 31.0 % in epoch 1, 91.2 % in 3." in labels
    assert "Curves by step; at the end: training loss 0.333, learning rate 0.1." in labels
    assert sum(label.startswith("Searched scales by depth") for label in labels) == 2
    assert sum(label.startswith("Change of the mean scale by epoch") for label in labels) == 2
    assert any("stage3.7" in label and "plain, RepVGG" in label for label in labels)
    text = " ".join(svg["text"] for svg in page.all("svg"))
    for words in ("scale_identity", "training loss", "learning rate", "before BN fusion", "signal to noise (dB)"):
        assert words in text


def test_kernels_in_numbers(page, runs):
    weights = checkpoint.read(runs["target"] / "latest.pth")["model"]["stage3.7.conv.weight"].double()
    rows = [cells_of(tr["text"]) for tr in page.all("tr")]
    raw = next(row for row in rows if row[:2] == ["plain", "raw"])
    assert float(raw[2]) == pytest.approx(float(weights.std(correction=0)), rel=5e-3)
    assert [row[1] for row in rows if row[0] == "RepVGG"][-3:] == [
        "before BN fusion",
        "after BN fusion",
        "after branch addition",
    ]


def test_quantization(page):
    assert page.rows(f"{NANO}-target", "fp32") == ["95.50", "99.50", "0.2500", "1497"]
    assert page.rows(f"{NANO}-target", "INT8") == ["94.00", "99.50", "0.2500", "1497"]
    assert f"the most noise: {NANO}-target: linear (12.2 dB)" in page.text


def test_what_is_configured_differently_comes_first(page, runs):
    changed = {
        row[0]: row[1:] for tr in page.all("tr") if (row := cells_of(tr["text"]))[0] in config.KEYS and len(row) == 6
    }
    assert changed.keys() == {"MODEL.ARCH", "TRAIN.EPOCHS"}
    assert changed["TRAIN.EPOCHS"] == ["300", "3", "3", "3", "epochs in all"]
    rest = [details["text"] for details in page.all("details") if "keys that have their defaults" in details["text"]]
    assert len(rest) == 3
    assert all("TRAIN.BASE_LR\n0.0005\nlearning rate" in text for text in rest)


def test_pictures(page):
    sources = [image["src"] for image in page.all("img")]
    assert [source.split(",")[0] for source in sources] == ["data:image/png;base64", "data:image/svg+xml;base64"]
    assert base64.b64decode(sources[1].split(",")[1]).decode().endswith("</svg>")
    (inline,) = (svg for svg in page.all("svg") if svg["aria-label"] == "Figure figure.svg")
    assert inline["text"] == "1 < 2 & 3"
    at = page.elements.index(inline)
    inside = page.elements[at + 1 : at + 11]
    assert [element[""] for element in inside] == [
        "defs",
        "clippath",
        "rect",
        "g",
        "path",
        "text",
        "tspan",
        *("use",) * 2,
        "image",
    ]
    prefix = inside[1]["id"].removesuffix("a")
    assert inside[2]["x"] == "1.23"
    assert inside[3] | {"text": ""} == {
        "": "g",
        "id": f"{prefix}b",
        "clip-path": f"url(#{prefix}a)",
        "text": "",
        "style": "stroke: var(--c0); fill: currentColor",
    }
    assert "style" not in inside[5]
    assert [element.get("href") for element in inside[7:]] == [f"#{prefix}b", None, None]


def test_what_is_hostile_is_text(runs, tmp_path):
    bad = f"{SCRIPT}\x00\ud800\"'&"
    folder = make_run(tmp_path / "a", SCRIPT, metrics([50.0], scales={f"{SCRIPT}.{SCRIPT}.weight": 1.0}))
    (folder / "log_rank0.txt").write_text(f"2026-01-02 03:04:05 main_repopt.py {SCRIPT}\n")
    content = table_of(
        runs,
        **dict.fromkeys(("name", "title", "scale"), bad),
        **{key: [bad] for key in ("notes", "orderings", "commands")},
        labels=[bad],
        rows=[{"labels": [bad], "cells": [cell(bad, bad, bad, None, [bad, bad], None)]}],
        runs={bad: [str(folder), bad]},
        environment={bad: bad},
    )
    page = page_of(tmp_path, write(tmp_path / "table.json", content), folder)
    assert not page.all("script")
    assert page.text.count(SCRIPT) > 15
    assert SCRIPT in page.all("title")[0]["text"]
    assert any(SCRIPT in svg["text"] for svg in page.all("svg"))


def test_a_table_of_nothing(tmp_path):
    empty = {key: [] for key in ("notes", "labels", "rows", "orderings", "pictures", "commands")}
    content = {"name": "figure 6", "title": "Scales", "scale": "full", **empty, "runs": {}, "environment": {}}
    page = page_of(tmp_path, write(tmp_path / "table.json", content))
    assert [head["text"] for head in page.all("h2")] == ["figure 6: Scales (full)"]
    assert not page.all("h3") + page.all("svg") + page.all("table")


def test_what_cannot_be_shown_is_said(runs, tmp_path):
    folder = make_run(tmp_path / "run", f"{NANO}-hs", metrics([10.0]))
    for name in ("latest.pth", "scales.pth"):
        (folder / name).write_bytes(b"no checkpoint")
    page = page_of(tmp_path, folder)
    said = [item["text"] for item in page.all("li") if str(folder / "scales.pth") in item["text"]]
    assert len(said) == 1
    assert any(str(folder / "latest.pth") in item["text"] for item in page.all("li"))
    assert page.all("svg")  # the rest


def test_a_run_that_has_just_begun(tmp_path):
    folder = make_run(tmp_path / "run", f"{NANO}-target", [{"step": 1, "train": {"loss": None, "learning_rate": 0.5}}])
    labels = [svg["aria-label"] for svg in page_of(tmp_path, folder).all("svg")]
    assert labels == ["Curves by step; at the end: training loss –, learning rate 0.5."]


# --- records of a run


def test_records_of_a_run(tmp_path):
    records = [*metrics([10.0, 20.0]), *[*metrics([11.0, 21.0, 30.0])][3:]]  # the second epoch twice
    folder = make_run(tmp_path / "run", NANO, records)
    assert epochs_of(tmp_path) == steps_of(tmp_path) == []
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "epoch": 4, "val": {"to')
    assert [(record["epoch"], record["val"]["top1"]) for record in epochs_of(folder)] == [
        (1, 10.0),
        (2, 21.0),
        (3, 30.0),
    ]
    assert [record["step"] for record in steps_of(folder)] == [1, 2, 3, 4, 5, 6]


def test_long_curves_are_thinned():
    curve = {step: None if step == 3 else float(step) for step in range(1, 1201)}
    points = report.thinned(curve)
    assert len(points) == 400
    assert (points[3], points[6], points[1200]) == (1.5, 5.0, 1199.0)
    assert report.thinned({1: None, 2: 3.0}) == {1: None, 2: 3.0}
    assert report.thinned({}) == {}


# --- mistakes


def edited(**changes):
    return lambda runs: table_of(runs, **changes)


MISTAKES = {
    "nothing": ("none", None, r"there is no file or folder '{out}none'"),
    "no run": (".", None, "is no folder of a run: it has neither metrics.jsonl nor config.json nor"),
    "no JSON": ("a.json", '{"name": ', "a.json' is no JSON: Expecting value"),
    "no text": ("a.json", b"\xff\xfe\x00", "a.json' is no JSON: 'utf-8' codec"),
    "a list": ("a.json", "[]", r"a.json' is \[\], not values by name"),
    "too deep": ("a.json", "[" * 100_000, "a.json' is no JSON"),
    "another JSON": ("a.json", "{}", "a.json' has no 'name'"),
    "a number for text": ("a.json", edited(title=3), r"a.json'\['title'\] is 3, not text"),
    "text for a number": (
        "a.json",
        edited(rows=[{"labels": ["a", "b"], "cells": [cell("q", "1", 1, "x\ny", [], None)]}]),
        r"a.json'\['rows'\]\[0\]\['cells'\]\[0\]\['std'\] is 'x\\ny', not a number or null",
    ),
    "True for a number": (
        "a.json",
        edited(rows=[{"labels": ["a", "b"], "cells": [cell("q", "1", True, None, [], None)]}]),
        "is True, not text or a number or null",
    ),
    "another row": (
        "a.json",
        edited(rows=[{"labels": ["a"], "cells": []}]),
        r"rows\[0\] of '.*a.json' has other labels or quantities than the table",
    ),
    "no picture": (
        "a.json",
        edited(pictures=[{"title": "x", "file": "none.png"}]),
        "there is no picture '.*none.png'",
    ),
    "a picture of another kind": (
        "a.json",
        edited(pictures=[{"title": "x", "file": "a.json"}]),
        "a.json' is no picture: it is neither an SVG nor a PNG",
    ),
    "broken SVG": ("b.svg", "<svg", "b.svg' is no SVG"),
    "SVG without a size": ("b.svg", "<svg/>", "b.svg' is no SVG with a viewBox"),
    "deep SVG": ("b.svg", SVG.format('fill="currentColor">' + "<g>" * 3000 + "</g>" * 3000), "nested too deeply"),
    "broken records": ("run/metrics.jsonl", '{"step": 1}\n{"step": \n', "line 2 of '.*metrics.jsonl' is no record"),
    "records of another kind": ("run/metrics.jsonl", "[1]\n", "line 1 of '.*metrics.jsonl' is no record"),
    "broken configuration": ("run/config.json", "[]", "config.json' is .*, not values by name"),
    "broken results": ("run/artifacts/results.json", '{"fp32": 3}', "is 3, not values by name"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(name, runs, tmp_path, in_one_line):
    file, content, message = MISTAKES[name]
    path = tmp_path / file
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(content(runs)) if callable(content) else content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if path.suffix == ".svg":
        pictures = [{"title": "x", "file": path.name}]
        path = write(tmp_path / "a.json", table_of(runs, pictures=pictures, runs={}))
    elif file.startswith("run/"):
        path = tmp_path / "run"
    out = tmp_path / "page.html"
    assert report.main([str(path), "--out", str(out)]) == 2
    in_one_line("report.py", message, {"out": f"{tmp_path}/"})
    assert not out.exists()


def test_a_folder_is_no_page(runs, tmp_path, in_one_line):
    assert report.main([str(runs["quantized"]), "--out", str(tmp_path)]) == 2
    in_one_line("report.py", "Is a directory", {})


def test_what_is_printed(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report.main([str(runs["second"])]) == 0
    size = (tmp_path / "output" / "report.html").stat().st_size
    assert capsys.readouterr().out == f"output/report.html ({size / 1e6:.2f} MB)\n"


def test_no_checkpoint_is_unpickled(runs, tmp_path):
    """A file that would run code when it is unpickled is refused."""
    folder = make_run(tmp_path / "run", f"{NANO}-target", metrics([10.0]))
    ran = tmp_path / "ran"
    torch.save({"model": _Runs(ran)}, folder / "latest.pth")
    assert "Not shown" in page_of(tmp_path, folder).text
    assert not ran.exists()


class _Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()
