"""The report: every claim that it must make, with the numbers of the base; the plan's file is taken by the trainer."""

import json
import re

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from foreword.advise.constraints import load_constraints
from foreword.advise.decide import decide
from foreword.advise.essay.grounds import tensions
from foreword.advise.essay.write import write_essay
from foreword.advise.measured import measured_from
from foreword.advise.methods import METHODS
from foreword.advise.plan import gain_for, make_plan, rows_for
from foreword.config import load_task
from foreword.core.template import TaskTemplate
from foreword.report import Bullets, Code, Lines, Scatter, Table, Text, render
from tests.advise.cases import EXAMPLES, case, essay, made


def texts(report, title):
    """Everything that a section says, as one text."""
    section = next(section for section in report.sections if section.title.startswith(title))
    found = []
    for block in section.blocks:
        if isinstance(block, Text | Code):
            found.append(block.text)
        elif isinstance(block, Bullets):
            found += block.items
        elif isinstance(block, Table):
            found += [str(cell) for row in block.rows for cell in row]
    return "\n".join(found)


def test_the_layer_input_is_worked_out_for_this_base():
    report = essay("thirty_b_twelve_tasks")
    said = texts(report, "What a prefix-tuned layer reads")
    for part in (
        "H^l = [ p^l_0 … p^l_19 ; h^(l-1)_0 … h^(l-1)_299 ]",
        "320 x 5120 in all",
        "300 x 5120 kept, the first 20 rows dropped",
        "64 · 20 · 5120 = 6,553,600 numbers",
        "1,580 rows in layer 64",  # 300 + 64·20, where the outputs are not dropped
        "2 · 8 · 128 = 2,048 numbers",
        "0.4 of the hidden-state form's bytes",
        "2,621,440 numbers, 5.24 MB",
    ):
        assert part in said
    forms = texts(report, "Where the vectors live")
    for part in ("20 x 5120", "64 x 20 x 5120", "64 x 2 x 8 x 20 x 128", "205 KB", "13.1 MB", "5.24 MB"):
        assert part in forms


def test_the_trade_offs_carry_their_numbers():
    said = texts(essay("thirty_b_twelve_tasks"), "Trade-offs")
    for lead in ("**Deployment complexity.**", "**Storage per task.**", "**Speed of small updates.**"):
        assert lead in said
    for part in ("20·5120·2 = 205 KB", "12 tasks 2.46 MB", "268 MB by LoRA", "4.3 hours"):
        assert part in said


def test_sections_stand_in_order_and_figures_are_there():
    report = essay("small_base_tagging")
    titles = [section.title.split(",")[0].split(":")[0] for section in report.sections]
    assert titles == [
        "Recommendation",
        "Where the vectors live",
        "What a prefix-tuned layer reads",
        "Trade-offs",
        "What does not fit",
        "The ranking",
        "What is given up",
        "What would change the answer",
        "Plan",
        "All methods in numbers",
        "The methods as ways to learn a soft prompt",
        "What this rests on",
    ]
    blocks = [block for section in report.sections for block in section.blocks]
    (scatter,) = [block for block in blocks if isinstance(block, Scatter)]
    assert len(scatter.points) == len(METHODS) - 1  # no long text, so no cartridge
    front = {point.label for point in scatter.points if point.on_front}
    assert "hard_text" in front and "kv" not in front  # larger than the other form, and no faster
    (lines,) = [block for block in blocks if isinstance(block, Lines)]
    slope = dict(lines.series["LoRA"])
    assert slope[100.0] == pytest.approx(100 * slope[1.0])
    for method in METHODS.values():
        assert f"**{method.title}.** {method.steers}" in texts(report, "The methods as ways")


def test_every_objection_and_every_pair_of_the_ranking_is_told():
    decision = decide(case("business_units"))
    report = essay("business_units")
    refused = texts(report, "What does not fit")
    for standing in decision.infeasible:
        for objection in standing.objections:
            assert objection.text in refused
    order = texts(report, "The ranking")
    assert order.count("stands behind") == len(decision.ranking) - 1


def test_json_holds_the_numbers():
    report = essay("startup_ten_tasks")
    data = json.loads(render(report, "json"))["data"]
    assert data["recommended"] == "compiled_prompt"
    assert data["methods"]["kv"]["effects"]["storage_bytes"] == 10 * 2 * 32 * 20 * 8 * 128 * 2
    assert data["methods"]["kv"]["objections"][0]["key"] == "limits.storage_total_bytes"
    assert data["flips"][0].keys() >= {"key", "current", "last_same", "first_other", "recommended", "ratio"}
    json.dumps(data, allow_nan=False)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    kind=st.sampled_from(["classification", "extraction", "tagging", "generation", "new_skill", "new_knowledge"]),
    rows=st.sampled_from([0, 3, 30, 300, 30_000]),
    count=st.integers(1, 40),
    surface=st.sampled_from(["text", "input_embeddings", "kv_import", "lora", "layer_code", "weights"]),
    limits=st.fixed_dictionaries(
        {}, optional={"storage_total_bytes": st.integers(1, 10**6), "wire_bytes": st.just(40)}
    ),
    held=st.sampled_from([0, 100, 3000]),
    audit=st.booleans(),
)
def test_any_constraints_give_whole_sentences(kind, rows, count, surface, limits, held, audit):
    tables = {
        "tasks": {"kind": kind, "rows_per_task": rows, "count": count, "shared_context_tokens": held},
        "change": {"surface": surface},
        "limits": limits,
        "audit": {"needed": audit},
    }
    report = write_essay(decide(made(**tables)))
    for section in report.sections:
        for block in section.blocks:
            items = block.items if isinstance(block, Bullets) else [block.text] if isinstance(block, Text) else []
            for text in items:
                assert text.strip() == text and text
                bad = re.search(r"\bNone\b(?! of)|\bnan\b|\binf\b|  |\.\.| ,| \.(?!\d)|\(\)|\{|\}", text)
                assert not bad, (bad, text)
                assert text.count("**") % 2 == 0 and text.count("`") % 2 == 0, text
    for form in ("text", "markdown", "json"):
        assert render(report, form)


