"""Real processes for the faults: gateways by their command line, engines, a registry; all end with the stage.

Processes are started with a death signal, so that none outlives a test run that is killed.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx

from foreword.core.compile_file import compile_file
from foreword.core.spec import Method
from foreword.registry.access_records import Limits
from foreword.registry.records import Version
from foreword.registry.store import Registry
from foreword.serve.engines.base_info import base_info
from tests.serve.artefacts import BASE, demo_base, write_artefact

START_S = 60.0
ROOT = Path(__file__).parents[2]
_names = itertools.count()


class Process:
    """A child process whose output goes to a file."""

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str], *, ready: bool = True) -> None:
        self.log = log
        self.command = command
        end = ["setpriv", "--pdeathsig=KILL", "--"] if shutil.which("setpriv") else []
        with log.open("ab") as errors:
            self.popen = subprocess.Popen(
                [*end, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if ready else errors,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )
        self.line = self._first_line() if ready else ""

    def _first_line(self) -> str:
        assert self.popen.stdout is not None
        if not (line := self.popen.stdout.readline()):
            self.popen.wait(START_S)
            raise AssertionError(f"{self.command} ended with {self.popen.returncode}:\n{self.errors()}")
        return line.strip()

    @property
    def pid(self) -> int:
        return self.popen.pid

    def errors(self) -> str:
        """Return what it wrote to stderr so far."""
        return self.log.read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGCONT)
            self.popen.kill()
        self.popen.wait(START_S)
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                pipe.close()

    def wait(self, seconds: float = START_S) -> int:
        return self.popen.wait(seconds)

    @property
    def rss(self) -> int:
        """Resident bytes now."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class EngineProcess(Process):
    """An engine of `tests.faults.engine`."""

    def __init__(self, log: Path, port: int = 0, **settings: Any) -> None:
        options = ["--port", str(port), "--settings", json.dumps(settings)]
        super().__init__([sys.executable, "-m", "tests.faults.engine", *options], log, {})
        self.port = int(self.line)
        self.settings = settings
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=30, verify=False)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.client.close()
        super().kill()

    def restart(self) -> EngineProcess:
        """Start one in the place of a killed one: same port, same settings."""
        self.kill()
        return EngineProcess(self.log, self.port, **self.settings)

    def told(self, **settings: Any) -> dict[str, Any]:
        """Return what it has seen, after taking new settings."""
        return dict(self.client.post("/stub", json=settings).json())

    @property
    def running(self) -> int:
        """Answers under way."""
        return int(self.told()["running"])

    @property
    def seen(self) -> list[dict[str, Any]]:
        """Headers and bodies of the requests for an answer, oldest first."""
        return list(self.told()["seen"])


