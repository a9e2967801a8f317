"""Configuration: the published keys, their precedence, and mistakes."""

import shlex
from pathlib import Path

import pytest

from repopt.errors import UserError
from repopt.models import parse_arch
from train import config
from train.command import EXIT_USAGE_ERROR, MAIN
from train.compilation import COMPILE_MODES
from train.keys import KEYS, Key, flags_of
from train.resolve import resolve
from train.resume import check_same_run

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PUBLISHED = {
    "BASE": [""],
    "DATA": {
        "BATCH_SIZE": 128, "DATA_PATH": "", "DATASET": "imagenet", "IMG_SIZE": 224, "TEST_SIZE": None,
        "TEST_BATCH_SIZE": None, "INTERPOLATION": "bilinear", "ZIP_MODE": False, "CACHE_MODE": "part",
        "PIN_MEMORY": True, "NUM_WORKERS": 8,
    },
    "MODEL": {"ARCH": "RepOpt-VGG-B1", "RESUME": "", "NUM_CLASSES": 1000, "LABEL_SMOOTHING": 0.1},
    "TRAIN": {
        "START_EPOCH": 0, "EPOCHS": 300, "WARMUP_EPOCHS": 20, "WEIGHT_DECAY": 0.05, "BASE_LR": 5e-4, "WARMUP_LR": 0.0,
        "MIN_LR": 0.0, "CLIP_GRAD": 0.0, "AUTO_RESUME": True, "ACCUMULATION_STEPS": 0, "USE_CHECKPOINT": False,
        "LR_SCHEDULER": {"NAME": "cosine", "DECAY_EPOCHS": 30, "DECAY_RATE": 0.1},
        "OPTIMIZER": {"NAME": "sgd", "EPS": 1e-8, "BETAS": (0.9, 0.999), "MOMENTUM": 0.9},
        "EMA_ALPHA": 0.0, "EMA_UPDATE_PERIOD": 8, "SCALES_PATH": None,
    },
    "AUG": {
        "MIXUP": 0.0, "CUTMIX": 0.0, "CUTMIX_MINMAX": None, "MIXUP_PROB": 1.0, "MIXUP_SWITCH_PROB": 0.5,
        "MIXUP_MODE": "batch", "PRESET": None, "COLOR_JITTER": 0.4, "AUTO_AUGMENT": "rand-m9-mstd0.5-inc1",
        "REPROB": 0.25, "REMODE": "pixel", "RECOUNT": 1,
    },
    "TEST": {"CROP": False},
    "AMP_OPT_LEVEL": "", "OUTPUT": "", "TAG": "default", "SAVE_FREQ": 20, "PRINT_FREQ": 10, "SEED": 0,
    "EVAL_MODE": False, "THROUGHPUT_MODE": False,
}  # fmt: skip


def test_published_keys_and_defaults():
    def compare(expected, found):
        for name, value in expected.items():
            if isinstance(value, dict):
                compare(value, found[name])
            else:
                assert (found[name], type(found[name])) == (value, type(value)), name

    compare(PUBLISHED, config.as_dict(config.parse([]).cfg))


def parse(line):
    return config.parse(shlex.split(line)).cfg


def test_published_command_lines():
    search = parse(
        """--data-path CIFAR --arch RepOpt-VGG-B1-hs --batch-size 128 --tag search --opts TRAIN.EPOCHS 240
        TRAIN.BASE_LR 0.1 TRAIN.WEIGHT_DECAY 4e-5 TRAIN.WARMUP_EPOCHS 10 MODEL.LABEL_SMOOTHING 0.1 DATA.DATASET cf100
        TRAIN.CLIP_GRAD 5.0"""
    )
    assert (search.MODEL.ARCH, search.TRAIN.EPOCHS, search.TRAIN.WEIGHT_DECAY) == ("RepOpt-VGG-B1-hs", 240, 4e-5)
    target = parse(
        """--local_rank 0 --data-path IMAGENET --arch RepOpt-VGG-B1-target --batch-size 32 --tag experiment
        --scales-path output/RepOpt-VGG-B1-hs/search/latest.pth --opts TRAIN.EPOCHS 120 AUG.PRESET raug15
        DATA.DATASET imagenet"""
    )
    assert target.TRAIN.SCALES_PATH == "output/RepOpt-VGG-B1-hs/search/latest.pth"
    assert target.AUG.PRESET == "raug15"
    flags = parse(
        """--local-rank=3 --eval --throughput --zip --use-checkpoint --cache-mode full --accumulation-steps 4
        --amp-opt-level O0 --resume a.pth --output out"""
    )
    assert all((flags.EVAL_MODE, flags.THROUGHPUT_MODE, flags.DATA.ZIP_MODE, flags.TRAIN.USE_CHECKPOINT))
    assert (flags.DATA.CACHE_MODE, flags.TRAIN.ACCUMULATION_STEPS, flags.AMP_OPT_LEVEL) == ("full", 4, "O0")
    assert (flags.MODEL.RESUME, flags.OUTPUT) == ("a.pth", "out")


