"""The paper's tables and figures: what is trained for each, and what is shown of it.

Each is a function of the scale: `full` is the paper's own setting, and otherwise small networks are trained on images
that come with scikit-learn. What several of them show is declared once, at the top.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from repopt.errors import unknown
from reproduction import figures, paper
from reproduction.experiment import Cell, Experiment, Row
from reproduction.quantities import (
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

MODELS = ("B1", "B2", "L1", "L2")
SEARCHED_ON_DIGITS, TRAINED_ON_DIGITS = "configs/digits/search.yaml", "configs/digits/train.yaml"
PATCHES = {"DATA.DATASET": "patches"}


def _arch(full: bool, mode: str, model: str = "B1") -> str:
    return f"RepOpt-VGG-{model if full else 'nano'}-{mode}"


def _name(name: str, model: str) -> str:
    return name if model == "B1" else f"{name}-{model.lower()}"


def _recipe(full: bool, name: str, model: str = "B1") -> str:
    return f"configs/imagenet/{model.lower()}_{name}.yaml" if full else TRAINED_ON_DIGITS


def search(full: bool, model: str = "B1") -> Training:
    """Return the hyper-search, on CIFAR-100 or digits."""
    cfg = f"configs/hyper_search/{model.lower()}.yaml" if full else SEARCHED_ON_DIGITS
    return Training(_name("search", model), _arch(full, "hs", model), cfg, once=True)


def search_elsewhere(full: bool) -> Training:
    """Return the hyper-search on ImageNet, or on patches of photographs."""
    if full:
        return search(full).but("search-imagenet", cfg="configs/hyper_search/b1_imagenet.yaml", gpus=8)
    return search(full).but("search-patches", PATCHES)


def target(full: bool, model: str = "B1") -> Training:
    """Return the plain network's training under the RepOptimizer."""
    cfg = _recipe(full, "target", model)
    return Training(_name("target", model), _arch(full, "target", model), cfg, scales=search(full, model), gpus=8)


def repvgg(full: bool, model: str = "B1") -> Training:
    """Return the baseline's training."""
    return Training(_name("repvgg", model), _arch(full, "repvgg", model), _recipe(full, "repvgg", model), gpus=8)


def plain(full: bool) -> Training:
    """Return the plain network's training under plain SGD."""
    return Training("plain", _arch(full, "target-norepopt"), _recipe(full, "plain"), gpus=8)


def quantization(full: bool, kind: Kind) -> tuple[Training, Training]:
    """Return that of the plain network and that of the baseline."""
    name, gpus = ("ptq", 1) if kind is PTQ else ("qat", 8)
    cfg = f"configs/{'imagenet' if full else 'digits'}/quantize.yaml"
    own = Training(name, None, cfg, kind, of=target(full), gpus=gpus)
    return own, own.but(f"{name}-repvgg", of=repvgg(full))


def _table1(full: bool) -> Experiment:
    columns: dict[str, tuple[Callable[[str], Any], int]] = {  # and decimals
        "layers of the four stages": (layers, 0),
        "channels of the four stages": (channels, 0),
        "FLOPs (B multiply-adds)": (multiply_adds, 1),
        "params (M)": (deployed_parameters, 1),
    }
    return Experiment(
        "Architectures",
        (
            "Counted from our networks with 1000 classes at 224 px: the deployed parameters, and the multiply-adds of "
            "convolutions and the classifier.",
        ),
        paper.read("table1_architecture"),
        tuple(
            Row((name,), {column: counted(f"{name}-target", *count) for column, count in columns.items()})
            for name in (f"RepOpt-VGG-{model}" for model in MODELS)
        ),
    )


def _table2(full: bool) -> Experiment:
    table, rows = paper.read("table2_imagenet_2080ti"), []
    for model in MODELS if full else ("B1",):
        network = f"RepOpt-VGG-{model if full else 'nano'}"
        size = () if full else ("--image-size", "32")
        command = ("train", "--arch", network, "--batch-size", "32", *size)
        speed = Training(_name("speed", model), f"{network}-target", kind=SPEED, once=True, arguments=command)
        for family, training in (("RepVGG", repvgg(full, model)), ("RepOpt", target(full, model))):
            label = f"RepVGG-{model}" if family == "RepVGG" else f"RepOpt-VGG-{model}"
            small = training if full else training.but(f"{training.name}-small", {"DATA.BATCH_SIZE": 32})
            largest = table.row([label])["MaxBS"] if full else 100
            large = training.but(f"{training.name}-large", {"DATA.BATCH_SIZE": largest})
            arch = f"{network}-{'repvgg' if family == 'RepVGG' else 'target'}"
            cells = {
                "MaxBS": training_speed(speed, family, "largest batch"),
                "top1 @BS=32": score(small),
                "top1 @MaxBS": score(large),
                "train samples/s/GPU @BS=32": training_speed(speed, family, "images/s"),
                "train samples/s/GPU @MaxBS": training_speed(speed, family, "images/s in it"),
                "train params (M)": counted(arch, parameters),
                "inference params (M)": counted(arch, deployed_parameters),
            }
            measured_on_gpus = () if full else ("MaxBS", "train samples/s/GPU @MaxBS")
            rows.append(Row((label,), {name: cell for name, cell in cells.items() if name not in measured_on_gpus}))
    notes = (
        "The speed is measured by scripts/benchmark.py, alone on the machine, and so is the largest batch at full "
        "scale.",
        "The paper's are of a 2080Ti. Accuracy is that of batches of 32, and of the largest that fit on the paper's "
        "GPU."
        if full
        else "The large batches are of 100 images; parameters are with 1000 classes.",
    )
    return Experiment("RepOpt-VGG beside RepVGG in training", notes, table, tuple(rows))


