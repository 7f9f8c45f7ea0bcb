import contextlib
import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelswap import spec
from kernelswap.errors import BadMetadata
from kernelswap.lock import Lock, Locked, LockedBuild, diff, format_of, parse

C1, C2 = "1" * 40, "2" * 40
H1, H2 = "a" * 64, "b" * 64

CURRENT = [
    {"dependency": {"repo-id": "org/norm", "version": 1}, "lock": {"commit": C1}},
    {"dependency": {"repo-id": "org/rope", "revision": "refs/pr/1"}, "lock": {"commit": C2, "hash": "sha256-" + "A" * 43 + "="}},
]
OLD = [
    {"repo_id": "org/norm", "sha": C1, "variants": {"torch-cuda": {"hash": f"sha256-{H1}", "hash_type": "git_lfs_concat"}}},
    {"repo_id": "org/rope", "sha": C2, "variants": {}},
]
OURS = {
    "format_version": 1,
    "entries": [
        {
            "name": "layers",
            "source": "bundled",
            "commit": "sha256:abc",
            "builds": {"torch-cpu": {"tree": H1, "files": {"__init__.py": H1, "layers/norm.py": H2}}},
        },
        {"name": "org/norm", "source": "hub", "version": 1, "commit": C1, "builds": {}},
        {"name": "org/norm", "source": "hub", "version": 2, "commit": C2, "builds": {"torch-cuda": {"tree": H2}}},
        {"name": "org/old", "source": "hub", "commit": C2, "builds": {"torch-cuda": {"git_lfs_concat": H2}}},
        {"name": "org/rope", "source": "hub", "constraints": ">=2.0,<3.0", "commit": C2, "builds": {}},
        {"name": "org/silu", "source": "hub", "revision": "main", "commit": C2, "builds": {}},
    ],
}


def read(value):
    return parse(json.dumps(value))


def problems(value):
    with pytest.raises(BadMetadata) as e:
        read(value)
    return e.value.found.splitlines()


def test_the_current_format():
    assert read(CURRENT) == Lock(
        (Locked("org/norm", C1, version=1), Locked("org/rope", C2, revision="refs/pr/1")),
    )


def test_the_old_format():
    assert read(OLD) == Lock(
        (Locked("org/norm", C1, builds=(LockedBuild("torch-cuda", git_lfs_concat=H1),)), Locked("org/rope", C2)),
    )


def test_our_format():
    lock = read(OURS)
    assert lock.entries[0] == Locked(
        "layers",
        "sha256:abc",
        "bundled",
        builds=(LockedBuild("torch-cpu", H1, (("__init__.py", H1), ("layers/norm.py", H2))),),
    )
    assert [e.asked for e in lock.entries] == [
        "bundled://layers",
        "org/norm@1",
        "org/norm@2",
        "org/old",
        "org/rope@>=2.0,<3.0",
        "org/silu@main",
    ]
    assert lock.entries[2].build("torch-cuda") == LockedBuild("torch-cuda", H2)
    assert lock.entries[2].build("torch-cpu") is None


def test_which_format_it_is():
    assert format_of("[]") == "kernels.lock"
    assert format_of(json.dumps(CURRENT)) == "kernels.lock"
    assert format_of(json.dumps(OLD)) == "kernels.lock (old)"
    assert format_of(json.dumps(OURS).encode()) == "kernelswap.lock"
    with pytest.raises(BadMetadata, match="expected a list or an object, found a string"):
        format_of('"x"')


def test_our_text_is_sorted_and_reads_back():
    lock = read(OURS)
    text = lock.dumps()
    assert parse(text) == lock
    assert Lock(lock.entries[::-1]).dumps() == text
    assert text.endswith("}\n")
    assert list(json.loads(text)["entries"][0]["builds"]["torch-cpu"]) == ["tree", "files"]
    assert parse(Lock().dumps()) == Lock()


def test_other_loaders_read_what_we_write_for_them():
    written = json.loads(read(OURS).dumps_kernels())
    assert written == [
        {"dependency": {"repo-id": "org/norm", "version": 1}, "lock": {"commit": C1}},  # the second is not expressible
        {"dependency": {"repo-id": "org/old", "revision": C2}, "lock": {"commit": C2}},
        {"dependency": {"repo-id": "org/rope", "revision": C2}, "lock": {"commit": C2}},
        {"dependency": {"repo-id": "org/silu", "revision": "main"}, "lock": {"commit": C2}},
    ]
    assert [e.name for e in read(written).entries] == sorted(e.name for e in read(written).entries)


# -- lookup -------------------------------------------------------------------------------------------------------


def test_find_without_a_requirement_gives_the_first_of_that_name():
    lock = read(OURS)
    assert lock.find("org/norm").commit == C1
    assert lock.find("org/none") is None


