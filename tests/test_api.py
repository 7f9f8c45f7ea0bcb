"""The straight path, end to end: from a spec to a module, from a model to a swapped one and back."""

import copy
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
from tests import swapping
from tests.hub import kernel_files
from tests.swapping import CPU, LAYERS, Near, RMSNorm, frozen

from kernelswap import build as building
from kernelswap import spec
from kernelswap.api import Swapper
from kernelswap.errors import (
    BuildFailed,
    KernelSwapError,
    NoVariant,
    Refused,
    Required,
    SpecError,
    TableError,
    Tampered,
    UndoConflict,
    UnknownKernel,
)
from kernelswap.sources.bundled import BundledSource
from kernelswap.sources.directory import DirectorySource
from kernelswap.sources.hub import HubSource
from kernelswap.types import Mode, Row, Swap, Use

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def root(make_repo):
    return swapping.repository(make_repo)


@pytest.fixture
def make_swapper(tmp_path, root, monkeypatch):
    monkeypatch.chdir(tmp_path)  # policy files are looked for in the working directory
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def make(**more):
        more = {"prover": Near(), "table": swapping.rows(root), "machine": CPU, "offline": True, **more}
        return Swapper(cache=tmp_path / "cache", **more)

    return make


@pytest.fixture
def swapper(make_swapper):
    return make_swapper()


@pytest.fixture
def with_hub(make_swapper, hub, hub_cache, tmp_path):
    """A Swapper whose hub is on loopback and has `org/plain`, of a trusted publisher, at v1."""
    hub.organization("org", trusted=True)
    hub.repo("org/plain").branch(
        "v1", kernel_files("torch-cpu", "from . import layers", name="plain", files={"layers.py": LAYERS})
    )

    def make(**more):
        sources = {"hub": HubSource(hub_cache, endpoint=hub.url, backoff=0.01), "dir": DirectorySource()}
        return make_swapper(sources=sources, offline=False, **more)

    return make


HUB_ROWS = (Row("RMSNorm", targets=("RMSNorm",), probe="rows", use=(Use("org/plain@1:RMSNorm"),)),)


# -- one kernel -----------------------------------------------------------------------------------------------------


def test_find_says_what_would_be_used_here_and_elsewhere(swapper, make_repo):
    root = make_repo("two", {"torch-cpu": "", "torch-cuda": ""})
    assert swapper.find(f"dir://{root}").chosen.variant == "torch-cpu"
    assert swapper.find(f"dir://{root}", machine="cuda=12.8,sm=90").chosen.variant == "torch-cuda"
    assert swapper.find(f"dir://{root}", machine="cuda=12.8,sm=90", device="cpu").chosen.variant == "torch-cpu"


def test_load_gives_the_module_and_looks_at_the_layer(swapper, root):
    module = swapper.load(f"dir://{root}")
    assert module.layers.RMSNorm
    assert swapper.load(f"dir://{root}:RMSNorm") is module
    with pytest.raises(UnknownKernel, match="Did you mean RMSNorm"):
        swapper.load(f"dir://{root}:RMSNrom")


def test_an_edited_directory_is_loaded_anew(swapper, make_repo):
    first = swapper.load(f"dir://{make_repo('edited', {'torch-cpu': 'VALUE = 1'})}")
    second = swapper.load(f"dir://{make_repo('edited', {'torch-cpu': 'VALUE = 2'})}")
    assert (first.VALUE, second.VALUE) == (1, 2)


def test_a_source_that_is_not_there_is_named(make_swapper):
    with pytest.raises(UnknownKernel, match=r"no source 'hub'; there is dir"):
        make_swapper(sources={"dir": DirectorySource()}).find("org/kernel@1")


def test_no_variant_says_the_nearest_and_lists_all(swapper, make_repo):
    root = make_repo("gpu", {"torch-cuda": "", "torch-rocm": ""})
    with pytest.raises(NoVariant) as e:
        swapper.load(f"dir://{root}")
    assert e.value.reason.startswith("none of its 2 builds fits; the nearest, torch-")
    assert "torch-cuda" in str(e.value)
    assert "torch-rocm" in str(e.value)


