import dataclasses

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kernelswap.errors import SpecError
from kernelswap.spec import matching, parse
from kernelswap.types import Requirement

HEX = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/repo", {"name": "org/repo"}),
        ("org/repo@1", {"name": "org/repo", "version": 1}),
        ("org/repo@0", {"name": "org/repo", "version": 0}),
        ("org/repo:Layer", {"name": "org/repo", "layer": "Layer"}),
        ("org/repo@1:Layer", {"name": "org/repo", "version": 1, "layer": "Layer"}),
        ("org/repo@12:a.b.Layer", {"name": "org/repo", "version": 12, "layer": "a.b.Layer"}),
        ("org/repo:_private", {"name": "org/repo", "layer": "_private"}),
        ("kernels-community/liger_kernels", {"name": "kernels-community/liger_kernels"}),
        ("a/b", {"name": "a/b"}),
        ("org/repo@>=2.0,<3.0", {"name": "org/repo", "constraints": ">=2.0,<3.0"}),
        ("org/repo@~=2.1:L", {"name": "org/repo", "constraints": "~=2.1", "layer": "L"}),
        ("org/repo@!=2.0", {"name": "org/repo", "constraints": "!=2.0"}),
        ("org/repo@==2.*", {"name": "org/repo", "constraints": "==2.*"}),
        ("org/repo@<3.0rc1", {"name": "org/repo", "constraints": "<3.0rc1"}),
        ("org/repo@v1", {"name": "org/repo", "revision": "v1"}),
        ("org/repo@v2.1.0", {"name": "org/repo", "revision": "v2.1.0"}),
        ("org/repo@2.1.0", {"name": "org/repo", "revision": "2.1.0"}),
        ("org/repo@main:L", {"name": "org/repo", "revision": "main", "layer": "L"}),
        ("org/repo@refs/pr/1", {"name": "org/repo", "revision": "refs/pr/1"}),
        ("org/repo@refs/pr/1:L", {"name": "org/repo", "revision": "refs/pr/1", "layer": "L"}),
        (f"org/repo@{HEX}", {"name": "org/repo", "revision": HEX}),
        ("org/repo@" + "1" * 40, {"name": "org/repo", "revision": "1" * 40}),
        ("org/repo@" + "1" * 64, {"name": "org/repo", "revision": "1" * 64}),
        ("paged|org/repo@1", {"name": "org/repo", "version": 1, "paged": True}),
        ("hub://org/repo@1", {"name": "org/repo", "version": 1}),
        ("kernelswap/layers:RMSNorm", {"source": "bundled", "name": "layers", "layer": "RMSNorm"}),
        ("paged|kernelswap/layers@1", {"source": "bundled", "name": "layers", "version": 1, "paged": True}),
        ("bundled://layers:RMSNorm", {"source": "bundled", "name": "layers", "layer": "RMSNorm"}),
        ("hub://kernelswap/layers", {"source": "hub", "name": "kernelswap/layers"}),
        ("dir:///abs/path:Layer", {"source": "dir", "name": "/abs/path", "layer": "Layer"}),
        ("dir://rel/path", {"source": "dir", "name": "rel/path"}),
        ("dir://name", {"source": "dir", "name": "name"}),
        ("dir://C:\\path:Layer", {"source": "dir", "name": "C:\\path", "layer": "Layer"}),
        ("dir://C:/path/x:Layer", {"source": "dir", "name": "C:/path/x", "layer": "Layer"}),
        ("/abs/path:Layer", {"source": "dir", "name": "/abs/path", "layer": "Layer"}),
        ("/abs/path@2:Layer", {"source": "dir", "name": "/abs/path", "version": 2, "layer": "Layer"}),
        ("/with space/and@at/c:L", {"source": "dir", "name": "/with space/and@at/c", "layer": "L"}),
        ("/with:colon/c:L", {"source": "dir", "name": "/with:colon/c", "layer": "L"}),
        ("/ends/with/", {"source": "dir", "name": "/ends/with/"}),
        ("C:\\kernels\\x:Layer", {"source": "dir", "name": "C:\\kernels\\x", "layer": "Layer"}),
        ("C:\\Program Files\\x", {"source": "dir", "name": "C:\\Program Files\\x"}),
        ("C:/kernels/x@3", {"source": "dir", "name": "C:/kernels/x", "version": 3}),
        ("C:\\", {"source": "dir", "name": "C:\\"}),
        ("\\\\server\\share\\x:L", {"source": "dir", "name": "\\\\server\\share\\x", "layer": "L"}),
        ("./x", {"source": "dir", "name": "./x"}),
        ("../x:L", {"source": "dir", "name": "../x", "layer": "L"}),
        (".\\x:L", {"source": "dir", "name": ".\\x", "layer": "L"}),
        (".", {"source": "dir", "name": "."}),
        (".:L", {"source": "dir", "name": ".", "layer": "L"}),
        ("..@1", {"source": "dir", "name": "..", "version": 1}),
        ("~/kernels/x:L", {"source": "dir", "name": "~/kernels/x", "layer": "L"}),
    ],
)
def test_every_form(text, expected):
    found = parse(text)
    assert found == Requirement(**expected)
    assert str(found) == text
    assert parse(str(dataclasses.replace(found, text=None))) == found  # the canonical text means the same


