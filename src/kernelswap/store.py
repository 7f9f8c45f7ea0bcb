"""Bring a build to disk: stage, verify, move into place. The only file that writes artifacts.

    <cache>/staging/<unique>/          being fetched and verified; `<unique>.lock` is held by its writer while it lives
    <cache>/artifacts/<digest>/        verified; the name is the sha256 of the tree, so the name is the proof
    <cache>/manifests/<digest>.json    hash, size, times and inode of every file: what a quick look is compared with
    <cache>/index/<key>.json           which digest a candidate is, with the evidence
    <cache>/locks/<key>.lock           one download per candidate at a time

Nothing below `artifacts/` was ever unverified, and everything else can be lost: a missing or damaged index entry means
"fetch again", a missing manifest means "hash everything". A writer that dies leaves a staging directory whose lock is
free; the next writer removes it. Locks save work and nothing depends on them for being correct: where the file system
has none, two writers fetch twice and the second finds the first one's result in place.
"""

# long: one state machine (staged, verified, in place, indexed, gone), whose every crash point is argued about as a whole.

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import filelock

from . import metadata as metadata_file
from . import record, tree
from .errors import KernelSwapError, Refused, StoreError, Tampered, Unreachable
from .types import Artifact, Candidate, Evidence, Metadata, Source, Verifier
from .verifiers.contents import ContentsVerifier
from .verifiers.digest import DigestVerifier

_log = logging.getLogger(__name__)

_CONTENTS, _DIGESTS = ContentsVerifier(), DigestVerifier()
_LOCK_SECONDS = 1800.0  # a slow download of a large build; past it the holder is named, not waited for
_RENAME_TRIES = 5
_MOMENT = 60 * 60.0  # a staging directory without a lock file is somebody's only this long, in seconds
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_NO_SPACE = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}
_NO_WRITE = {errno.EROFS, errno.EACCES, errno.EPERM}

tree_digest = tree.digest
_parse = functools.lru_cache(maxsize=256)(lambda data, package: metadata_file.parse(data, package=package))


