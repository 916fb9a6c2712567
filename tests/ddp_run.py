"""One of two processes that train one ATO run together."""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import ato_fast as ato
from runs import EXAMPLE, HELD, SGD, TRAIN, Net

SCHEDULE = ato.Schedule(
    10, 4, freeze=0.5, zero_by=0.7, shrink_start=0.2, shrink_every=0.1, controller_steps=60
)


def new_run(rank: int, seed: int) -> ato.ATO:
    torch.manual_seed(0)
    held = [(HELD[0][12 * rank :][:12], HELD[1][12 * rank :][:12])]
    return ato.ATO(
        DistributedDataParallel(Net()), EXAMPLE, optimizer=SGD, budget=ato.Budget(macs=0.5),
        schedule=SCHEDULE, controller_data=held, seed=seed,
    )  # fmt: skip


def train(run: ato.ATO, rank: int) -> None:
    for step in range(40):
        torch.manual_seed(step)
        mine = slice(12 * (step % 4) + 6 * rank, 12 * (step % 4) + 6 * rank + 6)
        F.cross_entropy(run.model(TRAIN[0][mine]), TRAIN[1][mine]).backward()
        run.step()
        run.zero_grad()


def same(tensor: torch.Tensor) -> bool:
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor)
    return torch.equal(*both)


def main(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)

    run = new_run(rank, seed=0)
    train(run, rank)
    small = run.finish().model
    assert same(run.mask.to(torch.uint8)) and not run.mask.all()
    assert same(torch.cat([p.detach().flatten() for p in small.parameters()]))
    assert same(torch.cat([p.detach().flatten() for p in run.controller.parameters()]))
    losses = [entry["controller_objective"] for entry in run.history[1:5]]
    assert same(torch.tensor(losses, dtype=torch.float64)), "objectives are means over ranks"

    # Ranks that were given different seeds draw different masks: both say so.
    run = new_run(rank, seed=rank)
    try:
        train(run, rank)
    except RuntimeError as error:
        assert "mask: ranks [1] hold another one than rank 0" in str(error), error
    else:
        raise AssertionError("the ranks disagree and nobody noticed")
    # Nobody leaves while another may still be talking to it.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
