"""What may be loaded here: a policy file's text to a value. Pure.

    [policy]                                  # in kernelswap.toml; [tool.kernelswap.policy] in pyproject.toml
    sources    = ["bundled", "dir", "local", "installed", "hub", "folder", "bundle"]
    publishers = ["trusted", "named", "my-org", "other-org/one-kernel"]
    digests    = ["<sha256 of a tree, hex>"]  # these artifacts and no others
    require_digest    = false                 # the build must publish digests of its files
    require_signature = false                 # metadata.json must be signed by one of `signers`
    signers = ["kernels-community", {issuer = "https://...", repository = "https://...", workflows = ["https://..."]}]
    no_native_code    = false                 # Python and Triton source only
    locked_only       = false                 # only what the lock names

Of `publishers`, `trusted` stands for those whom the hub calls trusted, and `named` for a kernel that the call itself
vouches for (`trust=`). A project's file goes over the user's, key by key, and that over the defaults.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .errors import TableError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TRUSTED, NAMED = "trusted", "named"
LOCAL_SOURCES = ("bundled", "dir", "local", "installed")
"""Sources of what is on this machine already, by the user's own hand: nobody publishes it."""

_SOURCE = re.compile(r"[a-z][a-z0-9+_-]{0,31}")
_PUBLISHER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_DIGEST = re.compile(r"(?:sha256:)?[0-9a-f]{64}")
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Signer:
    """An identity in a signing certificate. All three hold; of `workflows` one is enough."""

    issuer: str
    """Who vouches for the identity (OIDC issuer)."""
    repository: str
    """Source repository URI."""
    workflows: tuple[str, ...]
    """Build signer URIs, with their ref."""


_COMMUNITY = "https://github.com/huggingface/kernels-community"
KERNELS_COMMUNITY = Signer(
    issuer="https://token.actions.githubusercontent.com",
    repository=_COMMUNITY,
    workflows=tuple(
        f"{_COMMUNITY}/.github/workflows/{name}.yaml@refs/heads/main"
        for name in ("build", "build-mac", "build-windows", "sign-old-builds")
    ),
)
"""Who signs the community's kernels."""
_KNOWN_SIGNERS = {"kernels-community": KERNELS_COMMUNITY}


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be loaded. The default is everything that is on this machine already, and what the hub or the call vouches for."""

    sources: tuple[str, ...] = (*LOCAL_SOURCES, "hub", "folder", "bundle")
    publishers: tuple[str, ...] = (TRUSTED, NAMED)
    digests: tuple[str, ...] = ()
    """Hex sha256 of trees; empty: any."""
    require_digest: bool = False
    require_signature: bool = False
    signers: tuple[Signer, ...] = (KERNELS_COMMUNITY,)
    no_native_code: bool = False
    locked_only: bool = False
    origins: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    """`(key, file)` for every key that a file set."""

    def origin(self, key: str) -> str:
        """Who says so, for messages."""
        return dict(self.origins).get(key, "the default policy")


DEFAULT = Policy()
_KEYS = tuple(f.name for f in fields(Policy) if f.name != "origins")


@dataclass(frozen=True, slots=True)
class Settings:
    """The keys that one file sets."""

    where: str
    values: tuple[tuple[str, Any], ...] = ()


def parse(text: str, *, where: str) -> Settings:
    """The policy in a `kernelswap.toml`, or in a `pyproject.toml` if that is how `where` ends; other tables are not looked at.

    Raises:
        TableError: every problem at once, one a line.
    """
    if len(text) > _MAX_BYTES:
        raise TableError(f"{where}: {len(text)} characters, at most {_MAX_BYTES} are read")
    try:
        root: Any = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise TableError(f"{where}: not TOML: {e or 'nested too deeply'}") from e
    path = ("tool", "kernelswap", "policy") if where.replace("\\", "/").rpartition("/")[2] == "pyproject.toml" else ("policy",)
    for key in path:
        root = root.get(key, {})
        if not isinstance(root, dict):
            raise TableError(f"{where}: [{'.'.join(path)}]: {key} is not a table")
    problems: list[str] = []
    values = {}
    for key, value in root.items():
        reader = _READERS.get(key)
        if reader is None:
            close = difflib.get_close_matches(key.replace("-", "_"), _KEYS, n=1)
            problems.append(
                f"unknown key {key!a}" + (f", did you mean {close[0]}?" if close else f"; there are {', '.join(_KEYS)}")
            )
            continue
        try:
            values[key] = reader(value)
        except ValueError as e:
            problems.append(f"{key}: {e}")
    if problems:
        raise TableError("\n".join(f"{where}: [{'.'.join(path)}] {p}" for p in problems))
    return Settings(where, tuple(values.items()))


def combine(*settings: Settings | None) -> Policy:
    """The policy of several files, the first over the second, over the defaults."""
    policy = DEFAULT
    for one in reversed(settings):
        if one is not None:
            origins = {**dict(policy.origins), **{key: one.where for key, _ in one.values}}
            policy = replace(policy, **dict(one.values), origins=tuple(origins.items()))
    return policy


def names(patterns: tuple[str, ...], name: str) -> bool:
    """Whether `org/kernel` is in a list of `org` and `org/kernel`. No globs: `a*` would name publishers yet unborn."""
    return name in patterns or name.partition("/")[0] in patterns


# -- one reader per key; they raise ValueError with what is wrong -----------------------------------------------------


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, found {value!r:.60}")  # noqa: TRY004  # one kind of error for the caller above
    return value


def _strings(pattern: re.Pattern[str], wanted: str) -> Callable[[object], tuple[str, ...]]:
    def read(value: object) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"expected a list of strings, found {value!r:.60}")
        wrong = [item for item in value if not pattern.fullmatch(item)]
        if wrong:
            raise ValueError(f"{', '.join(ascii(item)[:80] for item in wrong)}: expected {wanted}")
        return tuple(value)

    return read


def _digests(value: object) -> tuple[str, ...]:
    return tuple(item.removeprefix("sha256:") for item in _strings(_DIGEST, "64 hex digits")(value))


def _signers(value: object) -> tuple[Signer, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("expected a list of at least one signer")
    return tuple(_signer(item) for item in value)


def _signer(value: object) -> Signer:
    if isinstance(value, str):
        if value not in _KNOWN_SIGNERS:
            raise ValueError(f"{ascii(value)[:80]} is no known signer; there is {', '.join(_KNOWN_SIGNERS)}, or a table")
        return _KNOWN_SIGNERS[value]
    if not isinstance(value, dict) or set(value) != {"issuer", "repository", "workflows"}:
        raise ValueError("a signer is a table of issuer, repository and workflows")
    workflows = value["workflows"]
    urls = [value["issuer"], value["repository"], *(workflows if isinstance(workflows, list) else [None])]
    if not workflows or not all(isinstance(url, str) and url.startswith("https://") for url in urls):
        raise ValueError("issuer, repository and every one of workflows begin with https://")
    return Signer(value["issuer"], value["repository"], tuple(workflows))


_READERS: Mapping[str, Callable[[object], Any]] = {
    "sources": _strings(_SOURCE, "names of sources, such as hub or dir"),
    "publishers": _strings(_PUBLISHER, "`trusted`, `named`, an organisation, or one of its kernels (org/kernel)"),
    "digests": _digests,
    "require_digest": _boolean,
    "require_signature": _boolean,
    "signers": _signers,
    "no_native_code": _boolean,
    "locked_only": _boolean,
}
