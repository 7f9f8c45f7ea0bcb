"""One file with everything: written where there is a network, used where no socket may be opened."""

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.contract.sources import SourceContract, Subject, on_disk
from tests.hub import kernel_files
from tests.kernel_files import snapshot
from tests.swapping import CPU, Near

from kernelswap import bundling
from kernelswap import machine as machines
from kernelswap.api import Swapper
from kernelswap.bundling import Wanted
from kernelswap.errors import BadMetadata, KernelSwapError, NoVariant, Refused, StoreError, UnknownKernel, Unreachable
from kernelswap.provider import Terms
from kernelswap.sources import bundle_file
from kernelswap.sources.bundle_file import BundleSource
from kernelswap.types import Requirement, Swap

SPEC, NAME = "org/kernel@>=1.0,<2", "org/kernel"
CODE = "VALUE = 1"
FILES = {"data.bin": bytes(range(256)) * 40}


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    """A user without files of their own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def online(hub, hub_cache, tmp_path, monkeypatch):
    """A Swapper that reaches the hub, where org/kernel needs org/below."""
    hub.organization("org", trusted=True)
    needs = {"kernel-depends": [{"repo-id": "org/below", "version": 1}]}
    repo = hub.repo(NAME)
    repo.branch("v1", kernel_files("torch-cpu", CODE, name="kernel", files=FILES, metadata=needs))
    repo.tag("v1.2.0", "v1")
    hub.repo("org/below").branch("v1", kernel_files("torch-cpu", "BELOW = 1", name="below"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub_cache))
    return Swapper(cache=tmp_path / "cache", machine=CPU, prover=Near())


@pytest.fixture
def bundle(online, tmp_path):
    file = tmp_path / "kernels.bundle"
    bundling.write(file, online, Wanted(specs=(SPEC,)), Terms())
    return file


def offline(file, tmp_path, **more):
    return Swapper(cache=tmp_path / "elsewhere", machine=CPU, prover=Near(), bundle=file, **more)


class TestContract(SourceContract):
    @pytest.fixture
    def subject(self, bundle):
        files = kernel_files("torch-cpu", CODE, name="kernel", files=FILES)
        files = {p.removeprefix("build/torch-cpu/"): d for p, d in files.items()}
        source = BundleSource.open(bundle)
        files["metadata.json"] = source.read(source.find(Requirement(NAME, constraints=">=1.0,<2"))[0][0], "metadata.json")
        return Subject(source, Requirement(NAME, constraints=">=1.0,<2"), {"torch-cpu": files}, Requirement("org/none"))


ALONE = """
import pathlib, sys
opened = []
sys.addaudithook(lambda event, args: opened.append((event, args)) if event.startswith("socket.") else None)
from kernelswap.api import Swapper
from kernelswap.types import Machine
swapper = Swapper(cache=pathlib.Path(sys.argv[2]), machine=Machine(os="linux", cpu="x86_64", torch=(2, 13), cxx11=True), bundle=pathlib.Path(sys.argv[1]))
for spec in sys.argv[3:]:
    kernel = swapper.kernel(spec)
    print(kernel.module.VALUE, kernel.artifact.candidate.source, [e.statement for e in kernel.artifact.evidence if e.verifier == "publisher"][0], sep="|")