def test_what_a_kernel_needs_is_loaded_before_it(with_hub, hub):
    code = "from kernelswap import loader\nplain = loader.dependency('org/plain')"
    metadata = {"kernel-depends": [{"repo-id": "org/plain", "version": 1}]}
    hub.repo("org/above").branch("v1", kernel_files("torch-cpu", code, name="above", metadata=metadata))
    swapper = with_hub()
    assert swapper.load("org/above@1").plain is swapper.load("org/plain@1")


def test_a_provided_layer_must_be_named(swapper, root):
    with pytest.raises(SpecError, match="a layer must be named"):
        swapper.provide(f"dir://{root}")


def test_a_cached_pinned_kernel_costs_no_request(with_hub, hub):
    commit = hub.repo("org/plain").branches["v1"]
    with_hub().load(f"org/plain@{commit}")
    hub.log.clear()
    again = with_hub()
    assert again.find(f"org/plain@{commit}").chosen.commit == commit
    again.load(f"org/plain@{commit}")
    assert hub.log == []


def test_two_swappers_do_not_know_each_other(make_swapper, root):
    model = swapping.model(layers=1)
    one, other = make_swapper(), make_swapper()
    one.swap(model)
    assert other.applied(model) is None
    assert {o.reason for o in other.swap(model).outcomes if o.site.layer == "RMSNorm"} == {
        f"dir://{root}:RMSNorm: it is swapped already; undo that swap first"
    }
    one.unkernelize(model)


# -- one model ------------------------------------------------------------------------------------------------------


def test_a_swapped_model_computes_the_same_and_comes_back_exactly(swapper):
    model, x = swapping.model(), torch.randn(2, 5, 16)
    before, expected = frozen(model), model(x)
    applied = swapper.swap(model)
    assert applied.report["swapped"] == 7
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert [v for _, _, v, _ in frozen(model)] == [v for _, _, v, _ in before]  # no `__dict__` has changed
    applied.undo()
    assert frozen(model) == before
    assert torch.equal(model(x), expected)


def test_a_swap_is_a_context_manager(swapper):
    model = swapping.model(layers=1)
    before = frozen(model)
    with swapper.swap(model) as applied:
        assert applied is swapper.applied(model)
        assert frozen(model) != before
    assert frozen(model) == before


def test_swapping_again_takes_back_what_was_there_before(swapper):
    model = swapping.model(layers=1)
    before = frozen(model)
    first = swapper.swap(model)
    second = swapper.swap(model, skip="RMSNorm")
    assert [o.site.path for o in second.outcomes if isinstance(o, Swap)] == ["0.mlp"]
    assert list(first.modules()) == []
    first.undo()
    assert len(list(second.modules())) == 1
    second.undo()
    assert frozen(model) == before


def test_a_decorated_class_is_recognised_while_it_is_swapped(swapper):
    class Scaling(RMSNorm):
        kernel_layer_name = "RMSNorm"

        def forward(self, x):
            return super().forward(x)

    module = Scaling(8)
    swapper.swap(module)
    assert isinstance(swapper.swap(module).outcomes[0], Swap)
    swapper.unkernelize(module)


def test_a_second_swap_that_fails_leaves_the_first_in_place(swapper):
    model = swapping.model(layers=1)
    first = swapper.swap(model)
    now = frozen(model)
    with pytest.raises(Required):
        swapper.swap(model, require="LayerNorm")
    with pytest.raises(KernelSwapError, match="check='sometimes' says nothing"):
        swapper.swap(model, check="sometimes")
    assert frozen(model) == now
    assert swapper.applied(model) is first
    first.undo()


def test_what_was_wrapped_after_a_swap_is_not_swapped_from_under_it(swapper):
    model = swapping.model(layers=1)
    swapper.swap(model)
    installed = type(model[0].norm)
    model[0].norm.__class__ = type("Wrapper", (installed,), {})
    now = frozen(model)
    with pytest.raises(UndoConflict):
        swapper.swap(model)
    assert frozen(model) == now
    model[0].norm.__class__ = installed
    swapper.unkernelize(model)