def test_precedence(tmp_path):
    (tmp_path / "base.yaml").write_text("TRAIN:\n  EPOCHS: 1\n  WARMUP_EPOCHS: 1\nTAG: base\nSEED: 1\n")
    (tmp_path / "top.yaml").write_text("BASE: [base.yaml]\nTRAIN:\n  WARMUP_EPOCHS: 2\nTAG: file\nSEED: 2\n")
    settings = config.parse(
        ["--cfg", str(tmp_path / "top.yaml"), "--tag", "flag", "--opts", "TAG", "opts", "SEED", "4"]
    )
    cfg = settings.cfg
    assert (cfg.TRAIN.EPOCHS, cfg.TRAIN.WARMUP_EPOCHS, cfg.TAG, cfg.SEED) == (1, 2, "opts", 4)
    assert settings.given == {"TRAIN.EPOCHS", "TRAIN.WARMUP_EPOCHS", "TAG", "SEED"}
    assert config.parse(["--cfg", str(tmp_path / "top.yaml"), "--tag", "flag"]).cfg.TAG == "flag"
    assert config.parse(["--cfg", str(tmp_path / "top.yaml")]).cfg.DATA.BATCH_SIZE == 128
    assert config.parse(["--opts", "SEED", "3", "--tag", "t", "--opts", "TAG", "u"]).given == {"SEED", "TAG"}


EPOCHS, STEPS = "TRAIN.WARMUP_EPOCHS", "TRAIN.WARMUP_STEPS"
BY_DEFAULT = {EPOCHS: 20, STEPS: None}


