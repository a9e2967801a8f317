"""The paper's tables and figures: what is trained for each, and what is shown of it.

Each is a function of the scale: `full` is the paper's own setting, and otherwise small networks are trained on images
that come with scikit-learn. What several of them show is declared once, at the top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from repopt.errors import UserError, unknown
from reproduction import figures, int8, paper
from reproduction.experiment import (
    Experiment,
    Row,
    channels,
    counted,
    deployed_parameters,
    kernel_std,
    layers,
    multiply_adds,
    parameters,
    quantized,
    score,
    setting,
    throughput,
    training_speed,
)
from reproduction.run import DETECT, PTQ, QAT, SEGMENT, SPEED, THROUGHPUT, Kind, Training
from reproduction.studies import STUDIES

MODELS = ("B1", "B2", "L1", "L2")
SEARCHED_ON_DIGITS, TRAINED_ON_DIGITS = "configs/digits/search.yaml", "configs/digits/train.yaml"
PATCHES = {"DATA.DATASET": "patches"}
BOTH = ("RepOpt-VGG-B1", "RepVGG-B1")
FOLDED = "batch norm folded"  # form of a plain network's kernels


def _training(full: bool, name: str, mode: str, model: str = "B1") -> Training:
    """Return the training of a RepOpt-VGG in a mode by the recipe of that name."""
    return Training(
        name if model == "B1" else f"{name}-{model.lower()}",
        f"RepOpt-VGG-{model if full else 'nano'}-{mode}",
        f"configs/imagenet/{model.lower()}_{name}.yaml" if full else TRAINED_ON_DIGITS,
        gpus=8,
    )


def search(full: bool, model: str = "B1") -> Training:
    """Return the hyper-search, on CIFAR-100 or digits."""
    cfg = f"configs/hyper_search/{model.lower()}.yaml" if full else SEARCHED_ON_DIGITS
    return replace(_training(full, "search", "hs", model), cfg=cfg, gpus=1, once=True)


def search_elsewhere(full: bool) -> Training:
    """Return the hyper-search on ImageNet, or on patches of photographs."""
    if full:
        return search(full).but("search-imagenet", cfg="configs/hyper_search/b1_imagenet.yaml", gpus=8)
    return search(full).but("search-patches", PATCHES)


def target(full: bool, model: str = "B1") -> Training:
    """Return the plain network's training under the RepOptimizer."""
    return replace(_training(full, "target", "target", model), scales=search(full, model))


def repvgg(full: bool, model: str = "B1") -> Training:
    """Return the baseline's training."""
    return _training(full, "repvgg", "repvgg", model)


def plain(full: bool) -> Training:
    """Return the plain network's training under plain SGD."""
    return _training(full, "plain", "target-norepopt")


def quantization(full: bool, kind: Kind) -> tuple[Training, Training]:
    """Return the quantization of the plain network and that of the baseline."""
    name, gpus = ("ptq", 1) if kind is PTQ else ("qat", 8)
    cfg = f"configs/{'imagenet' if full else 'digits'}/quantize.yaml"
    own = Training(name, cfg=cfg, kind=kind, base=target(full), gpus=gpus)
    return own, own.but(f"{name}-repvgg", base=repvgg(full))


def _table1(full: bool) -> Experiment:
    rows = []
    for model in MODELS:
        arch = f"RepOpt-VGG-{model}-target"
        cells = {
            "layers of the four stages": counted(arch, layers, decimals=0),
            "channels of the four stages": counted(arch, channels, decimals=0),
            "FLOPs (B multiply-adds)": counted(arch, multiply_adds),
            "params (M)": counted(arch, deployed_parameters),
        }
        rows.append(Row((f"RepOpt-VGG-{model}",), cells))
    note = (
        "Counted from our networks with 1000 classes at 224 px: the deployed parameters, and the multiply-adds of "
        "convolutions and the classifier."
    )
    return Experiment("Architectures", (note,), paper.read("table1_architecture"), rows)


