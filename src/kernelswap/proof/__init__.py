"""Does a kernel compute what the original computes, as accurately, on this machine? And is it faster?"""

from .check import Check
from .measure import Measured, compare
from .verdicts import Verdicts

__all__ = ["Check", "Measured", "Verdicts", "compare"]
