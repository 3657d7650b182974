"""vLLM with the plug-in answers as the embedded engine does, and a prefix costs it no prefill."""

import json

import httpx
import pytest

from foreword.core.artefact import load_artefact
from foreword.core.compile import compile
from foreword.demo.tour import HERE
from foreword.eval.tasks import read_rows
from foreword.train.loop import fit
from foreword.train.run import Run
from tests.bundled import BASE
from tests.vllm.cases import Ask, World, answers, body, figures, ids, post, save_tiny, tokens
from tests.vllm.server import BLOCK, vllm_server

KINDS = [("prompt", 7), ("prompt", BLOCK), ("prefix", BLOCK - 1), ("prefix", BLOCK + 1), ("kv", 2 * BLOCK), ("kv", 45)]
"""Shorter than a page, whole pages, and what is left over."""


def mixed(world, count, longest=90):
    """Requests for every version of the world and for the plain base, of all lengths."""
    versions = [*world.versions.values(), None]
    return [
        Ask(versions[index % len(versions)], ids(1 + (37 * index) % longest, index), 2 + index % 9)
        for index in range(count)
    ]


def served(url, asks, **changes):
    return [tokens(response) for response in answers(url, [body(ask, **changes) for ask in asks])]


def test_mixed_in_one_batch_with_chunks_and_cached_pages(llama):
    for kind, count in [*KINDS, ("blocked", 70)]:
        llama.world.add(kind, count)
    asks = mixed(llama.world, 48)
    assert max(len(ask.ids) for ask in asks) > 64  # longer than a chunk
    expected = llama.world.expect(asks)
    assert served(llama.url, asks) == expected
    assert served(llama.url, asks[::-1]) == expected[::-1]


def test_a_new_version_asked_for_sixteen_times_at_once(llama):
    version = llama.world.add("prefix", 50, seed=3)
    asks = [Ask(version, ids(5, seed=index // 2)) for index in range(16)]
    before = figures(llama.url)
    assert served(llama.url, asks) == llama.world.expect(asks)
    assert figures(llama.url)["vllm:foreword_load_seconds_count"] - before["vllm:foreword_load_seconds_count"] == 1


def test_a_prefix_costs_no_prefill(llama):
    version = llama.world.add("kv", 3 * BLOCK + 5, seed=4)
    computed = 'vllm:prompt_tokens_by_source_total{source="local_compute"}'
    for round_number in range(2):
        asks = [Ask(version, ids(9 + index, seed=100 * round_number + index)) for index in range(4)]
        before = figures(llama.url)
        responses = answers(llama.url, [body(ask) for ask in asks])
        assert [tokens(response) for response in responses] == llama.world.expect(asks)
        own = sum(len(ask.ids) for ask in asks)
        assert figures(llama.url)[computed] - before[computed] == own
        for ask, response in zip(asks, responses, strict=True):
            usage = response.json()["usage"]
            assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] == len(ask.ids)


def test_whole_pages_are_shared_and_only_the_rest_is_written_again(llama):
    version = llama.world.add("prompt", 2 * BLOCK + 3, seed=5)
    written, shared = [], []
    for seed in range(2):
        before = figures(llama.url)
        tokens(post(llama.url, body(Ask(version, ids(4, seed=200 + seed)))))
        after = figures(llama.url)
        written.append(after["vllm:foreword_written_total"] - before["vllm:foreword_written_total"])
        shared.append(after["vllm:prefix_cache_hits_total"] - before["vllm:prefix_cache_hits_total"])
    assert written == [2 * BLOCK + 3, 3]
    assert shared == [0, 2 * BLOCK]


def test_several_answers_and_streams_of_one_prompt(llama):
    version = llama.world.add("prefix", 40, seed=6)
    ask = Ask(version, ids(6, seed=6), 7)
    (expected,) = llama.world.expect([ask])
    both = post(llama.url, body(ask, n=2, temperature=1e-5)).json()["choices"]
    assert [choice["token_ids"] for choice in both] == [expected, expected]
    with httpx.stream("POST", f"{llama.url}/v1/completions", json=body(ask, stream=True), timeout=60) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    chunks = [json.loads(line)["choices"][0] for line in lines if line != "[DONE]"]
    assert [token for chunk in chunks for token in chunk["token_ids"]] == expected


def test_trained_tasks_of_the_demo(tmp_path):
    world = World.make(BASE, tmp_path)
    runs = [
        Run.from_toml(HERE / "tasks" / task / f"{task}.toml", method=method, steps=30)
        for task, method in (("triage", "prompt"), ("clause", "prefix"), ("order_slots", "kv"))
    ]
    for run, result in zip(runs, fit(world.base, runs, out=tmp_path / "runs"), strict=True):
        world.add_prefix(run.name, compile(world.base, load_artefact(result.artefact)))
    asks = []
    for run in runs:
        version, template = world.versions[run.name], world.prefixes[run.name].template
        for row in read_rows(HERE / "tasks" / run.task.name / "test.jsonl")[:8]:
            asks.append(Ask(version, tuple(template.render(world.base.tokenizer, row.input).ids), 12))
    asks += [Ask(None, ids(20 + index, index), 12) for index in range(4)]
    expected = world.expect(asks)
    with vllm_server(world.model, world.blobs, max_model_len=1024) as url:
        assert served(url, asks) == expected
        assert served(url, asks[::-1]) == expected[::-1]


NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
WINDOW = {"sliding_window": 72}
HYBRID = {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


# vLLM's CPU workers make the buffers between stages in the warm-up that --enforce-eager leaves out.
STAGES = {"args": ["-pp", "2", "--no-enable-prefix-caching", "-cc", '{"mode":1,"backend":"eager"}'], "eager": False}
LAYOUTS = {
    "tensor-parallel": ("qwen3", {}, {"args": ["-tp", "2"]}),
    "pipeline-parallel-without-prefix-cache": ("qwen3", {}, STAGES),
    "sliding-and-full": ("gemma3", HYBRID, {}),
    "sliding-only-with-speculation": ("mistral-window", WINDOW, {"args": ["--speculative-config", json.dumps(NGRAM)]}),
}


@pytest.mark.parametrize("name, changes, options", LAYOUTS.values(), ids=LAYOUTS)
def test_other_layouts(tmp_path, name, changes, options):
    world = World.make(save_tiny(tmp_path / "base", name, **changes), tmp_path)
    for kind, count in KINDS:
        world.add(kind, count)
    asks = mixed(world, 21, longest=120)
    expected = world.expect(asks)
    with vllm_server(world.model, world.blobs, **options) as url:
        assert served(url, asks) == expected
        assert served(url, asks[::-1]) == expected[::-1]
