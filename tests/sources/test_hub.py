"""The hub source against a hub on loopback, with the real client in between; requests are counted."""

import contextlib
import json
import logging
import os
import pathlib
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.contract.sources import SourceContract, Subject, on_disk
from tests.hub import Hub, kernel_files

import kernelswap
from kernelswap.errors import BadMetadata, KernelSwapError, NotCached, Refused, UnknownKernel, Unreachable
from kernelswap.sources import hub_client
from kernelswap.sources.hub import HubSource
from kernelswap.sources.hub_cache import CachedRepo
from kernelswap.sources.hub_client import HubClient
from kernelswap.spec import parse

BIG = bytes(range(256)) * 1024  # large enough to be redirected to another host


def files(*variants, code="x = 1", **more):
    return {path: data for v in variants for path, data in kernel_files(v, code, **more).items()}


def inside(variant, published):
    return {p.removeprefix(f"build/{variant}/"): d for p, d in published.items() if p.startswith(f"build/{variant}/")}


@pytest.fixture
def source_of(hub, hub_cache):
    """A fresh source, as another process would have it; failed requests are repeated without waiting."""

    def make(**more):
        return HubSource(hub_cache, **{"endpoint": hub.url, "timeout": 5.0, "backoff": 0.0, **more})

    return make


@pytest.fixture
def fetched(source_of, tmp_path):
    """Find and fetch, as a first run would: `fetched("org/demo@1")` gives the candidate."""

    def fetch(text, variant="torch-cpu", source=None):
        source = source or source_of()
        candidate = next(c for c in source.find(parse(text))[0] if c.variant == variant)
        into = tmp_path / f"into-{len(list(tmp_path.iterdir()))}"
        into.mkdir()
        source.read(candidate, "metadata.json")
        source.fetch(candidate, into)
        return candidate, on_disk(into)

    return fetch


class TestHub(SourceContract):
    @pytest.fixture
    def subject(self, hub, source_of):
        published = files("torch-cpu", "torch-cuda", files={"kernel.so": BIG, "deep/data.json": "{}"})
        published |= {
            "README.md": "hello",
            "outside.txt": "secret",
            "benchmarks/benchmark.py": "",
            "build/torch-cpu/__pycache__/x.pyc": "x",
        }
        hub.repo("org/demo").branch("v1", published)
        kept = files("torch-cpu", "torch-cuda", files={"kernel.so": BIG, "deep/data.json": "{}"})
        builds = {v: inside(v, kept) for v in ("torch-cpu", "torch-cuda")}
        return Subject(source_of(), parse("org/demo@1"), builds, parse("org/unknown@1"))


class TestFromTheCacheAlone(SourceContract):
    @pytest.fixture
    def subject(self, hub, source_of, fetched):
        published = files("torch-cpu", files={"kernel.so": BIG})
        hub.repo("org/demo").branch("v1", published)
        fetched("org/demo@1")
        hub.stop()
        return Subject(
            source_of(offline=True), parse("org/demo@1"), {"torch-cpu": inside("torch-cpu", published)}, parse("org/unknown@1")
        )

    def test_an_unknown_name_says_what_was_asked_what_is_so_and_what_to_do(self, subject):
        """Offline nobody can say that it is unknown."""
        with pytest.raises(NotCached) as e:
            subject.source.find(subject.unknown)
        assert str(subject.unknown) in e.value.asked
        assert e.value.todo


# -- versions


@pytest.fixture
def versions(hub):
    """A repository with branches, tags, a pull request; gives name -> commit."""
    repo = hub.repo("org/demo")
    made = {name: repo.branch(name, files("torch-cpu", code=f"name = {name!r}")) for name in ("main", "v1", "v2", "v10", "dev")}
    made |= {name: repo.tag(name, files("torch-cpu", code=f"name = {name!r}")) for name in ("v2.0.0", "v2.1.0", "v3.0.0rc1")}
    made["refs/pr/1"] = repo.pull_request(1, files("torch-cpu", code="pr = 1"))
    return made


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("org/demo@1", "v1"),
        ("org/demo@10", "v10"),
        ("org/demo", "v10"),
        ("org/demo@dev", "dev"),
        ("org/demo@main", "main"),
        ("org/demo@v2.0.0", "v2.0.0"),
        ("org/demo@refs/pr/1", "refs/pr/1"),
        ("org/demo@>=2.0,<3.0", "v2.1.0"),
        ("org/demo@>=3.0.0rc1,<4", "v3.0.0rc1"),
        ("org/demo@>=5", "v10"),
    ],
)
def test_a_version_is_the_commit_that_it_stands_for(versions, source_of, spec, name):
    (candidate,) = source_of().find(parse(spec))[0]
    assert candidate.commit == versions[name]


def test_without_version_branches_main_is_meant(hub, source_of):
    commit = hub.repo("org/old").branch("main", files("torch-universal"))
    assert source_of().find(parse("org/old"))[0][0].commit == commit


