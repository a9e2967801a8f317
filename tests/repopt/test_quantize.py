"""INT8: what is computed, what is trained, and what is written."""

import copy
import math
import shutil
from typing import NamedTuple

import onnx
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import repopt
from repopt import export, quantization
from repopt.errors import UserError
from repopt.quantization import flow, graph
from train.nonfinite import NonFiniteGuard
from train.parallel import average_statistics, data_parallel

CPU = torch.device("cpu")
SMALL = {"layers": (2, 1, 1, 1), "widths": (0.2, 0.2, 0.2, 0.2)}


def images(count=16, size=32):
    return torch.randn(count, 3, size, size)


def as_if_trained(model, x):
    """In eval mode, with batch norms that do something and activations that do not fade."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 1.0, 0.1)  # around 0 every layer would enlarge what is rounded differently
            norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.1
    return model.eval()


def network(mode="target", name="RepOpt-VGG-nano", **overrides):
    sizes = SMALL if name == "RepOpt-VGG-nano" else {}
    return as_if_trained(repopt.create_model(name, mode=mode, num_classes=10, **sizes, **overrides), images(64))


def calibrated(model, method="ptq", preset="default", x=None):
    x = images() if x is None else x
    observed = quantization.prepare(model, x, method, preset)
    quantization.calibrate(observed, [x])
    return observed


def quantized(model, method="ptq", preset="default", x=None):
    observed = calibrated(model, method, preset, x)
    return observed, quantization.convert(observed)


class Converted(NamedTuple):
    """A network on its way through QAT, and its calibration images."""

    model: nn.Module
    x: torch.Tensor
    observed: quantization.PreparedModel
    int8: quantization.Int8


@pytest.fixture(scope="module", params=["target", "repvgg"])
def qat(request):
    """Without training, and with biases that are not rounded, for which training for INT8 has no operation.

    torchao takes 15 seconds to fold batch norms.
    """
    torch.manual_seed(0)
    model, x = network(request.param), images()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "round_bias", lambda *arguments: None)
        return Converted(model, x, *quantized(model, "qat", x=x))


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def scales_of(model):
    """Random ones, of both signs."""
    return {
        f"{path}.{branch.searched_name}.weight": torch.randn(block.block.target.shape[0])
        for path, block in repopt.declared_blocks(model)
        for branch in block.block.branches
    }


class TestIntegers:
    """The arithmetic, against formulas written out here."""

    def ranged(self, x, low, high, *, symmetric):
        """Scale and zero point of a tensor from its smallest to its largest number, zero included."""
        smallest, largest = min(0.0, x.min().item()), max(0.0, x.max().item())
        if symmetric:
            return max(-smallest, largest) / ((high - low) / 2), 0
        scale = (largest - smallest) / (high - low)
        return scale, low - round(smallest / scale)

    def rounded(self, x, scale, zero_point, low, high):
        return ((x / scale).round() + zero_point).clamp(low, high).sub(zero_point) * scale

    @torch.no_grad()
    def expected(self, model, x):
        """Of two convolutions with a ReLU between; and how far from halfway, in steps, the numbers between are."""
        signal, of_image = x, self.ranged(x, 0, 255, symmetric=False)
        for layer in (model[0], model[2]):
            of_weight = self.ranged(layer.weight, -127, 127, symmetric=True)
            step = of_image[0] * of_weight[0]
            signal = F.conv2d(
                self.rounded(signal, *of_image, 0, 255),
                self.rounded(layer.weight, *of_weight, -127, 127),
                (layer.bias / step).round() * step,
                padding=layer.padding,
            )
            if layer is model[0]:
                signal, of_image = F.relu(signal), self.ranged(F.relu(layer(x)), 0, 255, symmetric=False)
                distance = ((signal / of_image[0]) % 1 - 0.5).abs().min()
        return signal, distance

    def test_per_tensor(self):
        model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 1)).eval()
        distance = 0.0
        while distance < 1e-3:  # every CPU adds up in an order of its own
            x = images(4, 8)
            signal, distance = self.expected(model, x)
        _, int8 = quantized(model, preset="per_tensor", x=x)
        torch.testing.assert_close(outputs(int8, x), signal, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("preset", quantization.PRESETS)
    def test_weights_are_rounded_as_the_preset_says(self, preset):
        """They are integers of the preset's range, by the names of their layers; no other kernels are left."""
        row = quantization.PRESETS[preset]
        model = network()
        _, int8 = quantized(model, preset=preset)
        state = int8.state_dict()
        kernels = {name: value for name, value in state.items() if value.dtype is torch.int8}
        assert [*kernels] == [
            f"network.{name}" for name, value in repopt.deploy(model).state_dict().items() if value.dim() > 1
        ]
        assert not any(value.is_floating_point() and value.dim() > 1 for value in state.values())
        deployed = [m.weight for m in repopt.deploy(model).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(kernels) == len(deployed) == 7
        for kernel, integers in zip(deployed, kernels.values(), strict=True):
            low, high = row.weights
            largest = (
                kernel.abs().amax(tuple(range(1, kernel.dim())), keepdim=True)
                if row.per_channel
                else kernel.abs().max()
            )
            expected = (kernel / (largest / ((high - low) / 2))).round().clamp(low, high)
            assert (expected - integers).abs().max() <= 1  # a tie may be rounded either way
            assert ((expected - integers).abs() > 0).float().mean() < 0.01

    def test_only_the_last_output_is_float(self):
        """The classes are told apart by more than 256 numbers."""
        x = images(256)
        _, int8 = quantized(network(), x=x)
        assert len(outputs(int8, x)[:, 0].unique()) > 200

    @pytest.mark.parametrize("preset", quantization.PRESETS)
    @pytest.mark.parametrize(("name", "mode"), [("RepOpt-VGG-nano", "target"), ("RepOpt-VGG-nano", "repvgg")])
    def test_it_is_nearly_the_same_function(self, name, mode, preset):
        model, x = network(mode, name), images()
        _, int8 = quantized(model, preset=preset, x=x)
        assert 0 < export.relative_difference(outputs(int8, x), outputs(model, x)) < 0.1


class TestPreparing:
    @pytest.mark.parametrize("method", ["ptq", "qat"])
    def test_the_model_stays_as_it_is(self, method):
        model, x = network(), images()
        before = copy.deepcopy(model.state_dict())
        observed = calibrated(model, method, x=x)
        if method == "qat":
            optimizer = torch.optim.SGD(observed.parameters(), lr=0.1)
            observed.train()(x).sum().backward()
            optimizer.step()
        assert not model.training
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name

    @pytest.mark.parametrize("method", ["ptq", "qat"])
    def test_what_is_converted_stays_as_it_is(self, method):
        observed = calibrated(network("repvgg"), method)
        before = {name: value.clone() for name, value in observed.state_dict().items()}
        quantization.convert(observed)
        for name, value in observed.state_dict().items():
            assert torch.equal(value, before[name]), name

    @pytest.mark.parametrize(("method", "mode"), [("ptq", "target"), ("qat", "repvgg")])
    def test_a_state_dict_brings_everything_back(self, method, mode):
        model, x = network(mode), images()
        observed, int8 = quantized(model, method, x=x)
        fresh = repopt.create_model("RepOpt-VGG-nano", mode=mode, num_classes=10, **SMALL)
        again = quantization.prepare(fresh, x, method, "default")
        quantization.load(again, observed.state_dict())
        assert torch.equal(outputs(quantization.convert(again), x), outputs(int8, x))

    def test_a_state_dict_of_another_network_is_refused(self):
        observed, _ = quantized(network())
        other = quantization.prepare(network("repvgg"), images(), "ptq", "per_tensor")
        with pytest.raises(UserError, match="the weights are not those of this model"):
            quantization.load(other, observed.state_dict())

    def test_mistakes(self):
        model, x = network(), images()
        with pytest.raises(UserError, match="unknown quantization preset 'defualt'; did you mean 'default'"):
            quantization.prepare(model, x, "ptq", "defualt")
        with pytest.raises(UserError, match="unknown quantization method 'ptqq'; did you mean 'ptq'"):
            quantization.prepare(model, x, "ptqq", "default")
        with pytest.raises(UserError, match="no images to calibrate with"):
            quantization.calibrate(quantization.prepare(model, x, "ptq", "default"), [])

    def test_batches_are_bounded_as_batch_norms_on_gpus_need_it(self):
        program = quantization.export_program(network(), images())
        assert [bounds.upper for bounds in program.range_constraints.values()] == [quantization.MAX_BATCH]

    def test_an_operator_that_cannot_be_exported_is_one_line(self):
        class Decides(nn.Module):
            def forward(self, x):
                return x if x.sum() > 0 else -x

        with pytest.raises(UserError, match="Decides cannot be exported") as caught:
            quantization.prepare(Decides(), images(), "ptq", "default")
        assert "\n" not in str(caught.value)


class TestTraining:
    """Quantization-aware training is a training of the same parameters."""

    def test_parameters_and_multipliers_have_their_names(self):
        model = network()
        scales = scales_of(model)
        observed = calibrated(model, "qat")
        assert [*dict(observed.network.named_parameters())] == [*dict(model.named_parameters())]
        mults = repopt.grad_mults(observed, scales, degree=1)
        for name, mult in repopt.grad_mults(model, scales, degree=1).items():
            assert torch.equal(mult.dense(), mults[name].dense()), name
        optimizer = repopt.build_optimizer("sgd", observed, scales, lr=0.1)
        trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
        assert trained == {id(param) for param in observed.parameters()}

    def test_images_as_gpus_have_them(self):
        """A step is done, or left out, with images that are channels_last."""
        x = images().contiguous(memory_format=torch.channels_last)
        observed = calibrated(network().to(memory_format=torch.channels_last), "qat", x=x).train()
        guard = NonFiniteGuard(observed, optimizer := repopt.build_optimizer("sgd", observed, lr=0.1), CPU)
        before = copy.deepcopy(observed.state_dict())
        for loss_of, skipped in ((lambda y: y.mean() + math.inf, 1), (torch.mean, 0)):
            guard.nan_if_not_finite(loss_of(observed(x))).backward()
            guard.step(None)
            optimizer.zero_grad()
            assert guard.skipped() == (1, skipped)
            changed = any(not torch.equal(value, before[name]) for name, value in observed.state_dict().items())
            assert changed is not bool(skipped)

    @pytest.mark.parametrize(
        ("name", "with_scales"),
        [("RepOpt-VGG-nano", True), ("RepOpt-VGG-nano", False), ("ghost", True), ("RepOpt-LK-nano", True)],
    )
    def test_without_rounding_it_is_the_float_training(self, name, with_scales):
        model = network(name=name)
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eps, norm.momentum = 1e-2, 0.05
        scales = scales_of(model) if with_scales else None
        observed = quantization.prepare(model, images(), "qat", "default")
        observed.network.apply(flow.pt2e.disable_fake_quant)
        before = copy.deepcopy(model.state_dict())
        for trained in (model.train(), observed.train()):
            source = torch.Generator().manual_seed(0)
            optimizer = repopt.build_optimizer("sgd", trained, scales, lr=0.01, momentum=0.9, weight_decay=1e-3)
            for _ in range(3):
                x, y = torch.randn(8, 3, 32, 32, generator=source), torch.randint(10, (8,), generator=source)
                optimizer.zero_grad()
                torch.manual_seed(0)  # of dropout
                F.cross_entropy(trained(x), y).backward()
                optimizer.step()
        assert isinstance(optimizer, repopt.RepOptimizer) == with_scales
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                moved = (value - before[name]).abs().max()
                apart = (value - observed.state_dict()[f"network.{name}"]).abs().max()
                assert apart <= 1e-3 * moved + 1e-7, name

    def test_it_trains_the_network_that_it_becomes(self, qat):
        becomes, trained = outputs(qat.int8, qat.x), outputs(qat.observed.eval(), qat.x)
        noise = export.relative_difference(becomes, outputs(qat.model, qat.x))
        assert export.relative_difference(becomes, trained) < 0.3 * noise

    def test_calibration_averages_ranges_over_batches(self):
        x = images()
        observed = quantization.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), x, "qat", "default")
        quantization.calibrate(observed, [x, 3 * x, 5 * x])
        of_image = observed.network.activation_post_process_0.activation_post_process
        torch.testing.assert_close(of_image.max_val, 3 * x.max())
        torch.testing.assert_close(of_image.min_val, 3 * x.min())
        observed.train()(x)  # and from here on one batch counts little
        torch.testing.assert_close(of_image.max_val, 0.99 * 3 * x.max() + 0.01 * x.max())

    def test_an_evaluation_observes_nothing(self):
        observed = calibrated(network(), "qat")
        observed.eval()
        before = {name: value.clone() for name, value in observed.state_dict().items()}
        observed(10 * images())
        for name, value in observed.state_dict().items():
            assert torch.equal(value, before[name]), name
        observed.train()(10 * images())
        ranges = [name for name in before if name.endswith("max_val")]
        assert any(not torch.equal(observed.state_dict()[name], before[name]) for name in ranges)

    def test_a_switch_there_and_back_changes_nothing(self):
        observed = calibrated(network(), "qat")
        x = images()
        expected = outputs(observed.eval(), x)
        observed.train()
        assert torch.equal(outputs(observed.eval(), x), expected)

    def test_it_learns(self):
        x, y = images(32), torch.arange(32) % 10
        model = network()
        scales = {name: torch.ones_like(scale) for name, scale in scales_of(model).items()}
        observed = quantization.prepare(model, x, "qat", "default")
        quantization.calibrate(observed, [x])
        optimizer = repopt.build_optimizer("sgd", observed.train(), scales, lr=0.05, momentum=0.9)
        losses = []
        for _ in range(30):
            loss = F.cross_entropy(observed(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.2 * losses[0]


def training_in_two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    model = network()
    scales = scales_of(model)
    observed = calibrated(model, "qat")
    optimizer = repopt.build_optimizer("sgd", observed, scales, lr=0.01, momentum=0.9)
    trained = data_parallel(observed, CPU).train()
    torch.manual_seed(rank)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(trained(images()), torch.arange(16) % 10).backward()
        optimizer.step()
    average_statistics(observed)
    x = torch.ones(2, 3, 32, 32)
    mine = torch.cat([value.double().flatten() for value in (*observed.parameters(), outputs(observed.eval(), x))])
    of_first = mine.clone()
    dist.broadcast(of_first, src=0)
    assert torch.equal(mine, of_first)
    assert optimizer.grad_mults
    dist.barrier()
    dist.destroy_process_group()


def test_a_repoptimizer_trains_for_int8_in_two_processes(tmp_path):
    torch.multiprocessing.spawn(training_in_two_processes, (str(tmp_path),), nprocs=2)


def in_three_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 3), rank=rank, world_size=3)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Linear(2, 2))
    model.register_buffer("constant", torch.full((5,), 0.1))
    model.register_buffer("wide", torch.full((2,), float(rank), dtype=torch.float64))
    model[0].running_mean.fill_(rank)
    average_statistics(model)
    assert torch.equal(model.constant, torch.full((5,), 0.1))
    torch.testing.assert_close(model[0].running_mean, torch.ones(3))
    torch.testing.assert_close(model.wide, torch.ones(2, dtype=torch.float64))
    assert torch.equal(model[0].running_var, torch.ones(3))
    dist.barrier()
    dist.destroy_process_group()


