"""What inspect_scales.py prints and draws of files, and what it says to mistakes."""

import inspect_scales
import pytest
import torch
from PIL import Image

import repopt
from repopt import checkpoint

NANO = "RepOpt-VGG-nano"


def searched(model=NANO):
    return {
        name: torch.randn_like(values)
        for name, values in repopt.extract_scales(repopt.create_model(model, mode="hs")).items()
    }


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the script on scales or a whole checkpoint; its tables, as lists of cells, and its picture."""

    def run(content, *arguments):
        checkpoint.write(content, tmp_path / "found.pth")
        assert inspect_scales.main([str(tmp_path / "found.pth"), "--out", str(tmp_path / "out"), *arguments]) == 0
        title, *lines = capsys.readouterr().out.splitlines()
        return title, [line.split() for line in lines], tmp_path / "out" / "found.png"

    return run


def row_of(lines, *names):
    """The numbers after these cells, in the first line that begins with them."""
    return next(line[len(names) :] for line in lines if line[: len(names)] == list(names))


def test_the_scales_in_numbers(run):
    scales = searched()
    title, lines, _ = run(scales)
    assert title == f"found.pth: {NANO}"
    for name, values in scales.items():
        path, branch, _ = name.rsplit(".", 2)
        channels, *numbers, negative = row_of(lines, path, branch)[:6]
        expected = values.mean(), values.var(correction=0).sqrt(), values.min(), values.max()
        assert numbers == [f"{number:.4f}" for number in expected], name
        assert (int(channels), int(negative)) == (len(values), int((values < 0).sum()))
    assert int(row_of(lines, "all")[3]) == sum(int((values < 0).sum()) for values in scales.values()) > 0


def moved_from(start, factor):
    """The scales of a search that began at `start`: each moved by up to a part of it, identities by more."""
    return {name: s * (1 + (5.0 if "identity" in name else factor) * torch.rand_like(s)) for name, s in start.items()}


@pytest.mark.parametrize("initial_scales", ["depth", "one"])
def test_how_far_the_scales_moved_from_where_they_began(run, initial_scales):
    model = repopt.create_model(NANO, mode="hs", initial_scales=initial_scales)
    start = repopt.extract_scales(model)
    scales = moved_from(start, 0.3)
    settings = {"MODEL": {"ARCH": f"{NANO}-target", "INITIAL_SCALES": initial_scales}}
    title, lines, _ = run({"model": model.state_dict(), "scales": scales, "config": settings})
    assert title == f"found.pth: {NANO}"
    ways = {}
    for name, values in start.items():
        path, branch, _ = name.rsplit(".", 2)
        began, *way = row_of(lines, path, branch)[6:]
        if "identity" in branch:
            assert [began, *way] == ["-"] * 3
            continue
        difference = (scales[name] - values).double()
        ways[name] = float(difference.norm()), float(values.double().norm())
        assert began == f"{values[0]:.4f}"
        assert way == [f"{ways[name][0] / ways[name][1]:.2%}", f"{(difference / values).abs().max():.2%}"]
    moved, began = (sum(number**2 for number in numbers) ** 0.5 for numbers in zip(*ways.values(), strict=True))
    assert row_of(lines, "all")[4] == f"{moved / began:.2%}"
    (summary,) = (" ".join(line) for line in lines if line[:3] == ["The", "search", "moved"])
    assert summary.startswith(f"The search moved the scales by {moved / began:.2%} of their start; one that moves them")


def test_of_a_scale_file_it_is_said_where_it_is_taken_to_have_begun(run):
    lines = run(moved_from(repopt.extract_scales(repopt.create_model(NANO, mode="hs")), 0.009))[1]
    (summary,) = (" ".join(line) for line in lines if line[:3] == ["The", "search", "moved"])
    assert "by 0.5" in summary
    assert "of their start (if MODEL.INITIAL_SCALES was depth, which the file does not say)" in summary
    assert "less than 1% has found nothing: TRAIN.CONSTANTS initial gives the same without a search" in summary


@pytest.mark.parametrize("model", ["timm/repghostnet_050", "timm/test_resnet"])
def test_scales_of_another_librarys_network(run, model):
    """A file has --arch; a checkpoint says of which network it is, and with which branches a plain one trained."""
    plain = repopt.create_model(model, mode="plain")
    if model == "timm/test_resnet":
        repopt.declare(plain, "acnet")
        scales = repopt.extract_scales(plain, repopt.hold_branches(plain))
    else:
        scales = repopt.extract_scales(repopt.convert_model(plain, "hs"))
        title, lines, _ = run(scales, "--arch", model)
        assert title == f"found.pth: {model}"
        assert row_of(lines, "blocks.1.0.ghost1", "cheap_operation.1")[6:] == ["1.0000", "0.00%", "0.00%"]
    settings = {"MODEL": {"ARCH": f"{model}-target", "PRIOR": "acnet"}}
    title, lines, _ = run({"model": plain.state_dict(), "scales": scales, "config": settings})
    assert title == f"found.pth: {model}"
    assert any(" ".join(line).startswith("The search moved the scales by 0.00% of their start;") for line in lines)


@pytest.mark.parametrize(("rule", "power"), [("SGD", 2), ("AdamW", 1)])
def test_the_grad_mults_in_numbers(run, rule, power):
    scales = searched()
    lines = run(scales)[1]
    start = next(i for i, line in enumerate(lines) if line[:4] == ["Grad", "Mults", "under", f"{rule}:"])
    s3, s1 = (scales[f"stage2.1.{branch}.weight"].abs() ** power for branch in ("scale_conv", "scale_1x1"))
    low, at_low, median, high, at_high = row_of(lines[start:], "stage2.1.conv.weight")
    assert low == f"{s3.min():#.3g}"
    assert at_low == f"{s3.argmin()},0,0,0"
    whole = torch.cat([s3.repeat(32 * 8), (s3 + s1).repeat(31), s3 + s1 + 1])
    assert median == f"{whole.median():#.3g}"
    highest = int((s3 + s1).argmax())
    assert high == f"{(s3 + s1)[highest] + 1:#.3g}"
    assert at_high == f"{highest},{highest},1,1"


def test_a_picture_with_a_panel_for_scales_and_one_per_rule(run, tmp_path):
    from plots import plot_scales

    _, _, picture = run(searched())
    plot_scales(repopt.create_model(NANO, mode="hs"), searched(), tmp_path / "scales.png")
    with Image.open(picture) as whole, Image.open(tmp_path / "scales.png") as scales:
        assert whole.width == scales.width
        assert whole.height > 1.5 * scales.height
        assert len(whole.convert("L").getcolors()) > 20


@pytest.mark.filterwarnings("error")  # matplotlib's, of a range that no log scale has
def test_scales_of_zero_are_drawn(run):
    scales = {name: torch.zeros_like(values) for name, values in searched().items()}
    assert run(scales)[2].is_file()


@pytest.mark.parametrize("name", ["RepOpt-GhostNet-0.5x", "RepOpt-VGG-A0"])
def test_the_model_is_found(run, name):
    assert run(searched(name))[0] == f"found.pth: {name}"


def test_a_checkpoint_of_a_search(run):
    state = repopt.create_model(NANO, mode="hs", num_classes=10).state_dict()
    title, lines, _ = run({"model": state, "epoch": 3})
    assert title == f"found.pth: {NANO}"
    assert row_of(lines, "stage1.0", "scale_conv")[1] == "1.0000"


def test_models_of_the_same_scales():
    """A scale file does not tell them apart, what else is in a checkpoint does."""
    with torch.device("meta"):
        state = {
            name: repopt.create_model(name, mode="hs").state_dict() for name in ("RepOpt-VGG-L2", "RepOpt-VGG-L2-se")
        }
    vectors = {
        name: {key: torch.ones(value.shape) for key, value in values.items() if value.dim() == 1}
        for name, values in state.items()
    }
    for name, values in vectors.items():
        assert inspect_scales.fitting_models(values)[0] == name
    scales = {key: value for key, value in vectors["RepOpt-VGG-L2"].items() if "scale_" in key}
    assert inspect_scales.fitting_models(scales) == list(state)


def test_released_scales(shared):
    names = {}
    for path in (shared / "released_scales").glob("*.pth"):
        names[path.name.removesuffix(".pth")] = inspect_scales.fitting_models(repopt.load_scales(path))[0]
    assert names == {f"RepOpt-VGG-{name}-scales": f"RepOpt-VGG-{name}" for name in ("B1", "B2", "L1", "L2")} | {
        "RepOptGhostNet_0_5x_scales": "RepOpt-GhostNet-0.5x"
    }


def test_mistakes_are_one_line(tmp_path, capsys):
    scales, file = searched(), tmp_path / "found.pth"
    checkpoint.write(scales, file)
    checkpoint.write({"head.bias": torch.zeros(3)}, tmp_path / "other.pth")
    for name, settings in {"begun": {"ARCH": f"{NANO}-hs", "INITIAL_SCALES": "two"}, "odd": {"ARCH": [3]}}.items():
        content = {"model": {}, "scales": scales, "config": {"MODEL": settings}}
        checkpoint.write(content, tmp_path / f"{name}.pth")
    for arguments, message in [
        ([tmp_path / "none.pth"], "there is no file"),
        ([tmp_path / "other.pth"], "fit no model of ours; --arch"),
        ([tmp_path / "begun.pth"], "unknown value of MODEL.INITIAL_SCALES 'two' (allowed: depth, one)"),
        ([tmp_path / "odd.pth"], "unknown architecture"),
        ([file, "--arch", "timm/resnet81"], "unknown architecture 'timm/resnet81'; did you mean 'timm/resnet"),
        ([file, "--arch", "RepOpt-VGG-B1"], "the scales do not fit the model: block 'stage0' expects"),
        ([file, "--arch", "RepOpt-VGG-nan"], "did you mean 'RepOpt-VGG-nano'"),
        ([file, "--out", file], "File exists"),
    ]:
        assert inspect_scales.main(list(map(str, arguments))) == 2
        output = capsys.readouterr()
        assert output.err.startswith("inspect_scales.py: ")
        assert message in output.err
        assert output.err.count("\n") == 1
