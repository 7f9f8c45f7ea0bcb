"""What a mapping names: a layer or a function of a kernel on the hub, in a directory, or in a lock. Nothing is loaded by naming."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import layers
from ..errors import UnknownKernel
from ..lock import Locked
from ..provider import Terms
from ..types import Implementation, Kernel
from . import locked as locks
from . import state
from .loading import Trust, local_spec, spec_of, trusted

if TYPE_CHECKING:
    import torch.nn as nn


class Repository:
    """Base of all six. Equal where they name the same, whoever asks.

    `spec` is the text that the rest of kernelswap uses; `trust` whom it vouches for.
    """

    def __init__(self, spec: str, layer: str, trust: list[str]) -> None:
        self.spec, self.layer_name, self.trust = spec, layer, tuple(trust)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Repository) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return type(self), self.spec, self.trust

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec})"

    def __str__(self) -> str:
        return self.spec

    def check(self) -> None:
        """What is to be so before anything of it is used; a lock's digests."""

    def implementation(self) -> Implementation:
        """The layer, or function, ready to be put into a model.

        Raises:
            ValueError: the kernel has none of that name; TypeError: it breaks the contract of layers; also what `get_kernel` raises.
        """
        return layers.implementation(self._kernel(), self.layer_name)

    def load(self) -> type[nn.Module]:
        """The layer's class; a function as a class whose forward calls it.

        Raises:
            ValueError: the kernel has no layers, or none of that name; TypeError: it breaks the contract of layers.
        """
        kernel = self._kernel()
        found = layers.implementation(kernel, self.layer_name)
        cls: Any = getattr(getattr(kernel.module, "layers", None), self.layer_name, None)
        return _as_class(self.layer_name, found) if found.kind == "function" else cls

    def _kernel(self) -> Kernel:
        self.check()
        return state.swapper().kernel(self.spec, terms=Terms(trust=self.trust))


class LayerRepository(Repository):
    """A layer of a kernel on the hub, at a version or a revision; without either, the newest version."""

    def __init__(
        self,
        repo_id: str,
        *,
        layer_name: str,
        revision: str | None = None,
        version: int | str | None = None,
        trust_remote_code: Trust = False,
        user_agent: Any = None,
    ) -> None:
        if revision is not None and version is not None:
            raise ValueError("Either a revision or a version must be specified, not both.")
        self.repo_id, self.revision, self.version = repo_id, revision, version
        self.trust_remote_code, self.user_agent = trust_remote_code, user_agent
        super().__init__(spec_of(repo_id, revision, version, layer_name), layer_name, trusted(trust_remote_code, repo_id))


class LocalLayerRepository(Repository):
    """A layer of a kernel in a directory: a repository, its `build`, or one build."""

    def __init__(self, repo_path: Any, *, layer_name: str, package_name: str | None = None) -> None:
        self.repo_path, self.package_name = Path(repo_path), package_name
        super().__init__(local_spec(repo_path, layer_name), layer_name, [])


class LockedLayerRepository(Repository):
    """A layer of a kernel at the commit of a lock, which is read now: a file, or that of the calling package.

    Raises:
        ValueError: there is no lock, it does not parse, or it does not name the kernel.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        lockfile: locks.Lockfile = None,
        layer_name: str,
        trust_remote_code: Trust = False,
        user_agent: Any = None,
    ) -> None:
        self.repo_id, self.lockfile = repo_id, lockfile
        self.trust_remote_code, self.user_agent = trust_remote_code, user_agent
        self._lock = locks.read(lockfile)
        self._entry: Locked = locks.locked(self._lock, repo_id)
        self.revision = self._entry.commit
        super().__init__(spec_of(repo_id, self.revision, None, layer_name), layer_name, trusted(trust_remote_code, repo_id))

    def check(self) -> None:
        """The bytes are those that the lock pins, where it pins any.

        Raises:
            Refused: they are others.
        """
        if any(build.tree or build.files or build.git_lfs_concat for build in self._entry.builds):
            swapper = state.varied(lock=self._lock)
            artifact = swapper.artifact(self._entry.asked, terms=Terms(trust=self.trust))
            locks.compare(self._entry, artifact, swapper.sources["hub"])


class _Function:
    """`func_name` for `layer_name`, and the function must be one."""

    func_name: str

    def _name(self, func_name: str) -> str:
        self.func_name = func_name
        kind = type(self).__name__
        _deprecated(f"{kind} is deprecated; {kind.replace('Func', 'Layer')} takes functions, too")
        return func_name


class FuncRepository(_Function, LayerRepository):
    """Deprecated: `LayerRepository` takes functions."""

    def __init__(self, repo_id: str, *, func_name: str, **more: Any) -> None:
        super().__init__(repo_id, layer_name=self._name(func_name), **more)


class LocalFuncRepository(_Function, LocalLayerRepository):
    """Deprecated: `LocalLayerRepository` takes functions."""

    def __init__(self, repo_path: Any, *, func_name: str, **more: Any) -> None:
        super().__init__(repo_path, layer_name=self._name(func_name), **more)


class LockedFuncRepository(_Function, LockedLayerRepository):
    """Deprecated: `LockedLayerRepository` takes functions."""

    def __init__(self, repo_id: str, *, func_name: str, **more: Any) -> None:
        super().__init__(repo_id, layer_name=self._name(func_name), **more)


_said: set[str] = set()


def _deprecated(text: str) -> None:
    """Once in a process."""
    if text not in _said:
        _said.add(text)
        warnings.warn(text, DeprecationWarning, stacklevel=4)


def _as_class(name: str, found: Implementation) -> type[nn.Module]:
    """A layer without state, as the reference makes one of a function."""
    import torch.nn as nn

    if found.kind != "function":
        raise UnknownKernel(f"{name} is no function")
    return type(
        name,
        (nn.Module,),
        {
            "forward": forward_of(found.forward),
            "has_backward": found.backward,
            "can_torch_compile": found.compiles,
            "__module__": __name__,
        },
    )


def forward_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """`forward(self, ...)` that calls `function(...)`, and says so in its signature."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001  # a method's
        return function(*args, **kwargs)

    here = inspect.signature(function)
    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = list(here.parameters.values())
    if not parameters or parameters[0].kind is not inspect.Parameter.POSITIONAL_ONLY:
        me = me.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = here.replace(parameters=[me, *parameters])  # type: ignore[attr-defined]  # read by inspect.signature
    return forward
