"""A forward's source is read only where it is the source of what runs; a changed forward keeps everything but its statements."""

import ast
import functools
import inspect
import linecache
import traceback

import pytest
import torch
from tests.slots import forwards_to_read as forwards
from tests.slots.parts import RMSNorm
from torch import nn

from kernelswap.slots import fused, passages, rebuild, source

X = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
NAME = "kernelswap_residual_norm_norm"


def inner(cls):
    return inspect.unwrap(cls.forward)


@pytest.mark.parametrize("cls", [forwards.Layer, forwards.Inside, forwards.Attention, RMSNorm, nn.Linear, nn.MultiheadAttention])
def test_a_tree_compiles_to_the_very_code_that_runs(cls):
    forward = inner(cls)
    assert source.compiled(forward, source.read(forward)) == forward.__code__


def test_every_function_of_a_large_module_is_read_or_refused_and_hardly_any_is_refused():
    """Line numbers, columns, cells, mangled names, imported names: whatever would compile otherwise would be refused."""
    import argparse

    functions = [f for c in vars(argparse).values() if isinstance(c, type) for f in vars(c).values() if inspect.isfunction(f)]
    functions = [f for f in functions if f.__module__ == "argparse"]
    refused = [function.__qualname__ for function in functions if not readable(function)]
    assert len(functions) > 100
    assert len(refused) < 0.02 * len(functions), refused


def readable(function):
    try:
        source.read(function)
    except source.Unreadable:
        return False
    return True


class Mangled:
    def __init__(self):
        self.__hidden = 3

    def forward(self):
        return self.__hidden + len([__class__])


def test_names_are_mangled_and_cells_found_as_in_the_class():
    assert source.compiled(Mangled.forward, source.read(Mangled.forward)) == Mangled.forward.__code__
    copy = source.made(Mangled.forward, Mangled.forward.__code__, Mangled.forward.__globals__)
    assert copy(Mangled()) == 4


def around(times):
    def forward(x):
        """Holds `times` in a cell."""
        return x * times

    return forward


def test_cells_and_defaults_are_those_of_the_function():
    forward = around(3)
    tree = source.read(forward)
    tree.body[1] = ast.parse("return x * times + 1").body[0]
    code = source.compiled(forward, ast.fix_missing_locations(tree))
    assert source.made(forward, code, forward.__globals__)(5) == 16


def test_a_file_that_was_edited_since_is_not_believed(tmp_path):
    file = tmp_path / "edited.py"
    file.write_text("def forward(self, x):\n    return x + 1\n")
    scope = {"__name__": "edited"}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    source.read(scope["forward"])
    file.write_text("def forward(self, x):\n    return x + 2\n")
    linecache.checkcache()
    with pytest.raises(source.Unreadable, match="does not run the code that its source file has now"):
        source.read(scope["forward"])


def test_what_has_no_source_or_is_no_function_is_refused():
    scope = {}
    exec("def forward(self, x): return x", scope)
    with pytest.raises(source.Unreadable, match="no source"):
        source.read(scope["forward"])
    with pytest.raises(source.Unreadable):
        source.read(lambda self, x: x)


# -- rewritten ------------------------------------------------------------------------------------------------------


def opened(cls, **instead):
    """The class's forward with its passages as calls, and these functions under their names."""
    names = [p.name for pattern in passages.PATTERNS for p in fused.find(cls.forward, pattern)]
    forward = fused.opened(cls.forward, names)
    return rebuild.rebuilt(forward, instead) if instead else forward


@pytest.mark.parametrize("cls", [forwards.Layer, forwards.Swapped, forwards.Inside])
def test_statements_as_a_call_mean_what_they_meant(cls):
    module, seen = cls(RMSNorm(4), nn.Linear(4, 4)), []
    with torch.no_grad():
        want, got = module(X), opened(cls)(module, X)
    torch.testing.assert_close(got, want, atol=0, rtol=0)

    def kernel(norm, residual, hidden):
        seen.append(norm)
        return norm(residual + hidden) * 2, residual + hidden

    with torch.no_grad():
        other = opened(cls, **{NAME: kernel})(module, X)
    assert seen == [module.norm]
    assert not torch.equal(
        torch.stack(other) if isinstance(other, tuple) else other, torch.stack(want) if isinstance(want, tuple) else want
    )


