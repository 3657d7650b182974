"""What a tenant may use: requests and tokens of the last minute, requests at once, lengths. Imports no torch.

Admission looks at the present balance. A request takes its place and its count at once, an estimate of its prompt's
tokens when its body is read, the true number when it is submitted, and the tokens of its answers as they come: an
answer under way is never cut for a limit, so a minute may run over by what was admitted before it was full.

Gateways tell each other their use once a second through the database. A tenant who is everywhere at once can get from
each gateway what the others let through within that second, and no more.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Mapping

from foreword.engine.request import Request
from foreword.errors import BadRequest, RateLimited
from foreword.registry.access_records import Limits, Usage
from foreword.serve.access.control import Control, FailureLog

WINDOW_S = 60
SYNC_S = 1.0
BYTES_PER_TOKEN = 4
"""For the estimate; about right for English."""

NOTHING = Usage(requests=0, tokens=0, running=0)


class Window:
    """A sum over the last minute, second by second; the oldest second counts in full."""

    def __init__(self, now: float) -> None:
        self.total = 0
        self._sums = [0] * WINDOW_S
        self._second = int(now)

    def add(self, amount: int, at: float, now: float) -> None:
        """Add what was used at `at`; what is older than a minute counts no more."""
        self.roll(now)
        if self._second - int(at) < WINDOW_S:
            self._sums[min(int(at), self._second) % WINDOW_S] += amount
            self.total += amount

    def roll(self, now: float) -> None:
        """Forget what is older than a minute."""
        for second in range(max(self._second, int(now) - WINDOW_S) + 1, int(now) + 1):
            self.total -= self._sums[second % WINDOW_S]
            self._sums[second % WINDOW_S] = 0
        self._second = max(self._second, int(now))

    def seconds_until_less(self, amount: int, now: float) -> float:
        """Return after how many seconds `amount` or more of the present sum will be older than a minute."""
        for second in range(self._second - WINDOW_S + 1, self._second + 1):
            amount -= self._sums[second % WINDOW_S]
            if amount <= 0:
                return second + WINDOW_S - now
        return float(WINDOW_S)


class _Use:
    """What one tenant uses here, and what the other gateways said that it uses there."""

    def __init__(self, now: float) -> None:
        self.requests = Window(now)
        self.tokens = Window(now)
        self.running = 0
        self.others = NOTHING
        self.others_before = NOTHING

    def elsewhere(self) -> Usage:
        # From the turn of the database's minute until it tells again, a gateway counts there with nothing.
        now, before = self.others, self.others_before
        return Usage(
            requests=max(now.requests, before.requests),
            tokens=max(now.tokens, before.tokens),
            running=max(now.running, before.running),
        )

    def here(self, now: float) -> Usage:
        self.requests.roll(now)
        self.tokens.roll(now)
        return Usage(requests=self.requests.total, tokens=max(self.tokens.total, 0), running=self.running)


class Slot:
    """The place of one admitted request; `release` gives it back, the tokens that it used stay used."""

    def __init__(self, limiter: Limiter, use: _Use) -> None:
        self._limiter = limiter
        self._use = use
        self._admitted = limiter.clock()
        self._prompt = 0
        self._completion = 0
        self._is_open = True

    def settle(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Charge what the request has cost so far, in place of what was charged before."""
        now, tokens = self._limiter.clock(), self._use.tokens
        if prompt_tokens != self._prompt:
            tokens.add(prompt_tokens - self._prompt, self._admitted, now)
            self._prompt = prompt_tokens
        if completion_tokens != self._completion:
            tokens.add(completion_tokens - self._completion, now, now)
            self._completion = completion_tokens

    def release(self) -> None:
        """Give the place back; may be called twice."""
        if self._is_open:
            self._is_open = False
            self._use.running -= 1


