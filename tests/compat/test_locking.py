"""Locks of projects and models, `kernelswap lock`, `download`, `versions` and `info`, through the command line."""

import json

import pytest
from tests.compat.conftest import CODE, old_lock, published

from kernelswap import lock as locks


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "pyproject.toml").write_text('[tool.kernels.dependencies]\n"org/top" = 1\n')
    return folder


def publish(hub, code=CODE):
    depends = {"kernel-depends": [{"repo-id": "org/base", "version": 1}]}
    published(hub, "org/base", code="BASE = 5", variants=("torch-cpu",))
    return published(hub, "org/top", code=code, variants=("torch-cpu", "torch-cuda"), metadata=depends)


def test_lock_pins_commits_and_every_file_of_every_build(cli, hub, project):
    commit = publish(hub)
    code, said = cli("lock", project)
    assert code == 0
    assert len(said["changes"]) == 2
    theirs = json.loads((project / "kernels.lock").read_text())
    assert [e["dependency"] for e in theirs] == [{"repo-id": "org/base", "version": 1}, {"repo-id": "org/top", "version": 1}]
    assert theirs[1]["lock"] == {"commit": commit}
    ours = locks.parse((project / "kernelswap.lock").read_text())
    builds = ours.find("org/top").builds
    assert [b.variant for b in builds] == ["torch-cpu", "torch-cuda"]
    assert all("layers.py" in dict(b.files) and b.tree for b in builds)


def test_what_is_locked_stays_until_update_and_the_change_is_said(cli, hub, project):
    before = publish(hub)
    cli("lock", project)
    after = publish(hub, CODE + "\nLATER = True\n")
    assert cli("lock", project)[1]["changes"] == []
    assert locks.parse((project / "kernels.lock").read_text()).find("org/top").commit == before
    changes = cli("lock", project, "--update")[1]["changes"]
    assert f"org/top@1: {before[:12]} -> {after[:12]}" in changes
    assert "org/top@1 torch-cpu: changed __init__.py, changed metadata.json" in changes


def test_an_old_lock_is_read_and_kept_to(cli, hub, project):
    before = publish(hub)
    (project / "kernels.lock").write_text(old_lock(hub, "org/top", before))
    publish(hub, CODE + "\nLATER = True\n")
    assert cli("lock", project)[0] == 0
    assert locks.parse((project / "kernels.lock").read_text()).find("org/top").commit == before


def test_download_fetches_what_is_locked(cli, hub, hub_cache, project):
    publish(hub)
    assert cli("download", project)[0] != 0
    cli("lock", project)
    code, said = cli("download", project)
    assert (code, [row["builds"] for row in said["kernels"]]) == (0, [["torch-cpu"], ["torch-cpu"]])
    assert cli("download", project, "--all-variants")[1]["kernels"][1]["builds"] == ["torch-cpu", "torch-cuda"]


def test_versions_says_what_runs_here_and_why_not(cli, hub):
    published(hub)
    published(hub, version=2, variants=("torch-cuda",))
    code, said = cli("versions", "org/demo")
    assert code == 0
    assert [(row["version"], row["variant"]) for row in said["versions"]] == [(1, "torch-cpu"), (2, None)]
    assert said["versions"][1]["why_not"]


def test_info_says_what_the_metadata_says(cli, hub, make_repo):
    commit = published(hub)
    said = cli("info", "org/demo", "--version", "1")[1]
    assert (said["repo_id"], said["revision"], said["name"], said["version"]) == ("org/demo", commit, "demo", 1)
    assert said["backends"] == ["cpu"]
    root = make_repo("here", {"torch-cpu": "x = 1"})
    said = cli("info", root)[1]
    assert (said["path"], said["name"], said["fits"]) == (str(root), "here", "torch-cpu")


def test_verify_signature_says_that_a_build_is_not_signed(cli, hub):
    published(hub, variants=("torch-cpu", "torch-cuda"))
    code, said = cli("verify-signature", "org/demo", "1")
    assert (code, said["wrong"], [row["variant"] for row in said["builds"]]) == (1, 1, ["torch-cpu"])
    assert "not signed" in said["builds"][0]["wrong"][0]
    assert any("match their sha256" in line for line in said["builds"][0]["evidence"])
    assert len(cli("verify-signature", "org/demo", "1", "--all-variants")[1]["builds"]) == 2
    assert cli("verify-signature", "org/demo", "1", "--filter-unsigned")[1]["builds"] == []


