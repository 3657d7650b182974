"""Where artefacts lie: content-addressed files, in a folder or behind any fsspec URL (S3, GCS, …).

A blob's key is `ab/abcdef….safetensors`, its sha256 with the first two digits as folder. It is staged first: copied to
a temporary file, hashed on the way and fsynced. `put` then makes it visible in one step, so a blob is whole or absent,
and every `fetch` proves it by the digest.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from foreword.core.artefact import file_sha256
from foreword.errors import ArtefactCorrupt, ArtefactError, RegistryError
from foreword.registry.folders import make_folder

SUFFIX = ".safetensors"
STAGING = ".staging"
MARKER = ".registry"
"""The file that names the registry to which a blob store belongs."""
_KEY = re.compile(r"[0-9a-f]{2}/([0-9a-f]{64})" + re.escape(SUFFIX))
_CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Staged:
    """A file's private copy, on disk and hashed."""

    path: Path
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """One file of a blob store, as gc sees it."""

    key: str
    sha256: str | None
    """None for a staged copy that a killed publisher left."""
    num_bytes: int
    modified: float
    """Seconds since the epoch; `put` renews it."""


class Blobs(Protocol):
    """A store of blobs: a folder or a remote file system. Every method raises RegistryError when the store fails."""

    @property
    def url(self) -> str:
        """Where it lies, as `open_blobs` takes it: what another machine is told."""

    @property
    def staging(self) -> Path:
        """The local folder for staged copies."""

    def put(self, staged: Staged) -> None:
        """Store the staged file under its digest, over a stored one if there is any; consumes it."""

    def has(self, sha256: str) -> bool:
        """Return whether the blob is stored (its content is not checked)."""

    def fetch(self, sha256: str) -> Path:
        """Return a local file with the blob, its digest proved. Raises ArtefactCorrupt where it differs."""

    def stored(self) -> Iterator[StoredBlob]:
        """Yield everything stored, staged copies of this machine included."""

    def remove(self, blob: StoredBlob) -> bool:
        """Remove what `stored` yielded; return False where it is gone already, or was put again since."""

    def claim(self, owner: str) -> str:
        """Mark the store as a registry's, by its id, where nobody has; return whose it is."""


def open_blobs(url: str | Path, cache: Path) -> Blobs:
    """Open the blob store in a folder, or at an fsspec URL with `cache` as the folder for fetched copies.

    Raises ConfigError when the protocol is unknown, its package is missing, or the folder cannot be used.
    """
    url = str(url)
    if "://" not in url or url.startswith(("file://", "local://")):
        return FolderBlobs(make_folder(Path(url.split("://", 1)[-1]).expanduser().absolute(), "blob folder"))
    from foreword.registry.remote_blobs import open_remote  # fsspec and its drivers take their time to import

    return open_remote(url, cache)


