"""Accelerate under FSDP2, in two processes: the kernels of the network with branches, with the clip of all gradients.

torchrun --nproc_per_node 2 tests/integrations/fsdp2.py RULE
"""

import sys

import loops
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

import repopt
from repopt.layers import RepConv2d

plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy=lambda module, **_: isinstance(module, RepConv2d), reshard_after_forward=True
)
accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
# Which it chooses on GPUs alone.
accelerator.state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
task = loops.Task("compact", sys.argv[1], max_norm=0.5)
model = loops.begun("target")
model, optimizer = accelerator.prepare(model, task.optimizer(model))
for batch in loops.batches():
    optimizer.zero_grad()
    accelerator.backward(model(**batch)["loss"])
    optimizer.step()
expected = loops.expected(task.rule, task.parts, task.max_norm)
with torch.no_grad():
    for (path, block), (_, other) in zip(repopt.declared_blocks(model), repopt.declared_blocks(expected), strict=True):
        difference = block.kernel().full_tensor() - other.kernel()
        assert difference.norm() / other.kernel().norm() < 1e-12, (path, difference)
accelerator.print("the same")
torch.distributed.destroy_process_group()