@dataclass(frozen=True, slots=True)
class Store:
    """Verified directories below one cache directory. Safe to share between threads and processes; holds no state."""

    cache: Path

    def __post_init__(self) -> None:
        # absolute: modules remember their file, and programs change their directory
        object.__setattr__(self, "cache", Path(os.path.abspath(self.cache)))  # noqa: PTH100  # `resolve` would follow the user's links

    # -- in ---------------------------------------------------------------------------------------------------------

    def materialize(
        self,
        candidate: Candidate,
        metadata: Metadata,
        source: Source,
        verifiers: Sequence[Verifier] = (),
        depends: Sequence[Artifact] = (),
    ) -> Artifact:
        """Bring `candidate` to disk, or find it there. Nothing under its final name was ever unverified.

        Contents and digests are always verified; `verifiers` come on top, and are asked again for what is already here,
        since what they say may depend on the call. Of a verifier that has `precheck(candidate, metadata)`, that is
        called before anything is fetched.

        Raises:
            Refused: a verifier said no; every problem is listed, the staged copy is gone, the cache is as it was.
            StoreError: no space, no permission, or another writer held the lock for too long. Same state.
            Unreachable, NotCached: from the source. Same state.
        """
        found = self.known(candidate)
        if found is None:
            _precheck(verifiers, candidate, metadata)
            try:
                with self._locked(record.key(candidate)):
                    found = self.known(candidate)  # another writer may have brought it while we waited
                    if found is None:
                        artifact = self._stage(candidate, metadata, source, verifiers, tuple(depends))
                        self._write_json(self._index(record.key(candidate)), record.dump(artifact))
                        return artifact
            except KernelSwapError:
                raise
            except OSError as e:
                self._fail(e, f"{candidate.requirement} ({candidate.variant})")
        evidence = _merge(found.evidence, _verify(verifiers, candidate, found.metadata, found.path))
        artifact = replace(found, evidence=evidence, depends=tuple(depends))
        if [_identity(a) for a in found.depends] != [_identity(a) for a in depends]:
            with contextlib.suppress(OSError):  # a read-only cache keeps the older answer, which this one goes over
                self._write_json(self._index(record.key(candidate)), record.dump(artifact))
        return artifact

    def _stage(
        self,
        candidate: Candidate,
        metadata: Metadata,
        source: Source,
        verifiers: Sequence[Verifier],
        depends: tuple[Artifact, ...],
    ) -> Artifact:
        for last in (False, True):
            with self._staging() as staged:
                try:
                    source.fetch(candidate, staged)
                except FileNotFoundError as e:
                    if last or isinstance(e, KernelSwapError) or staged.exists():
                        raise
                    continue  # the cache was deleted under us: once more, from the start
                # Alone and first: what it refuses (links, fifos, bombs) must not be opened by anything else.
                evidence = _verify((_CONTENTS,), candidate, metadata, staged)
                _seal(staged)
                before = _states(staged)
                evidence += _verify((_DIGESTS, *verifiers), candidate, metadata, staged)
                files = tree.hashes(staged)
                if _states(staged) != before:  # what was verified and what was hashed must be the same bytes
                    raise Refused("files changed while they were verified", asked=str(candidate.requirement))
                digest = tree.digest_of(files)
                final = self._publish(staged, digest)
                self._write_manifest(digest, files)
                return Artifact(candidate, final, digest, metadata, evidence, depends)
        raise AssertionError("unreachable: the second round returns or raises")

    def _publish(self, staged: Path, digest: str) -> Path:
        """Move `staged` to its final name. Whoever comes second adopts what is there, after hashing it."""
        final = self.cache / "artifacts" / digest
        final.parent.mkdir(parents=True, exist_ok=True)
        staged.chmod(stat.S_IMODE(final.parent.stat().st_mode))  # staging is private, the cache as public as its owner made it
        near = final.parent / f".incoming-{uuid.uuid4().hex}"
        try:
            for last in (*(False,) * (_RENAME_TRIES - 1), True):
                try:
                    if not os.path.lexists(final):  # an empty directory there would be replaced without a word
                        staged.rename(final)
                        return final
                except OSError as e:
                    if e.errno == errno.EXDEV and staged != near:  # artifacts/ is on another disk: cross first, then rename
                        shutil.copytree(staged, near, symlinks=True)
                        _seal(near)
                        staged = near
                        continue
                    if not os.path.lexists(final):
                        if last or e.errno in _NO_SPACE or (e.errno in _NO_WRITE and os.name != "nt"):
                            raise
                        time.sleep(0.02)  # NFS, and virus scanners on Windows: busy now, free in a moment
                        continue
                # Either another writer won, or NFS repeated a rename that had succeeded.
                if _intact(final, digest):
                    return final
                _log.warning("%s is damaged and is replaced by a verified copy", final)
                self._discard(final)
        finally:
            _remove_tree(near)
        raise StoreError(f"{final} cannot be put in place: something else keeps appearing there")

    # -- out --------------------------------------------------------------------------------------------------------

    def known(self, candidate: Candidate, verifiers: Sequence[Verifier] = ()) -> Artifact | None:
        """The artifact of `candidate` if it is here, without any request. Its bytes are looked at by `reverify`.

        Raises:
            Refused: one of `verifiers` (policies of this call) says no to what is here.
        """
        artifact = self._read(candidate, {})
        if artifact is not None and verifiers:
            evidence = _verify(verifiers, candidate, artifact.metadata, artifact.path)
            return replace(artifact, evidence=_merge(artifact.evidence, evidence))
        return artifact

    def _read(self, candidate: Candidate, read: dict[str, Artifact | None]) -> Artifact | None:
        """From its record. `read` is what has been read for this answer, `None` also for what is being read: a record in a
        circle is damaged, and a diamond is read once. Damaged, from another version, half deleted: as good as absent, and
        replaced by the next fetch.
        """
        key = record.key(candidate)
        if key in read:
            return read[key]
        read[key] = None
        value = _read_json(self._index(key))
        try:
            read[key] = self._from_record(candidate, value, read) if value is not None else None
        except (ValueError, OSError, RecursionError):
            return None
        return read[key]

    def _from_record(self, candidate: Candidate, value: Mapping[str, Any], read: dict[str, Artifact | None]) -> Artifact | None:
        digest = record.digest(value, candidate)
        path = self.cache / "artifacts" / digest
        if not path.is_dir():
            return None
        metadata = record.metadata(value)
        if metadata is None:  # from the artifact itself: its bytes are covered by the digest, a copy would not be
            metadata = _parse((path / "metadata.json").read_bytes(), candidate.name)
        depends = []
        for named in record.depends(value):
            below = self._read(named, read)
            if below is None:
                return None
            depends.append(below)
        return Artifact(candidate, path, digest, metadata, record.evidence(value), tuple(depends))

    def reverify(self, artifact: Artifact) -> Mapping[str, str]:
        """`{path: hex sha256}` of the artifact's files, each hashed now or proven unchanged since it was hashed.

        Proven means: same size, mtime, ctime and inode as in the manifest, and the manifest is a file that only this
        user can write. Anything else is hashed. Call it before each first import of a process.

        Raises:
            Tampered: files differ, are missing or were added; all are listed.
            StoreError: the artifact is gone, or cannot be read.
        """
        return self._reverify(artifact.path, artifact.digest, asked=str(artifact.candidate.requirement), quick=True)

    def _reverify(self, root: Path, digest: str, *, asked: str, quick: bool) -> Mapping[str, str]:
        try:
            if root.is_symlink():
                raise Tampered(f"{root} is a link", asked=asked, todo=_AGAIN)
            manifest, written_ns = self._manifest(digest)
            found = dict(tree.walk(root))
        except FileNotFoundError as e:
            raise StoreError(
                f"{root} is gone: the cache was deleted", asked=asked, todo="Load the kernel again to fetch it."
            ) from e
        except OSError as e:
            self._fail(e, asked)
        quickly = {
            path: f.sha256 for path, f in manifest.items() if quick and path in found and f.proven(found[path], written_ns)
        }
        files, problems = _hash_rest(root, sorted(found), quickly)
        problems += _differences(files, manifest, found)
        if not problems and tree.digest_of(files) != digest:
            problems = [f"the files do not add up to {digest[:16]}"]
        if problems:
            raise Tampered("\n".join([f"{root} was changed since it was verified:", *problems]), asked=asked, todo=_AGAIN)
        if len(quickly) < len(files):
            with contextlib.suppress(OSError):  # a read-only cache is hashed at each start: slower, as safe
                self._write_manifest(digest, files)
        return files

    # -- the whole cache ----------------------------------------------------------------------------------------------

    def entries(self) -> tuple[Artifact, ...]:
        """Every artifact that the index knows, once per candidate, sorted by name and variant."""
        found = []
        for path in _listed(self.cache / "index", ".json"):
            value = _read_json(path)
            with contextlib.suppress(ValueError):
                artifact = self.known(record.candidate(value)) if value is not None else None
                if artifact is not None:
                    found.append(artifact)
        return tuple(sorted(found, key=lambda a: (a.candidate.name, a.candidate.commit, a.candidate.variant, a.candidate.source)))

    def verify_all(self) -> dict[str, str | None]:
        """Hash every artifact: `{digest: what is wrong with it, or None}`, also of those that no index entry names."""
        outcome: dict[str, str | None] = {}
        for path in _listed(self.cache / "artifacts"):
            if not record.is_digest(path.name):
                continue
            try:
                self._reverify(path, path.name, asked=path.name, quick=False)
                outcome[path.name] = None
            except (Tampered, StoreError) as e:
                outcome[path.name] = e.found
        return outcome

    def remove(self, artifact: Artifact) -> None:
        """Delete it, and every index entry that names it. A process that imported it keeps running.

        Raises:
            StoreError: it cannot be deleted.
        """
        try:
            for path in _listed(self.cache / "index", ".json"):
                value = _read_json(path)
                if value is not None and value.get("digest") == artifact.digest:
                    path.unlink(missing_ok=True)
            self._manifest_path(artifact.digest).unlink(missing_ok=True)
            self._discard(self.cache / "artifacts" / artifact.digest)
        except OSError as e:
            self._fail(e, str(artifact.candidate.requirement))

    def clean(self) -> int:
        """Delete what dead writers left behind; how many. Every first write of a `Store` does it, so nobody must."""
        count = 0
        staging = self.cache / "staging"
        for path in _listed(staging):
            if path.suffix == ".lock":
                count += self._bury(path)
            elif not path.with_name(path.name + ".lock").exists() and time.time() - _mtime(path) > _MOMENT:
                _remove_tree(path)  # its lock was deleted by hand
                count += 1
        for folder in ("artifacts", "index", "manifests"):
            for path in _listed(self.cache / folder):
                if path.name.startswith(".") and time.time() - _mtime(path) > _MOMENT:  # half-way to its name
                    _remove_tree(path)
                    count += 1
        return count

    def _bury(self, lock_path: Path) -> int:
        lock = filelock.FileLock(lock_path)
        try:
            lock.acquire(blocking=False)
        except (filelock.Timeout, OSError, NotImplementedError):
            return 0  # alive, or not ours to judge
        try:
            _remove_tree(lock_path.with_suffix(""))
            with contextlib.suppress(OSError):
                lock_path.unlink()
        finally:
            lock.release()
        return 1

    # -- files --------------------------------------------------------------------------------------------------------

    def _index(self, key: str) -> Path:
        return self.cache / "index" / f"{key}.json"

    def _manifest_path(self, digest: str) -> Path:
        return self.cache / "manifests" / f"{digest}.json"

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """One writer per candidate, among threads and processes."""
        path = self.cache / "locks" / f"{key}.lock"
        lock = _acquire(path, _LOCK_SECONDS)
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    @contextlib.contextmanager
    def _staging(self) -> Iterator[Path]:
        """An empty directory of our own, gone afterwards, and recognisably dead if we are."""
        self.clean()
        for _ in range(_RENAME_TRIES):
            staged = self.cache / "staging" / uuid.uuid4().hex
            lock_path = staged.with_name(staged.name + ".lock")
            lock = _acquire(lock_path, _LOCK_SECONDS)
            if lock is None or lock_path.exists():
                break
            lock.release()  # a cleaner took the lock file away between making and locking it
        staged.mkdir(mode=0o700, parents=True)
        try:
            yield staged
        finally:
            _remove_tree(staged)
            if lock is not None:
                with contextlib.suppress(OSError):
                    lock_path.unlink()
                lock.release()

    def _discard(self, path: Path) -> None:
        """Delete in two steps, so that nobody sees half of it under its name."""
        if path.is_symlink():
            path.unlink()
            return
        with self._staging() as aside, contextlib.suppress(FileNotFoundError):
            path.rename(aside / "discarded")

    def _manifest(self, digest: str) -> tuple[dict[str, tree.File], int]:
        """What was hashed, and when it was written down; empty if there is no such list or it is not this artifact's.

        The list is believed only as far as it adds up to the digest. Its times are believed only if nobody else could
        have written them.
        """
        path = self._manifest_path(digest)
        value = _read_json(path)
        if value is None:
            return {}, 0
        try:
            files = {str(name): tree.File(*entry) for name, entry in value["files"].items()}
            if value["format"] != record.FORMAT or tree.digest_of({name: file.sha256 for name, file in files.items()}) != digest:
                return {}, 0
            found = os.lstat(path)
        except (KeyError, TypeError, ValueError, AttributeError, OSError):
            return {}, 0
        return files, found.st_mtime_ns if tree.CTIME_PROVES and _only_ours(found) and _only_ours(os.lstat(path.parent)) else 0

    def _write_manifest(self, digest: str, files: Mapping[str, str]) -> None:
        root = self.cache / "artifacts" / digest
        lines: dict[str, list[str | int]] = {}
        for path, content in files.items():
            found = os.lstat(root / path)
            lines[path] = [content, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        self._write_json(self._manifest_path(digest), {"format": record.FORMAT, "files": lines})

    def _write_json(self, path: Path, value: object) -> None:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(value, file, ensure_ascii=True, separators=(",", ":"))
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)  # whatever the umask: see `_only_ours`
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def _fail(self, e: OSError, asked: str) -> NoReturn:
        if isinstance(e, filelock.Timeout):
            raise StoreError(f"another process has held {e.lock_file} for {_LOCK_SECONDS:.0f} s", asked=asked, todo=_WAIT) from e
        if isinstance(e, ConnectionError | TimeoutError):
            raise Unreachable(f"the connection failed: {e}", asked=asked) from e
        if e.errno in _NO_SPACE:
            raise StoreError(
                f"no space left for {self.cache}", asked=asked, todo="Free some space, or choose another cache."
            ) from e
        if e.errno in _NO_WRITE:
            raise StoreError(f"{e.filename or self.cache} cannot be written: {e.strerror}", asked=asked, todo=_WRITABLE) from e
        raise StoreError(f"the cache {self.cache} failed: {e}", asked=asked) from e


