"""Checks of an environment: versions, devices, the registry's folder."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

from foreword.doctor.finding import Finding
from foreword.errors import ForewordError

LEAST_VERSIONS = {"torch": (2, 11), "transformers": (5, 17), "safetensors": (0, 5)}
MIN_FREE_BYTES = 2**30


def check_environment(home: Path | None = None) -> list[Finding]:
    """Check versions, devices and the registry's folder."""
    findings = [_version(name, least) for name, least in LEAST_VERSIONS.items()]
    return [*findings, _devices(), _registry(home)]


def _version(name: str, least: tuple[int, int]) -> Finding:
    found = importlib.metadata.version(name)
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    wanted = ".".join(map(str, least))
    return Finding(
        check=name, ok=numbers >= least, measured=f"{found}, needs {wanted}", fix=f"Install {name}>={wanted}."
    )


def _devices() -> Finding:
    import torch

    found = f"{torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        found += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return Finding(check="devices", ok=True, measured=found)


def _registry(home: Path | None) -> Finding:
    from foreword.registry.store import Registry

    try:
        with Registry.open(home) as registry:
            count, folder = len(registry.tasks()), registry.home
    except ForewordError as error:
        return Finding(check="registry", ok=False, measured=error.message, fix=error.hint)
    free = shutil.disk_usage(folder).free
    measured = f"{count} tasks in {folder}, {free / 2**30:.1f} GiB free"
    return Finding(check="registry", ok=free > MIN_FREE_BYTES, measured=measured, fix="Free space on that disk.")
