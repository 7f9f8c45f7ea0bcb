import functools
import inspect
import sys
import types

import pytest
import torch
import torch.nn as nn
from tests.kernel_files import Folder, candidate, metadata_of, write

from kernelswap import layers, loader, reads
from kernelswap.errors import LayerMismatch, UnknownKernel
from kernelswap.store import Store
from kernelswap.types import Implementation, Kernel

LAYERS = """
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import Linear
from os import getcwd
from .functions import rotary

class RMSNorm(nn.Module):
    weight: Tensor
    eps: float
    can_torch_compile = True
    has_backward = False

    def forward(self, hidden_states):
        return hidden_states * self.weight + self.eps

class Inherits(RMSNorm):
    def extra_repr(self):
        return "allowed"

class Pure(nn.Module):
    def forward(self, q, k):
        return k, q

def scale(x, by=2.0):
    return x * by
scale.can_torch_compile = True

class _Hidden(nn.Module):
    def forward(self, x): return x

class NotAModule:
    def forward(self, x): return x

class HasInit(nn.Module):
    def __init__(self):
        super().__init__()
    def forward(self, x): return x

class HasState(nn.Module):
    table = [1]
    def helper(self): pass
    def forward(self, x): return x

class NoForward(nn.Module):
    pass

class Static(nn.Module):
    @staticmethod
    def forward(x): return x

class OddMark(nn.Module):
    has_backward = "no"
    def forward(self, x): return x

class UsesSuper(nn.Module):
    def forward(self, x): return super().forward(x)

class UsesHelper(nn.Module):
    def _scale(self, x): return x
    def forward(self, x): return self._scale(x)
"""
FILES = {
    "__init__.py": "from . import layers\nfrom .functions import top_level\nVERSION = '1'\n",
    "layers.py": LAYERS,
    "functions.py": "def rotary(q, k):\n    return q, k\n\ndef top_level(x):\n    return x\n",
}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    root = tmp_path_factory.mktemp("layers")
    build = write(root / "repo", FILES, id_="_my_norm_cpu_layers1")
    artifact = Store(root / "cache").materialize(candidate(), metadata_of(build), Folder(build))
    yield loader.load(artifact)
    loader._loaded.pop(artifact.digest)
    for name in [n for n in loader._finder.packages if n.startswith("_my_norm_cpu_layers1")]:
        loader._forget(name)


# -- what a kernel offers -----------------------------------------------------------------------------------------


def test_a_class_says_what_it_can_do_and_what_it_reads(kernel):
    found = layers.implementation(kernel, "RMSNorm")
    assert (found.kind, found.layer, found.backward, found.compiles) == ("module", "RMSNorm", False, True)
    assert found.reads == ("weight", "eps")
    assert found.forward is kernel.module.layers.RMSNorm.forward
    assert found.origin is kernel.artifact


def test_without_marks_there_is_a_backward_and_no_compilation(kernel):
    found = layers.implementation(kernel, "Pure")
    assert (found.backward, found.compiles) == (True, False)


def test_overriding_a_method_of_module_and_inheriting_forward_are_allowed(kernel):
    assert layers.implementation(kernel, "Inherits").forward is kernel.module.layers.RMSNorm.forward


@pytest.mark.parametrize("name", ["scale", "rotary", "top_level"])
def test_functions_are_layers_from_the_layers_module_and_from_the_top(kernel, name):
    found = layers.implementation(kernel, name)
    assert (found.kind, found.reads, found.backward) == ("function", (), True)
    assert found.compiles is (name == "scale")


def test_a_class_that_reads_nothing_stands_in_for_a_function(kernel):
    found = layers.function(kernel, "Pure")
    assert found.kind == "function"
    assert found.forward(1, 2) == (2, 1)
    assert list(inspect.signature(found.forward).parameters) == ["q", "k"]
    assert layers.function(kernel, "scale").forward(2.0) == 4.0


def test_a_class_that_reads_its_module_does_not_stand_in_for_a_function(kernel):
    with pytest.raises(LayerMismatch, match="reads weight, eps"):
        layers.function(kernel, "RMSNorm")


def test_an_unknown_layer_is_answered_with_what_there_is_and_a_near_miss(kernel):
    with pytest.raises(UnknownKernel) as e:
        layers.implementation(kernel, "RMSnorm")
    assert "it offers Inherits, Pure, RMSNorm, rotary, scale, top_level" in str(e.value)
    assert "Did you mean RMSNorm?" in str(e.value)


