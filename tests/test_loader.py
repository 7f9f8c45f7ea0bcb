import gc
import importlib
import pickle
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import types

import pytest
from tests.kernel_files import Folder, candidate, metadata_of, write

from kernelswap import loader
from kernelswap.errors import DependencyError, LoadFailed, MissingDependency, Tampered
from kernelswap.store import Store

COUNT = "import builtins\nbuiltins.kernel_runs = getattr(builtins, 'kernel_runs', 0) + 1\n"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Each test its own process, as far as that goes: what it loads is forgotten, and it leaves `sys.modules` as it was."""
    import builtins

    before = set(sys.modules)
    packages = set(loader._finder.packages)  # what other tests of this process loaded stays importable
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(builtins, "kernel_runs", 0, raising=False)
    yield
    for name in set(loader._finder.packages) - packages:
        loader._forget(name)
    assert not [m for m in set(sys.modules) - before if m.startswith("_my_norm")]


@pytest.fixture
def put(store, tmp_path):
    def put(files, depends=(), *, name="my-norm", **extra):
        build = write(tmp_path / f"repo{time.monotonic_ns()}", files, name=name, **extra)
        return store.materialize(
            candidate(f"org/{name}", commit=f"{time.monotonic_ns():040x}"), metadata_of(build), Folder(build), (), depends
        )

    return put


def runs():
    import builtins

    return builtins.kernel_runs


# -- what is loaded -----------------------------------------------------------------------------------------------


def test_a_kernel_is_an_ordinary_module_with_its_submodules_and_data(put, store):
    kernel = loader.load(
        put(
            {
                "__init__.py": "from . import layers\nfrom .sub import deep\n",
                "layers.py": "V = 1\n",
                "sub/__init__.py": "",
                "sub/deep.py": "V = 2\n",
            }
        ),
        reverify=store.reverify,
    )
    assert type(kernel.module) is types.ModuleType
    assert (kernel.module.layers.V, kernel.module.deep.V) == (1, 2)
    assert sys.modules[kernel.module.__name__] is kernel.module
    assert kernel.module.__file__ == str(kernel.artifact.path / "__init__.py")
    assert loader.loaded() == (kernel,)


def test_the_module_survives_being_aliased(put, monkeypatch):
    kernel = loader.load(put({"__init__.py": "def f(): from .late import V; return V\n", "late.py": "V = 3\n"}))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", kernel.module)
    import flash_attn_interface

    assert flash_attn_interface.f() == 3


def test_loading_again_gives_the_same_module_in_no_time(put, store):
    artifact = put({"__init__.py": COUNT})
    first = loader.load(artifact, reverify=store.reverify)
    assert loader.load(artifact).module is first.module
    gc.collect()
    best = min(_timed(lambda: loader.load(artifact)) for _ in range(200))
    assert best < 1e-4
    assert runs() == 1


def _timed(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def test_32_threads_run_it_once(put):
    artifact = put({"__init__.py": "import threading\nthreading.Event().wait(0.1)\n" + COUNT})  # long enough for all to come
    found, barrier = [], threading.Barrier(32)

    def work():
        barrier.wait()
        found.append(loader.load(artifact).module)

    threads = [threading.Thread(target=work) for _ in range(32)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 32
    assert len(set(map(id, found))) == 1
    assert runs() == 1


def test_the_nested_layout_of_old_builds_is_loaded(put):
    kernel = loader.load(put({"my_norm/__init__.py": "from .a import V\n", "my_norm/a.py": "V = 4\n"}))
    assert kernel.module.V == 4


def test_an_old_build_without_metadata_is_loaded_from_its_one_package(store, tmp_path):
    root = tmp_path / "old"
    (root / "someThing").mkdir(parents=True)
    (root / "someThing" / "__init__.py").write_text("V = 5\n")
    artifact = store.materialize(candidate(), metadata_of(root), Folder(root))
    assert loader.load(artifact).module.V == 5


def test_of_a_transitional_build_the_flat_code_is_loaded_and_the_shim_is_left_alone(put):
    kernel = loader.load(put({"__init__.py": "V = 6\n", "my_norm/__init__.py": "raise RuntimeError('the shim ran')\n"}))
    assert kernel.module.V == 6


def test_a_directory_without_init_is_a_package_too(put):
    kernel = loader.load(put({"__init__.py": "from .ns.a import V\n", "ns/a.py": "V = 7\n"}))
    assert kernel.module.V == 7


def test_a_build_without_an_entry_file_is_said_to_have_none(put):
    with pytest.raises(LoadFailed, match=r"neither __init__\.py nor my_norm/__init__\.py"):
        loader.load(put({"kernel.py": ""}))


def test_source_is_found_by_inspect(put):
    import inspect

    kernel = loader.load(put({"__init__.py": "def f(x):\n    return x + 1\n"}))
    assert inspect.getsource(kernel.module.f) == "def f(x):\n    return x + 1\n"


def test_data_files_are_found_by_importlib(put):
    import importlib.resources

    kernel = loader.load(
        put({"__init__.py": "from . import sub\n", "tuning.json": "{}", "sub/__init__.py": "", "sub/t.txt": "8"})
    )
    assert (importlib.resources.files(kernel.module) / "tuning.json").read_text() == "{}"
    assert (importlib.resources.files(kernel.module.sub) / "t.txt").read_text() == "8"


def test_a_kernels_function_compiles_to_one_graph(put):
    torch = pytest.importorskip("torch")
    kernel = loader.load(
        put(
            {
                "__init__.py": "from .a import g\ndef f(x):\n    return g(x) + 1\n",
                "a.py": "SCALE = 2\ndef g(x):\n    return x * SCALE\n",
            }
        )
    )
    compiled = torch.compile(kernel.module.f, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [3, 3]


def test_a_module_can_be_reloaded_and_asked_about_like_any_other(put):
    import importlib.util

    kernel = loader.load(put({"__init__.py": COUNT, "a.py": ""}))
    name = kernel.module.__name__
    assert importlib.util.find_spec(name + ".a").origin == str(kernel.artifact.path / "a.py")
    assert importlib.reload(kernel.module) is kernel.module
    assert runs() == 2


def test_classes_pickle_by_reference(put):
    kernel = loader.load(put({"__init__.py": "class A:\n    pass\n"}))
    assert type(pickle.loads(pickle.dumps(kernel.module.A()))) is kernel.module.A


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_native_code_is_found_by_the_id_and_two_versions_live_side_by_side(put, tmp_path):
    def native(id_, value):
        code = tmp_path / f"{value}.c"
        code.write_text(
            "#define Py_LIMITED_API 0x03090000\n#include <Python.h>\n"
            f'static struct PyModuleDef m = {{PyModuleDef_HEAD_INIT, "{id_}", 0, -1, 0}};\n'
            f'PyMODINIT_FUNC PyInit_{id_}(void) {{ PyObject *o = PyModule_Create(&m); PyModule_AddIntConstant(o, "V", {value}); return o; }}\n'
        )
        library = tmp_path / f"{value}.so"
        subprocess.run(
            ["cc", "-shared", "-fPIC", f"-I{sysconfig.get_paths()['include']}", str(code), "-o", str(library)], check=True
        )
        return library.read_bytes()

    one, two = (
        loader.load(put({"__init__.py": f"from . import {id_}\nV = {id_}.V\n", f"{id_}.abi3.so": native(id_, value)}, id_=id_))
        for id_, value in (("_my_norm_cpu_1111111", 11), ("_my_norm_cpu_2222222", 22))
    )
    assert (one.module.V, two.module.V) == (11, 22)


# -- crossing over ------------------------------------------------------------------------------------------------


def test_the_same_id_from_two_places_does_not_cross(put):
    files = {"__init__.py": "def late():\n    from . import later\n    return later.V\n"}
    one = loader.load(put({**files, "later.py": "V = 'one'\n"}))
    two = loader.load(put({**files, "later.py": "V = 'two'\n"}))
    assert one.artifact.metadata.id == two.artifact.metadata.id
    assert (one.module.late(), two.module.late(), one.module.late()) == ("one", "two", "one")


def test_equal_bytes_from_two_places_are_one_module(put):
    files = {"__init__.py": COUNT}
    one, two = put(files), put(files)
    assert one.candidate != two.candidate
    assert loader.load(one).module is loader.load(two).module
    assert loader.load(two).artifact is two
    assert runs() == 1


def test_a_second_kernel_that_would_register_in_the_same_op_namespace_is_refused(put):
    torch = pytest.importorskip("torch")
    register = "import torch\nlib = torch.library.Library('_my_norm_cpu_ops0001', 'DEF')\nlib.define('f(Tensor x) -> Tensor')\n"
    one = put({"__init__.py": register}, id_="_my_norm_cpu_ops0001")
    two = put({"__init__.py": register + "V = 2\n"}, id_="_my_norm_cpu_ops0001")
    kernel = loader.load(one)
    with pytest.raises(LoadFailed, match=r"torch\.ops\._my_norm_cpu_ops0001"):
        loader.load(two)
    assert loader.loaded() == (kernel,)
    del kernel.module.lib
    assert torch is not None


# -- dependencies -------------------------------------------------------------------------------------------------


def test_dependencies_are_imported_first_and_found_while_importing(put):
    base = put({"__init__.py": "V = 'base'\n"}, name="base")
    code = "from kernelswap.loader import dependency\nV = dependency('org/base').V\ndef late(): return dependency('org/base')\n"
    kernel = loader.load(put({"__init__.py": code}, (base,)))
    assert kernel.module.V == "base"
    assert [k.artifact.candidate.name for k in loader.loaded()] == ["org/base", "org/my-norm"]
    with pytest.raises(DependencyError, match="no kernel is being imported"):
        kernel.module.late()


def test_an_undeclared_dependency_is_named_with_those_declared(put):
    base = put({"__init__.py": ""}, name="base")
    code = "from kernelswap.loader import dependency\ndependency('org/other')\n"
    with pytest.raises(LoadFailed) as e:
        loader.load(put({"__init__.py": code}, (base,)))
    assert isinstance(e.value.__cause__, DependencyError)
    assert isinstance(e.value.__cause__, RuntimeError)
    assert "it declares: org/base@1" in str(e.value.__cause__)


def test_a_diamond_with_two_versions_gives_each_its_own(put):
    b1, b2 = put({"__init__.py": "V = 1\n"}, name="base"), put({"__init__.py": "V = 2\n"}, name="base")
    use = "from kernelswap.loader import dependency\nV = dependency('org/base').V\n"
    left, right = put({"__init__.py": use}, (b1,), name="left"), put({"__init__.py": use}, (b2,), name="right")
    code = "from kernelswap.loader import dependency\nV = dependency('org/left').V, dependency('org/right').V\n"
    assert loader.load(put({"__init__.py": code}, (left, right))).module.V == (1, 2)


def test_a_missing_python_package_is_named_before_any_code_runs(put):
    artifact = put({"__init__.py": COUNT}, **{"python-depends": ["nki", "einops"], "backend": {"type": "neuron"}})
    with pytest.raises(MissingDependency, match="nki"):
        loader.load(artifact)
    assert runs() == 0


# -- failure leaves no trace --------------------------------------------------------------------------------------


@pytest.mark.parametrize("raised", ["RuntimeError('no gpu')", "SystemExit(3)", "ImportError('libcuda')", "SyntaxError('x')"])
def test_a_failed_import_leaves_no_trace_and_can_be_tried_again(put, raised):
    artifact = put(
        {
            "__init__.py": f"from .sub import a\nimport os\nif not os.environ.get('KERNEL_OK'): raise {raised}\n",
            "sub/__init__.py": "",
            "sub/a.py": "",
        }
    )
    modules, finders = dict(sys.modules), list(sys.meta_path)
    with pytest.raises(LoadFailed) as e:
        loader.load(artifact)
    assert sys.modules == modules
    assert sys.meta_path == finders
    assert loader.loaded() == ()
    assert type(e.value.__cause__).__name__ in str(e.value)
    assert "org/my-norm@1 (torch-cpu)" in str(e.value)
    with pytest.MonkeyPatch.context() as m:
        m.setenv("KERNEL_OK", "1")
        assert loader.load(artifact).module.a


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions carry notes from 3.11 on")
def test_the_cause_carries_a_note_with_kernel_variant_and_origin(put):
    artifact = put({"__init__.py": "1 / 0\n"})
    with pytest.raises(LoadFailed) as e:
        loader.load(artifact)
    assert e.value.__cause__.__notes__ == [f"while importing org/my-norm@1 (torch-cpu) from {artifact.path}"]


def test_an_interrupt_stays_an_interrupt_and_leaves_no_trace(put):
    before = dict(sys.modules)
    with pytest.raises(KeyboardInterrupt):
        loader.load(put({"__init__.py": "raise KeyboardInterrupt\n"}))
    assert {m for m in sys.modules if m.startswith("_my_norm")} == set()
    assert set(before) <= set(sys.modules)


def test_other_kernels_stay_when_one_fails(put):
    good = loader.load(put({"__init__.py": "def late():\n    from . import b\n    return b.V\n", "b.py": "V = 8\n"}))
    with pytest.raises(LoadFailed):
        loader.load(put({"__init__.py": "1 / 0\n"}))
    assert good.module.late() == 8


# -- nothing but verified bytes -----------------------------------------------------------------------------------


def test_importing_writes_nothing_into_the_artifact(put, store):
    artifact = put({"__init__.py": "from .sub import a\n", "sub/__init__.py": "", "sub/a.py": ""})
    before = sorted(artifact.path.rglob("*"))
    loader.load(artifact)
    importlib.invalidate_caches()
    assert sorted(artifact.path.rglob("*")) == before
    store.reverify(artifact)


def test_a_changed_file_is_tampered_before_any_code_runs(put, store):
    artifact = put({"__init__.py": COUNT})
    path = artifact.path / "__init__.py"
    path.chmod(0o644)
    path.write_text(COUNT + "# evil\n")
    for reverify in (None, store.reverify):
        with pytest.raises(Tampered):
            loader.load(artifact, reverify=reverify)
    assert runs() == 0
    assert not [m for m in sys.modules if m.startswith("_my_norm")]
