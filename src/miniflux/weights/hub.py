"""Official files from the Hugging Face Hub (the extra `hub`) into its cache, where every other program finds them.

The layout of the cache is the Hub's own: `blobs/HASH` holds the content, `snapshots/COMMIT/PATH` are links to it, and
`refs/main` names the newest commit. Checksums are those that the Hub states: SHA-256 for large files, git's own hash
for small ones. What was begun stays in `blobs/HASH.incomplete`, and is gone on with next time.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from miniflux.checkpoints.folders import tensor_paths
from miniflux.disk import digest_of, write_beside
from miniflux.errors import CheckpointError, FetchError, InputError, MissingExtraError
from miniflux.variants import Variant
from miniflux.weights.finding import found_parts
from miniflux.weights.hubcache import repository_folder

log = logging.getLogger(__name__)

SHA256, GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
CHUNK = 1 << 20  # bytes hashed at a time
INCOMPLETE = ".incomplete"
RETRIES = 3  # when a connection is cut without having brought anything
TIMEOUT = 30.0  # seconds without an answer


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub announces it.

    Attributes:
        path: in the repository.
        size: in bytes.
        digest: SHA-256 of the content (64 digits), or its git hash (40): the name of its blob.
    """

    path: str
    size: int
    digest: str

    def matches(self, path: Path) -> bool:
        """Whether a file has this content; it is read once."""
        begun = None if len(self.digest) == 64 else hashlib.sha1(b"blob %d\0" % self.size)
        return digest_of(path, begun) == self.digest


@dataclass(frozen=True)
class Fetch:
    """What fetching a variant takes.

    Attributes:
        variant: what is fetched.
        commit: the newest one of its repository.
        folder: the repository's folder in the cache.
        files: all files that are needed, small ones first.
        here: parts that are elsewhere on this machine, and where.
    """

    variant: Variant
    commit: str
    folder: Path
    files: list[RemoteFile]
    here: dict[str, Path]

    def blob(self, file: RemoteFile) -> Path:
        return self.folder / "blobs" / file.digest

    @property
    def wanted(self) -> list[RemoteFile]:
        """The files that are not in the cache."""
        return [file for file in self.files if not self.blob(file).is_file() and not self.is_copied(file)]

    def is_copied(self, file: RemoteFile) -> bool:
        """Whether a snapshot has the file itself, as on systems without links, where there are no blobs."""
        return _size(self.folder / "snapshots" / self.commit / file.path) == file.size

    @property
    def begun(self) -> int:
        """Bytes of them that were fetched before."""
        partials = (self.blob(file).with_name(file.digest + INCOMPLETE) for file in self.wanted)
        return sum(max(_size(path), 0) for path in partials)

    @property
    def bytes(self) -> int:
        """How much is left to fetch."""
        return sum(file.size for file in self.wanted) - self.begun


def plan(variant: Variant) -> Fetch:
    """Ask the Hub what a variant's files are, and look which of them are here.

    Raises:
        InputError: the variant is inside the package.
        MissingExtraError: huggingface_hub is not installed.
        FetchError: the Hub cannot be reached, or has not what is expected there; the message says what to do.
    """
    if not variant.downloads:
        raise InputError(f"{variant.name} is inside the package: there is nothing to fetch")
    hub = _hub()
    folder = repository_folder(variant.repository)
    with _refusals(variant):
        try:
            about = hub.HfApi(endpoint=hub.constants.ENDPOINT).model_info(
                variant.repository, revision="main", files_metadata=True, timeout=TIMEOUT
            )
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise FetchError(f"{hub.constants.ENDPOINT}: its answer is not that of a Hugging Face Hub") from error
    if not GIT.fullmatch(str(about.sha)):
        raise FetchError(f"{variant.repository}: the Hub names no commit, but {about.sha!r}")
    here = {part: path for part, path in complete_parts(variant).items() if not path.is_relative_to(folder)}
    siblings = {sibling.rfilename: sibling for sibling in about.siblings or []}
    wanted = [path for download in variant.downloads if download.part not in here for path in download.files]
    found = {path: _matching(path, siblings) for path in wanted}
    paths = [path for several in found.values() for path in several]
    absent = [path for path, several in found.items() if not several]
    if absent:
        raise FetchError(
            f"{variant.repository} has no {', '.join(absent)} any more: this version of miniflux is too old"
        )
    files = [_announced(siblings[path]) for path in paths]
    return Fetch(variant, str(about.sha), folder, sorted(files, key=lambda file: file.size), here)


