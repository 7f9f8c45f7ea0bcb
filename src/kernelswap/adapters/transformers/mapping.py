"""The forms of a KernelConfig's mapping to entries: what is named, and what may serve it. Pure; knows no model.

value = "org/repo:Layer"                              a kernel
      | ("org/repo:Layer", {"version": 3})            or "revision", and "trust_remote_code": bool or list of repositories
      | [value, value]                                the next is tried where one cannot serve
      | {"cuda": value, "metal": value}               by device, `cuda:sm90` and `rocm:gfx942` included
      | {Mode.TRAINING: value}                        by mode; or "training", "inference+compile"; inside devices or around them
      | "" | None                                     leave it alone
key   = "RMSNorm" | "LlamaAttention" | "attention" | "model.layers.0.*" | a tuple of such names, which is also written "A|B"
      | (("RMSNorm", "model.layers.*.norm"), ("MLP", "model.layers.*.mlp"))    several modules that one kernel replaces
"""

from __future__ import annotations

import difflib
import enum
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ... import mode as modes
from ... import spec
from ...errors import KernelSwapError
from ...types import Mode, Use

DEVICES = ("cuda", "rocm", "xpu", "npu", "mps", "metal", "neuron", "tpu", "cpu")
MODES: dict[str, Mode] = {
    "inference": Mode.INFERENCE,
    "training": Mode.TRAINING,
    "inference+compile": Mode.INFERENCE | Mode.TORCH_COMPILE,
    "training+compile": Mode.TRAINING | Mode.TORCH_COMPILE,
    "fallback": Mode.FALLBACK,
}
_ALIAS = {"metal": "mps", "cann": "npu"}
_DEVICE = re.compile(rf"({'|'.join(DEVICES)}|cann)(:sm[0-9]{{2,3}}\+?|:gfx[0-9a-f]+)?")
_META = ("version", "revision", "trust_remote_code")


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of the mapping with everything that may serve it, in order of preference."""

    names: tuple[str, ...]
    """Layers, classes, globs over module paths; all mean the same here."""
    uses: tuple[Use, ...] = ()
    off: bool = False
    """Leave it alone everywhere."""
    off_on: tuple[str, ...] = ()
    """Leave it alone on these devices."""
    trust: tuple[str, ...] = ()
    """Repositories that the entry vouches for."""
    fused: tuple[tuple[str, str], ...] = ()
    """`(layer, glob over paths)`, where one kernel takes the place of several modules."""


def read(mapping: object, *, local: bool) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """Entries and problems, one line for each. `local`: texts are `/path:Layer` instead of `org/repo:Layer`."""
    if not isinstance(mapping, Mapping):
        return (), (f"kernel_mapping is {type(mapping).__name__}, expected a dict such as {{'RMSNorm': 'org/repo:Layer'}}",)
    readers = [_Reader(key, value, local=local) for key, value in mapping.items()]
    return tuple(r.entry for r in readers), tuple(problem for r in readers for problem in r.problems)


def plain(value: Any) -> Any:
    """`value`, a mapping or a part of one, as what `json.dumps` takes; `read` understands that as well."""
    if isinstance(value, Mapping):
        return {_key_text(key): plain(one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(one) for one in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    repository = _repository(value)
    return value if repository is None else plain(repository)


def mode_of(value: object) -> Mode | None:
    """A Mode of ours from one of ours, a text, or another library's flags with the same names; `None` if it is none."""
    if isinstance(value, Mode):
        return value
    if isinstance(value, str):
        return MODES.get(re.sub(r"\s*[|+]\s*(?:torch_)?compile$", "+compile", value.strip().lower()))
    if isinstance(value, enum.Flag) and all(hasattr(type(value), m.name or "") for m in Mode):
        return Mode(sum(m.value for m in Mode if getattr(type(value), m.name or "") in value))
    return None


def _key_text(key: object) -> str:
    if isinstance(key, tuple):
        return "|".join("=".join(map(str, one)) if isinstance(one, tuple) else str(one) for one in key)
    found = mode_of(key) if isinstance(key, enum.Flag) else None
    if found is not None:
        return next((text for text, mode in MODES.items() if mode == found), modes.name(found))
    return str(getattr(key, "type", key))


