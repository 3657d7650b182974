"""The methods in words: complete, in one order with the costs, and true of this project's own modules."""

import re

import pytest

from foreword.advise.cost.feasible import IMPORTS_KV
from foreword.advise.cost.method_cost import COSTED
from foreword.advise.methods import METHODS, SURFACES


def test_every_costed_method_is_described_and_the_other_way_round():
    assert set(METHODS) == set(COSTED) and len(METHODS) == 11
    assert all(method.name == name for name, method in METHODS.items())


@pytest.mark.parametrize("name", METHODS)
def test_descriptions_are_whole(name):
    method = METHODS[name]
    for text in (method.steers, method.where):
        assert text[0].isupper() or text.startswith("(")
        assert text.endswith(".") and "  " not in text and len(text) < 420
        assert 1 <= len(re.findall(r"\.(?: |$)", text)) <= 3
    assert method.components and method.strengths and method.limits and method.sources
    for phrase in (*method.components, *method.strengths, *method.limits):
        assert phrase[-1] != "." and "  " not in phrase
    assert any("arXiv:" in source for source in method.sources)
    assert set(method.to_json()) == set(method.__slots__)


def test_surfaces_are_in_order_and_all_used():
    assert {method.surface for method in METHODS.values()} == set(SURFACES)
    ranks = [SURFACES.index(method.surface) for method in METHODS.values()]
    assert ranks == sorted(ranks)


def test_surface_follows_from_how_a_method_is_served():
    assert {name for name, method in METHODS.items() if method.surface == "kv_import"} == set(IMPORTS_KV)
    assert {name for name, method in METHODS.items() if not method.trains} == {"hard_text", "few_shot"}
    assert {name for name, method in METHODS.items() if not method.composes} == {"adapter", "ia3", "full"}
