"""What every Verifier promises. Inherit `VerifierContract`, give it the fixtures `verifier`, `good` and `bad`."""

import re
import threading
from dataclasses import FrozenInstanceError, fields

import pytest
from tests.kernel_files import metadata_of, snapshot

from kernelswap.errors import KernelSwapError, Refused
from kernelswap.types import Evidence

# What an error must not talk anybody into.
LOWERS_THE_GUARD = re.compile(r"trust_remote_code|trust=True|allow_all|disable|skip|ignore|--no-|set .*= *false", re.IGNORECASE)


class VerifierContract:
    """`good` and `bad` are `(candidate, build directory)`; the verifier accepts the one and refuses the other."""

    def check(self, verifier, case):
        named, build = case
        return verifier.check(named, metadata_of(build), build)

    def refusal(self, verifier, case):
        with pytest.raises(Refused) as e:
            self.check(verifier, case)
        return e.value

    def test_it_says_what_it_saw(self, verifier, good):
        evidence = self.check(verifier, good)
        assert isinstance(evidence, Evidence)
        assert evidence.verifier == type(verifier).__name__.removesuffix("Verifier").lower()
        assert evidence.statement
        assert evidence.statement.isprintable()

    def test_it_says_the_same_again(self, verifier, good, bad):
        self.check(verifier, good)
        assert self.check(verifier, good) == self.check(verifier, good)
        assert str(self.refusal(verifier, bad)) == str(self.refusal(verifier, bad))

    def test_it_changes_nothing(self, verifier, good, bad):
        before = snapshot(good[1]), snapshot(bad[1])
        self.check(verifier, good)
        self.refusal(verifier, bad)
        assert (snapshot(good[1]), snapshot(bad[1])) == before

    def test_a_refusal_gives_reasons_and_no_bad_advice(self, verifier, bad):
        error = self.refusal(verifier, bad)
        assert error.reason
        assert not LOWERS_THE_GUARD.search(str(error))

    def test_what_it_refuses_before_the_fetch_it_also_refuses_after(self, verifier, good, bad):
        precheck = getattr(verifier, "precheck", None)
        if precheck is None:
            return
        precheck(good[0], metadata_of(good[1]))
        try:
            precheck(bad[0], metadata_of(bad[1]))
        except KernelSwapError:
            self.refusal(verifier, bad)

    def test_it_is_a_value(self, verifier):
        assert fields(verifier) is not None
        with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
            verifier.anything = 1

    def test_threads_share_it(self, verifier, good):
        said = []
        threads = [threading.Thread(target=lambda: said.append(self.check(verifier, good))) for _ in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(said) == 8
        assert len(set(said)) == 1