def _table2(full: bool) -> Experiment:
    table, rows = paper.read("table2_imagenet_2080ti"), []
    on_gpus = ("MaxBS", "train samples/s/GPU @MaxBS")  # columns that are measured on GPUs alone
    for model in MODELS if full else ("B1",):
        ours = target(full, model)
        size = () if full else ("--image-size", "32")
        command = ("train", "--arch", ours.arch.removesuffix("-target"), "--batch-size", "32", *size)
        speed = Training(ours.name.replace("target", "speed"), ours.arch, kind=SPEED, once=True, arguments=command)
        for family, label, training in (
            ("RepVGG", f"RepVGG-{model}", repvgg(full, model)),
            ("RepOpt", f"RepOpt-VGG-{model}", ours),
        ):
            small = training if full else training.but(f"{training.name}-small", {"DATA.BATCH_SIZE": 32})
            largest = table.row([label])["MaxBS"] if full else 100
            cells = {
                "MaxBS": training_speed(speed, family, "largest batch"),
                "top1 @BS=32": score(small),
                "top1 @MaxBS": score(training.but(f"{training.name}-large", {"DATA.BATCH_SIZE": largest})),
                "train samples/s/GPU @BS=32": training_speed(speed, family, "images/s"),
                "train samples/s/GPU @MaxBS": training_speed(speed, family, "images/s in it"),
                "train params (M)": counted(training.arch, parameters),
                "inference params (M)": counted(training.arch, deployed_parameters),
            }
            rows.append(Row((label,), {name: cell for name, cell in cells.items() if full or name not in on_gpus}))
    notes = (
        "The speed is measured by scripts/benchmark.py, alone on the machine, and so is the largest batch at full "
        "scale.",
        "The paper's are of a 2080Ti. Accuracy is that of batches of 32, and of the largest that fit on the paper's "
        "GPU."
        if full
        else "The large batches are of 100 images; parameters are with 1000 classes.",
    )
    return Experiment("RepOpt-VGG beside RepVGG in training", notes, table, rows)


def _table3(full: bool) -> Experiment:
    def efficientnet(name: str) -> Training:
        if full:
            cfg = f"configs/imagenet/efficientnet_{name}.yaml"
            return Training(f"efficientnet-{name}", f"timm/efficientnet_{name}", cfg, gpus=8)
        rate = {"TRAIN.BASE_LR": 0.012}
        return Training(f"efficientnet-{name}", "timm/efficientnet_b0", TRAINED_ON_DIGITS, settings=rate)

    networks = {"RepOpt-VGG-B1": target(full), "EfficientNet-B2": efficientnet("b2")}
    if full:
        l2, l2_se = target(full, "L2"), "RepOpt-VGG-L2-se-target"
        networks |= {
            "RepOpt-VGG-B2": target(full, "B2"),
            "VGGNet-16": Training("vgg16", "torchvision/vgg16_bn", "configs/imagenet/vgg16.yaml", gpus=8),
            "RepOpt-VGG-L2": l2,
            "EfficientNet-B3": efficientnet("b3"),
            "RepOpt-VGG-L2 + SE": l2.but("target-l2-se", arch=l2_se, cfg="configs/imagenet/l2_se_target.yaml"),
            "EfficientNet-B4": efficientnet("b4"),
            "EfficientNet-B5": efficientnet("b5"),
        }
    table, rows = paper.read("table3_vs_vgg16_efficientnet"), []
    for label, training in networks.items():
        settings = {"DATA.BATCH_SIZE": table.row([label])["test batch"], **({} if full else {"DATA.IMG_SIZE": 32})}
        settings["AMP_OPT_LEVEL"] = "O0"
        name = f"speed-{training.name}".replace("-target", "")
        speed = Training(name, training.arch, training.cfg, THROUGHPUT, settings, once=True)
        cells = {
            "train epochs": setting(training, "TRAIN.EPOCHS"),
            "train resolution": setting(training, "DATA.IMG_SIZE"),
            "test resolution": setting(training, "DATA.TEST_SIZE"),
            "top1": score(training),
            "test batch": setting(speed, "DATA.BATCH_SIZE"),
            "FP32 samples/s": throughput(speed),
        }
        rows.append(Row((label,), cells))
    notes = (
        "In brackets are the accuracies that the EfficientNets were published with. The speed is that of the deployed "
        "network in fp32.",
        "The paper does not say whether its VGGNet-16 has batch norms; this one has. Batch norms of the other "
        "libraries' networks are not folded for the speed."
        if full
        else "EfficientNet-B0 stands for EfficientNet-B2; its learning rate is the best of four in 20 epochs on a seed "
        "that is not shown. Neither library has a small VGGNet.",
    )
    return Experiment("Beside VGGNet-16 and EfficientNets under the same trainer (ImageNet)", notes, table, rows)


