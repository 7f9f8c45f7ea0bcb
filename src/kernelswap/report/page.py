"""The report as one HTML file: no network, no file beside it. Rendered by Jinja from `page.html`, `page.css`, `page.js`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import render
from ..errors import MissingDependency
from . import plots
from . import text as words

HERE = Path(__file__).parent


def page(facts: Mapping[str, Any]) -> str:
    """`facts` (of `facts.facts`) as HTML.

    Raises:
        MissingDependency: Jinja or matplotlib is not installed.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401, ICN001  # `plots` draws with it
    except ModuleNotFoundError as e:
        raise MissingDependency(f"the page needs {e.name}, which is not installed", todo="pip install 'kernelswap[cli]'") from e
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters: dict[str, Any] = {
        "seconds": render.seconds,
        "error": words.error,
        "share": words.share,
        "count": words.count,
        "short": render.short,
        "plain": words.value,
    }
    environment.filters.update(filters)
    pictures = {
        name: plots.both(draw, facts, name)
        for name, draw in (("errors", plots.errors), ("speeds", plots.speeds), ("time", plots.time))
    }
    return environment.get_template("page.html").render(
        facts=facts,
        headline=words.headline(facts),
        tiles=words.tiles(facts),
        phases=words.phases(facts),
        locked=words.lock_line(facts["lock"]),
        steps=words.graphs(facts["graphs"]) if facts["graphs"] is not None else [],
        speed_of=words.speed_of(facts),
        pictures=pictures,
        most=plots.MOST,
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        data=_inline(facts),
    )


def _inline(facts: Mapping[str, Any]) -> str:
    """JSON that may stand inside a script element: no `<` can end it, whatever a module is called."""
    text = json.dumps(facts, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