@pytest.mark.parametrize(
    ("base", "recipe", "opts", "expected"),
    [
        ({}, {EPOCHS: 3}, {STEPS: 100}, {STEPS: 100}),
        ({}, {STEPS: 100}, {EPOCHS: 3}, {EPOCHS: 3}),
        ({EPOCHS: 3}, {STEPS: 100}, {}, {STEPS: 100}),
        ({STEPS: 100}, {EPOCHS: 3}, {}, {EPOCHS: 3}),
        ({STEPS: 100}, {EPOCHS: 3}, {STEPS: 200}, {STEPS: 200}),
        ({}, {STEPS: 100}, {STEPS: None}, {STEPS: None}),
        ({}, {STEPS: 100}, {STEPS: None, EPOCHS: 3}, {STEPS: None, EPOCHS: 3}),
        ({}, {EPOCHS: 3}, {STEPS: None}, {STEPS: None, EPOCHS: 3}),
        ({EPOCHS: 3, STEPS: 100}, {}, {EPOCHS: 4}, {EPOCHS: 4}),
        ({}, {}, {EPOCHS: 3, STEPS: 100}, None),
        ({}, {EPOCHS: 3, STEPS: 100}, {}, None),
        ({EPOCHS: 3, STEPS: 100}, {}, {}, None),
    ],
)
def test_the_warm_up_that_is_said_last_is_taken(tmp_path, base, recipe, opts, expected):
    """Epochs or steps: what is given on a higher level; both are refused where they are given on one."""
    for name, values in (("base", base), ("top", recipe)):
        lines = [f"  {key.removeprefix('TRAIN.')}: {value}\n" for key, value in values.items()]
        more = "BASE: base.yaml\n" if name == "top" else "TAG: a\n"
        (tmp_path / f"{name}.yaml").write_text(f"{more}TRAIN:\n  EPOCHS: 30\n{''.join(lines)}")
    arguments = ["--arch", "RepOpt-VGG-nano-hs", "--cfg", tmp_path / "top.yaml", "--opts", "DATA.DATASET", "digits"]
    arguments += [word for pair in opts.items() for word in pair]
    settings = config.parse([*map(str, arguments)])
    if expected is None:
        with pytest.raises(UserError, match=rf"^{EPOCHS} and {STEPS} are given side by side.*: give one$"):
            resolve(settings)
        return
    cfg = resolve(settings)
    assert {key: config.lookup(cfg, key) for key in BY_DEFAULT} == BY_DEFAULT | expected
    assert settings.given & {*BY_DEFAULT} == {*expected}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("TRAIN.CLIP_GRAD", "5", 5.0),
        ("TRAIN.WEIGHT_DECAY", "4e-5", 4e-5),
        ("TRAIN.OPTIMIZER.BETAS", "(0.9, 0.95)", (0.9, 0.95)),
        ("TRAIN.OPTIMIZER.BETAS", "[0.9, 0.95]", (0.9, 0.95)),
        ("DATA.TEST_SIZE", "320", 320),
        ("DATA.TEST_SIZE", "None", None),
        ("AUG.PRESET", "None", None),
        ("AUG.PRESET", "none", "none"),
        ("TAG", "2024", "2024"),
        ("TRAIN.AUTO_RESUME", "False", False),
    ],
)
def test_values_from_the_command_line(key, text, value):
    cfg = config.parse(["--opts", key, text]).cfg
    *path, leaf = key.split(".")
    for part in path:
        cfg = cfg[part]
    assert cfg[leaf] == value
    assert type(cfg[leaf]) is type(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--opts", "TRAIN.EPOCH", "3"], "unknown config key 'TRAIN.EPOCH'; did you mean 'TRAIN.EPOCHS'"),
        (["--opts", "TRAIN", "3"], "unknown config key 'TRAIN'"),
        (["--opts", "TRAIN.EPOCHS", "3.5"], "TRAIN.EPOCHS takes a value of type int, not 3.5"),
        (["--opts", "TRAIN.AUTO_RESUME", "1"], "TRAIN.AUTO_RESUME takes a value of type bool, not 1"),
        (["--opts", "TRAIN.EPOCHS", "__import__('os')"], "TRAIN.EPOCHS takes a value of type int"),
        (["--opts", "SAVE_FREQ", "0"], "SAVE_FREQ is a number from 1 on, not 0"),
        (["--opts", "SEED", "-1"], "SEED is a number from 0 on, not -1"),
        (["--opts", "TRAIN.BASE_LR", "float('nan')"], "TRAIN.BASE_LR takes a value of type float"),
        (["--opts", "TRAIN.BASE_LR", "1e999"], "TRAIN.BASE_LR is a number from 0 on, not inf"),
        (["--opts", "TRAIN.OPTIMIZER.BETAS", "(0.9,)"], "TRAIN.OPTIMIZER.BETAS takes 2 numbers"),
        (["--opts", "TRAIN.OPTIMIZER.BETAS", "('a', 'b')"], "TRAIN.OPTIMIZER.BETAS takes 2 numbers"),
        (["--opts", "MODEL.LABEL_SMOOTHING", "3"], "MODEL.LABEL_SMOOTHING is a number from 0 to 1, not 3"),
        (["--opts", "SEED", str(2**70)], "SEED is a number from 0"),
        (["--opts", "TRAIN.EPOCHS", "{[]:1}"], "TRAIN.EPOCHS takes a value of type int"),
        (["--opts", "BASE", "['a.yaml']"], "BASE stands in a recipe"),
        (["--opts", "TRAIN.EPOCHS"], "stands alone"),
        (["--cache-mode", "all"], "unknown value of DATA.CACHE_MODE 'all'.*allowed: full, no, part"),
        (["--cfg", "nothing.yaml"], "there is no recipe 'nothing.yaml'"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        config.parse(arguments)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--batchsize", "unknown flag '--batchsize'; did you mean '--batch-size'?"),
        ("--ta", "unknown flag '--ta'; did you mean '--tag'?"),
        ("--seed", "unknown flag '--seed'"),
    ],
)
def test_wrong_flags(argument, message, capsys):
    with pytest.raises(SystemExit) as end:
        config.parse([argument, "3"])
    assert end.value.code == EXIT_USAGE_ERROR
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TRAIN:\n  EPOCHES: 3\n", r"unknown config key 'TRAIN.EPOCHES'; did you mean 'TRAIN.EPOCHS'\? in"),
        ("TRAIN: 3\n", "unknown config key 'TRAIN'"),
        ("TAG: !!python/object/apply:os.mkdir ['executed']\n", "no plain YAML"),
        ("a: [\n", "no plain YAML"),
        ("", "holds no keys"),
        ("BASE: me.yaml\n", "builds upon itself"),
        ("BASE: 3\n", "lists recipes, not 3"),
        ("TAG: 2026-13-01\n", "no plain YAML"),
    ],
)
def test_bad_recipes(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        config.parse(["--cfg", str(tmp_path / "me.yaml")])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_loads_and_says_how_it_is_run(path):
    settings = config.parse(["--cfg", str(path)])
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert header
    if "MODEL.ARCH" in settings.given:
        parse_arch(settings.cfg.MODEL.ARCH)
        assert any(f"--cfg configs/{path.parent.name}/{path.name}" in line for line in header)


@pytest.mark.parametrize("name", ["b1", "b2", "l1", "l2"])
def test_vgg_recipes_are_the_papers(name):
    cfg = config.parse(["--cfg", str(ROOT / "configs" / "imagenet" / f"{name}_target.yaml")]).cfg
    assert (cfg.DATA.BATCH_SIZE, cfg.DATA.IMG_SIZE, cfg.TRAIN.EPOCHS, cfg.TRAIN.WARMUP_EPOCHS) == (32, 224, 120, 5)
    assert (cfg.TRAIN.BASE_LR, cfg.TRAIN.WEIGHT_DECAY, cfg.MODEL.LABEL_SMOOTHING) == (0.1, 4e-5, 0.1)
    assert (cfg.TRAIN.OPTIMIZER.NAME, cfg.TRAIN.OPTIMIZER.MOMENTUM, cfg.AUG.PRESET) == ("sgd", 0.9, "raug15")
    cfg = config.parse(["--cfg", str(ROOT / "configs" / "hyper_search" / f"{name}.yaml")]).cfg
    assert (cfg.DATA.DATASET, cfg.TRAIN.EPOCHS, cfg.TRAIN.WARMUP_EPOCHS) == ("cf100", 240, 10)
    assert (cfg.TRAIN.BASE_LR, cfg.TRAIN.WEIGHT_DECAY, cfg.TRAIN.CLIP_GRAD) == (0.1, 4e-5, 5.0)


def test_ghost_recipes_are_the_papers():
    cfg = config.parse(["--cfg", str(ROOT / "configs" / "imagenet" / "ghost_target.yaml")]).cfg
    assert (cfg.DATA.BATCH_SIZE, cfg.TRAIN.EPOCHS, cfg.TRAIN.WARMUP_EPOCHS, cfg.TRAIN.WARMUP_LR) == (128, 300, 5, 1e-4)
    assert (cfg.TRAIN.BASE_LR, cfg.TRAIN.WEIGHT_DECAY, cfg.MODEL.LABEL_SMOOTHING) == (0.6, 1e-5, 0.1)
    assert (cfg.AUG.PRESET, cfg.AUG.AUTO_AUGMENT, cfg.AUG.COLOR_JITTER) == (None, "none", 0.4)
    assert (cfg.AUG.REPROB, cfg.AUG.REMODE, cfg.DATA.INTERPOLATION, cfg.TEST.CROP) == (0.2, "pixel", "random", True)
    cfg = config.parse(["--cfg", str(ROOT / "configs" / "hyper_search" / "ghost.yaml")]).cfg
    assert (cfg.DATA.DATASET, cfg.DATA.BATCH_SIZE, cfg.TRAIN.EPOCHS, cfg.TRAIN.WARMUP_EPOCHS) == ("cf100", 128, 600, 10)
    assert (cfg.TRAIN.BASE_LR, cfg.TRAIN.WEIGHT_DECAY, cfg.TRAIN.CLIP_GRAD) == (0.6, 1e-5, 5.0)


def test_recipes_that_are_no_text(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"TAG: \xff\xfe")
    with pytest.raises(UserError, match="no plain YAML"):
        config.parse(["--cfg", str(tmp_path / "bytes.yaml")])


def test_settings_are_not_changed():
    settings = config.parse(["--tag", "mine"])
    changed = settings.with_values({"TRAIN.EPOCHS": "7", "TAG": "other"}).with_defaults({"TAG": "third", "SEED": 3})
    assert (changed.cfg.TRAIN.EPOCHS, changed.cfg.TAG, changed.cfg.SEED, changed.given) == (7, "other", 3, {"TAG"})
    assert (settings.cfg.TRAIN.EPOCHS, settings.cfg.TAG, settings.cfg.SEED) == (300, "mine", 0)
    with pytest.raises(UserError, match="SEED is a number"):
        settings.with_values({"SEED": -1})
    with pytest.raises(AttributeError, match="immutable"):
        settings.cfg.TRAIN.EPOCHS = 3


def test_resolving_changes_nothing(tmp_path):
    settings = config.parse(
        ["--arch", "RepOpt-VGG-nano-hs", "--output", str(tmp_path), "--opts", "DATA.DATASET", "digits"]
    )
    before = config.as_dict(settings.cfg)
    cfg = resolve(settings)
    assert config.as_dict(settings.cfg) == before
    assert (cfg.MODEL.NUM_CLASSES, cfg.DATA.TEST_SIZE, cfg.DATA.TEST_BATCH_SIZE, cfg.TRAIN.ACCUMULATION_STEPS) == (
        10, 32, 128, 1,
    )  # fmt: skip
    assert Path(cfg.OUTPUT) == tmp_path / "RepOpt-VGG-nano-hs" / "default"
    assert resolve(settings) == cfg
    with pytest.raises(AttributeError, match="immutable"):
        cfg.TRAIN.EPOCHS = 3


def test_a_key_is_declared_once(monkeypatch, tmp_path):
    """What is declared in KEYS alone is set by recipes, flags and --opts, checked, resolved, kept and compared."""
    monkeypatch.setitem(KEYS, "TRAIN.NEW.KEY", Key(3, "A new key.", flag="--new-key", minimum=1))
    program = MAIN._replace(flags=flags_of("classify"))
    (tmp_path / "new.yaml").write_text("TRAIN:\n  NEW:\n    KEY: 4\n")
    assert config.parse([]).cfg.TRAIN.NEW.KEY == 3
    assert config.parse(["--cfg", str(tmp_path / "new.yaml")]).cfg.TRAIN.NEW.KEY == 4
    assert config.parse(["--new-key", "5"], program).cfg.TRAIN.NEW.KEY == 5
    settings = config.parse(shlex.split("--arch RepOpt-VGG-nano-hs --opts TRAIN.NEW.KEY 6 DATA.DATASET digits"))
    assert config.as_dict(resolve(settings))["TRAIN"]["NEW"] == {"KEY": 6}
    with pytest.raises(UserError, match=r"TRAIN.NEW.KEY is a number from 1 on, not 0"):
        config.parse(["--opts", "TRAIN.NEW.KEY", "0"])
    monkeypatch.setitem(KEYS, "TRAIN.NEW.KEY", KEYS["TRAIN.NEW.KEY"]._replace(immutable_on_resume=True))
    with pytest.raises(UserError, match=r"TRAIN.NEW.KEY was 6 in the checkpoint and is 3 now"):
        check_same_run(config.parse(["--arch", "RepOpt-VGG-nano-hs"]).cfg, {"config": {"TRAIN": {"NEW": {"KEY": 6}}}})


def test_help_of_keys_stands_alone():
    assert all(key.help[0].isupper() or key.help[0].isdigit() for key in KEYS.values())
    assert all(key.help.endswith(".") for key in KEYS.values())


def test_compile_modes_are_those_that_the_engine_knows():
    assert KEYS["TRAIN.COMPILE"].choices == ("auto", "off", *COMPILE_MODES)


def test_a_key_of_an_earlier_version_is_taken_with_a_warning(tmp_path):
    recipe = tmp_path / "old.yaml"
    recipe.write_text("TRAIN:\n  MOST_SKIPPED_STEPS: 7\n")
    with pytest.warns(FutureWarning, match="MOST_SKIPPED_STEPS is called TRAIN.MAX_SKIPPED_STEPS now"):
        assert config.parse(["--cfg", str(recipe)]).cfg.TRAIN.MAX_SKIPPED_STEPS == 7
    with pytest.warns(FutureWarning):
        assert config.parse(["--opts", "TRAIN.MOST_SKIPPED_STEPS", "8"]).cfg.TRAIN.MAX_SKIPPED_STEPS == 8