@pytest.mark.parametrize(
    "name",
    [
        "__globals__",
        "__class__",
        "_Hidden",
        "__init__.__globals__",
        "layers.RMSNorm",
        "nn.Linear",
        "forward.__code__",
        "",
        "a b",
        "class",
        "RMSNorm\n",
    ],
)
def test_names_that_could_walk_out_of_the_contract_are_not_looked_up(kernel, name):
    with pytest.raises(UnknownKernel, match="cannot be the name of a layer"):
        layers.implementation(kernel, name)


@pytest.mark.parametrize("name", ["torch", "nn", "getcwd", "VERSION", "functions", "layers"])
def test_what_a_kernel_merely_imported_is_no_layer(kernel, name):
    with pytest.raises(UnknownKernel, match="it offers"):
        layers.implementation(kernel, name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("NotAModule", "is not a subclass of nn.Module"),
        ("HasInit", "has a constructor"),
        ("HasState", "has public members besides forward: helper, table"),
        ("NoForward", "has no forward"),
        ("Static", "a staticmethod, not a method"),
        ("OddMark", "says 'no' for has_backward"),
        ("UsesSuper", "uses super()"),
        ("UsesHelper", "uses members of its own in forward that the original lacks: _scale"),
        ("Linear", "has a constructor"),
        ("Tensor", "is not a subclass of nn.Module"),
    ],
)
def test_a_class_outside_the_contract_is_a_mismatch_that_says_why(kernel, name, why):
    with pytest.raises(LayerMismatch) as e:
        layers.implementation(kernel, name)
    assert why in str(e.value)
    assert name not in layers.offers(kernel)


# -- what a forward reads -----------------------------------------------------------------------------------------


def _helper(module, x, *, other=None):
    return x * module.scale


def _star(*args):
    return args


class Forwards:
    def norm(self, x):
        try:
            eps = self.variance_epsilon
        except AttributeError:
            eps = self.eps
        return x * self.weight.float() + eps

    def mlp_calls(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj.forward(x))

    def mlp_reads(self, x):
        return x @ self.gate_proj.weight.t() @ self.up_proj.weight

    def passes_on(self, x):
        return _helper(self, x)

    def passes_on_by_name(self, x):
        return _helper(x=x, module=self)

    def lost_in_star(self, x):
        return _star(self, x)

    def lost_in_torch(self, x):
        return torch.add(self, x)

    def returned(self, x):
        return self

    def by_name(self, x):
        return getattr(self, "bias", None), hasattr(self, "weight"), getattr(self.proj, "scale")  # noqa: B009

    def by_variable(self, x):
        return getattr(self, x)

    def by_dict(self, x):
        return self.__dict__["weight"]

    def loops(self, x):
        for expert in self.experts:
            x = expert(x)
        return [self.gates[i](x) for i in range(2)]

    def closure(self, x):
        return (lambda y: y * self.inner)(x)  # noqa: PLC3002  # that is the case

    def writes(self, x):
        self.cache = x
        self.count += 1
        return x

    def harmless(self, x):
        assert isinstance(self, nn.Module)
        return x if self.training else type(self)

    @functools.wraps(norm)
    def wrapped(self, *args):
        return self.norm(*args)


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        ("norm", ("variance_epsilon", "eps", "weight")),
        ("mlp_calls", ("down_proj()", "act_fn()", "gate_proj()", "up_proj()")),
        ("mlp_reads", ("gate_proj.weight", "up_proj.weight")),
        ("passes_on", ("scale",)),
        ("passes_on_by_name", ("scale",)),
        ("lost_in_star", ("*",)),
        ("lost_in_torch", ("*",)),
        ("returned", ("*",)),
        ("by_name", ("bias", "weight", "proj.scale")),
        ("by_variable", ("*",)),
        ("by_dict", ("*",)),
        ("loops", ("experts", "gates")),
        ("closure", ("inner",)),
        ("writes", ("count",)),
        ("harmless", ("training",)),
        ("wrapped", ("variance_epsilon", "eps", "weight")),
    ],
)
def test_reads(forward, found):
    assert reads.of(getattr(Forwards, forward)) == found


def test_what_has_no_source_may_read_anything():
    scope = {}
    exec("def forward(self, x): return x", scope)
    assert reads.of(scope["forward"]) == ("*",)
    assert reads.of(torch.add) == ("*",)


