from torch import nn

from ._ops import ops


class Twice(nn.Module):
    has_backward = False
    can_torch_compile = False

    def forward(self, input):  # noqa: A002  # the name of the original's parameter
        return ops.twice(input)