_AGAIN = "Find out who changed it; `kernelswap verify` lists every such file. Once it is removed it can be fetched again."
_WAIT = "Wait for it, or end it if it hangs."
_WRITABLE = "Fetch it on a machine that can write there, or choose another cache."


# -- verifying --------------------------------------------------------------------------------------------------------


def _precheck(verifiers: Sequence[Verifier], candidate: Candidate, metadata: Metadata) -> None:
    problems, silent = list[Refused](), None
    for verifier in verifiers:
        precheck = getattr(verifier, "precheck", None)
        if precheck is not None:
            try:
                precheck(candidate, metadata)
            except Refused as e:
                problems.append(e)
            except Unreachable as e:
                silent = silent or e
    _raise(problems, candidate)
    if silent is not None:  # a refusal does not change when the network is back
        raise silent


def _verify(verifiers: Sequence[Verifier], candidate: Candidate, metadata: Metadata, root: Path) -> tuple[Evidence, ...]:
    evidence, problems, silent = list[Evidence](), list[Refused](), None
    for verifier in verifiers:
        try:
            evidence.append(verifier.check(candidate, metadata, root))
        except Refused as e:  # noqa: PERF203  # a handful of verifiers, each heard
            problems.append(e)
        except Unreachable as e:
            silent = silent or e
    _raise(problems, candidate)
    if silent is not None:
        raise silent
    return tuple(evidence)


