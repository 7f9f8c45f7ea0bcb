import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelswap import strict
from kernelswap.errors import BadMetadata

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def read(data, max_bytes=10_000):
    return strict.loads(data, what="a file", max_bytes=max_bytes)


@given(json_values)
def test_what_json_writes_is_read_back(value):
    assert read(json.dumps(value)) == value
    assert read(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=60) | st.text(max_size=60))
def test_any_bytes_are_read_or_refused(data):
    with contextlib.suppress(BadMetadata):
        read(data)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'{"a": 1, "b": 2, "a": 3, "b": 4}', "key 'a' occurs twice in one object\nkey 'b' occurs twice in one object"),
        (b'[{"x": {"a": 1, "a": 1}}]', "key 'a' occurs twice in one object"),
        (b"[NaN]", "not JSON: NaN is not a JSON number"),
        (b"[-Infinity]", "not JSON: -Infinity is not a JSON number"),
        (b"\xff\xfe{}", "not UTF-8: byte 0"),
        (b"\xef\xbb\xbf{}", "not JSON: Unexpected UTF-8 BOM (decode using utf-8-sig): line 1 column 1 (char 0)"),
        (b"{} {}", "not JSON: Extra data: line 1 column 4 (char 3)"),
        (b'["' + b"x" * 5000 + b'"]', f"a string of 5000 characters, at most 4096 are read: '{'x' * 76}..."),
        (b'["\\ud800"]', "half a surrogate pair in '\\ud800'"),
        (b'{"\\udfff": 1}', "half a surrogate pair in '\\udfff'"),
        (b"[" * 17 + b"]" * 17, "nested deeper than 16"),
        (b"[" * 5000 + b"]" * 5000, "nested deeper than 16"),
        (b" " * 10_001, "10001 bytes, at most 10000 are read"),
    ],
)
def test_what_two_readers_could_read_differently_is_refused(data, problem):
    with pytest.raises(BadMetadata) as e:
        read(data)
    assert e.value.found == problem
    assert e.value.asked == "a file"


def test_a_number_of_many_digits_is_refused_and_not_converted():
    with pytest.raises(BadMetadata, match="not JSON"):
        read("[" + "9" * 9000 + "]")


def test_the_limits_are_inclusive():
    longest = "x" * strict.MAX_STRING
    assert read(json.dumps([longest])) == [longest]
    assert read(b" " * 9_998 + b"[]") == []
    with pytest.raises(BadMetadata) as e:
        strict.fail((f"problem {i}" for i in range(20)), what="x")
    assert len(e.value.found.splitlines()) == 20
    assert strict.quote("x" * 78) == repr("x" * 78)


def test_sixteen_levels_are_read():
    assert read(b"[" * 16 + b"]" * 16) is not None


def test_nesting_beyond_the_interpreter_is_refused():
    with pytest.raises(BadMetadata, match="nested deeper"):
        strict.loads(b"[" * 400_000, what="a file", max_bytes=1 << 20)


def test_every_problem_is_listed_up_to_a_limit():
    strict.fail([], what="x")
    with pytest.raises(BadMetadata) as e:
        strict.fail((f"problem {i}" for i in range(25)), what="x")
    assert e.value.found.splitlines() == [*(f"problem {i}" for i in range(20)), "and 5 more"]


@pytest.mark.parametrize("path", ["a", "a/b.py", ".hidden", "a b/c", "ä/b", "..a/b..", "metadata.json"])
def test_paths_below_a_directory(path):
    assert strict.path_problem(path) is None


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("", "is empty or padded with spaces"),
        (" a", "is empty or padded with spaces"),
        ("a\nb", "has characters that cannot be printed"),
        ("a\u202eb", "has characters that cannot be printed"),
        ("..\\a", "has a backslash or a colon, which some platforms read as a separator or a drive"),
        ("C:/a", "has a backslash or a colon, which some platforms read as a separator or a drive"),
        ("a:stream", "has a backslash or a colon, which some platforms read as a separator or a drive"),
        ("/a", "is absolute"),
        ("../a", "has the part '..'"),
        ("a/../../b", "has the part '..'"),
        ("./a", "has the part '.'"),
        ("a//b", "has the part ''"),
        ("a/", "has the part ''"),
    ],
)
def test_paths_that_could_lead_elsewhere(path, why):
    assert strict.path_problem(path) == why


def test_types_are_named_in_json_words():
    named = [strict.kind(v) for v in (True, 1, 1.5, "x", [], {}, None)]
    assert named == ["a boolean", "a number", "a number", "a string", "a list", "an object", "null"]


@given(st.text())
def test_a_quote_is_short_and_printable(text):
    assert strict.quote(text).isascii()
    assert len(strict.quote(text)) <= 80
