"""Locks, repositories and bundles are hashed and compared, and nothing of them is imported."""

import json
import sys
import zipfile
from dataclasses import replace

import pytest
from tests.hub import kernel_files
from tests.swapping import CPU, Near

from kernelswap import bundling, locking, verifying
from kernelswap.api import Swapper
from kernelswap.bundling import Wanted
from kernelswap.cli import exits, main
from kernelswap.errors import UnknownKernel
from kernelswap.lock import Lock
from kernelswap.provider import Terms
from kernelswap.sources.bundle_file import BundleSource
from kernelswap.types import Requirement

SPEC = "org/kernel@1"
MARK = "import sys\nsys.kernel_ran = True\n"


@pytest.fixture
def swapper(hub, hub_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setenv("KERNELSWAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    hub.organization("org", trusted=True)
    files = [kernel_files(v, MARK, name="kernel", files={"more.py": "x = 1"}) for v in ("torch-cpu", "torch-cuda")]
    hub.repo("org/kernel").branch("v1", {p: d for one in files for p, d in one.items()})
    yield Swapper(cache=tmp_path / "cache", machine=CPU, prover=Near())
    assert not hasattr(sys, "kernel_ran")


@pytest.fixture
def lock(swapper):
    return locking.make(swapper.sources["hub"], [Requirement("org/kernel", version=1)])


def edited(lock, **changes):
    (entry,) = lock.entries
    return Lock((replace(entry, **changes),))


def test_what_is_here_is_what_the_lock_says(swapper, lock):
    artifact = swapper.artifact(SPEC)
    (seen,) = verifying.locked(swapper.store, lock)
    assert (seen.wrong, seen.variant, seen.digest) == (None, "torch-cpu", artifact.digest)


def test_a_lock_of_which_nothing_is_here_is_not_verified(swapper, lock):
    (seen,) = verifying.locked(swapper.store, lock)
    assert not seen.here
    assert "which is not here" in seen.wrong


def test_another_commit_than_the_locked_one_is_said(swapper, lock):
    swapper.artifact(SPEC)
    (seen,) = verifying.locked(swapper.store, edited(lock, commit="a" * 40))
    assert seen.wrong.startswith("the lock has it at aaaaaaaaaaaa, which is not here, but ")


def test_every_file_that_differs_from_a_lock_is_named(swapper, lock):
    swapper.artifact(SPEC)
    builds = lock.entries[0].builds
    cpu = next(b for b in builds if b.variant == "torch-cpu")
    files = {**dict(cpu.files), "__init__.py": "0" * 64, "gone.py": "1" * 64}
    files.pop("more.py")
    (seen,) = verifying.locked(swapper.store, edited(lock, builds=(replace(cpu, files=tuple(files.items())),)))
    assert seen.wrong.splitlines() == [
        "'gone.py' is missing",
        "'__init__.py' differs from the lock",
        "'more.py' is not in the lock",
    ]
    (seen,) = verifying.locked(swapper.store, edited(lock, builds=(replace(cpu, files=(), tree="2" * 64),)))
    assert seen.wrong.startswith("the lock states the tree 222")
    (seen,) = verifying.locked(swapper.store, edited(lock, builds=tuple(b for b in builds if b.variant != "torch-cpu")))
    assert seen.wrong == "the lock has no build torch-cpu"


def test_a_changed_file_under_an_honest_lock_is_found(swapper, lock):
    artifact = swapper.artifact(SPEC)
    (artifact.path / "more.py").chmod(0o644)
    (artifact.path / "more.py").write_text("x = 2")
    (seen,) = verifying.locked(swapper.store, lock)
    assert "'more.py' differs" in seen.wrong


def test_every_published_build_is_held_against_every_verifier_and_none_is_kept(swapper, hub):
    assert [(s.variant, s.wrong) for s in verifying.published(swapper, Requirement("org/kernel", version=1))] == [
        ("torch-cpu", None),
        ("torch-cuda", None),
    ]
    files = kernel_files("torch-cpu", MARK, name="kernel")
    files["build/torch-cpu/__init__.py"] += b"#"
    files["build/torch-cpu/extra.py"] = b""
    hub.repo("org/kernel").branch("v2", files)
    hub.organization("org", trusted=False)
    fresh = Swapper(cache=swapper.environment.cache / "other", machine=CPU)
    (seen,) = verifying.published(fresh, Requirement("org/kernel", version=2))
    assert "__init__.py" in seen.wrong
    assert "extra.py" in seen.wrong
    assert "not a trusted publisher" in seen.wrong
    assert not swapper.store.entries()
    with pytest.raises(UnknownKernel):
        list(verifying.published(swapper, Requirement("org/none", version=1)))


def test_what_is_in_a_bundle_is_compared_with_its_listing_and_its_lock(swapper, tmp_path):
    file = tmp_path / "x.bundle"
    bundling.write(file, swapper, Wanted(specs=(SPEC,)), Terms())
    assert [s.wrong for s in verifying.bundled(BundleSource.open(file))] == [None]

    def change(what, edit):
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "bad.bundle", "w") as new:
            for name in old.namelist():
                new.writestr(name, edit(old.read(name)) if name.endswith(what) else old.read(name))
        return [s.wrong for s in verifying.bundled(BundleSource.open(tmp_path / "bad.bundle"))]

    (wrong,) = change("more.py", lambda data: b"x = 7")
    assert "more.py is not what the bundle" in wrong
    (wrong,) = change("kernelswap.lock", lambda data: data.replace(b'"more.py"', b'"mora.py"'))
    assert wrong.splitlines() == ["'mora.py' is missing", "'more.py' is not in the lock"]
    (wrong,) = change("kernelswap.lock", lambda data: b'{"format_version": 1, "entries": []}')
    assert "does not name it" in wrong


def test_the_command_says_it_in_words_and_as_json(swapper, lock, tmp_path, capsys):
    def call(*argv, code=0):
        assert main([str(a) for a in argv]) == code
        return capsys.readouterr()

    (tmp_path / "kernelswap.lock").write_text(lock.dumps())
    assert "absent org/kernel@1" in call("verify", "--lock", tmp_path, code=exits.NO).out
    swapper.artifact(SPEC)
    assert "1 of 1 intact" in call("verify", "--lock", tmp_path).out
    assert "1 of 1 intact" in call("verify", "--lock", tmp_path / "kernelswap.lock").out
    found = json.loads(call("verify", "--published", SPEC, "--json").out)
    assert [a["variant"] for a in found["artifacts"]] == ["torch-cpu", "torch-cuda"]
    bundling.write(tmp_path / "x.bundle", swapper, Wanted(specs=(SPEC,)), Terms())
    assert "1 of 1 intact in the bundle" in call("verify", "--bundle", tmp_path / "x.bundle").out
    for wrong in (("--published",), ("--lock", tmp_path, SPEC), ("--lock", tmp_path / "none"), ("--lock", tmp_path / "config")):
        assert call("verify", *wrong, code=exits.USAGE).err


def test_a_bundle_is_written_and_used_by_commands(swapper, tmp_path, capsys, monkeypatch):
    file = tmp_path / "k.bundle"
    assert main(["bundle", "--kernel", SPEC, "-o", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [k["spec"] for k in said["kernels"]] == [SPEC]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    assert main(["find", SPEC, "--bundle", str(file), "--cache", str(tmp_path / "c")]) == 0
    assert "* torch-cpu" in capsys.readouterr().out
    assert main(["find", "org/other@1", "--bundle", str(file)]) == exits.USAGE
    assert "has no org/other" in capsys.readouterr().err
    assert main(["bundle", "-o", str(file)]) == exits.USAGE
    assert "neither a model nor a kernel is named" in capsys.readouterr().err
    script = tmp_path / "script.py"
    script.write_text("import kernelswap\nprint(kernelswap.find('org/kernel@1').chosen.source)\n")
    monkeypatch.setattr("kernelswap.api._default", None)
    monkeypatch.setenv("KERNELSWAP_BUNDLE", "")
    assert main(["run", "--bundle", str(file), str(script)]) == 0
    assert capsys.readouterr().out == "bundle\n"
