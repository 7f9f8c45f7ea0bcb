import base64
import contextlib
import copy
import hashlib
import json
import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelswap.errors import BadMetadata
from kernelswap.metadata import compare, digest_files, parse
from kernelswap.types import Dependency, Digest, Metadata, Provenance


def b64(data, algorithm="sha256"):
    return base64.b64encode(hashlib.new(algorithm, data).digest()).decode()


FULL = {
    "name": "my-norm",
    "id": "_my_norm_cuda_0a1b2c3",
    "version": 2,
    "license": "MIT",
    "upstream": "git@github.com:org/upstream.git",
    "source": "https://github.com/org/source",
    "python-depends": ["einops"],
    "kernel-depends": [{"repo-id": "org/base", "version": 1}, {"repo-id": "org/other", "revision": "refs/pr/1"}],
    "kernels-minver": "0.17.0",
    "backend": {"type": "cuda", "archs": ["8.0", "9.0a", "10.0f", "12.0+PTX"], "later": "ignored"},
    "digest": {"algorithm": "sha256", "files": {"layers/norm.py": b64(b"1"), "__init__.py": b64(b"2")}},
    "provenance": {
        "kernel-builder": {"version": "0.17.0", "commit": "A" * 40, "dirty": False},
        "kernel": {"sha": "b" * 64, "dirty": True},
    },
    "python-depends-backends": {"ignored": True},
}


def read(value, **more):
    return parse(json.dumps(value).encode(), **more)


def problems(value, **more):
    with pytest.raises(BadMetadata) as e:
        read(value, **more)
    return e.value.found.splitlines()


def changed(path, value):
    """FULL with one value changed; `path` is dotted, `...` as value deletes it."""
    root = copy.deepcopy(FULL)
    *parents, last = path.split(".")
    node = root
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return root


def test_everything_is_read():
    assert read(FULL) == Metadata(
        name="my-norm",
        id="_my_norm_cuda_0a1b2c3",
        version=2,
        license="MIT",
        backend="cuda",
        archs=("8.0", "9.0a", "10.0f", "12.0+PTX"),
        python_depends=("einops",),
        kernel_depends=(Dependency("org/base", version=1), Dependency("org/other", revision="refs/pr/1")),
        minver=(0, 17, 0),
        upstream="ssh://git@github.com/org/upstream.git",
        source="https://github.com/org/source",
        digest=Digest("sha256", (("__init__.py", b64(b"2")), ("layers/norm.py", b64(b"1")))),
        provenance=Provenance("0.17.0", builder_commit="a" * 40, builder_dirty=False, commit="b" * 64, dirty=True),
    )


def test_what_is_optional_may_be_absent_or_null():
    least = {k: FULL[k] for k in ("name", "id", "version", "license", "python-depends")} | {"backend": {"type": "cpu"}}
    nulls = {"upstream": None, "source": None, "kernels-minver": None, "digest": None, "provenance": None}
    expected = Metadata("my-norm", "_my_norm_cuda_0a1b2c3", 2, "MIT", "cpu", python_depends=("einops",))
    assert read(least) == expected
    assert read(least | nulls | {"backend": {"type": "cpu", "archs": None}}) == expected
    assert read(least | {"provenance": {"kernel-builder": {"version": "1"}, "kernel": None}}).provenance == Provenance("1")