def test_a_text_without_a_source_belongs_to_the_default_one():
    assert parse("org/repo:L", default_source="dir") == Requirement("org/repo", "dir", layer="L")
    assert parse("layers:L", default_source="bundled") == Requirement("layers", "bundled", layer="L")
    assert parse("/abs:L", default_source="bundled").source == "dir"
    assert parse("hub://a/b", default_source="dir").source == "hub"
    assert parse("kernelswap/x", default_source="dir").name == "kernelswap/x"


# (text, what stands over the caret, the finding, part of the advice)
BAD = [
    ("", "", "nothing was asked for", None),
    ("   ", "   ", "nothing was asked for", None),
    (" org/repo", " ", "unexpected space or control character", "remove it"),
    ("org/repo \t", " \ufffd", "unexpected space or control character", "remove it"),
    ("org/re\npo", "\ufffd", "unexpected space or control character", "remove it"),
    ("org/re po", " ", "this does not belong in a name", None),
    ("org/repo@ 1", " ", "unexpected space", "remove it"),
    ("org/repo@>=2.0, <3.0", " ", "unexpected space", "remove it"),
    ("org/repo@", "@", "the version after `@` is empty", "write `@1`"),
    ("org/repo@:L", "@", "the version after `@` is empty", "write `@1`"),
    ("org/repo@1@2", "@", "a second `@`", "one version"),
    ("org/repo@@1", "@", "a second `@`", "one version"),
    ("org/repo@1::L", ":L", "a second `:`", "`outer.Inner`"),
    ("org/repo@1,2", ",", "neither a revision nor constraints", "begin with an operator: `@>=1`"),
    ("org/repo@2.0<3.0", "<", "neither a revision nor constraints", "`@>=2.0`"),
    ("org/repo@,2", ",", "neither a revision nor constraints", None),
    ("org/repo@>=", ">=", "this is no version constraint", ">=2.0,<3.0"),
    ("org/repo@>=2.0,", "", "this is no version constraint", ">=2.0,<3.0"),
    ("org/repo@>=2.0,3.0", "3.0", "this is no version constraint", ">=2.0,<3.0"),
    ("org/repo@>=2.0,<x:L", "<x", "this is no version constraint", ">=2.0,<3.0"),
    ("org/repo@===x", "===x", "this is no version constraint", ">=2.0,<3.0"),
    ("org/repo@=2.0", "=2.0", "this is no version constraint", ">=2.0,<3.0"),
    ("org/repo@007", "007", "this is no API version", "a commit has 40"),
    ("org/repo@1234567890", "1234567890", "this is no API version", "a commit has 40"),
    ("org/repo@a..b", "..", "no branch, tag or commit can contain this", None),
    ("org/repo@-x", "-", "no branch, tag or commit can contain this", None),
    ("org/repo@refs/", "/", "no branch, tag or commit can contain this", None),
    ("org/repo@v1^", "^", "no branch, tag or commit can contain this", None),
    ("org/repo@x.lock", ".lock", "no branch, tag or commit can contain this", None),
    ("org/repo:", ":", "the layer after `:` is empty", "leave `:` out"),
    ("org/repo:2.0", "2.0", "this is no layer, a version follows `@`", "`@2.0`, a range `@>=2.0`"),
    ("org/repo:v2", "v2", "this is no layer, a version follows `@`", "`@v2`, a range `@>=2`"),
    ("org/repo:L@1", "@1", "the version comes before the layer", "`@1:L`"),
    ("org/repo:@1", "@1", "the version comes before the layer", None),
    ("org/repo@1:L:M", ":M", "a second `:`", "`outer.Inner`"),
    ("org/repo:a-b", "-", "a layer is a Python name", None),
    ("org/repo:a.2b", "2", "a layer is a Python name", None),
    ("org/repo:a.", "", "a layer is a Python name", None),
    ("org/repo:Ünorm", "Ü", "a layer is a Python name", None),
    ("org/repo:__globals__", "__globals__", "names that belong to Python itself", None),
    ("org/repo:forward.__globals__.os", "__globals__", "names that belong to Python itself", None),
    ("repo", "repo", "here one half is missing", "`org/repo`, or `kernelswap/repo`"),
    ("org/", "", "one half of the name is empty", None),
    ("org//x", "/x", "with one slash", "dir://PATH"),
    ("org/repo/RMSNorm", "/RMSNorm", "with one slash", "a layer `:Layer`"),
    ("org/repo/blob/main:L", "/blob/main", "with one slash", "a revision is written"),
    ("bundled://a/b", "/b", "one word", None),
    ("org/re--po", "--", "`--` is not allowed in a name", None),
    ("o--g/repo@1", "--", "`--` is not allowed in a name", None),
    ("org/a..b", "..", "`..` is not allowed in a name", None),
    ("-org/repo", "-", "does not begin or end with `-`", None),
    ("org/repo.", ".", "does not begin or end with `.`", None),
    ("org/repo.git", ".git", "does not begin or end with `.git`", None),
    ("o" * 97 + "/x", "o", "at most 96 characters", None),
    ("org/répo", "é", "this does not belong in a name", None),
    ("org/re%2Fpo", "%", "this does not belong in a name", None),
    ("org\\repo", "\\", "this does not belong in a name", "dir://PATH"),
    ("@1", "@", "the name is missing", None),
    (":L", ":", "the name is missing", None),
    ("dir://", "", "the name is missing", None),
    ("paged|", "", "the name is missing", None),
    ("paged|eager", "eager", "here one half is missing", None),
    ("https://huggingface.co/kernels/org/repo", "https://", "this is a URL", "write `org/repo`"),
    ("https://huggingface.co/org/repo/tree/v1", "https://", "this is a URL", "write `org/repo`"),
    ("https://huggingface.co/repo", "https://", "this is a URL", "write `org/name`"),
    ("https://huggingface.co", "https://", "this is a URL", "write `org/name`"),
    ("hub2://org/repo", "hub2", "there is no source `hub2`", "did you mean `hub://`?"),
    ("HUB://org/repo", "HUB", "there is no source `HUB`", "did you mean `hub://`?"),
    ("s3://bucket/x", "s3", "there is no source `s3`", "known: hub://, dir://, bundled://, installed://"),
]


