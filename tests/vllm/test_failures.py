"""A request that cannot be served as it asks fails alone: never answered from placeholders, nobody else disturbed."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from foreword.core.compile import compile
from foreword.core.compiled import save_compiled
from foreword.registry.blobs import FolderBlobs, staged
from foreword.serve.vllm.versions import RETRY_S
from foreword.serve.vllm.wire import Wanted, cache_salt, scope_of
from tests.vllm.cases import Ask, Version, answers, body, figures, ids, post, tokens, vectors_of
from tests.vllm.conftest import FETCH_TIMEOUT_S
from tests.vllm.server import BLOCK

SCOPE = scope_of("")


@pytest.fixture(scope="module")
def good(llama):
    """Good requests, plain ones among them, and their answers."""
    versions = [llama.world.add("prompt", 37, seed=50), llama.world.add("kv", BLOCK, seed=51), None]
    asks = [Ask(versions[index % 3], ids(5 + index, seed=500 + index)) for index in range(9)]
    return asks, llama.world.expect(asks)


def check_fails_alone(llama, good, bad, *, status=(400, 500)):
    """Send the bad bodies among good ones; every bad one fails, every good one is right."""
    asks, expected = good
    bodies = [body(ask) for ask in asks]
    mixed = [data for pair in zip(bodies, (bad * len(bodies))[: len(bodies)], strict=True) for data in pair]
    responses = answers(llama.url, mixed + bad[len(bodies) :])
    assert [tokens(response) for response in responses[0 : 2 * len(bodies) : 2]] == expected
    wrong = [response for response in (*responses[1 : 2 * len(bodies) : 2], *responses[2 * len(bodies) :])]
    assert {response.status_code for response in wrong} <= set(status), [response.text[:300] for response in wrong]
    assert not any("choices" in response.json() for response in wrong)


def named(sha256, positions, count=5, salt=None, scope=SCOPE, **changes):
    """A body that names a version, right or wrong, with the salt of what it names unless another is given."""
    wanted = Wanted(sha256, positions, scope)
    changes = {"cache_salt": wanted.salt if salt is None else salt, "kv_transfer_params": wanted.to_params(), **changes}
    return body(Ask(None, (0,) * positions + ids(count, seed=9)), **changes)


def put(world, name, data=None, path=None):
    """Put bytes into the blob store under their own digest."""
    path = path or world.blobs.parent / f"{name}.safetensors"
    if data is not None:
        path.write_bytes(data)
    blobs = FolderBlobs(world.blobs)
    with staged(path, blobs.staging) as file:
        blobs.put(file)
        return file.sha256


def test_a_missing_blob_fails_until_it_is_there(llama, good):
    version = llama.world.add("prefix", BLOCK + 8, seed=60, stored=False)
    ask = Ask(version, ids(40, seed=60))
    check_fails_alone(llama, good, [body(ask)], status=[500])
    llama.world.store(version.name)
    time.sleep(RETRY_S)
    assert tokens(post(llama.url, body(ask))) == llama.world.expect([ask])[0]
    assert tokens(post(llama.url, body(ask))) == llama.world.expect([ask])[0]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "folder"])
def test_a_damaged_blob_fails_until_it_is_put_again(llama, good, damage):
    version = llama.world.add("prompt", BLOCK + 9, seed=61 + len(damage))
    path = llama.world.path(version)
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        flipped = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
        path.write_bytes({"flipped": flipped, "truncated": data[:-100], "empty": b""}[damage])
    ask = Ask(version, ids(7, seed=61))
    check_fails_alone(llama, good, [body(ask)], status=[500])
    if damage == "folder":
        path.rmdir()
    llama.world.store(version.name)
    time.sleep(RETRY_S)
    assert tokens(post(llama.url, body(ask))) == llama.world.expect([ask])[0]


def test_files_that_are_no_versions_of_this_base_fail(llama, good):
    base, folder = llama.world.base, llama.world.blobs.parent
    prefix = compile(base, vectors_of(base, "kv", 20, seed=70), name="other")
    other = base.fingerprint.__class__(**{**base.fingerprint.to_json(), "weights_sha256": "0" * 64})
    save_compiled(folder / "other.safetensors", prefix, base=other, spec=base.spec)
    nan = prefix.__class__(**{**_fields(prefix), "keys": (prefix.keys[0] * float("nan"), *prefix.keys[1:])})
    save_compiled(folder / "nan.safetensors", nan, base=base.fingerprint, spec=base.spec)
    shas = [put(llama.world, "other"), put(llama.world, "nan"), put(llama.world, "noise", os.urandom(5000))]
    shas.append(put(llama.world, "json", b'{"a": 1}'))
    check_fails_alone(llama, good, [named(sha256, 20) for sha256 in shas], status=[500])


def _fields(prefix):
    return {name: getattr(prefix, name) for name in prefix.__dataclass_fields__}


def test_wrong_numbers_of_positions_fail_even_where_the_pages_are_cached(llama, good):
    version = llama.world.add("prefix", 2 * BLOCK, seed=71)
    ask = Ask(version, ids(8, seed=71))
    assert tokens(post(llama.url, body(ask))) == llama.world.expect([ask])[0]
    wrong = [1, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK + 1, 3 * BLOCK]
    check_fails_alone(llama, good, [named(version.sha256, positions) for positions in wrong], status=[500])
    assert tokens(post(llama.url, body(ask))) == llama.world.expect([ask])[0]


def test_prompts_that_the_prefix_fills_fail(llama, good):
    version = llama.world.add("kv", BLOCK, seed=72)
    bad = [named(version.sha256, BLOCK, count=0), named(version.sha256, BLOCK, prompt=[0] * (BLOCK - 3))]
    check_fails_alone(llama, good, [*bad, named(version.sha256, BLOCK, prompt=[5])], status=[500])


def test_missing_and_foreign_salts_fail_also_when_warm(llama, good):
    version, other = (llama.world.add("prompt", BLOCK, seed=seed) for seed in (73, 74))
    for known in (version, other):
        tokens(post(llama.url, body(Ask(known, ids(5, seed=9)))))
    foreign = Wanted(other.sha256, BLOCK, SCOPE).salt
    salts = [None, foreign, cache_salt(SCOPE), cache_salt(scope_of("b"), version.sha256), "x", version.sha256]
    bad = [named(version.sha256, BLOCK) | {"cache_salt": salt} for salt in salts]
    check_fails_alone(llama, good, [{k: v for k, v in data.items() if v is not None} for data in bad], status=[500])


def garbage(version):
    """Params that are none, of every kind that JSON can hold; each with the right salt and placeholders."""
    right = Wanted(version.sha256, version.num_positions, SCOPE).to_params()
    inner = right["foreword"]
    yield from [{"foreword": value} for value in (None, 1, "x", [], [inner], {}, True, {"sha256": version.sha256})]
    for name, values in {
        "sha256": [None, 7, "", "../../etc/passwd", version.sha256.upper(), version.sha256[:-1], version.sha256 + "0"],
        "positions": [None, 0, -1, 1.0, "32", True, 10**30, 2**20 + 1, [32], float("1e308")],
        "scope": [None, "", "../", 5, "g" * 64, SCOPE + "\n"],
    }.items():
        yield from [{"foreword": {**inner, name: value}} for value in values]
        yield {"foreword": {key: value for key, value in inner.items() if key != name}}
    yield {"foreword": {**inner, "extra": 1}}
    yield {**right, "other": 1}
    yield {"Foreword": inner}
    yield {"do_remote_prefill": True, "do_remote_decode": True, "remote_block_ids": [1, 2]}
    yield {"foreword": {**inner, "sha256": "a" * 10**6}}


def test_malformed_params_fail(llama, good):
    version = llama.world.add("kv", BLOCK, seed=75)
    ask = Ask(version, ids(5, seed=75))
    assert tokens(post(llama.url, body(ask))) == llama.world.expect([ask])[0]
    bad = [body(ask) | {"kv_transfer_params": params} for params in garbage(version)]
    assert len(bad) > 30
    check_fails_alone(llama, good, bad)


@pytest.mark.parametrize("params", ["x", ["a"], "", 0, []])
def test_params_by_the_back_door_fail(llama, good, params):
    """`vllm_xargs` reaches the same field with values that are no mapping; some end in vLLM's own front end."""
    data = body(Ask(None, ids(40, seed=76)), vllm_xargs={"kv_transfer_params": params})
    check_fails_alone(llama, good, [data], status=[500])