def _table3(full: bool) -> Experiment:
    def efficientnet(name: str) -> Training:
        cfg = f"configs/imagenet/efficientnet_{name}.yaml" if full else TRAINED_ON_DIGITS
        settings = {} if full else {"TRAIN.BASE_LR": 0.012}
        return Training(
            f"efficientnet-{name}", f"timm/efficientnet_{name if full else 'b0'}", cfg, settings=settings, gpus=8
        )

    networks = {"RepOpt-VGG-B1": target(full), "EfficientNet-B2": efficientnet("b2")}
    if full:
        vgg16 = Training("vgg16", "torchvision/vgg16_bn", "configs/imagenet/vgg16.yaml", gpus=8)
        se = target(full, "L2").but(
            "target-l2-se", arch="RepOpt-VGG-L2-se-target", cfg="configs/imagenet/l2_se_target.yaml"
        )
        networks |= {
            "RepOpt-VGG-B2": target(full, "B2"),
            "VGGNet-16": vgg16,
            "RepOpt-VGG-L2": target(full, "L2"),
            "EfficientNet-B3": efficientnet("b3"),
            "RepOpt-VGG-L2 + SE": se,
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
    title = "Beside VGGNet-16 and EfficientNets under the same trainer (ImageNet)"
    return Experiment(title, notes, table, tuple(rows))


def _table4(full: bool) -> Experiment:
    def other(name: str, rate: float, demo_rate: float, **more: float) -> Training:
        settings = {f"TRAIN.OPTIMIZER.{key.upper()}": value for key, value in {"name": name, **more}.items()}
        return plain(full).but(name, settings | {"TRAIN.BASE_LR": rate if full else demo_rate})

    tuned = target(full).but("tuned", {} if full else {"TRAIN.BASE_LR": 0.12})
    ones = tuned.but("ones", {"TRAIN.CONSTANTS": "one"}, scales=None)
    initial = tuned.but("initial", {"TRAIN.CONSTANTS": "initial"}, scales=None)
    rep, searched = "RepOptimizer", "Hyper-Search"
    rows = {
        ("SGD", None, False, False): plain(full) if full else plain(full).but("sgd", {"TRAIN.BASE_LR": 0.04}),
        ("RMSprop", None, False, False): other("rmsprop", 0.001, 0.004, momentum=0.0),
        ("Adam", None, False, False): other("adam", 0.001, 0.004),
        ("AdamW", None, False, False): other("adamw", 0.001, 0.012),
        ("Adafactor", None, False, False): other("adafactor", 0.01, 0.12),
        (rep, searched, True, True): target(full) if full else tuned,
        (rep, searched, False, True): tuned.but("old-initialization", {"TRAIN.CHANGE_INITIALIZATION": False}),
        (rep, searched, True, False): tuned.but("old-gradients", {"TRAIN.CHANGE_GRADIENTS": False}),
        (rep, "all 1", True, True): ones,
        (rep, "same as HS initialization", True, True): initial,
        (rep, "average across channels", True, True): tuned.but("channel-mean", {"TRAIN.CONSTANTS": "channel-mean"}),
    }
    note = (
        "The paper gives no settings of the other optimizers: they have common defaults here."
        if full
        else "Learning rates are the best of five on a seed that is not shown, for every optimizer; the ablations have "
        "the RepOptimizer's."
    )
    return Experiment(
        "Which part of the RepOptimizer does what (RepOpt-VGG-B1 on ImageNet)",
        (note,),
        paper.read("table4_ablation_b1"),
        tuple(Row(labels, {"top1": score(training)}) for labels, training in rows.items()),
    )


def _table5(full: bool) -> Experiment:
    elsewhere = search_elsewhere(full)
    if full:
        caltech = search(full).but("search-caltech256", cfg="configs/hyper_search/b1_caltech256.yaml")
        on_caltech = target(full).but("caltech256", cfg="configs/caltech256/b1_target.yaml", gpus=1)
        rows = {
            ("ImageNet", "CIFAR-100"): target(full),
            ("ImageNet", "ImageNet"): target(full).but("target-search-imagenet", scales=elsewhere),
            ("ImageNet", "Caltech256"): target(full).but("target-search-caltech256", scales=caltech),
            ("Caltech256", "CIFAR-100"): on_caltech,
            ("Caltech256", "ImageNet"): on_caltech.but("caltech256-search-imagenet", scales=elsewhere),
            ("Caltech256", "Caltech256"): on_caltech.but("caltech256-search-caltech256", scales=caltech),
        }
    else:
        patches = target(full).but("patches", PATCHES)
        rows = {
            ("ImageNet", "ImageNet"): target(full),
            ("ImageNet", "Caltech256"): target(full).but("target-search-patches", scales=elsewhere),
            ("Caltech256", "ImageNet"): patches,
            ("Caltech256", "Caltech256"): patches.but("patches-search-patches", scales=elsewhere),
        }
    notes = (
        "The paper does not say how it splits Caltech256, nor how it searches and trains there; the recipes in "
        "configs/ say what is done here.",
        "At this scale digits stand for ImageNet, and patches of two photographs for Caltech256; CIFAR-100 has no "
        "counterpart.",
    )
    return Experiment(
        "Searched on one data set, trained on another (RepOpt-VGG-B1)",
        notes[:1] if full else notes,
        paper.read("table5_transfer_b1"),
        tuple(Row(labels, {"top1 on target": score(training)}) for labels, training in rows.items()),
    )


def _search_and_target(searched: Training, trained: Training) -> dict[str, Cell]:
    return {"HS top1 on CIFAR-100": score(searched), "target top1 on ImageNet": score(trained)}


def _table6(full: bool) -> Experiment:
    rows = [Row(([2, 2, 2, 2, 2],), _search_and_target(search(full), target(full)))]
    for strides in ((2, 2, 1, 2, 1), (2, 1, 2, 1, 1)):
        digits = "".join(map(str, strides))
        searched = search(full).but(f"search-{digits}", {"MODEL.STRIDES": strides})
        trained = target(full).but(f"target-{digits}", scales=searched)
        rows.append(Row(([*strides],), _search_and_target(searched, trained)))
    title = "Strides of the search model (RepOpt-VGG-B1)"
    return Experiment(title, table=paper.read("table6_hs_strides_b1"), rows=tuple(rows))


def _table7(full: bool) -> Experiment:
    data = {SEGMENT: "cityscapes", DETECT: "coco"} if full else dict.fromkeys((SEGMENT, DETECT), "scenes")
    networks = {
        "RepOpt-VGG-B1": ("", "target-norepopt", target(full)),
        "RepVGG-B1": ("-repvgg", "repvgg", repvgg(full)),
    }
    ours = ("RepOpt-VGG-B1, RepOptimizer throughout", "RepOpt-VGG-B1, plain SGD throughout")
    if not full:
        networks |= {
            ours[0]: ("-repopt", "target", target(full)),
            ours[1]: ("-plain", "target-norepopt", plain(full)),
        }
    rows = []
    for label, (suffix, mode, of) in networks.items():
        detector, segmenter = (
            Training(f"{name}{suffix}", _arch(full, mode), f"configs/{data[kind]}/{name}.yaml", kind, of=of, gpus=gpus)
            for kind, name, gpus in ((DETECT, "detect", 8), (SEGMENT, "segment", 4))
        )
        int8 = Training(f"int8{suffix}", None, f"configs/{data[SEGMENT]}/quantize.yaml", PTQ, of=segmenter)
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
        tuple(rows),
        ours=("mask mAP", "mIoU in INT8", *ours),
    )


