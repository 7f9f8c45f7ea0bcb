"""A kernel that would do harm when imported: looking at it must not import it."""

import os
import subprocess
import sys


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
