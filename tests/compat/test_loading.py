"""get_kernel and its like, as they are documented; and what the reference gets wrong."""

import json
import sys
import threading
import types

import pytest
import torch
from tests.compat.conftest import CODE, published
from tests.hub import kernel_files

from kernelswap import compat
from kernelswap.errors import Tampered


def test_get_kernel_gives_a_module(kernels, hub):
    published(hub)
    module = kernels.get_kernel("org/demo", version=1)
    assert isinstance(module, types.ModuleType)
    assert torch.equal(module.double(torch.ones(2)), torch.full((2,), 2.0))
    assert module.inner.VALUE == 7
    assert module.ops.gemm(1) == 2


def test_every_form_of_asking_is_understood(kernels, hub):
    commit = published(hub)
    one = kernels.get_kernel("org/demo", version=1)
    assert kernels.get_kernel("org/demo", "v1") is one
    assert kernels.get_kernel("org/demo", None, 1, "cpu", {"framework": "x"}) is one
    assert kernels.get_kernel("org/demo", revision=None, version="1", user_agent="mine/1.0", trust_remote_code=True) is one
    assert kernels.get_kernel("org/demo", revision=commit) is one
    assert kernels.get_kernel("org/demo", version=1, check_arch=False) is one
    assert kernels.get_kernel("org/demo", trust_remote_code=["org"]) is one


def test_what_was_positional_means_what_it_meant(kernels, hub, make_repo):
    published(hub)
    module = kernels.get_kernel("org/demo", None, 1, "cpu", {"framework": "x"}, False, True)
    assert kernels.has_kernel("org/demo", None, 1, "cpu", False)
    assert not kernels.has_kernel("org/demo", None, 2, None, True)
    root = make_repo("here", {"torch-cpu": "x = 1"})
    assert kernels.get_local_kernel(root, "cpu") is kernels.get_local_kernel(root, "here")  # the package's name, before 0.14
    with pytest.raises(ValueError, match="Invalid backend 'cuda'"):
        kernels.get_local_kernel(root, "cuda")
    with pytest.raises(ValueError, match="Invalid backend 'somewhere'"):
        kernels.get_local_kernel(root, "somewhere")
    assert kernels.install_kernel("org/demo", "v1", True) == kernels.install_kernel("org/demo", version=1)
    assert module.double(2) == 4


def test_without_a_version_it_is_the_newest(kernels, hub):
    published(hub)
    published(hub, version=2, code=CODE + "\nNEW = True\n")
    assert kernels.get_kernel("org/demo").NEW


