"""A function swap reaches one module's forward, through its decorators, and no other model of the process."""

import functools
import inspect
import pickle

import pytest
import torch
from tests.slots import parts
from tests.slots.parts import Prover, RMSNorm, Scaled, kernel, off_by_one_kernel, scale, scale_kernel, swap
from torch import nn

from kernelswap.apply import apply
from kernelswap.slots import function as slots

X = torch.linspace(-1, 1, 12).reshape(3, 4)
FAST = kernel(scale_kernel, kind="function", layer="scale")


def swapped(module=None, implementation=FAST, *, training=..., check="off", prover=None, path="", name="scale"):
    module = module or Scaled()
    training = implementation if training is ... else training
    return module, apply(module, [swap(path, implementation, training, name=name)], prover or Prover(), check=check)


def test_only_this_module_finds_the_kernel_under_the_name():
    a, b = Scaled(), Scaled()
    plain = b(X)
    _, applied = swapped(a)
    assert torch.equal(a(X), plain + 1)
    assert torch.equal(b(X), plain)
    assert parts.scale is scale
    assert Scaled.forward.__globals__ is vars(parts)
    applied.undo()
    assert torch.equal(a(X), plain)
    assert type(a) is Scaled


def test_the_kernel_is_called_without_a_frame_of_ours():
    callers = []

    def forward(x, by=2.0):
        callers.append(inspect.stack()[1].function)
        return x

    module, _ = swapped(implementation=kernel(forward, kind="function"), check="first-use")
    for _ in range(2):
        module(X)
    assert callers[-1] == "forward"
    assert type(module).forward.__code__ is Scaled.forward.__code__


def test_other_names_are_those_of_the_module_as_it_was():
    module, _ = swapped()
    assert type(module).forward.__globals__["RMSNorm"] is RMSNorm
    assert set(vars(parts)) - set(type(module).forward.__globals__) == {"__name__"}


def test_layers_of_one_class_share_their_subclass():
    model = nn.Sequential(Scaled(), Scaled(), Scaled())
    apply(model, [swap(str(i), FAST, name="scale") for i in range(3)], Prover())
    model(X)
    assert len({type(m) for m in model}) == 1


def test_train_and_eval_are_live():
    module, _ = swapped(training=None)
    plain = Scaled()(X)
    assert torch.equal(module.train()(X), plain)
    assert torch.equal(module.eval()(X), plain + 1)


@pytest.mark.parametrize("reason", [None, "differs"])
@pytest.mark.parametrize("grad", [True, False])
def test_the_first_call_is_checked_and_the_function_alone_is(reason, grad):
    prover = Prover(reason)
    seen = []

    class Looking(Prover):
        def first_call(self, site, module, original, candidate, run, args, kwargs):
            seen.append((site.name, original, candidate.forward, len(args), kwargs, run.training))
            return prover.first_call(site, module, original, candidate, run, args, kwargs)

    module, applied = swapped(check="first-use", prover=Looking())
    module.eval()
    plain = Scaled()(X)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            assert torch.equal(module(X), plain if reason else plain + 1)
    assert seen == [("scale", scale, scale_kernel, 1, {"by": 3.0}, grad)]
    assert [r for _, r in applied.refusals] == ([reason] if reason else [])


def test_counting_counts_calls_of_the_function():
    module, applied = swapped(check="first-use")
    with applied.counting():
        for _ in range(3):
            module(X)
    assert applied.calls == {"": 3}
    assert type(module).forward.__globals__["scale"] is scale_kernel


def test_two_functions_of_one_forward():
    class Both(nn.Module):
        def forward(self, x):
            return scale(x) + rescale(x)

    one, two = kernel(lambda x: x * 10, kind="function"), kernel(lambda x: x * 100, kind="function")
    for check in ("off", "first-use"):
        module = Both()
        applied = apply(module, [swap("", one, name="scale"), swap("", two, None, name="rescale")], Prover(), check=check)
        for _ in range(2):
            assert torch.allclose(module.eval()(X), X * 110)
            assert torch.allclose(module.train()(X), X * 10 + rescale(X))
        applied.undo()
        assert torch.equal(module(X), scale(X) + rescale(X))


def rescale(x):
    return x * 5


def test_a_swapped_forward_leaves_its_function_moot_in_that_mode_only():
    module = Scaled()
    plain = Scaled()(X)
    zero = kernel(lambda self, x: x * 0)
    applied = apply(module, [swap("", zero, None), swap("", FAST, name="scale")], Prover())
    for _ in range(2):
        assert torch.equal(module.eval()(X), X * 0)
        assert torch.equal(module.train()(X), plain + 1)
    applied.undo()
    assert type(module) is Scaled


