"""Verify `metadata.json.sigstore`: who signed the metadata, without a network. The digests in it then cover the files.

Needs the package `sigstore` (`pip install kernelswap[sign]`), whose bundled trust root is used as it is: a machine without
network verifies what was signed until that release.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import policy as policies
from ..errors import MissingDependency, Refused
from ..policy import Policy, Signer
from ..types import Candidate, Evidence, Metadata

_METADATA = "metadata.json"
_BUNDLE = "metadata.json.sigstore"
_MAX_BUNDLE = 1 << 20  # real ones have a few kilobytes


@functools.cache
def _production() -> Any:
    from importlib import resources

    from sigstore.models import TrustedRoot
    from sigstore.verify import Verifier as Sigstore

    # The root inside the package, not `production(offline=True)`: that one trusts, unverified, a file in the user's cache.
    bundled = resources.files("sigstore._store") / "https%3A%2F%2Ftuf-repo-cdn.sigstore.dev" / "trusted_root.json"
    with resources.as_file(bundled) as path:
        return Sigstore(trusted_root=TrustedRoot.from_file(str(path)))


@dataclass(frozen=True, slots=True)
class SignatureVerifier:
    """The build is signed by one of the policy's signers. Says nothing, and needs nothing, unless the policy asks."""

    policy: Policy = policies.DEFAULT
    root: Callable[[], Any] = field(default=_production, repr=False)
    """Makes a `sigstore.verify.Verifier`; the default trusts the public instance."""

    def check(self, candidate: Candidate, metadata: Metadata, staged: Path) -> Evidence:
        """Raises:
        Refused: not signed, not by one of the signers, or the signature covers no file.
        MissingDependency: the policy asks, and `sigstore` is not installed.
        """
        asked = self.policy.origin("require_signature")
        if not self.policy.require_signature:
            return Evidence("signature", "not asked for")
        if candidate.source == "bundled":
            return Evidence("signature", "comes with this package")
        bundle = self._bundle(staged, asked)
        try:
            data = (staged / _METADATA).read_bytes()
        except FileNotFoundError as e:
            raise Refused(f"{_METADATA} is missing, so nothing of it can be signed") from e
        self._verify(data, bundle)
        if metadata.digest is None:
            raise Refused(f"{_METADATA} is signed, but lists no digests, so the signature covers no other file")
        signers = ", ".join(signer.repository for signer in self.policy.signers)
        return Evidence("signature", f"{_METADATA} is signed by a workflow of {signers}")

    def _bundle(self, staged: Path, asked: str) -> Any:
        try:
            from sigstore.errors import Error
            from sigstore.models import Bundle
        except ImportError as e:
            raise MissingDependency(
                f"{asked} requires signatures, and the package sigstore is not installed", todo="pip install 'kernelswap[sign]'"
            ) from e
        try:
            with (staged / _BUNDLE).open("rb") as file:
                text = file.read(_MAX_BUNDLE + 1)
        except FileNotFoundError as e:
            raise Refused(f"it is not signed ({_BUNDLE} is missing), and {asked} requires signatures") from e
        if len(text) > _MAX_BUNDLE:
            raise Refused(f"{_BUNDLE} is larger than {_MAX_BUNDLE} bytes")
        try:
            return Bundle.from_json(text)
        except (Error, ValueError, TypeError, KeyError, RecursionError) as e:
            raise Refused(f"{_BUNDLE} is not a Sigstore bundle: {_first_line(e)}") from e

    def _verify(self, data: bytes, bundle: Any) -> None:
        from sigstore.errors import Error

        try:
            self.root().verify_artifact(data, bundle, _identity(self.policy.signers))
        except (Error, ValueError) as e:
            raise Refused(f"the signature of {_METADATA} is not accepted: {_first_line(e)}") from e


def _identity(signers: tuple[Signer, ...]) -> Any:
    from sigstore.verify import policy

    return policy.AnyOf(
        [
            policy.AllOf(
                [
                    policy.OIDCIssuer(signer.issuer),
                    policy.OIDCIssuerV2(signer.issuer),
                    policy.OIDCSourceRepositoryURI(signer.repository),
                    policy.AnyOf([policy.OIDCBuildSignerURI(workflow) for workflow in signer.workflows]),
                ]
            )
            for signer in signers
        ]
    )


def _first_line(e: BaseException) -> str:
    return next(iter(str(e).splitlines()), "") or type(e).__name__