WRONG = [
    ("name", 3, "name: expected a string, found a number"),
    ("name", "", "name: '' is empty"),
    ("name", "My-Norm", "name: 'My-Norm' is not a kernel name (a-z, 0-9 and inner dashes, two characters or more)"),
    ("name", "x", "name: 'x' is not a kernel name (a-z, 0-9 and inner dashes, two characters or more)"),
    ("name", "my_norm", "name: 'my_norm' is not a kernel name (a-z, 0-9 and inner dashes, two characters or more)"),
    ("name", "norm-", "name: 'norm-' is not a kernel name (a-z, 0-9 and inner dashes, two characters or more)"),
    ("id", None, "id: expected a string, found null"),
    ("id", "", "id: '' is empty"),
    ("id", "my-norm", "id: 'my-norm' is not a Python identifier"),
    ("id", "class", "id: 'class' is not a Python identifier"),
    ("id", "norm.sub", "id: 'norm.sub' is not a Python identifier"),
    ("id", "ñorm", "id: '\\xf1orm' is not a Python identifier"),
    ("id", "x" * 129, f"id: '{'x' * 76}... is longer than 128"),
    ("id", "os", "id: 'os' is the name of a module of Python itself"),
    ("id", "__main__", "id: '__main__' is the name of a module of Python itself"),
    ("version", ..., "version: missing"),
    ("version", "1", "version: expected a whole number, found a string"),
    ("version", True, "version: expected a whole number, found a boolean"),
    ("version", 1.0, "version: expected a whole number, found a number"),
    ("version", -1, "version: -1 is out of range, expected a whole number from 0 on"),
    ("version", 1 << 31, "version: 2147483648 is out of range, expected a whole number from 0 on"),
    ("license", "a\u202eb", "license: 'a\\u202eb' cannot be printed"),
    ("python-depends", ..., "python-depends: missing"),
    ("python-depends", None, "python-depends: expected a list, found null"),
    ("python-depends", ["einops", 3], "python-depends[1]: expected a string, found a number"),
    ("python-depends", ["x"] * 257, "python-depends: 257 entries, at most 256 are read"),
    ("kernel-depends", None, "kernel-depends: expected a list, found null"),
    ("kernel-depends", ["org/x"], "kernel-depends[0]: expected an object, found a string"),
    ("kernel-depends", [{"repo-id": "x/y"}], "kernel-depends[0]: exactly one of version and revision is needed"),
    (
        "kernel-depends",
        [{"repo-id": "x/y", "version": 1, "revision": "v1"}],
        "kernel-depends[0]: exactly one of version and revision is needed",
    ),
    ("kernel-depends", [{"repo-id": "xy", "version": 1}], "kernel-depends[0].repo-id: 'xy' is not `org/name`"),
    ("kernel-depends", [{"repo-id": "x/a--b", "version": 1}], "kernel-depends[0].repo-id: 'x/a--b' is not `org/name`"),
    ("kernel-depends", [{"version": 1}], "kernel-depends[0].repo-id: missing"),
    ("kernel-depends", [{"repo-id": "x/y", "version": 1, "hash": ""}], "kernel-depends[0]: unknown key 'hash'"),
    ("kernels-minver", "0.17", "kernels-minver: '0.17' is not three numbers, `1.2.3`"),
    ("kernels-minver", "0.17.0rc1", "kernels-minver: '0.17.0rc1' is not three numbers, `1.2.3`"),
    ("kernels-minver", 17, "kernels-minver: expected a string, found a number"),
    ("upstream", "file:///etc", "upstream: 'file:///etc' is not the URL of a git repository"),
    ("upstream", "https://", "upstream: 'https://' is not the URL of a git repository"),
    ("upstream", "https://[::1", "upstream: 'https://[::1' is not the URL of a git repository"),
    ("upstream", "github.com/a/b", "upstream: 'github.com/a/b' is not the URL of a git repository"),
    ("source", "https://a b/c", "source: 'https://a b/c' is not the URL of a git repository"),
    ("backend", "cuda", "backend: expected an object, found a string"),
    ("backend", {}, "backend.type: missing"),
    ("backend.type", "npu", "backend.type: 'npu' is none of cann, cpu, cuda, metal, neuron, rocm, tpu, xpu"),
    ("backend.type", "CUDA", "backend.type: 'CUDA' is none of cann, cpu, cuda, metal, neuron, rocm, tpu, xpu"),
    ("backend.archs", "9.0", "backend.archs: expected a list, found a string"),
    ("backend.archs", [9.0], "backend.archs[0]: expected a string, found a number"),
    ("digest", [], "digest: expected an object, found a list"),
    ("digest.algorithm", "md5", "digest.algorithm: 'md5' is none of sha256, sha512"),
    ("digest.files", ..., "digest.files: missing"),
    ("digest.files", {"a": 1}, "digest.files['a']: expected a string, found a number"),
    ("digest.files", {"a": "AAAA"}, "digest.files['a']: 'AAAA' is not a sha256 in base64"),
    ("digest.files", {"a": b64(b"").rstrip("=")}, f"digest.files['a']: '{b64(b'')[:-1]}' is not a sha256 in base64"),
    ("digest.files", {"a": "é"}, "digest.files['a']: '\\xe9' is not a sha256 in base64"),
    ("digest.files", {"a": b64(b"", "sha512")}, f"digest.files['a']: '{b64(b'', 'sha512')[:76]}... is not a sha256 in base64"),
    ("digest.files", {"/etc/passwd": b64(b"")}, "digest.files: the path '/etc/passwd' is absolute"),
    ("digest.files", {"../a": b64(b"")}, "digest.files: the path '../a' has the part '..'"),
    (
        "digest.files",
        {"C:a": b64(b"")},
        "digest.files: the path 'C:a' has a backslash or a colon, which some platforms read as a separator or a drive",
    ),
    ("provenance", "x", "provenance: expected an object, found a string"),
    ("provenance", {}, "provenance.kernel-builder: missing"),
    ("provenance.kernel-builder.version", 1, "provenance.kernel-builder.version: expected a string, found a number"),
    ("provenance.kernel-builder.dirty", ..., "provenance.kernel-builder: commit and dirty come together or not at all"),
    ("provenance.kernel-builder.dirty", "no", "provenance.kernel-builder.dirty: expected a boolean, found a string"),
    ("provenance.kernel-builder.commit", "abc", "provenance.kernel-builder.commit: 'abc' is not 40 or 64 hex digits"),
    (
        "provenance.kernel-builder.sha",
        "a" * 40,
        "provenance.kernel-builder: `sha` is the old name of `commit`, both are given",
    ),
    ("provenance.kernel", 1, "provenance.kernel: expected an object, found a number"),
    ("provenance.kernel.sha", 7, "provenance.kernel.sha: expected a string, found a number"),
]