def test_a_missing_required_swap_leaves_the_model_alone(swapper):
    model = swapping.model(layers=1)
    before = frozen(model)
    with pytest.raises(Required, match=r"skipped by you"):
        swapper.swap(model, require=["RMSNorm"], skip="0.norm")
    assert frozen(model) == before
    assert swapper.applied(model) is None


def test_planning_touches_nothing(swapper):
    model = swapping.model(layers=1)
    before = frozen(model)
    assert sum(type(o).__name__ == "Swap" for o in swapper.plan(model)) == 3
    assert frozen(model) == before


def test_kernelize_returns_the_model_and_unkernelize_gives_it_back(swapper):
    model = swapping.model(layers=1)
    before = frozen(model)
    assert swapper.kernelize(model, mode=Mode.TRAINING) is model
    assert frozen(model) != before
    assert swapper.unkernelize(model) is model
    assert frozen(model) == before
    swapper.unkernelize(model)


def test_a_copy_of_a_swapped_model_can_be_unkernelized(swapper):
    model = swapping.model(layers=1)
    plain = [type(m) for m in model.modules()]
    swapper.swap(model)
    twin = copy.deepcopy(model)
    swapper.unkernelize(twin)
    assert [type(m) for m in twin.modules()] == plain
    assert [type(m) for m in model.modules()] != plain
    assert [type(m) for m in pickle.loads(pickle.dumps(model)).modules()] == plain
    swapper.unkernelize(model)


def test_a_swapper_keeps_no_model_alive(swapper):
    model = swapping.model(layers=1)
    gone = weakref.ref(model)
    swapper.swap(model)
    model(torch.randn(2, 16))
    lone = RMSNorm(8)
    gone_too = weakref.ref(lone)
    swapper.swap(lone)
    del model, lone
    gc.collect()
    assert gone() is None
    assert gone_too() is None


def test_explain_says_what_is_and_what_would_be(swapper):
    model = swapping.model(layers=1)
    assert swapper.explain(model).startswith("not swapped; swap(model) would do this:")
    swapper.swap(model)
    assert "3 of 4 swapped" in swapper.explain(model)
    assert "inside mlp, which is swapped" in swapper.explain(model)
    swapper.unkernelize(model)
    assert swapper.explain(model).startswith("not swapped")


def test_after_undo_of_the_handle_the_model_counts_as_not_swapped(swapper):
    model = swapping.model(layers=1)
    swapper.swap(model).undo()
    assert swapper.applied(model) is None
    assert swapper.explain(model).startswith("not swapped")


def test_training_and_inference_are_live(swapper, root):
    rows = {"RMSNorm": [f"dir://{root}:InferenceOnly"]}
    module = RMSNorm(8).eval()
    swapper.swap(module, table=rows, inherit=False, check="off")
    with swapper.applied(module).counting():
        with torch.no_grad():
            module(torch.randn(2, 8))
        assert swapper.applied(module).calls == {"": 1}
        module.train()
        module(torch.randn(2, 8)).sum().backward()
        assert swapper.applied(module).calls == {"": 1}
    swapper.unkernelize(module)


def test_the_environment_can_switch_every_kernel_off(make_swapper, monkeypatch):
    monkeypatch.setenv("USE_HUB_KERNELS", "0")
    model = swapping.model(layers=1)
    outcomes = make_swapper().swap(model).outcomes
    assert {o.reason for o in outcomes} == {"kernels are switched off: USE_HUB_KERNELS is 0"}


