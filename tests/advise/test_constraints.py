"""Constraints files: units, defaults that are said, and every kind of wrong input with its cure."""

import json

import pytest

from foreword.advise.bases.find import KNOWN
from foreword.advise.constraints import from_tables, load_constraints, with_overrides
from foreword.advise.questions import questions
from foreword.errors import ConfigError
from tests.advise.cases import TWO_LAYERS, made


@pytest.mark.parametrize(
    ("key", "written", "meant"),
    [
        ("storage_total_bytes", "20 MB", 20_000_000),
        ("storage_total_bytes", "20MiB", 20 * 2**20),
        ("storage_total_bytes", "1.5 GB", 1_500_000_000),
        ("storage_total_bytes", 4096, 4096),
        ("storage_total_bytes", "4096", 4096),
        ("update_deadline_hours", "1 day", 24),
        ("update_deadline_hours", "90 minutes", 24 / 16),
        ("update_deadline_hours", "2 weeks", 336),
        ("update_deadline_hours", 8, 8),
        ("first_token_added_ms", "5 ms", 5),
        ("first_token_added_ms", "0.25 s", 250),
        ("first_token_added_ms", "300 us", 0.3),
        ("first_token_added_ms", 7, 7),
        ("context_tokens", "4,096", 4096),
    ],
)
def test_amounts_in_any_unit(key, written, meant):
    limits = made(limits={key: written}, change={"review_hours": "30 min"}).limits
    assert getattr(limits, key) == pytest.approx(meant)


def test_every_default_is_said_and_nothing_given_is():
    assumed = made().assumed
    told = {line.split("`")[1] for line in assumed if line.startswith("`")}
    assert told == {q.path for q in questions() if q.table != "priorities"} | {"hardware.known"}
    assert "`change.surface`: kv_import" in assumed
    given = made(
        tasks={"count": 3},
        limits={"storage_total_bytes": "1 MB"},
        change={"prefix_cache": False},
        hardware={"known": "a100"},
    )
    for key in ("tasks.count", "limits.storage_total_bytes", "change.prefix_cache", "hardware.known"):
        assert not any(key in line for line in given.assumed)
    assert given.hardware.name == "A100"


def test_assumptions_about_the_base_are_said_too():
    base = {key: value for key, value in TWO_LAYERS.items() if key != "vocab_size"}
    assert any(line.startswith("base: ") and "vocab_size" in line for line in made(base=base).assumed)


WRONG = [
    ({"limit": {}}, "unknown table [limit]", "limits"),
    ({"limits": {"storage": "1 MB"}}, "unknown key limits.storage", "storage_total_bytes"),
    ({"tasks": {"counts": 3}}, "unknown key tasks.counts", "count"),
    ({"tasks": {"count": 2.5}}, "tasks.count = 2.5 is not a whole number", ""),
    ({"tasks": {"count": True}}, "tasks.count = True is not a whole number", ""),
    ({"tasks": {"count": 0}}, "tasks.count = 0 is less than 1", ""),
    ({"tasks": {"count": [3]}}, "tasks.count = [3] is not a whole number", ""),
    ({"tasks": {"kind": "classifying"}}, "'classifying' is none of classification", "classification"),
    ({"tasks": {"related": "maybe"}}, "'maybe' is not true or false", ""),
    ({"tasks": {"quality_target": 85}}, "= 85 is not a score from 0 to 1", "0.85"),
    ({"tasks": {"quality_target": float("nan")}}, "is not a score", ""),
    ({"limits": {"storage_total_bytes": "20 Mx"}}, "its unit is none of B, KB", "20 MB"),
    ({"limits": {"storage_total_bytes": "many"}}, "it is not a number and a unit", "20 MB"),
    ({"limits": {"storage_total_bytes": -5}}, "is less than 0", ""),
    ({"limits": {"storage_total_bytes": 0}}, "leaves no room for anything", "Leave the key out"),
    ({"limits": {"update_deadline_hours": "3 MB"}}, "its unit is none of us, ms", "1 day"),
    ({"change": {"surface": "embedding"}}, "'embedding' is none of text", "input_embeddings"),
    ({"change": "text"}, "change = 'text' is not a table", "[change]"),
    ({"hardware": {"known": "h10"}}, "'h10'", "h100"),
    ({"hardware": {"flops": 3}}, "unknown key hardware.flops", "peak_flops_per_s"),
    ({"hardware": {"peak_flops_per_s": 1e15}}, "hardware.bytes_per_s is missing", "by its name"),
    ({"hardware": {"known": 100}}, "hardware.known = 100 is not a name", ""),
    ({"traffic": {"network_gbit_s": 0}}, "traffic.network_gbit_s = 0 is less than 0.001", ""),
]


