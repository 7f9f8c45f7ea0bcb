"""Layers: marking, registering, kernelizing, and the repository classes."""

import copy
import threading
import warnings

import pytest
import torch
from tests.compat.conftest import published
from torch import nn

from kernelswap import compat
from kernelswap.compat import decorators, repositories
from kernelswap.slots import module as module_slot


def served(model):
    found = set(map(id, module_slot.swapped(model)))
    return [path for path, m in model.named_modules() if id(m) in found]


@pytest.fixture
def norm(kernels):
    @kernels.use_kernel_forward_from_hub("RMSNorm")
    class Norm(nn.Module):
        def __init__(self, n=8):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.rand(n) + 0.5), 1e-6

        def forward(self, hidden_states):
            x = hidden_states
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    return Norm


@pytest.fixture
def repo(kernels, hub):
    published(hub)

    def make(layer="RMSNorm", **more):
        return kernels.LayerRepository("org/demo", layer_name=layer, **{"version": 1, **more})

    return make


def test_a_marked_class_is_served_by_what_is_registered(kernels, norm, repo):
    model = nn.Sequential(norm(), nn.Linear(8, 8), norm())
    x = torch.randn(3, 8)
    before = model(x)
    kernels.register_kernel_mapping({"RMSNorm": {"cpu": repo()}})
    assert kernels.kernelize(model, mode=kernels.Mode.INFERENCE) is model
    assert served(model) == ["0", "2"]
    torch.testing.assert_close(model(x), before)
    assert isinstance(model[0], norm)


def test_an_unmarked_class_is_left_alone(kernels, norm, repo):  # marks another
    class RMSNorm(norm.__mro__[1]):
        forward = norm.forward

    kernels.register_kernel_mapping({"RMSNorm": {"cpu": repo()}})
    assert served(kernels.kernelize(nn.Sequential(RMSNorm()), mode=kernels.Mode.INFERENCE)) == []


def test_a_layer_that_no_table_knows_is_proven_on_its_first_call(kernels, repo):
    @kernels.use_kernel_forward_from_hub("Mine")
    class Mine(nn.Module):
        def forward(self, x):
            return x + x

    kernels.register_kernel_mapping({"Mine": {"cpu": repo("Doubles")}})
    model = kernels.kernelize(nn.Sequential(Mine()), mode=kernels.Mode.INFERENCE)
    assert served(model) == ["0"]
    assert torch.equal(model(torch.ones(2)), torch.full((2,), 2.0))


def test_a_condition_is_asked_of_each_module(kernels, repo, norm):
    kernels.replace_kernel_forward_from_hub(norm, "RMSNorm", lambda module: module.weight.shape[0] > 8)
    kernels.register_kernel_mapping({"RMSNorm": {"cpu": repo()}})
    model = kernels.kernelize(nn.ModuleList([norm(8), norm(16)]), mode=kernels.Mode.INFERENCE)
    assert served(model) == ["1"]


def test_kernelizing_again_decides_again(kernels, norm, repo):
    model = nn.Sequential(norm())
    with kernels.use_kernel_mapping({"RMSNorm": {"cpu": repo()}}):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE)
    assert served(model) == ["0"]
    kernels.kernelize(model, mode=kernels.Mode.TRAINING)
    assert served(model) == []


def test_mappings_merge_per_layer_device_and_mode(kernels, repo):
    from kernelswap.compat import mapping

    one, two, three = repo(), repo("LayerNorm"), repo("Doubles")
    kernels.register_kernel_mapping({"A": {"cuda": {kernels.Mode.INFERENCE: one}}})
    kernels.register_kernel_mapping({"A": {"cuda": {kernels.Mode.TRAINING: two}, "metal": three}, "B": {"cpu": one}})
    kernels.register_kernel_mapping({"A": {"cuda": three}})
    cuda = kernels.Device("cuda")
    assert mapping.current()["A"][cuda] == {kernels.Mode.INFERENCE: one, kernels.Mode.TRAINING: two, kernels.Mode.FALLBACK: three}
    assert set(mapping.current()["A"]) == {cuda, kernels.Device("mps")}
    with kernels.use_kernel_mapping({"C": {"cpu": one}}):
        assert set(mapping.current()) == {"A", "B", "C"}
        with kernels.use_kernel_mapping({"D": {"cpu": one}}, inherit_mapping=False):
            assert set(mapping.current()) == {"D"}
    assert set(mapping.current()) == {"A", "B"}
    kernels.register_kernel_mapping({"E": {"cpu": one}}, False)
    assert set(mapping.current()) == {"E"}