@pytest.mark.parametrize(("text", "under", "found", "todo"), BAD, ids=[repr(b[0][:30]) for b in BAD])
def test_the_caret_is_under_what_does_not_belong(text, under, found, todo):
    with pytest.raises(SpecError) as e:
        parse(text)
    error = e.value
    start, end = error.span
    assert error.text[start:end] == under
    assert found in error.reason
    assert (todo or "") in (error.todo or "")
    message, line, caret = error.found.split("\n")
    assert message == error.reason
    assert line == "    " + error.text
    assert caret == "    " + " " * start + "^" * (end - start)


def test_the_limits_are_inclusive():
    path = "/" + "a" * 4095
    assert parse(path).name == path
    assert parse("org/" + "b" * 96).name == "org/" + "b" * 96
    assert parse("org/repo@999999999").version == 999_999_999
    with pytest.raises(SpecError):
        parse(path + "a")
    with pytest.raises(SpecError):
        parse("org/repo@1000000000")


def test_an_endless_text_is_shown_in_part():
    with pytest.raises(SpecError) as e:
        parse("a/" + "b" * 100_000)
    assert "100002 characters, at most 4096 are read" in e.value.reason
    assert e.value.text == "a/" + "b" * 58 + "..."
    assert e.value.text[slice(*e.value.span)] == "..."
    assert len(str(e.value)) < 300


parts = st.sampled_from(
    [
        *(
            "hub://",
            "dir://",
            "bundled://",
            "kernelswap/",
            "org",
            "/",
            "repo",
            "@",
            ":",
            "1",
            ">=2.0",
            "<3",
            ",",
            "v1",
            "refs/pr/1",
        ),
        *("Layer", ".", "..", "--", "C:\\", "\\", "~", " ", "paged|", "https://", "__x__", "\n", "é", "\ud800", "=", "!", "40"),
    ]
)


