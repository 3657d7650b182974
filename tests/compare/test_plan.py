import importlib.util

import pytest

from foreword.compare.plan import LORA_LR, METHODS, Lora, Settings, make_plan, parse_methods
from foreword.errors import ConfigError, DataError
from foreword.train.run import DEFAULTS
from tests.bundled import bundled
from tests.compare.cases import small_task
from tests.tiny import tiny


def test_methods_come_in_one_order_and_text_is_the_hard_text():
    assert parse_methods(["lora", " kv", "text"]) == ("hard_text", "kv", "lora")
    assert parse_methods(list(METHODS)) == METHODS


@pytest.mark.parametrize(
    ("methods", "message", "hint"),
    [
        (["lorra"], "unknown method 'lorra'", "lora"),
        (["fewshot"], "unknown method 'fewshot'", "few_shot"),
        (["kv", "kv"], "named twice", ""),
        (["text", "hard_text"], "named twice", ""),
        ([], "no method", "prompt"),
    ],
)
def test_wrong_methods_are_refused(methods, message, hint):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_methods(methods)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": {"few_shot": 0.1}}, "lr for 'few_shot', which is not trained"),
        ({"methods": ("kv",), "lr": {"lora": 0.1}}, "not among the methods"),
        ({"lr": {"kv": 0.0}}, "must be above 0"),
        ({"lr": {"kv": float("nan")}}, "must be above 0"),
        ({"decoding": "label"}, "unknown decoding 'label'"),
        ({"rows_limit": 1}, "rows_limit is 1"),
        ({"timing_rounds": 0}, "timing_rounds is 0"),
        ({"mixed_requests": 1}, "mixed_requests is 1"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**changes)


def test_a_lora_without_rank_is_refused():
    with pytest.raises(ConfigError, match="lora rank is 0"):
        Lora(rank=0)
    assert Lora(rank=4).scale_alpha == 8


def test_every_method_gets_one_budget_and_its_own_rate(tmp_path):
    plan = make_plan(small_task(tmp_path), bundled(), Settings(lr={"prefix": 0.05}), ["train.steps=7", "train.seed=3"])
    runs = {method: plan.run(method) for method in ("prompt", "prefix", "kv", "lora")}
    shared = ("steps", "batch_size", "accumulate", "seed", "schedule", "warmup_steps", "clip", "weight_decay")
    for key in (*shared, "eval_every", "eval_rows", "best_by", "patience", "max_train_rows"):
        assert len({getattr(run.config, key) for run in runs.values()}) == 1, key
    assert all(run.task is plan.task for run in runs.values())
    assert {method: run.lr for method, run in runs.items()} == {
        "prompt": DEFAULTS["prompt"].lr, "prefix": 0.05, "kv": DEFAULTS["kv"].lr, "lora": LORA_LR
    }  # fmt: skip


def test_a_rate_and_a_source_in_the_task_file_are_its_methods_alone(tmp_path):
    given = ["train.method=kv", "train.lr=0.07", "train.init=from:other@1"]
    plan = make_plan(small_task(tmp_path), bundled(), Settings(), given)
    assert (plan.run("kv").lr, plan.run("kv").config.init) == (0.07, "from:other@1")
    for method in ("prompt", "prefix", "lora"):
        assert plan.run(method).lr != 0.07
        assert plan.run(method).config.init is None
    shared = make_plan(small_task(tmp_path), bundled(), Settings(), ["train.init=vocab"])
    assert [shared.run(method).config.init for method in ("prompt", "prefix", "kv")] == ["vocab"] * 3


def test_inputs_are_cut_alike_for_all_methods(tmp_path):
    base = tiny("llama", vocab_size=4096, tokenizer=bundled().tokenizer)  # 256 positions
    plan = make_plan(small_task(tmp_path, template="{soft:40}{input}"), base, Settings())
    wide = make_plan(small_task(tmp_path, template="{soft:4}{input}"), base, Settings())
    assert wide.task.config.max_input_tokens - plan.task.config.max_input_tokens == 36


def test_what_lacks_is_said_before_training(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="'colour' has no test data") as caught:
        make_plan(small_task(tmp_path / "a", test=None), bundled(), Settings())
    assert "test in [task]" in caught.value.hint
    with pytest.raises(DataError, match=r"cannot read .*gone\.jsonl"):
        make_plan(small_task(tmp_path / "b", test="gone.jsonl"), bundled(), Settings())
    with pytest.raises(ConfigError, match=r"patience need task\.dev"):
        make_plan(small_task(tmp_path / "c", dev=None), bundled(), Settings(), ["train.patience=2"])
    with pytest.raises(ConfigError, match="no closed set"):
        make_plan(small_task(tmp_path / "d", metric="bleu"), bundled(), Settings(decoding="labels"))
    after = small_task(tmp_path / "e", template="{input}{soft:3}")
    with pytest.raises(ConfigError, match="slots behind the input"):
        make_plan(after, bundled(), Settings(decoding="labels"))
    with pytest.raises(ConfigError, match="no tokenizer"):
        make_plan(small_task(tmp_path / "f"), tiny("llama"), Settings())
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else found(name, *more))
    with pytest.raises(ConfigError, match="needs the PEFT library") as caught:
        make_plan(small_task(tmp_path / "g"), bundled(), Settings())
    assert "pip install peft" in caught.value.hint
    make_plan(small_task(tmp_path / "g"), bundled(), Settings(methods=("text", "kv")))


def test_identity_names_what_training_depends_on(tmp_path):
    plan = make_plan(small_task(tmp_path), bundled(), Settings())
    other = make_plan(small_task(tmp_path), bundled(), Settings(lora=Lora(rank=4)), ["train.checkpoint_every_s=9"])
    assert plan.identity("kv", bundled()) == other.identity("kv", bundled())
    first, second = plan.identity("lora", bundled()), other.identity("lora", bundled())
    assert [key for key in first if first[key] != second[key]] == ["lora.rank"]
    (tmp_path / "colour.train.jsonl").write_text('{"input": "the red cart", "target": "warm"}\n' * 9)
    changed = make_plan(tmp_path / "colour.toml", bundled(), Settings()).identity("kv", bundled())
    assert changed["train data"] != plan.identity("kv", bundled())["train data"]
