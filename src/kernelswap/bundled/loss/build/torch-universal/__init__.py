"""The head of a language model and its loss without the logits between them: in Triton on NVIDIA GPUs, elsewhere in torch.

`layers.LMHead` stands in for the last linear layer. In training it returns logits that are computed when somebody reads them;
`torch.nn.functional.cross_entropy` reads them a few rows at a time and keeps none.
"""

from . import layers, tuning
from .lazy import LazyLogits
from .loss import linear_cross_entropy

__all__ = ["LazyLogits", "layers", "linear_cross_entropy", "tuning"]