@pytest.mark.parametrize("cls", [forwards.Attention, forwards.After])
def test_norms_and_rotary_as_a_call_mean_what_they_meant_and_hooks_see_the_same_shapes(cls):
    module, shapes = cls(RMSNorm(2), RMSNorm(2)), []
    for norm in (module.q_norm, module.k_norm):
        norm.register_forward_hook(lambda _, args, out: shapes.append((tuple(args[0].shape), tuple(out.shape))))
    with torch.no_grad():
        want, before = module(X, 2.0, 3.0), list(shapes)
        shapes.clear()
        assert torch.equal(opened(cls)(module, X, 2.0, 3.0), want)
    assert shapes == before


def test_projections_as_a_call_mean_what_they_meant():
    module, seen, name = forwards.Three(), [], "kernelswap_projections_a_b_c"
    with torch.no_grad():
        want = module(X)
        assert torch.equal(opened(forwards.Three)(module, X), want)

        def kernel(a, b, c, x):
            seen.append((a, b, c, x))
            return a(x) * 2, b(x), c(x)

        assert not torch.equal(opened(forwards.Three, **{name: kernel})(module, X), want)
    assert [list(map(id, given)) for given in seen] == [list(map(id, (module.a, module.b, module.c, X)))]
    assert inner(forwards.Three).__code__.co_varnames == inspect.unwrap(opened(forwards.Three)).__code__.co_varnames


@pytest.mark.parametrize("cls", [forwards.Into, forwards.Twice, forwards.Apart, forwards.Reads, forwards.Product])
def test_three_statements_that_are_not_projections_of_one_tensor_are_left_alone(cls):
    assert fused.find(cls.forward, "projections") == ()


def test_a_rewritten_forward_is_the_forward_to_everyone_who_looks():
    before, after = forwards.Layer.forward, opened(forwards.Layer)
    assert after is not before
    assert (after.__name__, after.__qualname__, after.__module__) == (before.__name__, before.__qualname__, before.__module__)
    assert inspect.signature(after) == inspect.signature(before)
    assert inspect.unwrap(after).__kwdefaults__ == {"by": 2.0}
    assert inspect.unwrap(after).__doc__ == "With a docstring."
    assert inspect.getsource(after) == inspect.getsource(before)
    assert after.__wrapped__ is inspect.unwrap(after)
    assert inner(forwards.Layer).__globals__ is vars(forwards)
    assert NAME not in vars(forwards)


def test_a_traceback_names_the_file_and_the_line_of_the_norm():
    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError("broken")

    module = forwards.Layer(Broken())
    lines, first = inspect.getsourcelines(inner(forwards.Layer))
    expected = first + next(i for i, line in enumerate(lines) if "self.norm(x)" in line)
    with pytest.raises(ValueError, match="broken") as caught:
        opened(forwards.Layer)(module, X)
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(caught.value.__traceback__)]
    assert (forwards.__file__, expected) in frames


@pytest.mark.parametrize(
    ("cls", "pattern", "why"),
    [
        (forwards.Between, "residual_norm", "its forward has `old = x * 1.0` where the norm of a sum is expected"),
        (forwards.Within, "residual_norm", "its forward has `x = self.mlp(self.norm(x))` where the norm of a sum is expected"),
        (forwards.Read, "norm_rotary", "its forward has `q = q * 2` between a norm and turn"),
        (forwards.More, "norm_rotary", "its forward calls `turn(q, k, cos, sin=sin)`, not turn of q, k, cos and sin"),
    ],
)
def test_what_deviates_is_left_alone_with_the_reason(cls, pattern, why):
    (found,) = fused.find(cls.forward, pattern)
    assert found.why == why
    with pytest.raises(LookupError):
        fused.opened(cls.forward, [found.name])


def test_a_norm_of_something_else_is_no_passage():
    assert fused.find(forwards.Another.forward, "residual_norm") == ()
    assert fused.find(forwards.Layer.forward, "norm_rotary") == ()


def test_a_forward_that_a_decorator_hides_is_not_touched():
    class Odd(forwards.Layer):
        forward = functools.partialmethod(forwards.Layer.forward)

    assert isinstance(fused.find(Odd.__dict__["forward"], "residual_norm"), str)
