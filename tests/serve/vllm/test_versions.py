"""The plug-in's scheduler side: which versions are fetched, loaded, kept and dropped, and which requests must fail."""

import threading
from types import SimpleNamespace

import pytest

from foreword.errors import RegistryError
from foreword.serve.vllm.blocks import Load
from foreword.serve.vllm.versions import RETRY_S, Answer, Fetched, Versions, read_request
from foreword.serve.vllm.wire import Wanted, cache_salt, scope_of

SCOPE = scope_of("x")
READY, WAIT, REFUSED = Answer.READY, Answer.WAIT, Answer.REFUSED


def wanted(letter, positions=8):
    return Wanted(letter * 64, positions, SCOPE)


class Engine:
    """Versions of 100 bytes, a clock to turn, and workers that obey at once (or when told)."""

    def __init__(self, *, workers=1, host_bytes=250, idle_s=1e6, timeout_s=60.0, sizes=None):
        self.now, self.sizes, self.fetched, self.held = 0.0, sizes or {}, [], set()
        self.gates, self.missing, self.workers = {}, set(), workers
        self.versions = Versions(
            self.fetch,
            num_workers=workers,
            host_bytes=host_bytes,
            idle_s=idle_s,
            timeout_s=timeout_s,
            clock=lambda: self.now,
        )

    def fetch(self, sha256):
        letter = sha256[0]
        self.fetched.append(letter)
        if gate := self.gates.get(letter):
            gate.wait(5)
        if letter in self.missing:
            raise RegistryError(f"{letter} is gone")
        return Fetched(8, self.sizes.get(letter, 100))

    def ask(self, letter, request="r", cached=0, positions=8):
        return self.versions.ask(wanted(letter, positions), request, cached)

    def step(self, keep=(), failed=None, obey=True):
        """One engine step; return the letters loaded and dropped."""
        loads, drops = self.versions.plan({letter * 64 for letter in keep})
        if obey:
            for sha256 in drops:
                self.held.discard(sha256[0])
            good = [load for load in loads if not failed or load.sha256[0] not in failed]
            self.held |= {load.sha256[0] for load in good}
            bad = {load: failed[load.sha256[0]] for load in loads if load not in good}
            self.versions.report(dict.fromkeys(good, self.workers), bad)
        return [load.sha256[0] for load in loads], [sha256[0] for sha256 in drops]

    def settle(self):
        """Wait until a fetch that nothing holds has ended."""
        while self.versions.background._done.empty():
            self.versions.background.progress.wait(1)

    def bring(self, letter):
        """Ask for a version until it is resident; return what was dropped for it."""
        assert self.ask(letter) is WAIT
        self.settle()
        loads, drops = self.step()
        assert loads == [letter] and self.ask(letter) is READY
        return drops


def test_a_version_is_fetched_once_loaded_once_and_then_ready():
    engine = Engine()
    gate = engine.gates["a"] = threading.Event()
    assert [engine.ask("a", request) for request in "rst"] == [WAIT] * 3
    assert engine.step() == ([], []) and engine.versions.fetching
    gate.set()
    engine.settle()
    assert engine.step() == (["a"], []) and not engine.versions.fetching
    assert [engine.ask("a", request) for request in "rstu"] == [READY] * 4
    assert engine.fetched == ["a"]
    assert engine.versions.take_figures() == {"load_seconds": [0.0], "resident": 1, "host_bytes": 100}
    assert engine.versions.take_figures() == {}


def test_it_is_ready_when_every_worker_has_it():
    engine = Engine(workers=3)
    engine.ask("a")
    engine.settle()
    (load,), _ = engine.versions.plan(set())
    for count, answer in ((1, WAIT), (1, WAIT), (1, READY)):
        engine.versions.report({load: count}, {})
        assert engine.ask("a") is answer


def test_one_worker_that_fails_drops_it_everywhere():
    engine = Engine(workers=2)
    engine.ask("a")
    engine.settle()
    (load,), _ = engine.versions.plan(set())
    engine.versions.report({load: 1}, {load: "two layers"})
    assert engine.ask("a") is REFUSED and engine.versions.host_bytes == 0
    assert engine.versions.plan(set())[1] == ("a" * 64,)
    engine.versions.report({load: 1}, {})
    assert engine.ask("a") is REFUSED


def test_what_cannot_be_fetched_is_refused_and_tried_again_later():
    engine = Engine()
    engine.missing.add("a")
    assert engine.ask("a") is WAIT
    engine.settle()
    engine.step()
    assert engine.ask("a") is REFUSED and engine.fetched == ["a"]
    engine.missing.clear()
    engine.now += RETRY_S
    engine.bring("a")
    assert engine.fetched == ["a", "a"]


def test_a_store_that_hangs_fails_in_time_and_stalls_no_other():
    engine = Engine(timeout_s=5)
    gate = engine.gates["a"] = threading.Event()
    assert engine.ask("a") is WAIT
    engine.bring("b")
    engine.now += 5.1
    engine.step()
    assert engine.ask("a") is REFUSED
    gate.set()
    engine.settle()
    engine.step()
    assert engine.ask("a") is REFUSED  # the late one is not taken for a new one
    engine.now += RETRY_S
    engine.bring("a")


