"""`installed://`: kernels of packages that are installed here already. Nothing is ever fetched or installed.

A package is no kernel repository. For those that we know, `bundled/installed/<distribution>/` has layers that call it; they are
a build only where the distribution is installed. Its version and the digest of its list of files are part of the build, so that
a verdict about one version says nothing about the next. From there on it is a kernel like any other: verified, proved, measured.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import tree
from ..errors import UnknownKernel
from ..types import Candidate, Requirement
from .files import METADATA, check_copy

VARIANT = "torch-universal"
PACKAGE = "_package.py"


@dataclass(frozen=True, slots=True)
class InstalledSource:
    """`<root>/<distribution>/*.py`, where that distribution is installed. `path`: where to look for it; None: `sys.path`."""

    root: Path
    path: tuple[str, ...] | None = None
    key: str = "installed"

    def names(self) -> tuple[str, ...]:
        """Every distribution that we know, installed or not."""
        return tuple(sorted(p.name for p in self.root.iterdir() if (p / "layers.py").is_file())) if self.root.is_dir() else ()

    def find(self, requirement: Requirement) -> tuple[Sequence[Candidate], Sequence[str]]:
        """The one build.

        Raises:
            UnknownKernel: we do not know the distribution, it is not installed, or another version of it was asked for.
        """
        name, asked = requirement.name, f"looking for {requirement}"
        if name not in self.names():
            near = difflib.get_close_matches(name, self.names(), n=1)
            raise UnknownKernel(
                f"there are layers for {', '.join(self.names())}",
                asked=asked,
                todo=f"did you mean installed://{near[0]}?" if near else None,
            )
        if requirement.version is not None or requirement.constraints is not None:
            raise UnknownKernel("what is installed has the version that it has", asked=asked, todo=f"ask for installed://{name}")
        files = self._files(name)
        if files is None:
            raise UnknownKernel(
                f"{name} is not installed here", asked=asked, todo="nothing is installed by itself; the original serves"
            )
        commit = f"local-{tree.digest_of({path: hashlib.sha256(data).hexdigest() for path, data in files.items()})}"
        if requirement.revision not in {None, commit}:
            raise UnknownKernel(f"{name} is at {commit}", asked=asked)
        return (Candidate(requirement, self.key, name, commit, VARIANT),), ()

    def read(self, candidate: Candidate, name: str) -> bytes | None:
        """One file of the build, or None.

        Raises:
            UnknownKernel: the distribution is gone.
        """
        return self._there(candidate).get(name)

    def fetch(self, candidate: Candidate, into: Path) -> None:
        """Write the build.

        Raises:
            UnknownKernel: the distribution is gone, or another one than when it was found.
        """
        for path, data in self._there(candidate).items():
            (into / path).write_bytes(data)
        check_copy(into, candidate.commit, candidate.name)

    def _there(self, candidate: Candidate) -> dict[str, bytes]:
        files = self._files(candidate.name)
        if files is None:
            raise UnknownKernel(f"{candidate.name} is not installed any more", asked=f"reading {candidate.requirement}")
        return files

    def _files(self, name: str) -> dict[str, bytes] | None:
        context = metadata.DistributionFinder.Context(name=name, path=list(sys.path if self.path is None else self.path))
        found = next(iter(metadata.distributions(context=context)), None)
        if found is None:
            return None
        record = hashlib.sha256((found.read_text("RECORD") or "").encode()).hexdigest()
        files = {path.name: path.read_bytes() for path in (self.root / name).glob("*.py")}
        files[PACKAGE] = f'DISTRIBUTION, VERSION, RECORD = "{name}", "{found.version}", "{record}"\n'.encode()
        said = found.metadata.get_all("License-Expression") or found.metadata.get_all("License") or ["unknown"]
        licence = (str(said[0]).splitlines() or ["unknown"])[0][:100]
        about: dict[str, Any] = {
            "name": name,
            "id": f"_installed_{name.replace('-', '_')}_{hashlib.sha256(files[PACKAGE]).hexdigest()[:7]}",
            "version": 1,
            "license": licence,
            "python-depends": [],
            "digest": {
                "algorithm": "sha256",
                "files": {p: base64.b64encode(hashlib.sha256(data).digest()).decode() for p, data in sorted(files.items())},
            },
        }
        return {**files, METADATA: json.dumps(about, indent=1).encode()}