@pytest.mark.parametrize(("tables", "message", "hint"), WRONG)
def test_wrong_input_is_named_with_its_cure(tables, message, hint):
    with pytest.raises(ConfigError) as caught:
        made(**tables)
    assert message in caught.value.message
    assert hint in caught.value.hint


CONTRADICTIONS = [
    (
        {"limits": {"context_tokens": 300}, "tasks": {"input_tokens": 300, "output_tokens": 16}},
        ("limits.context_tokens = 300", "tasks.input_tokens = 300", "tasks.output_tokens = 16", "316"),
    ),
    ({"limits": {"context_tokens": 5000}}, ("limits.context_tokens = 5,000", "4,096")),
    (
        {"limits": {"update_deadline_hours": "1 h"}, "change": {"review_hours": "1 day"}},
        ("change.review_hours = 24", "limits.update_deadline_hours = 1 "),
    ),
    (
        {"limits": {"storage_per_task_bytes": "2 MB", "storage_total_bytes": "1 MB"}},
        ("limits.storage_per_task_bytes = 2,000,000", "limits.storage_total_bytes = 1,000,000"),
    ),
]


@pytest.mark.parametrize(("tables", "parts"), CONTRADICTIONS)
def test_contradictions_name_both_keys_and_values(tables, parts):
    with pytest.raises(ConfigError) as caught:
        made(**tables)
    for part in parts:
        assert part in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("base", "message", "hint"),
    [
        ({}, "no table [base]", "known"),
        ({"known": "qwen3-32"}, "base.known = 'qwen3-32'", "qwen3-32b"),
        ({"known": 3}, "base.known = 3", ""),
        ({"known": "qwen3-32b", "folder": "x"}, "both name the base", "one of them"),
        ({"known": "qwen3-32b", "num_layers": 3}, "base.known stands beside base.num_layers", ""),
        ({"num_layers": 3}, "hidden_size", ""),
        ({**TWO_LAYERS, "num_layer": 3}, "num_layer", "num_layers"),
    ],
)
def test_a_wrong_base_is_named(base, message, hint):
    with pytest.raises(ConfigError) as caught:
        from_tables({"base": base})
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_files_overrides_and_a_base_beside_the_file(tmp_path):
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 500,
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    path = tmp_path / "c.toml"
    path.write_text('[base]\nfolder = "model"\n[tasks]\ncount = 4\n')
    read = load_constraints(path, ["limits.storage_total_bytes=3 MB", "tasks.count=7", 'change.surface="lora"'])
    assert (read.base.num_layers, read.tasks.count, read.change.surface) == (2, 7, "lora")
    assert read.limits.storage_total_bytes == 3e6
    with pytest.raises(ConfigError, match=r"c\.toml: unknown key tasks\.coun"):
        load_constraints(path, ["tasks.coun=7"])
    for override, message in [("count=3", "not of the form"), ("task.count=3", "unknown table"), ("tasks.=3", "form")]:
        with pytest.raises(ConfigError, match=message):
            load_constraints(path, [override])
    with pytest.raises(ConfigError, match="cannot read"):
        load_constraints(tmp_path / "none.toml")
    path.write_text("[base\n")
    with pytest.raises(ConfigError, match="not TOML"):
        load_constraints(path)
    path.write_bytes(b'[base]\nknown = "\xff"\n')
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_constraints(path)


def test_an_override_leaves_the_given_tables_alone():
    tables = {"tasks": {"count": 1}}
    assert with_overrides(tables, ["tasks.count=2"])["tasks"]["count"] == 2
    assert tables == {"tasks": {"count": 1}}


def test_known_bases_are_found_in_any_case():
    assert from_tables({"base": {"known": "Qwen3-32B"}}).base is KNOWN["qwen3-32b"]


def test_replaced_changes_one_key():
    before = made(limits={"storage_total_bytes": "1 MB"})
    after = before.replaced("limits.storage_total_bytes", None)
    assert (before.limits.storage_total_bytes, after.limits.storage_total_bytes) == (1e6, None)
    assert after.tasks == before.tasks