def _table4(full: bool) -> Experiment:
    def other(name: str, rate: float, demo_rate: float, **more: float) -> Training:
        settings = {f"TRAIN.OPTIMIZER.{key.upper()}": value for key, value in {"name": name, **more}.items()}
        return plain(full).but(name, settings | {"TRAIN.BASE_LR": rate if full else demo_rate})

    def ablation(name: str, key: str, value: bool | str, **fields: Any) -> Training:
        return tuned.but(name, {f"TRAIN.{key}": value}, **fields)

    tuned = target(full).but("tuned", {} if full else {"TRAIN.BASE_LR": 0.12})
    rep, searched = "RepOptimizer", "Hyper-Search"
    trainings = {
        ("SGD", None, False, False): plain(full) if full else plain(full).but("sgd", {"TRAIN.BASE_LR": 0.04}),
        ("RMSprop", None, False, False): other("rmsprop", 0.001, 0.004, momentum=0.0),
        ("Adam", None, False, False): other("adam", 0.001, 0.004),
        ("AdamW", None, False, False): other("adamw", 0.001, 0.012),
        ("Adafactor", None, False, False): other("adafactor", 0.01, 0.12),
        (rep, searched, True, True): target(full) if full else tuned,
        (rep, searched, False, True): ablation("old-initialization", "CHANGE_INITIALIZATION", False),
        (rep, searched, True, False): ablation("old-gradients", "CHANGE_GRADIENTS", False),
        (rep, "all 1", True, True): ablation("ones", "CONSTANTS", "one", scales=None),
        (rep, "same as HS initialization", True, True): ablation("initial", "CONSTANTS", "initial", scales=None),
        (rep, "average across channels", True, True): ablation("channel-mean", "CONSTANTS", "channel-mean"),
    }
    rows = [Row(labels, {"top1": score(training)}) for labels, training in trainings.items()]
    note = (
        "The paper gives no settings of the other optimizers: they have common defaults here."
        if full
        else "Learning rates are the best of five on a seed that is not shown, for every optimizer; the ablations have "
        "the RepOptimizer's."
    )
    title = "Which part of the RepOptimizer does what (RepOpt-VGG-B1 on ImageNet)"
    return Experiment(title, (note,), paper.read("table4_ablation_b1"), rows)


def _table5(full: bool) -> Experiment:
    if full:
        caltech = search(full).but("search-caltech256", cfg="configs/hyper_search/b1_caltech256.yaml")
        searches = {"CIFAR-100": search(full), "ImageNet": search_elsewhere(full), "Caltech256": caltech}
        elsewhere = target(full).but("caltech256", cfg="configs/caltech256/b1_target.yaml", gpus=1)
    else:
        searches = {"ImageNet": search(full), "Caltech256": search_elsewhere(full)}
        elsewhere = target(full).but("patches", PATCHES)
    rows = []
    for data, training in (("ImageNet", target(full)), ("Caltech256", elsewhere)):
        for searched_on, scales in searches.items():
            name = training.name if scales == training.scales else f"{training.name}-{scales.name}"
            cells = {"top1 on target": score(training.but(name, scales=scales))}
            rows.append(Row((data, searched_on), cells))
    notes = (
        "The paper does not say how it splits Caltech256, nor how it searches and trains there; the recipes in "
        "configs/ say what is done here.",
        "At this scale digits stand for ImageNet, and patches of two photographs for Caltech256; CIFAR-100 has no "
        "counterpart.",
    )
    title = "Searched on one data set, trained on another (RepOpt-VGG-B1)"
    return Experiment(title, notes[:1] if full else notes, paper.read("table5_transfer_b1"), rows)


def _searched(label: Any, trained: Training) -> Row:
    """Return a row with the scores of a search and of the training that takes its scales."""
    assert trained.scales
    cells = {"HS top1 on CIFAR-100": score(trained.scales), "target top1 on ImageNet": score(trained)}
    return Row((label,), cells)