print([e for e in opened if e[0] != "socket.gethostname"])
"""


def test_another_process_with_empty_caches_and_no_hub_loads_it_and_opens_no_socket(bundle, tmp_path, hub):
    hub.stop()
    specs = [SPEC, NAME, f"{NAME}@v1.2.0"]
    environ = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "none"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, bundle, tmp_path / "new", *specs], env=environ, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [
        *["1|bundle|org is a trusted publisher of the hub (says the bundle)"] * 3,
        "[]",
    ], done.stderr


def test_the_environment_names_a_bundle_for_scripts(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELSWAP_BUNDLE", str(bundle))
    swapper = Swapper(cache=tmp_path / "elsewhere", machine=CPU, prover=Near())
    assert swapper.kernel(SPEC).artifact.candidate.source == "bundle"
    assert swapper.environment.offline


def test_what_is_not_in_it_is_said_with_what_is(bundle, tmp_path):
    with pytest.raises(UnknownKernel, match=r"has no org/other\nit has org/below@1, org/kernel@>=1\.0,<2$"):
        offline(bundle, tmp_path).find("org/other@1")
    with pytest.raises(UnknownKernel, match=r"has .*>=1\.0,<2.*v1.* of org/kernel"):
        offline(bundle, tmp_path).find(f"{NAME}@7")


def test_it_is_there_for_the_machine_named_and_nothing_of_it_runs_here(online, hub, tmp_path, monkeypatch):
    hub.repo("org/gpu").branch(
        "v1",
        {
            **kernel_files("torch212-cxx11-cu130-x86_64-linux", "import nobody_has_this", name="gpu"),
            **kernel_files("torch212-cxx11-cu128-x86_64-linux", "raise SystemExit", name="gpu"),
        },
    )
    machine = "torch=2.12,cuda=13.0,sm=90"
    with pytest.raises(NoVariant):
        bundling.write(tmp_path / "here.bundle", online, Wanted(specs=("org/gpu@1",)), Terms())
    assert not (tmp_path / "here.bundle").exists()
    written = bundling.write(tmp_path / "there.bundle", online, Wanted(specs=("org/gpu@1",), machines=(machine,)), Terms())
    assert [k["variant"] for k in written.about.kernels] == ["torch212-cxx11-cu130-x86_64-linux"]
    there = Swapper(cache=tmp_path / "c", machine=machines.override(CPU, machine), bundle=tmp_path / "there.bundle")
    assert there.artifact("org/gpu@1").path.is_dir()


def test_two_machines_in_one_file(online, hub, tmp_path):
    variants = ("torch212-cxx11-cu130-x86_64-linux", "torch212-cxx11-cu128-x86_64-linux")
    hub.repo("org/gpu").branch("v1", {p: d for v in variants for p, d in kernel_files(v, "x = 1", name="gpu").items()})
    facts = ("torch=2.12,cuda=13.0,sm=90", "torch=2.12,cuda=12.8,sm=90")
    file = tmp_path / "both.bundle"
    bundling.write(file, online, Wanted(specs=("org/gpu@1",), machines=facts), Terms())
    for text, variant in zip(facts, variants, strict=True):
        assert (
            Swapper(machine=machines.override(CPU, text), bundle=file, cache=tmp_path / "c").find("org/gpu@1").chosen.variant
            == variant
        )


def test_the_same_kernels_make_the_same_bytes(online, bundle, tmp_path):
    written = bundling.write(tmp_path / "again.bundle", online, Wanted(specs=(SPEC,)), Terms())
    assert (tmp_path / "again.bundle").read_bytes() == bundle.read_bytes()
    assert written.sha256 == subprocess.run(["sha256sum", bundle], capture_output=True, text=True, check=True).stdout.split()[0]


def test_a_bundle_of_a_bundle(bundle, tmp_path):
    bundling.write(tmp_path / "second.bundle", offline(bundle, tmp_path), Wanted(specs=(SPEC,)), Terms())
    assert Swapper(cache=tmp_path / "third", machine=CPU, bundle=tmp_path / "second.bundle").kernel(SPEC).module.VALUE == 1


def test_what_cannot_be_written_leaves_what_was_there(online, bundle, tmp_path):
    before = bundle.read_bytes()
    with pytest.raises(UnknownKernel):
        bundling.write(bundle, online, Wanted(specs=("org/none@1",)), Terms())
    assert bundle.read_bytes() == before
    with pytest.raises(StoreError, match="cannot be written"):
        bundling.write(tmp_path / "no" / "such" / "x.bundle", online, Wanted(specs=(SPEC,)), Terms())


def test_nothing_to_write_is_an_error(online, tmp_path):
    with pytest.raises(KernelSwapError, match="no kernel would serve it"):
        bundling.write(tmp_path / "x.bundle", online, Wanted(), Terms())


# -- whose word counts


def test_policies_hold_for_what_is_in_a_bundle(bundle, tmp_path):
    policy = tmp_path / "work" / "kernelswap.toml"
    for text, said in {
        "publishers = ['other']": "org is not among the publishers of",
        "sources = ['hub']": "the source bundle is not among those of",
        f"digests = ['{'a' * 64}']": "is not among those of",
        "require_signature = true": "it is not signed",
        "locked_only = true": "no lock names it",
    }.items():
        policy.write_text(f"[policy]\n{text}\n")
        with pytest.raises((Refused, UnknownKernel), match=said):
            offline(bundle, tmp_path).artifact(SPEC)


def test_what_a_bundle_says_of_publishers_is_forgotten_with_it(bundle, tmp_path, monkeypatch):
    assert offline(bundle, tmp_path).kernel(SPEC)
    assert not (tmp_path / "elsewhere" / "publishers").exists()


def test_what_we_know_of_a_publisher_goes_over_what_a_bundle_says(bundle, tmp_path):
    (tmp_path / "elsewhere" / "publishers").mkdir(parents=True)
    (tmp_path / "elsewhere" / "publishers" / "org.json").write_text(
        '{"publisher": "org", "trusted": false, "asked": "2026-01-01"}'
    )
    with pytest.raises(Refused, match="org is not a trusted publisher"):
        offline(bundle, tmp_path).kernel(SPEC)


def test_a_kernel_that_the_call_vouched_for_needs_that_word_again(online, hub, tmp_path):
    hub.organization("org", trusted=False)
    bundling.write(tmp_path / "x.bundle", online, Wanted(specs=(SPEC,)), Terms(trust=True))
    with pytest.raises(Refused, match=r"org is not a trusted publisher of the hub .says the bundle"):
        offline(tmp_path / "x.bundle", tmp_path).load(SPEC)
    assert offline(tmp_path / "x.bundle", tmp_path).load(SPEC, trust=["org"]).VALUE == 1


# -- damaged, and made by somebody else


def rewritten(bundle, to, change):
    """The bundle with `change(name, data) -> {name: data}` applied to each of its files."""
    with zipfile.ZipFile(bundle) as old, zipfile.ZipFile(to, "w") as new:
        for info in old.infolist():
            for name, data in change(info.filename, old.read(info)).items():
                new.writestr(name, data)
    return to


def test_a_changed_byte_anywhere_gives_the_kernel_or_an_error_and_never_other_bytes(bundle, tmp_path):
    whole, rng = bundle.read_bytes(), random.Random(1)
    honest = offline(bundle, tmp_path / "honest").artifact(SPEC)
    digests = {honest.digest, honest.depends[0].digest}
    for number in range(60):
        at = rng.randrange(len(whole))
        bad = tmp_path / "bad.bundle"
        bad.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
        cache = tmp_path / f"cache{number}"
        try:
            found = Swapper(cache=cache, machine=CPU, prover=Near(), bundle=bad).artifact(SPEC)
        except KernelSwapError:
            assert {p.split("/")[1] for p in snapshot(cache) if p.startswith("artifacts/")} <= digests
        else:
            assert (found.digest, on_disk(found.path)) == (honest.digest, on_disk(honest.path))


@pytest.mark.parametrize("length", [0, 10, 1000, -1, -30])
def test_a_truncated_file_is_no_bundle(bundle, tmp_path, length):
    bad = tmp_path / "bad.bundle"
    bad.write_bytes(bundle.read_bytes()[:length])
    with pytest.raises(BadMetadata, match="no whole bundle"):
        offline(bad, tmp_path)


def test_a_file_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(UnknownKernel, match="there is no file"):
        offline(tmp_path / "none.bundle", tmp_path)


def test_changed_code_with_honest_listings_is_refused(bundle, tmp_path):
    evil = lambda name, data: {name: b"import builtins" if name.endswith("/__init__.py") else data}  # noqa: E731
    bad = rewritten(bundle, tmp_path / "bad.bundle", evil)
    with pytest.raises(Refused, match=r"__init__\.py is not what the bundle"):
        offline(bad, tmp_path).artifact(SPEC)
    assert not [p for p in snapshot(tmp_path / "elsewhere") if p.startswith("artifacts/")]


def test_changed_code_with_a_changed_listing_meets_the_digests_of_the_build(bundle, tmp_path):
    import hashlib

    code = b"VALUE = 666"

    def evil(name, data):
        if name.endswith("/__init__.py"):
            return {name: code}
        if name.startswith("org/") and name.endswith(".json") and "build" not in name and "refs" not in name:
            value = json.loads(data)
            for path in value["files"]:
                if path.endswith("/__init__.py"):
                    value["files"][path] = [len(code), hashlib.sha256(code).hexdigest()]
            return {name: json.dumps(value)}
        return {name: data}

    with pytest.raises(Refused, match=r"__init__\.py"):
        offline(rewritten(bundle, tmp_path / "bad.bundle", evil), tmp_path).artifact(SPEC)


def test_names_that_lead_out_of_it_lead_nowhere(bundle, tmp_path):
    def evil(name, data):
        if name.endswith(".json") and "/build/" not in name and name.startswith("org/kernel/") and "refs" not in name:
            value = json.loads(data)
            value["files"]["build/torch-cpu/../../../../../outside.py"] = [1, "a" * 64]
            return {name: json.dumps(value), "org/kernel/../../outside.py": "x"}
        return {name: data}

    with pytest.raises(KernelSwapError):
        offline(rewritten(bundle, tmp_path / "bad.bundle", evil), tmp_path).artifact(SPEC)
    assert not list(tmp_path.rglob("outside.py"))


def test_one_name_twice_is_refused(bundle, tmp_path):
    twice = lambda name, data: {name: data, name.upper(): data}  # noqa: E731
    with pytest.raises(BadMetadata, match="a name twice"):
        offline(rewritten(bundle, tmp_path / "bad.bundle", twice), tmp_path)


def test_a_bomb_is_not_unpacked(bundle, tmp_path):
    bad = tmp_path / "bad.bundle"
    with zipfile.ZipFile(bundle) as old, zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            huge = info.filename.endswith("data.bin") or info.filename == "bundle.json"
            new.writestr(info.filename, b"\0" * (200 << 20) if huge else old.read(info))
    with pytest.raises(BadMetadata, match=r"bundle\.json has 209715200 bytes"):
        offline(bad, tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "not of format 1"),
        ({"publishers": {"org": "yes"}}, "publishers is not what it should be"),
        ({"publishers": {"../org": True}}, "publishers is not"),
        ({"kernels": [{}]}, "kernels is not"),
        ({"compiled": {"layers": 1}}, "compiled is not"),
        ({"more": 1}, "more. is unknown"),
        ({"machines": "here"}, "machines is not"),
    ],
)
def test_what_bundle_json_may_not_say(bundle, tmp_path, change, said):
    edit = lambda name, data: {name: json.dumps({**json.loads(data), **change}) if name == "bundle.json" else data}  # noqa: E731
    with pytest.raises(BadMetadata, match=said):
        offline(rewritten(bundle, tmp_path / "bad.bundle", edit), tmp_path)


@given(st.dictionaries(st.sampled_from([*bundle_file._KEYS, "format"]), st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)))  # fmt: skip
def test_any_json_is_read_or_refused(value):
    try:
        bundle_file.parse(json.dumps({"format": 1, "version": "1", **value}).encode())
    except BadMetadata as e:
        assert e.reason  # noqa: PT017  # refusing is one of two right answers


def test_a_bundle_without_network_says_network_nowhere(bundle, tmp_path):
    with pytest.raises(KernelSwapError) as e:
        offline(bundle, tmp_path).find("org/other@1")
    assert not isinstance(e.value, Unreachable)


# -- a model: what was compiled and proved here serves there, without a compiler and without a proof


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(x)


def test_what_was_compiled_and_proved_serves_where_there_is_no_compiler(layers_build, tmp_path, monkeypatch):
    def swapper(name, **more):
        return Swapper(cache=tmp_path / name, machine=machines.for_backend(machines.look(), "cpu"), offline=True, **more)

    here = swapper("here")
    shutil.copytree(layers_build, here.bundled.compiled("layers") / "build" / layers_build.name)
    model, x = Model().eval(), torch.randn(7, 64)
    file = tmp_path / "model.bundle"
    wanted = Wanted(model=model, name="model", exercise=lambda: model(x))
    written = bundling.write(file, here, wanted, Terms())
    assert written.about.compiled.keys() == {"layers"}
    assert len(written.about.verdicts["verdicts"]) >= 2
    assert type(model.norm) is torch.nn.LayerNorm

    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("PATH", "")
    (kept,) = swapper("without").plan(model)
    assert not isinstance(kept, Swap)
    there = swapper("there", bundle=file)
    (swap,) = there.plan(model)
    assert swap.inference.implementation.origin.candidate.source == "bundle"
    with there.swap(model):
        model(x)
    made = [json.loads(p.read_text())["verdict"]["reason"] for p in (tmp_path / "there" / "verdicts").glob("*/*.json")]
    assert set(made) <= {"was imported in a child process"}  # nothing had to be proved again

    (tmp_path / "work" / "kernelswap.toml").write_text("[policy]\nno_native_code = true\n")
    (kept,) = swapper("strict", bundle=file).plan(model)
    assert "allows no native code" in kept.reason


def test_builds_of_other_sources_than_the_installed_ones_are_not_seen(layers_build, tmp_path):
    here = Swapper(cache=tmp_path / "here", machine=machines.for_backend(machines.look(), "cpu"), offline=True)
    shutil.copytree(layers_build, here.bundled.compiled("layers") / "build" / layers_build.name)
    file = tmp_path / "x.bundle"
    bundling.write(file, here, Wanted(specs=("kernelswap/layers",)), Terms())
    other = lambda name, data: {name: data.replace(b'"compiled": {\n  "layers": "', b'"compiled": {\n  "layers": "0')}  # noqa: E731
    there = Swapper(cache=tmp_path / "there", machine=here.machine, bundle=rewritten(file, tmp_path / "y.bundle", other))
    assert {c.source for c in there.sources["bundled"].find(Requirement("layers", source="bundled"))[0]} == {"bundled"}
    again = Swapper(cache=tmp_path / "there", machine=here.machine, bundle=file)
    assert {c.source for c in again.sources["bundled"].find(Requirement("layers", source="bundled"))[0]} == {"bundled", "bundle"}