@pytest.mark.parametrize(("path", "value", "problem"), WRONG, ids=lambda v: repr(v)[:40])
def test_a_wrong_value_is_named_with_its_key(path, value, problem):
    assert problem in problems(changed(path, value))


def test_every_problem_is_reported_at_once():
    assert problems({"id": "os", "version": -1, "python-depends": None, "backend": {"type": "npu"}, "name": 1}) == [
        "name: expected a string, found a number",
        "id: 'os' is the name of a module of Python itself",
        "version: -1 is out of range, expected a whole number from 0 on",
        "backend.type: 'npu' is none of cann, cpu, cuda, metal, neuron, rocm, tpu, xpu",
        "python-depends: expected a list, found null",
    ]


def test_the_error_says_whose_file_it_was():
    with pytest.raises(BadMetadata) as e:
        read([], package="org/repo")
    assert e.value.asked == "metadata.json of org/repo"
    assert e.value.found == "expected an object, found a list"


def test_the_number_of_files_is_bounded():
    files = {f"f{i}": "" for i in range(20_001)}
    assert "digest.files: 20001 files, at most 20000 are read" in problems(changed("digest.files", files))


def test_a_file_of_over_a_megabyte_is_not_read():
    with pytest.raises(BadMetadata, match="at most 1048576 are read"):
        parse(b" " * (1 << 20) + b"{}")


# -- eras ---------------------------------------------------------------------------------------------------------


def test_an_old_build_gets_what_it_lacks():
    old = read({"version": 3, "python-depends": ["einops"]}, package="kernels-community/liger_kernels", path_hint="c0/torch-cuda")
    assert (old.name, old.version, old.license, old.backend) == ("liger-kernels", 3, "unknown", "universal")
    assert old.id.isidentifier()
    assert old.id.startswith("_liger_kernels_")
    assert old.python_depends == ("einops",)
    assert old.synthesised == ("id", "name", "license", "backend")


def test_an_empty_object_stands_for_a_build_without_the_file():
    none = read({}, package="org/norm", path_hint="x")
    assert (none.name, none.version, none.python_depends, none.digest) == ("norm", 0, (), None)
    assert none.synthesised == ("id", "name", "license", "backend", "version", "python-depends")


def test_made_up_ids_tell_builds_apart_and_are_stable():
    def made(package, hint):
        return read({}, package=package, path_hint=hint).id

    assert made("org/norm", "a") == made("org/norm", "a")
    assert len({made("org/norm", "a"), made("org/norm", "b"), made("other/norm", "a")}) == 3


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("", "kernel"),
        ("org/x", "kernel"),
        ("org/2d-conv", "d-conv"),
        ("org/Flash.Attn_3", "flash-attn-3"),
        ("日本/語", "kernel"),
        ("-a-", "kernel"),
    ],
)
def test_a_made_up_name_is_a_kernel_name(package, name):
    made = read({}, package=package)
    assert made.name == name
    assert made.id.isidentifier()


