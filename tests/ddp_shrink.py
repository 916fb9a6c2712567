"""One of two processes that train a network in DistributedDataParallel and cut it on the way."""

import math
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import ato_fast as ato
from nets import Plain, random_mask, randomise_norms


def main(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = randomise_norms(Plain())
    x = torch.randn(8, 3, 8, 8)
    y = torch.arange(8) % 5
    layout = ato.trace(model, (x[:2],))
    mask = random_mask(layout)
    # Small buckets, so that there are several.
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001)
    calls = []

    def hook(state, bucket):
        calls.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, hook)
    optimizer = ato.SGD(model, layout, lr=0.05, momentum=0.9)
    optimizer.set_mask(mask, threshold=math.inf)
    mine = slice(4 * rank, 4 * rank + 4)
    for step in range(6):
        calls.clear()
        if step == 3:
            layout = ato.shrink_(wrapped, layout, mask, optimizer=optimizer)
        F.cross_entropy(wrapped(x[mine]), y[mine]).backward()
        assert sum(calls) == sum(p.numel() for p in model.parameters())
        optimizer.step()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.zero_grad()
        # What every rank got is the mean of all ranks': the same everywhere.
        both = [torch.empty_like(gradients) for _ in range(2)]
        dist.all_gather(both, gradients)
        assert torch.equal(*both), f"step {step}: the ranks' gradients differ"
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(both, weights)
    assert torch.equal(*both) and len(weights) == layout.params()
    # Nobody leaves while another may still be talking to it.
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank}: {len(weights)} parameters")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
