import pytest
import torch

from data.sampler import EvalSampler, TrainSampler
from repopt.errors import UserError

WORLDS = (1, 2, 3, 4)


def train_samplers(n, batch, world, seed=0, sharded=False):
    return [TrainSampler(n, batch, rank, world, seed, sharded) for rank in range(world)]


def flat(sampler, epoch=0):
    return torch.cat((torch.empty(0, dtype=torch.long), *sampler.batches(epoch))).tolist()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("n", (1, 3, 4, 23, 24, 25))
def test_evaluation_sees_every_image_exactly_once(n, world):
    samplers = [EvalSampler(n, 5, rank, world) for rank in range(world)]
    assert sorted(i for s in samplers for i in flat(s)) == list(range(n))
    for rank, sampler in enumerate(samplers):
        assert flat(sampler) == list(range(rank, n, world))
        assert len(sampler.batches(0)) == -(-len(flat(sampler)) // 5)
        assert all(len(batch) == 5 for batch in list(sampler.batches(0))[:-1])


def test_some_images_are_drawn_by_the_seed_alone():
    drawn = [i for rank in range(3) for i in flat(EvalSampler(100, 4, rank, 3, max_images=10, seed=1))]
    assert len(set(drawn)) == 10
    assert set(drawn) == set(flat(EvalSampler(100, 7, 0, 1, max_images=10, seed=1)))
    assert set(drawn) != set(flat(EvalSampler(100, 7, 0, 1, max_images=10, seed=2)))
    assert sorted(flat(EvalSampler(5, 2, 0, 1, max_images=10))) == list(range(5))


@pytest.mark.parametrize("sharded", (False, True))
@pytest.mark.parametrize("world", WORLDS)
def test_training_is_disjoint_equally_long_and_in_full_batches(world, sharded):
    n, batch = 103, 6
    for epoch in (0, 1):
        parts = [flat(s, epoch) for s in train_samplers(n, batch, world, sharded=sharded)]
        steps = n // (batch * world)
        assert {len(part) for part in parts} == {steps * batch}
        used = [i for part in parts for i in part]
        assert len(set(used)) == len(used) == steps * batch * world
        assert set(used) <= set(range(n))
        for sampler in train_samplers(n, batch, world, sharded=sharded):
            assert len(sampler.batches(epoch)) == steps
            assert all(len(b) == batch for b in sampler.batches(epoch))


@pytest.mark.parametrize("world", (2, 3, 4))
def test_a_global_batch_is_the_same_images_whatever_the_world_size(world):
    n, global_batch = 100, 12
    (alone,) = train_samplers(n, global_batch, 1)
    together = [s.batches(3) for s in train_samplers(n, global_batch // world, world)]
    for step, batch in enumerate(alone.batches(3)):
        assert torch.equal(torch.cat([batches[step] for batches in together]), batch)


def test_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        return flat(TrainSampler(200, 10, 0, 1, seed), epoch)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)}) == 9
    assert order(0, 0) != list(range(200))


def test_every_image_is_left_out_at_times():
    left_out = set()
    for epoch in range(60):
        left_out |= set(range(10)) - set(flat(TrainSampler(10, 8, 0, 1, 0), epoch))
    assert left_out == set(range(10))


@pytest.mark.parametrize("world", (1, 2, 4))
def test_sharded_training_draws_from_the_cached_images_only(world):
    for rank, sampler in enumerate(train_samplers(50, 3, world, sharded=True)):
        shard = set(range(rank, 50, world))
        epochs = [flat(sampler, epoch) for epoch in range(20)]
        assert all(set(e) <= shard for e in epochs)
        assert set().union(*epochs) == shard
        assert epochs[0] != epochs[1]


def test_less_than_a_global_batch_is_refused_with_the_sizes():
    assert len(TrainSampler(30, 10, 0, 3, 0).batches(0)) == 1
    with pytest.raises(UserError, match=r"29 images.*batch size 10 x 3 processes"):
        TrainSampler(29, 10, 0, 3, 0)
