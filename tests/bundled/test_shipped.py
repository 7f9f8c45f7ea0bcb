"""Builds that ship in the wheel say of themselves what is so."""

from pathlib import Path

import pytest

from kernelswap import metadata

ROOT = Path(__file__).parents[2] / "src" / "kernelswap" / "bundled"
BUILDS = sorted(ROOT.glob("*/build/*"))


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: f"{b.parent.parent.name}/{b.name}")
def test_digests_are_those_of_the_files(build):
    said = metadata.parse((build / "metadata.json").read_bytes())
    assert said.digest is not None
    assert metadata.compare(said.digest, build) == [], "run tools/bundled_metadata.py"


def test_there_are_builds_to_look_at():
    assert BUILDS


@pytest.mark.parametrize("name", ["_launch.py", "tuning.py"])
def test_what_each_repository_has_for_itself_is_the_same_in_all(name):
    """A kernel repository imports nothing outside itself; what is mended in one is mended in all."""
    copies = list(ROOT.glob(f"*/build/*/{name}"))
    assert len(copies) == 3
    assert len({path.read_text() for path in copies}) == 1
