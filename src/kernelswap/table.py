"""Tables: which kernels may serve which kinds of site. TOML rows to `Row`, and how two tables combine. Pure.

A row, with everything that it may say:

    [[swap]]
    layer   = "RMSNorm"
    kind    = "module"                              # or "function", "attention"
    targets = ["*RMSNorm"]                          # class names; the decorated name `RMSNorm` always matches
    needs   = ["weight", "variance_epsilon|eps"]    # attributes; `|` separates alternatives
    probe   = "rows"
    use     = ["kernelswap/layers:RMSNorm", {spec = "org/norm@2:RMSNorm", on = ["cuda:sm90", "rocm"], modes = ["inference"]}]
    off     = false
    note    = "mean of squares over the last dimension"
    statements = "residual_norm"                    # with kind = "function": a pattern of statements; targets, needs: of what they call

`modes` are `inference`, `training`, each with or without `+compile`, and `fallback`.
"""

from __future__ import annotations

import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any, get_args

from .errors import KernelSwapError, TableError
from .types import Machine, Mode, Row, SiteKind, Use

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover  # Python 3.10
    import tomli as tomllib

_ROW_KEYS = ("layer", "kind", "targets", "needs", "at", "probe", "note", "off", "use", "rivals", "statements")
_USE_KEYS = ("spec", "on", "modes")
STATEMENTS = ("residual_norm", "norm_rotary", "projections")
"""Patterns of statements that a forward is searched for."""
_ALIAS = {"metal": "mps", "cann": "npu"}
_ON = re.compile(
    r"(?P<type>cpu|cuda|rocm|xpu|npu|mps|tpu|neuron|metal|cann)(?::(?:sm(?P<sm>[0-9]{2,3})(?P<up>\+?)|(?P<gfx>gfx[0-9a-f]+)))?"
)
_MODES = {
    "inference": Mode.INFERENCE,
    "training": Mode.TRAINING,
    "inference+compile": Mode.INFERENCE | Mode.TORCH_COMPILE,
    "training+compile": Mode.TRAINING | Mode.TORCH_COMPILE,
    "fallback": Mode.FALLBACK,
}


