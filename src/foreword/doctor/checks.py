"""Checks of an environment and of an artefact: each measures one thing and says what to do when it is wrong."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword.core.artefact import Artefact, load_artefact
from foreword.errors import ForewordError

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel

LEAST_VERSIONS = {"torch": (2, 11), "transformers": (5, 17), "safetensors": (0, 5)}
MIN_FREE_BYTES = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check measured."""

    check: str
    ok: bool
    measured: str
    fix: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return dataclasses.asdict(self)


def check_environment(home: Path | None = None) -> list[Finding]:
    """Check versions, devices and the registry's folder."""
    findings = [_version(name, least) for name, least in LEAST_VERSIONS.items()]
    return [*findings, _devices(), _registry(home)]


def check_artefact(path: Path, base: str | None, *, dtype: str = "auto", device: str = "cpu") -> list[Finding]:
    """Check that an artefact is whole and, given its base, that it belongs to it and acts as it was trained."""
    try:
        artefact = load_artefact(path)
    except ForewordError as error:
        return [Finding(check="file", ok=False, measured=error.message, fix=error.hint)]
    header = artefact.header
    what = f"{header.method}, P={header.num_vectors}, {artefact.num_bytes} bytes, {artefact.sha256[:12]}"
    findings = [Finding(check="file", ok=True, measured=what), _norms(artefact)]
    if base is None:
        return findings
    from foreword.core.model import load_base

    frozen = load_base(base, dtype=dtype, device=device)  # type: ignore[arg-type]
    return [*findings, *_on_base(artefact, frozen)]


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


def _norms(artefact: Artefact) -> Finding:
    """Vectors that collapsed to nothing have no effect."""
    import torch

    rms = {name: float(tensor.float().square().mean().sqrt()) for name, tensor in artefact.tensors.items()}
    name, least = min(rms.items(), key=lambda item: item[1])
    ok = least > float(torch.finfo(torch.float32).tiny)
    measured = f"root mean square {least:.3g} (least, {name}) to {max(rms.values()):.3g}"
    return Finding(check="vectors", ok=ok, measured=measured, fix="These vectors are zero: train them again.")


def _on_base(artefact: Artefact, base: FrozenModel) -> list[Finding]:
    from foreword.core.compile import check_base, compile
    from foreword.core.conformance import replay

    try:
        check_base(base, artefact)
        identity = Finding(check="base", ok=True, measured="the base, tokenizer and chat template it was trained for")
    except ForewordError as error:
        identity = Finding(check="base", ok=False, measured=error.message, fix=error.hint)
    try:
        prefix = compile(base, artefact, allow_mismatch=True)
    except ForewordError as error:
        return [identity, Finding(check="compile", ok=False, measured=error.message, fix=error.hint)]
    if not artefact.header.conformance:
        return [identity]
    result = replay(base, prefix, artefact.header.conformance)
    fix = "This is not the computation it was trained in: compare base, dtype and versions."
    return [identity, Finding(check="conformance", ok=result.ok, measured=result.message, fix=fix)]
