import pytest

from kernelswap.errors import BadMetadata
from kernelswap.sources.dependencies import MAX_DEPTH, requirement_of, tree
from kernelswap.types import Candidate, Dependency, Judged, Machine, Metadata, Requirement, Resolution

MACHINE = Machine("linux", "x86_64")


class World:
    """`World({"a@1": ["b@1"]})`: what needs what."""

    def __init__(self, needs):
        self.needs, self.asked = needs, []

    def find(self, requirement):
        self.asked.append(str(requirement))
        if str(requirement) not in self.needs:
            return Resolution(requirement, MACHINE, ())
        depends = []
        for text in self.needs[str(requirement)]:
            name, _, at = text.partition("@")
            depends.append(Dependency(name, version=int(at)) if at.isdigit() else Dependency(name, revision=at))
        candidate = Candidate(requirement, "hub", requirement.name, f"commit of {requirement}", "torch-cpu")
        metadata = Metadata("x", "x", 1, "MIT", "cpu", kernel_depends=tuple(depends))
        return Resolution(requirement, MACHINE, (Judged(candidate, None),), metadata)

    def order(self, name, version=1):
        root = self.find(Requirement(name, version=version))
        return [str(r.requirement) for r in tree(root, self.find)]


def test_children_come_first():
    assert World({"o/a@1": ["o/b@1", "o/c@2"], "o/b@1": ["o/d@1"], "o/c@2": [], "o/d@1": []}).order("o/a") == [
        "o/d@1",
        "o/b@1",
        "o/c@2",
        "o/a@1",
    ]


def test_a_diamond_is_found_once():
    world = World({"o/a@1": ["o/b@1", "o/c@1"], "o/b@1": ["o/d@1"], "o/c@1": ["o/d@1"], "o/d@1": []})
    assert world.order("o/a") == ["o/d@1", "o/b@1", "o/c@1", "o/a@1"]
    assert world.asked.count("o/d@1") == 1


def test_two_versions_of_one_kernel_are_two_kernels():
    assert World({"o/a@1": ["o/b@1", "o/b@2"], "o/b@1": [], "o/b@2": []}).order("o/a") == ["o/b@1", "o/b@2", "o/a@1"]


def test_another_version_of_oneself_is_no_circle():
    assert World({"o/a@2": ["o/a@1"], "o/a@1": []}).order("o/a", 2) == ["o/a@1", "o/a@2"]


def test_a_circle_is_named_with_the_whole_path():
    with pytest.raises(BadMetadata, match="in a circle: o/b@1 -> o/c@main -> o/b@1"):
        World({"o/a@1": ["o/b@1"], "o/b@1": ["o/c@main"], "o/c@main": ["o/b@1"]}).order("o/a")


def test_a_kernel_that_needs_itself_is_a_circle():
    with pytest.raises(BadMetadata, match="o/a@1 -> o/a@1"):
        World({"o/a@1": ["o/a@1"]}).order("o/a")


def test_a_chain_of_ever_new_versions_ends():
    with pytest.raises(BadMetadata, match=f"more than {MAX_DEPTH} kernels deep"):
        World({f"o/a@{n}": [f"o/a@{n + 1}"] for n in range(1, 1000)}).order("o/a")


def test_what_no_build_fits_is_a_node_without_a_choice():
    world = World({"o/a@1": ["o/b@1"]})
    node = tree(world.find(Requirement("o/a", version=1)), world.find)
    assert node.depends[0].resolution.chosen is None


def test_a_bundled_kernel_may_be_needed():
    assert requirement_of(Dependency("kernelswap/layers", version=1)) == Requirement("layers", "bundled", version=1)
