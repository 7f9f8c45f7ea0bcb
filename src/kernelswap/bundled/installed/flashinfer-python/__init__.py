from . import layers
from ._package import DISTRIBUTION, RECORD, VERSION

__all__ = ["DISTRIBUTION", "RECORD", "VERSION", "layers"]
