"""Text to `Requirement` and back: `[source://]name[@version][:Layer]`. Pure.

Where a text could be read two ways:

* `kernelswap/NAME` is the bundled kernel NAME; `hub://kernelswap/NAME` is what the hub holds under that name.
* What looks like a path (`/x`, `./x`, `../x`, `~/x`, `C:\\x`, `\\\\server\\x`) is source `dir`. In a path, `@` and `:` mean something
  after the last separator only, so a directory `a@b/c` needs no escape, and a version is an integer or a name without `/`.
* `@3` is API version 3. Forty or sixty-four digits are a commit. What begins with one of `< > = ! ~` is a PEP 440 constraint.
  Everything else is a branch, tag, `refs/pr/N` or commit, handed on as it is.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from .errors import SpecError
from .types import Requirement

SOURCES = ("hub", "dir", "bundled", "installed")
BUNDLED = "kernelswap/"
GRAMMAR = "[source://]name[@version][:Layer]"

_PAGED = "paged|"
_MAX_TEXT = 4096
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PATH = re.compile(r"[/~\\]|\.\.?(?:[/\\:@]|$)|[A-Za-z]:[\\/]")
_NAME_CHARACTERS = re.compile(r"[A-Za-z0-9._-]+")
_SEPARATOR = re.compile(r"[/\\]")
_NOT_IN_A_REF = re.compile(r"[\x00-\x20\x7f~^?*\[\\]|\.\.|//|/\.|\.lock(?=/|$)")
_TAG = re.compile(r"v(\d+\.\d+(?:\.\d+)?(?:[-.]?(?:a|b|rc|alpha|beta|pre|dev|post)[-.]?\d*)?)", re.ASCII)
_BRANCH = re.compile(r"v(\d{1,9})", re.ASCII)


def parse(text: str, *, default_source: str = "hub") -> Requirement:
    """Read a spec; `default_source` is that of a text that names none and does not look like a path.

    >>> parse("kernels-community/activation@1:SiluAndMul")
    Requirement(name='kernels-community/activation', source='hub', version=1, revision=None, constraints=None, layer='SiluAndMul', paged=False)

    Raises:
        SpecError: it is not a spec; the caret is under what does not belong.
    """
    return _Reader(text).requirement(default_source)


def matching(constraints: str, tags: Iterable[str], branches: Iterable[str]) -> str | None:
    """The highest tag `vX.Y.Z` that `constraints` allow, else the highest branch `vN`, else None.

    Pre-releases count only where the constraints name one. A branch `vN` is version `N`. Of equal versions, the longer
    text: `v2.1.0` rather than `v2.1`.

    Raises:
        SpecError: the constraints do not parse.
    """
    try:
        allowed = SpecifierSet(constraints)
    except InvalidSpecifier as e:
        raise SpecError("these are not version constraints", text=constraints, span=(0, len(constraints))) from e
    for names, form in ((tags, _TAG), (branches, _BRANCH)):
        found = [(v, len(name), name) for name in names if (v := _version(form, name)) is not None]
        fit = [item for item in found if allowed.contains(item[0], prereleases=bool(allowed.prereleases))]
        if fit:
            return max(fit)[2]
    return None


def _version(form: re.Pattern[str], name: str) -> Version | None:
    match = form.fullmatch(name)
    return Version(match[1]) if match is not None else None


class _Reader:
    """One text being read; the cursor is `at`, so that every complaint can point."""

    def __init__(self, text: str) -> None:
        # Same length, so that spans hold: a newline or a tab would move the caret.
        self.shown = "".join(c if c.isprintable() else "\ufffd" for c in text)
        self.text = text
        self.at = 0

    def fail(self, found: str, start: int, end: int, todo: str | None = None) -> SpecError:
        return SpecError(found, text=self.shown, span=(start, max(end, start + 1)), todo=todo)

    def requirement(self, default_source: str) -> Requirement:
        text, end = self.text, len(self.text)
        if not text.strip():
            raise self.fail(f"nothing was asked for, expected `{GRAMMAR}`", 0, end)
        if end > _MAX_TEXT:
            self.shown = self.shown[:60] + "..."
            raise self.fail(f"{end} characters, at most {_MAX_TEXT} are read", 60, 63)
        if (bad := re.search(r"^\s+|\s+$|[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]", text)) is not None:
            raise self.fail("unexpected space or control character", *bad.span(), "remove it")
        paged = text.startswith(_PAGED)
        self.at = len(_PAGED) if paged else 0
        source = self.source(default_source)
        name_end, at_end = self.cut(source)
        name = self.name(source, name_end)
        if name.startswith(BUNDLED) and not text.startswith("hub://", len(_PAGED) if paged else 0) and source == "hub":
            source, name = "bundled", name.removeprefix(BUNDLED)
        version, revision, constraints = self.asked(name_end, at_end)
        return Requirement(
            name=name,
            source=source,
            version=version,
            revision=revision,
            constraints=constraints,
            layer=self.layer(at_end),
            paged=paged,
            text=text,
        )

    def source(self, default: str) -> str:
        rest = self.text[self.at :]
        match = _SCHEME.match(rest)
        if match is None:
            return "dir" if _PATH.match(rest) else default
        written, start = match[1], self.at
        self.at += match.end()
        if written in SOURCES:
            return written
        if written in {"http", "https"}:
            parts = [p for p in re.split(r"[/?#]", rest[match.end() :])[1:] if p and p != "kernels"]
            hint = "/".join(parts[:2]) if len(parts) > 1 else "org/name"
            raise self.fail("this is a URL, a kernel is named without its site", start, self.at, f"write `{hint}`")
        near = difflib.get_close_matches(written.lower(), SOURCES, n=1)
        todo = f"did you mean `{near[0]}://`?" if near else f"known: {', '.join(f'{s}://' for s in SOURCES)}"
        raise self.fail(f"there is no source `{written}`", start, self.at - 3, todo)

    def cut(self, source: str) -> tuple[int, int]:
        """Where the name ends, and where the version ends."""
        tail = self.at
        if source == "dir":
            if re.match(r"[A-Za-z]:[\\/]", self.text[self.at :]):
                tail += 2
            tail += max((m.end() for m in _SEPARATOR.finditer(self.text[tail:])), default=0)
        colon = self.text.find(":", tail)
        at_end = colon if colon >= 0 else len(self.text)
        at = self.text.find("@", tail, at_end)
        return (at if at >= 0 else at_end), at_end

    def name(self, source: str, end: int) -> str:
        start, name = self.at, self.text[self.at : end]
        if not name:
            raise self.fail(f"the name is missing, expected `{GRAMMAR}`", start, start + 1)
        if source == "dir":
            return name
        if (bad := re.search(r"[^A-Za-z0-9._/-]+", name)) is not None:
            todo = "a directory is written `dir://PATH`, `/PATH` or `./PATH`" if "\\" in bad[0] else None
            raise self.fail("this does not belong in a name", start + bad.start(), start + bad.end(), todo)
        parts = name.split("/")
        wanted = 2 if source == "hub" else 1
        if len(parts) > wanted:
            extra = start + len("/".join(parts[:wanted]))
            todo = "a revision is written `@REVISION`, a layer `:Layer`, a directory `dir://PATH`"
            shape = "`org/name`, with one slash" if source == "hub" else "one word"
            raise self.fail(f"a {source} name is {shape}", extra, end, todo)
        if len(parts) < wanted:
            todo = f"write `org/{name}`, or `{BUNDLED}{name}` for a bundled kernel"
            raise self.fail("a hub name is `org/name`, here one half is missing", start, end, todo)
        for part in parts:
            self.part(part, start)
            start += len(part) + 1
        return name

    def part(self, part: str, start: int) -> None:
        """One half of a name: what the hub allows."""
        if not part:
            raise self.fail("one half of the name is empty", start, start + 1)
        if (bad := re.search(r"--|\.\.", part)) is not None:
            raise self.fail(f"`{bad[0]}` is not allowed in a name", start + bad.start(), start + bad.end())
        if (bad := re.search(r"^[-.]|[-.]$|\.git$", part)) is not None:
            raise self.fail(f"a name does not begin or end with `{bad[0]}`", start + bad.start(), start + bad.end())
        if len(part) > 96:
            raise self.fail("a name has at most 96 characters", start + 96, start + len(part))

    def asked(self, start: int, end: int) -> tuple[int | None, str | None, str | None]:
        """What stands between `@` and `:` as (version, revision, constraints)."""
        if start == end:
            return None, None, None
        start += 1
        at = self.text[start:end]
        if not at:
            raise self.fail(
                "the version after `@` is empty", start - 1, start, "write `@1`, `@>=2.0,<3.0`, a tag, or leave `@` out"
            )
        if (twice := at.find("@")) >= 0:
            raise self.fail(
                "a second `@`", start + twice, start + twice + 1, "one version; several constraints are joined by `,`"
            )
        if (space := re.search(r"\s+", at)) is not None:
            raise self.fail("unexpected space", start + space.start(), start + space.end(), "remove it")
        if at[0] in "<>=!~":
            return None, None, self.constraints(at, start)
        if at.isascii() and at.isdecimal() and len(at) not in {40, 64}:
            if len(at) > 9 or (at[0] == "0" and at != "0"):
                todo = "an API version is `0`, `1`, `2`, ...; a commit has 40 or 64 digits"
                raise self.fail("this is no API version", start, end, todo)
            return int(at), None, None
        self.revision(at, start)
        return None, at, None

    def constraints(self, at: str, start: int) -> str:
        for clause in at.split(","):
            problem = not clause or clause.startswith("===")  # `===` compares text, and takes any text
            try:
                SpecifierSet(clause)
            except InvalidSpecifier:
                problem = True
            if problem:
                todo = "a clause is one of `== != <= >= < > ~=` and a version: `>=2.0,<3.0`"
                raise self.fail("this is no version constraint", start, start + len(clause), todo)
            start += len(clause) + 1
        return at

    def revision(self, at: str, start: int) -> None:
        bad = _NOT_IN_A_REF.search(at) or re.search(r"^[-/.]|[/.]$", at)
        if bad is not None:
            raise self.fail("no branch, tag or commit can contain this", start + bad.start(), start + bad.end())
        clause = re.search(r"[<>=!,]", at)  # git would allow these; a forgotten operator is what they mean here
        if clause is not None:
            todo = f"constraints begin with an operator: `@>={at[: clause.start()]}`" if clause.start() else None
            raise self.fail("neither a revision nor constraints", start + clause.start(), start + clause.end(), todo)

    def layer(self, start: int) -> str | None:
        if start == len(self.text):
            return None
        start += 1
        layer, end = self.text[start:], len(self.text)
        if not layer:
            raise self.fail("the layer after `:` is empty", start - 1, start, "name a layer, or leave `:` out")
        if (late := layer.find("@")) >= 0:
            todo = f"write `@{layer[late + 1 :]}:{layer[:late]}`" if late else None
            raise self.fail("the version comes before the layer", start + late, end, todo)
        if (more := layer.find(":")) >= 0:
            raise self.fail("a second `:`", start + more, end, "one layer; one inside another is written `outer.Inner`")
        if re.fullmatch(r"v?[0-9][0-9.]*", layer):
            todo = f"a version is written `@{layer}`, a range `@>={layer.lstrip('v')}`"
            raise self.fail("this is no layer, a version follows `@`", start, end, todo)
        for part in layer.split("."):
            if not (part.isascii() and part.isidentifier()):
                bad = re.search(r"[^A-Za-z0-9_]|^[0-9]", part)
                at = start + (bad.start() if bad else 0)
                raise self.fail("a layer is a Python name", at, at + (1 if part else 0))
            if part.startswith("__") and part.endswith("__"):
                raise self.fail("names that belong to Python itself are no layers", start, start + len(part))
            start += len(part) + 1
        return layer
