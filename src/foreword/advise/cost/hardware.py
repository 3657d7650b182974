"""Accelerators as three numbers: products per second, bytes per second, memory.

Peaks are the vendors' dense figures (no sparsity). What is reached is less, and it depends on the model, the batch and
the kernels: `utilisation` is an assumption that stands in every report, not a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from foreword.errors import ConfigError, did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One accelerator; several of them multiply what a deployment has, not what a request sees."""

    name: str
    peak_flops_per_s: float
    """Dense bfloat16 products (multiply and add are two), the vendor's figure."""
    utilisation: float = 0.4
    """The share of the peak that training and prefill reach; 0.4 is assumed."""
    bytes_per_s: float
    """Memory bandwidth, the vendor's figure; decoding is bound by it."""
    memory_bytes: float
    host_bytes_per_s: float = 50e9
    """From the host's memory, where imported keys and values wait until they are asked for; PCIe 5 x16, about."""
    source: str = ""
    """Where the figures come from."""

    def __post_init__(self) -> None:
        for key in ("peak_flops_per_s", "bytes_per_s", "memory_bytes", "host_bytes_per_s"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"hardware.{key} = {getattr(self, key)!r} is not above 0")
        if not 0 < self.utilisation <= 1:
            raise ConfigError(
                f"hardware.utilisation = {self.utilisation!r} is not in 0 to 1",
                hint="Give the share of the peak that is reached, 0.4 for example.",
            )

    @property
    def flops_per_s(self) -> float:
        """What is reached: peak times utilisation."""
        return self.peak_flops_per_s * self.utilisation


KNOWN: Mapping[str, Hardware] = {
    "h100": Hardware(
        name="H100",
        peak_flops_per_s=989e12,
        utilisation=400 / 989,
        bytes_per_s=3.35e12,
        memory_bytes=80e9,
        source="NVIDIA H100 SXM data sheet: 989 TFLOP/s dense bfloat16, of which 400 are assumed to be reached; "
        "3.35 TB/s, 80 GB",
    ),
    "h200": Hardware(
        name="H200",
        peak_flops_per_s=989e12,
        utilisation=400 / 989,
        bytes_per_s=4.8e12,
        memory_bytes=141e9,
        source="NVIDIA H200 SXM data sheet: the H100's products, 4.8 TB/s, 141 GB; 400 TFLOP/s assumed to be reached",
    ),
    "a100": Hardware(
        name="A100",
        peak_flops_per_s=312e12,
        utilisation=0.45,
        bytes_per_s=2.039e12,
        memory_bytes=80e9,
        host_bytes_per_s=25e9,
        source="NVIDIA A100 80 GB SXM data sheet: 312 TFLOP/s dense bfloat16, 2039 GB/s; 45 % assumed to be reached",
    ),
    "l40s": Hardware(
        name="L40S",
        peak_flops_per_s=362e12,
        utilisation=0.4,
        bytes_per_s=0.864e12,
        memory_bytes=48e9,
        host_bytes_per_s=25e9,
        source="NVIDIA L40S data sheet: 362 TFLOP/s dense bfloat16, 864 GB/s, 48 GB; 40 % assumed to be reached",
    ),
    "cpu": Hardware(
        name="CPU",
        peak_flops_per_s=2e12,
        utilisation=0.25,
        bytes_per_s=100e9,
        memory_bytes=128e9,
        host_bytes_per_s=100e9,
        source="an assumed server of 16 cores with AVX-512 and 4 channels of DDR5; not a data sheet",
    ),
}


def find_hardware(name: str) -> Hardware:
    """Return known hardware by name, in any case. Raises ConfigError with the nearest name."""
    found = KNOWN.get(name.lower())
    if found is None:
        raise ConfigError(f"no hardware {name!r} is known", hint=did_you_mean(name.lower(), KNOWN))
    return found