def _raise(problems: Sequence[Refused], candidate: Candidate) -> None:
    if problems:
        todo = next((e.todo for e in problems if e.todo is not None), None)
        found = "\n".join(e.found for e in problems)
        raise Refused(found, asked=f"{candidate.requirement} ({candidate.variant})", todo=todo) from problems[0]


def _merge(old: tuple[Evidence, ...], new: tuple[Evidence, ...]) -> tuple[Evidence, ...]:
    """What was seen now stands instead of what the same verifier saw before."""
    said = {e.verifier for e in new}
    return (*(e for e in old if e.verifier not in said), *new)


def _hash_rest(root: Path, paths: Sequence[str], files: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    files, problems = dict(files), []
    for path in paths:
        try:
            files[path] = files.get(path) or tree.sha256(root / path)
        except OSError as e:  # noqa: PERF203  # each unreadable file is named
            problems.append(f"{path!a} cannot be read: {e.strerror}")
    return files, problems


def _differences(files: Mapping[str, str], manifest: Mapping[str, tree.File], found: Mapping[str, object]) -> Iterator[str]:
    for path, file in manifest.items():
        if path not in found:
            yield f"{path!a} is missing"
        elif path in files and files[path] != file.sha256:
            yield f"{path!a} differs from what was verified"
    if manifest:
        yield from (f"{path!a} was added" for path in files if path not in manifest)


def _identity(artifact: Artifact) -> tuple[str, str]:
    return record.key(artifact.candidate), artifact.digest


def _intact(root: Path, digest: str) -> bool:
    try:
        return not root.is_symlink() and tree.digest(root) == digest
    except OSError:
        return False


# -- the file system --------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any] | None:
    """`None` for anything that is not a JSON object: these files are a convenience, and are made again."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return cast(dict[str, Any], value) if isinstance(value, dict) else None


def _acquire(path: Path, seconds: float) -> filelock.BaseFileLock | None:
    """Hold the lock, or `None` where this file system knows no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, timeout=seconds)
    try:
        lock.acquire()
    except NotImplementedError:
        return None
    except OSError as e:
        if e.errno in _NO_LOCKS:
            return None
        raise
    return lock


