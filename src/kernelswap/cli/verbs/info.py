"""`kernelswap info`: what a kernel says about itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import NoVariant
from .. import session
from ..output import Answer, plain

PANEL = "Kernels"


def command(
    kernel: Annotated[str, typer.Argument(help="[source://]name[@version], or a directory.", metavar="KERNEL")],
    version: Annotated[str | None, typer.Option("--version", help="As in `name@version`.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.")] = None,
    cache: session.Cache = None,
    offline: session.Offline = False,
) -> Answer:
    """Say what the metadata of a kernel says: name, version, license, source, what it depends on, its backends and builds."""
    from ... import metadata as metadata_file
    from ... import spec as specs
    from ...compat.loading import local_spec, spec_of
    from ...compat.values import Metadata

    local = Path(kernel).is_dir() and "://" not in kernel
    text = local_spec(kernel) if local else spec_of(kernel, revision, version)
    swapper = session.swapper(cache=cache, offline=offline)
    found = swapper.find(text)
    if not found.judged:
        raise NoVariant("it has no builds", asked=f"looking for {text}")
    shown = found.chosen or found.judged[0].candidate
    data = swapper.sources[specs.parse(text).source].read(shown, "metadata.json")
    about = Metadata.of(metadata_file.parse(data or b"{}", package=shown.name, path_hint=shown.variant))
    facts: dict[str, Any] = {
        **({"path": str(Path(kernel).absolute())} if local else {"repo_id": shown.name, "revision": shown.commit}),
        "name": about.name,
        "version": about.version,
        "kernels_minver": about.kernels_minver,
        "license": about.license,
        "upstream": about.upstream,
        "source": about.source,
        "python_depends": list(about.python_depends),
        "backends": [about.backend.backend_type],
        "builds": [j.candidate.variant for j in found.judged],
        "fits": found.chosen.variant if found.chosen else None,
    }
    lines = [f"{key}: {', '.join(v) if isinstance(v, list) else v}" for key, v in facts.items() if v not in (None, [])]
    return Answer(facts, plain("\n".join(lines)))
