"""The pure parts of the vLLM plug-in: settings, shares of workers, slots of rows, and the host cache."""

import threading

import pytest
import torch

from foreword.core.compiled import CompiledHeader
from foreword.core.spec import Fingerprint, LayerSpec, ModelSpec
from foreword.errors import ConfigError, IncompatibleModel
from foreword.serve.vllm import blocks as blocks
from foreword.serve.vllm.blocks import NO_BLOCK, Background, HostCache, LayerShare, Load, Settings, Write

SHA, OTHER = "a" * 64, "b" * 64
CPU = torch.device("cpu")
BASE = Fingerprint(**{name: name for name in Fingerprint.__dataclass_fields__})


def header(*layers, num_positions=5):
    spec = ModelSpec(
        model_type="x", hidden_size=8, embed_size=8, vocab_size=9, max_positions=None, num_parameters=1, layers=layers
    )
    return CompiledHeader(source=SHA, task="t", base=BASE, spec=spec, num_positions=num_positions, dtype="float32")


def layer(heads, key=4, value=4):
    return LayerSpec(num_kv_heads=heads, head_dim=key, value_dim=value)


def tensors(head, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(
            torch.randn(spec.num_kv_heads, head.num_positions, width, generator=generator)
            for width in (spec.head_dim, spec.value_dim)
        )
        for spec in head.spec.layers
    ]


@pytest.mark.parametrize("version", ["0.32.0", "0.32.9", "0.33.0", "0.33.1rc1", "0.32.0+cpu"])
def test_supported_versions(version):
    blocks.check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0.0", "0.9.2", "dev", "0.x", ""])
def test_versions_outside_the_range_are_named(version):
    with pytest.raises(ConfigError, match=r"0\.32, < 0\.34") as caught:
        blocks.check_version(version)
    assert version in caught.value.message and blocks.TESTED_VLLM in caught.value.hint


def test_settings_from_json(tmp_path, monkeypatch):
    monkeypatch.setenv("FOREWORD_HOME", str(tmp_path))
    assert Settings.from_extra({"blobs": "s3://x/y"}).cache == tmp_path / "cache"
    given = {"blobs": "/b", "cache": "/c", "host_bytes": 5, "base": BASE.to_json(), "idle_s": 0.5, "fetch_timeout_s": 2}
    settings = Settings.from_extra(given)
    assert (settings.base, settings.host_bytes, str(settings.cache), settings.idle_s) == (BASE, 5, "/c", 0.5)


@pytest.mark.parametrize(
    "extra, named",
    [
        ({}, "blobs"),
        ({"blobs": ""}, "blobs"),
        ({"blobs": 3}, "blobs"),
        ({"blobs": "/b", "host_byte": 1}, "host_byte"),
        ({"blobs": "/b", "host_bytes": 0}, "host_bytes"),
        ({"blobs": "/b", "host_bytes": 1.5}, "host_bytes"),
        ({"blobs": "/b", "idle_s": True}, "idle_s"),
        ({"blobs": "/b", "fetch_timeout_s": "1"}, "fetch_timeout_s"),
        ({"blobs": "/b", "base": {"model_type": "x"}}, "base"),
        ({"blobs": "/b", "base": "x"}, "base"),
        ({"blobs": "/b", "cache": 3}, "cache"),
    ],
)
def test_wrong_settings_are_named(extra, named):
    with pytest.raises(ConfigError, match=named):
        Settings.from_extra({"cache": "/c", **extra})