def test_errors_have_the_types_that_callers_catch(kernels, hub):
    published(hub)
    published(hub, "org/elsewhere", variants=("torch-cuda",))
    hub.organization("stranger", trusted=False)
    hub.repo("stranger/demo").branch("v1", kernel_files("torch-cpu", "x = 1"))
    published(hub, "org/broken", code="raise RuntimeError('no')")
    published(hub, "org/needs", metadata={"python-depends": ["helion"]})
    published(hub, "org/unknown", metadata={"python-depends": ["requests"]})
    published(hub, "org/bad", metadata={"kernels-minver": "0.14"})
    for one, other in (("first", "second"), ("second", "first")):
        published(hub, f"org/{one}", metadata={"kernel-depends": [{"repo-id": f"org/{other}", "version": 1}]})
    published(hub, "org/lacks", metadata={"kernel-depends": [{"repo-id": "org/nothing", "version": 1}]})
    with pytest.raises(ValueError, match="Only one of"):
        kernels.get_kernel("org/demo", version=1, revision="v1")
    with pytest.raises(ValueError, match="9"):
        kernels.get_kernel("org/demo", version=9)
    with pytest.raises(ValueError, match="Invalid backend 'cuda', system supported backends: cpu"):
        kernels.get_kernel("org/demo", version=1, backend="cuda")
    with pytest.raises(ValueError, match="not a trusted publisher"):
        kernels.get_kernel("stranger/demo", version=1)
    for error in (ValueError, OSError):  # ours says what there is; the hub's client raises an OSError
        with pytest.raises(error, match="org/nothing"):
            kernels.get_kernel("org/nothing", version=1)
        with pytest.raises(error, match="org/demo has v1"):
            kernels.get_kernel("org/demo", revision="nope")
    for error in (ValueError, FileNotFoundError):
        with pytest.raises(error, match="there is no directory"):
            kernels.get_local_kernel("/nowhere/at/all")
    with pytest.raises(FileNotFoundError):
        kernels.get_kernel("org/elsewhere", version=1)
    with pytest.raises(ImportError, match="helion, which is not installed"):
        kernels.get_kernel("org/needs", version=1)
    with pytest.raises(ValueError, match="'requests', which is on no list"):
        kernels.get_kernel("org/unknown", version=1)
    with pytest.raises(ValueError, match=r"kernels-minver: '0\.14' is not three numbers"):
        kernels.get_kernel("org/bad", version=1)
    with pytest.raises(ValueError, match=r"org/first.*org/second.*org/first"):
        kernels.get_kernel("org/first", version=1)
    with pytest.raises(ValueError, match="org/nothing"):
        kernels.get_kernel("org/lacks", version=1)
    with pytest.raises(RuntimeError):
        kernels.get_kernel_dep("org/demo")
    with pytest.raises(RuntimeError, match="no"):  # what it raised itself
        kernels.get_kernel("org/broken", version=1)
    with pytest.raises(ImportError) as failed:
        kernels.get_kernel("org/broken", version=1)
    assert isinstance(failed.value.__cause__, RuntimeError)
    assert not [m for m in sys.modules if m.startswith("_broken")]


def test_a_publisher_is_vouched_for_by_name(kernels, hub):
    hub.organization("stranger", trusted=False)
    hub.repo("stranger/demo").branch("v1", kernel_files("torch-cpu", "x = 1"))
    assert kernels.get_kernel("stranger/demo", version=1, trust_remote_code=["stranger/demo"]).x == 1


def test_has_kernel_is_false_for_whatever_cannot_be_had(kernels, hub):
    published(hub)
    published(hub, "org/elsewhere", variants=("torch-cuda",))
    assert kernels.has_kernel("org/demo", version=1) is True
    assert kernels.has_kernel("org/demo", None, 1) is True
    assert kernels.has_kernel("org/demo", version=9) is False
    assert kernels.has_kernel("org/nothing", version=1) is False
    assert kernels.has_kernel("org/elsewhere", version=1) is False
    with pytest.raises(ValueError, match="Only one of"):
        kernels.has_kernel("org/demo", version=1, revision="v1")


def test_install_kernel_gives_the_directory_and_imports_nothing(kernels, hub):
    published(hub, code=CODE + "\nimport sys\nsys.imported_by_install_kernel = True\n")
    path = kernels.install_kernel("org/demo", version=1)
    assert (path / "metadata.json").is_file()
    assert not hasattr(sys, "imported_by_install_kernel")
    assert kernels.install_kernel("org/demo", "v1", local_files_only=True) == path


def test_install_kernel_local_files_only_asks_nobody(kernels, hub):
    published(hub)
    with pytest.raises(FileNotFoundError):
        kernels.install_kernel("org/demo", version=1, local_files_only=True)
    assert hub.requests() == []


def test_variants_are_listed_with_reasons(kernels, hub):
    published(hub, variants=("torch-cpu", "torch-cuda"))
    found = kernels.get_kernel_variants("org/demo", version=1)
    assert [type(v) for v in found] == [kernels.VariantAccepted, kernels.VariantRejected]
    assert [v.variant.variant_str for v in found] == ["torch-cpu", "torch-cuda"]
    assert found[1].reason


def test_loaded_kernels_are_listed(kernels, hub, make_repo):
    commit = published(hub, "org/listed")
    module = kernels.get_kernel("org/listed", version=1)
    local = kernels.get_local_kernel(make_repo("here", {"torch-cpu": "x = 1"}))
    found = {id(k.module): k for k in kernels.get_loaded_kernels()}
    assert found[id(module)].repo_info == kernels.RepoInfo("org/listed", commit)
    assert found[id(module)].metadata.name == "listed"
    assert found[id(module)].metadata.backend.backend_type == "cpu"
    assert found[id(local)].repo_info is None


