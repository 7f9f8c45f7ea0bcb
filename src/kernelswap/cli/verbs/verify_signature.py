"""`kernelswap verify-signature`: who signed the builds of a kernel, and whether the files are those that were signed."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import Refused
from .. import exits, session
from ..output import Answer, plain

PANEL = "Kernels"


def command(
    name: Annotated[str, typer.Argument(help="[source://]name[@version]", metavar="NAME")],
    version: Annotated[str | None, typer.Argument(help="As in `name@version`.", metavar="[VERSION]")] = None,
    all_variants: Annotated[bool, typer.Option("--all-variants", help="Every build, not only the one that runs here.")] = False,
    filter_unsigned: Annotated[bool, typer.Option("--filter-unsigned", help="Leave out builds without a signature.")] = False,
    filter_no_digest: Annotated[bool, typer.Option("--filter-no-digest", help="Leave out builds without digests.")] = False,
    cache: session.Cache = None,
) -> Answer:
    """Verify the signature of a kernel's metadata, and every file against the digests in it. Nothing is imported or kept.

    Exit code 1: a build is not signed, or not by a known workflow, or its files are others.
    """
    from ... import metadata as metadata_file
    from ... import policy as policies
    from ... import spec as specs
    from ...compat.loading import spec_of
    from ...verifiers.digest import DigestVerifier
    from ...verifiers.signature import SignatureVerifier

    text = spec_of(name, None, version)
    swapper = session.swapper(cache=cache)
    source, found = swapper.sources[specs.parse(text).source], swapper.find(text)
    fits = [found.chosen] if found.chosen is not None else []
    verifiers = (DigestVerifier(), SignatureVerifier(replace(policies.DEFAULT, require_signature=True)))
    rows: list[dict[str, Any]] = []
    for candidate in [j.candidate for j in found.judged] if all_variants else fits:
        with tempfile.TemporaryDirectory() as folder:
            staged = Path(folder)
            source.fetch(candidate, staged)
            data = source.read(candidate, "metadata.json") or b"{}"
            about = metadata_file.parse(data, package=candidate.name, path_hint=f"{candidate.commit}/{candidate.variant}")
            signed = (staged / "metadata.json.sigstore").is_file()
            if (filter_unsigned and not signed) or (filter_no_digest and about.digest is None):
                continue
            wrong, evidence = [], []
            for verifier in verifiers:
                try:
                    evidence.append(verifier.check(candidate, about, staged).statement)
                except Refused as e:  # noqa: PERF203  # two verifiers
                    wrong.append(e.found)
            rows.append({"variant": candidate.variant, "signed": signed, "wrong": wrong, "evidence": evidence})
    bad = sum(bool(row["wrong"]) for row in rows)
    lines = [f"{'WRONG' if r['wrong'] else 'ok   '} {r['variant']}: {'; '.join(r['wrong'] or r['evidence'])}" for r in rows]
    done = Answer({"spec": text, "builds": rows, "wrong": bad}, plain("\n".join(lines) or "no build was looked at"))
    return replace(done, code=exits.NO if bad or not rows else exits.OK)