def _seal(root: Path) -> None:
    """Read-only files, on disk before they get their name. Directories stay writable, so that `rm -r` works."""
    files = [root / path for path, found in tree.walk(root) if stat.S_ISREG(found.st_mode)]
    with ThreadPoolExecutor(min(8, len(files) or 1)) as pool:  # a file system commits many files in the time of one
        for _ in pool.map(_to_disk, files):
            pass


def _to_disk(path: Path) -> None:
    path.chmod(0o444)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        if os.name != "nt":  # there, only what is open for writing can be flushed
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _states(root: Path) -> dict[str, tuple[int, int, int, int]]:
    return {path: (f.st_ino, f.st_size, f.st_mtime_ns, f.st_ctime_ns) for path, f in tree.walk(root)}


def _only_ours(found: os.stat_result) -> bool:
    owners = {0, os.getuid()} if sys.platform != "win32" else {found.st_uid}
    return found.st_uid in owners and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _listed(root: Path, suffix: str = "") -> list[Path]:
    try:
        return sorted(
            path for path in root.iterdir() if path.name.endswith(suffix) and not (suffix and path.name.startswith("."))
        )
    except OSError:
        return []


def _mtime(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return time.time()


def _remove_tree(root: Path) -> None:
    if os.name == "nt":  # there, a read-only file cannot be deleted
        with contextlib.suppress(OSError):
            for path, _ in tree.walk(root):
                (root / path).chmod(0o600)
    shutil.rmtree(root, ignore_errors=True)
    with contextlib.suppress(OSError):
        root.unlink()  # it was a file, or a link
