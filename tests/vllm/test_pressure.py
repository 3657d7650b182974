"""Too little memory for everything at once: pages and host memory run out, blobs come from S3."""

import json

import pytest

from tests.registry import s3
from tests.vllm.cases import Ask, World, answers, body, figures, ids, post, save_tiny, tokens
from tests.vllm.server import vllm_server

BUCKET = "pressure"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    return World.make(save_tiny(folder / "base", "qwen3"), folder)


def upload(world, version):
    s3.client().upload_file(str(world.path(version)), BUCKET, f"team/{world.path(version).relative_to(world.blobs)}")


def test_answers_stay_right_when_memory_is_short(world):
    s3.client().create_bucket(Bucket=BUCKET)
    versions = [
        world.add(*made) for made in [("prompt", 45), ("prefix", 40), ("kv", 50), ("prompt", 33), ("prefix", 64)]
    ]
    for version in versions:
        upload(world, version)
    largest = world.base.spec.kv_bytes(64, itemsize=4)
    asks = [Ask([*versions, None][index % 6], ids(3 + index % 40, index), 20 + index % 30) for index in range(60)]
    expected = world.expect(asks)
    args = ["--num-gpu-blocks-override", "20", "--max-num-seqs", "16"]
    extra = {"host_bytes": largest * 3 // 2, "idle_s": 2}
    with vllm_server(world.model, f"s3://{BUCKET}/team", args=args, extra=extra, env=s3.environment()) as url:
        for order in (1, -1):
            responses = answers(url, [body(ask) for ask in asks[::order]])
            assert [tokens(response) for response in responses] == expected[::order]
        found = figures(url)
        assert found["vllm:num_preemptions_total"] > 0
        assert found["vllm:foreword_dropped_total"] > len(versions)
        assert found["vllm:foreword_host_bytes"] <= extra["host_bytes"]
        assert found["vllm:foreword_failures_total"] == 0

        too_big = world.add("kv", 120)
        upload(world, too_big)
        assert post(url, body(Ask(too_big, ids(4, 1)))).status_code == 500
        assert "host_bytes" in url.log.read_text()

        new = world.add("prompt", 21)
        ask = Ask(new, ids(4, 2))
        assert post(url, body(ask)).status_code == 500  # not uploaded yet
        upload(world, new)
        asked_again = post(url, body(ask))
        while asked_again.status_code == 500:
            asked_again = post(url, body(ask))
        assert tokens(asked_again) == world.expect([ask])[0]
        assert json.dumps(expected[0]) not in url.log.read_text()
