"""The recordings of one model: when a decode step runs as ever, is recorded, or is replayed; and what is let go.

The first step of a kind runs as ever: it warms up what has to be. The second runs as ever too, is taken back, recorded,
replayed and compared with what it gave before; from the third on it is replayed. Whatever changes in the model lets all
recordings go, and everything begins anew. A reason not to record keeps the original for that kind of step.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import caches, outputs, step, watch
from .recorder import Recorder, Recording
from .step import Step, Unfit

if TYPE_CHECKING:
    import torch.nn as nn

Forward = Callable[..., Any]
Differs = Callable[[Tensor, Tensor], "str | None"]
"""`differs(replayed, original)`: why the first is not good enough, or `None`."""

MOST = 8
"""Recordings kept for one model; each holds the memory of a cache when its cache is gone."""
KINDS = 64  # of steps that are remembered without a recording: a mask that grows makes every step its own kind
MOVES = 3  # of one cache's tensors, after which it is taken for a beam search, which copies the cache at every step anyway


@dataclass
class _Kind:
    """What is known of steps with one key."""

    refused: str = ""
    recordings: list[_Recorded] = field(default_factory=list)


class _Recorded:
    """One recording with everything that it reads and writes."""

    def __init__(self, inputs: list[Tensor], buffers: caches.Buffers, recording: Recording, stand_in: Any) -> None:
        self.inputs, self.buffers, self.recording = inputs, buffers, recording
        self.written, self.build = outputs.taken_apart(recording.output, stand_in)

    def run(self, tensors: list[Tensor], cache: Any) -> Any:
        """Replay on these inputs; what is returned is nobody else's memory."""
        if self.inputs:
            torch._foreach_copy_(self.inputs, tensors)  # as torch's optimisers do
        self.recording.replay()
        return self.build([t.clone() for t in self.written], cache)

    @property
    def bytes(self) -> int:
        """Held for it: what it records into, its inputs, and the cache that it reads where no cache has that any more."""
        cache = self.buffers.tensors if self.buffers.free else []
        return self.recording.bytes + sum(t.nbytes for t in (*self.inputs, *cache))


