"""The pure parts of the vLLM plug-in: its settings, a worker's share of a compiled file, and where its rows go."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from foreword.core.compiled import CompiledHeader
from foreword.core.spec import Fingerprint
from foreword.errors import ConfigError, ForewordError, IncompatibleModel, did_you_mean
from foreword.registry.blobs import Blobs, FolderBlobs, open_blobs
from foreword.registry.folders import home_folder

TESTED_VLLM = "0.32.0"
OLDEST_VLLM, BEFORE_VLLM = (0, 32), (0, 34)
"""0.32 and 0.33 are accepted: their connector interface is the same by source. 0.32.0 is the one tested."""

Key = TypeVar("Key")
Result = TypeVar("Result")


def check_version(version: str) -> None:
    """Raise ConfigError where vLLM's version is outside the supported range."""
    numbers = version.split(".")[:2]
    if not all(number.isdigit() for number in numbers) or not (
        OLDEST_VLLM <= tuple(int(number) for number in numbers) < BEFORE_VLLM
    ):
        oldest, before = (".".join(map(str, bound)) for bound in (OLDEST_VLLM, BEFORE_VLLM))
        raise ConfigError(
            f"vLLM {version} is not supported: foreword's plug-in is written for vLLM >= {oldest}, < {before}",
            hint=f"Install vLLM {TESTED_VLLM}, with which it is tested.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`kv_connector_extra_config` of the plug-in."""

    blobs: str
    """The blob store: a folder or an fsspec URL (s3://bucket/prefix), laid out by foreword.registry.blobs."""
    cache: Path
    """Local folder for fetched copies of a remote store."""
    host_bytes: int = 2**30
    """Bound of each worker's host memory for loaded versions; the least recently used go first."""
    base: Fingerprint | None = None
    """The served base; a file compiled for another one is refused. None: only shapes are compared."""
    idle_s: float = 3600.0
    """A version that no request named for so long leaves host memory."""
    fetch_timeout_s: float = 30.0
    """A version that is not fetched and loaded after so long fails the requests that wait for it."""

    @classmethod
    def from_extra(cls, extra: Mapping[str, Any]) -> Settings:
        """Read the engine's `kv_connector_extra_config`. Raises ConfigError on an unknown key or a wrong value."""
        known = cls.__dataclass_fields__
        for key in extra:
            if key not in known:
                raise ConfigError(f"unknown key {key!r} in kv_connector_extra_config", hint=did_you_mean(key, known))
        values = dict(extra)
        if not isinstance(values.get("blobs"), str) or not values["blobs"]:
            raise ConfigError(
                "kv_connector_extra_config says no `blobs`",
                hint="Give the blob store: a folder, or s3://bucket/prefix.",
            )
        if "base" in values and values["base"] is not None:
            try:
                values["base"] = Fingerprint(**values["base"])
            except TypeError as error:
                raise ConfigError(
                    f"`base` is no fingerprint: {error}", hint="Take it from `foreword vllm-args`."
                ) from error
        if "cache" not in values:
            values["cache"] = str(home_folder() / "cache")
        if not isinstance(values["cache"], str):
            raise ConfigError(f"`cache` is {values['cache']!r}, not a folder")
        values["cache"] = Path(values["cache"]).expanduser()
        for name, kinds in (("host_bytes", int), ("idle_s", (int, float)), ("fetch_timeout_s", (int, float))):
            value = values.get(name, 1)
            if not isinstance(value, kinds) or isinstance(value, bool) or value <= 0:
                raise ConfigError(f"`{name}` is {value!r}, not a positive number")
        return cls(**values)


def open_store(settings: Settings) -> Blobs:
    """Open the blob store for reading: a folder may be one that this process cannot write.

    Raises ConfigError when there is no such folder, or as `open_blobs` does.
    """
    folder = Path(settings.blobs).expanduser().absolute()
    if "://" in settings.blobs:
        return open_blobs(settings.blobs, settings.cache)
    if not folder.is_dir():
        raise ConfigError(f"the blob folder {folder} does not exist", hint="Give `blobs` the registry's blob folder.")
    return FolderBlobs(folder)


@dataclass(frozen=True, slots=True)
class LayerShare:
    """What one worker holds of one layer of the served model."""

    layer: int
    """Index of the layer in the model."""
    num_heads: int
    """KV heads of this worker."""
    key_dim: int
    value_dim: int

    @property
    def key_width(self) -> int:
        """Numbers per position of the keys."""
        return self.num_heads * self.key_dim

    @property
    def width(self) -> int:
        """Numbers per position of the keys and values."""
        return self.num_heads * (self.key_dim + self.value_dim)


def own_heads(total: int, rank: int, size: int) -> range:
    """Return the KV heads of tensor-parallel `rank` of `size`; with fewer heads than ranks, ranks share one."""
    first = rank * total // size
    return range(first, max(first + 1, (rank + 1) * total // size))


def check_fits(header: CompiledHeader, shares: Iterable[LayerShare], *, num_layers: int, size: int) -> None:
    """Raise IncompatibleModel where a compiled file's shapes are not those of the model that `size` workers share."""
    if header.spec.num_layers != num_layers:
        raise IncompatibleModel(f"compiled for {header.spec.num_layers} layers, the served model has {num_layers}")
    for share in shares:
        layer = header.spec.layers[share.layer]
        found = len(own_heads(layer.num_kv_heads, 0, size)), layer.head_dim, layer.value_dim
        needed = share.num_heads, share.key_dim, share.value_dim
        if found != needed:
            raise IncompatibleModel(
                f"layer {share.layer}: compiled for (KV heads per worker, key size, value size) {found}, "
                f"the served model has {needed}"
            )


def pack(
    tensors: Sequence[tuple[Tensor, Tensor]], shares: Iterable[LayerShare], dtype: torch.dtype, *, rank: int, size: int
) -> Tensor:
    """Return a worker's share as [N, W]: per position the keys, then the values, of each of its layers in turn.

    `tensors` are every layer's keys and values [Hkv, N, Dh]. Rows of several versions then join by one `cat`.
    """
    parts = []
    for share in shares:
        for tensor in tensors[share.layer]:
            heads = own_heads(tensor.shape[0], rank, size)
            own = tensor[heads.start : heads.stop].transpose(0, 1)
            parts.append(own.reshape(own.shape[0], -1).to(dtype))
    return torch.cat(parts, dim=1)


def unpack(rows: Tensor, shares: Iterable[LayerShare]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield keys and values [n, heads, Dh] of each layer: views of `rows` [n, W]."""
    start = 0
    for share in shares:
        middle, end = start + share.key_width, start + share.width
        yield (
            rows[:, start:middle].view(-1, share.num_heads, share.key_dim),
            rows[:, middle:end].view(-1, share.num_heads, share.value_dim),
        )
        start = end


@dataclass(frozen=True, slots=True)
class Write:
    """Rows `start` … `stop`-1 of a version, to be written into a request's pages."""

    sha256: str
    start: int
    stop: int
    block_ids: tuple[int, ...]
    """The request's pages from position 0 on; NO_BLOCK for one that it no longer holds (out of a sliding window)."""

    def pages(self, block_size: int) -> set[int]:
        """Return the pages that are written: those before `start` are others' too."""
        return set(self.block_ids[self.start // block_size :]) - {NO_BLOCK}


NO_BLOCK = -1


@dataclass(frozen=True, slots=True)
class Load:
    """An order to every worker: load this version. `attempt` tells a late report from a present one."""

    sha256: str
    attempt: int


def slots(write: Write, block_size: int) -> tuple[Tensor, Tensor]:
    """Return (positions, slots), both int64 [n]: where each row goes; positions without a page are left out."""
    positions = torch.arange(write.start, write.stop)
    pages = torch.tensor(write.block_ids, dtype=torch.int64)[positions // block_size]
    held = pages != NO_BLOCK
    positions = positions[held]
    return positions, pages[held] * block_size + positions % block_size


class Background(Generic[Key, Result]):
    """A few daemon threads that work off a queue; a hung job keeps neither the engine nor its shutdown waiting."""

    def __init__(self, threads: int, name: str) -> None:
        self.progress = threading.Event()
        """Set when a job ended since `take` was last called."""
        self._jobs: queue.SimpleQueue[tuple[Key, Callable[[], Result]]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Key, Result | Exception]] = queue.SimpleQueue()
        for index in range(threads):
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True).start()

    def submit(self, key: Key, job: Callable[[], Result]) -> None:
        """Run `job` in the background; its result will be taken under `key`."""
        self._jobs.put((key, job))

    def take(self) -> list[tuple[Key, Result | Exception]]:
        """Return what ended since the last call: results, or the exceptions that were raised."""
        self.progress.clear()
        ended = []
        while not self._done.empty():
            ended.append(self._done.get())
        return ended

    def _work(self) -> None:
        while True:
            key, job = self._jobs.get()
            try:
                result: Result | Exception = job()
            except Exception as error:
                result = error
            self._done.put((key, result))
            self.progress.set()


class HostCache:
    """A worker's versions in host memory, loaded in the background, kept and dropped as the scheduler side says."""

    def __init__(self, load: Callable[[str], Tensor]) -> None:
        self._load = load
        self._rows: dict[str, Tensor] = {}
        self._wanted: dict[str, Load] = {}
        self._background: Background[Load, Tensor] = Background(4, "foreword-load")

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._rows

    def order(self, loads: Iterable[Load], drops: Iterable[str]) -> None:
        """Drop and start to load versions."""
        for sha256 in drops:
            self._wanted.pop(sha256, None)
            self._rows.pop(sha256, None)
        for load in loads:
            self._wanted[load.sha256] = load
            self._background.submit(load, partial(self._load, load.sha256))

    def take(self) -> tuple[list[Load], dict[Load, Exception]]:
        """Return which loads ended since the last call, well and badly; what is wanted no more is left out."""
        loaded, failed = [], {}
        for load, result in self._background.take():
            if self._wanted.get(load.sha256) != load:
                continue
            if isinstance(result, Exception):
                failed[load] = result
            else:
                self._rows[load.sha256] = result
                loaded.append(load)
        return loaded, failed

    def gather(self, writes: Iterable[Write], block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the rows [n, W] of several writes and their slots [n]. Raises KeyError for a version not held."""
        rows, places = [], []
        for write in writes:
            positions, its_slots = slots(write, block_size)
            held = self._rows[write.sha256]
            own = held[write.start : write.stop] if len(positions) == write.stop - write.start else held[positions]
            rows.append(own.to(device, non_blocking=True))  # at once where the rows are pinned
            places.append(its_slots)
        return torch.cat(rows), torch.cat(places).to(device)


def describe(error: Exception) -> str:
    """Return one line for the log."""
    return error.message if isinstance(error, ForewordError) else f"{type(error).__name__}: {error}"
