"""foreword on Ray Serve: the gateway in front, replicas of the embedded engine behind, tasks multiplexed over them.

    serve run deploy.ray.app:build base=models/base home=/srv/foreword replicas=2

The gateway is foreword's own; only its `Backend` is another one: it calls the `EngineReplica` deployment, with the
version's sha256 as the multiplexed model id. Serve then prefers a replica that holds the version, and a replica
forgets the version that was used longest ago when it holds `max_prefixes`. Written for Ray 2.60.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from foreword.core.artefact import file_sha256, read_header
from foreword.core.spec import Fingerprint
from foreword.engine.request import Chunk, Request
from foreword.errors import ArtefactCorrupt, BackendFailed, ForewordError, IncompatibleModel, NotFound, Overloaded
from foreword.registry.folders import home_folder
from foreword.registry.store import Registry
from foreword.serve.backend import ANYONE, BackendStats, Caller, Timings
from foreword.serve.engines.base_info import base_info
from foreword.serve.engines.token_bytes import token_bytes
from foreword.serve.gateway import create_app
from foreword.serve.run import own_name

if TYPE_CHECKING:
    from foreword.engine.engine import Engine

TRIES = 2
"""Replicas that a request is offered while nothing of its answer has come."""


class Settings(BaseModel):
    """What `serve run` takes as key=value."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    home: str | None = None
    """The registry's folder, the same on every node; default FOREWORD_HOME."""
    base_name: str | None = None
    require_keys: bool = False
    dtype: str = "auto"
    device: str = "cpu"
    replicas: int = 2
    cpus: int = 1
    """Cores and threads of a replica."""
    gpus: float = 0.0
    kv_memory: str = "1GiB"
    max_batch: int = 64
    max_prefixes: int = 256
    """Versions that a replica holds."""


@dataclass(frozen=True, slots=True)
class Opening:
    """The first thing that a replica says of a request."""

    replica: str
    num_loads: int
    """Versions that the replica has loaded since its start."""
    num_running: int
    """Answers in generation there."""
    num_prompt_tokens: int


class Held:
    """A version in one engine. Serve calls `__del__` when it evicts it; Python calls it once more."""

    def __init__(self, engine: Engine, sha256: str) -> None:
        self.engine = engine
        self.sha256 = sha256
        self.is_held = True

    def __del__(self) -> None:
        if self.is_held:
            self.is_held = False
            self.engine.remove_prefix(self.sha256)  # rows in flight keep it


