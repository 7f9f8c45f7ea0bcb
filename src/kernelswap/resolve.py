"""Choose a candidate. No network, no clock, no environment: same arguments, same answer.

The two callables bring the world in: `read` a build's metadata, `depends` whether Python packages are there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from . import render
from . import variant as variants
from .errors import BadMetadata, KernelSwapError, MissingDependency, NotCached, NoVariant, Unsuited
from .types import Candidate, Judged, Machine, Metadata, Requirement, Resolution

LOADER = (0, 18, 2)
"""The release of the reference loader whose formats are understood: what `kernels-minver` is held against."""

PYTHON_DEPENDS: dict[str, dict[str, tuple[str, str | None]]] = {
    "": {"einops": ("einops", "einops"), "helion": ("helion", "helion"), "tvm-ffi": ("apache-tvm-ffi", "tvm_ffi")},
    "cuda": {"nvidia-cutlass-dsl": ("nvidia-cutlass-dsl", "cutlass")},
    "neuron": {"nki": ("nki", "nki")},
    "xpu": {"onednn": ("onednn-devel", None)},
}
"""backend (`""`: any) -> name in `python-depends` -> (distribution, module to look for; None: nothing to look for)."""

_NO_LIST = "on no list for"
_WITHOUT_BRANCHES = ("dir", "bundled")


def resolve(
    requirement: Requirement,
    candidates: Iterable[Candidate],
    machine: Machine,
    read: Callable[[Candidate], Metadata],
    *,
    device: str | None = None,
    depends: Callable[[Metadata], str | None] | None = None,
    notes: Sequence[str] = (),
) -> Resolution:
    """Judge every candidate; those that fit come first, best first. Never raises for a misfit: the caller reads `chosen`.

    Metadata is read only for builds whose name fits, in order, until one passes: architectures (of `device`, or of every
    visible one), `kernels-minver`, Python packages. Those that would come after it are not read and count as fitting.
    A build whose metadata is bad, or was never fetched while offline, loses alone; any other error of `read` is raised.
    `depends` says why a build's Python packages will not do, or None; by default, `missing` for this machine's backend.
    `notes` go into the Resolution, before those about the chosen build.
    """
    depends = partial(missing, backend=machine.backend) if depends is None else depends
    fit: list[Judged] = []
    rejected: list[Judged] = []
    metadata: Metadata | None = None
    for _, candidate, by_name in sorted(_by_name(candidates, machine), key=lambda item: item[0]):
        judged = Judged(candidate, by_name, "name" if by_name is not None else "")
        if by_name is None and metadata is None:
            try:
                found = read(candidate)
            except (BadMetadata, NotCached) as e:
                judged = Judged(candidate, _bad(e), "bad" if isinstance(e, BadMetadata) else "absent")
            else:
                if (why := _misfit(found, candidate, requirement, machine, device)) is not None:
                    judged = Judged(candidate, why, "chip")
                elif (why := depends(found)) is not None:
                    judged = Judged(candidate, why, "unknown packages" if _NO_LIST in why else "packages")
                else:
                    metadata = found
        (fit if judged.rejected is None else rejected).append(judged)
    return Resolution(requirement, machine, (*fit, *rejected), metadata, (*notes, *_notes(metadata)))


def missing(metadata: Metadata, backend: str | None = None) -> str | None:
    """Why the Python packages of `metadata` will not do in this process, or `None`. Nothing is imported; versions are not compared.

    `backend` is the process's (default: the build's own): a package of another backend's list is unknown.
    """
    known = {**PYTHON_DEPENDS[""], **PYTHON_DEPENDS.get(backend or metadata.backend, {})}
    for name in metadata.python_depends:
        if name not in known:
            return f"needs the Python package {name!r}, which is {_NO_LIST} {backend or metadata.backend}"
        distribution, module = known[name]
        if module is not None and not _importable(module):
            return f"needs the Python package {distribution}, which is not installed"
    return None


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # already imported, by something that left no __spec__
        return True


def _by_name(candidates: Iterable[Candidate], machine: Machine) -> Iterable[tuple[tuple[object, ...], Candidate, str | None]]:
    """Each candidate with its place and why its name alone rules it out. Every field is in the key: no tie is left."""
    for c in candidates:
        tie = (c.variant, c.source, c.name, c.commit)
        try:
            parsed = variants.parse(c.variant)
        except BadMetadata as e:
            yield (2, (), tie), c, e.reason
            continue
        why = variants.misfit(parsed, machine)
        yield (int(why is not None), variants.rank(parsed), tie), c, why


def _misfit(
    metadata: Metadata, candidate: Candidate, requirement: Requirement, machine: Machine, device: str | None
) -> str | None:
    if metadata.minver is not None and metadata.minver > LOADER:
        return f"needs a loader of the generation {_dotted(metadata.minver)}, this one is of {_dotted(LOADER)}"
    wanted = requirement.version
    if wanted is not None and candidate.source in _WITHOUT_BRANCHES and metadata.version != wanted:
        return f"is version {metadata.version}, asked for {wanted}"
    return variants.arch_misfit(metadata.archs, machine, device)


def _bad(error: KernelSwapError) -> str:
    what = "its metadata.json is wrong" if isinstance(error, BadMetadata) else "its metadata.json is not here"
    return f"{what}: " + "; ".join(error.found.splitlines())


def _notes(metadata: Metadata | None) -> Iterable[str]:
    if metadata is None:
        return
    if metadata.synthesised:
        yield f"its metadata.json lacks {', '.join(metadata.synthesised)} (an older era); made up"
    made = metadata.provenance
    if made is not None and (made.dirty or made.builder_dirty):
        yield "was built from sources with uncommitted changes"


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def no_variant(resolution: Resolution) -> KernelSwapError:
    """Nothing fits. Where a build does by its name, the error is about what its metadata says of the best of those."""
    judged = resolution.judged
    if not judged:
        head = next(iter(resolution.notes), "has no builds")
    elif len(judged) == 1:
        head = f"its only build, {judged[0].candidate.variant}, does not fit: {judged[0].rejected}"
    else:
        head = f"none of its {len(judged)} builds fits; the nearest, {judged[0].candidate.variant}: {judged[0].rejected}"
    kind = next((_KINDS[j.because] for j in judged if j.because in _KINDS), NoVariant)
    return kind("\n".join((head, *render.resolution(resolution).splitlines()[1:])), asked=f"looking for {resolution.requirement}")


_KINDS: dict[str, type[KernelSwapError]] = {
    "chip": Unsuited,
    "packages": MissingDependency,
    "unknown packages": BadMetadata,
    "bad": BadMetadata,
}
