"""Hash again and compare, import nothing: the cache, what a lock pins, what a source has now, what is in a bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import lock as locks
from . import tree
from .errors import KernelSwapError, Refused, StoreError, Tampered
from .lock import Lock, LockedBuild
from .provider import Provider
from .sources.bundle_file import COMPILED, BundleSource
from .store import Store
from .types import Candidate, Requirement, Verifier
from .verifiers.contents import ContentsVerifier
from .verifiers.digest import DigestVerifier


@dataclass(frozen=True, slots=True)
class Seen:
    """One build."""

    name: str
    variant: str
    wrong: str | None = None
    """What is wrong with it, a line for each problem; None: intact."""
    digest: str = ""
    path: str = ""
    here: bool = True
    """False: there is nothing to compare."""


def cache(store: Store) -> Iterator[Seen]:
    """Every artifact in the store, also those that no record names."""
    known = {a.digest: a.candidate for a in store.entries()}
    for digest, wrong in sorted(store.verify_all().items()):
        found = known.get(digest)
        path = str(store.cache / "artifacts" / digest)
        yield Seen(found.name if found else "", found.variant if found else "", wrong, digest, path)


def locked(store: Store, lock: Lock) -> Iterator[Seen]:
    """Every entry of a lock: each of its builds that is in the store, compared with what the lock pins."""
    entries = store.entries()
    for entry in lock.entries:
        at = [a for a in entries if entry.name in {a.candidate.name, a.candidate.requirement.name}]
        here = [a for a in at if a.candidate.commit == entry.commit]
        if not here:
            others = sorted({a.candidate.commit[:12] for a in at})
            more = f", but {', '.join(others)}" if others else ""
            yield Seen(entry.asked, "", f"the lock has it at {entry.commit[:12]}, which is not here{more}", here=False)
        for artifact in here:
            build, found = entry.build(artifact.candidate.variant), artifact.candidate
            try:
                files = dict(store.reverify(artifact))
                wrong = _unlike(build, files) if build is not None else None
            except (Tampered, StoreError) as e:
                wrong = e.found
            if build is None and entry.builds:
                wrong = f"the lock has no build {found.variant}"
            yield Seen(entry.asked, found.variant, wrong, artifact.digest, str(artifact.path))


def published(provider: Provider, requirement: Requirement) -> Iterator[Seen]:
    """Every build that a source has now, fetched, held against all verifiers, and not kept.

    Raises:
        UnknownKernel, Unreachable, NotCached: from the source.
    """
    source = provider.source(requirement)
    for candidate in source.find(requirement)[0]:
        wrong: list[str] = []
        digest = ""
        with tempfile.TemporaryDirectory() as folder:
            try:
                metadata = provider.metadata(candidate)
                source.fetch(candidate, Path(folder))
                verifiers: list[Verifier] = [ContentsVerifier(), DigestVerifier(), *provider.verifiers]
                for verifier in verifiers:
                    try:
                        verifier.check(candidate, metadata, Path(folder))
                    except Refused as e:
                        wrong += e.found.splitlines()
                    if wrong and isinstance(verifier, ContentsVerifier):
                        break  # links and bombs must not be opened by anything else
                else:
                    digest = tree.digest(Path(folder))
            except KernelSwapError as e:
                if e.fault == "network":
                    raise
                wrong += e.found.splitlines()
        yield Seen(candidate.name, candidate.variant, "\n".join(wrong) or None, digest)


def bundled(source: BundleSource) -> Iterator[Seen]:
    """Every kernel in a bundle, compared with its listing and with the lock in it.

    Raises:
        BadMetadata: it is no bundle.
    """
    lock = locks.parse(source.lock_text, what="the lock in the bundle")
    for kernel in source.about.kernels:
        name, commit, variant = str(kernel["name"]), str(kernel["commit"]), str(kernel["variant"])
        entry = next((e for e in lock.entries if e.asked == kernel["spec"] and e.commit == commit), None)
        build = entry.build(variant) if entry is not None else None
        at = name if "/" in name else f"{COMPILED}/{name}"
        with tempfile.TemporaryDirectory() as folder:
            try:
                source.fetch(Candidate(Requirement(at), source.key, at, commit, variant), Path(folder))
                files = tree.hashes(Path(folder))
                wrong = _unlike(build, files) if build is not None else "the lock in the bundle does not name it"
                if wrong is None and tree.digest_of(files) != kernel["digest"]:
                    wrong = f"bundle.json says {kernel['digest']}"
            except KernelSwapError as e:
                files, wrong = {}, e.found
        yield Seen(str(kernel["spec"]), variant, wrong, tree.digest_of(files) if files else "")


def _unlike(build: LockedBuild, files: dict[str, str]) -> str | None:
    """How `files` differ from what a lock pins."""
    listed = dict(build.files)
    wrong = [f"{p!a} is missing" for p in sorted(listed.keys() - files.keys())]
    wrong += [f"{p!a} differs from the lock" for p in sorted(listed.keys() & files.keys()) if listed[p] != files[p]]
    wrong += [f"{p!a} is not in the lock" for p in sorted(files.keys() - listed.keys()) if listed]
    if not wrong and build.tree is not None and tree.digest_of(files) != build.tree:
        wrong.append(f"the lock states the tree {build.tree}, this is {tree.digest_of(files)}")
    return "\n".join(wrong) or None
