"""The six case files: verdicts, and numbers worked out here by hand, not copied from the report."""

import re
from types import SimpleNamespace

import pytest

from foreword.advise.decide import decide
from foreword.report import write
from tests.advise.cases import CASES, EXAMPLES, case, essay

VERDICTS = {
    "thirty_b_twelve_tasks": "prompt",
    "startup_ten_tasks": "compiled_prompt",
    "latency_thirty_tasks": "prompt",
    "business_units": "compiled_prompt",
    "small_base_tagging": "kv",
    "text_only_api": "few_shot",
}
QWEN = 32_762_123_264
LLAMA_8B = 8_030_261_248
LLAMA_70B = 70_553_706_496
"""Parameters as published; tests/advise/test_bases.py counts them from shapes."""


def cost(decision, method, key):
    return decision.standing(method).effects.cost.value(key)


def turns(name):
    """Flips by key and direction."""
    return {(flip["key"], flip["direction"]): SimpleNamespace(**flip) for flip in essay(name).data["flips"]}


def rungs(name):
    """Flips of ladders: (key, rung) -> method."""
    flips = essay(name).data["flips"]
    return {(f["key"], f["first_other"]): f["recommended"] for f in flips if f["direction"] == "instead"}


@pytest.mark.parametrize("name", CASES)
def test_verdicts(name):
    assert decide(case(name)).recommended == VERDICTS[name]


def test_thirty_b_twelve_tasks():
    decision = decide(case("thirty_b_twelve_tasks"))
    layers, width, kv_heads, head = 64, 5120, 8, 128
    prompt, kv = 20 * width * 2, 2 * layers * 20 * kv_heads * head * 2
    assert (prompt, kv) == (204_800, 5_242_880)
    assert cost(decision, "prompt", "bytes_all_tasks") == 12 * prompt
    assert cost(decision, "kv", "bytes_per_task") == kv
    assert cost(decision, "prefix", "bytes_per_task") == layers * 20 * width * 2
    assert cost(decision, "lora", "bytes_per_task") == pytest.approx(268e6, rel=2e-3)
    dense, cross, own = 2 * QWEN * 20, 4 * layers * 64 * head * 20 * 300, 4 * layers * 64 * head * 20 * 21 / 2
    assert cost(decision, "prompt", "prefill_s_uncached") == pytest.approx((dense + cross + own) / 400e12, rel=2e-3)
    assert cost(decision, "prompt", "decode_s_per_token") == pytest.approx(kv / 3.35e12)
    wire = (20 + 300) * width * 2 * 4 / 3
    effects = decision.standing("prompt").effects
    assert effects.wire_bytes == pytest.approx(wire)
    assert effects.first_token_s == pytest.approx(
        wire * 8 / 1e10 + cross / 400e12, rel=2e-3
    )  # 60 + 20 fill five blocks
    assert {s.name for s in decision.ranking} == {"hard_text", "few_shot", "prompt"}
    keys = {objection.key for objection in decision.standing("kv").objections}
    assert keys == {"change.surface", "limits.storage_total_bytes"}  # 62.9 MB in 20 MB

    found = turns("thirty_b_twelve_tasks")
    assert found["limits.storage_total_bytes", "below"].last_same == pytest.approx(12 * prompt, rel=1e-4)
    assert found["tasks.count", "above"].last_same == 20_000_000 // prompt == 97
    assert found["limits.context_tokens", "below"].last_same == 20 + 300 + 8
    assert rungs("thirty_b_twelve_tasks")["change.surface", "kv_import"] == "compiled_prompt"
    assert rungs("thirty_b_twelve_tasks")["change.surface", "text"] == "few_shot"


def test_startup_ten_tasks():
    decision = decide(case("startup_ten_tasks"))
    assert cost(decision, "compiled_prompt", "bytes_all_tasks") == 10 * 20 * 4096 * 2 == 1_638_400
    assert cost(decision, "kv", "bytes_all_tasks") == 10 * 2 * 32 * 20 * 8 * 128 * 2 == 26_214_400
    assert cost(decision, "ia3", "bytes_per_task") == 32 * (2 * 8 * 128 + 14336) * 2
    maps = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
    assert cost(decision, "lora", "bytes_per_task") == 32 * 16 * sum(a + b for a, b in maps) * 2
    for name in ("kv", "prefix", "lora"):
        (objection,) = decision.standing(name).objections
        assert objection.key == "limits.storage_total_bytes" and objection.allowed == 5_000_000
    found = turns("startup_ten_tasks")
    assert found["tasks.count", "above"].last_same == 5_000_000 // (20 * 4096 * 2) == 30
    assert found["limits.storage_total_bytes", "below"].last_same == pytest.approx(1_638_400, rel=1e-4)
    assert rungs("startup_ten_tasks")["change.surface", "input_embeddings"] == "prompt"


