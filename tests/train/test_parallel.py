"""A model in two processes is trained alike, whether it is compiled or not."""

import shutil

import pytest
import torch
import torch.distributed as dist
from train_helpers import CPU, Listed, run_epoch, three_blocks

from train.compilation import compiled
from train.parallel import data_parallel


def gradients(rank, model, trained, accumulated):
    """After one step, in which every process has images of its own; the weights stay."""
    source = torch.Generator().manual_seed(rank)
    batches = [
        (torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=source), torch.randint(10, (4,), generator=source))
        for _ in range(accumulated)
    ]
    kept = {}

    def keep_gradients():
        kept.update({name: p.grad.clone() for name, p in model.named_parameters()})
        return torch.ones(())

    optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.0), Listed(batches)
    run_epoch(model, loader, optimizer, model=trained, clip=keep_gradients, TRAIN__ACCUMULATION_STEPS=accumulated)
    return kept


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    models = three_blocks("hs"), three_blocks("hs")
    ways = data_parallel(models[0], CPU), data_parallel(compiled(models[1], CPU), CPU)
    for accumulated in (1, 2):
        eager, by_program = (gradients(rank, *way, accumulated) for way in zip(models, ways, strict=True))
        for name, gradient in eager.items():
            torch.testing.assert_close(by_program[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
            mine, of_all = gradient.clone(), gradient.clone()
            dist.all_reduce(of_all)
            torch.testing.assert_close(of_all / 2, mine)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")
def test_compiled_in_two_processes(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