def _table8(full: bool) -> Experiment:
    std, (own, baseline) = "std of kernel parameters (8th 3x3 layer of the 16-layer stage)", quantization(full, PTQ)
    networks = {
        "RepOpt-VGG-B1": (own, kernel_std(target(full), "batch norm folded", "std")),
        "RepVGG-B1": (baseline, kernel_std(repvgg(full), "after branch addition", "std")),
    }
    return Experiment(
        "After post-training quantization to INT8",
        ("The standard deviation is that of the deployed kernel of the 8th layer in the stage of 16.",),
        paper.read("table8_quantized"),
        tuple(
            Row((label,), {"INT8 PTQ top1": quantized(training, "INT8"), std: cell})
            for label, (training, cell) in networks.items()
        ),
    )


def _table9(full: bool) -> Experiment:
    ones = search(full).but("search-ones", {"MODEL.INITIAL_SCALES": "one"})
    rows = {
        "all 1": (ones, target(full).but("target-search-ones", scales=ones)),
        "sqrt(2/l)": (search(full), target(full)),
    }
    return Experiment(
        "Where the scales of the search begin (RepOpt-VGG-B1)",
        table=paper.read("table9_hs_init_b1"),
        rows=tuple(Row((label,), _search_and_target(*trainings)) for label, trainings in rows.items()),
    )