class Gateway(Process):
    """`foreword serve`, after some lines of Python in `tweak`: waits that are minutes long, made short."""

    def __init__(
        self, log: Path, options: list[str], environment: Mapping[str, str], *, before: list[str], tweak: str
    ) -> None:
        code = f"{tweak}\nfrom foreword.cli import main; main()"
        command = [*before, sys.executable, "-c", code, "serve", "--base", str(BASE), "--port", "0", "--json"]
        super().__init__([*command, *options], log, environment)
        self.url = str(json.loads(self.line)["url"])
        self.port = int(self.url.rpartition(":")[2])

    def client(self, key: str = "", **options: Any) -> httpx.Client:
        """Return a client that carries a key."""
        return httpx.Client(base_url=self.url, headers=bearer(key), timeout=60, verify=False, **options)

    def metric(self, key: str, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that have these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        with self.client(key) as client:
            families = text_string_to_metric_families(client.get("/metrics").text)
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


def bearer(key: str) -> dict[str, str]:
    """Return the header that carries a key."""
    return {"authorization": f"Bearer {key}"} if key else {}


@functools.cache
def _base_facts() -> Path:
    """Return a cache folder with the base's facts, which take a process of its own to read."""
    import atexit
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="foreword-facts-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    base_info(BASE, folder)
    return folder


@dataclass
class Stage:
    """A registry and what runs on it. `database_url` and `blob_url` as for `Registry.open`."""

    folder: Path
    database_url: str = ""
    blob_url: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    processes: list[Process] = field(default_factory=list)
    seeds: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    compiled: dict[str, str] = field(default_factory=dict)
    """sha256 of the compiled file, by reference."""

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        shutil.copytree(_base_facts() / "bases", self.home / "cache" / "bases", dirs_exist_ok=True)
        self.registry = self.open()
        self.admin = self.registry.access.create_key(None, name="root")[1]

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def open(self) -> Registry:
        """Open the registry in this process."""
        return Registry.open(self.home, database_url=self.database_url or None, blob_url=self.blob_url or None)

    def variables(self) -> dict[str, str]:
        """Return the variables that lead a process to the registry."""
        urls = {"FOREWORD_DATABASE_URL": self.database_url, "FOREWORD_BLOB_URL": self.blob_url}
        return {"FOREWORD_HOME": str(self.home), **urls, **self.environment}

    def artefact(self, task: str, method: Method = "prompt") -> Path:
        """Write another artefact of a task, with vectors of its own."""
        return write_artefact(self.folder, task, method, seed=next(self.seeds))

    def publish(self, task: str = "triage", *, alias: str | None = None, compiled: bool = True) -> Version:
        """Publish a new version of a task, compiled already: a process that compiles takes seconds."""
        version = self.registry.publish(self.artefact(task), alias=alias)
        if compiled:
            out = self.folder / "compiled.safetensors"
            compile_file(demo_base(), self.registry.path(version), out)
            self.compiled[version.reference] = self.registry.add_compiled(out).sha256
        return version

    def tenant(self, name: str, *tasks: str, limits: Limits | None = None, expires: Any = None) -> str:
        """Create a tenant that may call these tasks (created already: give it another key); return a whole key."""
        access = self.registry.access
        if all(tenant.name != name for tenant in access.tenants()):
            access.create_tenant(name, limits=limits or Limits())
        for task in tasks:
            access.grant(name, task, "call")
        return access.create_key(name, expires=expires)[1]

    def engine(self, **settings: Any) -> EngineProcess:
        """Start an engine."""
        return self._keep(EngineProcess(self._log("engine"), **settings))

    def gateway(
        self,
        *engines: EngineProcess,
        options: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        before: tuple[str, ...] = (),
        tweak: str = "",
    ) -> Gateway:
        """Start a gateway that asks for keys in front of engines; `before` is put in front of its command."""
        urls = [option for engine in engines for option in ("--vllm", engine.url)]
        chosen = ["--dtype", "float32", *urls, "--require-keys", *options]
        variables = {**self.variables(), **(environment or {})}
        return self._keep(Gateway(self._log("gateway"), chosen, variables, before=list(before), tweak=tweak))

    def python(self, code: str, *arguments: object, ready: bool = True) -> Process:
        """Start a process on `code`, which prints a line when it is ready."""
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return self._keep(Process(command, self._log("python"), self.variables(), ready=ready))

    def run(self, command: list[str], environment: Mapping[str, str]) -> Process:
        """Start any command, without waiting for it to say that it is ready."""
        return self._keep(Process(command, self._log("process"), environment, ready=False))

    def _log(self, kind: str) -> Path:
        return self.folder / f"{kind}-{next(_names)}.log"

    def _keep(self, process: Any) -> Any:
        self.processes.append(process)
        return process

    def close(self) -> None:
        """End everything."""
        for process in self.processes:
            process.kill()
        self.registry.close()


@contextmanager
def staged(folder: Path, **options: Any) -> Iterator[Stage]:
    """Yield a stage; everything that it started ends with the block."""
    stage = Stage(folder, **options)
    try:
        yield stage
    finally:
        stage.close()


def wait_until(holds: Callable[[], Any], seconds: float = 10.0, every_s: float = 0.05) -> float:
    """Wait until `holds()` is true, and return how long that took; errors of HTTP count as not yet."""
    started = time.monotonic()
    while True:
        with suppress(httpx.HTTPError):
            if holds():
                return time.monotonic() - started
        assert time.monotonic() - started < seconds, "waited in vain"
        time.sleep(every_s)


Database = Literal["sqlite", "postgresql"]


@contextmanager
def database_url(kind: Database) -> Iterator[str]:
    """Yield the URL of a fresh database; "" is the home's own SQLite."""
    if kind == "sqlite":
        yield ""
        return
    from tests.registry.postgres import postgres_url

    with postgres_url() as url:
        yield url
