"""`kernelswap run`: the script notices nothing."""

import json
import subprocess
import sys

from kernelswap.cli import exits


def run(*argv, cwd):
    return subprocess.run(
        [sys.executable, "-m", "kernelswap", "run", *argv], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_a_script_gets_its_own_arguments_name_and_path(tmp_path):
    where = tmp_path / "below"  # not the current directory: that is on the path of `python -m` anyway
    where.mkdir()
    (where / "beside.py").write_text("answer = 42")
    (where / "s.py").write_text("import sys, beside; print(__name__, sys.argv, __file__, beside.answer)")
    done = run("below/s.py", "--json", "-x", "--help", cwd=tmp_path)
    assert done.stdout == "__main__ ['below/s.py', '--json', '-x', '--help'] below/s.py 42\n"
    assert done.returncode == 0


def test_the_exit_status_of_the_script_is_ours(tmp_path):
    (tmp_path / "s.py").write_text("import sys; sys.exit(7)")
    assert run("s.py", cwd=tmp_path).returncode == 7
    (tmp_path / "s.py").write_text("import sys; sys.exit('no')")
    done = run("s.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "no\n")


def test_the_traceback_of_the_script_shows_the_script_alone(tmp_path):
    (tmp_path / "s.py").write_text("def f():\n    raise KeyError('mine')\nf()\n")
    done = run("s.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "KeyError: 'mine'"
    assert "kernelswap" not in done.stderr
    assert "runpy" not in done.stderr
    assert 's.py", line 3' in done.stderr


def test_a_module_runs_like_a_script(tmp_path):
    (tmp_path / "beside.py").write_text("import sys; print(__name__, sys.argv[1:])")
    done = run("-m", "beside", "a", cwd=tmp_path)
    assert done.stdout == "__main__ ['a']\n"


def test_no_such_script_is_wrong_usage(tmp_path):
    done = run("s.py", cwd=tmp_path)
    assert done.returncode == exits.USAGE
    assert "there is no file s.py" in done.stderr


def test_json_goes_to_stderr_since_stdout_is_the_script_s(tmp_path):
    (tmp_path / "s.py").write_text("import kernelswap; print(kernelswap.installed())")
    done = run("--json", "s.py", cwd=tmp_path)
    assert done.stdout == "True\n"
    assert json.loads(done.stderr) == {"script": "s.py", "installed": True, "exit": 0}