class Limiter:
    """Admits requests of tenants. Used by one event loop; `keep_synced` runs there as a task."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.gateway = secrets.token_hex(8)
        """Its name among the gateways."""
        self._uses: dict[str, _Use] = {}

    def admit(self, tenant: str, limits: Limits) -> Slot:
        """Take a place for a request. Raises RateLimited with both numbers, the limit's name, and when to come back."""
        use = self._uses.get(tenant)
        now = self.clock()
        if use is None:
            use = self._uses[tenant] = _Use(now)
        here, there = use.here(now), use.elsewhere()
        running = here.running + there.running
        if limits.concurrent is not None and running >= limits.concurrent:
            raise _over("concurrent", f"{running} requests run", limits.concurrent, 1.0)
        requests = here.requests + there.requests
        if limits.requests_per_minute is not None and requests >= limits.requests_per_minute:
            wait_s = use.requests.seconds_until_less(requests - limits.requests_per_minute + 1, now)
            found = f"{requests} requests in the last minute"
            raise _over("requests_per_minute", found, limits.requests_per_minute, wait_s)
        tokens = here.tokens + there.tokens
        if limits.tokens_per_minute is not None and tokens >= limits.tokens_per_minute:
            wait_s = use.tokens.seconds_until_less(tokens - limits.tokens_per_minute + 1, now)
            raise _over("tokens_per_minute", f"{tokens} tokens in the last minute", limits.tokens_per_minute, wait_s)
        use.requests.add(1, now, now)
        use.running += 1
        return Slot(self, use)

    def usage(self) -> dict[str, Usage]:
        """Return what each tenant has used of the last minute, on all gateways, as far as is known here."""
        now = self.clock()
        found = {}
        for tenant, use in self._uses.items():
            here, there = use.here(now), use.elsewhere()
            found[tenant] = Usage(
                requests=here.requests + there.requests,
                tokens=here.tokens + there.tokens,
                running=here.running + there.running,
            )
        return found

    async def sync(self, control: Control) -> None:
        """Tell the other gateways what was used here, and hear what was used there. Raises what the source raises."""
        assert control.source is not None
        now = self.clock()
        used = {tenant: use.here(now) for tenant, use in self._uses.items()}
        used = {tenant: found for tenant, found in used.items() if found != NOTHING}
        self._hear(await control.ask(control.source.sync_usage, self.gateway, used))

    def _hear(self, others: Mapping[str, Usage]) -> None:
        now = self.clock()
        for tenant in others.keys() - self._uses.keys():
            self._uses[tenant] = _Use(now)
        for tenant, use in list(self._uses.items()):
            use.others_before, use.others = use.others, others.get(tenant, NOTHING)
            if use.here(now) == use.elsewhere() == NOTHING:
                del self._uses[tenant]

    async def keep_synced(self, control: Control) -> None:
        """Sync for ever; while the database does not answer, what it said last counts."""
        failures = FailureLog("use is not shared with the other gateways", "use is shared again")
        while True:
            await asyncio.sleep(SYNC_S)
            try:
                await self.sync(control)
                failures.note(None)
            except Exception as error:  # the database; the next round asks again
                failures.note(error)


def _over(limit: str, found: str, allowed: int, wait_s: float) -> RateLimited:
    return RateLimited(
        f"{found}, {limit} of this tenant is {allowed}",
        limit=limit,
        hint=f"Try again in {math.ceil(wait_s)} s.",
        retry_after_s=wait_s,
    )


def estimated_tokens(requests: list[Request]) -> int:
    """Return about how many tokens the prompts have, without reading them: ids exactly, text by its length."""
    return sum(_estimate(request) for request in requests)


def _estimate(request: Request) -> int:
    if request.prompt_ids is not None:
        return len(request.prompt_ids)
    texts = [request.prompt or "", *(message["content"] for message in request.messages or ())]
    return sum(len(text) for text in texts) // BYTES_PER_TOKEN + 1


def check_new_tokens(max_tokens: int | None, limits: Limits) -> None:
    """Raise BadRequest where more new tokens are asked for than the tenant may have."""
    if max_tokens is not None and limits.max_new_tokens is not None and max_tokens > limits.max_new_tokens:
        raise BadRequest(
            f"max_tokens is {max_tokens}, max_new_tokens of this tenant is {limits.max_new_tokens}",
            hint="Ask for fewer tokens.",
        )


def check_prompt_tokens(num_tokens: int, limits: Limits) -> None:
    """Raise BadRequest where a request's prompts together are longer than the tenant's may be."""
    if limits.max_prompt_tokens is not None and num_tokens > limits.max_prompt_tokens:
        raise BadRequest(
            f"the prompt has {num_tokens} tokens, max_prompt_tokens of this tenant is {limits.max_prompt_tokens}",
            hint="Send less text.",
        )
