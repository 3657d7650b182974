"""The fault laboratory: doctor names every planted fault first, and finds nothing in healthy systems.

The default run takes one plant of each fault, `slow` every sixth system, `lab` (make lab) all others. Whether a plant
is a fault at all, and a healthy system is healthy, is proved here too, and without doctor. Plants of servers have a
test of their own (test_server_faults.py).
"""

from __future__ import annotations

import warnings
from collections import Counter

import pytest

from foreword.doctor.faults import FAULTS
from tests.doctor.lab.healthy import HEALTHY
from tests.doctor.lab.shelves import LOCAL, PLANTS, first_fault, named_right

TRAINED_FOR_PROOF = ("learning-rate", "random-init", "metric-noise", "teacher-forced-score", "decoding-drift")
"""Faults that are proved by training a model, or answering with one that was trained."""


SLOW_EVERY = 6
"""What `slow` takes of the systems that are not in the default run; the others are `lab`."""


def split(items, chosen):
    """Mark all but the chosen as slow or lab."""
    names = {item.name for item in chosen}
    rest = {item.name: place for place, item in enumerate(item for item in items if item.name not in names)}
    marks = {name: pytest.mark.lab if place % SLOW_EVERY else pytest.mark.slow for name, place in rest.items()}
    return [pytest.param(item, id=item.name, marks=marks.get(item.name, ())) for item in items]


def one_each(plants):
    """Choose one cheap plant of each fault."""
    return list({plant.fault: plant for plant in plants if plant.cheap}.values())


CHOSEN = one_each(LOCAL)
PROVED = [healthy for healthy in HEALTHY if healthy.proof is not None]


@pytest.fixture(autouse=True)
def own_warnings():
    """Plants do what transformers and torch warn of; what they warn of is not under test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_every_fault_is_planted_on_two_architectures():
    found = {fault: {plant.architecture for plant in PLANTS if plant.fault == fault} for fault in FAULTS}
    assert {fault: sorted(names) for fault, names in found.items() if len(names) < 2} == {}


def test_names_are_unique():
    for items in (PLANTS, HEALTHY):
        assert [name for name, count in Counter(item.name for item in items).items() if count > 1] == []


@pytest.mark.parametrize("plant", split(LOCAL, [p for p in CHOSEN if p.fault not in TRAINED_FOR_PROOF]))
def test_plant_is_a_real_fault(plant):
    measured, bound = plant.proof(plant.make())
    assert measured > bound


@pytest.mark.parametrize("healthy", split(PROVED, [item for item in PROVED if item.cheap]))
def test_healthy_system_agrees_with_the_reference(healthy):
    measured, bound = healthy.proof(healthy.make())
    assert measured <= bound


@pytest.mark.parametrize("plant", split(LOCAL, CHOSEN))
def test_doctor_names_the_fault_first(plant):
    findings = plant.diagnose()
    wrong = [(finding.fault, finding.check, finding.measured) for finding in findings if not finding.ok]
    assert named_right(plant, first_fault(findings)), wrong


@pytest.mark.parametrize("healthy", split(HEALTHY, [item for item in HEALTHY if item.cheap]))
def test_doctor_finds_nothing_in_a_healthy_system(healthy):
    wrong = [(finding.fault, finding.check, finding.measured) for finding in healthy.diagnose() if not finding.ok]
    assert wrong == []