def test_latency_thirty_tasks():
    decision = decide(case("latency_thirty_tasks"))
    effects = decision.standing("prompt").effects
    wire = (20 + 120) * 4096 * 2 * 4 / 3
    tail = 2 * LLAMA_8B * 4 / 400e12  # 20 vectors leave 4 behind a block of 16
    cross = 4 * 32 * 32 * 128 * 20 * 120 / 400e12
    assert effects.wire_s == pytest.approx(wire * 8 / 1e10)
    assert effects.prefill_s == pytest.approx(tail + cross, rel=2e-3)
    assert effects.wire_s > 7 * effects.prefill_s
    found = turns("latency_thirty_tasks")
    assert found["limits.wire_bytes", "below"].last_same == pytest.approx(wire, rel=1e-4)
    slowest = wire * 8 / (5e-3 - effects.prefill_s) / 1e9
    assert found["traffic.network_gbit_s", "below"].last_same == pytest.approx(slowest, rel=1e-3)
    assert effects.per_token_s == pytest.approx(32 * 2 * 32 * 20 * 8 * 128 * 2 / 3.35e12)  # 32 sequences a step
    assert found["traffic.requests_per_s", "above"].last_same == pytest.approx(1e10 / 8 / wire, rel=1e-3)
    assert decision.constraints.priorities.latency == 2
    assert rungs("latency_thirty_tasks")["change.surface", "kv_import"] in ("compiled_prompt", "kv")


def test_business_units():
    decision = decide(case("business_units"))
    assert cost(decision, "compiled_prompt", "bytes_all_tasks") == 30 * 20 * 8192 * 2 == 9_830_400
    assert cost(decision, "kv", "bytes_all_tasks") == 30 * 2 * 80 * 20 * 8 * 128 * 2 == 196_608_000
    audit = {s.name: p.value for s in decision.ranking for p in s.points if p.criterion == "audit"}
    assert audit == {"hard_text": 0, "few_shot": 0, "prompt": 1, "compiled_prompt": 1, "kv": 2}
    dense = 4 * LLAMA_70B * 1500 * 5 * (500 + 20) / 400e12 / 3600  # 4·N a position, vectors among them
    assert cost(decision, "compiled_prompt", "training_dense_hours") == pytest.approx(dense, rel=2e-3)
    found = turns("business_units")
    assert found["tasks.baseline_score", "above"].recommended == "hard_text"
    assert found["tasks.baseline_score", "above"].first_other == pytest.approx(0.88, abs=1e-3)
    assert found["tasks.rows_per_task", "above"].last_same == 10_000
    assert rungs("business_units")["base", "qwen3-0.6b"] == "kv"


def test_small_base_tagging():
    decision = decide(case("small_base_tagging"))
    assert cost(decision, "kv", "bytes_per_task") == 2 * 28 * 64 * 8 * 128 * 2 == 7_340_032
    assert cost(decision, "prefix", "bytes_per_task") == 28 * 64 * 1024 * 2 == 3_670_016
    maps = [(1024, 2048), (1024, 1024), (1024, 1024), (2048, 1024), (1024, 3072), (1024, 3072), (3072, 1024)]
    assert cost(decision, "lora", "bytes_per_task") == 28 * 16 * sum(a + b for a, b in maps) * 2
    assert decision.need.reach == 3 and len(decision.need.reasons) == 2
    far_enough = [s.name for s in decision.ranking if not s.shortfall]
    assert set(far_enough) == {"kv", "prefix", "lora"}
    found = turns("small_base_tagging")
    assert found["limits.storage_per_task_bytes", "below"].recommended == "prefix"
    assert found["limits.storage_per_task_bytes", "below"].last_same == pytest.approx(7_340_032, rel=1e-4)
    assert found["tasks.rows_per_task", "above"].recommended == "lora"
    assert found["tasks.rows_per_task", "above"].last_same == 10_000
    assert rungs("small_base_tagging")["change.surface", "input_embeddings"] == "prompt"
    assert rungs("small_base_tagging")["tasks.kind", "new_skill"] == "lora"


def test_text_only_api():
    decision = decide(case("text_only_api"))
    assert [s.name for s in decision.ranking] == ["few_shot", "hard_text"]
    assert decision.best.shortfall == 1  # examples where vectors are called for

    def first_token_s(shots, layers=80, heads=64, head=128):
        tokens = 150 + shots * 660
        attention = 4 * layers * heads * head * (tokens * 600 + tokens * (tokens + 1) / 2)
        return (2 * LLAMA_70B * tokens + attention) / 400e12

    assert decision.best.effects.first_token_s == pytest.approx(first_token_s(6), rel=2e-3)
    found = turns("text_only_api")
    assert first_token_s(7) < 2 < first_token_s(8)
    assert found["tasks.shots", "above"].last_same == 7
    assert found["tasks.shots", "above"].recommended == "hard_text"
    assert found["limits.context_tokens", "below"].last_same == 150 + 6 * 660 + 600 + 60
    assert rungs("text_only_api")["change.surface", "input_embeddings"] == "prompt"


@pytest.mark.parametrize("name", CASES)
def test_reports_are_what_the_files_give(name, tmp_path):
    write(essay(name), tmp_path / f"{name}.md")
    kept = (EXAMPLES / f"reports/{name}.md").read_text()
    assert (tmp_path / f"{name}.md").read_text() == kept
    pictures = re.findall(r"\]\(([^)]+\.svg)\)", kept)
    assert len(pictures) == 2
    assert all((EXAMPLES / "reports" / picture).is_file() for picture in pictures)


def test_the_readme_tells_every_case():
    page = (EXAMPLES / "README.md").read_text()
    for name in CASES:
        assert f"reports/{name}.md" in page
    assert {path.stem for path in EXAMPLES.glob("*.toml")} == set(CASES)