def _table10(full: bool) -> Experiment:
    pairs = zip(quantization(full, PTQ), quantization(full, QAT), strict=True)
    rows = []
    for label, (ptq, qat) in zip(("RepOpt-VGG-B1", "RepVGG-B1"), pairs, strict=True):
        cells = {"fp32 top1": quantized(ptq, "fp32"), "PTQ top1": quantized(ptq, "INT8")}
        rows.append(Row((label,), cells | {"QAT top1 (10 epochs)": quantized(qat, "INT8")}))
    title = "INT8 by post-training quantization and by training on"
    return Experiment(title, table=paper.read("table10_quantization_b1"), rows=tuple(rows))


def _table11(full: bool) -> Experiment:
    forms = [
        *(
            (f"RepVGG-B1 {form}", repvgg(full), form)
            for form in ("before BN fusion", "after BN fusion", "after branch addition")
        ),
        ("RepOpt-VGG-B1", target(full), "batch norm folded"),
    ]
    parts = {"overall": "std", "central": "central", "surrounding": "surrounding"}
    return Experiment(
        "Standard deviation of the weights of the 8th layer in the stage of 16",
        table=paper.read("table11_kernel_std"),
        rows=tuple(
            Row((label,), {column: kernel_std(training, form, part) for column, part in parts.items()})
            for label, training, form in forms
        ),
    )


def _table12(full: bool) -> Experiment:
    def cfg(name: str) -> str:
        return f"configs/imagenet/ghost_{name}.yaml" if full else TRAINED_ON_DIGITS

    search_cfg = "configs/hyper_search/ghost.yaml" if full else SEARCHED_ON_DIGITS
    searched = search(full).but("search-ghost", arch="ghost-hs", cfg=search_cfg)
    rows = {
        "RepGhostNet-0.5x + SGD": repvgg(full).but("repghost", arch="ghost-rep", cfg=cfg("rep")),
        "RepOpt-GhostNet-0.5x + RepOptimizer": target(full).but(
            "target-ghost", arch="ghost-target", cfg=cfg("target"), scales=searched
        ),
    }
    return Experiment(
        "RepGhostNet-0.5x",
        ("The release notes print 66.51 and 66.50 for the two.",),
        paper.read("table12_repghost_0_5x"),
        tuple(Row((label,), {"ImageNet top1": score(training)}) for label, training in rows.items()),
    )


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
    shown = {"RepOpt-VGG": target(full), "RepVGG": repvgg(full)}
    return Experiment("Weights of a kernel from training to deployment", draw=figures.kernels_on_their_way, shown=shown)


def _searches(full: bool) -> dict[str, Training]:
    names = ("CIFAR-100", "ImageNet") if full else ("digits", "patches of photographs")
    return {f"searched on {name}": run for name, run in zip(names, (search(full), search_elsewhere(full)), strict=True)}


def _figure6(full: bool) -> Experiment:
    title = "Scales by epoch in the last block of the third stage, searched on two data sets"
    return Experiment(title, draw=figures.scales_by_epoch, shown=_searches(full))


def _figure7(full: bool) -> Experiment:
    title = "Scales by depth, searched on two data sets"
    return Experiment(title, draw=figures.scales_by_depth, shown=_searches(full))


EXPERIMENTS: dict[str, Callable[[bool], Experiment]] = {
    "table 1": _table1,
    "table 2": _table2,
    "table 3": _table3,
    "table 4": _table4,
    "table 5": _table5,
    "table 6": _table6,
    "table 7": _table7,
    "table 8": _table8,
    "table 9": _table9,
    "table 10": _table10,
    "table 11": _table11,
    "table 12": _table12,
    "figure 3": _figure3,
    "figure 4": _figure4,
    "figure 5": _figure5,
    "figure 6": _figure6,
    "figure 7": _figure7,
}


def load(name: str, scale: str) -> Experiment:
    """Return the experiment of a table or figure ("table 4").

    Raises:
        UserError: there is none of that name.
    """
    if name not in EXPERIMENTS:
        raise unknown("table or figure", name, EXPERIMENTS)
    return EXPERIMENTS[name](scale == "full")
