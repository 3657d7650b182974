"""Scheduler, pool and loop without torch: any order of events ends every row, gives every block back, mixes up none."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreword.engine.intake import Job, make_rows
from foreword.engine.kvpool import BlockPool, count_blocks, parse_bytes
from foreword.engine.loop import Loop
from foreword.engine.render import Prepared
from foreword.engine.request import Request
from foreword.engine.scheduler import Scheduler
from foreword.engine.sequence import PrefixEntry
from foreword.errors import ConfigError
from tests.engine.fakes import END, FakeRunner, answer


class Place:
    """A loop over a fake runner, and everything that its rows said."""

    def __init__(self, num_blocks=40, block_size=4, max_batch=5, chunk_tokens=9):
        self.runner = FakeRunner(block_size)
        self.loop = Loop(
            Scheduler(BlockPool(num_blocks, block_size), max_batch=max_batch, chunk_tokens=chunk_tokens),
            self.runner,
            frozenset({END}),
        )
        self.entries = {}
        self.rows = []
        self.ends = {}
        self.version = 0

    def add(self, name, num_positions):
        self.version += 1
        old = self.entries.get(name)
        self.entries[name] = PrefixEntry(name=name, num_positions=num_positions, payload=(name, self.version))
        if old:
            self.loop.retire(old)

    def submit(self, prompt, prefix=None, max_tokens=4, n=1, is_streaming=True):
        entry = self.entries.get(prefix)
        request = Request(prompt_ids=prompt, max_tokens=max_tokens, n=n)
        job = Job(request, Prepared(list(prompt), (), max_tokens, None), entry, None)
        number = len(self.rows)
        said = {index: [] for index in range(n)}

        def on_chunk(chunk):
            assert (number, chunk.index) not in self.ends, "a chunk behind the last one"
            said[chunk.index] += chunk.token_ids
            if chunk.finish_reason:
                self.ends[number, chunk.index] = chunk.finish_reason

        rows = make_rows(job, on_chunk, is_streaming=is_streaming)
        self.rows.append((request, entry, rows, said))
        assert self.loop.offer(rows, 10_000)
        return rows

    def step(self):
        self.loop.step()
        self.loop.scheduler.check_integrity()

    def drain(self, steps=3000):
        for _ in range(steps):
            if not self.loop.has_work:
                break
            self.step()
        assert not self.loop.has_work, "the loop does not come to an end"
        self.loop.scheduler.check_balance()

    def check_answers(self):
        for number, (request, entry, _, said) in enumerate(self.rows):
            right = answer(entry.payload if entry else None, request.prompt_ids, request.max_tokens)
            for index in range(request.n):
                reason = self.ends[number, index]
                if reason in ("stop", "length"):
                    assert said[index] == right
                    assert (reason == "length") == (len(right) == request.max_tokens)
                else:
                    assert said[index] == right[: len(said[index])]


prompts = st.integers(1, 30).flatmap(lambda n: st.lists(st.integers(1, 5), min_size=n, max_size=n))
events = st.one_of(
    st.tuples(
        st.just("submit"),
        prompts,
        st.sampled_from([None, "a", "b", "c"]),
        st.integers(1, 12),
        st.sampled_from([1, 1, 1, 2, 7]),
    ),
    st.tuples(st.just("add"), st.sampled_from("abc"), st.integers(1, 17)),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("abort"), st.integers(0, 30)),
    st.tuples(st.just("poison"), st.sampled_from([None, 3, ("a", 1), ("b", 2)])),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(events, max_size=60),
    st.integers(19, 60),
    st.sampled_from([1, 4, 5]),
    st.integers(1, 6),
    st.integers(1, 40),
)
def test_any_schedule(script, num_blocks, block_size, max_batch, chunk_tokens):
    num_blocks = num_blocks * 4 // block_size + 1  # the largest request fits: 17 + 30 + 12 positions, and one block
    place = Place(num_blocks, block_size, max_batch, chunk_tokens)
    was_poisoned = False
    for name, *values in script:
        if name == "submit":
            place.submit(values[0], values[1], values[2], values[3])
        elif name == "add":
            place.add(*values)
        elif name == "step":
            for _ in range(values[0]):
                place.step()
        elif name == "abort" and values[0] < len(place.rows):
            place.loop.abort(place.rows[values[0]][2])
        elif name == "poison":
            place.runner.poison, was_poisoned = values[0], True
    place.drain()
    place.check_answers()
    if not was_poisoned:
        assert "error" not in place.ends.values()
    for entry in place.entries.values():
        place.loop.retire(entry)
    place.loop.tidy()
    assert place.loop.stats(0).blocks_free == num_blocks


def test_full_blocks_of_a_prefix_are_shared_and_the_tail_is_copied():
    place = Place(num_blocks=20)
    place.add("a", 10)
    for _ in range(3):
        place.submit([1, 2], "a", max_tokens=3)
    place.step()
    blocks = [row[2][0].blocks for row in place.rows]
    assert [row[:2] for row in blocks] == [blocks[0][:2]] * 3
    assert len({row[2] for row in blocks}) == 3
    assert place.loop.stats(1).prefix_blocks == 3
    assert place.loop.stats(1).blocks_free == 20 - 3 - 3 * (count_blocks(10 + 2 + 3, 4) - 2)


def test_siblings_compute_their_prompt_once():
    place = Place(num_blocks=60, max_batch=8, chunk_tokens=64)
    place.submit([1, 2, 3, 4, 5] * 4, max_tokens=6, n=5)
    place.drain()
    place.check_answers()
    assert place.runner.batches[:2] == [[20], [1] * 5]


def test_siblings_that_do_not_fit_together_take_turns():
    place = Place(num_blocks=9, block_size=4)
    place.add("a", 6)
    place.submit([1] * 10, "a", max_tokens=8, n=4)
    place.drain()
    place.check_answers()


def test_decode_rows_are_never_padded_to_a_prompt():
    place = Place(num_blocks=60, chunk_tokens=20)
    place.submit([1, 2, 3], max_tokens=9)
    place.step()
    place.submit([4] * 20, max_tokens=9)
    place.step()
    assert place.runner.batches[1:] == [[1], [20]]


def test_prefill_batches_hold_similar_lengths_and_no_more_than_chunk_tokens():
    place = Place(num_blocks=200, max_batch=20, chunk_tokens=30)
    for length in (9, 2, 10, 25, 8, 2, 3):
        place.submit([1] * length, max_tokens=1)
    place.drain()
    place.check_answers()
    assert place.runner.batches == [[9, 10, 8], [2, 2, 3], [25]]


def test_first_come_first_served_even_when_a_later_row_would_fit():
    place = Place(num_blocks=10, block_size=4)
    place.submit([1] * 20, max_tokens=8)
    place.submit([2] * 20, max_tokens=8)
    place.submit([3], max_tokens=2)
    place.step()
    assert len(place.loop.scheduler.running) == 1
    assert place.loop.num_queued == 2


def test_unused_prefixes_make_room_oldest_use_first():
    place = Place(num_blocks=10, block_size=4)
    for name in "abc":
        place.add(name, 8)
        place.submit([1], name, max_tokens=1)
        place.drain()
    assert [entry.name for entry in place.loop.scheduler.resident] == ["a", "b", "c"]
    place.submit([1], "a", max_tokens=1)
    place.drain()
    place.submit([1] * 19, max_tokens=2)
    place.drain()
    assert [entry.name for entry in place.loop.scheduler.resident] == ["c", "a"]
    place.check_answers()


def test_a_queued_prefix_does_not_block_the_row_before_it():
    """Rows of a resident prefix wait behind a row that needs its room: nothing runs, so it must give way."""
    place = Place(num_blocks=8, block_size=4)
    place.add("a", 12)
    place.submit([1], "a", max_tokens=1)
    place.drain()
    place.submit([2] * 25, max_tokens=7)
    place.submit([1], "a", max_tokens=1)
    place.drain()
    place.check_answers()
    assert set(place.ends.values()) <= {"stop", "length"}


def test_prefix_loaded_in_a_step_keeps_its_room_in_it():
    place = Place(num_blocks=4, block_size=4)
    for name in "ab":
        place.add(name, 3)  # shorter than a block: no row shares it
        place.submit([1], name, max_tokens=1)
    place.submit([1] * 6, max_tokens=2)
    place.drain()
    place.check_answers()
    assert "error" not in place.ends.values()


def test_replaced_prefix_drains():
    place = Place()
    place.add("a", 10)
    place.submit([1, 2, 3], "a", max_tokens=8)
    place.submit([5, 2, 1], "a", max_tokens=8)
    place.step()
    place.add("a", 6)
    place.submit([1, 2, 3], "a", max_tokens=8)
    place.drain()
    place.check_answers()
    assert [entry.payload for entry in place.loop.scheduler.resident] == [("a", 2)]


def test_prefix_that_cannot_be_loaded_ends_its_rows_and_no_others():
    place = Place()
    place.add("a", 6)
    place.add("b", 6)
    place.runner.poison = ("a", 1)
    for prefix in ("b", "a", None, "a", "b"):
        place.submit([1, 2, 3], prefix, max_tokens=3)
    place.drain()
    place.check_answers()
    ends = [place.ends[number, 0] for number in range(5)]
    assert [end == "error" for end in ends] == [False, True, False, True, False]
    assert place.loop.stats(0).rows_failed == 2
    place.runner.poison = None
    place.submit([1, 2, 3], "a", max_tokens=3)
    place.drain()
    assert place.ends[5, 0] != "error"


def test_failing_row_does_not_take_its_batch_along(caplog):
    place = Place()
    place.runner.poison = 7
    for first in (1, 7, 2):
        place.submit([first, 2, 3], max_tokens=3)
    place.drain()
    place.check_answers()
    assert [place.ends[number, 0] == "error" for number in range(3)] == [False, True, False]
    assert "a batch of 3 rows failed" in caplog.text


def test_repeated_failure_is_said_loudly(caplog):
    place = Place(max_batch=1)
    place.runner.poison = 7
    for _ in range(4):
        place.submit([7], max_tokens=3)
    place.drain()
    assert set(place.ends.values()) == {"error"}
    assert "3 steps in a row have failed" in caplog.text


def test_broken_bookkeeping_ends_all_rows_and_the_loop_lives_on(monkeypatch, caplog):
    place = Place()
    place.add("a", 6)
    place.submit([1, 2, 3], "a", max_tokens=9)
    place.step()
    place.submit([1, 2], "a", max_tokens=2)
    monkeypatch.setattr(place.loop.scheduler, "plan", lambda: 1 // 0)
    place.step()
    assert set(place.ends.values()) == {"error"}
    assert "starts afresh" in caplog.text
    place.submit([1, 2, 3], "a", max_tokens=9)
    place.drain()
    place.check_answers()
    assert place.ends[2, 0] != "error"


def test_failing_on_chunk_aborts_its_row_alone(caplog):
    place = Place()
    rows = place.submit([1, 2, 3], max_tokens=9)
    place.submit([1, 2, 4], max_tokens=9)

    def broken(chunk):
        raise OSError("client has gone")

    rows[0].on_chunk = broken
    place.drain()
    assert list(place.ends) == [(1, 0)]
    assert rows[0].finish_reason is not None
    assert "on_chunk failed" in caplog.text


def test_counts():
    place = Place()
    place.add("a", 6)
    place.submit([1, 2, 3], "a", max_tokens=5, n=2)
    place.submit([1, 2, 4], max_tokens=5)
    place.step()
    now = place.loop.stats(1)  # the sibling waits for the prompt, and the third row for its turn
    assert (now.running, now.waiting, now.prefixes_resident, now.prefix_blocks) == (1, 2, 1, 2)
    assert now.prompt_tokens == 3
    place.loop.abort(place.rows[1][2])
    place.drain()
    stats = place.loop.stats(1)
    assert (stats.prompt_tokens, stats.rows_finished, stats.rows_aborted, stats.rows_failed) == (3, 2, 1, 0)
    assert stats.tokens_generated == sum(len(tokens) for row in place.rows for tokens in row[3].values())


def test_pool_refuses_what_it_cannot_know():
    pool = BlockPool(4, 2)
    blocks = pool.allocate(3)
    pool.share(blocks[:1])
    pool.release(blocks)
    assert pool.num_free == 3
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(blocks[1:])
    with pytest.raises(AssertionError, match="is free and cannot be shared"):
        pool.share(blocks[1:])
    with pytest.raises(AssertionError, match="4 blocks asked for, 3 free"):
        pool.allocate(4)


@pytest.mark.parametrize(
    ("text", "amount"),
    [("1GiB", 1 << 30), ("512 MiB", 1 << 29), ("1.5G", 3 << 29), ("4096", 4096), (7, 7), ("2kb", 2048), ("3B", 3)],
)
def test_amounts_of_memory(text, amount):
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["", "much", "1GiBs", "-1", 0, "0", True, 1.5j])
def test_no_amounts_of_memory(text):
    with pytest.raises(ConfigError, match="is not an amount of memory"):
        parse_bytes(text)


def test_no_torch_is_imported():
    modules = "answer collect intake kvpool loop meter render request scheduler sequence stream trie".split()
    imports = "; ".join(f"import foreword.engine.{module}" for module in modules)
    code = f"import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None; {imports}"
    subprocess.run([sys.executable, "-c", code], check=True)
