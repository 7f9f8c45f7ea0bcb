import importlib
import itertools
import json
import pathlib
import random
import sys
import types

import pytest

from kernelswap import resolve as resolving
from kernelswap import spec
from kernelswap.errors import BadMetadata, NotCached, Tampered, Unreachable
from kernelswap.resolve import missing, resolve
from kernelswap.types import Candidate, Device, Machine, Metadata, Provenance

CASES = sorted((pathlib.Path(__file__).parent / "cases" / "resolve").glob("*.json"))
ASKED = spec.parse("org/norm@1")
LINUX = {"os": "linux", "cpu": "x86_64", "python": (3, 12), "torch": (2, 13), "cxx11": True}
H100 = Machine(**LINUX, backend="cuda", backend_version=(13, 0), devices=(Device("cuda", 0, "H100", (9, 0), "sm90"),))
PLAIN = Metadata("norm", "_norm_0", 1, "MIT", "cuda")


def candidate(variant, commit="c" * 40, source="hub"):
    return Candidate(ASKED, source, "org/norm", commit, variant)


def machine(fields):
    return Machine(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def metadata(**fields):
    return Metadata(**{"name": "norm", "id": "_norm_0", "version": 1, "license": "MIT", "backend": "cuda", **fields})


def order(resolution):
    return [j.candidate.variant for j in resolution.judged if j.rejected is None]


@pytest.mark.parametrize("case", CASES, ids=[c.stem for c in CASES])
def test_the_case_resolves_as_written(case):
    wanted = json.loads(case.read_text())
    found = resolve(ASKED, map(candidate, wanted["available"]), machine(wanted["machine"]), lambda _: PLAIN)
    assert order(found) == wanted["order"]
    assert {j.candidate.variant: j.rejected for j in found.judged if j.rejected} == wanted["rejected"]
    assert (found.chosen.variant if found.chosen else None) == next(iter(wanted["order"]), None)


def test_every_worked_example_is_there():
    assert len(CASES) >= 26


@pytest.mark.parametrize("case", CASES, ids=[c.stem for c in CASES])
def test_the_answer_does_not_depend_on_the_order_of_the_listing(case):
    wanted = json.loads(case.read_text())
    candidates = [candidate(v) for v in wanted["available"]]
    orders = itertools.permutations(candidates)
    if len(candidates) > 5:
        rng = random.Random(0)
        orders = (rng.sample(candidates, len(candidates)) for _ in range(100))
    answers = {resolve(ASKED, some, machine(wanted["machine"]), lambda _: PLAIN) for some in orders}
    assert len(answers) == 1


def test_no_tie_is_left_between_equal_builds():
    twins = [candidate("torch-cuda", commit) for commit in ("b" * 40, "a" * 40)] + [candidate("torch-cuda", "a" * 40, "dir")]
    for some in itertools.permutations(twins):
        found = resolve(ASKED, some, H100, lambda _: PLAIN)
        assert [(j.candidate.source, j.candidate.commit[0]) for j in found.judged] == [("dir", "a"), ("hub", "a"), ("hub", "b")]


# -- metadata -----------------------------------------------------------------------------------------------------

BEST, SECOND, LAST = (candidate(v) for v in ("torch213-cu130-x86_64-linux", "torch-cuda", "torch-universal"))
OTHER = candidate("torch212-cu130-x86_64-linux")


def with_metadata(by_variant, **more):
    """Resolve BEST, SECOND, LAST and OTHER; what is not in `by_variant` is plain. Returns the resolution and what was read."""
    was_read = []

    def read(c):
        was_read.append(c.variant)
        found = by_variant.get(c.variant, PLAIN)
        if isinstance(found, Exception):
            raise found
        return found

    return resolve(ASKED, (LAST, OTHER, BEST, SECOND), H100, read, **more), was_read


def test_metadata_is_read_until_one_build_passes_and_no_further():
    found, was_read = with_metadata({})
    assert was_read == [BEST.variant]
    assert (found.chosen, found.metadata) == (BEST, PLAIN)
    assert order(found) == [BEST.variant, SECOND.variant, LAST.variant]
    assert found.judged[-1].rejected == "built for torch 2.12, this is 2.13"


REASONS = [
    (metadata(archs=("10.0",)), "its code is for 10.0; cuda:0 (H100) is 9.0"),
    (metadata(minver=(0, 19, 0)), "needs a loader of the generation 0.19.0, this one is of 0.18.2"),
    (
        metadata(python_depends=("no-such",)),
        "needs the Python package 'no-such', which is on no list for cuda",
    ),
    (
        BadMetadata("id: missing\nversion: missing", asked="metadata.json of org/norm"),
        "its metadata.json is wrong: id: missing; version: missing",
    ),
    (NotCached("torch-cuda was never fetched"), "its metadata.json is not here: torch-cuda was never fetched"),
]


@pytest.mark.parametrize(("of_best", "reason"), REASONS, ids=["arch", "minver", "python", "bad", "offline"])
def test_a_build_that_does_not_pass_gives_way_to_the_next(of_best, reason):
    found, was_read = with_metadata({BEST.variant: of_best})
    assert was_read == [BEST.variant, SECOND.variant]
    assert found.chosen == SECOND
    assert found.metadata == PLAIN
    assert [j.rejected for j in found.judged] == [None, None, reason, "built for torch 2.12, this is 2.13"]


def test_when_none_passes_every_reason_is_kept_and_nothing_raises():
    found, was_read = with_metadata(
        dict(zip((BEST.variant, SECOND.variant, LAST.variant), [r[0] for r in REASONS], strict=False))
    )
    assert found.chosen is None
    assert found.metadata is None
    assert len(was_read) == 3
    assert [j.rejected for j in found.judged[:3]] == [r[1] for r in REASONS[:3]]


@pytest.mark.parametrize("error", [Unreachable("no route"), Tampered("bytes differ")])
def test_what_says_nothing_about_the_build_is_raised(error):
    with pytest.raises(type(error)):
        with_metadata({BEST.variant: error})


def test_the_device_at_hand_decides_where_one_is_named():
    two = Machine(**LINUX, backend="cuda", backend_version=(13, 0), devices=(*H100.devices, Device("cuda", 1, "B200", (10, 0))))
    hopper = metadata(archs=("9.0",))
    assert resolve(ASKED, [BEST], two, lambda _: hopper, device="cuda:0").chosen == BEST
    assert resolve(ASKED, [BEST], two, lambda _: hopper, device="cuda:1").chosen is None
    assert resolve(ASKED, [BEST], two, lambda _: hopper).chosen is None


def test_the_oldest_loader_that_a_build_names_may_be_ours():
    assert resolve(ASKED, [BEST], H100, lambda _: metadata(minver=resolving.LOADER)).chosen == BEST


def test_where_there_are_no_branches_the_version_is_that_of_the_metadata():
    here = candidate("torch-cuda", source="dir")
    found = resolve(ASKED, [here], H100, lambda _: metadata(version=2))
    assert found.judged[0].rejected == "is version 2, asked for 1"
    assert resolve(ASKED, [BEST], H100, lambda _: metadata(version=2)).chosen == BEST  # on a branch, the branch says it
    assert resolve(spec.parse("/x"), [here], H100, lambda _: metadata(version=2)).chosen == here


def test_notes_about_the_chosen_build_follow_those_given():
    odd = metadata(synthesised=("id", "name"), provenance=Provenance("1", dirty=True))
    found = resolve(ASKED, [BEST], H100, lambda _: odd, notes=["followed a redirect"])
    assert found.notes == (
        "followed a redirect",
        "its metadata.json lacks id, name (an older era); made up",
        "was built from sources with uncommitted changes",
    )
    clean = metadata(provenance=Provenance("1", dirty=False))
    assert resolve(ASKED, [BEST], H100, lambda _: clean).notes == ()
    assert resolve(ASKED, [], H100, lambda _: clean).judged == ()


# -- Python packages ----------------------------------------------------------------------------------------------


def test_the_caller_may_judge_python_packages():
    found, _ = with_metadata({}, depends=lambda m: "not on this planet")
    assert {j.rejected for j in found.judged[:3]} == {"not on this planet"}


def test_a_package_counts_as_installed_when_its_module_can_be_found(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("einops", "helion", "tvm_ffi", "cutlass", "nki"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    wants = metadata(python_depends=("einops", "tvm-ffi"))
    assert missing(wants) == "needs the Python package einops, which is not installed"
    (tmp_path / "einops.py").write_text("raise RuntimeError('imported')")
    importlib.invalidate_caches()
    assert missing(wants) == "needs the Python package apache-tvm-ffi, which is not installed"
    (tmp_path / "tvm_ffi.py").touch()
    importlib.invalidate_caches()
    assert missing(wants) is None
    assert "einops" not in sys.modules


def test_a_module_without_a_spec_is_there(monkeypatch):
    stray = types.ModuleType("helion")
    stray.__spec__ = None
    monkeypatch.setitem(sys.modules, "helion", stray)
    assert missing(metadata(python_depends=("helion",))) is None


def test_the_list_is_that_of_the_process():
    cutlass = metadata(python_depends=("nvidia-cutlass-dsl",))
    assert missing(cutlass, "cpu") == "needs the Python package 'nvidia-cutlass-dsl', which is on no list for cpu"
    assert missing(cutlass, "cuda") in (None, "needs the Python package nvidia-cutlass-dsl, which is not installed")
    assert missing(metadata(python_depends=("onednn",), backend="xpu")) is None  # nothing to look for
