"""First contact with a kernel in a child process, so that a segmentation fault, an abort or a hang becomes a reason.

The child is started once (a fresh interpreter, never a fork of this process: CUDA and threads do not survive one), serves all
kernels of this process, and ends with it. It loads the verified artifact as the parent does, and calls the kernel on the inputs of
the proof; whether the numbers are right is asked afterwards, by the parent. Starting it costs the import of torch, so it runs only
when nothing is known yet about this kernel on this machine.

On Linux a kernel for the CPU meets a fork of the child, which has no threads and has called no kernel: the child outlives
whatever a kernel does, and what one kernel damages without crashing is not blamed on the next.

This is about survival, not about trust: the child has the rights of its user. What may run at all is the verifiers' decision.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import layers, loader
from ..errors import KernelSwapError
from ..types import Artifact, Implementation, Run
from . import circumstances, memory, norms, trial
from .calls import call
from .inputs import Case, Subject

Contain = Literal["native", "always", "never"]
START = 120.0
"""Seconds that the child may take to import torch on a busy machine; not counted as the kernel's."""
GRACE = 30.0
"""Seconds beyond a kernel's limit after which the child itself is given up."""
FORKS = sys.platform == "linux"
_NATIVE = (".so", ".dylib", ".dll", ".pyd")
_COMPILES = (b"import triton", b"from triton", b"cutlass", b"tilelang", b"pallas", b"nvrtc")


def is_native(artifact: Artifact) -> bool:
    """Whether the artifact brings machine code, or makes some at run time: what can take the process down."""
    for file in artifact.path.rglob("*"):
        if any(part in _NATIVE for part in file.suffixes):
            return True
        with contextlib.suppress(OSError):
            if file.suffix == ".py" and any(word in file.read_bytes() for word in _COMPILES):
                return True
    return any(is_native(below) for below in artifact.depends)


class Contact:
    """The parent's side. Safe to share between threads; the child is asked one thing at a time."""

    def __init__(self, contain: Contain, time_limit: float) -> None:
        self.contain, self.time_limit = contain, time_limit
        self._child: _Child | None = None
        self._lock = threading.Lock()

    def wanted(self, artifact: Artifact) -> bool:
        """Whether this artifact is to meet the machine in a child first.

        What ships with kernelswap does not: it is tested on the machines it is for, and compiled by this machine's own
        compiler.
        """
        if self.contain == "native":
            source = artifact.candidate.source
            return source == "installed" or (source != "bundled" and is_native(artifact))  # a package brings code of its own
        return self.contain == "always"

    def first(
        self,
        candidate: Implementation,
        subject: Subject,
        module: Callable[[float], nn.Module | None],
        cases: Sequence[Case],
        run: Run,
    ) -> tuple[str | None, str]:
        """Why the kernel did not survive the cases, or `None`; and a note when the child could not be asked."""
        message = {
            "artifact": candidate.origin,
            "layer": candidate.layer,
            "kind": candidate.kind,
            "device": str(subject.device),
            "training": run.training,
            "limit": self.time_limit,
            "probe": subject.site.row.probe,
            "modules": {c: _portable(module(c)) for c in sorted({case.centre for case in cases})},
            "cases": [
                (case.name, _to_cpu((case.args, dict(case.kwargs))), case.differentiable, case.thorough, case.centre, case.many)
                for case in cases
            ],
        }
        try:
            data = pickle.dumps(message)
        except Exception as e:  # noqa: BLE001  # a user's class may refuse to be pickled in any way it likes
            return None, f"not contained: the module cannot be sent to a child process ({type(e).__name__}: {e})"
        return self._ask(data, forks=_forks(message))

    def imports(self, artifact: Artifact) -> tuple[str | None, str]:
        """Why the artifact could not even be imported in the child, or `None`; and a note."""
        message = {"artifact": artifact, "layer": None, "device": "cpu", "limit": self.time_limit}
        return self._ask(pickle.dumps(message), forks=_forks(message))

    def _ask(self, data: bytes, *, forks: bool) -> tuple[str | None, str]:
        with self._lock:
            if self._child is None or not self._child.alive:
                self._child = _Child()
                weakref.finalize(self, self._child.kill)  # a prover that is forgotten takes its child along
            child = self._child
            if (why := child.start()) is not None:
                return None, f"not contained: {why}"
            answer = child.ask(data, self.time_limit, forks=forks)
            if not child.alive:
                child.kill()
                self._child = None
        return answer, ""

    def close(self) -> None:
        """End the child."""
        with self._lock:
            if self._child is not None:
                self._child.kill()
                self._child = None