def test_the_root_of_a_read():
    assert [reads.root(r) for r in ("weight", "gate_proj.weight", "gate_proj()", "a.b()", "*")] == [
        "weight",
        "gate_proj",
        "gate_proj",
        "a",
        "*",
    ]


# -- against the original -----------------------------------------------------------------------------------------


def make(signature, kind="module", body="return None"):
    scope = {}
    exec(f"def forward{signature}: {body}", scope)
    return Implementation("L", kind, scope["forward"], True, False, None)


def original(signature):
    scope = {}
    exec(f"def forward{signature}: return None", scope)
    return scope["forward"]


CALLS = [
    # kernel, original, part of the reason
    ("(self, x)", "(self, x)", None),
    ("(self, x)", "(self, hidden_states)", None),
    ("(s, x)", "(self, x)", None),
    ("(self, x, y)", "(self, hidden_states, residual)", None),
    ("(self, x)", "(self, x, /)", None),
    ("(self, x)", "(self, hidden_states, /)", None),
    ("(self, x, scale=1.0)", "(self, x, scale=1.0)", None),
    ("(self, x, *args, **kw)", "(self, x, *a, **kwargs)", None),
    ("(self, x, flag=None)", "(self, x, flag)", None),
    ("(self, x, *, mask=None)", "(self, x, *, mask=None)", None),
    ("(self, x: int) -> int", "(self, x)", None),
    ("(self, x)", "(self, x, y)", "takes (x) where the original takes (x, y)"),
    ("(self, x, y=None)", "(self, x)", "takes (x, y=None)"),
    ("(self, x, /)", "(self, x)", "positional-only"),
    ("(self, *, x)", "(self, x)", "keyword-only"),
    ("(self, *x)", "(self, x)", "variadic positional"),
    ("(self, weight, x)", "(self, x, weight)", "has weight where the original has x"),
    ("(self, x, y)", "(self, y, z)", "has x where the original has y"),
    ("(self, x, alpha=1.0)", "(self, x, beta=1.0)", "has alpha where the original has beta"),
    ("(self, x, *, m=None)", "(self, x, *, mask=None)", "has m where the original has mask"),
    ("(self, x, eps)", "(self, x, eps=1e-6)", "requires eps"),
    ("(self, x, eps=1e-5)", "(self, x, eps=1e-6)", "defaults eps to 1e-05, the original to 1e-06"),
    ("(self, x, flag=1)", "(self, x, flag=True)", "defaults flag to 1"),
]


@pytest.mark.parametrize(("ours", "theirs", "why"), CALLS)
def test_mismatch(ours, theirs, why):
    found = layers.mismatch(make(ours), original(theirs))
    assert found is None if why is None else why in found


def test_mismatch_is_asked_for_every_target():
    impl = make("(self, x)")
    assert layers.mismatch(impl, original("(self, x)")) is None
    assert layers.mismatch(impl, original("(self, x, y)")) is not None
    assert layers.mismatch(impl, original("(self, input)")) is None


def test_mismatch_takes_a_class_for_its_forward():
    assert layers.mismatch(make("(self, input)"), nn.LayerNorm) is None
    assert layers.mismatch(make("(self, a, b)"), nn.LayerNorm) is not None


def test_of_a_function_every_parameter_counts():
    assert layers.mismatch(make("(q, k)", "function"), original("(q, k)")) is None
    assert layers.mismatch(make("(k, q)", "function"), original("(q, k)")) is not None


def test_a_signature_that_cannot_be_read_is_a_mismatch():
    impl = Implementation("L", "function", torch.add, True, False, None)
    assert layers.mismatch(impl, original("(a, b)")) == "its signature cannot be read"
    assert layers.mismatch(make("(a, b)", "function"), torch.add) == "the original's signature cannot be read"


