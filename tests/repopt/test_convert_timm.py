"""All that timm folds at inference: what is declared, that it is the same function, and the table in the document."""

import copy
import functools
import importlib
import inspect
import pkgutil
from collections import defaultdict
from pathlib import Path

import pytest
import timm
import torch
from benchmarks.report import as_table
from check_equivalency import BOUND, largest_difference
from test_convert import NETWORKS as OLDER
from test_convert import (
    _registrations_for_one_test,  # noqa: F401  a fixture
    assert_same,
    images,
    trained_norms,
)
from timm.models import _manipulate, ghostnet
from timm.models.fastvit import LayerScale2d, ReparamLargeKernelConv
from torch import nn

import repopt
from repopt import UserError
from repopt.convert import declaration
from repopt.convert.declaration import registered_type
from repopt.convert.model import FOLDS
from repopt.csla import ConvBranch
from repopt.layers import MODES
from repopt.models.registry import parse_arch

DOCS = Path(__file__).resolve().parents[2] / "docs" / "converting.md"
GHOST_V3 = [[[3, 8, 8, 0, 1]], [[3, 16, 8, 0, 2]], [[5, 24, 12, 0.25, 2]], [[3, 24, 12, 0, 1]]]
NARROW = {
    "repvit": ("repvit_m0_9", {"embed_dim": (8, 8, 16, 16), "depth": (1, 1, 2, 1)}),
    "repvit, legacy": ("repvit_m1", {"embed_dim": (8, 8, 16, 16), "depth": (1, 1, 2, 1)}),
    "fastvit": ("fastvit_sa12", {"layers": (2, 1, 1, 1), "embed_dims": (8, 16, 16, 32)}),
    "fastvit, mobileclip": (
        "fastvit_mci3",
        {
            "layers": (1, 1, 1, 1, 1),
            "embed_dims": (8, 16, 16, 32, 32),
            "se_downsamples": (False, False, True, True, False),
        },
    ),
    "shvit": ("shvit_s1", {"embed_dim": (16, 16, 24), "partial_dim": (8, 8, 8), "depth": (1, 2, 1)}),
    "iformer": ("iformer_t", {"dims": (8, 8, 16, 16), "depths": (1, 1, 4, 3), "attn_groups": (0, 0, 1, 1)}),
    "lcnetv2": ("lcnetv2_small", {"scale": 0.125, "depths": (1, 1, 2, 2)}),
    "ghostnetv3": (functools.partial(ghostnet.GhostNet, GHOST_V3, version="v3"), {}),
    "efficientvim": ("efficientvim_m1", {"embed_dim": (16, 24, 32), "depths": (1, 1, 1), "state_dim": (8, 8, 4)}),
}


def create(name, **more):
    """In float64, with batch norms and layer scales as after training."""
    torch.manual_seed(0)
    model, options = (NARROW | OLDER)[name]
    make = functools.partial(timm.create_model, model) if isinstance(model, str) else model
    network = trained_norms(make(num_classes=4, **options, **more).double())
    for module in network.modules():
        if isinstance(module, LayerScale2d):
            nn.init.normal_(module.gamma, std=0.5)
    return network


@pytest.mark.parametrize("name", NARROW)
def test_merged_and_deployed_are_the_same_function(name):
    network, x = create(name), images()
    model, scales = repopt.merge_branches(network, [images(4)])
    assert repopt.bind(model, scales).scales.keys() == scales.keys()
    with torch.no_grad():
        expected = network.eval()(x)
        assert expected.std() > 1e-3
        for other in (model.eval(), repopt.deploy(model)):
            assert_same(other(x), expected)
        folded = timm.utils.reparameterize_model(model.float())  # some of timm's folds know float32 alone
        assert (folded(x.float()) - expected).norm() < 1e-4 * expected.norm()


def paths_of(model):
    return [path for path, _ in repopt.declared_blocks(model)]


