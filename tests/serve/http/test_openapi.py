"""The OpenAPI document: complete, and what it says of bodies is what the server takes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from foreword.registry.store import Registry
from foreword.serve.gateway import create_app
from foreword.serve.http.openai_api import ChatBody, CompletionBody
from tests.serve.fakes import FakeBackend


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Registry.open(tmp_path_factory.mktemp("openapi") / "home") as registry:
        return create_app(FakeBackend(), registry, base_name="base", require_keys=True).openapi()


def test_every_operation_is_described(document: Any) -> None:
    operations = {
        (method, path): operation for path, item in document["paths"].items() for method, operation in item.items()
    }
    assert {("post", "/v1/completions"), ("get", "/ready"), ("put", "/admin/v1/routes")} <= operations.keys()
    assert len(operations) > 30
    schemas = document["components"]["schemas"]
    for (method, path), operation in operations.items():
        assert operation["summary"]
        codes = set(operation["responses"])
        is_open = path in ("/health", "/ready")
        assert ("401" in codes) is not is_open and ("security" in operation) is not is_open
        if method in ("post", "put", "patch"):
            content = operation["requestBody"]["content"]["application/json"]["schema"]
            assert content["$ref"].removeprefix("#/components/schemas/") in schemas
            assert {"400", "413"} <= codes
        for code, response in operation["responses"].items():
            if int(code) >= 400 and path != "/ready":
                reference = response["content"]["application/json"]["schema"]["$ref"]
                assert reference == "#/components/schemas/Error"
        for part in (piece[1:-1] for piece in path.split("/") if piece.startswith("{")):
            assert any(entry["name"] == part and entry["in"] == "path" for entry in operation["parameters"]), path


def test_every_reference_leads_somewhere(document: Any) -> None:
    def references(value: Any) -> Any:
        if isinstance(value, dict):
            yield from (found for key, found in value.items() if key == "$ref")
            for found in value.values():
                yield from references(found)
        elif isinstance(value, list):
            for found in value:
                yield from references(found)

    names = set(references(document))
    assert names
    for name in names:
        assert name.removeprefix("#/components/schemas/") in document["components"]["schemas"], name


def test_bodies_name_their_fields(document: Any) -> None:
    schemas = document["components"]["schemas"]
    for kind in (CompletionBody, ChatBody):
        schema = schemas[kind.__name__]
        assert set(schema["properties"]) == set(kind.model_fields) and schema["additionalProperties"] is False
    kinds = {str(entry.get("type")) for entry in schemas["CompletionBody"]["properties"]["prompt"]["anyOf"]}
    assert kinds == {"string", "array"}


def test_it_is_served_and_docs_are_not(tmp_path: Path) -> None:
    async def main() -> None:
        with Registry.open(tmp_path / "home") as registry:
            app = create_app(FakeBackend(), registry, base_name="secret-base", require_keys=True)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                found = await client.get("/openapi.json")
                assert found.status_code == 200 and "secret-base" not in found.text
                assert (await client.get("/docs")).status_code == 404

    asyncio.run(main())