def test_what_would_compute_placeholders_fails(llama, good):
    version = llama.world.add("prefix", BLOCK + 2, seed=77)
    ask = Ask(version, ids(6, seed=77))
    assert tokens(post(llama.url, body(ask))) == llama.world.expect([ask])[0]
    changes = [{"prompt_logprobs": 1}, {"prompt_logprobs": 0}, {"echo": True, "logprobs": 1}]
    check_fails_alone(llama, good, [body(ask, **change) for change in changes])


def test_echo_without_logprobs_is_right_or_fails(llama):
    version = llama.world.add("prefix", BLOCK + 2, seed=77)
    ask = Ask(version, ids(6, seed=78))
    response = post(llama.url, body(ask, echo=True))
    if response.status_code == 200:
        found = response.json()["choices"][0]
        assert found["token_ids"][-ask.max_tokens :] == llama.world.expect([ask])[0]


def test_a_stream_of_a_missing_version_has_no_token(llama):
    data = named("ab" * 32, BLOCK, stream=True)
    with httpx.stream("POST", f"{llama.url}/v1/completions", json=data, timeout=60) as response:
        text = response.read().decode()
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
    assert any("error" in chunk for chunk in chunks) or response.status_code >= 400
    assert not any(choice.get("text") for chunk in chunks for choice in chunk.get("choices", []))