def _matching(wanted: str, there: Iterable[str]) -> list[str]:
    """The files of a repository that are meant: one, or with `folder/*` all in a folder."""
    folder, star, _ = wanted.rpartition("*")
    return [path for path in there if path == wanted or (star and path.rpartition("/")[0] + "/" == folder)]


def complete_parts(variant: Variant) -> dict[str, Path]:
    """The parts of a variant that are on this machine, with all their shards."""
    found, _ = found_parts(variant)
    return {part: path for part, path in found.items() if part.endswith("tokenizer") or _is_whole(path)}


def _is_whole(path: Path) -> bool:
    try:
        return bool(tensor_paths(path))
    except CheckpointError:
        return False


def _announced(sibling: Any) -> RemoteFile:
    """A file of the Hub's answer, which becomes names in the cache: nothing but hashes may."""
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    size = sibling.lfs.size if sibling.lfs else sibling.size
    if not (SHA256 if sibling.lfs else GIT).fullmatch(str(digest)) or type(size) is not int or size < 0:
        raise FetchError(f"{sibling.rfilename}: the Hub states no size and checksum, but {size!r} and {digest!r}")
    return RemoteFile(sibling.rfilename, size, digest)


def fetch(plan: Fetch, progress: Callable[[int], object] = lambda count: None) -> Path:
    """Download what a plan lists, check it, and put it into the cache.

    Args:
        progress: called with the number of bytes that have arrived since the last call; negative where some must be
            fetched again.

    Returns:
        The snapshot's folder.

    Raises:
        FetchError: a download failed, or brought something else than was announced (which is removed). What had
            arrived is kept, and used next time.
    """
    free = _free(plan.folder)
    if plan.bytes > free:
        raise FetchError(f"{plan.folder}: {plan.bytes:,} bytes are needed, {free:,} are free; nothing was fetched")
    found = plan.folder / "snapshots" / plan.commit
    for file in plan.files:
        if plan.is_copied(file):
            continue
        _ensure(plan, file, progress)
        with _disk(plan.folder):
            _link(plan.blob(file), found / file.path)
    with _disk(plan.folder):
        ref = plan.folder / "refs" / "main"
        ref.parent.mkdir(exist_ok=True)
        write_beside(ref, lambda beside: beside.write_text(plan.commit, "utf-8"))
    return found


def _ensure(plan: Fetch, file: RemoteFile, progress: Callable[[int], object]) -> None:
    """Have the blob of a file: complete and checked."""
    from huggingface_hub.utils import WeakFileLock

    blob = plan.blob(file)
    lock = plan.folder.parent / ".locks" / plan.folder.name / f"{file.digest}.lock"
    with _disk(plan.folder):
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.is_file():
            return
        partial = blob.with_name(blob.name + INCOMPLETE)
        with _refusals(plan.variant):
            _download(plan, file, partial, progress)
        with _disk(plan.folder):
            right = file.matches(partial)
            if right:
                partial.replace(blob)
            else:
                partial.unlink()
        if not right:
            raise FetchError(
                f"{file.path}: what arrived is not what {plan.variant.repository} announced: its checksum is not "
                f"{file.digest}. It was removed; run it again"
            )


def _download(plan: Fetch, file: RemoteFile, partial: Path, progress: Callable[[int], object]) -> None:
    """Fetch what is missing of a file. Where a connection is cut, another one goes on."""
    hub = _hub()
    failures = 0
    while (have := _size(partial)) != file.size:
        if have > file.size:
            partial.unlink()
            progress(-have)
            continue
        cut: Exception | None = None
        try:
            _stream(plan, file, partial, max(have, 0), progress)
        except hub.errors.HfHubHTTPError:
            raise
        except _network_errors(hub) as error:
            cut = error
        if _size(partial) == file.size:
            return
        failures = 0 if _size(partial) > have else failures + 1
        if failures > RETRIES:
            raise cut or ConnectionError(f"{_size(partial):,} of {file.size:,} bytes of {file.path} arrived")
        log.info("%s: the connection was cut after %s bytes; trying again", file.path, f"{_size(partial):,}")
        time.sleep(failures)


