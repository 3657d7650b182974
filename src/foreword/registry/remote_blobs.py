"""Blobs behind an fsspec URL, such as a bucket of S3; what is fetched is kept in a local folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from foreword.errors import ArtefactCorrupt, ConfigError, ForewordError, RegistryError
from foreword.registry.blobs import (
    MARKER,
    STAGING,
    SUFFIX,
    Staged,
    StoredBlob,
    blob_digest,
    blob_key,
    lost,
    prove,
    staged_copies,
    unlink,
)

S3_CONNECT_S = 2
S3_READ_S = 5
"""The longest silence of a bucket that is waited for."""
S3_ATTEMPTS = 2
"""Tries of botocore, and of s3fs around them: a bucket that hangs is an error after 4 × S3_READ_S, one that is gone
within a second."""
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


def open_remote(url: str, cache: Path) -> RemoteBlobs:
    """Open the store at an fsspec URL. S3 is told where and who by the usual AWS_* variables, AWS_ENDPOINT_URL too.

    Raises ConfigError when the protocol is unknown or its package is missing.
    """
    from fsspec.core import url_to_fs

    protocol = url.split("://", 1)[0]
    is_s3 = protocol in ("s3", "s3a")
    try:
        files, root = url_to_fs(url, **(_s3_options() if is_s3 else {}))
    except (ImportError, ValueError, OSError) as error:
        package = _PACKAGES.get(protocol)
        hint = f"pip install {package}" if package else "Give a folder, or a URL as s3://bucket/prefix."
        raise ConfigError(f"cannot open blobs at {_shown(url)}: {error}", hint=hint) from error
    if is_s3:
        files.retries = S3_ATTEMPTS
    return RemoteBlobs(files, root.rstrip("/"), cache, url)


def _s3_options() -> dict[str, Any]:
    # The endpoint is given, though botocore would read it, so that fsspec tells the file systems of two apart.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    retries = {"mode": "standard", "total_max_attempts": S3_ATTEMPTS}
    config = {"connect_timeout": S3_CONNECT_S, "read_timeout": S3_READ_S, "retries": retries}
    return {"config_kwargs": config, "endpoint_url": endpoint or None}


class RemoteBlobs:
    """Blobs behind fsspec. A fetched one is kept in a local cache and proved at every use.

    Object stores show an upload when it is whole. Where one is interrupted on a file system that does not, no version
    refers to it yet, and the next publish writes over it.
    """

    def __init__(self, files: Any, root: str, cache: Path, url: str = "") -> None:
        self.url = url or root
        self.files = files
        self.root = root
        self.cache = cache
        self.staging = cache / STAGING
        self._has_folders = not {"s3", "gs"} & {
            *([files.protocol] if isinstance(files.protocol, str) else files.protocol)
        }

    def put(self, staged: Staged) -> None:
        """Upload the staged file and check that as many bytes arrived."""
        key = f"{self.root}/{blob_key(staged.sha256)}"
        with self._errors(f"cannot upload to {key}"):
            if self._has_folders:  # a bucket has none, and a missing one is not to be created by a typing error
                self.files.makedirs(key.rsplit("/", 1)[0], exist_ok=True)
            self.files.put_file(str(staged.path), key)
            self.files.invalidate_cache()
            num_bytes = self.files.size(key)
        staged.path.unlink()
        if num_bytes != staged.num_bytes:
            raise RegistryError(f"{key} has {num_bytes} bytes after an upload of {staged.num_bytes}", hint="Try again.")

    def has(self, sha256: str) -> bool:
        """Return whether the blob exists remotely."""
        with self._errors("cannot ask for a blob"):
            self.files.invalidate_cache()
            return bool(self.files.exists(f"{self.root}/{blob_key(sha256)}"))

    def fetch(self, sha256: str) -> Path:
        """Return the cached copy, or download it; proved by its digest either way."""
        path, key = self.cache / blob_key(sha256), f"{self.root}/{blob_key(sha256)}"
        with suppress(FileNotFoundError, ArtefactCorrupt):  # a bad copy is fetched again
            prove(path, sha256)
            return path
        temporary: Path | None = None
        try:
            with self._errors(f"cannot fetch {key}"):
                self.staging.mkdir(parents=True, exist_ok=True)
                descriptor, name = tempfile.mkstemp(dir=self.staging, suffix=SUFFIX)
                os.close(descriptor)
                temporary = Path(name)
                try:
                    self.files.get_file(key, name)
                except FileNotFoundError:
                    raise lost(key) from None
                prove(temporary, sha256, key)
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, path)
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
        return path

    def stored(self) -> Iterator[StoredBlob]:
        """Yield every remote blob, and the staged copies of this machine."""
        with self._errors(f"cannot list {self.root}"):
            self.files.invalidate_cache()
            found = self.files.find(self.root, detail=True) if self.files.exists(self.root) else {}
            for name, info in found.items():
                key = name.removeprefix(f"{self.root}/")
                if (sha256 := blob_digest(key)) is not None:
                    yield StoredBlob(key, sha256, int(info["size"]), self._modified(name, info))
        yield from staged_copies(self.staging)

    def remove(self, blob: StoredBlob) -> bool:
        """Remove the blob remotely and from this machine's cache."""
        if blob.sha256 is None:
            return unlink(self.cache / blob.key, blob)
        name = f"{self.root}/{blob.key}"
        with self._errors(f"cannot remove {name}"):
            self.files.invalidate_cache()
            try:
                if self._modified(name, self.files.info(name)) != blob.modified:
                    return False
                self.files.rm_file(name)
            except FileNotFoundError:
                return False
            (self.cache / blob.key).unlink(missing_ok=True)
        return True

    def claim(self, owner: str) -> str:
        """Write the marker unless there is one; where the store knows no exclusive write, the last of two wins."""
        key = f"{self.root}/{MARKER}"
        with self._errors(f"cannot mark {key}"):
            if self._has_folders:
                self.files.makedirs(self.root, exist_ok=True)
            with suppress(FileNotFoundError):
                return self._read_marker(key)
            with suppress(OSError):  # another was first, or the store knows no exclusive write
                self.files.pipe_file(key, f"{owner}\n".encode(), mode="create")
            with suppress(FileNotFoundError):
                return self._read_marker(key)
            self.files.pipe_file(key, f"{owner}\n".encode())
            return self._read_marker(key)

    def _read_marker(self, key: str) -> str:
        return str(self.files.cat_file(key).decode().strip())

    def _modified(self, name: str, info: Any) -> float:
        # S3's listing says it; others are asked one by one.
        return float((info.get("LastModified") or self.files.modified(name)).timestamp())

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except ForewordError:
            raise
        except Exception as error:  # each driver has errors of its own
            reason = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
            raise RegistryError(
                f"{what}: {reason}", hint=f"Is the store at {_shown(self.url)} up, and are its credentials right?"
            ) from error


def _shown(url: str) -> str:
    """Return a URL without the user and password that some protocols have in it."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