def test_dependencies_are_given_to_the_kernel_that_declares_them_only(kernels, hub):
    published(hub, "org/base", code="BASE = 5")
    code = "import kernels\nbase = kernels.get_kernel_dep('org/base').BASE"
    published(hub, "org/top", code=code, metadata={"kernel-depends": [{"repo-id": "org/base", "version": 1}]})
    assert kernels.get_kernel("org/top", version=1).base == 5
    with pytest.raises(RuntimeError, match="no kernel is being imported"):
        kernels.get_kernel_dep("org/base")


def test_metadata_is_read_from_files_and_bytes(kernels, make_repo):
    path = make_repo("here", {"torch-cpu": "x = 1"}) / "build" / "torch-cpu" / "metadata.json"
    found = kernels.Metadata.read_from_file(path)
    assert (found.name, found.version, found.python_depends, found.backend.archs) == ("here", 1, [], None)
    assert found.digest.algorithm == "sha256"
    assert set(found.digest.files) == {"__init__.py"}
    assert kernels.Metadata.from_bytes(path.read_bytes()) == found
    with pytest.raises(ValueError, match="version"):
        kernels.Metadata.from_bytes(json.dumps({**json.loads(path.read_text()), "version": "x"}).encode())
    with pytest.raises(OSError, match="nothing"):
        kernels.Metadata.read_from_file(path.with_name("nothing"))


def test_metadata_has_every_documented_part(kernels):
    commit = "0123456789" * 4
    text = {
        "name": "my-norm",
        "id": "_my_norm_cuda_0a1b2c3",
        "version": 2,
        "license": "MIT",
        "upstream": "git@github.com:a/b.git",
        "source": "https://github.com/a/b",
        "python-depends": ["einops"],
        "kernel-depends": [{"repo-id": "org/base", "version": 1}, {"repo-id": "org/other", "revision": "main"}],
        "kernels-minver": "0.17.0",
        "backend": {"type": "cuda", "archs": ["8.0", "9.0a"]},
        "provenance": {"kernel-builder": {"version": "0.17.0"}, "kernel": {"commit": commit, "dirty": False}},
    }
    found = kernels.Metadata.from_bytes(json.dumps(text).encode())
    assert (found.id, found.name, found.version, found.license) == ("_my_norm_cuda_0a1b2c3", "my-norm", 2, "MIT")
    assert (found.upstream, found.source) == ("ssh://git@github.com/a/b.git", "https://github.com/a/b")
    assert (found.python_depends, found.kernels_minver) == (["einops"], "0.17.0")
    assert [(d.repo_id, d.version, d.revision) for d in found.kernel_depends] == [
        ("org/base", 1, None),
        ("org/other", None, "main"),
    ]
    assert (found.backend.backend_type, found.backend.archs) == ("cuda", ["8.0", "9.0a"])
    assert (found.provenance.kernel_builder.version, found.provenance.kernel_builder.git) == ("0.17.0", None)
    assert (found.provenance.kernel.commit, found.provenance.kernel.dirty) == (commit, False)
    assert found.digest is None


def test_a_module_survives_an_alias_in_sys_modules(kernels, hub, monkeypatch):
    published(hub)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", kernels.get_kernel("org/demo", version=1))
    import flash_attn_interface
    from flash_attn_interface import double

    assert double is flash_attn_interface.double


def test_a_kernel_reads_its_tuning_file_and_registers_custom_ops(kernels, hub):
    code = """
import json, pathlib
import torch

TUNING = json.loads((pathlib.Path(__file__).parent / "tuning.json").read_text())


@torch.library.custom_op("_tuned_cpu_0a1b2c3::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)
"""
    published(hub, "org/tuned", code=code)
    module = kernels.get_kernel("org/tuned", version=1)
    assert module.TUNING == {}
    assert torch.equal(module.twice(torch.ones(2)), torch.full((2,), 2.0))
    assert torch.ops._tuned_cpu_0a1b2c3.twice(torch.ones(1)) == 2