def _stream(plan: Fetch, file: RemoteFile, partial: Path, have: int, progress: Callable[[int], object]) -> None:
    """Append to what is there until the server stops."""
    hub = _hub()
    url = hub.hf_hub_url(plan.variant.repository, file.path, revision=plan.commit, endpoint=hub.constants.ENDPOINT)
    headers = {**hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with hub.get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        hub.utils.hf_raise_for_status(response)
        goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if have and not goes_on:  # the server sends all of it
            progress(-have)
            have = 0
        with _disk(plan.folder):
            out = partial.open("ab" if have else "wb", buffering=0)
        with out:
            for chunk in response.iter_raw():  # as it comes: nothing waits to be lost
                have += len(chunk)
                if have > file.size:  # not the announced file; its checksum will tell
                    chunk = chunk[: file.size - have]
                with _disk(plan.folder):
                    _write(out, chunk)
                progress(len(chunk))
                if have >= file.size:
                    return


def _write(out: FileIO, data: bytes) -> None:
    """Write all of it; a disk that is nearly full takes a part first."""
    while data:
        data = data[out.write(data) :]


def _size(path: Path) -> int:
    """In bytes; -1 for a file that is not there."""
    return path.stat().st_size if path.is_file() else -1


def _link(blob: Path, path: Path) -> None:
    """Give a blob its name in a snapshot: by a link, or a copy where the system has none."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a link to a blob that is gone
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        write_beside(path, lambda beside: shutil.copyfile(blob, beside))


def _free(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _hub() -> Any:
    """The package huggingface_hub.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        package = importlib.import_module("huggingface_hub")
        for name in ("constants", "errors", "utils"):
            importlib.import_module(f"huggingface_hub.{name}")
    except ImportError as error:
        raise MissingExtraError("fetching needs huggingface_hub: pip install 'miniflux[hub]'") from error
    return package


def _network_errors(hub: Any) -> tuple[type[Exception], ...]:
    """What its client raises when there is no answer, or half of one."""
    return hub.errors.HfHubHTTPError.__bases__


@contextmanager
def _disk(folder: Path) -> Generator[None, None, None]:
    """Turn what the disk refuses into an error that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = (
            "the disk is full; what arrived is kept: make room, then run it again" if full else error.strerror or error
        )
        raise FetchError(f"{folder}: {what}") from error


@contextmanager
def _refusals(variant: Variant) -> Generator[None, None, None]:
    """Turn what the network and the Hub refuse into an error that says what to do."""
    hub = _hub()
    page = f"{hub.constants.ENDPOINT}/{variant.repository}"
    try:
        yield
    except hub.errors.OfflineModeIsEnabled as error:
        raise FetchError("HF_HUB_OFFLINE is set, so nothing is fetched; unset it to download") from error
    except hub.errors.HfHubHTTPError as error:
        status = error.response.status_code
        token = bool(hub.get_token())
        if isinstance(error, hub.errors.GatedRepoError) or (status == 401 and not token) or status == 403:
            if token:
                said = f"this account has no access: accept the licence on {page} with the account of the token"
            else:
                said = f"it needs an access token: accept the licence on {page}, then put a token into HF_TOKEN"
        elif status == 401:
            said = "the Hub refuses the access token: put a valid one into HF_TOKEN, or run `hf auth login`"
        elif status == 404:
            said = f"the Hub has no such repository or file: see {page}"
        else:
            said = f"the Hub answers {status}; what arrived is kept: try again later"
        raise FetchError(f"{variant.repository}: {said}") from error
    except _network_errors(hub) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FetchError(
            f"{hub.constants.ENDPOINT} cannot be reached, or stopped answering ({reason}); what arrived is kept: "
            "check the connection, then run it again"
        ) from error
