"""Sources become a build: parsed strictly, compiled once, found whole or not at all."""

import base64
import json
import multiprocessing
import os
import shutil
import sysconfig
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels import LAYERS, NATIVE, load, this_cpu

from kernelswap import build, buildfile, machine, metadata, toolchain
from kernelswap.errors import BadMetadata, BuildFailed
from kernelswap.types import Dependency, Device, Machine
from kernelswap.variant import misfit, parse

LINUX = Machine(os="linux", cpu="x86_64", torch=(2, 13), cxx11=True)
MINIMAL = """
[general]
name = "my-norm"
version = 2
edition = 5
license = "MIT"
backends = ["cpu", "cuda"]
[torch]
src = ["torch-ext/torch_binding.cpp"]
"""

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler on this machine")


@pytest.fixture
def native(tmp_path):
    """A copy of the native kernel's sources, to be broken."""
    return shutil.copytree(NATIVE, tmp_path / "native")


@pytest.fixture
def noarch(tmp_path):
    """A Triton-like repository: Python alone."""
    root = tmp_path / "noarch"
    package = root / "torch-ext" / "soft_max"
    package.mkdir(parents=True)
    (root / "build.toml").write_text(
        '[general]\nname="soft-max"\nversion=1\nedition=5\nlicense="MIT"\nbackends=["cpu","cuda"]\npython-depends=["einops"]\n'
        '[general.cuda]\npython-depends=["nvidia-cutlass-dsl"]\n[torch-noarch]\ncuda_capabilities=["9.0"]\n'
    )
    (package / "__init__.py").write_text("from ._ops import add_op_namespace_prefix\n")
    (package / "table.json").write_text("{}")
    (package / "notes.md").write_text("not shipped")
    return root


# -- build.toml ---------------------------------------------------------------------------------------------------


def test_every_key_of_edition_5_is_read():
    file = buildfile.parse(
        MINIMAL
        + textwrap.dedent("""
        include = ["csrc"]
        minver = "2.9"
        pyext = ["py", "json"]
        cxx-flags = ["-DX=1"]
        [torch.stable-abi]
        cuda = "2.10"
        [general.hub]
        repo-id = "org/my-norm"
        branch = "v2"
        [general.cuda]
        minver = "12.6"
        python-depends = ["nvidia-cutlass-dsl"]
        kernel-depends = [{repo-id = "org/base", version = 1}]
        [kernel.fast]
        backend = "cuda"
        depends = ["torch", "cutlass_4_0"]
        src = ["csrc/fast.cu"]
        cuda-capabilities = ["9.0a"]
        cuda-flags = ["-O2"]
        """)
    )
    assert (file.name, file.python_name, file.version, file.edition) == ("my-norm", "my_norm", 2, 5)
    assert (file.include, file.minver, file.pyext, file.cxx_flags) == (("csrc",), "2.9", ("py", "json"), ("-DX=1",))
    assert file.stable_abi == (("cuda", "2.10"),)
    assert (file.repository, file.branch, file.cuda_minver) == ("org/my-norm", "v2", "12.6")
    assert file.python_depends_on("cuda") == ("nvidia-cutlass-dsl",)
    assert file.python_depends_on("cpu") == ()
    assert file.kernel_depends_on("cuda") == (Dependency("org/base", version=1),)
    (section,) = file.sections_for("cuda")
    assert (section.archs, section.device_flags, section.src) == (("9.0a",), ("-O2",), ("csrc/fast.cu",))
    assert file.sections_for("cpu") == ()


