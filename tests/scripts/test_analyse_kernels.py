"""What analyse_kernels.py measures of a kernel, in which forms, what it writes, and what it says to mistakes."""

import json
import math
import statistics

import analyse_kernels
import pytest
import torch
from analyse_kernels import forms_of, papers_layer
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import repopt
from repopt import checkpoint

NANO, GHOST, LK = "RepOpt-VGG-nano", "RepOpt-GhostNet-0.5x", "RepOpt-LK-nano"
PLAIN = ["raw", "batch norm folded"]
BASELINE = ["before BN fusion", "after BN fusion", "after branch addition"]
NUMBERS = [
    *("std", "central", "surrounding", "kurtosis", "max/std", "centre/surround"),
    *("SNR (dB)", "SNR by channel (dB)"),
]


# --- numbers of one kernel


def test_spread_by_hand():
    signs = torch.tensor([1.0, -1, 1, -1, 0, 1, -1, 1, -1]).view(3, 3)
    kernel = torch.stack([signs, 3 * signs]).unsqueeze(1)  # sums: 0, of squares 8 * 1 + 8 * 9
    kernel[:, 0, 1, 1] = torch.tensor([2.0, 4.0])
    found = analyse_kernels.statistics(kernel)
    assert found["std"] == pytest.approx(7 / 3, rel=1e-12)  # 18 weights, their sum 6, that of their squares 100
    assert found["central"] == pytest.approx(1, rel=1e-12)
    assert found["surrounding"] == pytest.approx(math.sqrt(5), rel=1e-12)
    assert found["max/std"] == pytest.approx(12 / 7, rel=1e-12)
    assert found["centre/surround"] == pytest.approx(1 / math.sqrt(5), rel=1e-12)


def test_kurtosis_of_known_distributions():
    coin = torch.ones(8, 1, 3, 3)
    coin[:4] = -1
    assert analyse_kernels.statistics(coin)["kurtosis"] == pytest.approx(-2, rel=1e-12)
    spike = torch.zeros(4, 5, 3, 3)
    spike[2, 1, 0, 2] = 0.3
    p, q = 1 / 180, 179 / 180
    assert analyse_kernels.statistics(spike)["kurtosis"] == pytest.approx((1 - 6 * p * q) / (p * q), rel=1e-12)
    normal = torch.randn(200, 100, 3, 3)
    assert abs(analyse_kernels.statistics(normal)["kurtosis"]) < 0.05


def test_float64():
    """Of numbers that float32 cannot tell from their mean in a sum of squares."""
    kernel = 100 + 1e-3 * torch.randn(3, 2, 5, 5)
    values = kernel.double().flatten().tolist()
    assert analyse_kernels.statistics(kernel)["std"] == pytest.approx(statistics.pstdev(values), rel=1e-9)


def test_signal_to_noise_by_hand():
    kernel = torch.zeros(2, 1, 3, 3)
    kernel[0, 0, 0, :2] = torch.tensor([127, 10.25])  # steps of 1: 0.25 is lost
    kernel[1, 0, 2, :2] = torch.tensor([-63.5, 0.5])  # half a step of the kernel twice, whole steps of the channel
    power = 127**2 + 10.25**2 + 63.5**2 + 0.5**2
    found = analyse_kernels.statistics(kernel)
    assert found["SNR (dB)"] == pytest.approx(10 * math.log10(power / (0.25**2 + 2 * 0.5**2)), rel=1e-12)
    assert found["SNR by channel (dB)"] == pytest.approx(10 * math.log10(power / 0.25**2), rel=1e-12)


def test_signal_to_noise_against_torch():
    kernel = torch.randn(6, 4, 3, 3) * torch.logspace(-2, 0, 6).view(-1, 1, 1, 1)
    scales = kernel.abs().amax((1, 2, 3)) / 127
    tensor = torch.fake_quantize_per_tensor_affine(kernel, float(scales.max()), 0, -127, 127)
    channel = torch.fake_quantize_per_channel_affine(kernel, scales, torch.zeros(6, dtype=torch.int32), 0, -127, 127)
    found = analyse_kernels.statistics(kernel)
    for name, rounded in (("SNR (dB)", tensor), ("SNR by channel (dB)", channel)):
        expected = 10 * torch.log10(kernel.square().sum() / (kernel - rounded).square().sum())
        assert found[name] == pytest.approx(float(expected), rel=1e-4), name
    assert found["SNR by channel (dB)"] > found["SNR (dB)"] + 3


