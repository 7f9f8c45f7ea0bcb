"""Hold a build against the policy: where it is from, which bytes, what kind of code, whether a lock names it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import lock as locks
from .. import policy as policies
from .. import record, tree
from ..errors import Refused, TableError
from ..lock import Lock
from ..policy import Policy, Settings
from ..types import Candidate, Evidence, Metadata

POLICIES = "kernelswap.toml", "pyproject.toml"
LOCKS = "kernelswap.lock", "kernels.lock"
"""What the files are called, the first before the second."""

_NATIVE_SUFFIXES = (
    ".so", ".dylib", ".dll", ".pyd", ".a", ".lib", ".o", ".obj", ".cubin", ".fatbin", ".ptx", ".hsaco", ".co", ".metallib", ".spv", ".wasm",
)  # fmt: skip  # one glance is enough for a list of suffixes
_NATIVE_MAGIC = (
    (b"\x7fELF", "ELF"),
    (b"MZ", "a Windows executable"),
    (b"\xcf\xfa\xed\xfe", "Mach-O"),
    (b"\xca\xfe\xba\xbe", "Mach-O"),
    (b"\xfe\xed\xfa\xcf", "Mach-O"),
    (b"!<arch>", "a static library"),
    (b"MTLB", "a Metal library"),
    (b"\x50\xed\x55\xba", "a CUDA fat binary"),
    (b"\x00asm", "WebAssembly"),
)


def read(project: Path | None, user: Path | None) -> Policy:
    """The policy of a project directory (`kernelswap.toml`, else `pyproject.toml`) over that of the user's directory.

    Raises:
        TableError: a file is wrong or cannot be read; nothing is loaded under half a policy.
    """
    return policies.combine(_settings(project, POLICIES), _settings(user, POLICIES[:1]))


def project(start: Path) -> Path:
    """The directory of the project that `start` is in: the nearest one upwards with a policy; `start` where there is none.

    The way up ends at the root of a repository (`.git`), at the home directory and at the root of the file system: a
    policy counts wherever in its project a program is started, and never outside of it.

    Raises:
        TableError: as `read`; also where a policy above `start` belongs to neither this user nor root.
    """
    for directory in _upwards(start):
        found = _settings(directory, POLICIES)
        if found is not None:
            if directory != start and _foreign(Path(found.where)):
                raise TableError(f"{found.where} belongs to another user", todo=f"Have it removed, or work in {directory}.")
            return directory
    return start


def read_lock(start: Path) -> Lock | None:
    """The nearest lock from `start` upwards within its project (see `project`), or `None`.

    Raises:
        BadMetadata: it does not parse; all problems at once.
        TableError: it cannot be read, or above `start` belongs to another user.
    """
    for directory in _upwards(start):
        for name in LOCKS:
            path = directory / name
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            except OSError as e:
                raise TableError(f"{path} cannot be read: {e}") from e
            if directory != start and _foreign(path):
                raise TableError(f"{path} belongs to another user", todo=f"Have it removed, or work in {directory}.")
            return locks.parse(data, what=str(path))
    return None


def _upwards(start: Path) -> Iterator[Path]:
    home = Path(os.path.expanduser("~"))  # noqa: PTH111  # `Path.home` raises for a user without one
    for directory in (start, *start.parents):
        yield directory
        if directory == home or (directory / ".git").exists():
            return


def _foreign(path: Path) -> bool:
    try:
        return sys.platform != "win32" and path.stat().st_uid not in {0, os.getuid()}
    except OSError:
        return False  # not there, or not readable, which reading it says


def _settings(directory: Path | None, names: tuple[str, ...]) -> Settings | None:
    for name in names if directory is not None else ():
        assert directory is not None
        try:
            text = (directory / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as e:
            raise TableError(f"{directory / name} cannot be read: {e}") from e
        found = policies.parse(text, where=str(directory / name))
        if found.values or name == "kernelswap.toml":
            return found
    return None


@dataclass(frozen=True, slots=True)
class PolicyVerifier:
    """Everything that a policy says but for publishers and signatures, which have verifiers of their own."""

    policy: Policy = policies.DEFAULT
    lock: Lock | None = None

    def precheck(self, candidate: Candidate, metadata: Metadata) -> None:
        """What can be said before anything is fetched.

        Raises:
            Refused: with every problem, one a line.
        """
        _raise(list(self._by_name(candidate, metadata)))

    def check(self, candidate: Candidate, metadata: Metadata, staged: Path) -> Evidence:
        """Raises:
        Refused: with every problem, one a line.
        """
        _raise([*self._by_name(candidate, metadata), *self._by_bytes(candidate, staged)])
        return Evidence(
            "policy", f"allowed by {', '.join(dict.fromkeys(f for _, f in self.policy.origins)) or 'the default policy'}"
        )

    def _by_name(self, candidate: Candidate, metadata: Metadata) -> Iterator[str]:
        policy = self.policy
        if candidate.source not in policy.sources:
            yield f"the source {candidate.source} is not among those of {policy.origin('sources')}: {', '.join(policy.sources)}"
        if candidate.source == "bundled":
            return  # came with this package, whose bytes are as trusted as the code that reads this
        if policy.require_digest and metadata.digest is None:
            yield f"it publishes no digests, and {policy.origin('require_digest')} requires them"
        if policy.locked_only:
            entry = self.lock.find(candidate.requirement.name, candidate.requirement) if self.lock is not None else None
            if entry is None:
                yield f"no lock names it, and {policy.origin('locked_only')} allows only what is locked"
            elif entry.commit != candidate.commit:
                yield f"the lock has it at {entry.commit[:12]}, this is {candidate.commit[:12]}"

    def _by_bytes(self, candidate: Candidate, staged: Path) -> Iterator[str]:
        policy = self.policy
        if candidate.source == "bundled":
            return
        if policy.digests and _digest(staged) not in policy.digests:
            yield f"its digest {_digest(staged)} is not among those of {policy.origin('digests')}"
        entry = self.lock.find(candidate.requirement.name, candidate.requirement) if self.lock is not None else None
        build = entry.build(candidate.variant) if entry is not None and entry.commit == candidate.commit else None
        if build is not None and build.tree and build.tree != _digest(staged):
            yield f"the lock states the tree {build.tree}, this is {_digest(staged)}"
        if policy.no_native_code:
            for path, what in _native(staged):
                yield f"{path!a} is {what}, and {policy.origin('no_native_code')} allows no native code"


def _raise(problems: list[str]) -> None:
    if problems:
        raise Refused("\n".join(problems))


def _digest(staged: Path) -> str:
    """Of an artifact in the store its name, which is proven again before import."""
    in_store = staged.parent.name == "artifacts" and record.is_digest(staged.name)
    return staged.name if in_store else tree.digest(staged)


def _native(staged: Path) -> Iterator[tuple[str, str]]:
    """By name and by first bytes, whatever the name says. Source that compiles itself when it runs is not seen by this."""
    for path in sorted(path for path, _ in tree.walk(staged)):
        with (staged / path).open("rb") as file:
            head = file.read(8)
        magic = next((word for prefix, word in _NATIVE_MAGIC if head.startswith(prefix)), None)
        if magic is not None or path.lower().endswith(_NATIVE_SUFFIXES):
            yield path, magic or "native code by its name"