def test_a_mapping_in_use_is_this_threads_and_a_registered_one_everybodys(kernels, repo):
    from kernelswap.compat import mapping

    seen = []
    kernels.register_kernel_mapping({"A": {"cpu": repo()}})
    with kernels.use_kernel_mapping({"B": {"cpu": repo()}}):
        thread = threading.Thread(target=lambda: seen.append(set(mapping.current())))
        thread.start()
        thread.join()
    assert seen == [{"A"}]


def test_a_mapping_that_makes_no_sense_registers_nothing(kernels, repo):
    from kernelswap.compat import mapping

    mode = kernels.Mode
    with pytest.raises(ValueError, match="Unknown device type: gpu"):
        kernels.register_kernel_mapping({"A": {"cpu": repo()}, "B": {"gpu": repo()}})
    with pytest.raises(ValueError, match="exclude each other"):
        kernels.register_kernel_mapping({"A": {"cpu": {mode.INFERENCE | mode.TRAINING: repo()}}})
    with pytest.raises(ValueError, match="FALLBACK stands alone"):
        kernels.register_kernel_mapping({"A": {"cpu": {mode.INFERENCE | mode.FALLBACK: repo()}}})
    with pytest.raises(TypeError, match="is no repository"):
        kernels.register_kernel_mapping({"A": {"cpu": 3}})
    assert mapping.current() == {}


@pytest.mark.parametrize("mode", ["FALLBACK", "TORCH_COMPILE"])
def test_kernelize_wants_to_know_whether_it_infers_or_trains(kernels, norm, mode):
    with pytest.raises(ValueError, match=r"INFERENCE or Mode\.TRAINING"):
        kernels.kernelize(norm(), mode=getattr(kernels.Mode, mode))


def test_kernelize_takes_devices_of_every_form(kernels, norm, repo):
    kernels.register_kernel_mapping({"RMSNorm": {"cpu": repo()}})
    for device, there in (("cpu", [""]), (torch.device("cpu"), [""]), ("cuda", []), (torch.device("meta"), [])):
        assert served(kernels.kernelize(norm(), mode=kernels.Mode.INFERENCE, device=device)) == there
    with pytest.raises(ValueError, match=r"Unsupported device type 'gpu'\. Supported device types are: cpu, cuda, mps"):
        kernels.kernelize(norm(), mode=kernels.Mode.INFERENCE, device="gpu")


def test_what_fallback_does_not_cover_is_raised_and_the_model_is_as_it_was(kernels, norm, repo, hub):
    fallback, mode, model = kernels.KernelizeFallback, kernels.Mode, norm()
    published(hub, "org/elsewhere", variants=("torch-cuda",))

    def why(error=ValueError, *, without, **mapping):
        with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
            assert kernels.kernelize(model, mode=mode.TRAINING, use_fallback=fallback.ALL) is model
            assert served(model) == []
            with pytest.raises(error) as raised:
                kernels.kernelize(model, mode=mode.TRAINING, use_fallback=fallback.ALL & ~without)
            assert served(model) == []
        return str(raised.value)

    assert why(without=fallback.NO_LAYER) == "No layer mapping for `RMSNorm`"
    assert "device type `cpu`" in why(without=fallback.NO_DEVICE, RMSNorm={"cuda": repo()})
    assert "mode TRAINING" in why(without=fallback.NO_COMPATIBLE_MODE, RMSNorm={"cpu": {mode.INFERENCE: repo()}})
    assert "backward" in why(without=fallback.NO_COMPATIBLE_MODE, RMSNorm={"cpu": repo("InferenceOnly")})
    elsewhere = kernels.LayerRepository("org/elsewhere", layer_name="RMSNorm", version=1)
    assert why(FileNotFoundError, without=fallback.CANNOT_LOAD, RMSNorm={"cpu": elsewhere})
    assert fallback.DEFAULT == fallback.ALL & ~fallback.CANNOT_LOAD
    with pytest.raises(ValueError, match="No layer mapping"):
        kernels.kernelize(model, mode=mode.TRAINING, use_fallback=False)


