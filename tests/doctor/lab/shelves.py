"""All plants and healthy systems, servers included."""

from __future__ import annotations

from typing import Any

from tests.doctor.lab import (
    artefact_plants,
    cache_plants,
    distillation_plants,
    evaluation_plants,
    label_plants,
    layer_plants,
    number_plants,
    record_plants,
    sequence_plants,
    serving_plants,
    training_plants,
)
from tests.doctor.lab.healthy import HEALTHY
from tests.doctor.lab.plant import Plant
from tests.doctor.lab.server import plants as server_plants

LOCAL: list[Plant] = [
    *sequence_plants.PLANTS,
    *layer_plants.PLANTS,
    *cache_plants.PLANTS,
    *number_plants.PLANTS,
    *serving_plants.PLANTS,
    *training_plants.PLANTS,
    *label_plants.PLANTS,
    *record_plants.PLANTS,
    *distillation_plants.PLANTS,
    *evaluation_plants.PLANTS,
    *artefact_plants.PLANTS,
]
"""Plants that run in this process without a server."""
PLANTS: list[Any] = [*LOCAL, *server_plants.PLANTS]
"""All: each has fault, architecture, variant, name and diagnose()."""
SOUND: list[Any] = [*HEALTHY, *server_plants.HEALTHY]
"""All healthy ones: each has name and diagnose()."""


def server_names() -> set[str]:
    """Return the names of the plants and healthy systems that are servers."""
    return {item.name for item in (*server_plants.PLANTS, *server_plants.HEALTHY)}


def named_right(plant: Any, fault: str) -> bool:
    """Whether `fault` is a right name of a plant."""
    return fault == plant.fault or fault in getattr(plant, "also", ())


def first_fault(findings: Any) -> str | None:
    """Return the fault of the first finding that is amiss ("" where it names none), or None where nothing is."""
    return next((finding.fault for finding in findings if not finding.ok), None)
