"""What a figure was measured on, and how much memory something took on top of what was there."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return processor, cores, threads, device and operating system."""
    cpuinfo, model = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.system(),
    }


class PeakMemory:
    """Measures the peak of memory within a `with` block over what was held before it.

    On CUDA the peak of torch's allocator. On Linux the high-water mark of resident memory, reset at the start; a
    process of its own makes that comparable, since memory that earlier work has freed may not have gone back to the
    system. Elsewhere nothing is measured and `peak_bytes` stays None; `how` says which.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak_bytes: int | None = None
        self.how = "not measured on this system"

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            self.how = "peak of torch's CUDA allocator"
            return self
        _give_back_freed()
        try:
            CLEAR_REFS.write_text("5")  # the high-water mark starts anew
            self._before = _status_bytes("VmRSS")
            self.how = "high-water mark of resident memory"
        except (OSError, StopIteration):
            self._before = -1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        elif self._before >= 0:
            self.peak_bytes = max(0, _status_bytes("VmHWM") - self._before)


def _give_back_freed() -> None:
    """Ask glibc to hand freed memory back to the system, so that growth is seen as growth."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library: the mark is then a lower bound


def _status_bytes(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
