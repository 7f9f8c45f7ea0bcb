"""Is the publisher one that may be loaded from? Asks the hub once per organisation, and remembers what it said.

The memory is what makes a machine without network decide as it did with one: an organisation that was never asked about
is not trusted there, and the reason given is the network, not the organisation.
"""

from __future__ import annotations

import contextlib
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from .. import policy as policies
from ..errors import NotCached, Refused, Unreachable
from ..policy import Policy
from ..types import Candidate, Evidence, Metadata

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True, slots=True)
class Publishers:
    """The hub's trusted-publisher flag per organisation, with a memory on disk."""

    memory: Path
    """A directory, one small file per organisation; need not exist, need not be writable."""
    ask: Callable[[str], bool] | None = field(default=None, repr=False)
    """Asks the hub about one organisation; raises Unreachable or NotCached when it cannot. `None`: never asked."""
    told: Mapping[str, bool] = field(default_factory=dict)
    """What a bundle says that the hub said: where we neither know nor can ask. Not remembered."""

    def trusted(self, publisher: str, *, afresh: bool) -> tuple[bool, str]:
        """What the hub says, and since when we know. With `afresh` a yes is asked for again, unless the hub is silent.

        Raises:
            Unreachable: it cannot be asked, and never was.
        """
        if not _NAME.fullmatch(publisher):
            return False, "not the name of a publisher"
        known = self._known(publisher)
        if known is not None and known[0] and not afresh:
            return known
        if self.ask is not None:
            try:
                answer = bool(self.ask(publisher))
            except (Unreachable, NotCached) as e:
                if known is None and publisher not in self.told:
                    raise _silent(publisher, e.reason) from e
            else:
                with contextlib.suppress(OSError):  # a read-only cache remembers nothing, and is asked again
                    self._remember(publisher, trusted=answer)
                return answer, "asked now"
        if known is not None:
            return known
        if publisher in self.told:
            return self.told[publisher], "says the bundle"
        raise _silent(publisher, "no hub is asked here")

    def _path(self, publisher: str) -> Path:
        return self.memory / f"{publisher}.json"

    def _known(self, publisher: str) -> tuple[bool, str] | None:
        try:
            found = json.loads(self._path(publisher).read_bytes())
            if found["publisher"] == publisher and isinstance(found["trusted"], bool):  # file names may not know case
                return found["trusted"], f"remembered from {str(found['asked'])[:10]}"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass  # as good as never asked
        return None

    def _remember(self, publisher: str, *, trusted: bool) -> None:
        self.memory.mkdir(parents=True, exist_ok=True)
        asked = datetime.now(timezone.utc).isoformat(timespec="seconds")
        temporary = self.memory / f".{uuid.uuid4().hex}"
        temporary.write_text(json.dumps({"publisher": publisher, "trusted": trusted, "asked": asked}), encoding="utf-8")
        temporary.replace(self._path(publisher))


@dataclass(frozen=True, slots=True)
class PublisherVerifier:
    """May be loaded: what the policy names, what this call vouches for, and whom the hub trusts, as far as the policy says."""

    publishers: Publishers
    policy: Policy = policies.DEFAULT
    trust: bool | Sequence[str] = False
    """The call's own word: True for whatever it asks for, or a list of `org/kernel` and `org`."""

    def precheck(self, candidate: Candidate, metadata: Metadata) -> None:  # noqa: ARG002  # the verifiers' signature
        """Before anything is fetched, with the hub's answer of now.

        Raises:
            Refused: nobody vouches for the publisher.
            Unreachable: the hub would have to be asked, cannot be, and never was.
        """
        self._decide(candidate, afresh=True)

    def check(self, candidate: Candidate, metadata: Metadata, staged: Path) -> Evidence:  # noqa: ARG002
        """With the hub's answer of then, if it was yes.

        Raises:
            Refused, Unreachable: as `precheck`.
        """
        return Evidence("publisher", self._decide(candidate, afresh=False))

    def _decide(self, candidate: Candidate, *, afresh: bool) -> str:
        name, allowed = candidate.name, self.policy.publishers
        if candidate.source in policies.LOCAL_SOURCES:
            return "on this machine already; nobody publishes it"
        if candidate.source == "bundle" and candidate.requirement.source == "bundled":
            return "compiled from sources that come with kernelswap, says the bundle"
        if policies.names(tuple(p for p in allowed if p not in {policies.TRUSTED, policies.NAMED}), name):
            return f"named by {self.policy.origin('publishers')}"
        vouched = self.trust if isinstance(self.trust, bool) else policies.names(_listed(self.trust), name)
        if vouched and policies.NAMED in allowed:
            return "vouched for by the call"
        publisher = name.partition("/")[0]
        if policies.TRUSTED in allowed:
            trusted, since = self.publishers.trusted(publisher, afresh=afresh)
            if trusted:
                return f"{publisher} is a trusted publisher of the hub ({since})"
            reason = f"{publisher} is not a trusted publisher of the hub ({since})"
        else:
            reason = (
                f"{publisher} is not among the publishers of {self.policy.origin('publishers')}: {', '.join(allowed) or 'none'}"
            )
        if vouched:
            reason += f"; the call vouches for it, which {self.policy.origin('publishers')} does not accept"
        raise Refused(reason, todo="nothing of it was loaded; name a kernel whose publisher is trusted")


def _listed(trust: Sequence[str]) -> tuple[str, ...]:
    return (trust,) if isinstance(trust, str) else tuple(trust)  # a lone string is one name, not its letters


def _silent(publisher: str, why: str) -> Unreachable:
    return Unreachable(
        f"whether {publisher} is a trusted publisher is not known here: {why}",
        todo="Load it once where the hub can be reached; the answer is remembered.",
    )