@pytest.mark.parametrize("surface", ["text", "input_embeddings", "kv_import", "lora", "layer_code", "weights"])
@pytest.mark.parametrize("kind", ["classification", "tagging", "generation", "new_skill"])
def test_the_plan_s_task_file_is_taken(tmp_path, surface, kind):
    constraints = made(tasks={"kind": kind, "related": True}, change={"surface": surface})
    plan = make_plan(decide(constraints))
    (tmp_path / "task.toml").write_text(plan.task_toml)
    task, train = load_task(tmp_path / "task.toml")
    template = TaskTemplate(task.template)
    assert template.num_left == (plan.aligned_vectors or 0)
    if plan.num_vectors:
        assert train.method == {"compiled_prompt": "prompt"}.get(plan.method, plan.method)
        assert train.init == "text" and task.hard_text
    assert task.max_new_tokens >= constraints.tasks.output_tokens


def test_a_hybrid_fills_whole_blocks_together_with_its_words():
    plan = make_plan(decide(case("thirty_b_twelve_tasks")))
    assert plan.is_hybrid and plan.num_vectors == plan.aligned_vectors == 20  # 60 + 20 = 5 blocks of 16
    plan = make_plan(decide(case("thirty_b_twelve_tasks", "limits.update_deadline_hours=1 week")))
    assert not plan.is_hybrid and plan.aligned_vectors == 32
    assert "{soft:32}{input}" in plan.task_toml
    plan = make_plan(decide(case("thirty_b_twelve_tasks", "tasks.instruction_tokens=61")))
    assert plan.aligned_vectors == 35  # 61 + 35 = 96


def test_rows_for_a_gain_against_simulation():
    import numpy as np

    from foreword.eval.paired import mcnemar_p

    gain, other = 0.05, 0.1
    rows, rng = rows_for(gain, other), np.random.default_rng(0)
    assert rows == pytest.approx(468, abs=2)  # (1.960·√0.15 + 0.8416·√(0.15 - 0.0025))² / 0.05²
    wins = (gain + gain + other) / 2
    drawn = rng.multinomial(rows, [wins, wins - gain, 1 - 2 * wins + gain], size=400)
    power = np.mean([mcnemar_p(int(a), int(b)) < 0.05 for a, b, _ in drawn])
    assert 0.7 < power < 0.86  # 0.8 by design; the exact test is a little more careful


def test_gain_for_is_the_inverse_of_rows_for():
    for rows in (80, 400, 1132):
        gain = gain_for(rows)
        assert rows_for(gain) <= rows < rows_for(gain - 1e-3)
    assert gain_for(2) == 1.0


def test_tensions_name_both_keys():
    both = {"baseline_score": 0.6, "quality_target": 0.9}
    (text,) = tensions(made(tasks=both, change={"surface": "text"}))
    assert "`tasks.quality_target` is 0.9" in text and "`change.surface`" in text and "0.3 above" in text
    assert any("baseline_score" in t for t in tensions(made(tasks={"quality_target": 0.9})))
    assert any("needs several cards" in t for t in tensions(case("business_units")))
    limits = {"storage_per_task_bytes": 10, "storage_total_bytes": 15}
    assert any("the total binds" in t for t in tensions(made(tasks={"count": 2}, limits=limits)))
    assert tensions(made()) == ()


def test_nothing_fits_is_said_with_every_reason():
    report = write_essay(decide(made(limits={"wire_bytes": 10})))
    said = texts(report, "Recommendation")
    assert "Nothing fits" in said and "`limits.wire_bytes` is 10 B" in said
    assert not any(section.title == "Plan" for section in report.sections)
    assert "above 10 B" in texts(report, "What would change") or "above 64 B" in texts(report, "What would change")


def test_a_measured_choice_says_so():
    rows = [
        {"method": name, "score": score, "interval": [score - 0.02, score + 0.02], "metric": "f1"}
        for name, score in (("hard_text", 0.5), ("prompt", 0.6), ("kv", 0.8))
    ]
    report = write_essay(decide(made(), measured_from({"task": "clause", "rows": rows})))
    assert "rests on measurement" in texts(report, "Recommendation")
    assert "0.600 against 0.800 f1" in texts(report, "The ranking")


def test_windows_are_told_where_the_base_has_them():
    base = {"known": "mistral-7b-v0.1"}
    said = texts(write_essay(decide(made(base=base))), "What is given up")
    assert "Every layer sees 4,096 tokens back" in said and "131,040 tokens" in said  # 32 · 4095
    assert "tokens back" not in texts(essay("startup_ten_tasks"), "What is given up")


def test_docs_tell_every_key_with_its_default():
    from foreword.advise.questions import questions

    page = (EXAMPLES.parents[1] / "docs/advise.md").read_text()
    for question in questions():
        shown = {True: "true", False: "false", None: "none"}.get(question.default, question.default)
        shown = f"{shown:g}" if isinstance(shown, float) else str(shown)
        row = rf"\| `{question.name}` \| {re.escape(shown)} \|"
        assert re.search(row, page), question.path


def test_case_files_are_read_where_they_lie():
    for path in sorted(EXAMPLES.glob("*.toml")):
        assert load_constraints(path).tasks.count >= 1
