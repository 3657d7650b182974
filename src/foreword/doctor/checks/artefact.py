"""Checks of an artefact: is it whole, does it belong to this base, does it act there as it was trained?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from foreword.core.artefact import Artefact, load_artefact
from foreword.doctor.finding import Finding
from foreword.errors import ForewordError

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel


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
