"""The one place where environment variables are read. Everything else gets an `Environment`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import TableError

DEFAULT_ENDPOINT = "https://huggingface.co"
_TRUE = {"1", "ON", "YES", "TRUE"}
_FALSE = {"", "0", "OFF", "NO", "FALSE"}
_JOB = (
    "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID",
)  # fmt: skip  # one glance is enough for a list of names
_ENTRY = re.compile(r"\s*([^=\s]+)\s*=\s*(\S.*?)\s*")
# `:` separates entries, except after a drive letter: `org/a=C:\x:org/b=D:\y`.
_BETWEEN = re.compile(r";|(?<![=;:][A-Za-z]):|:(?![\\/])")


@dataclass(frozen=True, slots=True)
class Environment:
    """What the environment says, once. The variables are those of the hub's tools; ours begin with KERNELSWAP_."""

    cache: Path
    """Our own store: KERNELSWAP_CACHE, else the platform's user cache directory."""
    hub_cache: Path
    """KERNELS_CACHE, HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE, `$HF_HOME/hub`, `$XDG_CACHE_HOME/huggingface/hub`, in this order."""
    endpoint: str = DEFAULT_ENDPOINT
    """HF_ENDPOINT, without a slash at the end."""
    offline: bool = False
    """HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE."""
    token: str | None = field(default=None, repr=False)
    """HF_TOKEN, unless HF_HUB_DISABLE_IMPLICIT_TOKEN. None leaves it to `huggingface_hub`, which also reads its token file."""
    timeout: float = 10.0
    """HF_HUB_ETAG_TIMEOUT: seconds that the hub may take to begin an answer."""
    telemetry: bool = True
    """Not HF_HUB_DISABLE_TELEMETRY, DISABLE_TELEMETRY or DO_NOT_TRACK."""
    local_kernels: tuple[tuple[str, Path], ...] = ()
    """LOCAL_KERNELS: (repository, directory that stands in for it)."""
    disabled: str | None = None
    """Why no kernel may be used at all (USE_HUB_KERNELS, DISABLE_KERNEL_MAPPING), or None."""
    sources: tuple[str, ...] = ()
    """KERNELSWAP_SOURCES: which sources to ask, in order, separated by spaces (see `configured.py`); empty: what the files say."""
    bundle: Path | None = None
    """KERNELSWAP_BUNDLE: one file that everything comes from."""
    job: tuple[tuple[str, str], ...] = ()
    """What a launcher calls the job of several processes that this is one of: (variable, value); empty for a process alone."""

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Environment:
        """Read a mapping such as `os.environ`. Looks at nothing else, but for the home directory.

        Raises:
            TableError: LOCAL_KERNELS or HF_HUB_ETAG_TIMEOUT does not parse; all problems at once.
        """
        problems: list[str] = []
        local = _local_kernels(environ.get("LOCAL_KERNELS", ""), problems)
        timeout = _seconds(environ, "HF_HUB_ETAG_TIMEOUT", 10.0, problems)
        if problems:
            raise TableError("\n".join(problems), asked="reading the environment")
        implicit = not _is_true(environ, "HF_HUB_DISABLE_IMPLICIT_TOKEN") and not environ.get("HF_OIDC_RESOURCE")
        return cls(
            cache=_own_cache(environ),
            hub_cache=_hub_cache(environ),
            endpoint=(environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/"),
            offline=_is_true(environ, "HF_HUB_OFFLINE") or _is_true(environ, "TRANSFORMERS_OFFLINE"),
            token=(environ.get("HF_TOKEN", "").strip() or None) if implicit else None,
            timeout=timeout,
            telemetry=not any(map(environ.get, ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"))),
            local_kernels=local,
            disabled=_disabled(environ),
            sources=tuple(environ.get("KERNELSWAP_SOURCES", "").split()),
            bundle=_path(environ["KERNELSWAP_BUNDLE"]) if environ.get("KERNELSWAP_BUNDLE") else None,
            job=_job(environ),
        )


def _is_true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").strip().upper() in _TRUE


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _own_cache(environ: Mapping[str, str]) -> Path:
    if named := environ.get("KERNELSWAP_CACHE"):
        return _path(named)
    import platformdirs

    return Path(platformdirs.user_cache_dir("kernelswap", appauthor=False))


def _hub_cache(environ: Mapping[str, str]) -> Path:
    for name in ("KERNELS_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if named := environ.get(name):
            return _path(named)
    if home := environ.get("HF_HOME"):
        return _path(home) / "hub"
    return _path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def _seconds(environ: Mapping[str, str], name: str, default: float, problems: list[str]) -> float:
    text = environ.get(name, "").strip()
    try:
        seconds = float(text or default)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 86_400:
        problems.append(f"{name} is {text!r}, expected seconds such as 10")
    return seconds


def _disabled(environ: Mapping[str, str]) -> str | None:
    use = environ.get("USE_HUB_KERNELS", "").strip().upper()
    if use and use not in _TRUE:
        return f"USE_HUB_KERNELS is {environ['USE_HUB_KERNELS']}"
    if environ.get("DISABLE_KERNEL_MAPPING", "").strip().upper() not in _FALSE:
        return f"DISABLE_KERNEL_MAPPING is {environ['DISABLE_KERNEL_MAPPING']}"
    return None


def _job(environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    several = re.fullmatch(r"\s*0*([2-9]|[1-9][0-9]+)\s*", environ.get("WORLD_SIZE", "")) is not None
    ranked = "RANK" in environ or "LOCAL_RANK" in environ
    return tuple((name, environ[name]) for name in _JOB if name in environ) if several and ranked else ()


def _local_kernels(text: str, problems: list[str]) -> tuple[tuple[str, Path], ...]:
    """`org/a=/path:org/b=C:\\path;org/c=~/path`. The first entry for a name counts, as the reference has it."""
    found: dict[str, Path] = {}
    for part in filter(None, (p.strip() for p in _BETWEEN.split(text))):
        if entry := _ENTRY.fullmatch(part):
            found.setdefault(entry[1], _path(entry[2]))
        else:
            problems.append(f"LOCAL_KERNELS: {part!r} is not repository=directory")
    return tuple(found.items())
