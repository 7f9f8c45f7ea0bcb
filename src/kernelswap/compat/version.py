"""Which release of `kernels` we say that we are: one that the installed Transformers accepts."""

from __future__ import annotations

import importlib.machinery
import re
from collections.abc import Mapping
from pathlib import Path

from packaging.version import Version

from ..resolve import LOADER

OWN = ".".join(map(str, LOADER))
"""The release whose formats are understood, which we are where nobody asks for another."""
_CONSTANT = re.compile(r"^KERNELS_(MIN|MAX)_VERSION\s*=\s*[\"']([^\"']+)[\"']", re.MULTILINE)


def served() -> str:
    """The version: `OWN` where the window of the installed Transformers includes it, else the window's lower end."""
    return inside(window())


def inside(limits: Mapping[str, str]) -> str:
    """`OWN`, or the nearest version with `MIN <= version < MAX`."""
    low, high = limits.get("MIN"), limits.get("MAX")
    if low is not None and Version(OWN) < Version(low):
        return low
    if high is not None and Version(OWN) >= Version(high):
        return low or OWN
    return OWN


def window() -> dict[str, str]:
    """`{"MIN": ..., "MAX": ...}` as the sources of the installed Transformers have them; it is not imported."""
    spec = importlib.machinery.PathFinder.find_spec("transformers")
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        file = Path(folder, "utils", "import_utils.py")
        if file.is_file():
            return dict(_CONSTANT.findall(file.read_text(encoding="utf-8", errors="replace")))
    return {}