def test_a_forward_only_function_gives_way_where_gradients_are_wanted():
    module, _ = swapped(implementation=kernel(scale_kernel, kind="function", backward=False), training=None, check="first-use")
    plain = Scaled()(X)
    module.eval()
    for _ in range(2):
        assert torch.equal(module(X), plain)
        with torch.no_grad():
            assert torch.equal(module(X), plain + 1)


def test_the_submodule_of_a_function_site_may_be_swapped_too():
    module = Scaled()
    plain = Scaled()
    apply(module, [swap("", FAST, name="scale"), swap("norm", kernel(off_by_one_kernel))], Prover())
    for _ in range(2):
        assert torch.equal(module(X), scale(plain.norm(X) + 1, by=3.0) + 1)


def test_a_pickle_names_the_original_class():
    module, _ = swapped()
    back = pickle.loads(pickle.dumps(module))
    assert type(back) is Scaled
    assert torch.equal(back(X), Scaled()(X))


# -- decorators ---------------------------------------------------------------------------------------------------


def adding(amount):
    def decorator(function):
        @functools.wraps(function)
        def wrapper(self, *args, **kwargs):
            return function(self, *args, **kwargs) + amount

        return wrapper

    return decorator


def bare(function):
    def wrapper(self, x):
        return function(self, x)

    return wrapper


class Decorated(Scaled):
    @adding(10)
    @bare
    @torch.no_grad()
    @adding(100)
    def forward(self, x):
        return next(scale(y) for y in (x,))


class ThroughPartial(Scaled):
    forward = functools.partialmethod(lambda self, x, by: scale(x, by), by=2.0)


class ThroughMethod(Scaled):
    def forward(self, x):
        return self.helper(x)

    def helper(self, x):
        return scale(x)


class WithSuper(Scaled):
    def forward(self, x, *, twice=True):
        """Scale what the parent has scaled."""
        return scale(super().forward(x), by=2.0 if twice else 1.0)


def test_the_innermost_function_is_reached_and_every_decorator_stays():
    plain = Decorated()(X)
    module, applied = swapped(Decorated(), check="first-use")
    for _ in range(2):
        out = module(X)
        assert torch.equal(out, X * 2.0 + 1 + 100 + 10)
        assert not out.requires_grad
    assert torch.equal(Decorated()(X), plain)
    applied.undo()
    assert torch.equal(module(X), plain)


def test_unwrapping_the_copy_leads_to_the_copied_function():
    class Wrapped(Scaled):
        @adding(10)
        @adding(100)
        def forward(self, x):
            return scale(x)

    module, _ = swapped(Wrapped())
    assert inspect.unwrap(type(module).forward).__globals__["scale"] is scale_kernel
    assert inspect.unwrap(Wrapped.forward).__globals__["scale"] is scale


def test_super_defaults_names_and_signature_survive():
    module, _ = swapped(WithSuper())
    plain = WithSuper()
    assert torch.equal(module(X), plain(X) + 1)
    assert torch.equal(module(X, twice=False), plain(X, twice=False) + 1)
    ours, theirs = type(module).forward, WithSuper.forward
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__defaults__", "__kwdefaults__", "__annotations__"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert inspect.signature(ours) == inspect.signature(theirs)


@pytest.mark.parametrize(
    ("cls", "name", "why"),
    [
        (Scaled, "nothing", "does not look up nothing as a global"),
        (ThroughMethod, "scale", "does not look up scale as a global"),
        (ThroughPartial, "scale", "does not look up scale as a global"),
        (Scaled, "scale", None),
        (Decorated, "scale", None),
        (WithSuper, "scale", None),
    ],
)
def test_what_is_not_looked_up_as_a_global_says_so(cls, name, why):
    said = slots.obstacle(cls(), name)
    assert said is why if why is None else why in said
    if why is None:
        assert slots.original(cls(), name) is scale
    else:
        with pytest.raises(LookupError):
            slots.original(cls(), name)


def test_a_function_that_cannot_be_swapped_leaves_the_other_modules_plain():
    model = nn.Sequential(Scaled(), Scaled())
    with pytest.raises(LookupError):
        apply(model, [swap("0", FAST, name="scale"), swap("1", FAST, name="nothing")], Prover())
    assert [type(m) for m in model] == [Scaled, Scaled]
