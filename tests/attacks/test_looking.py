"""A kernel that would do harm when imported: looking at it must not import it."""

import os
import subprocess
import sys

import pytest
from tests.hub import kernel_files

from kernelswap.cli import exits, main


def test_looking_at_a_kernel_runs_none_of_it(make_repo, tmp_path):
    mark = tmp_path / "it-ran"
    root = make_repo("trap", {"torch-cpu": f"open({str(mark)!r}, 'w').close()"})
    cache = ["--cache", str(tmp_path / "cache"), "--offline"]
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "config"), "CUDA_VISIBLE_DEVICES": ""}

    def run(*arguments):
        command = [sys.executable, "-m", "kernelswap", *arguments, *cache]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert "torch-cpu" in run("find", f"dir://{root}").stdout
    assert not mark.exists()
    loaded = run("load", f"dir://{root}")
    assert mark.exists(), loaded.stderr  # the trap works
    mark.unlink()
    assert "1 of 1 intact" in run("verify").stdout
    assert not mark.exists()


@pytest.fixture
def trap(hub, hub_cache, tmp_path, monkeypatch):
    """A kernel of a trusted publisher that does harm when imported, and a project that asks for it."""
    mark = tmp_path / "it-ran"
    hub.organization("org", trusted=True)
    hub.repo("org/trap").branch("v1", kernel_files("torch-cpu", f"open({str(mark)!r}, 'w').close()", name="trap"))
    for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": hub_cache, "HOME": tmp_path, "XDG_CONFIG_HOME": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("KERNELSWAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kernelswap.api._default", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[tool.kernels.dependencies]\n"org/trap" = 1\n')
    return mark


def test_no_verb_that_looks_copies_or_pins_imports_a_kernel(trap, capsys):
    for argv in (
        ["find", "org/trap@1"],
        ["versions", "org/trap"],
        ["info", "org/trap@1"],
        ["lock", "."],
        ["download", "."],
        ["verify", "--published", "org/trap@1"],
        ["verify-signature", "org/trap@1"],
        ["mirror", "mirror", "org/trap@1"],
        ["bundle", "--kernel", "org/trap@1", "-o", "x.bundle"],
        ["verify", "--bundle", "x.bundle"],
        ["verify", "--lock", "."],
        ["verify"],
        ["find", "org/trap@1", "--bundle", "x.bundle"],
        ["doctor"],
    ):
        code = main(argv)
        said = capsys.readouterr()
        assert code in {exits.OK, exits.NO, exits.PUBLISHER}, (argv, said.err)
        assert code != exits.PUBLISHER or argv[0] == "verify-signature", (argv, said.err)
        assert not trap.exists(), argv
    assert main(["load", "org/trap@1", "--bundle", "x.bundle"]) == exits.OK
    assert trap.exists()  # the trap works
