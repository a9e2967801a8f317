"""The study of priors trains what it says, and its table and picture are of what was found."""

import json

import pytest
import study_prior
import torch
from study_prior import NETWORKS, WAYS, Run, as_markdown, main
from torch import nn

import repopt


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", ["VGG, 6 convolutions", "ResNet, 24 convolutions"])
def test_every_way_trains(monkeypatch, network, way):
    monkeypatch.setattr(study_prior, "STEPS", 2)
    run = Run(network, "patches", "sgd", 0.1, way, 0)
    assert study_prior.timed(run) == (run, study_prior.train(run))  # again it is the same


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_so_many_convolutions_with_branches(name):
    network = NETWORKS[name](10)
    declared = repopt.declare(network)
    assert len(declared) == int(name.split()[1]) + 1  # and the first
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in network.modules()) == len(declared)
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


def test_scales_by_depth_begin_anew_in_every_width():
    network = NETWORKS["VGG, 6 convolutions"](10)
    repopt.declare(network, study_prior.by_depth())
    scales = repopt.constant_scales(network, "initial")
    first = [scales[f"{path}.scale_conv.weight"][0].item() ** 2 for path, _ in repopt.declared_blocks(network)]
    assert first == pytest.approx([2, 1, 2 / 3, 2, 1, 2, 1])


def test_what_is_found_is_kept_and_shown(tmp_path, capsys):
    file = tmp_path / "prior.json"
    found = {
        Run(network, "digits", "sgd", rate, way, seed): 50.0 + seed
        for network in NETWORKS
        for rate in study_prior.RATES
        for way in WAYS
        for seed in (0, 2)
    }
    file.write_text(json.dumps([{"run": [*run], "top1": top1} for run, top1 in found.items()]))
    assert main(["--data", "digits", "--seeds", "0", "2", "--output", str(file)]) == 0
    assert capsys.readouterr().out.strip() == as_markdown(found)
    assert "| VGG, 24 convolutions | digits | sgd | 0.4 | 51.0 ± 1.4 | 51.0 ± 1.4 |" in as_markdown(found)
    assert file.with_suffix(".png").stat().st_size > 1000