def test_a_layer_that_is_registered_for_no_device_is_a_layer_without_a_device(kernels, norm):
    fallback, mode = kernels.KernelizeFallback, kernels.Mode.INFERENCE
    with kernels.use_kernel_mapping({"RMSNorm": {}}, inherit_mapping=False):
        assert kernels.kernelize(norm(), mode=mode, use_fallback=fallback.NO_DEVICE)
        with pytest.raises(ValueError, match="with device type `cpu`"):
            kernels.kernelize(norm(), mode=mode, use_fallback=fallback.NO_LAYER)


def test_only_the_best_registered_mode_is_looked_at_and_fetched(kernels, norm, repo, hub):
    """A worse one may be registered for what it cannot do, or be nowhere: that is found out when it is needed."""
    published(hub, "org/other")
    mode = kernels.Mode
    other = kernels.LayerRepository("org/other", layer_name="InferenceOnly", version=1)
    nowhere = kernels.LayerRepository("org/nowhere", layer_name="RMSNorm", version=1)
    kernels.register_kernel_mapping({"RMSNorm": {"cpu": {mode.INFERENCE: repo(), mode.TRAINING: other, mode.FALLBACK: nowhere}}})
    model = kernels.kernelize(norm(), mode=mode.INFERENCE, use_fallback=False)
    assert served(model) == [""]
    asked = [str(request) for request in hub.requests()]
    assert any("org/demo" in request for request in asked)
    assert not any("org/other" in request or "org/nowhere" in request for request in asked)
    with pytest.raises(ValueError, match="does not support backward"):
        kernels.kernelize(norm(), mode=mode.TRAINING)


def test_where_the_best_one_computes_something_else_the_next_serves(kernels, norm, repo):
    mode = kernels.Mode
    kernels.register_kernel_mapping({"RMSNorm": {"cpu": {mode.INFERENCE: repo("Wrong"), mode.TRAINING: repo()}}})
    model, x = norm(), torch.randn(3, 8)
    before = model(x)
    assert served(kernels.kernelize(model, mode=mode.INFERENCE)) == [""]
    torch.testing.assert_close(model(x), before)


def test_registering_for_what_a_kernel_cannot_do_is_an_error(kernels, norm, repo):
    kernels.register_kernel_mapping({"RMSNorm": {"cpu": {kernels.Mode.TRAINING: repo("InferenceOnly")}}})
    with pytest.raises(ValueError, match="does not support backward"):
        kernels.kernelize(norm(), mode=kernels.Mode.TRAINING, use_fallback=kernels.KernelizeFallback.ALL)


def test_an_untrusted_publisher_is_an_error_whatever_the_fallback(kernels, norm, hub):
    published(hub, "stranger/norms")
    hub.organization("stranger", trusted=False)
    asked = {"layer_name": "RMSNorm", "version": 1}
    kernels.register_kernel_mapping({"RMSNorm": {"cpu": kernels.LayerRepository("stranger/norms", **asked)}})
    with pytest.raises(ValueError, match="not a trusted publisher"):
        kernels.kernelize(norm(), mode=kernels.Mode.INFERENCE, use_fallback=kernels.KernelizeFallback.ALL)
    vouched = kernels.LayerRepository("stranger/norms", **asked, trust_remote_code=True)
    kernels.register_kernel_mapping({"RMSNorm": {"cpu": vouched}})
    assert served(kernels.kernelize(norm(), mode=kernels.Mode.INFERENCE)) == [""]


def test_disable_kernel_mapping_leaves_every_forward(make_swapper, hub, monkeypatch):
    monkeypatch.setenv("DISABLE_KERNEL_MAPPING", "1")
    published(hub)
    compat.install(make_swapper())
    import kernels

    class Twice(nn.Module):
        def forward(self, x):
            return x + x

    kernels.replace_kernel_forward_from_hub(Twice, "Twice")
    with kernels.use_kernel_mapping({"Twice": {"cpu": kernels.LayerRepository("org/demo", layer_name="Doubles", version=1)}}):
        assert served(kernels.kernelize(Twice(), mode=kernels.Mode.INFERENCE)) == []
    compat.uninstall()


