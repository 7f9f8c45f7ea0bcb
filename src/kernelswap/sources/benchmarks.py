"""`benchmarks/*.py` of the repository that a build came from: scripts of its authors, which are no part of any build."""

from __future__ import annotations

from pathlib import Path

from ..errors import UnknownKernel
from ..types import Candidate, Source
from .chain import Chain
from .directory import DirectorySource
from .files import copy, listing
from .hub import HubSource
from .overrides import Overrides
from .pinned import Pinned

FOLDER = "benchmarks"


def fetch(source: Source, candidate: Candidate, into: Path) -> tuple[Path, ...]:
    """Bring everything below `benchmarks/` to `into/benchmarks`; those named `benchmark*.py`, in order.

    Of a hub, it is that of the candidate's commit, and compared with what the hub lists. No digest of a publisher covers it.

    Raises:
        UnknownKernel: the repository has none.
        Refused: links or paths that lead out of it. Also what `Source.fetch` raises.
    """
    while isinstance(source, Overrides | Pinned | Chain):
        if isinstance(source, Chain):
            source = source.of(candidate)
        elif isinstance(source, Overrides) and candidate.source == source.key:
            source = DirectorySource(source.key)
        else:
            source = source.source
    if isinstance(source, HubSource):
        source.fetch_folder(candidate, FOLDER, into)
    elif isinstance(source, DirectorySource):
        _of_directory(Path(candidate.name), into)
    found = tuple(sorted((into / FOLDER).glob("benchmark*.py")))
    if not found:
        raise UnknownKernel(
            f"it has no {FOLDER}/benchmark*.py",
            asked=f"looking for the benchmarks of {candidate.requirement}",
            todo="not every publisher writes them; `kernelswap bench` measures a kernel in a model",
        )
    return found


def _of_directory(root: Path, into: Path) -> None:
    """The folder beside the builds, whether `root` is the repository, its `build/`, or one build."""
    for at in (root, *list(root.resolve().parents)[:2]):
        if (at / FOLDER).is_dir() and (at == root or (at / "build").is_dir()):
            files = listing((at / FOLDER).resolve(), [at.resolve()])
            copy({f"{FOLDER}/{path}": file for path, file in files.items()}, into)
            return
