"""The files under deploy/: what one says of another is so; with `make test-deploy` they also meet their schemas."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import foreword.serve
from foreword.cli import app
from foreword.serve.vllm.blocks import TESTED_VLLM

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
SCRIPTS = sorted(DEPLOY.rglob("*.sh"))
BIN = Path(sys.executable).parent


@cache
def manifests() -> list[dict[str, Any]]:
    return [document for path in KUBERNETES for document in yaml.safe_load_all(path.read_text())]


def objects(kind: str) -> dict[str, dict[str, Any]]:
    """Return the Kubernetes objects of a kind by name."""
    found = [document for document in manifests() if document["kind"] == kind]
    return {document["metadata"].get("name", "compile"): document for document in found}


def pods() -> dict[str, dict[str, Any]]:
    """Return the pod templates by the name of their owner."""
    owners = {**objects("Deployment"), **objects("StatefulSet"), **objects("Job")}
    return {name: owner["spec"]["template"] for name, owner in owners.items()}


def container(name: str) -> dict[str, Any]:
    (found,) = pods()[name]["spec"]["containers"]
    return dict(found)


def option(arguments: list[str], name: str) -> list[str]:
    return [argument.split("=", 1)[1] for argument in arguments if argument.startswith(f"--{name}=")]


def variables(found: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in found.get("env", [])}


def test_a_pod_has_time_to_drain() -> None:
    arguments = container("gateway")["args"]
    needed = {
        "gateway": int(option(arguments, "notice")[0]) + int(option(arguments, "drain")[0]),
        "vllm": int(variables(container("vllm"))["SHUTDOWN_TIMEOUT"]),
    }
    for name, seconds in needed.items():
        assert pods()[name]["spec"]["terminationGracePeriodSeconds"] > seconds
    probe = container("gateway")["readinessProbe"]
    assert int(option(arguments, "notice")[0]) > probe["periodSeconds"] * probe["failureThreshold"]


def test_gateways_know_every_replica_by_its_name() -> None:
    replicas = objects("StatefulSet")["vllm"]["spec"]
    (port,) = objects("Service")["vllm"]["spec"]["ports"]
    names = [f"http://vllm-{index}.{replicas['serviceName']}:{port['port']}" for index in range(replicas["replicas"])]
    assert option(container("gateway")["args"], "vllm") == names
    values = yaml.safe_load((DEPLOY / "router/production-stack-values.yaml").read_text())["routerSpec"]
    assert values["staticBackends"].split(",") == names
    assert len(values["staticModels"].split(",")) == len(names)


def test_probes_ask_for_life_and_for_readiness() -> None:
    gateway = container("gateway")
    assert gateway["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert {gateway[probe]["httpGet"]["path"] for probe in ("livenessProbe", "startupProbe")} == {"/health"}
    for name in ("gateway", "vllm"):
        found = container(name)
        liveness = found["livenessProbe"]
        assert liveness["failureThreshold"] * liveness["periodSeconds"] >= 60  # load is no reason to kill
        ports = {port["name"] for port in found["ports"]}
        assert {found[probe]["httpGet"]["port"] for probe in found if probe.endswith("Probe")} <= ports


def test_selectors_find_the_pods_that_they_are_for() -> None:
    labels = {name: template["metadata"]["labels"] for name, template in pods().items()}
    for kind, path in (("Service", ("selector",)), ("PodDisruptionBudget", ("selector", "matchLabels"))):
        for name, found in objects(kind).items():
            selector = found["spec"]
            for key in path:
                selector = selector[key]
            assert selector.items() <= labels[name].items(), (kind, name)
    for name, owner in {**objects("Deployment"), **objects("StatefulSet")}.items():
        assert owner["spec"]["selector"]["matchLabels"].items() <= labels[name].items()
    target = objects("HorizontalPodAutoscaler")["gateway"]["spec"]["scaleTargetRef"]
    assert target["name"] in objects(target["kind"])


def test_only_gateways_reach_vllm_and_only_gateways_have_the_database() -> None:
    policies = objects("NetworkPolicy")
    assert policies["nothing-by-default"]["spec"]["podSelector"] == {}
    allowed = [source for rule in policies["vllm"]["spec"]["ingress"] for source in rule["from"]]
    assert {"podSelector": {"matchLabels": {"app": "gateway"}}} in allowed
    rest = [source for source in allowed if "podSelector" not in source]
    assert rest == [{"namespaceSelector": {"matchLabels": {"foreword-access": "metrics"}}}]
    databases = {name for name in pods() if "foreword-database" in json.dumps(container(name))}
    assert databases == {"gateway", "compile"}
    assert "foreword-blobs-write" not in json.dumps(container("vllm"))


def test_what_pods_refer_to_exists() -> None:
    keys = {
        ("Secret", name, key) for name, found in objects("Secret").items() for key in found.get("stringData", {})
    } | {("ConfigMap", name, key) for name, found in objects("ConfigMap").items() for key in found["data"]}
    sources = {(kind, name) for kind, name, _ in keys}
    for name, template in pods().items():
        found = container(name)
        for source in found["envFrom"]:
            ((reference, target),) = source.items()
            assert ({"secretRef": "Secret", "configMapRef": "ConfigMap"}[reference], target["name"]) in sources
        for entry in found.get("env", []):
            if "valueFrom" in entry:
                reference = entry["valueFrom"]["secretKeyRef"]
                assert ("Secret", reference["name"], reference["key"]) in keys
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert {mount["name"] for mount in found["volumeMounts"]} == set(volumes)
        claims = [volume["persistentVolumeClaim"] for volume in volumes.values() if "persistentVolumeClaim" in volume]
        assert {claim["claimName"] for claim in claims} <= set(objects("PersistentVolumeClaim"))
    listed = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())["resources"]
    assert {path.name for path in KUBERNETES} == {*listed, "kustomization.yaml", "compile-job.yaml"}


def commands() -> Iterator[tuple[str, list[str]]]:
    yield "kubernetes gateway", container("gateway")["args"]
    yield "kubernetes compile", container("compile")["args"]
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    yield "compose gateway", services["gateway-0"]["command"]


@pytest.mark.parametrize("where", dict(commands()))
def test_the_options_in_use_exist(where: str) -> None:
    arguments = dict(commands())[where]
    shown = CliRunner().invoke(app, [arguments[0], "--help"], env={"COLUMNS": "250", "TERM": "dumb"}).output
    known = set(re.findall(r"--[a-z][a-z-]*", shown))
    assert {argument.split("=", 1)[0] for argument in arguments if argument.startswith("--")} <= known


def test_compose_waits_gives_time_and_keeps_the_data_apart() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = compose["services"]
    for name in ("gateway-0", "gateway-1"):
        assert int(services[name]["stop_grace_period"].removesuffix("s")) > int(
            option(services[name]["command"], "drain")[0]
        )
        assert option(services[name]["command"], "vllm") == ["http://vllm-0:8000", "http://vllm-1:8000"]
    assert compose["networks"]["engines"]["internal"] is True
    assert all("ports" not in services[name] for name in ("postgres", "s3", "vllm-0", "vllm-1"))
    named = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    given = {line.split("=")[0] for line in (DEPLOY / "example.env").read_text().splitlines() if "=" in line}
    assert named == given


def test_images_are_of_the_tested_vllm() -> None:
    assert f"FROM vllm/vllm-openai:v{TESTED_VLLM}" in (DEPLOY / "vllm/Dockerfile").read_text()
    assert f"foreword-vllm:{TESTED_VLLM}" in (DEPLOY / "compose.yaml").read_text()


def test_the_metrics_that_the_page_names_exist() -> None:
    named = re.findall(r"`(?:vllm:)?foreword_(\w+)", (DEPLOY.parent / "docs/scale.md").read_text())
    assert len(named) > 15
    source = "".join(path.read_text() for path in Path(foreword.serve.__file__).parent.rglob("*.py"))
    known = {name.removeprefix("foreword_") for name in re.findall(r'"(\w+)"', source)}
    assert {name.removesuffix("_total") for name in named} <= known


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o111


def test_serve_prints_the_command_that_it_would_run(tmp_path: Path) -> None:
    written = tmp_path / "command.sh"
    written.write_text('VLLM_CPU_KVCACHE_SPACE=1 vllm serve /models/base \\\n  --kv-transfer-config \'{"a":"b c"}\'\n')
    done = subprocess.run(
        [DEPLOY / "vllm/serve.sh", "--max-num-seqs", "2 3"],
        env={"PATH": "/usr/bin:/bin", "VLLM_COMMAND": str(written), "DRY_RUN": "1", "SHUTDOWN_TIMEOUT": "9"},
        capture_output=True,
        text=True,
        check=True,
    )
    printed = 'VLLM_CPU_KVCACHE_SPACE=1 vllm serve /models/base --kv-transfer-config {"a":"b c"} '
    assert done.stderr.strip() == printed + "--shutdown-timeout 9 --max-num-seqs 2 3"


@pytest.mark.deploy
@pytest.mark.parametrize("version", ["1.32", "1.37"])
def test_manifests_meet_the_schemas(version: str) -> None:
    import kubernetes_validate

    for document in manifests():
        if document["kind"] != "Kustomization":
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.deploy
def test_the_compose_file_meets_its_schema() -> None:
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.deploy
def test_scripts_pass_shellcheck() -> None:
    done = subprocess.run([BIN / "shellcheck", *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
