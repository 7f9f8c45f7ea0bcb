"""Kernels that kernels need, as a tree. Pure: how to find one is an argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .. import spec
from ..errors import BadMetadata
from ..types import Dependency, Metadata, Requirement, Resolution

MAX_DEPTH = 16  # a chain of ever new versions is no cycle and would not end


@dataclass(frozen=True, slots=True)
class Node:
    """A resolved kernel and the resolved kernels that it needs."""

    resolution: Resolution
    depends: tuple[Node, ...] = ()

    def __iter__(self) -> Iterator[Resolution]:
        """Children first, each build once: the order in which to fetch and to import."""
        seen: set[object] = set()
        for node in self.walk():
            chosen = node.resolution.chosen
            key = (chosen.source, chosen.name, chosen.commit, chosen.variant) if chosen else id(node)
            if key not in seen:
                seen.add(key)
                yield node.resolution

    def walk(self) -> Iterator[Node]:
        """Every node, children first; a kernel that two others need comes up twice."""
        for child in self.depends:
            yield from child.walk()
        yield self


def requirement_of(dependency: Dependency) -> Requirement:
    """What an entry of `kernel-depends` asks for. `kernelswap/NAME` is the bundled kernel, as in a spec."""
    bundled = dependency.name.startswith(spec.BUNDLED)
    return Requirement(
        name=dependency.name.removeprefix(spec.BUNDLED) if bundled else dependency.name,
        source="bundled" if bundled else "hub",
        version=dependency.version,
        revision=dependency.revision,
    )


def tree(resolution: Resolution, find: Callable[[Requirement], Resolution]) -> Node:
    """`resolution` with everything it needs, recursively. Two versions of one kernel are two nodes.

    `find` is asked once per requirement. A dependency that no build fits comes back as a node without a choice: the
    caller decides what that means.

    Raises:
        BadMetadata: a kernel needs itself, directly or through others; the whole path is named.
    """
    return _Walk(find).node(resolution, (_name(resolution.requirement),))


class _Walk:
    """One walk down; `known` so that a diamond is resolved once."""

    def __init__(self, find: Callable[[Requirement], Resolution]) -> None:
        self.find = find
        self.known: dict[Requirement, Node] = {}

    def node(self, resolution: Resolution, path: tuple[str, ...]) -> Node:
        metadata: Metadata | None = resolution.metadata
        if metadata is None:
            return Node(resolution)
        return Node(resolution, tuple(self.child(requirement_of(d), path) for d in metadata.kernel_depends))

    def child(self, requirement: Requirement, path: tuple[str, ...]) -> Node:
        here = _name(requirement)
        if here in path:
            circle = " -> ".join((*path[path.index(here) :], here))
            raise BadMetadata(
                f"kernels need each other in a circle: {circle}", asked=f"resolving {path[0]}", todo="tell its publisher"
            )
        if len(path) > MAX_DEPTH:
            raise BadMetadata(f"more than {MAX_DEPTH} kernels deep: {' -> '.join((*path, here))}", asked=f"resolving {path[0]}")
        if requirement not in self.known:
            self.known[requirement] = self.node(self.find(requirement), (*path, here))
        return self.known[requirement]


def _name(requirement: Requirement) -> str:
    """The spec without its layer, which does not matter for what is needed."""
    return str(
        Requirement(requirement.name, requirement.source, requirement.version, requirement.revision, requirement.constraints)
    )