def test_all_problems_are_named_at_once():
    with pytest.raises(BadMetadata) as caught:
        buildfile.parse(
            '[general]\nname="X_"\nversion=true\nnmae=1\n[torch]\nsrc=["../x"]\n[kernel.a]\nbackend="cpu"\ncuda-flags=[]'
        )
    text = str(caught.value)
    for part in (
        "general.name: 'X_' is not a kernel name",
        "general.version: expected a whole number",
        "general.license: missing",
        "general.backends: missing",
        "general.nmae: unknown key",
        "torch.src: the path '../x' has the part '..'",
        "kernel.a.src: missing",
        "kernel.a.cuda-flags: unknown key",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("[torch]", "[tvm-ffi]\nsrc=['a.cpp']\n[torch]"), "exactly one of the tables"),
        (("[torch]\nsrc", "[general.hub]\nbranch"), "exactly one of the tables"),
        (("edition = 5", "edition = 6"), "general.edition: 6 is not 5"),
        (('"cpu", "cuda"', '"npu"'), "'npu' is none of"),
        (('backends = ["cpu", "cuda"]', "backends = []"), "names no backend"),
        (('"torch-ext/torch_binding.cpp"', '"/etc/passwd"'), "is absolute"),
        (("edition = 5", "edition = 5\nkernel-depends = [{repo-id = 'a/b'}]"), "exactly one of version and revision"),
        (("edition = 5", "universal = true"), "of an edition before 4"),
        (("[torch]\n", "[torch-noarch]\ncuda-capabilities = []\n[x]\n"), "torch-noarch.cuda-capabilities: unknown key"),
    ],
)
def test_what_would_build_something_else_in_silence_is_refused(change, problem):
    with pytest.raises(BadMetadata, match=problem.replace("(", r"\(")):
        buildfile.parse(MINIMAL.replace(*change))


def test_a_file_without_edition_is_edition_4_and_brought_up():
    file = buildfile.parse(MINIMAL.replace("edition = 5\n", "") + 'stable-abi = "2.9"\n')
    assert file.edition == 4
    assert file.stable_abi == (("cpu", "2.9"), ("cuda", "2.9"))


@given(st.dictionaries(st.sampled_from(["general", "torch", "kernel", "x"]), st.recursive(
    st.integers() | st.booleans() | st.text(max_size=5) | st.lists(st.integers(), max_size=2),
    lambda below: st.dictionaries(st.sampled_from(["name", "version", "src", "a", "backend", "depends"]), below, max_size=4), max_leaves=12,
)))  # fmt: skip
def test_no_text_raises_anything_else(table):
    def toml(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f'"{k}" = {toml(v)}' for k, v in value.items()) + "}"
        return json.dumps(value)

    text = "\n".join(f"{key} = {toml(value)}" for key, value in table.items())
    with pytest.raises(BadMetadata):
        buildfile.parse(text)


def test_a_directory_without_build_toml_has_no_sources(tmp_path):
    assert build.sources(tmp_path) is None
    assert build.sources(NATIVE).name == "native"


# -- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (LINUX, "torch213-cxx11-cpu-x86_64-linux"),
        (Machine("linux", "x86_64", torch=(2, 13), cxx11=True, backend="cuda", backend_version=(13, 0)), "torch213-cxx11-cu130-x86_64-linux"),
        (Machine("darwin", "aarch64", torch=(2, 9)), "torch29-cpu-aarch64-darwin"),
    ],
)  # fmt: skip
def test_the_variant_is_named_so_that_this_machine_takes_it(machine, name):
    found = build.variant_name(buildfile.parse(MINIMAL), machine)
    assert found == name
    assert misfit(parse(found), machine) is None


def test_a_stable_abi_build_is_named_after_the_abi():
    file = buildfile.parse(MINIMAL + 'stable-abi = "2.9"\n')
    assert build.variant_name(file, LINUX) == "torch-stable-abi29-cpu-x86_64-linux"


