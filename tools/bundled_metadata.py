"""Write the digests of the builds that ship in the wheel: `python tools/bundled_metadata.py [--check]`.

Run it after changing a file below `src/kernelswap/bundled/*/build/`; `tests/bundled/test_shipped.py` fails until then.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from kernelswap import metadata

ROOT = Path(__file__).parents[1] / "src" / "kernelswap" / "bundled"


def fresh(build: Path) -> str:
    """The text of metadata.json with digests of the files as they are, and an id that changes with them."""
    data = json.loads((build / "metadata.json").read_text())
    files = metadata.digest_files(build)
    unique = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:7]
    data["id"] = f"_{data['name'].replace('-', '_')}_{build.name.removeprefix('torch-')}_{unique}"
    data["digest"] = {"algorithm": "sha256", "files": dict(sorted(files.items()))}
    return json.dumps(data, indent=1) + "\n"


def main() -> int:
    """Rewrite what is stale; with --check, only say so."""
    stale = [b for b in sorted(ROOT.glob("*/build/*")) if (b / "metadata.json").read_text() != fresh(b)]
    for build in stale:
        print(f"stale: {build.relative_to(ROOT)}")  # noqa: T201  # a script's output
        if "--check" not in sys.argv:
            (build / "metadata.json").write_text(fresh(build))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
