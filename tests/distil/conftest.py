"""Fewer prompts elsewhere than a user gets: each costs its tokens in every test that judges."""

import pytest

from foreword.distil import elsewhere


@pytest.fixture(autouse=True, scope="session")
def few_prompts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elsewhere, "PROMPTS", elsewhere.PROMPTS[:3])
        yield