@given(st.text(max_size=40) | st.lists(parts, max_size=9).map("".join), st.sampled_from(["hub", "dir", "bundled"]))
@example("dir://C:\\@:", "hub")
@example("/\x00", "hub")
@example(".\n", "hub")
@example("a/b@" + "9" * 5000, "hub")
@example("a/b@²", "hub")
def test_any_text_gives_itself_back_or_a_spec_error(text, default):
    try:
        found = parse(text, default_source=default)
    except SpecError as e:
        error = e
    else:
        assert str(found) == text
        assert parse(str(dataclasses.replace(found, text=None)), default_source="hub") == found
        return
    start, end = error.span
    assert 0 <= start < end <= len(error.text) + 1
    str(error).encode()  # printable on any terminal that speaks UTF-8


names = st.from_regex(r"[a-z][a-z0-9_]{0,8}(-[a-z0-9]{1,8})?/[a-z][a-z0-9]{0,8}", fullmatch=True)
versions = (
    st.integers(0, 999_999_999).map(lambda n: {"version": n})
    | st.sampled_from(["main", "v1", "v2.1.0", "refs/pr/12", HEX, "0" * 40, "2.0"]).map(lambda r: {"revision": r})
    | st.sampled_from([">=2.0,<3.0", "~=2.1", "==2.*", "!=1.0,>0.5"]).map(lambda c: {"constraints": c})
    | st.just({})
)
layers = st.none() | st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,8}(\.[A-Za-z]\w{0,5}){0,2}", fullmatch=True).filter(str.isascii)
sources = st.sampled_from(["hub", "dir", "bundled"])


@given(sources, names, versions, layers, st.booleans())
def test_every_requirement_reads_back_from_its_text(source, name, at, layer, paged):
    if source == "dir" and "/" in at.get("revision", ""):
        at = {}  # after the last separator of a path, there is no other
    requirement = Requirement(name.replace("/", "-") if source == "bundled" else name, source, layer=layer, paged=paged, **at)
    assert parse(str(requirement)) == requirement


# -- constraints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraints", "tags", "branches", "expected"),
    [
        (">=2.0,<3.0", ["v2.1.0", "v2.10.0", "v2.9.0", "v3.0.0"], ["v2"], "v2.10.0"),
        (">=2.0,<3.0", ["v1.0.0", "v3.0.0"], ["v1", "v2", "v3"], "v2"),
        (">=2.0", [], ["v2", "v10", "v9"], "v10"),
        (">=2.0", ["v2.0.0rc1"], [], None),
        (">=2.0", ["v2.1.0rc1", "v2.0.0"], [], "v2.0.0"),
        (">=2.0rc1", ["v2.0.0-rc.2", "v2.0.0rc1"], [], "v2.0.0-rc.2"),
        (">=2.0.dev0", ["v2.1.0.dev3"], [], "v2.1.0.dev3"),
        ("==2.1", ["v2.1", "v2.1.0"], [], "v2.1.0"),
        ("~=2.1", ["v2.0.9", "v2.4.0", "v3.0.0"], [], "v2.4.0"),
        ("!=2.0.0", ["v2.0.0"], ["v1"], "v1"),
        (">=1", ["2.0.0", "v2", "vX", "v1.2.3.4", "release-2.0.0", "v2.0.0+cu126", "v2.0.0\n", "v٢.0.0"], ["main", "v", "v1.2", "2"], None),
        (">=1", ["v1.0.0.post1", "v1.0.0"], [], "v1.0.0.post1"),
        (">=1", [], [], None),
    ],
)  # fmt: skip
def test_the_highest_tag_that_matches_else_the_highest_branch(constraints, tags, branches, expected):
    assert matching(constraints, tags, branches) == expected
    assert matching(constraints, reversed(tags), reversed(branches)) == expected


def test_constraints_that_do_not_parse_point_at_themselves():
    with pytest.raises(SpecError) as e:
        matching("around 2", [], [])
    assert e.value.span == (0, 8)


@given(st.lists(st.tuples(*[st.integers(0, 30)] * 3), min_size=1, max_size=8))
def test_of_many_tags_the_highest_version_is_chosen(versions):
    tags = [f"v{a}.{b}.{c}" for a, b, c in versions]
    assert matching(">=0", tags, []) == "v" + ".".join(map(str, max(versions)))