def test_a_swapper_may_be_shared_between_threads(swapper):
    models = [swapping.model(layers=1) for _ in range(6)]
    errors = []

    def work(model):
        try:
            swapper.swap(model)
            model(torch.randn(2, 16))
            swapper.unkernelize(model)
        except BaseException as e:  # noqa: BLE001  # whatever it is, the test shows it
            errors.append(e)

    threads = [threading.Thread(target=work, args=(m,)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# -- tables ---------------------------------------------------------------------------------------------------------


def test_a_table_may_be_a_mapping_of_layers_to_specs(swapper, root):
    def served(table, **more):
        (outcome,) = swapper.plan(RMSNorm(8), table=table, **more)
        return getattr(outcome, "reason", None) or outcome.inference.implementation.layer

    spec = f"dir://{root}:InferenceOnly"
    assert served({"RMSNorm": spec}) == "InferenceOnly"
    assert served({"RMSNorm": {"cuda": "org/x@1:Y", "cpu": spec}}) == "InferenceOnly"
    assert served({"RMSNorm": ["dir:///nowhere:X", spec]}) == "InferenceOnly"
    assert served({"RMSNorm": ""}) == "left alone: you asked for it"
    assert served({"RMSNorm": {"cuda": "org/x@1:Y"}}) == "RMSNorm"
    assert served({"RMSNorm": {"cuda": "org/x@1:Y"}}, inherit=False) == "no kernel in the table is for cpu"
    assert served({"SiLU": spec}, inherit=False) == "no kernel in the table serves RMSNorm"


def test_a_class_that_no_row_knows_can_be_named(swapper, root):
    class Normaliser(RMSNorm):
        pass

    (outcome,) = [
        o for o in swapper.plan(Normaliser(8), table={"Normaliser": f"dir://{root}:RMSNorm"}) if o.site.layer == "Normaliser"
    ]
    assert outcome.inference.implementation.layer == "RMSNorm"


@pytest.mark.parametrize("table", [{"RMSNorm": 3}, {"RMSNorm": [3]}, {"RMSNorm": "no:such:spec:"}, {"RMSNorm": {"gpu": "a/b:C"}}])
def test_a_table_that_says_nothing_is_an_error(swapper, table):
    with pytest.raises((TableError, SpecError)):
        swapper.plan(RMSNorm(8), table=table)


def test_an_option_that_does_not_exist_is_an_error(swapper):
    with pytest.raises(TypeError, match="skp"):
        swapper.swap(RMSNorm(8), skp="norm")


# -- the hub, only when asked ---------------------------------------------------------------------------------------


def test_nothing_is_fetched_unless_somebody_asks(with_hub, hub):
    module = RMSNorm(8)
    (outcome,) = with_hub(table=HUB_ROWS).swap(module).outcomes
    assert "is on the hub, and nothing is fetched unless you ask: hub=True" in outcome.reason
    assert hub.log == []


@pytest.mark.parametrize(
    "asking",
    [
        {"hub": True},
        {"prefer": {"RMSNorm": "org/plain@1:RMSNorm"}},
        {"table": {"RMSNorm": "org/plain@1:RMSNorm"}},
        {"table": HUB_ROWS},
    ],
)
def test_asking_is_a_flag_a_preference_or_a_table_of_ones_own(with_hub, hub, asking):
    (outcome,) = with_hub(table=HUB_ROWS).plan(RMSNorm(8), **asking)
    assert outcome.inference.implementation.origin.candidate.commit == hub.repo("org/plain").branches["v1"]


def test_a_publisher_that_nobody_vouches_for_is_refused_for_what_you_name_and_a_reason_for_the_table(with_hub, hub):
    hub.repo("mallory/plain").branch("v1", dict(hub.repo("org/plain").commits[hub.repo("org/plain").branches["v1"]]))
    rows = (Row("RMSNorm", targets=("RMSNorm",), probe="rows", use=(Use("mallory/plain@1:RMSNorm"),)),)
    swapper = with_hub(table=rows)
    assert "mallory is not a trusted publisher" in swapper.plan(RMSNorm(8), hub=True)[0].reason
    module = RMSNorm(8)
    with pytest.raises(Refused):
        swapper.swap(module, table={"RMSNorm": "mallory/plain@1:RMSNorm"})
    assert type(module) is RMSNorm
    named = swapper.plan(module, table={"RMSNorm": "mallory/plain@1:RMSNorm"}, trust=["mallory/plain"])
    assert named[0].inference.implementation is not None


def test_a_tampered_kernel_raises_before_any_of_its_code_has_run(with_hub, hub):
    code = {"layers.py": LAYERS + "\nTAMPERED = False\n"}  # bytes that this process has not imported yet
    hub.repo("org/other").branch("v1", kernel_files("torch-cpu", "from . import layers", name="other", files=code))
    rows = (Row("RMSNorm", targets=("RMSNorm",), probe="rows", use=(Use("org/other@1:RMSNorm"),)),)
    swapper = with_hub(table=rows)
    fetched = swapper._artifact(swapper._node(spec.parse("org/other@1"), CPU, None))
    (fetched.path / "layers.py").chmod(0o644)
    (fetched.path / "layers.py").write_text("import sys\nsys.modules['mine'] = sys\n" + LAYERS)
    module, modules = RMSNorm(8), set(sys.modules)
    with pytest.raises(Tampered):
        swapper.swap(module, hub=True)
    assert type(module) is RMSNorm
    assert set(sys.modules) == modules


def test_a_kernel_that_raises_on_import_keeps_the_original_and_leaves_no_trace(swapper, make_repo):
    root = make_repo("broken", {"torch-cpu": "import torch\nraise RuntimeError('no such device')"})
    module, modules = RMSNorm(8), set(sys.modules)
    (outcome,) = swapper.swap(module, table={"RMSNorm": f"dir://{root}:RMSNorm"}, inherit=False).outcomes
    assert "no such device" in outcome.reason
    assert set(sys.modules) == modules
    assert type(module) is RMSNorm


# -- bundled kernels that are not compiled yet ------------------------------------------------------------------------


@pytest.fixture
def to_build(tmp_path, make_swapper):
    """A Swapper whose one bundled kernel has sources but no build. No compiler is needed: they are Python."""
    package = tmp_path / "bundled" / "plain" / "torch-ext" / "plain"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from . import layers")
    (package / "layers.py").write_text(LAYERS)
    (package.parents[1] / "build.toml").write_text(
        '[general]\nname = "plain"\nversion = 1\nedition = 5\nlicense = "MIT"\nbackends = ["cpu"]\n[torch-noarch]\n'
    )
    source = BundledSource(tmp_path / "bundled", tmp_path / "cache" / "built", building.source_digest)
    rows = (Row("RMSNorm", targets=("RMSNorm",), probe="rows", use=(Use("kernelswap/plain:RMSNorm"),)),)
    return make_swapper(sources={"bundled": source}, table=rows)


def test_never_building_says_how_to(to_build):
    (outcome,) = to_build.plan(RMSNorm(8), build="never")
    assert outcome.reason == "kernelswap/plain:RMSNorm is not compiled on this machine yet"


def test_building_in_the_background_keeps_the_original_until_it_is_done(to_build):
    (outcome,) = to_build.plan(RMSNorm(8))
    assert outcome.reason == "kernelswap/plain:RMSNorm is being compiled in the background; the next swap will use it"
    assert to_build._background.wait(120)
    (outcome,) = to_build.plan(RMSNorm(8))
    assert outcome.inference.implementation.layer == "RMSNorm"


def test_a_background_build_that_fails_says_why_and_is_not_begun_again(to_build, tmp_path):
    (tmp_path / "cache" / "built").mkdir(parents=True)
    (tmp_path / "cache" / "built" / "plain").write_text("in the way")
    to_build.plan(RMSNorm(8))
    assert to_build._background.wait(120)
    (outcome,) = to_build.plan(RMSNorm(8))
    assert "compiling it failed:" in outcome.reason
    assert len(to_build._background._jobs) == 1


def test_waiting_builds_with_progress_and_serves_at_once(to_build):
    (outcome,) = to_build.plan(RMSNorm(8), build="wait")
    assert outcome.inference.implementation.layer == "RMSNorm"
    assert [p.name for p in to_build.build()] == ["torch-cpu"]


def test_without_a_compiler_the_reason_says_so(to_build, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    (outcome,) = to_build.plan(RMSNorm(8))
    assert "there is no C++ compiler" in outcome.reason


def test_nothing_to_build_is_an_error(make_swapper):
    with pytest.raises(BuildFailed, match="no bundled kernel has sources"):
        make_swapper(sources={"dir": DirectorySource()}).build()
