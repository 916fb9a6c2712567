"""What the processes of one DistributedDataParallel run share: the controller and the mask."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..inplace import wrappers_of


class Ranks:
    """The processes that train ``model`` together; one process where it is not distributed."""

    def __init__(self, model: nn.Module) -> None:
        parallel = [m for m in wrappers_of(model) if isinstance(m, DistributedDataParallel)]
        self.group = parallel[0].process_group if parallel else None
        self.size = dist.get_world_size(self.group) if parallel else 1
        self.device = next(model.parameters()).device

    def first(self, content: Any) -> Any:
        """Rank 0's ``content``, plain data, on every rank."""
        if self.size == 1:
            return content
        data = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
        size = self._broadcast(torch.tensor([len(data)]))
        if dist.get_rank(self.group):
            data = torch.empty(int(size), dtype=torch.uint8)
        return json.loads(bytes(self._broadcast(data).numpy()))

    def first_mask(self, mask: Tensor) -> Tensor:
        """Rank 0's ``mask`` on every rank: what was measured differs between them."""
        return mask if self.size == 1 else self._broadcast(mask.to(torch.uint8)).bool()

    def _broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's CPU ``tensor``, through the device that the group sends from."""
        sent = tensor.to(self.device)
        dist.broadcast(sent, group_src=0, group=self.group)
        return sent.cpu()

    @torch.no_grad()
    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the ranks, in place; one reduction."""
        if self.size == 1:
            return
        flat = torch.cat([t.flatten().double() for t in tensors])
        dist.all_reduce(flat, group=self.group)
        parts = flat.div_(self.size).split([t.numel() for t in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def check_same(self, name: str, tensor: Tensor) -> None:
        """Raise on every rank unless all ranks hold the same bits.

        Args:
            name: of the tensor, for the message.
            tensor: on the CPU.

        Raises:
            RuntimeError: some rank holds others; it names the ranks.
        """
        if self.size == 1:
            return
        digest = hashlib.sha256(tensor.contiguous().numpy().tobytes()).digest()[:8]
        mine = torch.frombuffer(bytearray(digest), dtype=torch.int64).to(self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self.group)
        digests = torch.cat(everyone).tolist()
        others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if others:
            raise RuntimeError(
                f"{name}: ranks {others} hold another one than rank 0; give every rank the same "
                "arguments and seed, and the same model when the run is made"
            )
