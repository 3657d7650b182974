"""What is reported as a turn is one: deciding anew on both sides gives different recommendations."""

import math

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from foreword.advise.bases.find import KNOWN
from foreword.advise.constraints import check_contradictions
from foreword.advise.decide import decide
from foreword.advise.effects import effects_of
from foreword.advise.flip import find_flips
from foreword.advise.methods import METHODS
from tests.advise.cases import made

TABLES = st.fixed_dictionaries(
    {
        "tasks": st.fixed_dictionaries(
            {
                "count": st.integers(1, 200),
                "kind": st.sampled_from(["classification", "tagging", "new_skill"]),
                "rows_per_task": st.sampled_from([5, 60, 900, 20_000]),
                "baseline_score": st.just(0.6),
                "quality_target": st.sampled_from([0.5, 0.8]),
            }
        ),
        "limits": st.fixed_dictionaries(
            {},
            optional={
                "storage_total_bytes": st.integers(300, 10**7),
                "first_token_added_ms": st.floats(0.01, 3),
                "context_tokens": st.integers(340, 4000),
                "update_deadline_hours": st.floats(2.5, 200),
            },
        ),
        "change": st.fixed_dictionaries({"surface": st.sampled_from(["input_embeddings", "kv_import", "lora"])}),
    }
)


def decided(constraints, key, value):
    """What is recommended with one value changed, as the search did it."""
    if key == "base":
        from dataclasses import replace

        base = constraints.base if value == constraints.base.name else KNOWN[value]
        return decide(replace(constraints, base=base)).recommended
    changed = constraints.replaced(key, value)
    check_contradictions(changed)
    return decide(changed).recommended


@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
@given(TABLES)
def test_both_sides_of_every_turn(tables):
    constraints = made(**tables)
    decision = decide(constraints)
    flips = find_flips(decision)
    assert [flip.distance for flip in flips] == sorted(flip.distance for flip in flips)
    for flip in flips:
        assert decided(constraints, flip.key, flip.last_same) == decision.recommended, flip
        other = decided(constraints, flip.key, flip.first_other)
        assert other == flip.recommended != decision.recommended, flip

        if flip.direction == "instead" or flip.first_other is None or flip.last_same is None:
            continue
        apart = abs(flip.first_other - flip.last_same)
        if flip.key == "limits.context_tokens" or flip.key.startswith("tasks."):
            assert apart <= 1
        else:
            assert apart <= 2e-4 * abs(flip.first_other), flip


def by_key(flips, key):
    return [flip for flip in flips if flip.key == key]


def test_a_storage_limit_turns_exactly_where_the_method_no_longer_fits():
    decision = decide(made(limits={"storage_total_bytes": 20_000}, tasks={"count": 3}))
    assert decision.recommended == "kv"
    below = next(flip for flip in by_key(find_flips(decision), "limits.storage_total_bytes"))
    exact = 3 * 2 * 2 * 20 * 2 * 16 * 2  # count · 2·L·P·Hkv·Dh·b
    assert below.direction == "below" and below.last_same == pytest.approx(exact, rel=1e-4)
    assert below.last_same >= exact > below.first_other
    assert below.recommended == "compiled_prompt"
    assert below.ratio == pytest.approx(exact / 20_000, rel=1e-3)


def test_a_count_of_tasks_turns_at_the_last_that_fits():
    decision = decide(made(limits={"storage_total_bytes": 100_000}, tasks={"count": 3}))
    per_task = 2 * 2 * 20 * 2 * 16 * 2
    above = next(flip for flip in by_key(find_flips(decision), "tasks.count") if flip.direction == "above")
    assert above.last_same == 100_000 // per_task and above.first_other == above.last_same + 1


def test_limits_that_are_not_set_are_searched_from_none():
    decision = decide(made())
    flips = {flip.key: flip for flip in find_flips(decision) if flip.key.startswith("limits.")}
    amount = effects_of(decision.recommended, made()).first_token_s * 1e3
    assert flips["limits.first_token_added_ms"].last_same == pytest.approx(amount, rel=1e-4)
    assert flips["limits.first_token_added_ms"].distance == math.inf
    assert flips["limits.first_token_added_ms"].ratio is None


def test_raising_a_limit_is_searched_too():
    decision = decide(made(limits={"storage_total_bytes": 3000}))
    assert decision.recommended == "compiled_prompt"  # 2,560 bytes; kv takes 5,120
    above = next(f for f in by_key(find_flips(decision), "limits.storage_total_bytes") if f.direction == "above")
    assert above.recommended == "kv" and above.first_other == pytest.approx(5120, rel=1e-4)


def test_the_ladder_of_surfaces_is_searched_both_ways():
    flips = by_key(find_flips(decide(made(change={"surface": "input_embeddings"}))), "change.surface")
    assert {(flip.first_other, flip.recommended) for flip in flips} == {("text", "few_shot"), ("kv_import", "kv")}


def test_nothing_fits_is_an_answer_that_can_turn():
    decision = decide(made(limits={"wire_bytes": 10}))
    assert decision.recommended is None
    above = next(f for f in by_key(find_flips(decision), "limits.wire_bytes") if f.direction == "above")
    assert above.recommended in METHODS and above.first_other == pytest.approx(64, rel=1e-3)


def test_a_score_turns_at_the_baseline():
    decision = decide(made(tasks={"baseline_score": 0.7, "quality_target": 0.8}))
    (flip,) = by_key(find_flips(decision), "tasks.baseline_score")
    assert flip.recommended == "hard_text"
    assert flip.last_same < 0.8 <= flip.first_other and flip.first_other - flip.last_same < 1e-3