def test_numbers_that_there_are_not():
    whole = torch.arange(-127.0, 128).repeat(9)[: 9 * 255].view(255, 1, 3, 3)
    assert analyse_kernels.statistics(whole)["SNR (dB)"] == math.inf
    zeros = analyse_kernels.statistics(torch.zeros(2, 2, 3, 3))
    equal = analyse_kernels.statistics(torch.full((64, 64, 3, 3), 0.1, dtype=torch.float64))
    for found in (zeros, equal):
        assert [found[name] for name in NUMBERS[:6]] == [0, 0, 0, None, None, None]
    assert zeros["SNR (dB)"] == zeros["SNR by channel (dB)"] == math.inf
    row = {"a": math.inf, "b": None, "c": 0.0, "d": 1234.5, "e": 0.012345}
    assert list(analyse_kernels.written(row).values()) == ["inf", None, "0.00", "1234", "0.0123"]
    assert analyse_kernels.as_json({"a": math.inf, "b": None, "c": 1.5}) == {"a": "inf", "b": None, "c": 1.5}


# --- forms


def trained(model, mode):
    """A network whose batch norms are not those of a fresh one."""
    network = repopt.create_model(model, mode=mode, num_classes=10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean):
                values.normal_()
            module.running_var.uniform_(0.1, 3)
    return network.eval()


def fused(kernel, bn):
    """By torch's own fusion."""
    return fuse_conv_bn_weights(kernel, None, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)[0].detach()


def identity(channels, groups=1):
    """The kernel that changes nothing."""
    return nn.init.dirac_(torch.empty(channels, channels // groups, 3, 3), groups)


def centred(kernel):
    """A 1x1 kernel as a 3x3 one."""
    return nn.functional.pad(kernel, [1, 1, 1, 1])


def expected_plain(block):
    return block.conv.weight, fused(block.conv.weight, block.bn)


def expected_plain_ghost(block):
    kernel = block.get_submodule("cheap_operation.0").weight
    return kernel, fused(kernel, block.final_bn)


def expected_rep_vgg(block):
    after = fused(block.conv_3x3.weight, block.bn_3x3)
    whole = after + centred(fused(block.conv_1x1.weight, block.bn_1x1))
    if block.bn_identity is not None:
        whole = whole + fused(identity(len(whole)), block.bn_identity)
    return block.conv_3x3.weight, after, whole


def expected_qarepvgg(block):
    after = fused(block.conv_3x3.weight, block.bn_3x3)
    whole = after + centred(block.conv_1x1.weight) + (identity(len(after)) if block.identity else 0)
    return block.conv_3x3.weight, after, whole, fused(whole, block.bn)


def expected_rep_ghost(block):
    conv, bn = block.cheap_operation
    after = fused(conv.weight, bn)
    return conv.weight, after, after + fused(identity(len(after), groups=len(after)), block.fusion_bn)


def expected_rep_lk(block):
    after = fused(block.conv_large.weight, block.bn_large)
    margin = (after.shape[-1] - 5) // 2
    small = nn.functional.pad(fused(block.conv_small.weight, block.bn_small), [margin] * 4)
    return block.conv_large.weight, after, after + small


@pytest.mark.parametrize(
    ("model", "mode", "names", "expected", "count", "deployed_conv"),
    [
        (NANO, "target", PLAIN, expected_plain, 28, "conv"),
        (NANO, "repvgg", BASELINE, expected_rep_vgg, 28, "conv"),
        (NANO, "qarepvgg", [*BASELINE, "batch norm of the sum folded"], expected_qarepvgg, 28, "conv"),
        ("RepOpt-VGG-L2-se", "target", PLAIN, None, 48, "conv"),
        (GHOST, "target", PLAIN, expected_plain_ghost, 32, "2"),
        (GHOST, "rep", BASELINE, expected_rep_ghost, 32, "2"),
        (LK, "target", PLAIN, expected_plain, 5, "0"),
        (LK, "rep", BASELINE, expected_rep_lk, 5, "0"),
    ],
)
def test_forms_on_the_way_to_inference(model, mode, names, expected, count, deployed_conv):
    if expected is None:  # its squeeze-and-excitation has convolutions, too; no values needed
        with torch.device("meta"):
            found = forms_of(repopt.create_model(model, mode=mode))
        assert [list(forms) for forms in found.values()] == [names] * count
        return
    network = trained(model, mode)
    deployed = repopt.deploy(network)
    found = forms_of(network)
    assert len(found) == count
    for path, forms in found.items():
        assert list(forms) == names
        for (form, kernel), other in zip(forms.items(), expected(network.get_submodule(path)), strict=True):
            torch.testing.assert_close(kernel, other.detach(), msg=lambda text, at=(path, form): f"{at}: {text}")
            assert not kernel.requires_grad
        *before, last = forms.values()
        assert torch.equal(last, deployed.get_submodule(f"{path}.{deployed_conv}").weight), path
        assert not any(torch.allclose(last, kernel, rtol=0.01) for kernel in before), path


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (NANO, "stage3.7"),
        ("RepOpt-VGG-B1", "stage3.7"),
        ("RepOpt-VGG-A0", "stage3.4"),  # 1 + 2 + 4 + 14 + 1 layers: the 12th
        (GHOST, "blocks.6.2.ghost1"),  # 16 bottlenecks: the first layer of the 9th
    ],
)
def test_the_layer_of_the_paper(model, layer):
    with torch.device("meta"):
        network = repopt.create_model(model, mode="target")
        assert papers_layer(network, list(forms_of(network))) == layer