def test_processes_average_what_they_measured(tmp_path):
    torch.multiprocessing.start_processes(in_three_processes, (str(tmp_path),), nprocs=3, start_method="fork")


class TestSignalToNoise:
    def check(self, model, x, observed, int8):
        ratios = quantization.signal_to_noise(observed, int8, x)
        signal = outputs(model, x)
        noise = outputs(int8, x) - signal
        assert ratios["linear"] == pytest.approx(
            10 * math.log10(signal.square().sum() / noise.square().sum()), abs=0.01
        )
        layers = [name for name, m in repopt.deploy(model).named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert [*ratios] == layers
        assert all(10 < ratio < 60 for ratio in ratios.values())

    @pytest.mark.parametrize("mode", ["target", "repvgg"])
    def test_after_training(self, mode):
        model, x = network(mode), images()
        self.check(model, x, *quantized(model, x=x))

    def test_by_training_on(self, qat):
        self.check(*qat)

    def test_more_noise_per_tensor(self):
        model, x = network("repvgg"), images()
        ratios = {
            p: quantization.signal_to_noise(*quantized(model, preset=p, x=x), x) for p in ("default", "per_tensor")
        }
        assert sum(ratios["default"].values()) > sum(ratios["per_tensor"].values())


class TestOnnx:
    """What onnxruntime makes of the files."""

    def written(self, model, x, path):
        export.write_onnx(model, x, path)
        return export.OnnxNetwork(path)

    @pytest.mark.parametrize("batch", [1, 3, 16])
    def test_float(self, tmp_path, batch):
        deployed, x = repopt.deploy(network()), images(batch)
        found = self.written(deployed, x, tmp_path / "fp32.onnx")(x)
        assert export.relative_difference(found, outputs(deployed, x)) < 1e-5

    @pytest.mark.parametrize(
        ("name", "mode", "preset", "convolutions"),
        [("RepOpt-VGG-nano", "target", "default", 6), ("ghost", "rep", "per_tensor", 95)],
    )
    def test_every_convolution_runs_on_integers(self, tmp_path, name, mode, preset, convolutions):
        model, x = network(mode, name), images()
        _, int8 = quantized(model, preset=preset, x=x)
        found = self.written(int8, x, tmp_path / "int8.onnx")
        runs = export.operations(tmp_path / "int8.onnx")
        assert runs["QLinearConv"] == convolutions
        assert not any(runs[name] for name in ("Conv", "FusedConv", "ConvInteger", "Add", "Mul"))
        for count in (1, 5):  # an image whose number is rounded differently differs in all that follows
            differences = (found(x[:count]) - outputs(int8, x[:count])).square().mean(1).sqrt()
            noise = (outputs(int8, x[:count]) - outputs(model, x[:count])).square().mean(1).sqrt()
            assert (differences < noise).all()

    def test_kernels_have_zero_points_of_their_own(self, tmp_path):
        """Where CPUs lack VNNI, onnxruntime replaces each with its kernel, and would replace a shared one twice."""
        _, int8 = quantized(network())
        export.write_onnx(int8, images(), tmp_path / "int8.onnx")
        graph = onnx.load(tmp_path / "int8.onnx").graph
        kept = {tensor.name for tensor in graph.initializer}
        constants = [node.input for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in kept]
        kernels = [inputs for inputs in constants if inputs[0].endswith(".weight")]
        assert len(kernels) == 7
        assert len({zero_points for _, _, zero_points in kernels}) == 7

    def test_qat(self, tmp_path):
        x = images()
        _, int8 = quantized(network("repvgg"), "qat", x=x)
        assert export.relative_difference(self.written(int8, x, tmp_path / "q.onnx")(x), outputs(int8, x)) < 0.05
        assert export.operations(tmp_path / "q.onnx")["QLinearConv"] == 6

    @pytest.mark.parametrize("preset", quantization.PRESETS)
    def test_what_leaves_the_range_is_cut_alike(self, tmp_path, preset):
        """Seven bits end at 127, though the type holds more."""
        model, x = network(), images()
        _, int8 = quantized(model, preset=preset, x=0.3 * x)
        found = self.written(int8, x, tmp_path / "int8.onnx")
        assert export.relative_difference(outputs(int8, x), outputs(model, x)) > 0.1  # it is cut
        assert export.relative_difference(found(x), outputs(int8, x)) < 0.05

    def test_a_channel_without_weights(self, tmp_path):
        """Its bias is many times the step of its integers."""
        conv = nn.Conv2d(3, 4, 3)
        with torch.no_grad():
            conv.weight[1] *= 1e-12
            conv.bias[1] = 20.0
        model, x = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(4, 2, 3)).eval(), images()
        _, int8 = quantized(model, x=x)
        assert export.relative_difference(outputs(int8, x), outputs(model, x)) < 0.05
        assert export.relative_difference(self.written(int8, x, tmp_path / "q.onnx")(x), outputs(int8, x)) < 0.01

    @pytest.mark.parametrize("method", ["ptq", "qat"])
    def test_networks_of_others(self, tmp_path, method):
        x = images(4)
        model = as_if_trained(timm.create_model("resnet10t", num_classes=10), images())
        observed = calibrated(model, method, x=x)
        assert export.relative_difference(outputs(observed, x), outputs(model, x)) < (0.2 if method == "qat" else 1e-4)
        if method == "ptq":
            int8 = quantization.convert(observed)
            assert export.relative_difference(self.written(int8, x, tmp_path / "q.onnx")(x), outputs(int8, x)) < 0.1

    def test_squeeze_and_excitation(self, tmp_path):
        x = images()
        _, int8 = quantized(network(se=True), preset="per_tensor", x=x)
        assert export.relative_difference(self.written(int8, x, tmp_path / "q.onnx")(x), outputs(int8, x)) < 0.05

    def test_other_outputs_are_found_out(self, tmp_path, monkeypatch):
        _, int8 = quantized(network())
        wrong = export._quantize_per_tensor

        def shifted(x, scale, zero_point, quant_min, quant_max, dtype):
            return wrong(x, 1.3 * scale, zero_point, quant_min, quant_max, dtype)

        monkeypatch.setitem(export._TRANSLATIONS, torch.ops.quantized_decomposed.quantize_per_tensor.default, shifted)
        with pytest.raises(UserError, match="onnxruntime's outputs differ from torch's"):
            export.write_onnx(int8, images(), tmp_path / "int8.onnx")
        assert not list(tmp_path.iterdir())

    def test_no_network(self, tmp_path):
        with pytest.raises(UserError, match="there is no file"):
            export.OnnxNetwork(tmp_path / "none.onnx")
        (tmp_path / "bad.onnx").write_bytes(b"not one")
        with pytest.raises(UserError, match="onnxruntime cannot run"):
            export.OnnxNetwork(tmp_path / "bad.onnx")


class TestOtherFiles:
    def test_safetensors(self, tmp_path):
        from safetensors.torch import load_file

        deployed = repopt.deploy(network())
        export.write_safetensors(deployed, tmp_path / "weights.safetensors")
        found = load_file(tmp_path / "weights.safetensors")
        for name, value in deployed.state_dict().items():
            assert torch.equal(found[name], value), name

    def test_programs(self, tmp_path):
        _, int8 = quantized(network())
        x = images(5)
        export.write_program(int8, x, tmp_path / "int8.pt2")
        program = torch.export.load(tmp_path / "int8.pt2").module()
        assert torch.equal(outputs(program, x), outputs(int8, x))

    @pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")
    def test_compiled_packages(self, tmp_path):
        model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), images(5, 8)
        export.write_compiled(model, x, tmp_path / "fp32.pt2")
        run = torch._inductor.aoti_load_package(str(tmp_path / "fp32.pt2"))
        torch.testing.assert_close(run(x), outputs(model, x))

    def test_nothing_is_written_over(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        path.write_text("mine")
        with pytest.raises(UserError, match="exists, and is not written over"):
            export.write_safetensors(network(), path)
        assert path.read_text() == "mine"
