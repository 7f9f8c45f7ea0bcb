"""What a newcomer gets wrong in the first hour is answered in words of what was asked, and nothing is touched."""

import pytest
import torch

from kernelswap.api import Swapper
from kernelswap.errors import KernelSwapError, ModeError, TableError


class Pipeline:
    """Something around a model, as `pipeline(...)` of Transformers gives it."""

    def __init__(self):
        self.model = torch.nn.Linear(2, 2)


WRONG = [
    ({"mode": "fast"}, ModeError, "'fast' is not a mode", "Mode.INFERENCE"),
    ({"table": "my.toml"}, TableError, "table='my.toml' is no table", "{layer: spec}"),
    ({"table": 3}, TableError, "table=3 is no table", "{layer: spec}"),
    ({"table": ["RMSNorm"]}, TableError, "table=['RMSNorm'] is no table", "{layer: spec}"),
    ({"prefer": "org/kernel:RMSNorm"}, TableError, "prefer='org/kernel:RMSNorm' does not say for what", "{'RMSNorm': "),
    ({"build": "no"}, TableError, "build='no' says nothing", "'never'"),
    ({"choose": "best"}, TableError, "choose='best' says nothing", "'measured'"),
    ({"check": "sometimes"}, KernelSwapError, "check='sometimes' says nothing", "'always'"),
]


@pytest.mark.parametrize(("given", "error", "found", "todo"), WRONG, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_an_argument_that_means_nothing_is_named_with_what_would(tmp_path, given, error, found, todo):
    model = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.SiLU())
    before = [type(m) for m in model.modules()]
    with pytest.raises(error) as raised:
        Swapper(cache=tmp_path).swap(model, **given)
    assert raised.value.found == found
    assert todo in raised.value.todo
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize(("given", "said"), [("gpt2", "found a str"), (Pipeline(), "found a Pipeline; its model is .model")])
def test_what_is_no_module_is_named_with_the_way_to_one(tmp_path, given, said):
    with pytest.raises(TypeError) as raised:
        Swapper(cache=tmp_path).swap(given)
    assert str(raised.value) == f"expected a torch.nn.Module, {said}"