def test_the_source_digest_changes_with_sources_alone(native):
    before = build.source_digest(native)
    (native / "README.md").write_text("words")
    (native / "tests").mkdir()
    (native / "tests" / "test_x.py").write_text("")
    (native / "build" / "torch-cpu").mkdir(parents=True)
    (native / "build" / "torch-cpu" / "x.py").write_text("")
    assert build.source_digest(native) == before
    (native / "csrc" / "double.h").write_text("// other\n")
    assert build.source_digest(native) != before


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        (Machine("linux", "x86_64", torch=(2, 13), backend="rocm", backend_version=(7, 1)), "has sources for cpu"),
        (Machine("windows", "x86_64", torch=(2, 13)), "compiled on linux and darwin"),
    ],
)
def test_a_machine_that_cannot_be_built_for_is_told_why(machine, why, tmp_path):
    with pytest.raises(BuildFailed, match=why):
        build.compile(NATIVE, machine, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_torch_outside_the_bounds_is_told_which(tmp_path, native):
    text = (native / "build.toml").read_text().replace("[torch]", '[torch]\nminver = "2.14"\nmaxver = "3.0"')
    (native / "build.toml").write_text(text)
    with pytest.raises(BuildFailed, match=r"is for torch 2\.14 to 3\.0, this is 2\.13"):
        build.compile(native, LINUX, tmp_path / "into")


# -- compiling ----------------------------------------------------------------------------------------------------


def test_what_is_built_says_what_it_is(native_build):
    assert native_build.name == build.variant_name(build.sources(NATIVE), this_cpu())
    found = metadata.parse((native_build / "metadata.json").read_bytes())
    assert (found.name, found.version, found.backend, found.license) == ("native", 3, "cpu", "Apache-2.0")
    assert found.id.startswith("_native_cpu_")
    assert found.synthesised == ()
    assert metadata.compare(found.digest, native_build) == []
    names = {p.name for p in native_build.iterdir() if p.name != "__pycache__"}
    assert names == {"__init__.py", "layers.py", "_ops.py", "metadata.json", f"{found.id}.abi3.so"}


def test_what_is_built_runs(native_build):
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(load(native_build).twice(x), 2 * x)


def test_no_thread_pool_of_its_own_is_linked(layers_build):
    (library,) = layers_build.glob("*.so")
    assert b"libgomp" not in library.read_bytes()


@needs_compiler
def test_the_same_sources_give_the_same_bytes_wherever_they_lie(native_build, tmp_path):
    """Of two builds with one id and different bytes, one process can load only one."""
    moved = tmp_path / "elsewhere" / NATIVE.name
    shutil.copytree(NATIVE, moved, ignore=shutil.ignore_patterns("__pycache__"))
    again = build.compile(moved, this_cpu(), tmp_path / "compiled")
    assert metadata.digest_files(again) == metadata.digest_files(native_build)


def test_a_second_call_compiles_nothing(native_build, monkeypatch):
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    before = (native_build / "metadata.json").stat().st_mtime_ns
    assert build.compile(NATIVE, this_cpu(), native_build.parents[1]) == native_build
    assert (native_build / "metadata.json").stat().st_mtime_ns == before


def _compile_there(into, ready, go, answers):
    ready.release()
    go.wait()
    answers.put(str(build.compile(NATIVE, this_cpu(), into)))


@needs_compiler
def test_two_processes_compile_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, go, answers = context.Semaphore(0), context.Event(), context.Queue()
    two = [context.Process(target=_compile_there, args=(tmp_path, ready, go, answers)) for _ in range(2)]
    for process in two:
        process.start()
    for _ in two:
        ready.acquire()
    go.set()
    assert answers.get(timeout=120) == answers.get(timeout=120)
    for process in two:
        process.join()
    (log,) = tmp_path.glob("*.log")
    assert log.read_text().count("$ ") == 3  # two units and the linker, once


@needs_compiler
def test_changed_sources_replace_the_build(native, tmp_path):
    into = tmp_path / "into"
    first = build.compile(native, this_cpu(), into)
    old = json.loads((first / "metadata.json").read_bytes())["id"]
    (native / "csrc" / "double.cpp").write_text((native / "csrc" / "double.cpp").read_text().replace("2 *", "3 *"))
    second = build.compile(native, this_cpu(), into)
    assert second == first
    assert json.loads((second / "metadata.json").read_bytes())["id"] != old
    assert not list(second.glob(f"{old}*"))
    assert torch.equal(load(second).twice(torch.ones(2)), torch.full((2,), 3.0))


@needs_compiler
def test_the_compilers_error_is_shown_and_nothing_is_left(native, tmp_path):
    (native / "csrc" / "double.cpp").write_text("int broken(\n")
    into = tmp_path / "into"
    with pytest.raises(BuildFailed) as caught:
        build.compile(native, this_cpu(), into)
    text = str(caught.value)
    assert "csrc/double.cpp" in text
    assert "error" in text
    log = into / f"{build.variant_name(build.sources(native), this_cpu())}.log"
    assert str(log) in text
    assert "broken(" in log.read_text() or "expected" in log.read_text()
    assert list((into / "build").iterdir()) == []
    assert {p.suffix for p in into.iterdir() if p.name != "build"} <= {".log", ".lock"}


@needs_compiler
def test_an_interrupt_leaves_nothing(native, tmp_path):
    def stop(step, done, total):
        if done == 1:
            raise KeyboardInterrupt

    into = tmp_path / "into"
    with pytest.raises(KeyboardInterrupt):
        build.compile(native, this_cpu(), into, progress=stop)
    assert list((into / "build").iterdir()) == []
    assert not [p for p in into.iterdir() if p.is_dir() and p.name != "build"]


@needs_compiler
def test_progress_counts_units_and_the_linker(native, tmp_path):
    seen = []
    build.compile(native, this_cpu(), tmp_path / "into", progress=lambda *step: seen.append(step))
    assert seen == [("compile native", done, 3) for done in range(4)]


def test_no_compiler_says_so(native, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.compiler() is None
    with pytest.raises(BuildFailed, match=r"no C\+\+ compiler found") as caught:
        build.compile(native, this_cpu(), tmp_path / "into")
    assert "install one" in str(caught.value)


def test_a_cxx_that_is_not_there_is_named(native, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "clang++-99")
    with pytest.raises(BuildFailed, match=r"CXX is 'clang\+\+-99'"):
        build.compile(native, this_cpu(), tmp_path / "into")


@needs_compiler
def test_without_python_headers_the_library_is_loaded_by_torch(native, tmp_path, monkeypatch):
    real = sysconfig.get_path
    monkeypatch.setattr(sysconfig, "get_path", lambda name, *a, **k: str(tmp_path) if name == "include" else real(name, *a, **k))
    (native / "csrc" / "double.h").write_text((native / "csrc" / "double.h").read_text() + "// so that the id is another one\n")
    path = build.compile(native, this_cpu(), tmp_path / "into")
    (library,) = path.glob("*.so")
    assert not library.name.endswith(".abi3.so")
    assert torch.equal(load(path).twice(torch.ones(2)), torch.full((2,), 2.0))


def test_a_source_that_is_not_there_is_named(native, tmp_path):
    (native / "csrc" / "double.cpp").unlink()
    with pytest.raises(BuildFailed, match=r"csrc/double\.cpp, which is not there"):
        build.compile(native, this_cpu(), tmp_path / "into")


def test_a_package_that_is_not_there_is_named(native, tmp_path):
    shutil.rmtree(native / "torch-ext" / "native")
    with pytest.raises(BuildFailed, match=r"torch-ext/native/__init__\.py"):
        build.compile(native, this_cpu(), tmp_path / "into")


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_place_is_a_failure_with_its_reason(native, tmp_path):
    into = tmp_path / "into"
    into.mkdir(mode=0o500)
    with pytest.raises(BuildFailed, match="cannot be written"):
        build.compile(native, this_cpu(), into)


def test_a_file_in_the_way_is_a_failure_with_its_reason(native, tmp_path):
    (tmp_path / "into").write_text("a file")
    with pytest.raises(BuildFailed, match="cannot be written"):
        build.compile(native, this_cpu(), tmp_path / "into")


def test_python_alone_needs_no_compiler(noarch, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    path = build.compile(noarch, this_cpu(), tmp_path / "into")
    assert path.name == "torch-cpu"
    found = metadata.parse((path / "metadata.json").read_bytes())
    assert found.python_depends == ("einops",)
    assert {p.name for p in path.iterdir()} == {"__init__.py", "_ops.py", "metadata.json"}
    module = load(path)
    assert module.add_op_namespace_prefix("f").endswith("::f")


def test_a_build_for_another_backend_carries_what_that_backend_needs(noarch, tmp_path):
    cuda = Machine("linux", "x86_64", torch=(2, 13), cxx11=True, backend="cuda", backend_version=(13, 0))
    found = metadata.parse((build.compile(noarch, cuda, tmp_path / "into") / "metadata.json").read_bytes())
    assert (found.backend, found.archs, found.python_depends) == ("cuda", ("9.0",), ("einops", "nvidia-cutlass-dsl"))


@needs_compiler
def test_the_commit_is_recorded_of_a_repository_of_its_own(noarch, tmp_path):
    git = shutil.which("git")
    if git is None:
        pytest.skip("no git")
    run = lambda *words: os.spawnv(os.P_WAIT, git, [git, "-C", str(noarch), "-c", "user.name=a", "-c", "user.email=a@b", *words])  # noqa: E731
    assert run("init", "-q") == run("add", ".") == run("commit", "-qm", "x") == 0
    clean = metadata.parse((build.compile(noarch, this_cpu(), tmp_path / "a") / "metadata.json").read_bytes()).provenance
    assert (len(clean.commit), clean.dirty) == (40, False)
    (noarch / "torch-ext" / "soft_max" / "__init__.py").write_text("# changed\n")
    dirty = metadata.parse((build.compile(noarch, this_cpu(), tmp_path / "b") / "metadata.json").read_bytes()).provenance
    assert (dirty.commit, dirty.dirty) == (clean.commit, True)


def test_the_bundled_layers_have_sources_for_the_cpu():
    file = build.sources(LAYERS)
    assert build.misfit(file, LINUX) is None
    assert all((LAYERS / name).is_file() for name in (*file.src, *file.sections[0].src))


def test_digests_are_those_of_the_field(native_build):
    """Standard base64 with padding, of the raw sha256."""
    import hashlib

    written = json.loads((native_build / "metadata.json").read_bytes())["digest"]
    assert written["algorithm"] == "sha256"
    data = (native_build / "layers.py").read_bytes()
    assert written["files"]["layers.py"] == base64.b64encode(hashlib.sha256(data).digest()).decode()


# -- CUDA ---------------------------------------------------------------------------------------------------------

CUDA = Machine(
    "linux",
    "x86_64",
    torch=(2, 13),
    cxx11=True,
    backend="cuda",
    backend_version=(13, 0),
    devices=(Device("cuda", 0, "H", (9, 0)),),
)


def test_device_code_is_compiled_for_what_the_file_names_else_for_the_devices_here():
    file = buildfile.parse(MINIMAL + '[kernel.a]\nbackend="cuda"\ndepends=[]\nsrc=["a.cu"]\ncuda-capabilities=["9.0a"]\n')
    assert toolchain.architectures(file.sections[0], CUDA) == ("9.0a",)
    assert toolchain.architectures(None, CUDA) == ("9.0",)
    assert len(toolchain.architectures(None, LINUX)) > 1


def test_a_library_that_is_not_at_hand_is_named():
    file = buildfile.parse(MINIMAL + '[kernel.a]\nbackend="cuda"\ndepends=["torch", "cutlass_4_0"]\nsrc=["a.cu"]\n')
    assert "needs cutlass_4_0" in build.misfit(file, CUDA)
    assert build.misfit(file, LINUX) is None


def test_no_nvcc_says_so(tmp_path, monkeypatch):
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *a, **k: None if name == "nvcc" else real(name, *a, **k))
    with pytest.raises(BuildFailed, match="no nvcc on the path"):
        build.compile(NATIVE.with_name("native_cuda"), CUDA, tmp_path)


@pytest.mark.gpu
def test_device_code_runs(tmp_path):
    if not torch.cuda.is_available() or shutil.which("nvcc") is None:
        pytest.skip("needs a CUDA device and nvcc")
    path = build.compile(NATIVE.with_name("native_cuda"), machine.look(), tmp_path)
    x = torch.arange(1000.0, device="cuda")
    assert torch.equal(load(path).twice(x), 2 * x)
    found = metadata.parse((path / "metadata.json").read_bytes())
    major, minor = torch.cuda.get_device_capability()
    assert (found.backend, found.archs) == ("cuda", (f"{major}.{minor}",))
