"""How far a search has come, when it is over, and what looks wrong in it."""

import json

import pytest
import torch
from test_cli import DIGITS, HS, TARGET, main
from test_one_run import SHORT, latest, one_run

import repopt
from repopt import checkpoint
from train import config
from train.search import Movement, movement, problems, search_is_over, start_of_search

START = {"a": torch.ones(3), "b": torch.ones(1)}


@pytest.mark.parametrize(
    ("epochs", "epoch", "settled", "over"),
    [
        (0, 5, True, False),
        (8, 7, True, False),
        (8, 8, False, True),
        ("auto", 0, True, False),
        ("auto", 3, False, False),
        ("auto", 3, True, True),
        ("auto", 4, False, True),  # a tenth of the training
    ],
)
def test_when_it_is_over(epochs, epoch, settled, over):
    cfg = config.build({"TRAIN.SEARCH_EPOCHS": epochs, "TRAIN.EPOCHS": 40}).cfg
    assert search_is_over(cfg, epoch, settled=settled) is over


def test_how_far_the_scales_moved():
    before = START | {"a": torch.tensor([1.0, 1.0, 4.0])}
    now = START | {"a": torch.tensor([1.0, 1.0, 5.0]), "kernel of an identity": torch.full((3,), 9.0)}
    assert movement(START, {}, now) == Movement(way=2.0, change=1.0)
    assert movement(START, before, now) == Movement(way=2.0, change=0.25)
    assert movement(START, {}, START) == Movement(way=0.0, change=0.0)
    assert movement({}, {}, now) == Movement(way=0.0, change=0.0)  # identities alone have no scales
    assert [Movement(1.0, change).settled for change in (0.25, 0.19)] == [False, True]


def test_it_begins_at_the_declared_scales():
    model = repopt.create_model("RepOpt-VGG-nano", mode="target", num_classes=10)
    searched = repopt.extract_scales(repopt.create_model("RepOpt-VGG-nano", mode="hs", num_classes=10))
    start = start_of_search(model)
    assert start.keys() == {name for name in searched if "identity" not in name}
    assert all(torch.equal(start[name], searched[name]) for name in start)


def test_what_looks_wrong():
    moved, still = Movement(0.5, 0.1), Movement(0.005, 1.0)
    assert not list(problems(START, START, fall=9.0, over=moved))
    assert not list(problems(START, START, fall=None, over=None))
    (dead,) = problems(START, START | {"b": torch.tensor([0.001])}, fall=None, over=None)
    assert dead == "1 branches of the search are dead, their scales all near 0, the first 'b'"
    (fallen,) = problems(START, START, fall=30.0, over=None)
    assert fallen.startswith("the score is 30.0 points below the best")
    (near,) = problems(START, START, fall=0.0, over=still)
    assert near.startswith("the search moved the scales by 0.50%")


def test_scales_that_are_all_within_a_percent_of_their_start_have_found_nothing():
    start = {"large": torch.full((3,), 8.0), "small": torch.full((400,), 0.01)}
    for signs in ({"large": 1, "small": 1}, {"large": -1, "small": 1}):
        near, far = ({name: s * (1 + signs[name] * part) for name, s in start.items()} for part in (0.0099, 0.0101))
        assert list(problems(start, near, fall=None, over=movement(start, {}, near)))
        assert not list(problems(start, far, fall=None, over=movement(start, {}, far)))


@pytest.mark.parametrize(("rate", "moves"), [(0.0, False), (2.0, True)])
def test_a_hyper_search_says_at_its_end_whether_it_has_moved(tmp_path, rate, moves):
    options = ("DATA.BATCH_SIZE", 100, "TRAIN.EPOCHS", 2, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.BASE_LR", rate)
    assert main("--arch", HS, "--output", tmp_path, "--opts", *DIGITS, *options) == 0
    log = (tmp_path / HS / "default" / "log_rank0.txt").read_text()
    assert log.count("the search moved the scales by 0.00%: they are nearly those at which it began") == (not moves)
    assert log.count("the search moved the scales") == (not moves)


def test_it_goes_on_where_it_stopped(tmp_path, stopping):
    options = ("TRAIN.SEARCH_EPOCHS", 3, "SAVE_EVERY_STEPS", 4)  # 3 steps an epoch
    assert one_run(tmp_path, "whole", *options) == 0
    with stopping():
        one_run(tmp_path, "part", *options)
    assert latest(tmp_path, "part")["search"]["scales"]
    assert one_run(tmp_path, "part", *options) == 0
    found = [
        [
            json.loads(line).get("search")
            for line in (tmp_path / TARGET / tag / "metrics.jsonl").read_text().splitlines()
        ]
        for tag in ("whole", "part")
    ]
    searches = [[record for record in records if record] for records in found]
    assert searches[0] == searches[1]
    assert searches[0][0]["change"] == 1
    assert len(searches[0]) == 3


def test_auto_ends_it_and_says_which_steps_were_of_it(tmp_path, capsys):
    assert one_run(tmp_path, "one", "TRAIN.SEARCH_EPOCHS", "auto", "PRINT_FREQ", 1) == 0
    records = [json.loads(line) for line in (tmp_path / TARGET / "one/metrics.jsonl").read_text().splitlines()]
    assert [record["train"]["searching"] for record in records if "train" in record] == [1] * 3 + [0] * 6
    content = latest(tmp_path, "one")
    assert checkpoint.state_dict_of(content, "scales")
    assert "search" not in content
    assert main("--arch", TARGET, "--output", tmp_path, "--opts", *DIGITS, *SHORT, "TRAIN.SEARCH_EPOCHS", "often") == 2
    assert "TRAIN.SEARCH_EPOCHS takes a value of type int or 'auto', not 'often'" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "shape", "not finite"])
def test_a_damaged_record_of_it_is_one_line(tmp_path, capsys, stopping, damage):
    options = ("TRAIN.SEARCH_EPOCHS", 3, "SAVE_EVERY_STEPS", 4)
    with stopping():
        one_run(tmp_path, "part", *options)
    content = latest(tmp_path, "part")
    scales = content["search"]["scales"]
    name = next(iter(scales))
    value = scales.pop(name)
    if damage != "missing":
        scales[name] = value[1:] if damage == "shape" else value * float("nan")
    checkpoint.write(content, tmp_path / TARGET / "part" / "latest.pth")
    assert one_run(tmp_path, "part", *options, "SAVE_KEEP", 1) == 2
    assert "the scales do not fit the model" in capsys.readouterr().err
