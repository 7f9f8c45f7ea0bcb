"""Tracers see the kernel's own function, or the original; never a graph break and never a check."""

from dataclasses import replace

import pytest
import torch
from tests.slots import parts
from tests.slots.parts import (
    Block,
    Model,
    Prover,
    Scaled,
    everywhere,
    kernel,
    off_by_one_kernel,
    rms_norm_kernel,
    scale_kernel,
    swap,
)

from kernelswap.apply import apply

X = torch.linspace(-1, 1, 24).reshape(3, 8)


@pytest.fixture(autouse=True, params=[True, False], ids=["by dict tags", "by every guard"])
def fresh_dynamo(request):
    """Each test under both ways to check guards: the first is the default of torch 2.9 to 2.12."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=request.param):
        yield
    torch._dynamo.reset()


def compiled(model):
    """Every graph break is an error; `eager` runs the captured graph as it is."""
    return torch.compile(model, fullgraph=True, backend="eager")


def test_compile_then_swap_then_undo_each_time_recompiles_by_the_type():
    model = Model().eval()
    plain, fast = model(X), compiled(model)
    assert torch.equal(fast(X), plain)
    applied = apply(model, everywhere(model, off_by_one_kernel), Prover(), check="off")
    swapped = model(X)
    assert not torch.equal(swapped, plain)
    assert torch.equal(fast(X), swapped)
    applied.undo()
    assert torch.equal(fast(X), plain)


def test_swap_then_compile_then_undo():
    model = Model().eval()
    plain = model(X)
    applied = apply(model, everywhere(model, off_by_one_kernel), Prover(), check="off")
    fast = compiled(model)
    assert torch.equal(fast(X), model(X))
    applied.undo()
    assert torch.equal(fast(X), plain)


def test_module_compile_in_place():
    model = Model().eval()
    plain = model(X)
    model.norm.compile(fullgraph=True, backend="eager")
    applied = apply(model, [swap("norm", kernel(off_by_one_kernel))], Prover(), check="off")
    with torch.no_grad():  # torch's own tracer warns of a graph input with a history
        assert torch.equal(model(X), plain + 1)
        applied.undo()
        assert torch.equal(model(X), plain)


def test_train_and_eval_of_a_compiled_model_move_its_kernels():
    model = Model().eval()
    plain = model(X)
    apply(model, [swap("norm", kernel(off_by_one_kernel), None)], Prover(), check="off")
    fast = compiled(model)
    assert torch.equal(fast(X), plain + 1)
    model.train()
    assert torch.equal(fast(X), plain)
    model.eval()
    assert torch.equal(fast(X), plain + 1)


def test_an_unproven_kernel_is_not_compiled_in_and_a_proven_one_is():
    prover = Prover()
    model = Model().eval()
    plain, fast = model(X), compiled(model)
    apply(model, [swap("norm", kernel(off_by_one_kernel))], prover)
    assert torch.equal(fast(X), plain)
    assert prover.calls == []  # nothing is checked inside a graph
    model(X)
    assert len(prover.calls) == 1
    assert torch.equal(fast(X), plain + 1)


def test_asked_to_compile_the_proof_on_random_tensors_is_enough():
    prover = Prover()
    model = Model().eval()
    plain, fast = model(X), compiled(model)
    apply(model, [swap("norm", kernel(off_by_one_kernel))], prover, compile=True)
    assert torch.equal(fast(X), plain + 1)
    assert prover.calls == []


def test_asked_to_compile_a_kernel_that_no_random_tensors_could_prove_waits_for_an_eager_call():
    model = Model().eval()
    plain, fast = model(X), compiled(model)
    one = swap("norm", kernel(off_by_one_kernel))
    unproved = replace(one, site=replace(one.site, row=replace(one.site.row, probe="")))
    apply(model, [unproved], Prover(), compile=True)
    assert torch.equal(fast(X), plain)
    model(X)
    assert torch.equal(fast(X), plain + 1)


@pytest.mark.parametrize("backward", [True, False])
def test_a_kernel_that_is_not_compile_safe_gives_way_inside_a_graph_only(backward):
    model = Model().eval().requires_grad_(requires_grad=False)
    plain, fast = model(X), compiled(model)
    one = kernel(off_by_one_kernel, compiles=False, backward=backward)
    apply(model, [swap("norm", one, None)], Prover())
    assert torch.equal(model(X), plain + 1)
    assert torch.equal(fast(X), plain)
    assert torch.equal(model(X), plain + 1)


@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_only_kernel_gives_way_inside_a_graph_that_wants_gradients(grad):
    model = Model().eval()
    plain, fast = model(X), compiled(model)
    apply(model, [swap("norm", kernel(off_by_one_kernel, backward=False), None)], Prover(), check="off")
    with torch.set_grad_enabled(grad):
        assert torch.equal(fast(X), plain if grad else plain + 1)


def test_gradients_through_a_compiled_swapped_model():
    model = Model()
    apply(model, everywhere(model, rms_norm_kernel), Prover())
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = Model()
    plain.load_state_dict(model.state_dict())
    plain(X).square().sum().backward()
    for _ in range(2):
        model.zero_grad()
        fast(X).square().sum().backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)
        model(X)  # proves; the second round compiles the kernels in


def test_layers_share_one_compilation():
    counter = torch._dynamo.testing.CompileCounter()
    model = Model(layers=4).eval()
    apply(model, everywhere(model, rms_norm_kernel), Prover(), check="off")
    for layer in model.layers:
        layer.compile(backend=counter, fullgraph=True)
    with torch.no_grad():
        model(X)
    assert counter.frame_count == 1


@pytest.mark.parametrize("check", ["off", "first-use"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("compiles", [True, False])
def test_export(check, strict, compiles):
    prover = Prover()
    model = Block().eval()
    plain = model(X)
    apply(model, [swap("norm2", kernel(off_by_one_kernel, compiles=compiles))], prover, check=check)
    program = torch.export.export(model, (X,), strict=strict)
    assert torch.equal(program.module()(X), plain + 1 if compiles and check == "off" else plain)
    assert prover.calls == []
    assert torch.equal(model(X), plain + 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compiles", [True, False])
def test_jit_trace(compiles):
    prover = Prover()
    model = Block().eval()
    plain = model(X)
    apply(model, [swap("norm2", kernel(off_by_one_kernel, compiles=compiles))], prover)
    traced = torch.jit.trace(model, X, check_trace=False)
    assert prover.calls == []
    assert torch.equal(traced(X), plain)
    assert torch.equal(model(X), plain + 1)


# -- functions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_part", [True, False])
@pytest.mark.parametrize("check", ["off", "first-use"])
def test_a_swapped_function_is_compiled_in_once_proven(check, as_part):
    prover = Prover()
    module = Scaled(8).eval()
    model = torch.nn.Sequential(module) if as_part else module
    plain, fast = model(X), compiled(model)
    assert torch.equal(fast(X), plain)
    applied = apply(module, [swap("", kernel(scale_kernel, kind="function"), name="scale")], prover, check=check)
    assert torch.equal(fast(X), plain if check == "first-use" else plain + 1)
    assert prover.calls == []
    assert torch.equal(model(X), plain + 1)
    assert torch.equal(fast(X), plain + 1)
    applied.undo()
    assert torch.equal(fast(X), plain)


def test_compiled_code_guards_on_the_function_that_it_holds_and_not_on_the_one_of_that_name(monkeypatch):
    counter = torch._dynamo.testing.CompileCounter()
    module = Scaled(8).eval()
    apply(module, [swap("", kernel(scale_kernel, kind="function"), name="scale")], Prover(), check="off")
    fast = torch.compile(torch.nn.Sequential(module), fullgraph=True, backend=counter)
    first = fast(X)
    monkeypatch.setattr(parts, "scale", lambda x, by: x)
    assert torch.equal(fast(X), first)
    assert counter.frame_count == 1


def test_a_function_that_is_not_compile_safe_gives_way_inside_a_graph_only():
    module = Scaled(8).eval()
    plain, fast = module(X), compiled(module)
    apply(module, [swap("", kernel(scale_kernel, kind="function", compiles=False), name="scale")], Prover())
    assert torch.equal(module(X), plain + 1)
    assert torch.equal(fast(X), plain)
    assert torch.equal(module(X), plain + 1)
