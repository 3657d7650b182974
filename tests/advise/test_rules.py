"""Who is forbidden and by what, what the tasks need, and how the feasible are put in order."""

import json
import math

import pytest

from foreword.advise.decide import decide
from foreword.advise.effects import effects_of
from foreword.advise.measured import load_measured, measured_from
from foreword.advise.methods import METHODS
from foreword.advise.rank import NEGLIGIBLE
from foreword.advise.rules import REACH, need_of
from foreword.errors import DataError
from tests.advise.cases import TWO_LAYERS, made

SURFACE_ORDER = ["text", "input_embeddings", "kv_import", "lora", "layer_code", "weights"]


@pytest.mark.parametrize("surface", SURFACE_ORDER)
def test_each_surface_allows_all_before_it_and_nothing_after(surface):
    tasks = {"shared_context_tokens": 1000}
    decision = decide(made(tasks=tasks, change={"surface": surface}))
    allowed = SURFACE_ORDER[: SURFACE_ORDER.index(surface) + 1]
    assert {s.name for s in decision.ranking} == {name for name in METHODS if METHODS[name].surface in allowed}
    for standing in decision.infeasible:
        (objection,) = standing.objections
        assert objection.key == "change.surface"
        assert f"`{surface}`" in objection.text and f"`{standing.method.surface}`" in objection.text


def test_all_reasons_are_listed_with_both_numbers():
    limits = {"storage_total_bytes": 1000, "first_token_added_ms": 1e-9, "wire_bytes": 10}
    decision = decide(made(limits=limits, change={"surface": "text"}, tasks={"count": 3}))
    kv = decision.standing("kv")
    keys = {objection.key for objection in kv.objections}
    assert keys == {
        "change.surface",
        "limits.storage_total_bytes",
        "limits.first_token_added_ms",
        "limits.wire_bytes",
    }
    storage = next(o for o in kv.objections if o.key == "limits.storage_total_bytes")
    per_task = 2 * 2 * 20 * 2 * 16 * 2  # 2·L·P·Hkv·Dh·b
    assert (storage.needed, storage.allowed) == (3 * per_task, 1000)
    assert "1 KB" in storage.text and "15.4 KB" in storage.text and "3 · 5.12 KB" in storage.text
    assert "At P = 1 instead of 20" in storage.text  # 1000 / (15360 / 20) = 1.3
    assert decision.recommended is None and decision.best is None


def test_a_method_fits_exactly_at_its_own_amount():
    exact = 2 * 2 * 20 * 2 * 16 * 2
    assert decide(made(limits={"storage_per_task_bytes": exact})).standing("kv").is_feasible
    assert not decide(made(limits={"storage_per_task_bytes": exact - 1})).standing("kv").is_feasible


@pytest.mark.parametrize("latent", [True, False])
def test_a_base_that_cannot_carry_a_method_says_so(latent):
    base = {**TWO_LAYERS, "latent_dim": 32, "rope_dim": 8} if latent else TWO_LAYERS
    kv = decide(made(base=base)).standing("kv")
    assert any(objection.key == "base" for objection in kv.objections) == latent


NEEDS = [
    ({}, 2, "8 billion"),
    ({"rows_per_task": 99}, 2, "99 rows"),
    ({"rows_per_task": 19}, 1, "19 rows"),
    ({"rows_per_task": 10_000}, 2, "10,000"),
    ({"rows_per_task": 10_001}, 4, "10,001"),
    ({"kind": "tagging"}, 3, "every token"),
    ({"kind": "generation"}, 3, "foreign"),
    ({"kind": "new_skill"}, 4, "a skill that the base lacks"),
    ({"kind": "new_knowledge"}, 4, "knowledge that the base lacks"),
    ({"kind": "new_knowledge", "shared_context_tokens": 2000}, 2, "2,000 tokens"),
    ({"baseline_score": 0.8, "quality_target": 0.8}, 0, "0.8"),
    ({"baseline_score": 0.79, "quality_target": 0.8}, 2, ""),
]


