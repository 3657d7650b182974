"""An S3 server on this machine, started once in a test run, and a bucket of one's own on it."""

from __future__ import annotations

import atexit
import functools
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_names = itertools.count()


@functools.cache
def endpoint() -> str:
    """Return the URL of the test run's server, started at the first call."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it writes a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    atexit.register(server.stop)
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


def environment() -> dict[str, str]:
    """Return the AWS_* variables that lead to the server."""
    return {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint()}


def client() -> Any:
    """Return boto3's client, for looking behind the registry's back."""
    return boto3.client(
        "s3", endpoint_url=endpoint(), region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
    )


@contextmanager
def bucket_url(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Set the AWS_* variables and yield the URL of a prefix in a fresh bucket."""
    for name, value in environment().items():
        patch.setenv(name, value)
    name = f"bucket-{next(_names)}"
    client().create_bucket(Bucket=name)
    yield f"s3://{name}/team/blobs"