class Replays:
    """Answers the calls of one model. `original` is the forward of the model's own class.

    Args:
        original: called as `original(model, *args, **kwargs)`.
        recorder: what records.
        differs: compares what a first replay gave with what the step gives without.
        append: writes a token into the cache while recording, where it can; else the cache does.
    """

    def __init__(self, original: Forward, recorder: Recorder, differs: Differs, append: caches.Append | None = None) -> None:
        self.original, self.recorder, self.differs, self.append = original, recorder, differs, append
        self.kinds: OrderedDict[Any, _Kind] = OrderedDict()
        self.watch: watch.Watch | None = None
        self.lock = threading.RLock()
        self.recorded = self.replayed = 0
        self.reasons: Counter[str] = Counter()
        """Why decode steps ran as ever, and how many."""
        self.renewed: Counter[str] = Counter()
        """What changed, so that recordings were let go."""
        self.stream: Any = None

    def twin(self) -> Replays:
        """The same for a copy of the model: it records for itself."""
        return Replays(self.original, self.recorder, self.differs, self.append)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the model."""
        try:
            now = step.read(args, kwargs)
            key = None if now is None else (now.key, caches.shape(now.cache))
        except Unfit as e:
            self.reasons[str(e)] += 1
            now = None
        if now is None:
            return self.original(model, *args, **kwargs)
        with self.lock:
            answer = self._answer(model, key, now, args, kwargs)
        return self.original(model, *args, **kwargs) if answer is _AS_EVER else answer

    def clear(self) -> None:
        """Let every recording go, and the memory with it."""
        with self.lock:
            self.kinds.clear()
            self.watch = None

    # -- what is so -------------------------------------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """Memory that the recordings hold."""
        return sum(r.bytes for r in self._all())

    def facts(self) -> dict[str, Any]:
        """Plain JSON values: recordings made and held, steps replayed, bytes held, and why steps ran as ever."""
        with self.lock:
            refused = Counter(kind.refused for kind in self.kinds.values() if kind.refused)
            return {
                "recorded": self.recorded,
                "held": len(self._all()),
                "replayed": self.replayed,
                "bytes": self.bytes,
                "not_replayed": dict(self.reasons),
                "refused": dict(refused),
                "renewed": dict(self.renewed),
            }

    # -- the decision -----------------------------------------------------------------------------------------------

    def _answer(self, model: nn.Module, key: Any, now: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = self.kinds.get(key)
        if self.watch is not None and (why := self.watch.changed()) is not None:
            self.renewed[why] += 1
            self.clear()
            kind = None
        if kind is None:
            self.kinds[key] = _Kind()
            self._forget()
            return _AS_EVER
        self.kinds.move_to_end(key)
        if kind.refused:
            self.reasons[kind.refused] += 1
            return _AS_EVER
        found = self._for(kind, now.cache)
        if found is None:
            return self._record(model, kind, now, args, kwargs)
        if found.buffers.moved > MOVES:
            kind.refused = "the cache gets new tensors at every step, as in a beam search"
            kind.recordings.clear()
            return _AS_EVER
        self.replayed += 1
        self._in_order(now.cache)
        return found.run(now.tensors, now.cache)

    def _for(self, kind: _Kind, cache: Any) -> _Recorded | None:
        """The recording that works on this cache; one whose cache is gone takes in the new one."""
        found = next((r for r in kind.recordings if r.buffers.belong_to(cache)), None)
        if found is None:
            found = next((r for r in kind.recordings if r.buffers.free), None)
            if found is None and kind.recordings:
                gc.collect()  # a cache in a circle is gone and does not know: much cheaper than one more recording
                found = next((r for r in kind.recordings if r.buffers.free), None)
            if found is not None:
                found.buffers.adopt(cache)
        return found

    def _in_order(self, cache: Any) -> None:
        """Recordings share memory: one that runs on another stream than the last waits for that."""
        device = cache.layers[0].keys.device
        if device.type != "cuda":
            return
        stream = torch.cuda.current_stream(device)
        if self.stream is not None and self.stream != stream:
            stream.wait_stream(self.stream)
        self.stream = stream

    # -- recording --------------------------------------------------------------------------------------------------

    def _record(self, model: nn.Module, kind: _Kind, now: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the step, take it back, record it, replay it, compare. The answer is that of the run."""
        device = now.cache.layers[0].keys.device
        if self.watch is None:
            self.watch = watch.Watch(model)  # of a model that cannot be recorded, too: it may change
        kind.refused = self.recorder.misfit(device) or watch.misfit(model, device) or ""
        if kind.refused:
            self.reasons[kind.refused] += 1
            return _AS_EVER
        with torch.inference_mode(mode=False), torch.no_grad():  # inference tensors could not be written outside of it
            inputs = [torch.empty_like(t).copy_(t) for t in now.tensors]
        buffers = caches.Buffers(now.cache)
        before = buffers.lengths()
        answer = self.original(model, *args, **kwargs)
        after, position = buffers.lengths(), before
        written = buffers.written(position)
        buffers.go_to(before)
        stand_in, end = buffers.stand_in(now.cache, self.append)
        inner_args, inner_kwargs = step.replaced(args, kwargs, inputs, stand_in)
        root = weakref.ref(model)

        def run() -> Any:
            output = self.original(root(), *inner_args, **inner_kwargs)
            end()
            return output

        try:
            recording = self.recorder.record(run, device)
            recorded = _Recorded(inputs, buffers, recording, stand_in)
            self._in_order(now.cache)
            replayed = recorded.run(now.tensors, now.cache)
            kept = [*buffers.written(position), *buffers.lengths()], [*written, *after]
            why = self._compared((replayed, answer), now.cache, kept)
            why = f"a replay differs from the step itself: {why}" if why is not None else None
        except Exception as e:  # noqa: BLE001  # a model may do anything that cannot be recorded; the reason is kept
            first = _first(e)
            why = f"it cannot be recorded: {type(first).__name__}: {' '.join(str(first).split())[:300]}"
        if why is not None:
            kind.refused = why
            self.reasons[why] += 1
            buffers.go_to(after)
            buffers.write(position, written)
            return answer
        self._room()
        kind.recordings.append(recorded)
        self.recorded += 1
        return answer

    def _compared(self, outs: tuple[Any, Any], cache: Any, kept: tuple[list[Tensor], list[Tensor]]) -> str | None:
        (replayed, _), (original, _) = (outputs.taken_apart(out, cache) for out in outs)
        if len(replayed) != len(original):
            return f"{len(replayed)} tensors instead of {len(original)}"
        named = [("the output", *pair) for pair in zip(replayed, original, strict=True)]
        named += [("the cache", *pair) for pair in zip(*kept, strict=True)]
        for what, mine, theirs in named:
            if torch.equal(mine, theirs):
                continue
            why = self.differs(mine, theirs)
            if why is not None:
                return f"{what}: {why}"
        return None

    # -- letting go -------------------------------------------------------------------------------------------------

    def _all(self) -> list[_Recorded]:
        return [r for kind in self.kinds.values() for r in kind.recordings]

    def _room(self) -> None:
        """For one more recording: those whose caches are gone go first, the longest unused first."""
        while len(self._all()) >= MOST:
            with_free = [k for k in self.kinds.values() if any(r.buffers.free for r in k.recordings)]
            kind = next(iter(with_free), None) or next(k for k in self.kinds.values() if k.recordings)
            kind.recordings.remove(next((r for r in kind.recordings if r.buffers.free), kind.recordings[0]))

    def _forget(self) -> None:
        empty = [key for key, kind in self.kinds.items() if not kind.recordings]
        for key in empty[: max(0, len(empty) - KINDS)]:
            del self.kinds[key]


_AS_EVER = object()


def _first(e: BaseException) -> BaseException:
    """What went wrong first: ending a broken capture raises once more."""
    while e.__context__ is not None:
        e = e.__context__
    return e


# -- which model has which -------------------------------------------------------------------------------------------

_REPLAYS: dict[int, tuple[weakref.ref[Any], Replays]] = {}


def of(model: nn.Module, like: Replays) -> Replays:
    """The recordings of `model`; a copy of a model, which nobody told us of, gets its own, made as `like` is."""
    found = _REPLAYS.get(id(model))
    if found is not None and found[0]() is model:
        return found[1]
    return attach(model, like.twin())


def attach(model: nn.Module, replays: Replays) -> Replays:
    """Make these the recordings of `model` for as long as it lives."""
    key = id(model)

    def gone(ref: weakref.ref[Any]) -> None:
        held = _REPLAYS.get(key)
        if held is not None and held[0] is ref:
            del _REPLAYS[key]

    _REPLAYS[key] = weakref.ref(model, gone), replays
    return replays


def detach(model: nn.Module) -> None:
    """Let the recordings of `model` go."""
    found = _REPLAYS.pop(id(model), None)
    if found is not None:
        found[1].clear()
