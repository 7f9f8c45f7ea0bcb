"""KernelConfig: which kernels a model may use. A value; using it changes nothing in it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import TableError
from . import mapping

FILE = "kernel_config.json"


class _AlsoTheirs(type):
    """`isinstance(theirs, KernelConfig)`: a KernelConfig that was made before kernelswap was installed is one, too."""

    def __instancecheck__(cls, instance: object) -> bool:
        return super().__instancecheck__(instance) or _is_theirs(type(instance))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return super().__subclasscheck__(subclass) or _is_theirs(subclass)


def _is_theirs(cls: type) -> bool:
    return any(c.__name__ == "KernelConfig" and c.__module__ == "transformers.utils.kernel_config" for c in cls.__mro__)


class KernelConfig(metaclass=_AlsoTheirs):
    """Which kernels may serve which layers.

    Args:
        kernel_mapping: `{layer, class or module path: kernel}`; the forms are those of `mapping.py`.
        use_local_kernel: kernels are written `/path:Layer` (also `C:\\path:Layer`).
        inherit_mapping: what the mapping does not speak of goes on as without it; `False`: only the mapping counts.

    Raises:
        TableError (a ValueError): the mapping makes no sense; every problem at once, one a line. Whether a model has
            what is named is known, and said, when the config is used.

    It compares by content, and can be pickled, written as JSON and used for any number of models.
    """

    def __init__(
        self,
        kernel_mapping: Mapping[Any, Any] | None = None,
        use_local_kernel: bool = False,  # noqa: FBT001, FBT002  # Transformers' own signature
        inherit_mapping: bool = True,  # noqa: FBT001, FBT002  # same
    ) -> None:
        self.kernel_mapping: Any = copy.deepcopy(kernel_mapping) if kernel_mapping is not None else {}
        self.use_local_kernel = use_local_kernel
        self.inherit_mapping = inherit_mapping
        self.entries()

    @classmethod
    def of(cls, value: Any) -> KernelConfig:
        """`value` itself, one of ours made from one of Transformers', or from a plain mapping.

        Raises:
            TableError: it is neither, or makes no sense.
        """
        if type.__instancecheck__(cls, value):
            return value  # type: ignore[no-any-return]  # `__instancecheck__` narrows nothing for mypy
        if isinstance(value, Mapping):
            return cls(value)
        if _is_theirs(type(value)):
            return cls(value.kernel_mapping, value.use_local_kernel, getattr(value, "inherit_mapping", True))
        raise TableError(f"expected `kernel_config` to be a KernelConfig, found {type(value).__name__}")

    def entries(self) -> tuple[mapping.Entry, ...]:
        """What the mapping says.

        Raises:
            TableError: it makes no sense; every problem at once.
        """
        entries, problems = mapping.read(self.kernel_mapping, local=self.use_local_kernel)
        problems += tuple(
            f"`{name}` is {getattr(self, name)!r}, expected True or False"
            for name in ("use_local_kernel", "inherit_mapping")
            if not isinstance(getattr(self, name), bool)
        )
        if problems:
            raise TableError("\n".join(problems), asked="reading a KernelConfig")
        return entries

    def update_kernel(  # Transformers' own signature
        self,
        repo_id: str,
        registered_name: str,
        layer_name: str,
        device: str,
        mode: Any,
        revision: str | None = None,
        version: int | None = None,
        trust_remote_code: bool = False,  # noqa: FBT001, FBT002  # same
    ) -> None:
        """Add a kernel for one layer, device and mode; what the mapping says of other devices and modes stays.

        Raises:
            TableError: that makes no sense; the mapping is as it was.
        """
        about: dict[str, Any] = {"version": version, "revision": revision, "trust_remote_code": trust_remote_code}
        about = {key: value for key, value in about.items() if value not in {None, False}}
        kernel = (f"{repo_id}:{layer_name}", about) if about else f"{repo_id}:{layer_name}"
        devices = self.kernel_mapping.get(registered_name)
        devices = dict(devices) if isinstance(devices, Mapping) else {}
        by_mode = devices.get(device)
        devices[device] = {**(by_mode if isinstance(by_mode, Mapping) else {}), mode: kernel}
        changed = {**self.kernel_mapping, registered_name: devices}
        KernelConfig(changed, self.use_local_kernel, self.inherit_mapping)
        self.kernel_mapping = changed

    # -- as text --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` takes them."""
        return {
            "kernel_mapping": mapping.plain(self.kernel_mapping),
            "use_local_kernel": self.use_local_kernel,
            "inherit_mapping": self.inherit_mapping,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KernelConfig:
        """The config that `to_dict` came from.

        Raises:
            TableError: a key is unknown, or the mapping makes no sense.
        """
        known = {"kernel_mapping", "use_local_kernel", "inherit_mapping"}
        if unknown := [key for key in values if key not in known]:
            raise TableError(f"unknown {', '.join(map(repr, unknown))}; a KernelConfig has {', '.join(sorted(known))}")
        return cls(**values)

    def to_json_string(self) -> str:
        """As JSON, two spaces of indent, sorted."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> None:
        """Write `kernel_config.json` into a directory, beside a model's files if you like: loading the model ignores it."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(self.to_json_string(), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **_: Any) -> KernelConfig:
        """Read what `save_pretrained` wrote; a directory, or the file itself.

        Raises:
            TableError: it is not there, or not a KernelConfig.
        """
        path = Path(directory)
        path = path / FILE if path.is_dir() else path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise TableError(f"{path}: {e}", asked="reading a KernelConfig") from e
        if not isinstance(values, dict):
            raise TableError(f"{path}: expected an object", asked="reading a KernelConfig")
        return cls.from_dict(values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KernelConfig):
            return NotImplemented
        return self.to_dict() == KernelConfig.of(other).to_dict()

    __hash__ = None  # type: ignore[assignment]  # it compares by content, and its content can change

    def __repr__(self) -> str:
        more = "".join(
            f", {name}={value}"
            for name, value, usual in (
                ("use_local_kernel", self.use_local_kernel, False),
                ("inherit_mapping", self.inherit_mapping, True),
            )
            if value != usual
        )
        return f"KernelConfig(kernel_mapping={self.kernel_mapping!r}{more})"
