"""The two commands: what they install is pinned, and what is up to date is left alone."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def dev():
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins():
    lines = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_every_constraint_is_one_exact_version():
    for pin in pins():
        assert [s.operator for s in pin.specifier] == ["=="], pin


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.14"])
def test_every_dependency_is_pinned_for_every_python_and_inside_its_bounds(python):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    asked += [
        r for group in project["project"]["optional-dependencies"].values() for r in group if not r.startswith("kernelswap")
    ]
    where = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    pinned = {p.name.lower().replace("_", "-"): p for p in pins() if p.marker is None or p.marker.evaluate(where)}
    for text in asked:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate(where):
            continue
        pin = pinned[wanted.name.lower().replace("_", "-")]
        version = next(iter(pin.specifier)).version
        assert wanted.specifier.contains(version), f"{text} against {pin}"


def test_torch_and_pip_are_those_of_the_constraints(dev):
    versions = {p.name: next(iter(p.specifier)).version for p in pins()}
    assert (versions["torch"], versions["pip"]) == (dev.TORCH, dev.PIP)


def test_without_an_nvidia_chip_a_cpu_build_of_torch_satisfies(dev, monkeypatch):
    monkeypatch.setattr(dev, "accelerator", lambda: None)
    assert Requirement(dev.torch_requirement()).specifier.contains(f"{dev.TORCH}+cpu")
    monkeypatch.setattr(dev, "accelerator", lambda: "cuda")
    assert not Requirement(dev.torch_requirement()).specifier.contains(f"{dev.TORCH}+cpu")
    assert Requirement(dev.torch_requirement()).specifier.contains(dev.TORCH)


def test_an_environment_that_is_up_to_date_is_not_touched(dev, tmp_path, monkeypatch):
    monkeypatch.setattr(dev, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(dev, "works", lambda: True)
    commands = []
    monkeypatch.setattr(dev, "must", lambda *command, doing: commands.append(doing))
    dev.setup()
    assert len(commands) == 3
    dev.setup()
    assert len(commands) == 3
    monkeypatch.setattr(dev, "TORCH", "9.9")
    dev.setup()
    assert len(commands) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels are for Linux")
def test_triton_is_installed_beside_the_environment_once_and_never_next_to_a_torch_that_has_it(dev, tmp_path, monkeypatch):
    monkeypatch.setattr(dev, "INTERPRETER", tmp_path / "interpreter")
    monkeypatch.setattr(dev, "accelerator", lambda: None)
    commands = []
    monkeypatch.setattr(dev, "call", lambda *command, **_: commands.append(command))
    dev.interpreter()
    (command,) = commands
    assert command[-1] == next(str(p).partition(";")[0].strip() for p in pins() if p.name == "triton")
    (tmp_path / "interpreter" / f"{command[-1].replace('==', '-')}.dist-info").mkdir(parents=True)
    dev.interpreter()
    monkeypatch.setattr(dev, "INTERPRETER", tmp_path / "other")
    monkeypatch.setattr(dev, "accelerator", lambda: "cuda")
    dev.interpreter()
    assert len(commands) == 1


def test_a_failed_installation_leaves_no_stamp(dev, tmp_path, monkeypatch):
    monkeypatch.setattr(dev, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(dev, "works", lambda: True)
    monkeypatch.setattr(dev, "call", lambda *_, **__: 7)
    with pytest.raises(SystemExit) as e:
        dev.setup()
    assert e.value.code == 7
    assert not (tmp_path / "stamp").exists()


def test_without_a_verb_it_says_how_to_use_it():
    done = subprocess.run([sys.executable, ROOT / "dev.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "python3 dev.py demo" in done.stdout


def test_ci_runs_what_the_readme_says():
    run = (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    for command in ("python3 dev.py test", "python3 dev.py demo"):
        assert command in run
        assert command in readme


# -- releases of Transformers ---------------------------------------------------------------------------------------


def test_every_minor_release_of_transformers_that_is_supported_is_tested(dev):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = next(
        Requirement(r) for r in project["project"]["optional-dependencies"]["transformers"] if r.startswith("transformers")
    )
    newest = max((next(iter(p.specifier)).version for p in pins() if p.name == "transformers"), key=Version)
    oldest = min(s.version for s in asked.specifier if s.operator == ">=")
    minors = [int(v.split(".")[1]) for v in (oldest, newest)]
    assert [*dev.releases((3, 11))] == [f"5.{minor}" for minor in range(minors[0], minors[1])]
    for line in dev.releases((3, 11)).values():
        assert [str(Requirement(pin).specifier)[:2] for pin in line] == ["=="] * len(line)
    assert "5.22" not in dev.releases((3, 10))  # it needs 3.11
    assert "dev.py transformers oldest" in (ROOT / ".ci" / "run").read_text()


def test_a_release_is_installed_once_beside_the_environment_and_put_before_it(dev, tmp_path, monkeypatch):
    monkeypatch.setattr(dev, "VENV", tmp_path)
    installed, ran = [], []
    monkeypatch.setattr(
        dev, "must", lambda *command, doing: installed.append(command) or (tmp_path / "transformers-5.10").mkdir()
    )
    monkeypatch.setattr(dev, "call", lambda *command, env: ran.append((command, env)) or 3)
    for _ in range(2):
        assert dev.transformers(["oldest", "-n", "0"]) == 3
    assert [command[-1] for command in installed] == [dev.releases()["5.10"][-1]]
    assert ran[0][0][-6:] == (*dev.TOUCHING, "-n", "0")
    assert ran[0][1]["PYTHONPATH"].split(dev.os.pathsep)[0] == str(tmp_path / "transformers-5.10")


def test_a_release_that_is_not_supported_is_said(dev, capsys):
    assert dev.transformers(["4.57"]) == 2
    assert "4.57: not in requirements/transformers.txt, which has 5.10, 5.11," in capsys.readouterr().err


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 13, 0)])
def test_a_python_that_cannot_serve_is_said_before_anything_is_made(dev, version, monkeypatch, capsys):
    monkeypatch.setattr(dev.sys, "version_info", version)
    with pytest.raises(SystemExit, match="2"):
        dev.setup()
    assert "needs Python 3.10 or later, and not 3.13.0" in capsys.readouterr().err