def parse(text: str, *, where: str, check: Callable[[str], object] | None = None) -> tuple[Row, ...]:
    """The rows of a table. `where` is what messages call the text; `check` is asked about every spec (`spec.parse`).

    Raises:
        TableError: every problem at once, one a line, each with its row.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise TableError(f"{where}: not TOML: {e}") from e
    reader = _Reader(where, text, check)
    rows = reader.table(table)
    if reader.problems:
        raise TableError("\n".join(reader.problems))
    return rows


def default() -> tuple[Row, ...]:
    """The table that ships with the package."""
    return _shipped("default.toml")


def loss() -> tuple[Row, ...]:
    """The rows that `swap(model, loss=True)` adds."""
    return _shipped("loss.toml")


def wins() -> tuple[Row, ...]:
    """What serves besides the default table where a program asks for kernels and not for these: attention, and the loss."""
    found = _shipped("wins.toml")
    return tuple(merge(loss(), (row,))[0] if any(row.layer == known.layer for known in loss()) else row for row in found)


@functools.cache
def _shipped(name: str) -> tuple[Row, ...]:
    return parse((resources.files("kernelswap") / "tables" / name).read_text(encoding="utf-8"), where=name)


def merge(rows: Iterable[Row], over: Iterable[Row]) -> tuple[Row, ...]:
    """`rows` with `over` laid over them, one row of `over` after the other.

    A row of `over` whose layer is known says only what differs: what it leaves empty (targets, needs, at, probe, note) stays, its
    `use` comes before the known ones (a spec that both name keeps its new place and conditions), and `off` is as it says. Its
    kind counts only where it has targets. A row with a new layer is added. Rows that `over` speaks of come first.
    """
    merged = list(rows)
    for new in over:
        known = [row for row in merged if row.layer == new.layer]
        rest = [row for row in merged if row.layer != new.layer]
        merged = [_lay_over(row, new) for row in known or [new]] + rest
    return tuple(merged)


def misfit(use: Use, device: str, machine: Machine) -> str | None:
    """Why `use` may not serve a module on `device` (`cpu`, `cuda:1`), or `None`. Modes are not looked at.

    torch calls ROCm devices `cuda`: on a ROCm machine, such a device is `rocm` here.
    """
    if not use.on:
        return None
    type_, _, index = device.partition(":")
    type_ = "rocm" if type_ == "cuda" and machine.backend == "rocm" else type_
    here = next((d for d in machine.devices if d.type == type_ and d.index == int(index or 0)), None)
    for on in use.on:
        match = _ON.fullmatch(on)
        if match is None or _ALIAS.get(match["type"], match["type"]) != type_:
            continue
        if match["sm"] is None and match["gfx"] is None:
            return None
        if here is not None and match["gfx"] is not None and (here.arch or "").partition(":")[0] == match["gfx"]:
            return None
        if here is not None and match["sm"] is not None and here.capability is not None:
            wants, has = int(match["sm"]), here.capability[0] * 10 + here.capability[1]
            if has == wants or (match["up"] and has > wants):
                return None
    is_ = f"{device}, {here.arch}" if here is not None and here.arch else device
    return f"is for {', '.join(use.on)}, this is {is_}"


def _lay_over(row: Row, new: Row) -> Row:
    named = {use.spec for use in new.use}
    return replace(
        row,
        kind=new.kind if new.targets else row.kind,
        targets=new.targets or row.targets,
        needs=new.needs or row.needs,
        at=new.at or row.at,
        probe=new.probe or row.probe,
        use=(*new.use, *(use for use in row.use if use.spec not in named)),
        rivals=(*new.rivals, *(use for use in row.rivals if use.spec not in named | {r.spec for r in new.rivals})),
        off=new.off,
        note=new.note or row.note,
        statements=new.statements or row.statements,
    )


class _Reader:
    """One table being read; problems collect, each under the row it is in."""

    def __init__(self, where: str, text: str, check: Callable[[str], object] | None) -> None:
        self.where, self.check = where, check
        self.problems: list[str] = []
        self.lines = [n for n, line in enumerate(text.splitlines(), 1) if re.match(r"\s*\[\[\s*swap\s*\]\]", line)]

    def table(self, table: dict[str, Any]) -> tuple[Row, ...]:
        self.unknown(self.where, table, ("swap",))
        items = table.get("swap", [])
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            self.problems.append(f"{self.where}: `swap` is not a list of tables, rows begin with [[swap]]")
            return ()
        # The parser does not say where a row was; the headings do, unless one stands in a string or rows are inline.
        lines: Sequence[int | None] = self.lines if len(self.lines) == len(items) else [None] * len(items)
        rows: list[Row] = []
        for i, (item, line) in enumerate(zip(items, lines, strict=True), 1):
            layer = item.get("layer")
            at = f"{self.where}:{line}" if line else self.where
            row = self.row(f"{at}: row {i}" + (f" ({layer})" if isinstance(layer, str) and layer else ""), item)
            first = next(
                (n for n, r in enumerate(rows, 1) if (r.layer, r.kind, r.targets) == (row.layer, row.kind, row.targets)), None
            )
            if first is not None and row.layer:
                self.problems.append(f"{at}: row {i} ({layer}): claims what row {first} claims")
            rows.append(row)
        return tuple(rows)

    def row(self, at: str, item: dict[str, Any]) -> Row:
        self.unknown(at, item, _ROW_KEYS)
        if "layer" not in item:
            self.problems.append(f"{at}: `layer` is missing")
        kind = self.text(at, item, "kind", "module")
        if kind not in get_args(SiteKind):
            self.problems.append(f"{at}: `kind` is {kind!r}, expected one of {', '.join(get_args(SiteKind))}")
        statements = self.text(at, item, "statements", "")
        if statements and (statements not in STATEMENTS or kind != "function"):
            self.problems.append(
                f'{at}: `statements` is {statements!r}, expected {", ".join(STATEMENTS[:-1])} or {STATEMENTS[-1]}, with kind = "function"'
            )
        off = item.get("off", False)
        if not isinstance(off, bool):
            self.problems.append(f"{at}: `off` is {off!r}, expected true or false")
        return Row(
            layer=self.text(at, item, "layer", ""),
            kind=kind,  # type: ignore[arg-type]  # checked above; a wrong one raises at the end
            targets=self.texts(at, item, "targets"),
            needs=tuple(self.need(at, need) for need in self.items(at, item, "needs")),
            at=self.texts(at, item, "at"),
            probe=self.text(at, item, "probe", ""),
            use=tuple(self.use(f"{at}: use {i}", use) for i, use in enumerate(self.items(at, item, "use"), 1)),
            rivals=tuple(self.use(f"{at}: rivals {i}", use) for i, use in enumerate(self.items(at, item, "rivals"), 1)),
            off=bool(off),
            note=self.text(at, item, "note", ""),
            statements=statements,
        )

    def need(self, at: str, need: object) -> tuple[str, ...]:
        names = need.split("|") if isinstance(need, str) else need
        if not isinstance(names, list) or not names or not all(isinstance(n, str) and n.strip() for n in names):
            self.problems.append(f"{at}: `needs` has {need!r}, expected attribute names, alternatives separated by `|`")
            return ()
        return tuple(n.strip() for n in names)

    def use(self, at: str, use: object) -> Use:
        if isinstance(use, str):
            use = {"spec": use}
        if not isinstance(use, dict):
            self.problems.append(f"{at}: expected a spec or {{spec = ..., on = ..., modes = ...}}, found {use!r}")
            return Use("")
        self.unknown(at, use, _USE_KEYS)
        spec = self.text(at, use, "spec", "")
        if not spec:
            self.problems.append(f"{at}: `spec` is missing or empty")
        elif self.check is not None:
            try:
                self.check(spec)
            except KernelSwapError as e:
                self.problems.append(f"{at}: {spec!r}: {e.reason}")
        return Use(spec, on=tuple(self.on(at, on) for on in self.texts(at, use, "on")), modes=self.modes(at, use))

    def on(self, at: str, on: str) -> str:
        match = _ON.fullmatch(on)
        if match is None or (match["sm"] and match["type"] != "cuda") or (match["gfx"] and match["type"] != "rocm"):
            self.problems.append(
                f"{at}: `on` has {on!r}, expected `cpu`, `cuda`, `cuda:sm90`, `cuda:sm80+`, `rocm:gfx942`, `mps`, ..."
            )
            return on
        return on.replace(match["type"], _ALIAS.get(match["type"], match["type"]), 1)

    def modes(self, at: str, use: dict[str, Any]) -> tuple[Mode, ...]:
        found = []
        for text in self.texts(at, use, "modes"):
            mode = _MODES.get(re.sub(r"\s*[|+]\s*(?:torch_)?compile", "+compile", text.lower()))
            if mode is None:
                self.problems.append(f"{at}: `modes` has {text!r}, expected {', '.join(_MODES)}")
            else:
                found.append(mode)
        return tuple(found)

    # values by type

    def unknown(self, at: str, item: dict[str, Any], known: Sequence[str]) -> None:
        for key in item:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                self.problems.append(
                    f"{at}: unknown key `{key}`" + (f", did you mean `{near[0]}`?" if near else f", known: {', '.join(known)}")
                )

    def text(self, at: str, item: dict[str, Any], key: str, default_: str) -> str:
        value = item.get(key, default_)
        if not isinstance(value, str) or (key in item and not value.strip() and key != "note"):
            self.problems.append(f"{at}: `{key}` is {value!r}, expected a text")
            return default_
        return value

    def items(self, at: str, item: dict[str, Any], key: str) -> list[Any]:
        value = item.get(key, [])
        if not isinstance(value, list):
            self.problems.append(f"{at}: `{key}` is {value!r}, expected a list")
            return []
        return value

    def texts(self, at: str, item: dict[str, Any], key: str) -> tuple[str, ...]:
        values = self.items(at, item, key)
        bad = [v for v in values if not isinstance(v, str) or not v.strip()]
        self.problems += [f"{at}: `{key}` has {v!r}, expected a text" for v in bad]
        return tuple(v for v in values if v not in bad)
