"""JSON, read strictly: no duplicate keys, no NaN, bounded in size, depth and string length. No I/O.

`metadata.json`, locks and status files come from strangers. What a lax reader forgives (the second of two equal keys
wins, `NaN`, half a surrogate pair) is where two readers of one signed file can be made to disagree.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from .errors import BadMetadata

MAX_DEPTH = 16  # the formats need five
MAX_STRING = 4096  # PATH_MAX; the longest legal value otherwise is an URL
_SHOWN = 20  # problems listed before "and N more"


def loads(data: bytes | str, *, what: str, max_bytes: int) -> object:
    """Plain JSON values, of which every string can be encoded and printed.

    Raises:
        BadMetadata: every problem of the reading; a syntax error hides those behind it.
    """
    if len(data) > max_bytes:
        raise BadMetadata(f"{len(data)} bytes, at most {max_bytes} are read", asked=what)
    duplicates: list[str] = []

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in items:
            if key in found:
                duplicates.append(f"key {quote(key)} occurs twice in one object")
            found[key] = value
        return found

    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value: object = json.loads(text, object_pairs_hook=pairs, parse_constant=_refuse_constant)
    except UnicodeDecodeError as e:
        raise BadMetadata(f"not UTF-8: byte {e.start}", asked=what) from e
    except RecursionError as e:
        raise BadMetadata(f"nested deeper than {MAX_DEPTH}", asked=what) from e
    except ValueError as e:  # JSONDecodeError, a number of 5000 digits, or `_refuse_constant`
        raise BadMetadata(f"not JSON: {e}", asked=what) from e
    fail([*duplicates, *_walk(value)], what=what)
    return value


def fail(problems: Iterable[str], *, what: str) -> None:
    """Raise one BadMetadata with every problem, one a line, or return if there are none."""
    listed = list(problems)
    if listed:
        more = [f"and {len(listed) - _SHOWN} more"] if len(listed) > _SHOWN else []
        raise BadMetadata("\n".join(listed[:_SHOWN] + more), asked=what)


def quote(text: object) -> str:
    """Short and printable, whatever a stranger wrote."""
    shown = ascii(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def path_problem(path: str) -> str | None:
    """Why `path` may not name a file below a directory, on any platform, or `None`."""
    if not path or path != path.strip():
        return "is empty or padded with spaces"
    if any(not c.isprintable() for c in path):
        return "has characters that cannot be printed"
    if "\\" in path or ":" in path:
        return "has a backslash or a colon, which some platforms read as a separator or a drive"
    if path.startswith("/"):
        return "is absolute"
    bad = next((part for part in path.split("/") if part in {"", ".", ".."}), None)
    return f"has the part {bad!r}" if bad is not None else None


def kind(value: object) -> str:
    """JSON's own word for the type of `value`."""
    words: Sequence[tuple[type, str]] = (
        (bool, "a boolean"),
        (int, "a number"),
        (float, "a number"),
        (str, "a string"),
        (list, "a list"),
        (dict, "an object"),
    )
    return next((word for type_, word in words if isinstance(value, type_)), "null")


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


def _walk(root: object) -> list[str]:
    problems: list[str] = []
    level: list[object] = [root]
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str):
                problems += _string_problems(value)
        if not below:
            return problems
        level = below
    return [*problems, f"nested deeper than {MAX_DEPTH}"]


def _string_problems(text: str) -> list[str]:
    if len(text) > MAX_STRING:
        return [f"a string of {len(text)} characters, at most {MAX_STRING} are read: {quote(text)}"]
    if any("\ud800" <= c <= "\udfff" for c in text):
        return [f"half a surrogate pair in {quote(text)}"]
    return []
