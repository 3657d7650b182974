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
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from foreword.core.artefact import file_sha256
from foreword.errors import ArtefactCorrupt, ArtefactError, ConfigError, RegistryError
from foreword.registry.folders import make_folder

SUFFIX = ".safetensors"
STAGING = ".staging"
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


def open_blobs(url: str | Path, cache: Path) -> Blobs:
    """Open the blob store in a folder, or at an fsspec URL with `cache` as the folder for fetched copies.

    Raises ConfigError when the protocol is unknown, its package is missing, or the folder cannot be used.
    """
    url = str(url)
    if "://" not in url or url.startswith(("file://", "local://")):
        return FolderBlobs(make_folder(Path(url.split("://", 1)[-1]).expanduser().absolute(), "blob folder"))
    from fsspec.core import url_to_fs

    try:
        files, root = url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(f"cannot open blobs at {url}: {error}", hint="For s3://… install s3fs.") from error
    return RemoteBlobs(files, root.rstrip("/"), cache)


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
            _prove(path, sha256)
        except FileNotFoundError:
            raise _lost(path) from None
        return path

    def stored(self) -> Iterator[StoredBlob]:
        """Yield every blob and every staged copy in the folder; foreign files are left alone."""
        for path in self.folder.glob(f"[0-9a-f][0-9a-f]/*{SUFFIX}"):
            key = path.relative_to(self.folder).as_posix()
            if match := _KEY.fullmatch(key):
                yield from _stat(path, key, match[1])
        yield from _staged_copies(self.staging)

    def remove(self, blob: StoredBlob) -> bool:
        """Unlink the file."""
        return _unlink(self.folder / blob.key, blob)

    def _path(self, sha256: str) -> Path:
        return self.folder / _key(sha256)


class RemoteBlobs:
    """Blobs behind fsspec. A fetched one is kept in a local cache and proved at every use.

    Object stores show an upload when it is whole. Where one is interrupted on a file system that does not, no version
    refers to it yet, and the next publish writes over it.
    """

    def __init__(self, files: Any, root: str, cache: Path) -> None:
        self.files = files
        self.root = root
        self.cache = cache
        self.staging = cache / STAGING

    def put(self, staged: Staged) -> None:
        """Upload the staged file and check that as many bytes arrived."""
        key = f"{self.root}/{_key(staged.sha256)}"
        with _store_errors(f"cannot upload to {key}"):
            self.files.makedirs(key.rsplit("/", 1)[0], exist_ok=True)
            self.files.put_file(str(staged.path), key)
            self.files.invalidate_cache()
            num_bytes = self.files.size(key)
        staged.path.unlink()
        if num_bytes != staged.num_bytes:
            raise RegistryError(f"{key} has {num_bytes} bytes after an upload of {staged.num_bytes}", hint="Try again.")

    def has(self, sha256: str) -> bool:
        """Return whether the blob exists remotely."""
        with _store_errors("cannot ask for a blob"):
            self.files.invalidate_cache()
            return bool(self.files.exists(f"{self.root}/{_key(sha256)}"))

    def fetch(self, sha256: str) -> Path:
        """Return the cached copy, or download it; proved by its digest either way."""
        path, key = self.cache / _key(sha256), f"{self.root}/{_key(sha256)}"
        with suppress(FileNotFoundError, ArtefactCorrupt):  # a bad copy is fetched again
            _prove(path, sha256)
            return path
        temporary: Path | None = None
        try:
            with _store_errors(f"cannot fetch {key}"):
                self.staging.mkdir(parents=True, exist_ok=True)
                descriptor, name = tempfile.mkstemp(dir=self.staging, suffix=SUFFIX)
                os.close(descriptor)
                temporary = Path(name)
                try:
                    self.files.get_file(key, name)
                except FileNotFoundError:
                    raise _lost(key) from None
                _prove(temporary, sha256, key)
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, path)
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
        return path

    def stored(self) -> Iterator[StoredBlob]:
        """Yield every remote blob, and the staged copies of this machine."""
        with _store_errors(f"cannot list {self.root}"):
            self.files.invalidate_cache()
            found = self.files.find(self.root, detail=True) if self.files.exists(self.root) else {}
            for name, info in found.items():
                key = name.removeprefix(f"{self.root}/")
                if match := _KEY.fullmatch(key):
                    yield StoredBlob(key, match[1], int(info["size"]), self._modified(name, info))
        yield from _staged_copies(self.staging)

    def remove(self, blob: StoredBlob) -> bool:
        """Remove the blob remotely and from this machine's cache."""
        if blob.sha256 is None:
            return _unlink(self.cache / blob.key, blob)
        name = f"{self.root}/{blob.key}"
        with _store_errors(f"cannot remove {name}"):
            self.files.invalidate_cache()
            try:
                if self._modified(name, self.files.info(name)) != blob.modified:
                    return False
                self.files.rm_file(name)
            except FileNotFoundError:
                return False
            (self.cache / blob.key).unlink(missing_ok=True)
        return True

    def _modified(self, name: str, info: Any) -> float:
        # S3's listing says it; others are asked one by one.
        return float((info.get("LastModified") or self.files.modified(name)).timestamp())


def _key(sha256: str) -> str:
    return f"{sha256[:2]}/{sha256}{SUFFIX}"


def _prove(path: Path, sha256: str, shown: str = "") -> None:
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


def _lost(where: Path | str) -> RegistryError:
    return RegistryError(
        f"the blob {where} is gone", hint="Publish the original file again, or restore the blob from a backup."
    )


def _stat(path: Path, key: str, sha256: str | None) -> Iterator[StoredBlob]:
    with suppress(FileNotFoundError):  # renamed or removed since it was listed
        stat = path.stat()
        yield StoredBlob(key, sha256, stat.st_size, stat.st_mtime)


def _unlink(path: Path, blob: StoredBlob) -> bool:
    with _store_errors(f"cannot remove {path}"):
        try:
            if path.stat().st_mtime != blob.modified:
                return False
            path.unlink()
        except FileNotFoundError:
            return False
        return True


def _staged_copies(staging: Path) -> Iterator[StoredBlob]:
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