# -- functions -----------------------------------------------------------------------------------------------------------


def rotary(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    half = q.shape[-1] // 2

    def turn(x):
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    return turn(q), turn(k)


def test_a_marked_function_is_a_module_that_calls_it_and_its_users_list_it(kernels):
    function = kernels.use_kernel_forward_from_hub("rotary_pos_emb")(rotary)
    assert isinstance(function, nn.Module)
    assert function.__name__ == "rotary"
    assert function.kernel_layer_name == "rotary_pos_emb"
    assert (function.has_backward, function.can_torch_compile) == (True, False)
    given = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    assert all(torch.equal(a, b) for a, b in zip(function(*given), rotary(*given), strict=True))

    @kernels.use_kernelized_func(function)
    class User(nn.Module):
        def forward(self, *given):
            return function(*given)

    user = User()
    assert user._kernel_funcs == {"rotary": function}
    assert list(user.children()) == []
    assert copy.deepcopy(user)._kernel_funcs
    with pytest.raises(ValueError, match="is not decorated"):
        kernels.use_kernelized_func(rotary)
    with pytest.raises(TypeError):
        kernels.use_kernel_forward_from_hub("x")(3)


def test_a_function_is_swapped_in_the_model_that_was_kernelized_and_in_no_other(kernels, repo, monkeypatch):
    function = kernels.use_kernel_forward_from_hub("rotary_pos_emb")(rotary)
    monkeypatch.setitem(globals(), "marked_rotary", function)

    @kernels.use_kernelized_func(function)
    class User(nn.Module):
        def forward(self, q, k, cos, sin):
            return marked_rotary(q, k, cos, sin)  # noqa: F821  # put there above

    one, two = User(), User()
    given = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    kernels.register_kernel_mapping({"rotary_pos_emb": {"cpu": repo("apply_rotary_pos_emb")}})
    kernels.kernelize(one, mode=kernels.Mode.INFERENCE)
    assert (served(one), served(two)) == ([""], [])
    for a, b in zip(one(*given), two(*given), strict=True):
        torch.testing.assert_close(a, b)


def test_the_deprecated_names_work_and_warn_once(kernels, hub, make_repo):
    published(hub)
    decorators._say_once.cache_clear()
    repositories._said.clear()
    root = make_repo("here", {"torch-cpu": "def double(x):\n    return x + x\n"})
    with pytest.warns(DeprecationWarning, match="use_kernel_forward_from_hub takes functions"):
        assert kernels.use_kernel_func_from_hub("rotary_pos_emb")(rotary).kernel_layer_name == "rotary_pos_emb"
    with pytest.warns(DeprecationWarning, match="LayerRepository takes functions"):
        found = kernels.FuncRepository("org/demo", func_name="double", version=1)
    with pytest.warns(DeprecationWarning, match="LocalLayerRepository takes functions"):
        local = kernels.LocalFuncRepository(root, func_name="double")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.use_kernel_func_from_hub("rotary_pos_emb")
        kernels.FuncRepository("org/demo", func_name="double", version=1)
    for repository in (found, local):
        cls = repository.load()
        assert issubclass(cls, nn.Module)
        assert cls()(torch.ones(1)) == 2


# -- repositories and devices --------------------------------------------------------------------------------------------


def test_a_repository_loads_its_layer_and_asks_for_nothing_before(kernels, repo, hub):
    asked = len(hub.requests())
    found = repo()
    assert str(found) == "org/demo@1:RMSNorm"
    assert len(hub.requests()) == asked
    assert found == repo(user_agent="somebody")
    assert hash(found) == hash(repo())
    assert found != repo("LayerNorm")
    cls = found.load()
    assert cls.__name__ == "RMSNorm"
    assert issubclass(cls, nn.Module)
    with pytest.raises(ValueError, match="not both"):
        repo(revision="v1")
    with pytest.raises(ValueError, match="Nothing"):
        repo("Nothing").load()
    with pytest.raises(TypeError, match="constructor"):
        repo("State").load()
    assert kernels.LayerRepository("org/demo", layer_name="RMSNorm").load() is cls


def test_a_layer_of_a_directory_is_named_by_text_or_path(kernels, norm, make_repo):
    from tests.swapping import repository

    root = repository(make_repo)
    for path in (root, str(root)):
        kernels.register_kernel_mapping({"RMSNorm": {"cpu": kernels.LocalLayerRepository(path, layer_name="RMSNorm")}})
        assert served(kernels.kernelize(norm(), mode=kernels.Mode.INFERENCE)) == [""]


def test_d8_a_directory_stands_in_for_a_repository_while_the_hub_is_away(make_repo, make_swapper):
    from tests.swapping import repository

    compat.install(make_swapper(local={"org/away": repository(make_repo, "away")}, at="http://127.0.0.1:9"))
    import kernels

    assert kernels.LayerRepository("org/away", layer_name="RMSNorm", version=1).load().__name__ == "RMSNorm"
    compat.uninstall()


def test_devices_say_what_they_accept(kernels):
    device, cuda, rocm = kernels.Device, kernels.CUDAProperties, kernels.ROCMProperties
    assert device("cuda", cuda(min_capability=80, max_capability=89)) == device("cuda", cuda(80, 89))
    assert device("metal") == device("mps")
    assert hash(cuda(80, 89)) == hash(cuda(80, 89))
    assert cuda(80, 89) != rocm(80, 89)
    with pytest.raises(ValueError, match="above"):
        cuda(90, 80)
    with pytest.raises(ValueError, match="takes CUDAProperties"):
        device("cuda", rocm(80, 90))
    with pytest.raises(ValueError, match="takes no properties"):
        device("cpu", cuda(80, 90))


def test_the_narrowest_interval_that_fits_the_device_wins(kernels, repo):
    import dataclasses

    from tests.swapping import CPU

    from kernelswap import types
    from kernelswap.compat import kernelizing

    gpus = tuple(types.Device("cuda", i, "gpu", capability=c) for i, c in enumerate([(8, 0), (9, 0), (7, 5)]))
    machine = dataclasses.replace(CPU, backend="cuda", devices=gpus)
    cuda, mode = kernels.CUDAProperties, kernels.Mode.INFERENCE
    kernels.register_kernel_mapping(
        {
            "RMSNorm": {
                kernels.Device("cuda", cuda(80, 99)): repo("RMSNorm"),
                kernels.Device("cuda", cuda(90, 90)): repo("LayerNorm"),
            }
        }
    )

    class Here:
        def __init__(self):
            self.machine = machine

        def provide(self, spec, *_, **__):
            return types.Implementation(spec, "module", len, backward=True, compiles=True, origin=None)

    planner = kernelizing._Planner(Here(), mode, kernels.KernelizeFallback.ALL, None)

    def spec(index):
        site = types.Site("norm", "module", "RMSNorm", "x.Norm", f"cuda:{index}", "torch.float32", False, types.Row("RMSNorm"))
        return [use.spec for use in planner.uses(site)]

    assert [spec(0), spec(1), spec(2)] == [["org/demo@1:RMSNorm"], ["org/demo@1:LayerNorm"], []]


def test_kernelize_fallback_and_mode_have_the_documented_members(kernels):
    flags = kernels.KernelizeFallback
    assert flags.NONE.value == 0
    assert {f.name for f in flags} >= {"NO_LAYER", "NO_DEVICE", "NO_COMPATIBLE_PROPERTIES", "NO_COMPATIBLE_MODE", "CANNOT_LOAD"}
    assert {m.name for m in kernels.Mode} == {"FALLBACK", "TRAINING", "INFERENCE", "TORCH_COMPILE"}


def test_a_benchmark_of_a_kernel_sets_up_runs_and_verifies(kernels):
    class Doubling(kernels.Benchmark):
        seed = 3

        def setup(self):
            self.x = torch.randn(2)

        def benchmark_base(self):
            self.out = self.x * 2

        def verify_base(self):
            return self.x + self.x

    one = Doubling()
    assert Doubling.workloads() == ("base",)
    one.prepare("base")
    one.benchmark_base()
    assert torch.equal(*one.verified("base"))