def build(settings: Mapping[str, Any]) -> serve.Application:
    """Return the application: one gateway and `replicas` engines."""
    known = Settings.model_validate(dict(settings))
    replicas = serve.deployment(
        _replica_class(known.max_prefixes),
        name="EngineReplica",
        num_replicas=known.replicas,
        max_ongoing_requests=2 * known.max_batch,  # a busy version spills over to another replica above this
        ray_actor_options={"num_cpus": known.cpus, "num_gpus": known.gpus},
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
    ).bind(known)
    front = serve.deployment(Front, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
    return front.bind(known, replicas)


def _replica_class(max_prefixes: int) -> type:
    class EngineReplica:
        """An engine with the versions that Serve sends to it."""

        def __init__(self, settings: Settings) -> None:
            import torch

            from foreword.core.model import load_base
            from foreword.engine.engine import Engine
            from foreword.serve.engines.embedded import EmbeddedBackend

            torch.set_num_threads(settings.cpus)
            base = load_base(settings.base, dtype=settings.dtype, device=settings.device)
            self.engine = Engine(base, kv_memory=settings.kv_memory, max_batch=settings.max_batch)
            self.engine.start()
            self.backend = EmbeddedBackend(self.engine)
            self.registry = Registry.open(settings.home)
            self.name = serve.get_replica_context().replica_id.unique_id
            self.num_loads = 0

        @serve.multiplexed(max_num_models_per_replica=max_prefixes)
        async def held(self, sha256: str) -> Held:
            """Load a version from the registry's blobs."""
            path = await asyncio.to_thread(self.registry.blobs.fetch, sha256)
            await self.backend.load(sha256, path)
            self.num_loads += 1
            return Held(self.engine, sha256)

        async def answer(self, requests: Sequence[Request]) -> AsyncIterator[Opening | Chunk | ForewordError]:
            """Yield an opening, then the chunks of all requests, which share one prefix; an error is the last thing.

            Errors are yielded, since Serve logs what is raised as a failure of its own.
            """
            stream = None
            try:
                stream = await self._submit(requests, serve.get_multiplexed_model_id())
                num_running = self.backend.stats().num_running
                yield Opening(self.name, self.num_loads, num_running, stream.num_prompt_tokens)
                async for chunk in stream:
                    yield chunk
            except ForewordError as error:
                yield error
            finally:
                if stream is not None:
                    await stream.aclose()

        async def _submit(self, requests: Sequence[Request], sha256: str) -> Any:
            for attempt in itertools.count(1):
                if sha256:
                    await self.held(sha256)
                try:
                    return await self.backend.submit(requests)
                except NotFound:  # evicted between the two lines
                    if attempt == TRIES:
                        hint = "Try again, or serve with more max_prefixes."
                        raise Overloaded("versions are evicted before they are used", hint=hint) from None

        def check_health(self) -> None:
            """Raise where the engine is dead: Serve then replaces this replica."""
            self.backend.check()

    return EngineReplica


class RayStream:
    """A replica's answer on its way to the gateway."""

    def __init__(self, replies: DeploymentResponseGenerator[Any], opening: Opening, num_choices: int) -> None:
        self.timings = Timings()
        self.num_prompt_tokens = opening.num_prompt_tokens
        self._replies = replies
        self._open = num_choices

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Yield chunks until every choice has had its last."""
        try:
            async for reply in self._replies:
                if isinstance(reply, ForewordError):
                    raise reply
                self.timings.add(reply, time.monotonic())
                self._open -= reply.finish_reason is not None
                yield reply
        except (RayError, RayServeException) as error:
            self._open = 0
            raise translated(error) from error

    async def aclose(self) -> None:
        """End what still runs in the replica."""
        if self._open:
            self._open = 0
            self._replies.cancel()


class RayBackend:
    """foreword's `Backend` over the replicas of a Serve deployment."""

    def __init__(self, replicas: DeploymentHandle, fingerprint: Fingerprint, tokenizer: Any, itemsize: int) -> None:
        self.fingerprint = fingerprint
        self.requests: Counter[tuple[str, str]] = Counter()
        """By replica and version; "" is the base."""
        self.openings: dict[str, Opening] = {}
        """The latest of each replica."""
        self._replicas = replicas.options(stream=True)
        self._tokenizer = tokenizer
        self._itemsize = itemsize

    async def start(self) -> None:
        """Do nothing: Serve starts the replicas."""

    async def load(self, sha256: str, path: Path) -> int:
        """Check an artefact; the replicas load it when Serve sends them a request for it."""
        if (found := await asyncio.to_thread(file_sha256, path)) != sha256:
            raise ArtefactCorrupt(f"{path} has sha256 {found}, its version says {sha256}")
        header = read_header(path)
        if (difference := header.base.first_difference(self.fingerprint)) is not None:
            field, theirs, ours = difference
            raise IncompatibleModel(f"the version's base has {field} {theirs}, this one has {ours}")
        return header.spec.kv_bytes(header.block.num_positions, self._itemsize)

    async def unload(self, sha256: str) -> None:
        """Do nothing: a replica forgets what it used longest ago."""

    async def submit(self, requests: Sequence[Request], caller: Caller = ANYONE) -> RayStream:
        """Send the requests to a replica, to another one where the first dies before it says anything."""
        sha256 = requests[0].prefix or ""
        for attempt in itertools.count(1):
            replies = self._replicas.options(multiplexed_model_id=sha256).answer.remote(list(requests))
            try:
                opening = await anext(replies)
            except (RayError, RayServeException) as error:
                if isinstance(error, RayActorError) and attempt < TRIES:
                    continue
                raise translated(error) from error
            except asyncio.CancelledError:
                replies.cancel()
                raise
            break
        if isinstance(opening, ForewordError):
            raise opening
        self.requests[opening.replica, sha256] += 1
        self.openings[opening.replica] = opening
        return RayStream(replies, opening, sum(request.n for request in requests))

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to the text."""
        return token_bytes(self._tokenizer, token_id)

    def stats(self) -> BackendStats:
        """Return nothing: Serve's own metrics hold the load of its replicas."""
        return BackendStats()

    def check(self) -> None:
        """Do nothing: Serve replaces replicas that cannot answer."""

    async def aclose(self) -> None:
        """Do nothing: Serve ends the replicas."""


def translated(error: Exception) -> ForewordError:
    """Return what happened to a replica, by class only."""
    if isinstance(error, BackPressureError):
        return Overloaded("all replicas are busy and the queue is full", hint="Try again later.")
    kind = type(error.cause if isinstance(error, RayTaskError) else error).__name__
    return BackendFailed(f"the replica failed ({kind})", hint="Try again; Serve's log says more.")


@serve.ingress()
class Front:
    """The gateway, as Serve's HTTP ingress."""

    def __init__(self, settings: Settings, replicas: DeploymentHandle) -> None:
        from transformers import AutoTokenizer

        home = home_folder(settings.home)
        info = base_info(settings.base, home / "cache")
        itemsize = 4 if settings.dtype == "float32" else 2
        tokenizer = AutoTokenizer.from_pretrained(settings.base)
        self.settings = settings
        self.registry = Registry.open(home)
        self.backend = RayBackend(replicas, info.fingerprint, tokenizer, itemsize)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return foreword's gateway, and /replicas: each one's loads, load, and requests by version."""
        name, backend = self.settings.base_name or own_name(self.settings.base), self.backend
        app = create_app(backend, self.registry, base_name=name, require_keys=self.settings.require_keys)

        @app.get("/replicas", include_in_schema=False)
        async def replicas(request: HTTPRequest) -> dict[str, dict[str, Any]]:
            app.state.gateway.guard.admin(request.headers.get("authorization"))
            found: dict[str, dict[str, Any]] = {
                name: {"loads": opening.num_loads, "running": opening.num_running, "requests": {}}
                for name, opening in backend.openings.items()
            }
            for (replica, sha256), count in backend.requests.items():
                found[replica]["requests"][sha256] = count
            return found

        return app