def test_a_commit_is_itself(versions, source_of, hub):
    (candidate,) = source_of().find(parse(f"org/demo@{versions['v1']}"))[0]
    assert candidate.commit == versions["v1"]
    assert not hub.requests("*/refs")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("org/demo@7", "org/demo has v1, v2, v10\n"),
        ("org/demo@dve", "did you mean dev?"),
        ("org/demo@>=77", "org/demo has v1, v2, v10, dev, main, v2.0.0"),
        ("org/demo@" + "f" * 40, "has no commit ffff"),
        ("org/demo@refs/pr/9", "org/demo has v1"),
    ],
)
def test_an_unknown_version_lists_the_known_ones(versions, source_of, spec, said):
    with pytest.raises(UnknownKernel) as e:
        source_of().find(parse(spec))
    assert said in str(e.value)


def test_a_newer_version_is_mentioned(versions, source_of):
    assert source_of().find(parse("org/demo@1"))[1] == ("org/demo also has the newer version 10",)
    assert source_of().find(parse("org/demo@10"))[1] == ()


# -- requests


def test_a_cold_find_asks_for_the_names_and_the_files_and_nothing_else(hub, source_of):
    hub.repo("org/demo").branch("v1", files("torch-cpu", "torch-cuda"))
    source_of().find(parse("org/demo@1"))
    assert [p.split("org/demo/")[1].split("/")[0] for _, p in hub.requests()] == ["refs", "tree"]


def test_a_cold_fetch_downloads_the_chosen_build_only(hub, fetched):
    published = files("torch-cpu", "torch-cuda", "torch-rocm", files={"kernel.so": BIG})
    hub.repo("org/demo").branch("v1", {**published, "README.md": "x", "benchmarks/b.py": "x"})
    _, got = fetched("org/demo@1")
    assert got == inside("torch-cpu", published)
    downloaded = {p.split("/resolve/")[1].split("/", 1)[1] for _, p in hub.requests("*/resolve/*")}
    assert downloaded == {p for p in published if p.startswith("build/torch-cpu/")}
    assert len(hub.requests("*/resolve/*")) + len(hub.requests("/lfs/*")) == 2 * len(downloaded)


def test_a_known_commit_in_the_cache_costs_no_request(hub, fetched, source_of):
    hub.repo("org/demo").branch("v1", files("torch-cpu", "torch-cuda"))
    candidate, got = fetched("org/demo@1")
    hub.log.clear()
    again, same = fetched(f"org/demo@{candidate.commit}")
    assert hub.requests() == []
    assert (again.commit, same) == (candidate.commit, got)


def test_a_known_commit_in_the_cache_does_not_even_import_the_client(hub, hub_cache, fetched):
    hub.repo("org/demo").branch("v1", files("torch-cpu"))
    candidate, _ = fetched("org/demo@1")
    code = (
        "import sys, pathlib; from kernelswap.sources.hub import HubSource; from kernelswap.spec import parse\n"
        f"s = HubSource(pathlib.Path({str(hub_cache)!r}), endpoint={hub.url!r})\n"
        f"c, = s.find(parse('org/demo@{candidate.commit}'))[0]; s.read(c, 'metadata.json')\n"
        "print([m for m in sys.modules if m.startswith(('huggingface_hub', 'httpx'))])"
    )
    where = pathlib.Path(kernelswap.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=where)
    assert done.stdout.strip() == "[]"


def test_a_warm_find_of_a_version_costs_the_list_of_names(hub, fetched, source_of):
    hub.repo("org/demo").branch("v1", files("torch-cpu"))
    fetched("org/demo@1")
    hub.log.clear()
    source = source_of()
    for _ in range(3):
        source.find(parse("org/demo@1"))
    assert len(hub.requests()) == 1


def test_names_are_asked_for_again_after_a_while(hub, source_of):
    hub.repo("org/demo").branch("v1", files("torch-cpu"))
    source = source_of(remember=0.0)
    before = source.find(parse("org/demo@1"))[0]
    hub.repo("org/demo").branch("v1", files("torch-cpu", code="x = 2"))
    assert source.find(parse("org/demo@1"))[0] != before


def test_the_listing_of_newer_clients_is_used(hub, hub_cache, source_of):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    commit = hub.repo("org/demo").branch("v1", files("torch-cpu"))
    huggingface_hub.snapshot_download("org/demo", repo_type="kernel", revision="v1", endpoint=hub.url, cache_dir=hub_cache)
    if not (hub_cache / "kernels--org--demo" / "trees").exists():
        pytest.skip("this client writes no trees/")
    hub.log.clear()
    (candidate,) = source_of().find(parse(f"org/demo@{commit}"))[0]
    assert source_of().read(candidate, "__init__.py") == b"x = 1"
    assert hub.requests() == []