# -- what the reference gets wrong; D1 is in test_locked.py, D8 in test_layer.py ----------------------------------------


def test_d2_d3_what_was_loaded_by_version_loads_offline(hub, make_swapper):
    published(hub)
    compat.install(make_swapper())
    import kernels

    online = kernels.get_kernel("org/demo", version=1)
    compat.install(make_swapper(offline=True))
    asked = len(hub.requests())
    assert kernels.get_kernel("org/demo", version=1) is online
    assert kernels.install_kernel("org/demo", version=1, local_files_only=True)
    assert len(hub.requests()) == asked
    compat.uninstall()


@pytest.mark.parametrize("name", ["HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"])
def test_d4_without_telemetry_kernels_load(hub, make_swapper, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    published(hub)
    compat.install(make_swapper())
    import kernels

    assert kernels.get_kernel("org/demo", version=1).double(1) == 2
    compat.uninstall()


def test_d5_one_id_in_two_directories_is_two_kernels(kernels, make_repo, tmp_path):
    a = make_repo("same", {"torch-cpu": {"code": "from . import part", "files": {"part.py": "VALUE = 1"}}}, where=tmp_path / "a")
    b = make_repo("same", {"torch-cpu": {"code": "from . import part", "files": {"part.py": "VALUE = 2"}}}, where=tmp_path / "b")
    one, two = kernels.get_local_kernel(a), kernels.get_local_kernel(b)
    assert (one.part.VALUE, two.part.VALUE) == (1, 2)


def test_d6_a_failed_import_leaves_no_submodule(kernels, make_repo, tmp_path):
    def write(value, more):
        files = {"part.py": f"VALUE = {value}"}
        return make_repo("again", {"torch-cpu": {"code": f"from . import part\n{more}", "files": files}}, where=tmp_path / "r")

    with pytest.raises(ImportError):
        kernels.get_local_kernel(write(1, "raise RuntimeError"))
    assert kernels.get_local_kernel(write(2222, "")).part.VALUE == 2222


def test_d7_threads_get_one_module(kernels, hub):
    published(hub, code=CODE + "\nimport time\ntime.sleep(0.05)\n")
    found, start = [], threading.Barrier(4)

    def load():
        start.wait()
        found.append(kernels.get_kernel("org/demo", version=1))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(map(id, found))) == 1


def test_d9_a_directory_may_be_text_and_is_one_kernel_however_it_is_written(kernels, make_repo, monkeypatch):
    root = make_repo("here", {"torch-cpu": "x = 1"})
    one = kernels.get_local_kernel(root)
    monkeypatch.chdir(root.parent)
    assert kernels.get_local_kernel(str(root)) is one
    assert kernels.get_local_kernel("here") is one
    assert kernels.get_local_kernel(root / "build") is one
    assert kernels.get_local_kernel(root / "build" / "torch-cpu") is one


def test_d10_a_tampered_file_is_not_imported(kernels, hub, tmp_path):
    published(hub, "org/tampered", code=CODE + "\nT = 10\n")
    path = kernels.install_kernel("org/tampered", version=1)
    path.chmod(0o755)
    (path / "__init__.py").chmod(0o644)
    (path / "__init__.py").write_text("import os\n")
    with pytest.raises(Tampered):
        kernels.get_kernel("org/tampered", version=1)


def test_d11_a_warm_repeat_asks_the_hub_nothing(kernels, hub):
    published(hub)
    kernels.get_kernel("org/demo", version=1)
    asked = len(hub.requests())
    kernels.get_kernel("org/demo", version=1)
    assert len(hub.requests()) == asked


def test_d12_redirects_are_followed(kernels, hub):
    published(hub, "org/new")
    hub.organization("old", trusted=True)
    hub.repo("old/name").branch("v1", {"kernel-status.toml": 'kind = "redirect"\ndestination = "org/new"\n'})
    assert kernels.get_kernel("old/name", version=1).double(1) == 2
