"""Checks of a running server: do its answers come from the version that was published, and as that was trained?

Every figure is asked for over HTTP, so the whole way is checked: gateway, names, rendering, engine, plug-in, blocks and
the sampler's log-probabilities. `examine.py` is where to begin. Imports no torch.
"""

from __future__ import annotations

from foreword.doctor.server.client import ServerUnderTest

__all__ = ["ServerUnderTest"]
