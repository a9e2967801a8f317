"""An epoch that stops and goes on, perhaps with another number of processes, is the epoch that did not stop."""

import copy
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_helpers import EPOCH, assert_equal, batches, eval_loader, train_loader

from data import Augmentation, Source, sampler
from data.sampler import TrainSampler
from repopt.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
MIXED = Augmentation(mixup=0.8, cutmix=1.0, reprob=0.5)
PLAIN = Augmentation(reprob=0.5)
KINDS = ("resident", "decoded", "decoded by workers")


def make(kind, root, augmentation=MIXED, batch_size=4, **changes):
    resident = kind == "resident"
    return train_loader(
        Source("digits") if resident else Source("folder", str(root)),
        augmentation,
        image_size=32 if resident else 24,
        interpolation="bilinear",
        batch_size=batch_size,
        num_classes=12,
        label_smoothing=0.1,
        device=CPU,
        num_workers=2 if kind == "decoded by workers" else 0,
        **changes,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_epoch_goes_on_bit_for_bit(kind, image_folder):
    whole = batches(make(kind, image_folder))
    stopped = make(kind, image_folder)
    stopped.set_epoch(EPOCH)
    assert (len(stopped), stopped.images_seen, stopped.images_per_batch) == (len(whole), 0, 4)
    first = list(itertools.islice(iter(stopped), 2))
    seen = json.loads(json.dumps(stopped.position_after(2)))
    fresh = make(kind, image_folder)
    assert_equal(first + batches(fresh, seen=seen), whole)
    assert (len(fresh), fresh.images_seen) == (len(whole) - 2, 8)

    # Stopped again, and in the loader that has batches prefetched.
    further = fresh.position_after(3)
    assert_equal(batches(stopped, seen=further), whole[5:])
    assert further == [{"processes": 1, "images": 20, "sharded": False}]
    end = fresh.position_after(len(fresh))
    assert batches(stopped, seen=end) == []
    assert stopped.position_after(0) == end
    assert_equal(batches(stopped), whole)


def test_the_way_of_decoding_makes_no_difference(image_folder):
    expected = batches(make("decoded", image_folder))
    assert_equal(batches(make("decoded by workers", image_folder)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_see_the_batches_of_one(kind, image_folder):
    for seen in ((), [{"processes": 3, "images": 2, "sharded": False}]):
        ranks = [batches(make(kind, image_folder, rank=r, world_size=2), seen=seen) for r in range(2)]
        alternate = [batch for step in zip(*ranks, strict=True) for batch in step]
        assert_equal(alternate, batches(make(kind, image_folder), seen=seen)[: len(alternate)])

        ranks = [batches(make(kind, image_folder, PLAIN, rank=r, world_size=2), seen=seen) for r in range(2)]
        joined = [tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*ranks, strict=True)]
        assert_equal(joined, batches(make(kind, image_folder, PLAIN, batch_size=8), seen=seen))


def test_positions_are_those_of_the_loaders_own_epoch_and_world(image_folder):
    loader = make("decoded", image_folder, rank=1, world_size=3, batch_size=2)
    seen = [{"processes": 4, "images": 1, "sharded": True}]
    loader.set_epoch(0, seen)
    assert (loader.images_seen, loader.images_per_batch, len(loader)) == (4, 6, 3)
    assert loader.position_after(0) == seen
    after = loader.position_after(2)
    assert after == [*seen, {"processes": 3, "images": 4, "sharded": False}]
    after[0]["images"] = 7
    assert loader.position_after(0) == seen == [{"processes": 4, "images": 1, "sharded": True}]
    loader.set_epoch(1)
    assert (loader.images_seen, len(loader), loader.position_after(0)) == (0, 4, [])


def test_the_fingerprint_follows_from_the_labels(image_folder):
    one = make("decoded", image_folder)
    assert one.fingerprint == make("decoded", image_folder, rank=1, world_size=2).fingerprint
    assert len(one.fingerprint) == 16
    common = {"image_size": 32, "interpolation": "bilinear", "num_classes": 12, "device": CPU, "num_workers": 0}
    val = eval_loader(Source("digits"), crop=False, batch_size=5, **common)
    assert len({one.fingerprint, make("resident", None).fingerprint, val.fingerprint}) == 3


def run_segment(n, batch, world, sharded, seen, max_batches):
    """Indices that each rank takes in at most `max_batches` batches, what they leave, and the position afterwards."""
    samplers = [TrainSampler(n, batch, rank, world, 5, sharded) for rank in range(world)]
    ranks = [of_rank.batches(EPOCH, seen)[:max_batches] for of_rank in samplers]
    (steps,) = {len(b) for b in ranks}
    taken = [torch.cat(b).tolist() if b else [] for b in ranks]
    return taken, steps, sampler.advanced(seen, processes=world, images=steps * batch, sharded=sharded)


@pytest.mark.parametrize("kinds", [(False,), (True,), (False, True), (True, False, False, True)], ids=str)
@pytest.mark.parametrize("worlds", [(4, 2, 3, 1), (1, 3, 2, 4), (3, 3, 2, 2), (7, 5, 1, 6)], ids=str)
@pytest.mark.parametrize(("n", "batch"), [(211, 3), (96, 2), (500, 4)])
def test_no_image_comes_twice_and_none_is_left_out_that_fills_a_batch(worlds, kinds, n, batch):
    seen, taken = [], set()
    segments = list(zip(worlds, itertools.cycle(kinds), strict=False))
    for number, (world, sharded) in enumerate(segments):
        last = number == len(segments) - 1
        ranks, steps, seen = run_segment(n, batch, world, sharded, seen, max_batches=None if last else 2 + number)
        for rank, indices in enumerate(ranks):
            assert len(indices) == steps * batch
            assert not taken & set(indices)
            assert len(set(indices)) == len(indices)
            assert not sharded or all(index % world == rank for index in indices)
            taken |= set(indices)
        assert sampler.images_seen(seen) == len(taken)
    left = set(range(n)) - taken
    if sharded:  # some rank has less than a batch left
        assert min(sum(index % world == rank for index in left) for rank in range(world)) < batch
    else:
        assert len(left) < batch * world
    ranks, steps, after = run_segment(n, batch, world, sharded, seen, max_batches=None)
    assert (ranks, steps, after) == ([[]] * world, 0, seen)


def test_fewer_processes_that_divide_the_former_lose_less_than_a_global_batch():
    seen = []
    for world in (8, 4, 2, 1):
        _, _, seen = run_segment(1000, 4, world, True, seen, max_batches=None if world == 1 else 10)
    assert 1000 - sampler.images_seen(seen) < 4


def test_a_large_set_takes_little_time():
    segments = [{"processes": 64, "images": 1000, "sharded": True}, {"processes": 48, "images": 500, "sharded": False}]
    large = TrainSampler(1_281_167, 32, 5, 24, 0, True)
    assert len(large.batches(0, segments)) > 1500


@pytest.mark.parametrize(
    "segment",
    [
        {},
        [],
        None,
        (1, 2, False),
        {"processes": 1, "images": 4},
        {"processes": 1, "images": 4, "sharded": False, "more": 1},
        {"processes": 0, "images": 4, "sharded": False},
        {"processes": -1, "images": -4, "sharded": False},
        {"processes": 1, "images": 0, "sharded": False},
        {"processes": 1.0, "images": 4, "sharded": False},
        {"processes": True, "images": 4, "sharded": False},
        {"processes": 1, "images": "4", "sharded": False},
        {"processes": 1, "images": 4, "sharded": 0},
        {"processes": 1, "images": torch.tensor(4), "sharded": False},
    ],
)
def test_malformed_segments_are_refused(segment, image_folder):
    loader = make("decoded", image_folder)
    fine = {"processes": 1, "images": 4, "sharded": False}
    with pytest.raises(UserError, match=r"^segment 2 of the position in the epoch is malformed: .*$"):
        loader.set_epoch(0, [fine, segment])
    assert (len(loader), loader.position_after(0)) == (6, [])


@pytest.mark.parametrize("seen", [None, {}, "segments", 3, {"processes": 1, "images": 4, "sharded": False}])
def test_malformed_positions_are_refused(seen, image_folder):
    with pytest.raises(UserError, match=r"^the position in the epoch is no list of segments$"):
        make("decoded", image_folder).set_epoch(0, seen)


@pytest.mark.parametrize(
    "seen",
    [
        [{"processes": 1, "images": 25, "sharded": False}],
        [{"processes": 5, "images": 5, "sharded": False}],
        [{"processes": 5, "images": 5, "sharded": True}],
        [{"processes": 10**5000, "images": 1, "sharded": True}],
        [{"processes": 1, "images": 20, "sharded": False}, {"processes": 24, "images": 1, "sharded": True}],
        [{"processes": 23, "images": 1, "sharded": False}, {"processes": 1, "images": 2, "sharded": False}],
        # Three are left: not one of each remainder by 3, as the order of this epoch happens to be.
        [{"processes": 1, "images": 21, "sharded": False}, {"processes": 3, "images": 1, "sharded": True}],
    ],
)
def test_positions_of_more_images_than_there_are_are_refused(seen, image_folder):
    loader = make("decoded", image_folder)
    untouched = copy.deepcopy(seen)
    with pytest.raises(UserError, match=r"^the position in the epoch takes more images than .* 24 allow$"):
        loader.set_epoch(0, seen)
    assert seen == untouched


def send_from_outside(name, pid):
    subprocess.run([sys.executable, "-c", f"import os, signal; os.kill({pid}, signal.{name})"], check=True)


def test_workers_do_not_heed_the_signals_that_end_a_run(image_folder):
    expected = batches(make("decoded", image_folder))
    loader = make("decoded by workers", image_folder)
    loader.set_epoch(EPOCH)
    iteration = iter(loader)
    found = [next(iteration)]
    workers = loader._workers._iterator._workers
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGTERM"):
        for worker in workers:
            send_from_outside(name, worker.pid)
    assert_equal(found + list(iteration), expected)
    assert_equal(batches(loader), expected)
    assert all(worker.is_alive() for worker in workers)

    os.kill(workers[0].pid, signal.SIGTERM)  # from the main process: as when it ends with workers left
    workers[0].join(10)
    assert workers[0].exitcode == 0


END = """
import sys, torch
from data import Classification, Source, train_loader

def main():
    images = Classification(Source("folder", sys.argv[1]), image_size=24, num_classes=12)
    loader = train_loader(images, batch_size=4, device=torch.device("cpu"), num_workers=2)
    print(*(w.pid for w in (iter(loader).__next__(), loader._workers._iterator._workers)[1]), flush=True)
    raise RuntimeError("the frame, and so the loader, lives on in the traceback")

main()
"""


def test_a_run_that_fails_ends_with_its_workers(image_folder):
    ended = subprocess.run(
        [sys.executable, "-c", END, str(image_folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "lives on in the traceback" in ended.stderr
    pids = ended.stdout.split()
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
