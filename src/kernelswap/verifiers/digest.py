"""Compare the files with the digests that the build publishes about itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .. import metadata as metadata_file
from ..errors import BadMetadata, Refused
from ..types import Candidate, Evidence, Metadata

_SHOWN = 20
_METADATA = "metadata.json"


@dataclass(frozen=True, slots=True)
class DigestVerifier:
    """Every file is as listed, none is missing, none is extra. Also: the metadata is the one that was judged.

    Builds made before digests existed are accepted, and the evidence says so; a policy may ask for more.
    """

    def check(self, candidate: Candidate, metadata: Metadata, staged: Path) -> Evidence:
        """Raises:
        Refused: with every difference, one a line.
        """
        problems = _other_metadata(candidate, metadata, staged)
        if metadata.digest is not None:
            problems += metadata_file.compare(metadata.digest, staged)
        if problems:
            more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            raise Refused("\n".join(problems[:_SHOWN] + more))
        if metadata.digest is None:
            return Evidence("digest", "no digest published")
        return Evidence("digest", f"{len(metadata.digest.files)} files match their {metadata.digest.algorithm}")


def _other_metadata(candidate: Candidate, metadata: Metadata, staged: Path) -> list[str]:
    """The build was chosen by what its metadata said; the copy that arrived must say the same."""
    try:
        data = (staged / _METADATA).read_bytes()
    except FileNotFoundError:
        if "id" not in metadata.synthesised:
            return [f"{_METADATA} is missing"]
        data = b"{}"  # builds of the first era had none
    try:
        arrived = metadata_file.parse(data, package=candidate.name)
    except BadMetadata as e:
        return [f"{_METADATA}: {line}" for line in e.found.splitlines()]
    made_up = {key.replace("-", "_"): getattr(metadata, key.replace("-", "_")) for key in metadata.synthesised}
    if arrived.synthesised == metadata.synthesised and replace(arrived, **made_up) == metadata:
        return []
    return [f"{_METADATA} is not the one that this build was chosen by"]