@torch.library.custom_op("kernelswap_test_layers::scale", mutates_args=())
def custom_scale(x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
    return x * by


@pytest.mark.parametrize(
    "op", [custom_scale, torch.ops.kernelswap_test_layers.scale, torch.ops.kernelswap_test_layers.scale.default]
)
def test_operators_are_read_by_their_schema(op):
    impl = Implementation("L", "function", op, True, False, None)
    assert layers.mismatch(impl, original("(x, by=2.0)")) is None
    assert "defaults by to 2.0" in layers.mismatch(impl, original("(x, by=3.0)"))
    assert "cannot be renamed" in layers.mismatch(impl, original("(input, by=2.0)"))


def test_what_cannot_be_renamed_must_have_the_names():
    wrapped = functools.wraps(original("(self, x)"))(lambda *args, **kwargs: None)
    for impl in (
        Implementation("L", "module", wrapped, True, False, None),
        make("(self, x)", body="return locals()"),
        make("(self, x)", body="return (lambda: eval('x'))()"),
    ):
        assert layers.mismatch(impl, original("(self, x)")) is None
        assert "cannot be renamed" in layers.mismatch(impl, original("(self, hidden_states)"))


def test_a_fitted_kernel_can_be_called_by_the_names_of_the_original():
    scope = {"torch": torch}
    exec("def forward(self, x, y, *, z=3):\n hidden_states = x + y\n return [hidden_states + z + k * x for k in (1, 2)]", scope)
    impl = Implementation("L", "module", scope["forward"], True, False, None)
    target = original("(self, hidden_states, residual, *, z=3)")
    assert layers.mismatch(impl, target) is None
    fitted = layers.fit(impl, target)
    assert list(inspect.signature(fitted.forward).parameters) == ["self", "hidden_states", "residual", "z"]
    assert fitted.forward(None, hidden_states=1, residual=2) == impl.forward(None, 1, 2) == [7, 8]
    assert fitted.forward(None, 1, 2, z=0) == impl.forward(None, 1, 2, z=0)
    assert fitted.forward.__globals__ is impl.forward.__globals__
    assert layers.fit(impl, target).forward is fitted.forward  # one function per pair: caches hold
    assert layers.fit(impl, original("(self, x, y, *, z=3)")) is impl


def test_a_fitted_kernel_keeps_closures_defaults_and_marks():
    def outer(scale):
        def forward(self, x, hidden_states=1):
            def inner():
                return x * scale * hidden_states

            return inner()

        forward.can_torch_compile = True
        return forward

    impl = Implementation("L", "module", outer(5), True, False, None)
    target = original("(self, scale, hidden_states=1)")
    assert layers.mismatch(impl, target) is None
    fitted = layers.fit(impl, target).forward
    assert fitted(None, scale=2) == 10
    assert fitted(None, 2, hidden_states=3) == 30
    assert fitted.can_torch_compile


def test_a_fitted_kernel_compiles_to_one_graph():
    class Scale(nn.Module):
        def forward(self, hidden_states):
            return hidden_states * 2

    impl = Implementation("L", "module", lambda self, x: x + x, True, True, None)
    fitted = layers.fit(impl, Scale.forward)
    module = type("Swapped", (Scale,), {"forward": fitted.forward})()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert compiled(hidden_states=torch.ones(2)).tolist() == [2, 2]


# -- classes that ask to be served --------------------------------------------------------------------------------


class Marked(nn.Module):
    kernel_layer_name = "RMSNorm"
    kernel_condition = staticmethod(lambda module: module.training)

    def forward(self, x):
        return x


class Inherits(Marked):
    pass


class Overrides(Marked):
    def forward(self, x):
        return x + 1


class MarksOnly(Overrides):
    kernel_layer_name = "Other"
    kernel_condition = None


class Below(Overrides):
    pass


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (Marked, "RMSNorm"),
        (Inherits, "RMSNorm"),
        (Overrides, None),
        (MarksOnly, "Other"),
        (Below, None),
        (nn.Linear, None),
        (type, None),
    ],
)
def test_a_class_that_overrides_forward_is_not_taken_for_its_parent(cls, name):
    assert layers.declared(cls) == name


def test_the_condition_comes_with_the_mark():
    assert layers.condition(Marked)(Marked().eval()) is False
    assert layers.condition(Inherits)(Inherits().train()) is True
    assert layers.condition(Overrides) is None
    assert layers.condition(MarksOnly) is None
    assert layers.condition(nn.Linear) is None


def test_a_kernel_without_layers_offers_its_functions():
    module = types.ModuleType("some_kernel")
    exec("def relu(x): return x\n", vars(module))
    kernel = Kernel(layers_artifact(), module)
    assert layers.offers(kernel) == ("relu",)
    with pytest.raises(UnknownKernel, match="it offers relu"):
        layers.implementation(kernel, "RMSNorm")


def layers_artifact():
    from pathlib import Path

    from kernelswap.types import Artifact, Metadata

    return Artifact(candidate(), Path("/nowhere"), "0" * 64, Metadata("a", "a", 1, "MIT", "cpu"))


def test_layers_needs_no_torch_to_be_imported():
    import subprocess

    code = "import sys, kernelswap.layers; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="src")
    assert done.stdout.strip() == "False"