@pytest.mark.parametrize(
    ("asked", "version"),
    [
        ("org/norm@1", 1),
        ("org/norm@2:Layer", 2),
        ("org/norm", 1),
        ("org/norm@3", None),
        (f"org/norm@{C2}", 2),
        ("org/norm@>=2", None),
        ("dir://org/norm", None),
    ],
)
def test_find_gives_what_was_locked_for_that_requirement(asked, version):
    found = read(OURS).find("org/norm", spec.parse(asked))
    assert (found.version if found else None) == version


def test_an_old_entry_stands_for_every_version():
    lock = read(OLD)
    assert lock.find("org/norm", spec.parse("org/norm@7")).commit == C1
    assert lock.find("org/norm", spec.parse("org/norm")).commit == C1


def test_a_new_entry_replaces_the_one_for_the_same_spec():
    a = Locked("org/norm", C1, version=1, builds=(LockedBuild("torch-cuda", H1), LockedBuild("torch-cpu", H1)))
    again = Locked("org/norm", C1, version=1, builds=(LockedBuild("torch-cpu", H2),))
    moved = Locked("org/norm", C2, version=1, builds=(LockedBuild("torch-cpu", H2),))
    other = Locked("org/norm", C2, version=2)
    assert Lock((a,)).with_entry(again).entries[0].builds == (LockedBuild("torch-cuda", H1), LockedBuild("torch-cpu", H2))
    assert Lock((a,)).with_entry(moved).entries == (moved,)
    assert Lock((a,)).with_entry(other).entries == (a, other)


# -- differences --------------------------------------------------------------------------------------------------


def test_a_difference_is_said_in_words():
    files = (("a.py", H1), ("b.py", H1))
    before = Lock(
        (
            Locked("org/gone", C1, version=1),
            Locked("org/moved", C1, version=1, builds=(LockedBuild("torch-cuda", H1, files),)),
            Locked("org/same", C1, version=1, builds=(LockedBuild("torch-cuda", H1, files), LockedBuild("torch-cpu", H1))),
            Locked("org/still", C1, version=1, builds=(LockedBuild("torch-cuda", H1),)),
        )
    )
    after = Lock(
        (
            Locked("org/new", C2, constraints=">=2"),
            Locked("org/moved", C2, version=1, builds=(LockedBuild("torch-cuda", H2, (("a.py", H2), ("b.py", H1))),)),
            Locked(
                "org/same",
                C1,
                version=1,
                builds=(LockedBuild("torch-cuda", H2, (("a.py", H2), ("c.py", H2))), LockedBuild("torch-rocm", H1)),
            ),
            Locked("org/still", C1, version=1, builds=(LockedBuild("torch-cuda", H2),)),
        )
    )
    assert diff(before, after) == [
        "org/gone@1: removed, was at 111111111111",
        "org/moved@1: 111111111111 -> 222222222222",
        "org/moved@1 torch-cuda: changed a.py",
        "org/new@>=2: added at 222222222222",
        "org/same@1 torch-cpu: removed",
        "org/same@1 torch-cuda: added c.py, changed a.py, removed b.py, though the commit is the same",
        "org/same@1 torch-rocm: added",
        "org/still@1 torch-cuda: digest changed, though the commit is the same",
    ]
    assert diff(before, before) == []


# -- what is wrong ------------------------------------------------------------------------------------------------

