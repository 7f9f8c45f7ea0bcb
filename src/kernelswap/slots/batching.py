"""Continuous batching of a model whose attention is swapped: what was replaced serves until it ends.

Transformers refuses every setting there that is not one of its own names (`ContinuousBatchingManager.switch_to_cb_friendly_attn`,
5.17 to 5.23), and gives back at `stop` what it changed. Around these two, settings of ours step aside and return.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

MODULE = "transformers.generation.continuous_batching.continuous_api"
_BEGIN, _END = "switch_to_cb_friendly_attn", "stop"
_HELD = "_kernelswap_held"

Step = Callable[[], Callable[[], None]]
"""Puts one setting aside; what it returns brings it back."""


def installed(steps: Callable[[Any], Sequence[Step]]) -> Callable[[], None]:
    """Let settings step aside for continuous batching; what is returned ends that.

    Args:
        steps: of a model, one for each setting of ours in it.
    """
    manager = getattr(sys.modules.get(MODULE), "ContinuousBatchingManager", None)
    originals = {name: vars(manager).get(name) for name in (_BEGIN, _END)} if manager is not None else {}
    if manager is None or not all(originals.values()):
        return lambda: None
    begin, end = originals[_BEGIN], originals[_END]

    @functools.wraps(begin)
    def switch(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        back = [step() for step in steps(model)]
        try:
            found = begin(self, model, *args, **kwargs)
        except BaseException:
            for one in back:
                one()
            raise
        setattr(self, _HELD, [*getattr(self, _HELD, ()), *back])
        return found

    @functools.wraps(end)
    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = end(self, *args, **kwargs)
        for one in vars(self).pop(_HELD, ()):
            one()
        return found

    ours = {_BEGIN: switch, _END: stop}
    for name, function in ours.items():
        setattr(manager, name, function)

    def ended() -> None:
        for name, function in ours.items():
            if vars(manager).get(name) is function:  # whoever wrapped it since calls ours, which then finds nothing to do
                setattr(manager, name, originals[name])

    return ended
