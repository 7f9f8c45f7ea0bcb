import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelswap import policy
from kernelswap.errors import TableError
from kernelswap.policy import DEFAULT, KERNELS_COMMUNITY, Signer, combine, parse

EVERY_KEY = """
[policy]
sources = ["hub"]
publishers = ["my-org", "other/kernel"]
digests = ["sha256:{d}", "{e}"]
require_digest = true
require_signature = true
signers = ["kernels-community", {{issuer = "https://i", repository = "https://r", workflows = ["https://w"]}}]
no_native_code = true
locked_only = true
""".format(d="a" * 64, e="b" * 64)


def test_the_default_allows_what_is_here_and_whom_the_hub_or_the_call_vouches_for():
    assert DEFAULT.sources == ("bundled", "dir", "local", "installed", "hub", "folder", "bundle")
    assert DEFAULT.publishers == ("trusted", "named")
    assert not any((DEFAULT.require_digest, DEFAULT.require_signature, DEFAULT.no_native_code, DEFAULT.locked_only))


def test_every_key_is_read():
    found = combine(parse(EVERY_KEY, where="kernelswap.toml"))
    assert found == policy.Policy(
        sources=("hub",),
        publishers=("my-org", "other/kernel"),
        digests=("a" * 64, "b" * 64),
        require_digest=True,
        require_signature=True,
        signers=(KERNELS_COMMUNITY, Signer("https://i", "https://r", ("https://w",))),
        no_native_code=True,
        locked_only=True,
    )
    assert {found.origin(key) for key in policy._KEYS} == {"kernelswap.toml"}
    assert set(policy._KEYS) == set(policy._READERS)


def test_pyproject_has_it_under_tool():
    text = EVERY_KEY.replace("[policy]", "[tool.kernelswap.policy]")
    assert combine(parse(text, where="/a/pyproject.toml")).locked_only
    assert not combine(parse(text, where="kernelswap.toml")).locked_only
    assert combine(parse("[project]\nname = 'x'\n", where="pyproject.toml")) == DEFAULT


def test_project_goes_over_user_key_by_key_and_each_key_knows_its_file():
    project = parse("[policy]\nlocked_only = true\nsources = ['hub']", where="project.toml")
    user = parse("[policy]\nsources = ['dir']\nno_native_code = true", where="user.toml")
    found = combine(project, user)
    assert (found.locked_only, found.sources, found.no_native_code) == (True, ("hub",), True)
    assert [found.origin(k) for k in ("locked_only", "sources", "no_native_code", "digests")] == [
        "project.toml",
        "project.toml",
        "user.toml",
        "the default policy",
    ]
    assert combine(None, user).sources == ("dir",)
    assert combine(None, None) == DEFAULT


def test_an_empty_list_means_nothing_is_allowed_not_everything():
    assert combine(parse("[policy]\npublishers = []", where="k.toml")).publishers == ()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("locked-only = true", "did you mean locked_only"),
        ("no_native_cod = true", "did you mean no_native_code"),
        ("colour = 1", "there are sources, publishers"),
        ("locked_only = 1", "expected true or false, found 1"),
        ("locked_only = 'true'", "expected true or false"),
        ("publishers = 'my-org'", "expected a list of strings"),
        ("publishers = ['*']", "expected `trusted`, `named`"),
        ("publishers = ['../x']", "expected `trusted`"),
        ("publishers = ['a/b/c']", "expected `trusted`"),
        ("sources = ['HTTP://']", "names of sources"),
        ("digests = ['abc']", "64 hex digits"),
        ("signers = []", "at least one signer"),
        ("signers = ['me']", "no known signer"),
        ("signers = [{issuer = 'https://i'}]", "a table of issuer, repository and workflows"),
        ("signers = [{issuer = 'https://i', repository = 'https://r', workflows = []}]", "begin with https"),
        ("signers = [{issuer = 'http://i', repository = 'https://r', workflows = ['https://w']}]", "begin with https"),
    ],
)
def test_a_wrong_line_is_named_with_what_was_expected(line, why):
    with pytest.raises(TableError) as e:
        parse(f"[policy]\n{line}\n", where="kernelswap.toml")
    assert why in str(e.value)
    assert "kernelswap.toml" in str(e.value)


def test_all_problems_at_once():
    with pytest.raises(TableError) as e:
        parse("[policy]\na = 1\nlocked_only = 2\ndigests = 3\n", where="k.toml")
    assert len(str(e.value).splitlines()) == 3


@pytest.mark.parametrize("text", ["[policy", "policy = 1", "[[policy]]\n", "a" * (1 << 21)])
def test_what_is_not_a_policy_file_is_an_error(text):
    with pytest.raises(TableError, match=r"k\.toml"):
        parse(text, where="k.toml")


@given(st.text(max_size=200), st.sampled_from(["kernelswap.toml", "pyproject.toml"]), st.sampled_from(["", "[policy]\n"]))
def test_any_text_is_read_or_refused(text, where, before):
    with contextlib.suppress(TableError):
        parse(before + text, where=where)


def test_names_are_organisations_or_kernels_and_never_prefixes():
    assert policy.names(("org",), "org/kernel")
    assert policy.names(("org/kernel",), "org/kernel")
    assert not policy.names(("org/kernel",), "org/kernel2")
    assert not policy.names(("org",), "organisation/kernel")
    assert not policy.names(("kernel",), "org/kernel")
