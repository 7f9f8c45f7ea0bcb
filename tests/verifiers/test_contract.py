"""Every verifier keeps what tests/contract/verifiers.py says."""

import pytest
from tests.contract.verifiers import VerifierContract
from tests.kernel_files import candidate, write

from kernelswap.policy import KERNELS_COMMUNITY, Policy
from kernelswap.verifiers.contents import ContentsVerifier
from kernelswap.verifiers.digest import DigestVerifier
from kernelswap.verifiers.policy import PolicyVerifier
from kernelswap.verifiers.publisher import Publishers, PublisherVerifier
from kernelswap.verifiers.signature import SignatureVerifier


@pytest.fixture
def good(tmp_path):
    return candidate("good/kernel", source="hub"), write(tmp_path / "good")


@pytest.fixture(scope="module")
def sigstore():
    pytest.importorskip("sigstore")
    from tests.sigstore_instance import Sigstore

    return Sigstore()


class TestContents(VerifierContract):
    @pytest.fixture
    def verifier(self):
        return ContentsVerifier()

    @pytest.fixture
    def bad(self, tmp_path):
        return candidate("bad/kernel"), write(tmp_path / "bad", {"__init__.py": "", "a.pyc": "x"})


class TestDigest(VerifierContract):
    @pytest.fixture
    def verifier(self):
        return DigestVerifier()

    @pytest.fixture
    def bad(self, tmp_path):
        build = write(tmp_path / "bad")
        (build / "layers.py").write_text("V = 2\n")
        return candidate("bad/kernel"), build


class TestPolicy(VerifierContract):
    @pytest.fixture
    def verifier(self):
        return PolicyVerifier(Policy(no_native_code=True, require_digest=True))

    @pytest.fixture
    def bad(self, tmp_path):
        return candidate("bad/kernel", source="hub"), write(tmp_path / "bad", {"__init__.py": "", "k.so": "x"}, digest=False)


class TestPublisher(VerifierContract):
    @pytest.fixture
    def verifier(self, tmp_path):
        verifier = PublisherVerifier(Publishers(tmp_path / "memory", lambda publisher: publisher == "good"))
        verifier.publishers.trusted("good", afresh=True)
        return verifier

    @pytest.fixture
    def bad(self, tmp_path):
        return candidate("bad/kernel", source="hub"), write(tmp_path / "bad")


class TestSignature(VerifierContract):
    @pytest.fixture
    def verifier(self, sigstore):
        return SignatureVerifier(Policy(require_signature=True), sigstore.verifier)

    @pytest.fixture
    def good(self, sigstore, tmp_path):
        signer = KERNELS_COMMUNITY
        build = write(tmp_path / "good")
        data = (build / "metadata.json").read_bytes()
        bundle = sigstore.bundle(data, issuer=signer.issuer, repository=signer.repository, workflow=signer.workflows[0])
        (build / "metadata.json.sigstore").write_text(bundle)
        return candidate("good/kernel", source="hub"), build

    @pytest.fixture
    def bad(self, tmp_path):
        return candidate("bad/kernel", source="hub"), write(tmp_path / "bad")
