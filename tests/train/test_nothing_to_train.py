"""Runs that could train nothing, or something else than is meant, are refused in one line."""

import main_repopt

ARCH = "RepOpt-VGG-nano-target-norepopt"
DIGITS = ("DATA.DATASET", "digits", "DATA.BATCH_SIZE", 150, "TRAIN.WARMUP_EPOCHS", 0)


def main(*arguments):
    return main_repopt.main([*map(str, arguments)])


def test_a_finished_training_is_not_resumed_elsewhere(tmp_path, capsys):
    common = ("--arch", ARCH, "--output", tmp_path)
    assert main(*common, "--tag", "a", "--opts", *DIGITS, "TRAIN.EPOCHS", 1) == 0
    finished = tmp_path / ARCH / "a" / "latest.pth"
    elsewhere = (*common, "--tag", "b", "--resume", finished)
    capsys.readouterr()
    assert main(*elsewhere, "--opts", *DIGITS, "TRAIN.EPOCHS", 1) == 2
    error = capsys.readouterr().err
    assert f"'{finished}' has trained 1 epochs, and TRAIN.EPOCHS is 1: nothing is left to train" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / ARCH / "b" / "latest.pth").exists()
    assert main(*common, "--tag", "a", "--opts", *DIGITS, "TRAIN.EPOCHS", 1) == 0  # the run itself says what it found
    assert main(*elsewhere, "--opts", *DIGITS, "TRAIN.EPOCHS", 2) == 0


def test_a_step_is_not_longer_than_an_epoch(tmp_path, capsys):
    """Its learning rate would be for images that it does not have."""
    steps = ("TRAIN.EPOCHS", 1, "TRAIN.ACCUMULATION_STEPS", 3)
    assert main("--arch", ARCH, "--output", tmp_path, "--opts", *DIGITS, *steps) == 2
    error = capsys.readouterr().err
    assert "TRAIN.ACCUMULATION_STEPS is 3, and an epoch has 2 batches: a step would have fewer images than its" in error
    assert len(error.splitlines()) == 1


def test_a_batch_norm_needs_two_values(tmp_path, capsys):
    """An image of 32 px is one pixel at the end of the network: a batch of one has no variance."""
    assert main("--arch", ARCH, "--output", tmp_path, "--batch-size", 1, "--opts", *DIGITS[:2]) == 2
    error = capsys.readouterr().err
    assert (
        "a batch norm would see one value per channel, which has no variance: train on batches of 2 at least" in error
    )
    assert len(error.splitlines()) == 1