def test_the_store_is_read_where_it_is_and_must_be_there(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs").chmod(0o500)
    store = blocks.open_store(Settings.from_extra({"blobs": str(tmp_path / "blobs"), "cache": "/c"}))
    assert not store.has(SHA)
    with pytest.raises(ConfigError, match="no-such"):
        blocks.open_store(Settings.from_extra({"blobs": str(tmp_path / "no-such"), "cache": "/c"}))
    remote = blocks.open_store(Settings.from_extra({"blobs": "memory://x", "cache": str(tmp_path)}))
    assert not remote.has(SHA)


@pytest.mark.parametrize("total, size", [(8, 1), (8, 2), (8, 8), (2, 4), (1, 8), (4, 4)])
def test_heads_are_spread_evenly_and_repeated_where_they_are_few(total, size):
    shares = [list(blocks.own_heads(total, rank, size)) for rank in range(size)]
    assert {len(share) for share in shares} == {max(1, total // size)}
    assert sorted({head for share in shares for head in share}) == list(range(total))
    assert [share[0] for share in shares] == sorted(share[0] for share in shares)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shares_of_all_ranks_hold_the_whole_version(size):
    head = header(layer(4, 4, 6), layer(2, 8, 8), layer(4, 4, 4))
    whole = tensors(head)
    for rank in range(size):
        shares = [
            LayerShare(index, len(blocks.own_heads(spec.num_kv_heads, rank, size)), spec.head_dim, spec.value_dim)
            for index, spec in enumerate(head.spec.layers)
        ]
        blocks.check_fits(head, shares, num_layers=3, size=size)
        rows = blocks.pack(whole, shares, torch.float32, rank=rank, size=size)
        assert rows.shape == (5, sum(share.width for share in shares)) and rows.is_contiguous()
        for index, (key, value) in enumerate(blocks.unpack(rows, shares)):
            heads = list(blocks.own_heads(head.spec.layers[index].num_kv_heads, rank, size))
            assert torch.equal(key.transpose(0, 1), whole[index][0][heads])
            assert torch.equal(value.transpose(0, 1), whole[index][1][heads])


def test_a_pipeline_stage_holds_its_own_layers_in_the_engines_dtype():
    head = header(layer(2), layer(2), layer(2))
    whole = tensors(head)
    shares = [LayerShare(2, 2, 4, 4), LayerShare(1, 2, 4, 4)]
    found = list(blocks.unpack(blocks.pack(whole, shares, torch.bfloat16, rank=0, size=1), shares))
    assert torch.equal(found[0][0].transpose(0, 1), whole[2][0].bfloat16())
    assert torch.equal(found[1][1].transpose(0, 1), whole[1][1].bfloat16())


@pytest.mark.parametrize(
    "share, num_layers, size, named",
    [
        (LayerShare(0, 2, 4, 4), 3, 1, "2 layers, the served model has 3"),
        (LayerShare(1, 1, 4, 4), 2, 1, r"layer 1: .*\(2, 4, 4\).*\(1, 4, 4\)"),
        (LayerShare(0, 2, 8, 4), 2, 1, "layer 0"),
        (LayerShare(0, 2, 4, 8), 2, 1, "layer 0"),
        (LayerShare(0, 2, 4, 4), 2, 2, "layer 0"),
    ],
)
def test_other_shapes_are_refused_by_layer(share, num_layers, size, named):
    with pytest.raises(IncompatibleModel, match=named):
        blocks.check_fits(header(layer(2), layer(2)), [share], num_layers=num_layers, size=size)


def test_rows_go_where_their_pages_are():
    positions, places = blocks.slots(Write(SHA, 6, 11, (7, 3, 9)), block_size=4)
    assert positions.tolist() == [6, 7, 8, 9, 10]
    assert places.tolist() == [3 * 4 + 2, 3 * 4 + 3, 9 * 4, 9 * 4 + 1, 9 * 4 + 2]


def test_rows_whose_page_slid_out_of_the_window_are_left_out():
    write = Write(SHA, 0, 10, (NO_BLOCK, 3, NO_BLOCK))
    positions, places = blocks.slots(write, block_size=4)
    assert positions.tolist() == [4, 5, 6, 7] and places.tolist() == [12, 13, 14, 15]
    assert write.pages(4) == {3}


def test_a_failed_write_names_only_the_pages_that_it_writes():
    assert Write(SHA, 8, 11, (7, 3, 9)).pages(4) == {9}
    assert Write(SHA, 6, 11, (7, 3, 9)).pages(4) == {3, 9}


def wait(cache, number=1):
    loaded, failed = [], {}
    while len(loaded) + len(failed) < number:
        cache._background.progress.wait(5)
        more, bad = cache.take()
        loaded, failed = loaded + more, failed | bad
    return loaded, failed


def test_the_host_cache_loads_gathers_and_drops():
    made = {SHA: torch.arange(12.0).view(6, 2), OTHER: -torch.arange(8.0).view(4, 2)}
    cache = HostCache(made.__getitem__)
    loads = [Load(SHA, 1), Load(OTHER, 2)]
    cache.order(loads, ())
    assert set(wait(cache, 2)[0]) == set(loads) and SHA in cache
    writes = [Write(SHA, 2, 6, (5, 8)), Write(OTHER, 0, 4, (NO_BLOCK,)), Write(OTHER, 1, 3, (6,))]
    rows, places = cache.gather(writes, 4, CPU)
    assert rows.tolist() == [*made[SHA][2:6].tolist(), *made[OTHER][1:3].tolist()]
    assert places.tolist() == [22, 23, 32, 33, 25, 26]
    cache.order((), [SHA])
    assert SHA not in cache
    with pytest.raises(KeyError):
        cache.gather(writes, 4, CPU)


def test_a_load_that_was_dropped_meanwhile_or_fails_is_not_held():
    go = threading.Event()

    def load(sha256):
        if sha256 == OTHER:
            raise IncompatibleModel("two layers")
        go.wait(5)
        return torch.zeros(1, 1)

    cache = HostCache(load)
    cache.order([Load(SHA, 1), Load(OTHER, 2)], ())
    assert {load.sha256: str(error) for load, error in wait(cache)[1].items()} == {OTHER: "two layers"}
    cache.order([Load(SHA, 3)], [SHA])
    go.set()
    assert wait(cache)[0] == [Load(SHA, 3)]
    cache.order((), [SHA])
    assert cache.take() == ([], {}) and SHA not in cache


def test_background_jobs_that_hang_leave_the_others_a_thread():
    never, jobs = threading.Event(), Background(2, "test")
    jobs.submit("hung", never.wait)
    jobs.submit("bad", lambda: 1 / 0)
    jobs.submit("good", lambda: 3)
    found = {}
    while len(found) < 2:
        assert jobs.progress.wait(5)
        found |= dict(jobs.take())
    assert found["good"] == 3 and isinstance(found["bad"], ZeroDivisionError)
    assert not jobs.progress.is_set() and jobs.take() == []
    never.set()


def test_errors_are_described_in_one_line():
    assert blocks.describe(IncompatibleModel("a", hint="b")) == "a"
    assert blocks.describe(ValueError("x")) == "ValueError: x"