@pytest.mark.parametrize(("tasks", "reach", "said"), NEEDS)
def test_what_the_tasks_need(tasks, reach, said):
    need = need_of(made(tasks=tasks))
    assert need.reach == reach
    assert said in " ".join(need.reasons)


@pytest.mark.parametrize(("parameters", "reach"), [(2_999_999_999, 3), (3_000_000_000, 2)])
def test_small_bases_are_steered_in_every_layer(parameters, reach):
    assert need_of(made(base={**TWO_LAYERS, "num_parameters": parameters})).reach == reach


def test_few_rows_forbid_freedom_not_words():
    decision = decide(made(tasks={"rows_per_task": 50}, change={"surface": "weights"}))
    missed = {standing.name: standing.shortfall for standing in decision.standings}
    assert missed["prompt"] == missed["compiled_prompt"] == 0
    assert all(missed[name] > 0 for name in METHODS if REACH[name] != 2)
    assert decision.standing("prompt").effects.load.num_vectors == 8
    assert decide(made(tasks={"rows_per_task": 5, "shots": 4})).recommended == "few_shot"


def test_the_order_is_need_then_points_then_bytes():
    for kind in ("classification", "tagging", "new_skill"):
        ranked = decide(made(tasks={"kind": kind}, change={"surface": "weights"})).ranking
        keys = [(s.shortfall, round(s.total_points, 9), s.effects.storage_bytes) for s in ranked]
        assert keys == sorted(keys)


def test_points_are_factors_of_ten_above_the_negligible():
    constraints = made(
        tasks={"count": 50, "input_tokens": 1000, "output_tokens": 10},
        traffic={"network_gbit_s": 0.01},
        priorities={"wire": 3},
    )
    prompt = {p.criterion: p.points for p in decide(constraints).standing("prompt").points}
    wire = (20 + 1000) * 64 * 2 * 4 / 3
    assert prompt["wire"] == pytest.approx(3 * math.log10(wire / 10_000))
    effects = effects_of("prompt", constraints)
    assert effects.wire_s == pytest.approx(wire * 8 / 1e7)
    request = effects.prefill_s + effects.wire_s + 10 * effects.per_token_s
    assert prompt["latency"] == pytest.approx(math.log10(request / 1e-3))
    assert prompt["operations"] == len(METHODS["prompt"].components) + 1  # and training
    assert prompt["storage"] == 0  # 50 · 20 · 64 · 2 bytes = 128 KB, below the negligible
    assert NEGLIGIBLE["storage"][0] == 1e6
    assert "audit" not in prompt
    audited = {p.criterion: p.points for p in decide(made(audit={"needed": True})).standing("kv").points}
    assert audited["audit"] == 2


def test_a_priority_can_turn_the_order():
    tables = {"tasks": {"count": 2000}, "change": {"surface": "kv_import"}}
    assert decide(made(**tables)).recommended == "kv"  # 10 MB, one part
    assert decide(made(**tables, priorities={"storage": 4})).recommended == "compiled_prompt"


def test_positions_behind_the_last_block_are_computed_again():
    aligned = effects_of("prompt", made(tasks={"num_vectors": 32}))
    ragged = effects_of("prompt", made(tasks={"num_vectors": 20}))
    per_position = 2 * 8e9 / 400e12  # 2·N FLOP a position, 400 TFLOP/s
    cached = ragged.cost.value("prefill_s_cached")
    assert ragged.prefill_s - cached == pytest.approx(4 * per_position, rel=1e-3)
    assert aligned.prefill_s == pytest.approx(aligned.cost.value("prefill_s_cached"))
    uncached = effects_of("prompt", made(change={"prefix_cache": False}))
    assert uncached.prefill_s == uncached.cost.value("prefill_s_uncached")


def test_shared_context_is_paid_by_all_but_the_cartridge():
    without, held = made(), made(tasks={"shared_context_tokens": 2000})
    assert effects_of("kv", held).context_tokens == effects_of("kv", without).context_tokens + 2000
    assert effects_of("kv", held).per_token_s > effects_of("kv", without).per_token_s
    cartridge = effects_of("cartridge", held)
    assert cartridge.context_tokens == 64  # 2000 / 32, in whole blocks of 16
    assert not cartridge.carries_context
    assert not decide(made(tasks={"shared_context_tokens": 511})).standing("cartridge").is_feasible
    assert decide(made(tasks={"shared_context_tokens": 512})).standing("cartridge").is_feasible