@pytest.mark.parametrize("name", NARROW)
def test_deployed_in_every_mode(name):
    network, x = create(name), images()
    converted = [trained_norms(repopt.convert_model(network, mode)).eval() for mode in MODES]
    assert paths_of(converted[0]) == paths_of(converted[1]) == paths_of(converted[2])
    assert len(paths_of(converted[0])) > 1
    for model in converted:
        deployed = repopt.deploy(model)
        assert not paths_of(deployed)
        with torch.no_grad():
            assert_same(deployed(x), model(x))


@pytest.mark.parametrize("name", ["fastvit", "lcnetv2", "ghostnetv3", "efficientvim"])
def test_folded_networks_are_refused(name):
    folded = _manipulate.reparameterize_model(create(name).eval())
    with pytest.raises(UserError, match=r"^cannot convert '[\w.]+' \(\w+\): its branches are fused already$"):
        repopt.convert_model(folded, "hs")


def test_drop_path_of_a_branch_is_refused():
    with pytest.raises(UserError, match=r"\(EfficientViMBlock\): drop_path drops branches at random"):
        repopt.convert_model(create("efficientvim", drop_path_rate=0.1), "hs")


@pytest.mark.parametrize("convert", [functools.partial(repopt.convert_model, mode="hs"), repopt.merge_branches])
def test_a_block_that_would_be_left_over_is_refused(convert):
    del declaration.DECLARE[ReparamLargeKernelConv]
    arguments = [[images()]] if convert is repopt.merge_branches else []
    with pytest.raises(
        UserError, match=r"'stages.1.downsample.proj.0' \(ReparamLargeKernelConv\): it folds its branches"
    ):
        convert(create("fastvit"), *arguments)


def test_a_container_of_another_release_is_refused(monkeypatch):
    forward = ghostnet.GhostModuleV3.forward
    monkeypatch.setattr(
        ghostnet.GhostModuleV3, "forward", lambda self, x: forward(self, x) * (1 if self.infer_mode else 2)
    )
    with pytest.raises(UserError, match=r"\(GhostModuleV3\): it is declared to be another function: .*\(this release"):
        repopt.convert_model(create("ghostnetv3"), "hs")


def test_a_residual_around_something_else_is_left_alone():
    network = create("shvit")
    converted = repopt.convert_model(network, "target")
    kinds = {type(module) for module in converted.modules()} & {type(m) for m in network.modules()}
    assert "Residual" in {kind.__name__ for kind in kinds}


@pytest.mark.parametrize("name", ["repvit_m0_9", "fastvit_t8"])
def test_a_network_by_its_name(name):
    for ending, mode in (("hs", "hs"), ("csla", "csla"), ("target", "target"), ("target-norepopt", "target")):
        arch = parse_arch(f"timm/{name}-{ending}")
        assert (arch.model, arch.mode, arch.repopt) == (f"timm/{name}", mode, ending == "target")
    model = repopt.create_model(f"timm/{name}", mode="target", num_classes=7)
    assert len(paths_of(model)) > 10
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("name", ["repvit", "fastvit", "lcnetv2"])
def test_a_backbone(name):
    model, options = NARROW[name]
    network = trained_norms(timm.create_model(model, features_only=True, **options).double())
    merged, _ = repopt.merge_branches(network, [images(4)])
    for a, b in zip(merged.eval()(images()), network.eval()(images()), strict=True):
        assert a.shape == b.shape


# What folds nothing but a batch norm into the convolution or linear layer beside it, and whole networks that call it.
PLAIN = {
    "efficientvim": ["ConvLayer1d", "ConvLayer2d"],
    "efficientvit_msra": ["ConvNorm", "NormLinear"],
    "iformer": ["ConvNorm", "IFormer", "NormLinear", "RepVitClassifier"],
    "levit": ["ConvNorm", "LinearNorm", "NormLinear"],
    "nextvit": ["NextConvBlock", "NextTransformerBlock"],
    "repvit": ["ConvNorm", "NormLinear", "RepVit", "RepVitClassifier"],
    "shvit": ["Conv2dNorm", "NormLinear", "SHViT"],
    "tiny_vit": ["ConvNorm"],
}