def test_a_current_build_lacks_nothing_but_what_older_builders_left_out():
    assert read({**FULL, "license": "MIT"}).synthesised == ()
    in_between = {k: v for k, v in FULL.items() if k not in {"id", "name"}}
    assert read(in_between, package="org/my-norm").synthesised == ("id", "name")
    assert problems({"license": "MIT"}) == ["version: missing", "python-depends: missing"]


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


@given(st.sampled_from(sorted(paths(FULL), key=str)), values)
def test_any_value_in_any_place_is_read_or_refused(path, value):
    root = copy.deepcopy(FULL)
    node = root
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with contextlib.suppress(BadMetadata):
        assert read(root).id.isidentifier()


@given(st.data())
def test_any_change_of_any_byte_is_read_or_refused(data):
    raw = bytearray(json.dumps(FULL).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with contextlib.suppress(BadMetadata):
        parse(bytes(raw))


@given(st.dictionaries(st.sampled_from(sorted(FULL)), values), st.text(), st.text())
def test_any_object_is_read_or_refused(root, package, hint):
    with contextlib.suppress(BadMetadata):
        found = read(root, package=package, path_hint=hint)
        assert found.id.isidentifier()


# -- digests ------------------------------------------------------------------------------------------------------


@pytest.fixture
def build(tmp_path):
    """A variant directory with everything that a digest leaves out."""
    root = tmp_path / "variant"
    for path in (
        "__init__.py",
        "layers/norm.py",
        "layers/metadata.json",
        "metadata.json",
        "metadata.json.sigstore",
        "__pycache__/x.cpython-311.pyc",
        "layers/__pycache__/deep/y.txt",
        "stray.pyc",
        "data/tuning.json",
    ):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(path.encode())
    (root / "empty").mkdir()
    return root


LISTED = ["__init__.py", "data/tuning.json", "layers/metadata.json", "layers/norm.py"]


def test_which_files_a_digest_lists(build):
    assert digest_files(build) == {path: b64(path.encode()) for path in LISTED}
    assert list(digest_files(build)) == LISTED
    assert digest_files(build, "sha512")["__init__.py"] == b64(b"__init__.py", "sha512")


def test_files_are_hashed_in_pieces(tmp_path):
    data = random.Random(0).randbytes((1 << 20) * 2 + 17)
    (tmp_path / "big.so").write_bytes(data)
    assert digest_files(tmp_path) == {"big.so": b64(data)}


@pytest.mark.skipif(os.name == "nt", reason="symlinks need a privilege there")
def test_links_are_followed_under_their_own_path(build, tmp_path):
    blob = tmp_path / "blobs" / "abc"
    blob.parent.mkdir()
    blob.write_bytes(b"blob")
    (build / "link.so").symlink_to(blob)
    (build / "more").symlink_to(tmp_path / "blobs")
    (build / "broken").symlink_to(tmp_path / "nothing")
    (build / "layers" / "up").symlink_to(build)  # a walk that followed this would never end
    found = digest_files(build)
    assert {path: found[path] for path in found if path not in LISTED} == {"link.so": b64(b"blob"), "more/abc": b64(b"blob")}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes there")
def test_a_pipe_is_no_file_and_is_not_read(build):
    os.mkfifo(build / "pipe")
    assert list(digest_files(build)) == LISTED


def test_differences_come_in_a_fixed_order(build):
    digest = Digest("sha256", tuple(digest_files(build).items()))
    assert compare(digest, build) == []
    (build / "data" / "tuning.json").unlink()
    (build / "__init__.py").write_bytes(b"changed")
    (build / "layers" / "metadata.json").unlink()
    (build / "aaa.py").touch()
    (build / "zzz\u202e.py").touch()
    (build / "metadata.json").write_bytes(b"not digested")
    stated = "does not have the digest that metadata.json states"
    assert compare(digest, build) == [
        f"__init__.py {stated}",
        "data/tuning.json is missing",
        "layers/metadata.json is missing",
        "aaa.py is not listed in metadata.json",
        "zzz\\u202e.py is not listed in metadata.json",
    ]


def test_the_algorithm_comes_before_everything(build):
    assert compare(Digest("md5", (("a", ""),)), build) == ["algorithm 'md5' is none of sha256, sha512"]


def test_a_stated_sha512_is_compared_as_such(build):
    digest = Digest("sha512", tuple(digest_files(build, "sha512").items()))
    assert compare(digest, build) == []
