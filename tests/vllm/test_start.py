"""What the plug-in refuses at start, with vLLM's own classes; and what it does when a write fails."""

import json
import subprocess

import pytest

from tests.vllm.server import ROOT, environment

REFUSED = {
    "recompute": "recompute",
    "producer": "kv_producer",
    "eagle": "eagle",
    "context parallel": "context parallelism",
    "mamba": "layer layers.1.mixer keeps a MambaSpec",
    "latents": "layer layers.0.attn keeps a MLAAttentionSpec",
    "chunked": "ChunkedLocalAttentionSpec",
    "cross": "CrossAttentionSpec",
    "groups": "2 groups of pages",
    "no cache": "0 groups of pages",
    "shared": "model.layers.1.attn has no cache of its own, it uses that of model.layers.0.attn",
    "encoder": "model.layers.1.attn",
    "mla layer": "MLAAttention",
    "subclass": "Odd",
    "backend": "backend ODD",
    "twice": "several caches",
    "unknown key": "unknown key 'blob'",
    "other version": "vLLM 0.34.0 is not supported",
}
ACCEPTED = {"engine": None, "full": 32, "sliding": 32, "head sizes": 32, "layers": [0, 1]}


@pytest.fixture(scope="module")
def said():
    command = [environment() / "bin/python", "-m", "tests.vllm.inside"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_with_a_cure(said, case):
    assert REFUSED[case] in said[case]["message"] and said[case]["hint"]


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_can_be_served_is_not(said, case):
    assert said[case] == {"value": ACCEPTED[case]}


def test_every_case_is_looked_at(said):
    assert said.keys() == REFUSED.keys() | ACCEPTED.keys() | {"failing worker", "failed write"}


def test_a_write_that_fails_is_reported_by_the_pages_that_it_would_have_filled(said):
    assert said["failing worker"]["value"] == {"errors": [3, 4, 9], "loads": 1, "refused": ["r", "r"]}


def test_after_a_failed_write_no_page_stays_in_the_prefix_cache(said):
    assert said["failed write"]["value"] == [50]
