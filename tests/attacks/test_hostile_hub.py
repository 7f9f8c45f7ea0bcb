"""A publisher, a mirror or something between here and the hub answers what nobody should."""

import contextlib
import json
import time

import pytest
from tests.hub import kernel_files
from tests.kernel_files import snapshot
from tests.swapping import CPU, Near

from kernelswap.api import Swapper
from kernelswap.errors import BadMetadata, KernelSwapError, NoVariant, Refused, SpecError, UnknownKernel, Unreachable
from kernelswap.sources.hub import HubSource
from kernelswap.spec import parse
from kernelswap.verifiers.policy import PolicyVerifier

EVIL = "import builtins\nbuiltins.attacked = True\n"


@pytest.fixture
def client(hub, tmp_path):
    """What the hub's client imports at its first request is imported, so that no attack is blamed for it."""
    hub.repo("org/first").branch("v1", kernel_files("torch-cpu", "", name="first"))
    source = HubSource(tmp_path / "first", hub.url, backoff=0.0)
    (candidate,) = source.find(parse("org/first@1"))[0]
    (tmp_path / "into").mkdir()
    source.fetch(candidate, tmp_path / "into")
    hub.fault("*", "loop")
    for ask in (
        lambda: source.read(candidate, "metadata.json"),
        lambda: HubSource(tmp_path / "b", hub.url).find(parse("org/x@1")),
    ):
        with contextlib.suppress(Unreachable):
            ask()
    hub.clear()


@pytest.fixture
def make(hub, hub_cache, world, client):
    hub.organization("org", trusted=True)

    def swapper():
        source = HubSource(hub_cache, hub.url, backoff=0.02)
        return Swapper(sources={"hub": source}, verifiers=[PolicyVerifier()], cache=world.store.cache, machine=CPU, prover=Near())

    return swapper


@pytest.fixture
def publish(hub):
    def at(name, *, branch="v1", code=EVIL, depends=(), **more):
        about = {"kernel-depends": [{"repo-id": n, "version": v} for n, v in depends]} if depends else {}
        files = kernel_files("torch-cpu", code, name=name.partition("/")[2], metadata=about, **more)
        return hub.repo(name).branch(branch, files)

    return at


# -- redirects


def test_an_http_redirect_loop_ends(hub, make, publish, refused):
    publish("org/kernel")
    hub.fault("/api/*", "loop")
    began = time.monotonic()
    refused(Unreachable, "network failure", lambda: make().load("org/kernel@1"))
    assert time.monotonic() - began < 60


def test_a_file_that_redirects_in_a_loop_ends(hub, make, publish, refused):
    publish("org/kernel")
    swapper = make()
    hub.fault("*/resolve/*", "loop")
    refused(Unreachable, "network failure", lambda: swapper.load("org/kernel@1"))


def test_repositories_that_redirect_to_each_other_are_named(hub, make, refused):
    for name, other in (("org/ka", "org/kb"), ("org/kb", "org/ka")):
        hub.repo(name).branch("v1", {"kernel-status.toml": f'kind = "redirect"\ndestination = "{other}"\n'})
    refused(BadMetadata, "org/ka -> org/kb -> org/ka", lambda: make().load("org/ka@1"))


def test_a_redirect_does_not_lend_its_trust(hub, hub_cache, world, publish, refused):
    publish("stranger/evil")
    hub.organization("stranger", trusted=False)
    hub.organization("org", trusted=True)
    hub.repo("org/kernel").branch("v1", {"kernel-status.toml": 'kind = "redirect"\ndestination = "stranger/evil"\n'})
    from kernelswap.sources.hub_client import HubClient
    from kernelswap.verifiers.publisher import Publishers, PublisherVerifier

    publishers = Publishers(world.root / "publishers", HubClient(hub.url).trusts)
    source = HubSource(hub_cache, hub.url)
    verifiers = [PolicyVerifier(), PublisherVerifier(publishers)]
    swapper = Swapper(sources={"hub": source}, verifiers=verifiers, cache=world.store.cache, machine=CPU, prover=Near())
    refused(Refused, "stranger is not a trusted publisher", lambda: swapper.load("org/kernel@1"))


def test_a_status_file_that_nests_to_break_a_reader_is_refused(hub, make, refused):
    hub.repo("org/kernel").branch("v1", {"kernel-status.toml": "a = " + "[" * 50_000})
    refused(BadMetadata, "does not parse", lambda: make().load("org/kernel@1"))


# -- sizes


def test_metadata_of_a_gigabyte_is_refused_before_a_byte_of_it_comes(hub, make, publish, refused):
    publish("org/kernel")
    repo = hub.repo("org/kernel")
    real = repo.tree

    def tree(*args, **more):
        return [{**e, "size": 1 << 30} if e["path"].endswith("metadata.json") else e for e in real(*args, **more)]

    repo.tree = tree
    refused(KernelSwapError, "1073741824 bytes", lambda: make().load("org/kernel@1"))
    assert not hub.requests("*/metadata.json")


def test_metadata_with_one_huge_string_is_refused(hub, make, publish, refused):
    files = kernel_files("torch-cpu", EVIL, name="kernel")
    about = json.loads(files["build/torch-cpu/metadata.json"])
    files["build/torch-cpu/metadata.json"] = json.dumps({**about, "upstream": "https://" + "a" * (3 << 20)}).encode()
    hub.repo("org/kernel").branch("v1", files)
    error = refused(KernelSwapError, "metadata", lambda: make().load("org/kernel@1"))
    assert len(str(error)) < 4000


