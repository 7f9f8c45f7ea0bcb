"""`kernelswap lock`, `download`, `versions` and `info`, through the command line."""

import json

import pytest
from tests.compat.conftest import CODE, published

from kernelswap import lock as locks
from kernelswap.cli import app


@pytest.fixture
def cli(hub, hub_cache, tmp_path, monkeypatch, capsys):
    """`cli("lock", ".")`: (exit code, JSON on stdout)."""
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setenv("KERNELSWAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KERNELS_CACHE", raising=False)

    def run(*argv):
        code = app.run([*map(str, argv), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


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
    variants = {"torch-cpu": {"hash": f"sha256-{'0' * 64}", "hash_type": "git_lfs_concat"}}
    (project / "kernels.lock").write_text(json.dumps([{"repo_id": "org/top", "sha": before, "variants": variants}]))
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

    from kernelswap.compat import writing

    swapper = make_swapper()
    outcomes = swapper.plan(model(), table=rows(repository(make_repo)), inherit=False)
    made = writing.of_model(outcomes)
    assert [(e.source, [b.variant for b in e.builds]) for e in made.entries] == [("dir", ["torch-cpu"])]
    assert locks.parse(made.dumps()) == made
    artifact = swapper.artifact(made.entries[0].asked)
    assert made.entries[0].builds[0].tree == artifact.digest
    assert writing.of_model((), made) == made