def _table6(full: bool) -> Experiment:
    rows = [_searched([2, 2, 2, 2, 2], target(full))]
    for strides in ((2, 2, 1, 2, 1), (2, 1, 2, 1, 1)):
        digits = "".join(map(str, strides))
        scales = search(full).but(f"search-{digits}", {"MODEL.STRIDES": strides})
        rows.append(_searched([*strides], target(full).but(f"target-{digits}", scales=scales)))
    return Experiment("Strides of the search model (RepOpt-VGG-B1)", (), paper.read("table6_hs_strides_b1"), rows)


def _table7(full: bool) -> Experiment:
    data = {SEGMENT: "cityscapes", DETECT: "coco"} if full else dict.fromkeys((SEGMENT, DETECT), "scenes")
    networks = {  # suffix of the names, classifier whose mode it is trained in, classifier whose weights it begins with
        "RepOpt-VGG-B1": ("", plain(full), target(full)),
        "RepVGG-B1": ("-repvgg", repvgg(full), repvgg(full)),
    }
    ours = ("RepOpt-VGG-B1, RepOptimizer throughout", "RepOpt-VGG-B1, plain SGD throughout")
    if not full:
        networks |= {
            ours[0]: ("-repopt", target(full), target(full)),
            ours[1]: ("-plain", plain(full), plain(full)),
        }
    rows = []
    for label, (suffix, mode, base) in networks.items():
        detector, segmenter = (
            Training(f"{name}{suffix}", mode.arch, f"configs/{data[kind]}/{name}.yaml", kind, base=base, gpus=gpus)
            for kind, name, gpus in ((DETECT, "detect", 8), (SEGMENT, "segment", 4))
        )
        int8 = Training(f"int8{suffix}", cfg=f"configs/{data[SEGMENT]}/quantize.yaml", kind=PTQ, base=segmenter)
        cells = {
            "COCO box mAP (Cascade Mask R-CNN, 1x)": score(detector, "box_map"),
            "mask mAP": score(detector, "mask_map"),
            "Cityscapes mIoU (UPerNet, 40K iterations)": score(segmenter, "miou"),
            "mIoU in INT8": quantized(int8, "INT8", "miou"),
        }
        rows.append(Row((label,), cells))
    notes = (
        "Backbones begin with the weights of the classifiers, and everything is trained by plain SGD; but for the row "
        "that says otherwise.",
        "COCO and Cityscapes are scenes of handwritten digits here, in the same formats (data/scenes.py), and the "
        "detector is Mask R-CNN.",
    )
    return Experiment(
        "Detection and segmentation on a plain backbone",
        notes[:1] if full else notes,
        paper.read("table7_downstream"),
        rows,
        ours=("mask mAP", "mIoU in INT8", *ours),
    )


def _table8(full: bool) -> Experiment:
    stds = (kernel_std(target(full), FOLDED, "std"), kernel_std(repvgg(full), "after branch addition", "std"))
    rows = []
    for label, training, std in zip(BOTH, quantization(full, PTQ), stds, strict=True):
        cells = {
            "INT8 PTQ top1": quantized(training, "INT8"),
            "std of kernel parameters (8th 3x3 layer of the 16-layer stage)": std,
        }
        rows.append(Row((label,), cells))
    note = "The standard deviation is that of the deployed kernel of the 8th layer in the stage of 16."
    return Experiment("After post-training quantization to INT8", (note,), paper.read("table8_quantized"), rows)


def _table9(full: bool) -> Experiment:
    ones = search(full).but("search-ones", {"MODEL.INITIAL_SCALES": "one"})
    rows = [
        _searched("all 1", target(full).but("target-search-ones", scales=ones)),
        _searched("sqrt(2/l)", target(full)),
    ]
    title = "Where the scales of the search begin (RepOpt-VGG-B1)"
    return Experiment(title, (), paper.read("table9_hs_init_b1"), rows)


def _table10(full: bool) -> Experiment:
    rows = []
    for label, ptq, qat in zip(BOTH, quantization(full, PTQ), quantization(full, QAT), strict=True):
        cells = {
            "fp32 top1": quantized(ptq, "fp32"),
            "PTQ top1": quantized(ptq, "INT8"),
            "QAT top1 (10 epochs)": quantized(qat, "INT8"),
        }
        rows.append(Row((label,), cells))
    title = "INT8 by post-training quantization and by training on"
    return Experiment(title, (), paper.read("table10_quantization_b1"), rows)