@contextmanager
def staged(source: Path, folder: Path) -> Iterator[Staged]:
    """Copy `source` into a temporary file in `folder`, hashed and fsynced; what is still there at the end is removed.

    Raises ArtefactError when the source cannot be read, RegistryError when the copy cannot be written (disk full).
    """
    try:
        reader = source.open("rb")
    except OSError as error:
        raise ArtefactError(f"cannot read {source}: {error.strerror}", hint="Check the path.") from error
    temporary = folder / f"{secrets.token_hex(8)}{SUFFIX}"
    try:
        with reader, _store_errors(f"cannot copy {source} into {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            digest, num_bytes = hashlib.sha256(), 0
            # Read-only, as far as the umask lets others read at all: a version does not change.
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
            with os.fdopen(descriptor, "wb") as writer:
                while chunk := reader.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    num_bytes += writer.write(chunk)
                writer.flush()
                os.fsync(writer.fileno())
        yield Staged(temporary, digest.hexdigest(), num_bytes)
    finally:
        with suppress(OSError):
            temporary.unlink()


class FolderBlobs:
    """Blobs in a local folder: written by fsync and rename, read in place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)
        self.staging = folder / STAGING

    def put(self, staged: Staged) -> None:
        """Rename the staged file to its place; a stored one is replaced, which renews its time and heals it."""
        target = self._path(staged.sha256)
        with _store_errors(f"cannot store {target}"):
            target.parent.mkdir(exist_ok=True)
            os.replace(staged.path, target)
            _sync_folder(target.parent)
            _sync_folder(self.folder)

    def has(self, sha256: str) -> bool:
        """Return whether the blob's file exists."""
        return self._path(sha256).is_file()

    def fetch(self, sha256: str) -> Path:
        """Return the blob's file, its digest proved."""
        path = self._path(sha256)
        try:
            prove(path, sha256)
        except FileNotFoundError:
            raise lost(path) from None
        return path

    def stored(self) -> Iterator[StoredBlob]:
        """Yield every blob and every staged copy in the folder; foreign files are left alone."""
        for path in self.folder.glob(f"[0-9a-f][0-9a-f]/*{SUFFIX}"):
            key = path.relative_to(self.folder).as_posix()
            if (sha256 := blob_digest(key)) is not None:
                yield from _stat(path, key, sha256)
        yield from staged_copies(self.staging)

    def remove(self, blob: StoredBlob) -> bool:
        """Unlink the file."""
        return unlink(self.folder / blob.key, blob)

    def claim(self, owner: str) -> str:
        """Write the marker, whole or not at all, unless there is one."""
        marker, temporary = self.folder / MARKER, self.folder / f"{MARKER}.{secrets.token_hex(8)}"
        with _store_errors(f"cannot mark {marker}"):
            if not marker.exists():
                temporary.write_text(owner + "\n")
                try:
                    os.link(temporary, marker)
                except OSError:
                    if not marker.exists():  # a file system without links
                        os.replace(temporary, marker)
                finally:
                    temporary.unlink(missing_ok=True)
                _sync_folder(self.folder)
            return marker.read_text().strip()

    def _path(self, sha256: str) -> Path:
        return self.folder / blob_key(sha256)


def blob_key(sha256: str) -> str:
    """Return where a blob lies in its store."""
    return f"{sha256[:2]}/{sha256}{SUFFIX}"


def blob_digest(key: str) -> str | None:
    """Return the digest of the blob that lies at a key, or None where it is none of a blob."""
    match = _KEY.fullmatch(key)
    return match[1] if match else None


def prove(path: Path, sha256: str, shown: str = "") -> None:
    """Raise ArtefactCorrupt where a file's digest is another, FileNotFoundError where it is gone."""
    try:
        found = file_sha256(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RegistryError(f"cannot read {path}: {error.strerror}") from error
    if found != sha256:
        raise ArtefactCorrupt(
            f"the blob {shown or path} has sha256 {found}, its version says {sha256}",
            hint="Publish the original file again, or restore the blob from a backup.",
        )


def lost(where: Path | str) -> RegistryError:
    """Return the error for a blob that is not there."""
    return RegistryError(
        f"the blob {where} is gone", hint="Publish the original file again, or restore the blob from a backup."
    )


def _stat(path: Path, key: str, sha256: str | None) -> Iterator[StoredBlob]:
    with suppress(FileNotFoundError):  # renamed or removed since it was listed
        stat = path.stat()
        yield StoredBlob(key, sha256, stat.st_size, stat.st_mtime)


def unlink(path: Path, blob: StoredBlob) -> bool:
    """Remove a file that has not changed since it was listed; return whether it was removed."""
    with _store_errors(f"cannot remove {path}"):
        try:
            if path.stat().st_mtime != blob.modified:
                return False
            path.unlink()
        except FileNotFoundError:
            return False
        return True


def staged_copies(staging: Path) -> Iterator[StoredBlob]:
    """Yield the staged copies in a folder."""
    for path in staging.glob(f"*{SUFFIX}"):
        yield from _stat(path, f"{STAGING}/{path.name}", None)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _store_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise RegistryError(
            f"{what}: {reason}", hint="Free space or check the registry's folder, then try again."
        ) from error