def folding_types():
    """Of timm's networks, by the file."""
    found = defaultdict(set)
    for file in pkgutil.iter_modules(timm.models.__path__):
        module = importlib.import_module(f"timm.models.{file.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__ and any(hasattr(cls, method) for method in FOLDS):
                found[file.name].add(cls)
    return found


@pytest.mark.filterwarnings("ignore:Importing from timm")
def test_nothing_that_timm_folds_is_forgotten():
    undeclared = {
        file: sorted(cls.__name__ for cls in types if registered_type(cls) is None)
        for file, types in folding_types().items()
    }
    assert {file: names for file, names in undeclared.items() if names} == PLAIN


@functools.cache
def measured(name):
    """The largest difference of a kernel after training, over rules.

    At 64 px the last feature maps have one pixel, and a softmax or batch norm over so few amplifies rounding.
    """
    csla, target = (repopt.convert_model(create(name), mode) for mode in ("csla", "target"))
    steps = functools.partial(largest_difference, sign=0.5, images=images(4, 128), steps=2)
    return max(steps(*copy.deepcopy((csla, target)), rule) for rule in ("sgd", "adamw"))


ALL = ("repvgg", "mobileone", "repghost", *NARROW)


@pytest.mark.parametrize("name", ALL)
def test_plain_network_follows_the_csla_network(name):
    assert measured(name) < BOUND


def blocks_of(name):
    """The declared blocks, by the type of timm's module that had the branches."""
    network = create(name)
    originals, found = dict(network.named_modules()), defaultdict(list)
    for path, block in repopt.declared_blocks(repopt.convert_model(network, "target")):
        here, around = (type(originals.get(part)) for part in (path, path.rpartition(".")[0]))
        found[here if here in declaration.DECLARE else around].append(block.block)
    return found


def branches_as_text(blocks):
    """As "5x5 + 3x3, depthwise"; a block that lacks branches of another one is not listed."""
    sums = set()
    for block in blocks:
        sizes = ["x".join(map(str, b.size)) if isinstance(b, ConvBranch) else "identity" for b in block.branches]
        depthwise = ", depthwise" * (block.target.shape[1] == 1)
        sums.add(
            (
                tuple(
                    f"{sizes.count(size)} of {size}" * (sizes.count(size) > 1) or size for size in dict.fromkeys(sizes)
                ),
                depthwise,
            )
        )
    largest = [(parts, kind) for parts, kind in sums if not any(set(parts) < set(o) and kind == k for o, k in sums)]
    return "; ".join(sorted(" + ".join(parts) + kind for parts, kind in largest))


def rows():
    blocks, differences, networks = defaultdict(list), {}, defaultdict(set)
    for name in ALL:
        model = (NARROW | OLDER)[name][0]
        for cls, found in blocks_of(name).items():
            blocks[cls] += found
            networks[cls].add(f"`{model.partition('_')[0] if isinstance(model, str) else name}_*`")
            differences[cls] = max(differences.get(cls, 0), measured(name))
    table = [
        {
            "`timm.models`": cls.__module__.rpartition(".")[-1],
            "networks": ", ".join(networks[cls]),
            "block": f"`{cls.__name__}`",
            "branches": branches_as_text(blocks[cls]),
            "csla against target": f"below {BOUND:.0e}" if differences[cls] < BOUND else f"{differences[cls]:.0e}",
        }
        for cls in blocks
    ]
    nothing = "none to declare: a batch norm goes into the layer beside it"
    for file in PLAIN.keys() - {row["`timm.models`"] for row in table}:
        table.append(dict.fromkeys(table[0], None) | {"`timm.models`": file, "branches": nothing})
    return sorted(table, key=lambda row: (row["block"] is None, row["`timm.models`"]))


def test_the_table_in_the_document():
    assert as_table(rows()) in DOCS.read_text()
