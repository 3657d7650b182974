"""Faults planted in running servers: doctor names each first, and finds nothing in healthy ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from foreword.doctor.faults import FAULTS
from tests.doctor.lab.server.plants import HEALTHY, PLANTS, ServerPlant


def marked(plants: tuple[ServerPlant, ...]) -> list[Any]:
    """The cheap ones are in the default run; `slow` takes every fourth of the others, `lab` the rest."""
    rest = {plant.name: place for place, plant in enumerate(plant for plant in plants if not plant.cheap)}
    marks = {name: pytest.mark.lab if place % 4 else pytest.mark.slow for name, place in rest.items()}
    return [pytest.param(plant, id=plant.name, marks=marks.get(plant.name, ())) for plant in plants]


def test_every_plant_has_a_name_of_its_own_and_a_known_fault() -> None:
    assert len({plant.name for plant in PLANTS}) == len(PLANTS)
    assert {plant.fault for plant in PLANTS} <= FAULTS.keys()
    for fault in {plant.fault for plant in PLANTS}:
        assert len({plant.architecture for plant in PLANTS if plant.fault == fault}) == 2


def test_the_catalogue_has_a_row_for_every_fault() -> None:
    page = (Path(__file__).parents[2] / "docs/faults.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted(FAULTS)


@pytest.mark.parametrize("plant", marked(PLANTS))
def test_a_planted_fault_is_named_first(plant: ServerPlant) -> None:
    found = plant.diagnose()
    first = next((finding for finding in found if not finding.ok), None)
    assert first is not None, "nothing was found"
    assert first.fault == plant.fault, first
    assert first.measured and first.expected and first.fix


@pytest.mark.parametrize("plant", marked(HEALTHY))
def test_a_healthy_server_has_no_finding(plant: ServerPlant) -> None:
    found = plant.diagnose()
    assert [finding for finding in found if not finding.ok] == []
    made = {finding.check.split(" ", 1)[1] for finding in found if not finding.skipped and " " in finding.check}
    assert {"version", "repeats", "conformance", "isolation", "turns", "batch", "decoding", "context"} <= made