def test_a_load_that_hangs_fails_in_time_and_its_late_report_counts_for_nothing():
    engine = Engine(timeout_s=5)
    engine.ask("a")
    engine.settle()
    (late,), _ = engine.versions.plan(set())
    engine.now += 5.1
    assert engine.step() == ([], ["a"]) and engine.ask("a") is REFUSED
    engine.now += RETRY_S
    engine.ask("a")
    engine.settle()
    (load,), _ = engine.versions.plan(set())
    engine.versions.report({late: 1}, {})
    assert engine.ask("a") is WAIT
    engine.versions.report({load: 1}, {})
    assert engine.ask("a") is READY


def test_other_numbers_of_positions_are_refused_even_where_the_engine_has_the_pages():
    engine = Engine()
    engine.bring("a")
    assert [engine.ask("a", cached=8, positions=count) for count in (1, 7, 9)] == [REFUSED] * 3
    assert engine.ask("a", cached=8) is READY


def test_what_the_engine_has_in_its_own_pages_needs_no_load():
    engine = Engine()
    engine.bring("a")
    engine.bring("b")
    assert engine.bring("c") == ["a"]
    assert engine.ask("a", cached=8) is READY and engine.fetched == ["a", "b", "c"]
    assert engine.ask("a", cached=4) is WAIT


def test_the_least_recently_named_goes_first():
    engine = Engine()
    for letter in "ab":
        engine.bring(letter)
        engine.now += 1
    assert engine.ask("a") is READY
    engine.now += 1
    assert engine.bring("c") == ["b"] and engine.versions.host_bytes == 200
    assert engine.versions.take_figures()["dropped"] == 1


def test_what_is_written_in_this_step_and_what_was_promised_stays():
    engine = Engine(host_bytes=100)
    engine.bring("a")
    engine.ask("b")
    engine.settle()
    assert engine.step(keep="a") == ([], [])
    assert engine.step(obey=False) == (["b"], ["a"])
    engine.ask("a", "s")
    engine.settle()
    assert engine.step() == ([], [])  # b is being loaded
    engine.versions.report({Load("b" * 64, 2): 1}, {})
    assert engine.step() == ([], [])  # b's request has not started yet
    assert engine.ask("b") is READY
    assert engine.step() == (["a"], ["b"])


def test_requests_that_went_hold_nothing():
    engine = Engine(host_bytes=100)
    engine.ask("a", "gone")
    engine.settle()
    engine.step()
    engine.ask("b", "s")
    engine.settle()
    assert engine.step() == ([], [])
    engine.versions.forget("a" * 64, "gone")
    assert engine.step() == (["b"], ["a"])


def test_what_can_never_fit_is_refused_and_drops_nobody():
    engine = Engine(sizes={"z": 251})
    engine.bring("a")
    assert engine.ask("z") is WAIT
    engine.settle()
    assert engine.step() == ([], []) and engine.ask("z") is REFUSED and engine.ask("a") is READY


def test_nothing_is_dropped_where_dropping_would_not_be_enough():
    engine = Engine(sizes={"y": 240})
    engine.bring("a")
    engine.bring("b")
    engine.ask("b", "waits")
    engine.ask("y")
    engine.settle()
    assert engine.step(keep="b") == ([], []) and engine.ask("a") is READY


def test_idle_versions_are_dropped():
    engine = Engine(idle_s=10)
    engine.bring("a")
    engine.now += 6
    engine.bring("b")
    engine.now += 6
    assert engine.step(keep="a") == ([], [])
    engine.now += 1
    assert engine.step() == ([], ["a"]) and engine.held == {"b"}


def test_all_can_be_dropped_and_come_again():
    engine = Engine()
    engine.bring("a")
    engine.bring("b")
    engine.versions.drop_all("told")
    assert engine.step() == ([], ["a", "b"]) and engine.versions.host_bytes == 0
    engine.bring("a")


def request(**changes):
    it = wanted("a")
    made = {
        "kv_transfer_params": it.to_params(),
        "cache_salt": it.salt,
        "num_prompt_tokens": 9,
        "skip_reading_prefix_cache": False,
        "lora_request": None,
        "pooling_params": None,
        "resumable": False,
    }
    return SimpleNamespace(**{**made, **changes})


def test_requests_are_plain_right_or_refused():
    assert read_request(request(kv_transfer_params=None)) is None
    asked = read_request(request())
    assert asked.wanted == wanted("a") and not asked.refusal and not asked.refused


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"kv_transfer_params": {}}, "kv_transfer_params"),
        ({"kv_transfer_params": "x"}, "kv_transfer_params"),
        ({"kv_transfer_params": {"foreword": {"sha256": "a" * 64, "positions": 8, "scope": "?"}}}, "scope"),
        ({"cache_salt": None}, "cache_salt"),
        ({"cache_salt": cache_salt(scope_of("y"), "a" * 64)}, "cache_salt"),
        ({"cache_salt": cache_salt(SCOPE)}, "cache_salt"),
        ({"num_prompt_tokens": 8}, "8 positions in a prompt of 8"),
        ({"skip_reading_prefix_cache": True}, "prompt_logprobs"),
        ({"lora_request": object()}, "LoRA"),
        ({"pooling_params": object()}, "generation"),
        ({"resumable": True}, "generation"),
    ],
)
def test_requests_that_must_fail_say_why(changes, named):
    asked = read_request(request(**changes))
    assert asked.refused and named in asked.refusal