def test_what_serves_a_model_is_locked_with_its_digests(make_repo, make_swapper):
    from tests.swapping import model, repository, rows

    from kernelswap import locking

    swapper = make_swapper()
    outcomes = swapper.plan(model(), table=rows(repository(make_repo)), inherit=False)
    made = locking.of_model(outcomes)
    assert [(e.source, [b.variant for b in e.builds]) for e in made.entries] == [("dir", ["torch-cpu"])]
    assert locks.parse(made.dumps()) == made
    artifact = swapper.artifact(made.entries[0].asked)
    assert made.entries[0].builds[0].tree == artifact.digest
    assert locking.of_model((), made) == made


# -- between two locks ---------------------------------------------------------------------------------------------------


def test_lock_diff_says_in_words_what_changed_between_two_locks_of_any_format(cli, hub, project, tmp_path):
    before = publish(hub)
    (tmp_path / "old.lock").write_text(
        json.dumps([{"dependency": {"repo-id": "org/top", "version": 1}, "lock": {"commit": before}}])
    )
    after = publish(hub, CODE + "\nLATER = True\n")
    cli("lock", project)
    code, said = cli("lock-diff", tmp_path / "old.lock", project)
    assert code == 1
    assert f"org/top@1: {before[:12]} -> {after[:12]}" in said["changes"]
    assert any(line.startswith("org/base@1: added at") for line in said["changes"])
    assert cli("lock-diff", project, project / "kernelswap.lock") == (
        0,
        {"old": str(project), "new": str(project / "kernelswap.lock"), "changes": []},
    )
    code, said = cli("lock-diff", tmp_path / "nothing")
    assert code == 2
    assert "nothing" in said["error"]["found"]


def test_rollback_brings_back_the_lock_before_and_a_second_one_takes_that_back(cli, hub, project):
    publish(hub)
    cli("lock", project)
    first = {name: (project / name).read_bytes() for name in ("kernels.lock", "kernelswap.lock")}
    assert cli("lock-rollback", project)[0] == 2  # nothing was replaced yet
    publish(hub, CODE + "\nLATER = True\n")
    cli("lock", project, "--update")
    second = {name: (project / name).read_bytes() for name in first}
    assert second != first
    code, said = cli("lock-diff", project)
    assert code == 1
    assert len(cli("lock-rollback", project, "--list")[1]["locks"]) == 1
    assert {name: (project / name).read_bytes() for name in first} == second
    code, back = cli("lock-rollback", project)
    assert code == 0
    assert {name: (project / name).read_bytes() for name in first} == first
    assert sorted(line.partition(":")[0] for line in back["changes"]) == sorted(
        line.partition(":")[0] for line in said["changes"]
    )
    assert cli("lock-rollback", project)[0] == 0
    assert {name: (project / name).read_bytes() for name in first} == second
    assert len(cli("lock-rollback", project, "--list")[1]["locks"]) == 1  # the same lock again is not another one
    assert cli("lock-rollback", project, "--to", "2")[0] == 2


def test_what_was_rolled_back_to_is_what_download_fetches(cli, hub, project):
    before = publish(hub)
    cli("lock", project)
    after = publish(hub, CODE + "\nLATER = True\n")
    cli("lock", project, "--update")
    assert cli("download", project)[1]["kernels"][1]["commit"] == after
    cli("lock-rollback", project)
    assert cli("download", project)[1]["kernels"][1]["commit"] == before


def test_a_lock_that_cannot_be_written_leaves_both_files_as_they_were(hub, project, tmp_path):
    from kernelswap import locking
    from kernelswap.errors import StoreError
    from kernelswap.lock import Locked

    one, two = (locks.Lock((Locked("org/top", digit * 40),)) for digit in "ab")
    locking.write(one, project)
    (project / "kernels.lock").unlink()
    (project / "kernels.lock").mkdir()
    (project / "kernels.lock" / "in the way").write_text("")
    before = sorted(p.name for p in project.iterdir())
    with pytest.raises(StoreError, match="cannot be written"):
        locking.write(two, project)
    assert locks.parse((project / "kernelswap.lock").read_text()) == one
    assert sorted(p.name for p in project.iterdir()) == before


# -- written on request --------------------------------------------------------------------------------------------------