def test_a_store_that_hangs_stalls_nobody_else_and_fails_in_time(llama, good):
    version = llama.world.add("prompt", 40, seed=79)
    path = llama.world.path(version)
    data = path.read_bytes()
    path.unlink()
    os.mkfifo(path)  # reading it waits for a writer
    asks, expected = good
    ask = Ask(version, ids(6, seed=79))
    try:
        with ThreadPoolExecutor(2) as pool:
            hung = [pool.submit(post, llama.url, body(ask)) for _ in range(2)]
            began = time.monotonic()
            responses = answers(llama.url, [body(ask) for ask in asks])
            assert [tokens(response) for response in responses] == expected
            assert time.monotonic() - began < FETCH_TIMEOUT_S
            assert not any(future.done() for future in hung)
            assert [future.result().status_code for future in hung] == [500, 500]
            assert FETCH_TIMEOUT_S <= time.monotonic() - began < 3 * FETCH_TIMEOUT_S
    finally:
        with path.open("wb") as file:  # sets the reader free
            file.write(b"x")
        path.unlink()
    path.write_bytes(data)
    time.sleep(RETRY_S)
    assert tokens(post(llama.url, body(ask))) == llama.world.expect([ask])[0]


def test_clients_that_go_while_their_version_is_awaited(llama, good):
    version = Version("gone", "cd" * 32, 40)
    path = llama.world.path(version)
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    try:
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{llama.url}/v1/completions", json=body(Ask(version, ids(5, 80))), timeout=0.3)
        check_fails_alone(llama, good, [named("ef" * 32, 40)], status=[500])
    finally:
        with path.open("wb") as file:
            file.write(b"x")
        path.unlink()


def test_the_failures_were_counted_and_the_server_is_well(llama, good):
    asks, expected = good
    found = figures(llama.url)
    assert found["vllm:foreword_failures_total"] > 0 and found["vllm:foreword_refused_total"] > 50
    assert [tokens(response) for response in answers(llama.url, [body(ask) for ask in asks])] == expected
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