WRONG = [
    (3, "expected a list or an object, found a number"),
    ([1], "[0]: expected an object, found a number"),
    ([{}], "[0]: 'dependency' is missing"),
    ([{"dependency": 1, "lock": {"commit": C1}}], "[0]: 'dependency' is a number, not an object"),
    (CURRENT[:1] * 2, "[1]: 'org/norm' is listed twice"),
    ([CURRENT[0] | {"x": 1}], "[0]: unknown key 'x'"),
    (
        [{"dependency": {"repo-id": "org/a", "version": 1, "revision": "x"}, "lock": {"commit": C1}}],
        "[0].dependency: exactly one of version and revision is needed",
    ),
    (
        [{"dependency": {"repo-id": "org/a"}, "lock": {"commit": C1}}],
        "[0].dependency: exactly one of version and revision is needed",
    ),
    (
        [{"dependency": {"repo-id": "a", "version": 1}, "lock": {"commit": C1}}],
        "[0].dependency: 'repo-id' has the wrong form: 'a'",
    ),
    (
        [{"dependency": {"repo-id": "a/b", "version": True}, "lock": {"commit": C1}}],
        "[0].dependency: 'version' is True, not a whole number from 0 on",
    ),
    (
        [{"dependency": {"repo-id": "a/b", "revision": 1}, "lock": {"commit": C1}}],
        "[0].dependency: 'revision' is a number, not a string",
    ),
    ([{"dependency": {"repo-id": "a/b", "version": 1}, "lock": {"commit": "v1"}}], "[0].lock: 'commit' has the wrong form: 'v1'"),
    ([{"dependency": {"repo-id": "a/b", "version": 1}, "lock": {"sha": C1}}], "[0].lock: unknown key 'sha'"),
    (
        [{"dependency": {"repo-id": "a/b", "version": 1}, "lock": {"commit": C1, "hash": "x"}}],
        "[0].lock: 'hash' has the wrong form: 'x'",
    ),
    ([{"repo_id": "org/a", "sha": C1}], "[0]: 'variants' is missing"),
    ([{"repo_id": "org/a", "sha": C1, "variants": {"../x": {}}}], "[0].variants['../x']: not a variant name"),
    (
        [{"repo_id": "org/a", "sha": C1, "variants": {"torch-cpu": {"hash": H1, "hash_type": "md5"}}}],
        "[0].variants['torch-cpu']: 'hash_type' has the wrong form: 'md5'",
    ),
    ({"format_version": 2}, "format_version: 2, this release reads 1"),
    ({"format_version": True, "entries": []}, "format_version: True, this release reads 1"),
    ({"format_version": 1}, "entries: expected a list, found null"),
    ({"format_version": 1, "entries": [], "x": 0}, "top level: unknown key 'x'"),
    ({"format_version": 1, "entries": [{}] * 2001}, "2001 entries, at most 2000 are read"),
    (
        {"format_version": 1, "entries": OURS["entries"][1:2] * 2},
        "entries[1]: 'org/norm@1' is listed twice",
    ),
    (
        {"format_version": 1, "entries": [OURS["entries"][1] | {"revision": "main"}]},
        "entries[0]: at most one of version, revision and constraints",
    ),
    (
        {"format_version": 1, "entries": [OURS["entries"][0] | {"builds": {"torch-cpu": {"files": {"../x": H1}}}}]},
        "entries[0].builds['torch-cpu'].files: the path '../x' has the part '..'",
    ),
    (
        {"format_version": 1, "entries": [OURS["entries"][0] | {"builds": {"torch-cpu": {"files": {"x": 1}}}}]},
        "entries[0].builds['torch-cpu'].files: 'x' is a number, not a string",
    ),
]


@pytest.mark.parametrize(("value", "problem"), WRONG, ids=[w[1][:50] for w in WRONG])
def test_what_is_wrong_is_named_with_its_place(value, problem):
    assert problem in problems(value)


def test_every_problem_is_reported_at_once():
    assert problems([{"dependency": {"repo-id": "x"}}, 3, {"lock": {"commit": C1}, "dependency": {}}]) == [
        "[0].dependency: exactly one of version and revision is needed",
        "[0]: 'lock' is missing",
        "[0].dependency: 'repo-id' has the wrong form: 'x'",
        "[0].lock: 'commit' is missing",
        "[1]: expected an object, found a number",
        "[2].dependency: exactly one of version and revision is needed",
        "[2].dependency: 'repo-id' is missing",
    ]


def test_the_error_says_which_lock():
    with pytest.raises(BadMetadata) as e:
        parse("{", what="kernels.lock")
    assert e.value.asked == "kernels.lock"


# -- properties ---------------------------------------------------------------------------------------------------

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3), max_leaves=6
)


def paths(node, prefix=()):
    for key in node if isinstance(node, dict) else range(len(node)):
        yield (*prefix, key)
        if isinstance(node[key], dict | list):
            yield from paths(node[key], (*prefix, key))


@given(st.sampled_from([CURRENT, OLD, OURS]), st.data(), values)
def test_any_value_in_any_place_is_read_or_refused(root, data, value):
    root = copy.deepcopy(root)
    *parents, last = data.draw(st.sampled_from(sorted(paths(root), key=str)))
    node = root
    for key in parents:
        node = node[key]
    node[last] = value
    with contextlib.suppress(BadMetadata):
        lock = read(root)
        assert parse(lock.dumps()).dumps() == lock.dumps()


@given(values)
def test_any_json_is_read_or_refused(value):
    with contextlib.suppress(BadMetadata):
        read(value)


hexes = st.sampled_from([H1, H2])
built = st.builds(
    LockedBuild,
    st.sampled_from(["torch-cpu", "torch213-cxx11-cu130-x86_64-linux"]),
    st.none() | hexes,
    st.dictionaries(st.sampled_from(["__init__.py", "a/b.so", "ä.json"]), hexes).map(lambda d: tuple(sorted(d.items()))),
    st.none() | hexes,
)
locked = st.builds(
    lambda name, commit, at, builds: Locked(name, commit, builds=tuple(sorted(builds, key=lambda b: b.variant)), **at),
    st.sampled_from(["org/norm", "org/rope", "kernelswap/x"]),
    st.sampled_from([C1, C2, H1]),
    st.sampled_from([{}, {"version": 0}, {"revision": "refs/pr/1"}, {"constraints": "~=2.0"}]),
    st.lists(built, max_size=2, unique_by=lambda b: b.variant),
)


@given(st.lists(locked, max_size=4, unique_by=lambda e: e.asked))
def test_every_lock_reads_back(entries):
    lock = Lock(tuple(sorted(entries, key=lambda e: (e.name, e.source, e.asked))))
    assert parse(lock.dumps()) == lock
    parse(lock.dumps_kernels())
