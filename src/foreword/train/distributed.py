"""Training in several processes: the base sharded (FSDP), vectors and optimizers whole in each, rows shared out.

Every process takes its part of each step's rows; gradients and losses are summed, so all hold the same vectors, those
that one process would get. `accelerate launch` (or torchrun) starts the processes; the first one writes and prints.
Source: FSDP2, `torch.distributed.fsdp.fully_shard`; accelerate's own `prepare` wants parameters to train in the base.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from foreword.core.model import FrozenModel, load_base
from foreword.errors import ConfigError

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class World:
    """The processes that train together; one process is a world of its own."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def part(self, items: Sequence[Item]) -> list[Item]:
        """Return this process's part of `items`."""
        return list(items[self.rank :: self.size])

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors over all processes, in place; then every process holds the first one's bits."""
        if self.size == 1:
            return
        for tensor in tensors:
            dist.all_reduce(tensor)
            dist.broadcast(tensor, 0)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        if self.size == 1:
            return flag
        counted = torch.tensor([float(flag)], device=_device_of_group())
        self.sum([counted])
        return bool(counted.item())

    def agreed(self, value: Item) -> Item:
        """Return the first process's value, which must be picklable."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


def world() -> World:
    """Return the processes that this one trains with."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def was_launched() -> bool:
    """Return whether `accelerate launch` or torchrun started this process among others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def load_for_training(
    base: Any,
    *,
    dtype: Literal["auto", "checkpoint", "float32", "bfloat16", "float16"] = "auto",
    device: str = "cpu",
    quantise: str | None = None,
) -> FrozenModel:
    """Load a base as `load_base` does; in a launch of several processes, join them and keep a share of it only.

    Each process reads the whole base into its host's memory first. Raises ConfigError as `load_base` does, and for a
    quantised base among several processes.
    """
    if not was_launched():
        return load_base(base, dtype=dtype, device=device, quantise=quantise)
    if quantise:
        raise ConfigError(
            f"quantise = {quantise!r} among {os.environ['WORLD_SIZE']} processes: quantised layers are not sharded",
            hint="Train in one process, or without --quantise.",
        )
    kind = device.partition(":")[0]
    join(kind)
    if kind == "cpu":
        return shard(load_base(base, dtype=dtype))
    loaded = load_base(base, dtype="checkpoint" if dtype == "auto" else dtype)
    if loaded.config._attn_implementation == "eager" and getattr(loaded.model, "_supports_sdpa", False):
        loaded.model.set_attn_implementation("sdpa")  # load_base chose for a CPU
    return shard(loaded, f"{kind}:{os.environ.get('LOCAL_RANK', '0')}")


def join(kind: str = "cpu") -> World:
    """Join the processes that were launched with this one, by gloo on CPUs and NCCL on GPUs."""
    if not dist.is_initialized():
        if kind == "cuda":
            count, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
            if local >= count:
                raise ConfigError(
                    f"process {local} of this machine has no GPU: it has {count}",
                    hint="Launch as many processes as there are GPUs.",
                )
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        atexit.register(leave)
    return world()


def leave() -> None:
    """Leave the processes that `join` joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(base: FrozenModel, device: str = "cpu") -> FrozenModel:
    """Keep this process's share of every decoder layer on `device`; embeddings, last norm and head stay whole.

    A layer is gathered while it computes, the next one meanwhile. The base's identity is taken before, from all of it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _ = base.fingerprint
    mesh = init_device_mesh(device.partition(":")[0], (world().size,))
    for layer in base.layers:
        fully_shard(layer.to(device), mesh=mesh)
    inside = {id(parameter) for layer in base.layers for parameter in layer.parameters()}
    _move_rest(base.model, inside, device)
    fully_shard(base.decoder, mesh=mesh, ignored_params={p for p in base.decoder.parameters() if id(p) not in inside})
    return base


def _move_rest(model: nn.Module, inside: set[int], device: str) -> None:
    """Move parameters and buffers that no layer shards; tied ones stay tied."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in inside:
                parameter.data = parameter.data.to(device)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


@contextmanager
def folder_to_write(folder: Path) -> Iterator[Path]:
    """Yield `folder` in the first process, a folder that vanishes in the others: all do the same, one leaves files."""
    if world().is_main:
        yield folder
        return
    with TemporaryDirectory() as other:
        yield Path(other)


def _device_of_group() -> torch.device:
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