def test_a_listing_may_have_several_pages(hub_cache):
    with Hub(page=3) as hub:
        published = files("torch-cpu", "torch-cuda", files={f"d/{i}.json": str(i) for i in range(7)})
        hub.repo("org/demo").branch("v1", published)
        source = HubSource(hub_cache, endpoint=hub.url)
        assert len(source.find(parse("org/demo@1"))[0]) == 2
        assert len(hub.requests("*/tree/*")) > 5


def test_the_next_page_is_not_asked_of_a_stranger(hub, source_of, monkeypatch):
    hub.repo("org/demo").branch("v1", files("torch-cpu"))
    hub.page = 1
    hub.elsewhere = "http://localhost:1"
    with pytest.raises(Unreachable, match="sends us on to http://localhost:1"):
        source_of(token="hf_good").find(parse("org/demo@1"))


# -- the cache that is shared


def test_the_cache_is_the_one_that_other_tools_read(hub, hub_cache, fetched):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    hub.repo("org/demo").branch("v1", files("torch-cpu", files={"kernel.so": BIG}))
    candidate, _ = fetched("org/demo@1")
    hub.stop()
    path = huggingface_hub.hf_hub_download(
        "org/demo", "build/torch-cpu/kernel.so", repo_type="kernel", revision="v1", cache_dir=hub_cache, local_files_only=True
    )
    assert candidate.commit in path
    scanned = huggingface_hub.scan_cache_dir(hub_cache)
    if not scanned.repos:
        pytest.skip("this client's scanner knows no kernels")
    assert scanned.warnings == []
    assert [(r.repo_id, r.repo_type) for r in scanned.repos] == [("org/demo", "kernel")]


def test_what_another_tool_fetched_is_used(hub, hub_cache, source_of):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    hub.repo("org/demo").branch("v1", files("torch-cpu"))
    huggingface_hub.snapshot_download(
        "org/demo", repo_type="kernel", revision="v1", endpoint=hub.url, cache_dir=hub_cache, allow_patterns="build/torch-cpu/*"
    )
    hub.log.clear()
    source = source_of()
    (candidate,) = source.find(parse("org/demo@1"))[0]
    assert source.read(candidate, "__init__.py") == b"x = 1"
    assert not hub.requests("*/resolve/*")


def test_a_find_without_a_fetch_leaves_a_cache_that_is_not_called_corrupt(hub, hub_cache, source_of):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    hub.repo("org/demo").branch("v1", files("torch-cpu"))
    source_of().find(parse("org/demo@1"))
    assert not [w for w in huggingface_hub.scan_cache_dir(hub_cache).warnings if "napshots" in str(w)]


def test_a_cache_that_cannot_be_written_costs_requests_and_nothing_else(hub, source_of, tmp_path):
    hub.repo("org/demo").branch("v1", files("torch-cpu"))
    (tmp_path / "not-a-directory").write_text("")
    source = HubSource(tmp_path / "not-a-directory", endpoint=hub.url)
    assert len(source.find(parse("org/demo@1"))[0]) == 1


# -- offline


@pytest.mark.parametrize("spec", ["org/demo@1", "org/demo", "org/demo@v1", "org/demo@>=1", "org/demo@v1.2.0", "org/demo@>=1.1"])
def test_what_was_fetched_by_name_is_found_offline_by_that_name(hub, source_of, fetched, spec):
    repo = hub.repo("org/demo")
    repo.branch("v1", files("torch-cpu", "torch-cuda"))
    repo.tag("v1.2.0", "v1")
    candidate, got = fetched(spec)
    hub.stop()
    offline = source_of(offline=True)
    again, same = fetched(spec, source=offline)
    assert (again.commit, same) == (candidate.commit, got)
    assert [c.variant for c in offline.find(parse(spec))[0]] == ["torch-cpu"]


def test_offline_works_for_a_branch_that_moved_since(hub, source_of, fetched):
    """The names were listed again, but only the older commit was ever fetched."""
    repo = hub.repo("org/demo")
    repo.branch("v1", files("torch-cpu", code="old = 1"))
    old, _ = fetched("org/demo@1")
    repo.branch("v1", files("torch-cpu", code="new = 1"))
    source_of().find(parse("org/demo@1"))
    (candidate,) = source_of(offline=True).find(parse("org/demo@1"))[0]
    assert candidate.commit == old.commit


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("org/other@1", "it was never fetched into"),
        ("org/demo@2", "the cache has v1 of it"),
        ("org/demo@>=2", "the cache has v1 of it"),
        ("org/demo@" + "f" * 40, "the cache has v1 of it"),
        ("org/demo@dev", "the cache has v1 of it"),
        ("org/demo@refs/pr/1", "the cache has v1 of it"),
    ],
)
def test_offline_says_what_is_here(hub, source_of, fetched, spec, said):
    repo = hub.repo("org/demo")
    for name in ("v1", "v2", "dev"):
        repo.branch(name, files("torch-cpu", code=name + " = 1"))
    fetched("org/demo@1")
    hub.log.clear()
    with pytest.raises(NotCached, match=said) as e:
        source_of(offline=True).find(parse(spec))
    assert "offline" in e.value.asked
    assert isinstance(e.value, FileNotFoundError)
    assert hub.requests() == []