def _table11(full: bool) -> Experiment:
    baseline = ("before BN fusion", "after BN fusion", "after branch addition")
    networks = {f"RepVGG-B1 {form}": (repvgg(full), form) for form in baseline}
    networks["RepOpt-VGG-B1"] = (target(full), FOLDED)
    rows = []
    for label, network in networks.items():
        cells = {
            "overall": kernel_std(*network, "std"),
            "central": kernel_std(*network, "central"),
            "surrounding": kernel_std(*network, "surrounding"),
        }
        rows.append(Row((label,), cells))
    title = "Standard deviation of the weights of the 8th layer in the stage of 16"
    return Experiment(title, (), paper.read("table11_kernel_std"), rows)


def _table12(full: bool) -> Experiment:
    def ghost(training: Training, name: str, mode: str, recipe: str, **fields: Any) -> Training:
        cfg = f"configs/{recipe}.yaml" if full else training.cfg
        return training.but(name, arch=f"ghost-{mode}", cfg=cfg, **fields)

    searched = ghost(search(full), "search-ghost", "hs", "hyper_search/ghost")
    trainings = {
        "RepGhostNet-0.5x + SGD": ghost(repvgg(full), "repghost", "rep", "imagenet/ghost_rep"),
        "RepOpt-GhostNet-0.5x + RepOptimizer": ghost(
            target(full), "target-ghost", "target", "imagenet/ghost_target", scales=searched
        ),
    }
    rows = [Row((label,), {"ImageNet top1": score(training)}) for label, training in trainings.items()]
    note = "The release notes print 66.51 and 66.50 for the two."
    return Experiment("RepGhostNet-0.5x", (note,), paper.read("table12_repghost_0_5x"), rows)


def _figure3(full: bool) -> Experiment:
    shown = {"RepOpt-VGG": target(full), "RepVGG": repvgg(full)}
    return Experiment("Weights of a deployed kernel", draw=figures.deployed_kernels, shown=shown)


def _figure4(full: bool) -> Experiment:
    note = (
        "Fresh networks on 16 images of normal noise, 224 px. The paper does not name its ResNet; here it is ResNet-50."
    )
    title = "How much of a layer's output is the identity, before training"
    return Experiment(title, (note,), draw=figures.identity_share)


def _figure5(full: bool) -> Experiment:
    title = "Weights of a kernel from training to deployment"
    return replace(_figure3(full), title=title, draw=figures.kernels_on_their_way)


def _figure6(full: bool) -> Experiment:
    names = ("CIFAR-100", "ImageNet") if full else ("digits", "patches of photographs")
    searches = zip(names, (search(full), search_elsewhere(full)), strict=True)
    title = "Scales by epoch in the last block of the third stage, searched on two data sets"
    shown = {f"searched on {name}": training for name, training in searches}
    return Experiment(title, draw=figures.scales_by_epoch, shown=shown)


def _figure7(full: bool) -> Experiment:
    return replace(_figure6(full), title="Scales by depth, searched on two data sets", draw=figures.scales_by_depth)


TABLES = (_table1, _table2, _table3, _table4, _table5, _table6, _table7, _table8, _table9, _table10, _table11, _table12)
FIGURES = (_figure3, _figure4, _figure5, _figure6, _figure7)
EXPERIMENTS: dict[str, Callable[[bool], Experiment]] = {
    **{f"table {number}": table for number, table in enumerate(TABLES, start=1)},
    "table int8": int8.table,
    **{f"figure {number}": figure for number, figure in enumerate(FIGURES, start=3)},
}


def load(name: str, scale: str) -> Experiment:
    """Return the experiment of a table, a figure or a study of ours ("table 4").

    Raises:
        UserError: there is none of that name.
    """
    if name in STUDIES:
        if scale == "full":
            raise UserError(f"{name!r} is of demo scale alone: leave --scale full out")
        return STUDIES[name]()
    if name not in EXPERIMENTS:
        raise unknown("table, figure or study", name, [*EXPERIMENTS, *STUDIES])
    return EXPERIMENTS[name](scale == "full")