def _repository(value: Any) -> Any:
    """`LayerRepository` and its like, of whichever library, as text and metadata."""
    layer = getattr(value, "layer_name", None) or getattr(value, "_layer_name", None)
    if not isinstance(layer, str):
        return None
    path, name = _either(value, "repo_path"), _either(value, "repo_id")
    if path is not None:
        return f"{os.fspath(path)}:{layer}"
    if name is None:
        return None
    about = {key: found for key in _META if (found := _either(value, key)) not in {None, False}}
    return (f"{name}:{layer}", about) if about else f"{name}:{layer}"


def _either(value: Any, name: str) -> Any:
    found = getattr(value, f"_{name}", None)
    return found if found is not None else getattr(value, name, None)


class _Reader:
    """One key and its value."""

    def __init__(self, key: object, value: object, *, local: bool) -> None:
        self.problems: list[str] = []
        self.local, self.at = local, _key_text(key)
        self.uses: list[Use] = []
        self.trust: list[str] = []
        self.off_on: list[str] = []
        self.off = False
        names, fused = self.key(key)
        self.value(value, (), ())
        if not self.uses and not self.off and not self.off_on and not self.problems:
            self.problem(f'{value!r} names no kernel; "" leaves it alone')
        self.entry = Entry(
            names=names,
            uses=tuple(dict.fromkeys(self.uses)),
            off=self.off,
            off_on=tuple(self.off_on),
            trust=tuple(dict.fromkeys(self.trust)),
            fused=fused,
        )

    def problem(self, text: str) -> None:
        self.problems.append(f"{self.at}: {text}")

    def key(self, key: object) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
        parts: Iterable[object] = key if isinstance(key, tuple) else str(key).split("|") if isinstance(key, str) else [key]
        parts = [tuple(one.split("=", 1)) if isinstance(one, str) and "=" in one else one for one in parts]
        pairs = [one for one in parts if isinstance(one, tuple)]
        if pairs:
            if len(pairs) < len(parts) or not all(len(p) == 2 and all(isinstance(x, str) and x for x in p) for p in pairs):
                self.problem("expected pairs (layer, path) for a kernel that replaces several modules")
                return (), ()
            return tuple(p[0] for p in pairs), tuple(pairs)
        names = [one.strip() for one in parts if isinstance(one, str) and one.strip()]
        if len(names) < len(list(parts)) or not names:
            self.problem(f"{key!r} is not a name, expected a layer, a class, or a path such as 'model.layers.0.*'")
        return tuple(names), ()

    def value(self, value: Any, on: tuple[str, ...], in_modes: tuple[Mode, ...]) -> None:
        value = _repository(value) or value
        if value is None or (isinstance(value, str) and not value.strip()):
            self.leave_alone(on, in_modes)
        elif isinstance(value, (str, os.PathLike)):
            self.use(os.fspath(value), {}, on, in_modes)
        elif isinstance(value, Mapping):
            self.conditions(value, on, in_modes)
        elif isinstance(value, (tuple, list)) and len(value) == 2 and _is_about(value[1]):
            if isinstance(value[0], (str, os.PathLike)):
                self.use(os.fspath(value[0]), value[1], on, in_modes)
            else:
                self.problem(f"{value[0]!r} is not a kernel, expected 'org/repo:Layer'")
        elif isinstance(value, (tuple, list)):
            for one in value:
                self.value(one, on, in_modes)
        else:
            self.problem(f"{value!r} is not a kernel, expected 'org/repo:Layer'")

    def leave_alone(self, on: tuple[str, ...], in_modes: tuple[Mode, ...]) -> None:
        if in_modes:
            self.problem(f"a layer cannot be left alone in {modes.name(in_modes[0])} only")
        elif on:
            self.off_on += on
        else:
            self.off = True

    def conditions(self, value: Mapping[Any, Any], on: tuple[str, ...], in_modes: tuple[Mode, ...]) -> None:
        if not value:
            self.problem('an empty dict says nothing; "" leaves the layer alone')
        for key, one in value.items():
            mode = mode_of(key)
            device = getattr(key, "type", key)
            if mode is not None:
                self.mode(mode, one, on, in_modes)
            elif isinstance(device, str) and (match := _DEVICE.fullmatch(device.strip().lower())) is not None:
                if on:
                    self.problem(f"{device} inside {', '.join(on)}")
                elif getattr(key, "properties", None) is not None:
                    self.problem(f"{key!r}: write the capability as 'cuda:sm90' or 'cuda:sm80+'")
                else:
                    self.value(one, (_ALIAS.get(match[1], match[1]) + (match[2] or ""),), in_modes)
            else:
                known = (*DEVICES, *MODES)
                near = difflib.get_close_matches(str(key).lower(), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                self.problem(f"{key!r} is neither a device nor a mode; {hint}")

    def mode(self, mode: Mode, value: Any, on: tuple[str, ...], in_modes: tuple[Mode, ...]) -> None:
        try:
            modes.check(mode)
        except KernelSwapError as e:
            self.problem(e.reason)
            return
        if in_modes:
            self.problem(f"{modes.name(mode)} inside {modes.name(in_modes[0])}")
        else:
            self.value(value, on, (mode,))

    def use(self, text: str, about: Mapping[str, Any], on: tuple[str, ...], in_modes: tuple[Mode, ...]) -> None:
        written = text.strip()
        if self.local and "://" not in written:
            written = f"dir://{written}"
        try:
            asked = spec.parse(written)
        except KernelSwapError as e:
            lines = str(e).splitlines()
            self.problem("; ".join([f"{text!r}: {e.reason}", *([lines[-1].strip()] if len(lines) > 3 else [])]))  # with the hint
            return
        if asked.layer is None and self.at != "attention":
            self.problem(f"{text!r} names no layer, expected {'/path' if asked.source == 'dir' else 'org/repo'}:Layer")
            return
        at = self.version(text, about, pinned=(asked.version, asked.revision, asked.constraints) != (None, None, None))
        trust = about.get("trust_remote_code", False)
        if trust is True:
            self.trust.append(asked.name)
        elif isinstance(trust, (list, tuple)) and all(isinstance(name, str) for name in trust):
            self.trust += trust
        elif trust not in {False, None} if isinstance(trust, (bool, str, int, type(None))) else True:
            self.problem(f"{text!r}: `trust_remote_code` is {trust!r}, expected True, False or a list of repositories")
        if at:
            layer = f":{asked.layer}" if asked.layer is not None else ""
            written = f"{written.removesuffix(layer)}@{at}{layer}"
        self.uses.append(Use(written, on=on, modes=in_modes))

    def version(self, text: str, about: Mapping[str, Any], *, pinned: bool) -> str:
        for key in about:
            if key not in _META:
                near = difflib.get_close_matches(str(key), _META, n=1)
                self.problem(
                    f"{text!r}: unknown {key!r}, " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_META)}")
                )
        version, revision = about.get("version"), about.get("revision")
        if version is not None and revision is not None:
            self.problem(f"{text!r}: `version` and `revision` exclude each other")
        elif (version is not None or revision is not None) and pinned:
            self.problem(f"{text!r} has a version already")
        elif version is not None and (isinstance(version, bool) or not isinstance(version, (int, str))):
            self.problem(f"{text!r}: `version` is {version!r}, expected a number")
        elif revision is not None and not isinstance(revision, str):
            self.problem(f"{text!r}: `revision` is {revision!r}, expected a branch, tag or commit")
        else:
            return str(version if version is not None else revision or "")
        return ""


def _is_about(value: object) -> bool:
    """Whether this is the metadata of a `(text, metadata)` pair, not a second candidate by device or mode."""
    if not isinstance(value, Mapping):
        return False
    return not any(mode_of(key) is not None or _DEVICE.fullmatch(str(key)) for key in value)