def test_offline_only_whole_builds_are_found(hub, source_of, fetched, hub_cache):
    hub.repo("org/demo").branch("v1", files("torch-cpu", "torch-cuda"))
    fetched("org/demo@1")
    source = source_of()
    cuda = next(c for c in source.find(parse("org/demo@1"))[0] if c.variant == "torch-cuda")
    source.read(cuda, "metadata.json")
    found, notes = source_of(offline=True).find(parse("org/demo@1"))
    assert [c.variant for c in found] == ["torch-cpu"]
    assert "1 more builds are published, but not in the cache" in notes
    with pytest.raises(NotCached):
        source_of(offline=True).read(cuda, "__init__.py")


def test_huggingface_hub_being_offline_is_offline(hub, source_of, fetched, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    hub.repo("org/demo").branch("v1", files("torch-cpu"))
    fetched("org/demo@1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    found, notes = source_of().find(parse("org/demo@1"))
    assert (len(found), len(notes)) == (1, 1)
    with pytest.raises(NotCached, match="HF_HUB_OFFLINE"):
        source_of().find(parse("org/other@1"))
    assert hub.requests() == []


# -- an unreachable hub


@pytest.fixture
def gone(hub, fetched):
    """A hub that was there and is not any more; `org/demo@1` was fetched."""
    hub.repo("org/demo").branch("v1", files("torch-cpu", "torch-cuda"))
    candidate, _ = fetched("org/demo@1")
    hub.stop()
    return candidate


@pytest.mark.parametrize("spec", ["org/demo@1", "org/demo", "org/demo@>=1", "COMMIT"])
def test_an_unreachable_hub_means_use_what_is_here_with_one_note_and_one_warning(gone, source_of, caplog, spec):
    source = source_of()
    spec = spec.replace("COMMIT", f"org/demo@{gone.commit}")
    with caplog.at_level(logging.WARNING, logger="kernelswap"):
        for _ in range(3):
            found, notes = source.find(parse(spec))
            assert [c.commit for c in found] == [gone.commit] * len(found)
            assert len([n for n in notes if "network failure" in n]) == (0 if gone.commit in spec else 1)
    assert len(caplog.records) == (0 if gone.commit in spec else 1)


def test_one_warning_is_enough_however_long_the_hub_is_gone(gone, source_of, caplog, monkeypatch):
    source = source_of()
    clock = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with caplog.at_level(logging.WARNING, logger="kernelswap"):
        for _ in range(3):
            assert "network failure" in source.find(parse("org/demo@1"))[1][0]
            clock[0] += 61
    assert len(caplog.records) == 1


def test_an_unreachable_hub_is_called_a_network_failure(gone, source_of):
    with pytest.raises(Unreachable, match=r"network failure: the hub at http://127.0.0.1:\d+ did not answer") as e:
        source_of().find(parse("org/other@1"))
    assert isinstance(e.value, ConnectionError)
    assert e.value.asked
    assert "check the connection" in e.value.todo


def test_a_build_that_was_not_fetched_loses_alone_when_the_hub_is_gone(gone, source_of):
    """`resolve` passes over NotCached and takes the next build; Unreachable would end it."""
    source = source_of()
    cuda = next(c for c in source.find(parse(f"org/demo@{gone.commit}"))[0] if c.variant == "torch-cuda")
    with pytest.raises(NotCached, match="network failure"):
        source.read(cuda, "metadata.json")


def test_what_is_not_here_is_asked_for_even_if_the_hub_was_silent_just_now(hub, source_of, fetched):
    repo = hub.repo("org/demo")
    repo.branch("v1", files("torch-cpu"))
    fetched("org/demo@1")
    repo.branch("v2", files("torch-cpu"))
    source = source_of()
    hub.fault("*/refs", "status", status=503, times=1)
    assert "answered 503" in source.find(parse("org/demo@1"))[1][0]
    assert len(source.find(parse("org/demo@2"))[0]) == 1


def test_a_version_that_is_not_here_of_a_silent_hub_says_both(gone, source_of):
    with pytest.raises(Unreachable, match=r"network failure.*; the cache has v1 of it"):
        source_of().find(parse("org/demo@2"))


def test_a_file_that_is_not_here_of_a_silent_hub_fails_at_once(gone, source_of, tmp_path):
    source = source_of()
    cuda = next(c for c in source.find(parse(f"org/demo@{gone.commit}"))[0] if c.variant == "torch-cuda")
    before = time.monotonic()
    with pytest.raises(Unreachable, match="network failure"):
        source.fetch(cuda, tmp_path)
    assert time.monotonic() - before < 5


def test_the_hub_is_asked_again_after_a_while(hub, source_of, fetched, monkeypatch):
    hub.repo("org/demo").branch("v1", files("torch-cpu"))
    fetched("org/demo@1")
    source = source_of(remember=60.0)
    hub.fault("*/refs", "status", status=503, times=1)
    assert "answered 503" in source.find(parse("org/demo@1"))[1][0]
    assert "answered 503" in source.find(parse("org/demo@1"))[1][0]
    assert len(hub.requests("*/refs")) == 2  # the first is the fetch's
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert source.find(parse("org/demo@1"))[1] == ()


# -- faults on the way


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_a_hub_in_trouble_is_asked_again(hub, source_of, status):
    hub.repo("org/demo").branch("v1", files("torch-cpu"))
    hub.fault("*/refs", "status", status=status, times=2, retry_after=0)
    assert len(source_of().find(parse("org/demo@1"))[0]) == 1
    assert len(hub.requests("*/refs")) == 3


def test_a_rate_limit_is_called_one_and_its_wait_is_told(hub, source_of):
    hub.repo("org/demo").branch("v1", files("torch-cpu"))
    hub.fault("*/refs", "status", status=429, retry_after=3600)
    with pytest.raises(Unreachable, match=r"limits our requests \(429\), and asks to wait 3600 s"):
        source_of().find(parse("org/demo@1"))
    assert len(hub.requests("*/refs")) == 1


@pytest.mark.parametrize("where", ["*/refs", "*/tree/*"])
def test_a_captive_portal_is_not_taken_for_a_hub(hub, source_of, where):
    hub.repo("org/demo").branch("v1", files("torch-cpu"))
    hub.fault(where, "nonsense")
    with pytest.raises(Unreachable, match="no hub's answer"):
        source_of().find(parse("org/demo@1"))


@pytest.mark.parametrize(
    "value", ["[]", "{}", '{"branches": [{"name": "v1"}]}', '{"branches": [{"name": "v1", "targetCommit": "../x"}]}', "null"]
)
def test_an_answer_of_another_shape_is_not_a_hub(hub, source_of, value):
    hub.repo("org/demo").refs = lambda: json.loads(value)
    with pytest.raises(Unreachable, match="no hub's answer"):
        source_of().find(parse("org/demo@1"))


@pytest.mark.parametrize("kind", ["drop", "corrupt", "truncate"])
def test_a_file_that_arrives_damaged_once_is_fetched_again(hub, fetched, kind):
    published = files("torch-cpu", files={"kernel.so": BIG})
    hub.repo("org/demo").branch("v1", published)
    hub.fault("/lfs/*", kind, times=1, method="GET")
    assert fetched("org/demo@1")[1] == inside("torch-cpu", published)


@pytest.mark.parametrize("path", ["kernel.so", "__init__.py"])
def test_wrong_bytes_of_the_right_length_are_never_handed_on_and_leave_the_cache(hub, hub_cache, source_of, tmp_path, path):
    hub.repo("org/demo").branch("v1", files("torch-cpu", files={"kernel.so": BIG}))
    hub.fault("/lfs/*" if path.endswith(".so") else f"*/{path}", "corrupt")
    source = source_of()
    (candidate,) = source.find(parse("org/demo@1"))[0]
    (tmp_path / "into").mkdir()
    with pytest.raises(Unreachable, match=f"{path} has other bytes than the hub lists, twice"):
        source.fetch(candidate, tmp_path / "into")
    assert path not in on_disk(tmp_path / "into")
    assert not list((hub_cache / "kernels--org--demo" / "snapshots").rglob(path))


def test_damaged_metadata_is_never_read(hub, hub_cache, source_of):
    """It decides which build is chosen, before any verifier sees it."""
    published = files("torch-cpu")
    hub.repo("org/demo").branch("v1", published)
    source = source_of()
    (candidate,) = source.find(parse("org/demo@1"))[0]
    hub.fault("*/metadata.json", "corrupt")
    with pytest.raises(Unreachable, match=r"metadata.json has other bytes than the hub lists, twice"):
        source.read(candidate, "metadata.json")
    hub.clear()
    right = source.read(candidate, "metadata.json")
    assert right == published["build/torch-cpu/metadata.json"]
    (blob,) = (hub_cache / "kernels--org--demo" / "blobs").iterdir()
    blob.write_bytes(right.replace(b"demo", b"omed"))
    assert source.read(candidate, "metadata.json") == right


def test_a_damaged_file_in_the_cache_is_fetched_again(hub, hub_cache, fetched, caplog):
    published = files("torch-cpu", files={"kernel.so": BIG})
    hub.repo("org/demo").branch("v1", published)
    fetched("org/demo@1")
    (blob,) = [p for p in (hub_cache / "kernels--org--demo" / "blobs").iterdir() if p.stat().st_size == len(BIG)]
    blob.write_bytes(BIG[:-1] + b"?")
    assert fetched("org/demo@1")[1] == inside("torch-cpu", published)
    assert "kernel.so of org/demo in the cache has other bytes than the hub lists" in caplog.text


def test_a_half_written_cache_is_completed(hub, hub_cache, fetched):
    published = files("torch-cpu", files={"kernel.so": BIG})
    hub.repo("org/demo").branch("v1", published)
    fetched("org/demo@1")
    for blob in (hub_cache / "kernels--org--demo" / "blobs").iterdir():
        if blob.stat().st_size == len(BIG):
            blob.write_bytes(BIG[:100])
    assert fetched("org/demo@1")[1] == inside("torch-cpu", published)


def test_a_record_that_does_not_parse_is_asked_for_again(hub, hub_cache, fetched):
    hub.repo("org/demo").branch("v1", files("torch-cpu"))
    candidate, got = fetched("org/demo@1")
    for record in (hub_cache / "kernels--org--demo" / ".kernelswap").iterdir():
        record.write_text('{"format": 1, "files": [')
    assert fetched(f"org/demo@{candidate.commit}")[1] == got


def test_a_stale_etag_does_not_hide_the_bytes(hub, fetched):
    published = files("torch-cpu")
    hub.repo("org/demo").branch("v1", published)
    hub.fault("*/__init__.py", "stale-etag", method="HEAD")
    assert fetched("org/demo@1")[1] == inside("torch-cpu", published)


def test_one_etag_for_all_files_never_swaps_their_contents(hub, source_of, tmp_path):
    """A broken mirror: in the shared cache all files are then one blob."""
    published = files("torch-cpu", files={f"{i}.py": f"x = {i}" for i in range(6)})
    hub.repo("org/demo").branch("v1", published)
    hub.fault("*/resolve/*", "stale-etag", method="HEAD")
    source = source_of()
    (candidate,) = source.find(parse("org/demo@1"))[0]
    (tmp_path / "into").mkdir()
    with contextlib.suppress(Unreachable):
        source.fetch(candidate, tmp_path / "into")
    right = inside("torch-cpu", published)
    assert all(data == right[path] for path, data in on_disk(tmp_path / "into").items())


def test_a_file_that_the_hub_lists_and_does_not_have_is_an_error_of_ours(hub, source_of, tmp_path):
    hub.repo("org/demo").branch("v1", files("torch-cpu"))
    hub.fault("*/__init__.py", "missing")
    source = source_of()
    (candidate,) = source.find(parse("org/demo@1"))[0]
    (tmp_path / "into").mkdir()
    with pytest.raises(UnknownKernel, match="has no such file"):
        source.fetch(candidate, tmp_path / "into")


# -- who may see what


def test_a_private_repository_needs_the_token(hub, source_of):
    hub.repo("org/secret", private=True).branch("v1", files("torch-cpu"))
    assert len(source_of(token="hf_good").find(parse("org/secret@1"))[0]) == 1
    with pytest.raises(UnknownKernel, match="no such kernel repository, or not for this account") as e:
        source_of(token="hf_bad").find(parse("org/secret@1"))
    assert "HF_TOKEN" in e.value.todo


def test_a_gated_repository_says_that_its_owner_decides(hub, source_of):
    hub.repo("org/gated", gated=True).branch("v1", files("torch-cpu"))
    with pytest.raises(UnknownKernel, match="grants access one by one"):
        source_of(token="hf_bad").find(parse("org/gated@1"))


def test_a_token_is_not_shown(source_of):
    assert "hf_good" not in repr(source_of(token="hf_good"))


@pytest.mark.parametrize("name", ["demo", "a/b/c", "org/..", "../org", "org--x/y", "org/a b", "org/", "-x/y", "org/demo\n"])
def test_a_name_that_is_none_is_not_asked_for(hub, source_of, name):
    with pytest.raises(UnknownKernel, match="is no repository name"):
        source_of().find(replace(parse("org/demo@1"), name=name))
    assert hub.requests() == []


# -- what a repository may not do


@pytest.mark.parametrize(
    "path", ["build/torch-cpu/../../../evil", "build/torch-cpu/a\\b", "build/torch-cpu/C:x", "build/torch-cpu//x"]
)
def test_a_listing_that_leads_out_of_the_build_is_refused(hub, source_of, tmp_path, path):
    hub.repo("org/demo").branch("v1", {**files("torch-cpu"), path: "evil"})
    source = source_of()
    candidate = next(c for c in source.find(parse("org/demo@1"))[0] if c.variant == "torch-cpu")
    (tmp_path / "a" / "into").mkdir(parents=True)
    with pytest.raises(Refused, match="tell the publisher"):
        source.fetch(candidate, tmp_path / "a" / "into")
    assert on_disk(tmp_path / "a") == {}
    assert not hub.requests("*/resolve/*")


@pytest.mark.parametrize("variant", ["..", "a\\b", "C:", " x"])
def test_a_build_of_a_hostile_name_is_not_a_candidate(hub, source_of, variant):
    hub.repo("org/demo").branch("v1", {**files("torch-cpu"), f"build/{variant}/x.py": "evil"})
    assert [c.variant for c in source_of().find(parse("org/demo@1"))[0]] == ["torch-cpu"]


def test_more_than_any_honest_build_is_refused_before_the_first_byte(hub, source_of, tmp_path, monkeypatch):
    monkeypatch.setattr("kernelswap.sources.hub_files._MAX_BYTES", 100_000)
    hub.repo("org/demo").branch("v1", files("torch-cpu", files={"bomb.so": BIG}))
    source = source_of()
    (candidate,) = source.find(parse("org/demo@1"))[0]
    with pytest.raises(Refused, match="at most 20000 and 100000 are fetched"):
        source.fetch(candidate, tmp_path)
    assert not hub.requests("*/resolve/*")


@pytest.mark.parametrize("listed", [True, False])
def test_a_link_in_the_cache_that_leads_out_is_not_read(hub, hub_cache, fetched, source_of, tmp_path, listed):
    hub.repo("org/demo").branch("v1", files("torch-cpu"))
    candidate, _ = fetched("org/demo@1")
    secret = tmp_path / "secret"
    secret.write_text("x = 1")  # the right bytes: only the place is wrong
    folder = hub_cache / "kernels--org--demo"
    pointer = folder / "snapshots" / candidate.commit / "build" / "torch-cpu" / "__init__.py"
    pointer.unlink()
    pointer.symlink_to(secret)
    if listed:
        with pytest.raises(NotCached):
            source_of(offline=True).read(candidate, "__init__.py")
    else:
        (folder / ".kernelswap" / f"{candidate.commit}.json").unlink()
        assert source_of(offline=True).read(candidate, "__init__.py") is None


# -- redirects


def redirect(name, revision=None):
    return {
        "kernel-status.toml": f'kind = "redirect"\ndestination = "{name}"\n' + (f'revision = "{revision}"\n' if revision else "")
    }


@pytest.mark.parametrize(
    ("where", "revision", "spec", "lands"),
    [
        ("v1", None, "org/old@1", "v1"),
        ("v1", "v2", "org/old@1", "v2"),
        ("main", None, "org/old@1", "v1"),
        ("main", None, "org/old", "v2"),
        ("main", "main", "org/old@main", "main"),
        ("main", None, "org/old@>=1,<2", "v1"),
    ],
)
def test_a_kernel_that_moved_is_followed(hub, source_of, where, revision, spec, lands):
    new = hub.repo("org/new")
    commits = {name: new.branch(name, files("torch-cpu", code=f"{name} = 1")) for name in ("v1", "v2", "main")}
    hub.repo("org/old").branch(where, redirect("org/new", revision))
    (candidate,), notes = source_of().find(parse(spec))
    assert (candidate.name, candidate.commit) == ("org/new", commits[lands])
    assert candidate.requirement == parse(spec)
    assert notes[0].startswith("org/old moved to org/new")


def test_a_redirect_that_was_followed_is_followed_offline(hub, source_of, fetched):
    hub.repo("org/new").branch("v1", files("torch-cpu"))
    hub.repo("org/old").branch("v1", redirect("org/new"))
    candidate, got = fetched("org/old@1")
    hub.stop()
    again, same = fetched("org/old@1", source=source_of(offline=True))
    assert (again, same) == (candidate, got)


def test_redirects_in_a_circle_are_named(hub, source_of):
    for a, b in (("org/a", "org/b"), ("org/b", "org/c"), ("org/c", "org/a")):
        hub.repo(a).branch("v1", redirect(b))
    with pytest.raises(BadMetadata, match="circle: org/a -> org/b -> org/c -> org/a\n"):
        source_of().find(parse("org/a@1"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind = ", "does not parse"),
        ('kind = "gone"', "kind is 'gone'"),
        ('kind = "redirect"', "destination must be org/name"),
        ('kind = "redirect"\ndestination = "../../x"', "destination must be org/name"),
        ('kind = "redirect"\ndestination = "o/n"\nrevision = 3', "revision text"),
    ],
)
def test_a_status_file_that_is_wrong_is_the_publishers_fault(hub, source_of, text, said):
    hub.repo("org/old").branch("v1", {"kernel-status.toml": text})
    with pytest.raises(BadMetadata, match=said) as e:
        source_of().find(parse("org/old@1"))
    assert e.value.fault == "publisher"


def test_a_repository_without_status_costs_no_request_for_one(hub, source_of):
    hub.repo("org/demo").branch("v1", files("torch-cpu"))
    source_of().find(parse("org/demo@1"))
    assert not hub.requests("*kernel-status*")


# -- long work


def test_progress_counts_bytes_and_ends_once(hub, source_of, tmp_path):
    published = files("torch-cpu", files={"kernel.so": BIG})
    hub.repo("org/demo").branch("v1", published)
    seen = []
    source = source_of(progress=lambda *step: seen.append(step))
    (candidate,) = source.find(parse("org/demo@1"))[0]
    source.fetch(candidate, tmp_path)
    total = sum(map(len, inside("torch-cpu", published).values()))
    assert {t for _, _, t in seen} == {total}
    assert [done for _, done, _ in seen].count(total) == 1
    assert seen[-1] == ("fetching org/demo torch-cpu", total, total)
    assert all(0 <= done <= total for _, done, _ in seen)


def test_files_come_several_at_once(hub, source_of, tmp_path):
    hub.repo("org/demo").branch("v1", files("torch-cpu", files={f"{i}.so": BIG + bytes([i]) for i in range(4)}))
    held = hub.fault("*/0.so", "hold", method="HEAD", times=1)
    source = source_of()
    (candidate,) = source.find(parse("org/demo@1"))[0]

    def when_the_others_are_here(step, done, total):
        if done >= 3 * len(BIG):
            held.gate.set()

    object.__setattr__(source, "_files", replace(source._files, progress=when_the_others_are_here))
    source.fetch(candidate, tmp_path)
    assert held.gate.is_set()


def test_nothing_is_drawn(hub, source_of, tmp_path, monkeypatch):
    made = []
    quiet = hub_client._quiet

    def remembering(tick):
        class Remembered(quiet(tick)):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **{**kwargs, "disable": False})
                made.append(self.disable)  # now: closing a bar sets it

        return Remembered

    monkeypatch.setattr(hub_client, "_quiet", remembering)
    hub.repo("org/demo").branch("v1", files("torch-cpu", files={"kernel.so": BIG}))
    source = source_of()
    (candidate,) = source.find(parse("org/demo@1"))[0]
    source.fetch(candidate, tmp_path)
    assert made
    assert all(made)


def test_the_client_says_who_it_is(hub):
    hub.repo("org/demo").branch("v1", {})
    HubClient(hub.url).refs("org/demo")
    assert "kernelswap/" in hub.log[-1][2]["user-agent"]


def test_a_proxy_of_the_environment_is_used(hub):
    hub.repo("org/demo").branch("v1", {})
    code = (
        "from kernelswap.sources.hub_client import HubClient; print(*HubClient('http://hub.invalid').refs('org/demo').branches)"
    )
    environment = {**os.environ, "HTTP_PROXY": hub.url, "http_proxy": hub.url, "NO_PROXY": "", "no_proxy": ""}
    where = pathlib.Path(kernelswap.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=where, env=environment)
    assert done.stdout.split() == ["v1"]


# -- whatever a server or a cache says


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NEARLY = st.fixed_dictionaries(
    {},
    optional={
        "branches": st.lists(st.fixed_dictionaries({"name": JSON, "targetCommit": JSON | st.just("a" * 40)}), max_size=2) | JSON,
        "tags": JSON,
        "sha": JSON,
        "type": st.just("file"),
        "path": st.text(max_size=8) | st.just("build/torch-cpu/x") | JSON,
        "size": JSON,
        "oid": JSON,
        "lfs": JSON,
    },
)


class Answers(HubClient):
    """The client, with the wire replaced by a value."""

    def _api(self, path, asked, tries):
        return VALUE[0], None


VALUE = [None]


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(JSON | NEARLY | st.lists(NEARLY, max_size=3))
@example([{"type": "file", "path": "build/torch-cpu/x", "size": float("inf"), "oid": "a"}])
def test_no_answer_of_a_server_raises_anything_but_our_errors(value):
    VALUE[0] = value
    client = Answers("http://hub.invalid")
    for ask in (lambda: client.refs("o/n"), lambda: client.listing("o/n", "a" * 40), lambda: client.commit_of("o/n", "x")):
        with contextlib.suppress(KernelSwapError):
            ask()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(JSON | st.dictionaries(st.sampled_from(["format", "format_version", "files", "branches", "tags"]), JSON | st.just(1)))
def test_no_record_in_a_cache_raises(tmp_path, value):
    repo = CachedRepo(tmp_path, "o/n")
    for name in (".kernelswap/refs.json", f".kernelswap/{'a' * 40}.json", f"trees/{'a' * 40}.json"):
        file = repo.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    repo.seen_refs()
    repo.known_refs()
    repo.usable_refs()
    listing = repo.listing("a" * 40)
    repo.complete("a" * 40, listing)