# --- the command


def save(path, network, arch=None):
    state = network if isinstance(network, dict) else network.state_dict()
    checkpoint.write({"model": state, "config": {"MODEL": {"ARCH": arch}}} if arch else state, path)
    return str(path)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the script; what it printed, the numbers that it kept, and the widths and heights of its pictures."""

    def run(*arguments):
        out = tmp_path / "out"
        assert analyse_kernels.main([*arguments, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        written = (out / "kernels.md").read_text()
        files = [str(out / name) for name in ("kernels.md", "kernels.json", "histograms.png", "depth.png")]
        assert printed == "\n".join([written, *files, ""])
        assert sorted(files) == sorted(map(str, out.iterdir()))
        pictures = []
        for file in files[2:]:
            with Image.open(file) as picture:
                assert len(picture.convert("L").getcolors()) > 20
                pictures.append(picture.size)
        return written, json.loads((out / "kernels.json").read_text()), pictures

    return run


def tables_of(text):
    """Rows as dicts, by the title of their table."""
    tables = {}
    for part in text.split("## ")[1:]:
        title, _, header, _, *lines = part.strip().splitlines()
        header, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines))
        tables[title] = [dict(zip(header, line, strict=True)) for line in lines]
    return tables


def test_two_networks_in_the_same_tables(run, tmp_path):
    target, baseline = trained(NANO, "target"), trained(NANO, "repvgg")
    names = [f"{NANO}-target", f"{NANO}-repvgg"]
    files = [save(tmp_path / "a.pth", target, names[0]), save(tmp_path / "b.pth", baseline, names[1])]
    text, content, pictures = run(*files)
    tables = tables_of(text)
    assert list(tables) == ["Layer stage3.7", "All layers"]
    forms = [(names[0], form) for form in PLAIN] + [(names[1], form) for form in BASELINE]
    for table, rows in zip(tables.values(), (5, 28 * 5), strict=True):
        assert len(table) == rows
        assert [(row["network"], row["form"]) for row in table] == forms * (rows // 5)
    assert list(tables["Layer stage3.7"][0]) == ["network", "form", *NUMBERS]
    assert list(tables["All layers"][0]) == ["network", "layer", "form", *NUMBERS]
    assert content["files"] == dict(zip(names, files, strict=True))
    assert content["layer"] == "stage3.7"
    rows = {(row["network"], row["layer"], row["form"]): row for row in content["rows"]}
    assert len(rows) == len(tables["All layers"])
    for shown in tables["All layers"]:
        kept = rows[shown["network"], shown["layer"], shown["form"]]
        for name in NUMBERS:
            assert float(shown[name]) == pytest.approx(kept[name], rel=5.1e-3), (shown, name)
    raw = target.stage3[7].conv.weight.detach().double()
    central = raw[:, :, 1, 1].std(correction=0)
    assert rows[names[0], "stage3.7", "raw"]["central"] == pytest.approx(float(central), rel=1e-12)
    assert [row for row in tables["All layers"] if row["layer"] == "stage3.7"] == [
        {"layer": "stage3.7", **row} for row in tables["Layer stage3.7"]
    ]
    alone = run(files[0])[2]
    assert alone[0][1] < pictures[0][1]  # a row of histograms per network
    assert alone[0][0] < pictures[0][0]  # and the baseline has a form more


@pytest.mark.parametrize("ending", ["target", "target-norepopt", "rep"])
def test_ghost_and_bare_weights(run, tmp_path, ending):
    network = trained(GHOST, "rep" if ending == "rep" else "target")
    arguments = "--arch", f"ghost-{ending}", "--layer", "blocks.2.0.ghost2"
    text, content, _ = run(save(tmp_path / "weights.pth", network), *arguments)
    tables = tables_of(text)
    assert list(tables) == ["Layer blocks.2.0.ghost2", "All layers"]
    forms = BASELINE if ending == "rep" else PLAIN
    assert [row["form"] for row in tables["Layer blocks.2.0.ghost2"]] == forms
    assert len(content["rows"]) == 32 * len(forms)
    kernel = network.blocks[2][0].ghost2.get_submodule("cheap_operation.0").weight.detach().double()
    kept = next(row for row in content["rows"] if row["layer"] == "blocks.2.0.ghost2")
    assert kept["std"] == pytest.approx(float(kernel.std(correction=0)), rel=1e-12)


def test_two_files_of_one_architecture_go_by_their_paths(run, tmp_path):
    files = [save(tmp_path / f"{name}.pth", trained(NANO, "target"), f"{NANO}-target") for name in "ab"]
    content = run(*files)[1]
    assert list(content["files"]) == files
    assert {row["network"] for row in content["rows"]} == set(files)


@pytest.mark.filterwarnings("error")  # matplotlib's, of a range that no log scale has
def test_kernels_of_zeros(run, tmp_path):
    state = {name: torch.zeros_like(value) for name, value in trained(NANO, "repvgg").state_dict().items()}
    text, content, _ = run(save(tmp_path / "zeros.pth", state, f"{NANO}-repvgg"))
    assert "| 0.00 | 0.00 | 0.00 | – | – | – | inf | inf |" in text
    assert {row["SNR (dB)"] for row in content["rows"]} == {"inf"}
    assert {row["kurtosis"] for row in content["rows"]} == {None}


def test_the_folder_is_named_after_the_architectures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    target = save(tmp_path / "a.pth", trained(NANO, "target"), f"{NANO}-target")
    other = save(tmp_path / "b.pth", trained(NANO, "target"), f"{NANO}-target-norepopt")
    assert analyse_kernels.main([target]) == analyse_kernels.main([target, other]) == 0
    assert sorted(path.name for path in (tmp_path / "output/kernels").iterdir()) == [
        f"{NANO}-target",
        f"{NANO}-target+{NANO}-target-norepopt",
    ]


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = trained(NANO, "target").state_dict()
    plain, bare = save(tmp_path / "plain.pth", state, f"{NANO}-target"), save(tmp_path / "bare.pth", state)
    ghost = save(tmp_path / "ghost.pth", trained(GHOST, "target"), f"{GHOST}-target")
    searched = {mode: save(tmp_path / f"{mode}.pth", trained(NANO, mode), f"{NANO}-{mode}") for mode in ("hs", "csla")}
    norm, kernel = state["stage2.0.bn.weight"].clone(), state["stage1.2.conv.weight"].clone()
    norm[3], kernel[0, 0, 1, 1] = torch.inf, torch.nan
    broken = save(tmp_path / "broken.pth", {**state, "stage2.0.bn.weight": norm}, f"{NANO}-target")
    nan = save(tmp_path / "nan.pth", {**state, "stage1.2.conv.weight": kernel}, f"{NANO}-target")
    for arguments, message in [
        (["none.pth"], "there is no file 'none.pth'"),
        ([bare], "give --arch"),
        ([bare, "--arch", f"{NANO}-repvgg"], "the weights are not those of this model"),
        ([bare, "--arch", f"{NANO}-targe"], f"did you mean '{NANO}-target'"),
        ([plain, "--arch", f"{NANO}-repvgg"], f"is a checkpoint of '{NANO}-target', not of {NANO}-repvgg"),
        ([plain, bare, "--arch", f"{NANO}-target"], "--arch names the network of each FILE: 2 of them, not 1"),
        ([searched["hs"]], "in hs mode"),
        ([searched["csla"]], "in csla mode"),
        ([plain, "--layer", "stage3.77"], "unknown layer 'stage3.77'; did you mean 'stage3.7'?"),
        ([plain, plain], "given twice"),
        ([plain, ghost], f"{NANO}-target and {GHOST}-target cannot be compared"),
        ([broken], f"{NANO}-target: the kernel of stage2.0 (batch norm folded) holds numbers that are not finite"),
        ([nan], f"{NANO}-target: the kernel of stage1.2 (raw) holds numbers that are not finite"),
        ([plain, "--out", plain], "File exists"),
    ]:
        assert analyse_kernels.main(arguments) == 2, message
        output = capsys.readouterr()
        assert output.err.startswith("analyse_kernels.py: ")
        assert message in output.err
        assert output.err.count("\n") == 1
        assert not output.out
    assert not (tmp_path / "output").exists()
