"""The rules of `Mode`: which combinations mean something, and in which order registered ones are tried. Pure."""

from __future__ import annotations

from .errors import ModeError
from .types import Mode, Run

_I, _T, _C, _F = Mode.INFERENCE, Mode.TRAINING, Mode.TORCH_COMPILE, Mode.FALLBACK

# A kernel that can do more than is asked serves; one that can do less never does.
_ORDER: dict[Mode, tuple[Mode, ...]] = {
    _I: (_I, _I | _C, _T, _T | _C, _F),
    _T: (_T, _T | _C, _F),
    _I | _C: (_I | _C, _T | _C, _F),
    _T | _C: (_T | _C, _F),
}


def check(mode: Mode) -> Mode:
    """Return `mode`, a combination under which a kernel may be registered.

    Raises:
        ModeError: it is no Mode, empty, `INFERENCE | TRAINING`, or `FALLBACK` with anything.
    """
    if not isinstance(mode, Mode):
        raise ModeError(f"{mode!r} is not a mode", todo="use Mode.INFERENCE or Mode.TRAINING, or with `| Mode.TORCH_COMPILE`")
    if not mode:
        raise ModeError("an empty mode means nothing", todo="use Mode.INFERENCE or Mode.TRAINING")
    return mode.checked()


def wanted(mode: Mode) -> Mode:
    """Return `mode`, one that a model can be kernelized for: INFERENCE or TRAINING, each with or without TORCH_COMPILE.

    Raises:
        ModeError: anything else.
    """
    if check(mode) not in _ORDER:
        raise ModeError(
            f"{name(mode)} does not say whether the model infers or trains",
            todo="use Mode.INFERENCE or Mode.TRAINING, with or without `| Mode.TORCH_COMPILE`",
        )
    return mode


def order(mode: Mode) -> tuple[Mode, ...]:
    """The registered modes that can serve `mode`, best first.

    Raises:
        ModeError: as `wanted`.
    """
    return _ORDER[wanted(mode)]


def from_run(run: Run) -> Mode:
    """The mode that `run` asks for."""
    return (_T if run.training else _I) | (_C if run.compiled else Mode(0))


def to_run(mode: Mode) -> Run:
    """What a module does in `mode`.

    Raises:
        ModeError: as `wanted`.
    """
    return Run(training=_T in wanted(mode), compiled=_C in mode)


def name(mode: Mode) -> str:
    """`TRAINING | TORCH_COMPILE`: the same text on every Python version, unlike `str()`."""
    return " | ".join(m.name or "" for m in (_F, _I, _T, _C) if m in mode) or "no mode"