@pytest.mark.parametrize(
    "body", ["[" * 200_000, '{"a":' * 50_000, '{"branches": "' + "a" * (1 << 20) + '"}', "NaN", "9" * 10_000]
)
def test_an_answer_that_breaks_readers_is_no_answer(hub, make, publish, refused, body, monkeypatch):
    from starlette.responses import Response

    publish("org/kernel")
    monkeypatch.setattr(type(hub), "_api", lambda *_: Response(body, media_type="application/json"))
    refused(Unreachable, "no hub's answer", lambda: make().load("org/kernel@1"))


# -- dependencies


def test_kernels_that_need_each_other_are_named_and_nothing_runs(publish, make, refused):
    publish("org/ka", depends=[("org/kb", 1)])
    publish("org/kb", depends=[("org/kc", 1)])
    publish("org/kc", depends=[("org/ka", 1)])
    refused(BadMetadata, r"org/ka.* -> org/kb.* -> org/kc.* -> org/ka", lambda: make().load("org/ka@1"))


def test_a_kernel_that_needs_itself(publish, make, refused):
    publish("org/ka", depends=[("org/ka", 1)])
    refused(BadMetadata, r"org/ka.* -> org/ka", lambda: make().load("org/ka@1"))


def test_a_chain_of_ever_new_kernels_ends(publish, make, refused):
    for n in range(40):
        publish(f"org/k{n}", depends=[(f"org/k{n + 1}", 1)])
    refused(BadMetadata, "deep|16", lambda: make().load("org/k0@1"))


def test_a_diamond_with_two_versions_gives_each_its_own(publish, make):
    publish("org/base", code="VALUE = 1", unique="1111111")
    publish("org/base", branch="v2", code="VALUE = 2", version=2, unique="2222222")
    code = "from kernelswap import loader\nVALUE = loader.dependency('org/base').VALUE\n"
    publish("org/left", code=code, depends=[("org/base", 1)])
    publish("org/right", code=code, depends=[("org/base", 2)])
    top = "from kernelswap import loader\nBOTH = [loader.dependency(n).VALUE for n in ('org/left', 'org/right')]\n"
    publish("org/top", code=top, depends=[("org/left", 1), ("org/right", 1)])
    assert make().load("org/top@1").BOTH == [1, 2]


def test_a_dependency_that_is_not_on_the_hub_names_a_hub_repository_and_nothing_else(hub, make, refused):
    for value in ("../../etc", "dir:///etc", "https://evil/x", "org/x; rm -rf /", "kernelswap/../layers"):
        files = kernel_files("torch-cpu", EVIL, name="kernel", metadata={"kernel-depends": [{"repo-id": value, "version": 1}]})
        hub.repo("org/kernel").branch("v1", files)
        refused(KernelSwapError, ".", lambda: make().load("org/kernel@1"))


# -- spec strings


SPECS = [
    "$(touch pwned)/x",
    "`touch pwned`/x@1",
    "org/x; touch pwned",
    "org/x|touch pwned",
    "org/x && touch pwned",
    "org/../../etc/passwd",
    "../org/x",
    "/etc/passwd@1",
    "org/x@../../v1",
    "org/x@v1;touch pwned",
    "org/x@$(touch pwned)",
    "org/x?revision=v2",
    "org/x#v2",
    "org/x%2f..%2fy",
    "org%2fx@1",
    "https://evil.example/org/x@1",
    "http://user:secret@evil.example/x",
    "file:///etc/passwd",
    "javascript://alert",
    "ftp://evil/x",
    "hub://https://evil/x",
    "hub:////etc/passwd",
    "org/x@\n1",
    "org/x\0@1",
    "org/x@1\r\nHost: evil",
    "-rf/--x",
    "--upload-pack=evil/x",
    "org/x@--option",
    "org\\x@1",
    "\uff4f\uff52\uff47/x@1",
    "org/\u202ex@1",
    "org/x@>=1.0; touch pwned",
    "a" * 100_000 + "/x",
    "org/" + "x" * 100_000,
    "org/x@" + ">=1," * 10_000,
]


@pytest.mark.parametrize("text", SPECS, ids=[f"{i}" for i in range(len(SPECS))])
def test_a_spec_with_tricks_is_refused_or_asked_for_by_its_very_letters(hub, make, publish, refused, text, tmp_path, monkeypatch):
    publish("org/x")
    publish("evil/x")
    monkeypatch.chdir(tmp_path)
    hub.log.clear()
    error = refused((SpecError, UnknownKernel, NoVariant, Unreachable), ".", lambda: make().load(text))
    assert len(str(error)) < 400_000
    assert not list(tmp_path.rglob("pwned"))
    assert all(path.startswith("/api/kernels/") and ".." not in path and "evil" not in path for _, path in hub.requests())


def test_nothing_of_a_refused_kernel_is_in_the_store(publish, make, world):
    publish("org/ka", depends=[("org/ka", 1)])
    with pytest.raises(BadMetadata):
        make().load("org/ka@1")
    assert not [p for p in snapshot(world.store.cache) if p.startswith("artifacts/")]