class _Child:
    """One process, and a thread that reads what it says: a pipe cannot be waited for with a time limit everywhere."""

    def __init__(self) -> None:
        code = "import sys; sys.path[:] = sys.argv[1:]; from kernelswap.proof.child import main; main()"
        self.process = subprocess.Popen(  # noqa: S603  # our own interpreter and our own code
            [sys.executable, "-c", code, *sys.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.said: queue.Queue[Any] = queue.Queue()
        self.errors: list[bytes] = []
        self.ready = False
        self.readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for reader in self.readers:
            reader.start()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def start(self) -> str | None:
        """Why it is not ready to be asked, or `None`."""
        if not self.ready:
            said = self._wait(START)
            if said != "ready":
                self.kill()
                return f"the child process did not start ({self._last_words() or 'time limit'})"
            self.ready = True
        return None

    def ask(self, data: bytes, limit: float, *, forks: bool) -> str | None:
        """Why the kernel did not survive, or `None`."""
        with contextlib.suppress(OSError):  # it died while listening: the return code below says how
            _send(self._pipe(self.process.stdin), data)
        said = self._wait(limit + (GRACE if forks else 0.0))  # it keeps the limit itself, where it can
        if said is _SILENCE:
            self.kill()
            return _silent(limit)
        if said is _GONE:
            self.process.wait()
            return _dead(self.process.returncode, self._last_words())
        if isinstance(said, tuple):
            self.kill()
            return str(said[0])
        return said if isinstance(said, str) else None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for reader in self.readers:
            reader.join(5.0)  # a grandchild may hold the pipe open; the threads are daemons
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                self._pipe(pipe).close()

    def _wait(self, limit: float) -> Any:
        try:
            return self.said.get(timeout=limit)
        except queue.Empty:
            return _SILENCE

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for message in _receive(self._pipe(self.process.stdout)):
                self.said.put(pickle.loads(message))  # noqa: S301  # from our own process, through a pipe that nobody else holds
        self.said.put(_GONE)

    def _read_errors(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in self._pipe(self.process.stderr):
                self.errors[:] = [*self.errors[-19:], line]

    def _last_words(self) -> str:
        return b"".join(self.errors).decode(errors="replace").strip().rpartition("\n")[2][:200]

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe


_SILENCE, _GONE = object(), object()


def _silent(limit: float) -> str:
    return f"does not return within {limit:.3g} s (tried in a child process)"


def _dead(code: int, words: str) -> str:
    return f"ends the process with {_signal(code)} (tried in a child process){f': {words}' if words else ''}"


def _signal(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


def _send(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(struct.pack("<Q", len(data)))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Iterator[bytes]:
    while len(head := pipe.read(8)) == 8:
        (size,) = struct.unpack("<Q", head)
        data = pipe.read(size)
        if len(data) < size:
            return
        yield data


# -- what travels ---------------------------------------------------------------------------------------------------


def _to_cpu(value: Any) -> Any:
    return pytree.tree_map(lambda t: memory.moved(t.detach(), torch.device("cpu")) if isinstance(t, Tensor) else t, value)


class _StandIn(nn.Module):
    """Takes the place of a module whose class the child cannot import: kernels read attributes, which it has."""


def _portable(module: nn.Module | None) -> nn.Module | None:
    """`module` on the CPU, in classes that another interpreter can import (what `__main__` or a function defines, it cannot)."""
    if module is None:
        return None
    cls = type(module)
    near = cls.__module__ == "__main__" or "<locals>" in cls.__qualname__
    copy: nn.Module = _StandIn.__new__(_StandIn) if near else cls.__new__(cls)
    state = {n: _to_cpu(v) for n, v in vars(module).items() if n != "_modules" and not callable(v)}
    state["_parameters"] = {
        n: None if p is None else nn.Parameter(p.detach().cpu(), requires_grad=p.requires_grad)
        for n, p in module._parameters.items()  # noqa: SLF001  # torch has no public way to copy a module shallowly
    }
    state["_modules"] = {n: _portable(m) for n, m in module._modules.items()}  # noqa: SLF001  # same
    vars(copy).update(state)
    return copy


# -- the child's side -----------------------------------------------------------------------------------------------


def main() -> None:
    """Answer until the parent goes away."""
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel prints must not look like an answer
    _send(channel, pickle.dumps("ready"))
    for data in _receive(sys.stdin.buffer):
        message = pickle.loads(data)  # noqa: S301  # from our parent
        try:
            answer: Any = _forked(message) if _forks(message) else _try(message)
        except _Broken as e:
            answer = (str(e),)  # a last answer: the parent starts another child
        _send(channel, pickle.dumps(answer))


def _forks(message: dict[str, Any]) -> bool:
    """Whether the child has a fork of its own meet the kernel, and keeps the time limit itself."""
    return FORKS and message["device"] == "cpu"


def _forked(message: dict[str, Any]) -> str | None:
    """`_try` in a fork of this process, which says how it ended. What it prints goes nowhere but into the last words."""
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as printed:
        pid = os.fork()
        if pid == 0:
            try:
                for stream in (1, 2):
                    os.dup2(printed.fileno(), stream)
                said = pickle.dumps(_try(message))
                os.write(writer, struct.pack("<Q", len(said)) + said)
            except BaseException as e:  # noqa: BLE001  # nothing may return into the loop of the parent
                os.write(2, f"{type(e).__name__}: {e}".encode())
                os._exit(1)
            os._exit(0)
        os.close(writer)
        try:
            ended = _wait_for(pid, message["limit"])
            if ended is None:
                return _silent(message["limit"])
            answers = list(_receive(os.fdopen(os.dup(reader), "rb"))) if ended == 0 else []
        finally:
            os.close(reader)
        if answers:
            said_by_fork: str | None = pickle.loads(answers[0])  # noqa: S301  # from our own fork
            return said_by_fork
        printed.seek(0)
        return _dead(ended, printed.read()[-4096:].decode(errors="replace").strip().rpartition("\n")[2][:200])


def _wait_for(pid: int, limit: float) -> int | None:
    """How the process ended, as `subprocess` has it; `None`, and it is killed, when it did not within `limit` seconds."""
    end, pause = time.monotonic() + limit, 1e-3
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(pause)
        pause = min(0.05, 2 * pause)


def _try(message: dict[str, Any]) -> str | None:
    """Call the kernel on everything. Returns why it cannot be used, or None; a crash returns nothing at all."""
    try:
        kernel = loader.load(message["artifact"])
        if message["layer"] is None:
            return None
        make = layers.implementation if message["kind"] == "module" else layers.function
        implementation = make(kernel, message["layer"])
    except KernelSwapError as e:
        if message["layer"] is None:
            return None  # the parent will meet the same, and says it in its own words
        return f"cannot be loaded in a child process: {e.reason}"
    device = torch.device(message["device"])
    modules = {c: None if m is None else m.to(device) for c, m in message["modules"].items()}
    for name, arguments, differentiable, thorough, centre, many in message["cases"]:
        args, kwargs = pytree.tree_map(lambda t: memory.moved(t, device) if isinstance(t, Tensor) else t, arguments)
        case = Case(name, args, kwargs, differentiable=differentiable, thorough=thorough)
        more = circumstances.repeated((args, kwargs), message["probe"]) if many else None
        wants = trial.wants(case, training=message["training"])
        asked = [((args, kwargs), want) for want in wants] + ([(more[0], wants[0])] if more is not None else [])
        for given, want in asked:
            labels = [str(i) for i in range(64)]
            try:
                with torch.no_grad() if want is None else contextlib.nullcontext():
                    call(_forward(implementation, modules[centre]), modules[centre], given, device, want, None, labels)
                memory.settle(device)
            except Exception as e:  # what the kernel raises is judged by the proof; only what breaks things counts here
                if not _usable(device):
                    text = " ".join(str(e).split())[:200]
                    raise _Broken(f"breaks the device's context on {name}: {text} (tried in a child process)") from e
    return None


def _forward(implementation: Implementation, module: nn.Module | None) -> Callable[..., Any]:
    if isinstance(module, norms.Norms):  # for statements, of which only their norms were sent
        return norms.on_module(implementation.forward, len(list(module.children())))
    return implementation.forward


class _Broken(Exception):
    """This process cannot use its device any more."""


def _usable(device: torch.device) -> bool:
    try:
        return bool(torch.ones(1, device=device).sum().item() == 1.0)
    except RuntimeError:  # an illegal memory access stays with the context for good
        return False
