import json
import socket
import sys

import pytest
from tests.kernel_files import Folder, candidate, metadata_of, snapshot, write

from kernelswap.errors import MissingDependency, Refused
from kernelswap.policy import KERNELS_COMMUNITY, Policy, Signer
from kernelswap.store import Store
from kernelswap.verifiers.signature import SignatureVerifier, _production

pytest.importorskip("sigstore")
from tests.sigstore_instance import Sigstore  # needs what the line above looks for

ASKS = Policy(require_signature=True, origins=(("require_signature", "kernelswap.toml"),))
ME = {"issuer": KERNELS_COMMUNITY.issuer, "repository": KERNELS_COMMUNITY.repository, "workflow": KERNELS_COMMUNITY.workflows[0]}


@pytest.fixture(scope="module")
def sigstore():
    return Sigstore()


@pytest.fixture
def build(tmp_path):
    return write(tmp_path / "repo")


def signed(sigstore, build, **identity):
    (build / "metadata.json.sigstore").write_text(sigstore.bundle((build / "metadata.json").read_bytes(), **{**ME, **identity}))
    return build


def check(sigstore, build, policy=ASKS, source="hub"):
    return SignatureVerifier(policy, sigstore.verifier).check(candidate(source=source), metadata_of(build), build).statement


def test_a_build_signed_by_the_communitys_workflow_is_accepted_offline(sigstore, build, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail(f"connected to {args[1:]}"))
    assert "is signed by a workflow of https://github.com/huggingface/kernels-community" in check(
        sigstore, signed(sigstore, build)
    )


@pytest.mark.parametrize("workflow", KERNELS_COMMUNITY.workflows)
def test_each_of_its_workflows_may_sign(sigstore, build, workflow):
    check(sigstore, signed(sigstore, build, workflow=workflow))


@pytest.mark.parametrize(
    "identity",
    [
        {"issuer": "https://accounts.example.com", "issuer_v2": ME["issuer"]},
        {"issuer_v2": "https://accounts.example.com"},
        {"repository": "https://github.com/somebody/kernels-community"},
        {"workflow": "https://github.com/huggingface/kernels-community/.github/workflows/build.yaml@refs/heads/evil"},
        {"workflow": "https://github.com/somebody/fork/.github/workflows/build.yaml@refs/heads/main"},
    ],
)
def test_another_identity_is_refused(sigstore, build, identity):
    with pytest.raises(Refused, match=r"the signature of metadata\.json is not accepted"):
        check(sigstore, signed(sigstore, build, **identity))


def test_a_policy_names_its_own_signers(sigstore, build):
    mine = Signer("https://issuer.test", "https://git.test/me", ("https://git.test/me/ci@main",))
    build = signed(sigstore, build, issuer=mine.issuer, repository=mine.repository, workflow=mine.workflows[0])
    with pytest.raises(Refused):
        check(sigstore, build)
    policy = Policy(require_signature=True, signers=(KERNELS_COMMUNITY, mine))
    assert "git.test/me" in check(sigstore, build, policy)


def test_a_signature_over_other_metadata_is_refused(sigstore, build):
    signed(sigstore, build)
    about = json.loads((build / "metadata.json").read_text())
    (build / "metadata.json").write_text(json.dumps({**about, "version": 2}))
    with pytest.raises(Refused, match="is not accepted"):
        check(sigstore, build)


def test_another_authority_is_refused(sigstore, build):
    with pytest.raises(Refused, match="is not accepted"):
        check(Sigstore(), signed(sigstore, build))


@pytest.mark.parametrize("part", ["inclusionProof", "inclusionPromise", "canonicalizedBody", "signature"])
def test_a_forged_part_is_refused(sigstore, build, part):
    signed(sigstore, build)
    bundle = json.loads((build / "metadata.json.sigstore").read_text())
    other = json.loads(sigstore.bundle(b"something else", **ME))
    if part == "signature":
        bundle["messageSignature"] = other["messageSignature"]
    else:
        bundle["verificationMaterial"]["tlogEntries"][0][part] = other["verificationMaterial"]["tlogEntries"][0][part]
    (build / "metadata.json.sigstore").write_text(json.dumps(bundle))
    with pytest.raises(Refused, match="is not accepted"):
        check(sigstore, build)


def test_unsigned_is_refused_when_asked_for_and_fine_when_not(sigstore, build):
    with pytest.raises(Refused, match=r"it is not signed .* kernelswap\.toml requires signatures"):
        check(sigstore, build)
    assert check(sigstore, build, Policy()) == "not asked for"
    assert check(sigstore, build, source="bundled") == "comes with this package"


def test_a_signature_that_covers_no_file_is_refused(sigstore, tmp_path):
    build = signed(sigstore, write(tmp_path / "old", digest=False))
    with pytest.raises(Refused, match="covers no other file"):
        check(sigstore, build)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "{", '{"mediaType": 1}', "[" * 50_000])
def test_what_is_no_bundle_is_refused(sigstore, build, text):
    (build / "metadata.json.sigstore").write_text(text)
    with pytest.raises(Refused, match=r"metadata\.json\.sigstore is"):
        check(sigstore, build)


def test_a_bundle_beyond_any_size_is_not_parsed(sigstore, build):
    bundle = signed(sigstore, build) / "metadata.json.sigstore"
    bundle.write_text(bundle.read_text() + " " * (2 << 20))
    with pytest.raises(Refused, match="is larger than 1048576 bytes"):
        check(sigstore, build)


def test_without_the_package_the_message_says_what_to_install(sigstore, build, monkeypatch):
    monkeypatch.setitem(sys.modules, "sigstore.models", None)
    with pytest.raises(MissingDependency, match=r"pip install 'kernelswap\[sign\]'"):
        check(sigstore, build)
    assert check(sigstore, build, Policy()) == "not asked for"


def test_the_public_root_comes_with_the_package_and_leaves_the_home_alone(sigstore, build, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(home))
    _production.cache_clear()
    verifier = SignatureVerifier(ASKS)
    with pytest.raises(Refused, match="is not accepted"):  # our authority is not the public one
        verifier.check(candidate(source="hub"), metadata_of(build), signed(sigstore, build))
    assert list(home.iterdir()) == []


def test_a_signed_kernel_goes_through_the_store_and_an_unsigned_one_leaves_nothing(sigstore, build, tmp_path):
    verifier = SignatureVerifier(ASKS, sigstore.verifier)
    store = Store(tmp_path / "cache")
    with pytest.raises(Refused):
        store.materialize(candidate(source="hub"), metadata_of(build), Folder(build), [verifier])
    assert snapshot(store.cache) == {}
    artifact = store.materialize(candidate(source="hub"), metadata_of(build), Folder(signed(sigstore, build)), [verifier])
    assert any(e.verifier == "signature" for e in artifact.evidence)
