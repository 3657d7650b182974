"""Bases and servers that several tests share: starting vLLM takes half a minute."""

import pytest
import torch

from tests.vllm.cases import Shared, World, save_tiny
from tests.vllm.server import vllm_server

FETCH_TIMEOUT_S = 3


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(__file__.rsplit("/", 1)[0]):
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A Llama behind a server that splits prompts into chunks of 64 tokens and knows its base."""
    folder = tmp_path_factory.mktemp("llama")
    world = World.make(save_tiny(folder / "base", "llama"), folder)
    args = ["--max-num-batched-tokens", "64", "--max-num-seqs", "16", "--enable-prompt-tokens-details"]
    extra = {"base": world.base.fingerprint.to_json(), "fetch_timeout_s": FETCH_TIMEOUT_S}
    with vllm_server(world.model, world.blobs, args=args, extra=extra) as url:
        yield Shared(world, url)