def test_a_swap_writes_the_lock_of_what_serves_where_it_is_asked_to(make_repo, make_swapper, tmp_path):
    from tests.swapping import model, repository, rows

    swapper, root = make_swapper(), repository(make_repo)
    asked = {"table": rows(root), "inherit": False, "lock": tmp_path}
    applied = swapper.swap(model(), **asked)
    made = locks.parse((tmp_path / "kernelswap.lock").read_text())
    assert {e.source for e in made.entries} == {"dir"}
    served = {c.implementation.origin.digest for o in applied.outcomes for c in (getattr(o, "inference", None),) if c}
    assert {b.tree for e in made.entries for b in e.builds} == served
    stamp = (tmp_path / "kernelswap.lock").stat().st_mtime_ns
    swapper.swap(model(), **asked)
    assert (tmp_path / "kernelswap.lock").stat().st_mtime_ns == stamp
    torch_model = model()
    with pytest.raises(OSError, match="cannot be written"):
        swapper.swap(torch_model, **{**asked, "lock": tmp_path / "nowhere"})
    assert swapper.applied(torch_model) is None


def test_a_script_that_runs_with_lock_leaves_a_lock_of_what_it_loaded(hub, hub_cache, tmp_path):
    import os
    import subprocess
    import sys

    commit = published(hub)
    (tmp_path / "script.py").write_text("import kernels\nprint(kernels.get_kernel('org/demo', version=1).double(4))\n")
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(hub_cache),
        "KERNELSWAP_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    given = [sys.executable, "-m", "kernelswap", "run", "--lock", str(tmp_path), str(tmp_path / "script.py")]
    done = subprocess.run(given, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=200, check=False)
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr
    assert f"locked: org/demo@1: added at {commit[:12]}" in done.stderr
    entry = locks.parse((tmp_path / "kernelswap.lock").read_text()).find("org/demo")
    assert (entry.commit, entry.version, [b.variant for b in entry.builds]) == (commit, 1, ["torch-cpu"])
    assert dict(entry.builds[0].files)["layers.py"]


def test_what_is_locked_serves_a_model_at_its_commit_whatever_the_branch_says_now(cli, hub, tmp_path):
    """What `kernelswap lock --model` does without and with `--update`; `cli` is here for the environment."""
    from dataclasses import replace

    from tests.swapping import model, rows

    from kernelswap import locking
    from kernelswap.cli import session
    from kernelswap.types import Use

    table = [replace(row, use=(Use("org/demo@1:RMSNorm"),)) for row in rows("") if row.layer == "RMSNorm"]

    def made(former):
        swapper = session.swapper(cache=tmp_path / "cache", locked=former)
        return locking.of_model(swapper.plan(model(), table=table, inherit=False), former)

    before = published(hub)
    first = made(None)
    assert first.find("org/demo").commit == before
    after = published(hub, code=CODE + "\nLATER = True\n")
    assert made(first) == first
    assert made(None).find("org/demo").commit == after
    other_machine = replace(
        first, entries=tuple(replace(e, builds=(replace(e.builds[0], variant="torch-cuda"),)) for e in first.entries)
    )
    assert {b.variant for b in made(other_machine).find("org/demo").builds} == {"torch-cuda", "torch-cpu"}


# -- in a package's metadata ---------------------------------------------------------------------------------------------


def test_setuptools_takes_the_locks_of_a_project_into_its_metadata(tmp_path):
    """As its `egg_info` command calls what `egg_info.writers` names; here with the entry points of pyproject.toml itself."""
    pytest.importorskip("setuptools")
    import os
    import subprocess
    import sys
    from importlib.metadata import EntryPoint
    from pathlib import Path

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    root = Path(__file__).parents[2]
    writers = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]["egg_info.writers"]
    assert set(writers) == {"kernels.lock", "kernelswap.lock"}
    assert all(callable(EntryPoint(name, where, "egg_info.writers").load()) for name, where in writers.items())
    # a distribution on the path that has these entry points, as kernelswap has once it is installed
    info = tmp_path / "site" / "kernelswap_writers-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernelswap-writers\nVersion: 1\n")
    lines = "".join(f"{name} = {where}\n" for name, where in writers.items())
    (info / "entry_points.txt").write_text(f"[egg_info.writers]\n{lines}")
    project = tmp_path / "project"
    project.mkdir()
    (project / "setup.py").write_text("from setuptools import setup\nsetup(name='mine', version='1', py_modules=['mine'])\n")
    (project / "mine.py").write_text("")
    (project / "kernels.lock").write_text("[]\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *(p for p in sys.path if p)])}
    given = [sys.executable, "setup.py", "-q", "egg_info"]
    done = subprocess.run(given, cwd=project, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert (project / "mine.egg-info" / "kernels.lock").read_text() == "[]\n"
    assert not (project / "mine.egg-info" / "kernelswap.lock").exists()