def compared(**scores):
    """Rows as `foreword compare` writes them, ± 0.02."""
    rows = [
        {"method": name, "score": score, "interval": [score - 0.02, score + 0.02], "metric": "exact_match"}
        for name, score in scores.items()
    ]
    return {"base": "tiny", "task": "triage", "rows": rows}


def test_measured_rows_replace_the_rules():
    constraints = made(change={"surface": "lora"}, tasks={"count": 100})
    by_rule = decide(constraints)
    assert by_rule.recommended == "kv" and by_rule.standing("prompt").shortfall == 0
    measured = measured_from(compared(prompt=0.6, kv=0.7, lora=0.9, hard_text=0.5))
    decision = decide(constraints, measured)
    assert decision.recommended == "lora"
    assert (
        decision.standing("kv").shortfall == pytest.approx(0.2)
        and decision.standing("compiled_prompt").judged_by == "measured"
    )
    assert "0.700 against 0.900" in decision.standing("kv").shortfall_text
    near = decide(constraints, measured_from(compared(kv=0.89, lora=0.9)))
    assert near.recommended == "kv"  # no difference beyond doubt, and cheaper


def test_a_target_decides_where_there_is_one():
    constraints = made(change={"surface": "lora"}, tasks={"quality_target": 0.65})
    decision = decide(constraints, measured_from(compared(prompt=0.6, kv=0.7, lora=0.9)))
    assert decision.recommended == "kv"
    assert decision.standing("prompt").shortfall_text == "triage: 0.600 exact_match, target 0.650"


def test_the_unmeasured_stand_behind_the_measured_that_suffice():
    decision = decide(made(change={"surface": "lora"}), measured_from(compared(lora=0.9, prompt=0.5)))
    assert decision.recommended == "lora"
    assert [s.is_unproved for s in decision.ranking[:2]] == [False, True]


def test_several_tasks_are_counted_one_by_one():
    tasks = [compared(prompt=0.6, kv=0.9), {**compared(prompt=0.9, kv=0.9), "task": "clause"}]
    decision = decide(made(), measured_from({"base": "tiny", "tasks": tasks}))
    assert decision.standing("prompt").shortfall == pytest.approx(0.15)
    assert decision.standing("prompt").shortfall_text.startswith("triage:")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "no rows"),
        ({"rows": None}, "has no list of rows"),
        ({"rows": [{"method": "prompt", "score": 0.5}]}, "row 1 has no interval"),
        ({"rows": [{"method": "promt", "score": 0.5, "interval": [0, 1]}]}, "unknown method 'promt'"),
        ({"rows": [{"method": "prompt", "score": "x", "interval": [0, 1]}]}, "'x' is not a finite number"),
        ({"rows": [{"method": "prompt", "score": 0.5, "interval": [1, 0]}]}, "ends before it begins"),
        ({"rows": [{"method": "prompt", "score": 0.5, "interval": [0]}]}, "is not [low, high]"),
        ({"rows": [3]}, "row 1 is not an object"),
        ({"tasks": 3}, "tasks is not a list"),
    ],
)
def test_wrong_measured_rows_are_named(tmp_path, change, message):
    path = tmp_path / "compare.json"
    path.write_text(json.dumps({**compared(prompt=0.5), **change}))
    with pytest.raises(DataError) as caught:
        load_measured(path)
    assert message in caught.value.message and str(path) in caught.value.message


def test_measured_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        load_measured(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match="malformed JSON"):
        load_measured(tmp_path / "x.json")
    twice = compared(prompt=0.5)
    twice["rows"] *= 2
    with pytest.raises(DataError, match="prompt stands twice"):
        measured_from(twice)
    with pytest.raises(DataError, match="rows of several bases: a, b"):
        measured_from({"tasks": [{**compared(prompt=0.5), "base": name} for name in "ab"]})
