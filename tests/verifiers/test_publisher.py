import pytest
from tests.kernel_files import candidate

from kernelswap.errors import Refused, Unreachable
from kernelswap.policy import Policy
from kernelswap.types import Metadata
from kernelswap.verifiers.publisher import Publishers, PublisherVerifier

ABOUT = Metadata("my-norm", "_my_norm", 1, "MIT", "cpu")


class Hub:
    def __init__(self, **trusted):
        self.trusted, self.asked, self.up = trusted, [], True

    def __call__(self, publisher):
        self.asked.append(publisher)
        if not self.up:
            raise Unreachable("the hub did not answer within 10 s")
        return self.trusted.get(publisher, False)


@pytest.fixture
def hub():
    return Hub(good=True, bad=False)


def verifier(tmp_path, hub, **kwargs):
    return PublisherVerifier(Publishers(tmp_path / "publishers", hub), **kwargs)


def check(v, name, source="hub"):
    return v.check(candidate(name, source=source), ABOUT, None).statement


def test_the_hub_says_who_is_trusted(tmp_path, hub):
    v = verifier(tmp_path, hub)
    assert check(v, "good/kernel") == "good is a trusted publisher of the hub (asked now)"
    with pytest.raises(Refused, match=r"bad is not a trusted publisher of the hub \(asked now\)") as refused:
        check(v, "bad/kernel")
    assert refused.value.todo == "nothing of it was loaded; name a kernel whose publisher is trusted", (
        "no way round it is advised"
    )


def test_a_yes_is_remembered_for_this_machine_and_asked_afresh_before_a_fetch(tmp_path, hub):
    verifier(tmp_path, hub).precheck(candidate("good/kernel", source="hub"), ABOUT)
    assert "remembered from 20" in check(verifier(tmp_path, hub), "good/other")
    assert hub.asked == ["good"]
    verifier(tmp_path, hub).precheck(candidate("good/kernel", source="hub"), ABOUT)
    assert hub.asked == ["good", "good"]


def test_a_no_is_asked_again(tmp_path, hub):
    with pytest.raises(Refused):
        check(verifier(tmp_path, hub), "bad/kernel")
    hub.trusted["bad"] = True
    assert "asked now" in check(verifier(tmp_path, hub), "bad/kernel")


@pytest.mark.parametrize("offline", [True, False], ids=["told to be offline", "hub is down"])
def test_without_a_network_the_decision_is_the_one_of_then(tmp_path, hub, offline):
    check(verifier(tmp_path, hub), "good/kernel")
    with pytest.raises(Refused):
        check(verifier(tmp_path, hub), "bad/kernel")
    hub.up = False
    later = verifier(tmp_path, None if offline else hub)
    assert "remembered" in check(later, "good/kernel")
    later.precheck(candidate("good/kernel", source="hub"), ABOUT)
    with pytest.raises(Refused, match="bad is not a trusted publisher"):
        check(later, "bad/kernel")
    with pytest.raises(Unreachable) as e:
        check(later, "never-seen/kernel")
    assert "never-seen" in str(e.value)
    assert "trust=" not in str(e.value)  # a network failure is a network failure: no advice to lower the guard


def test_a_publisher_whose_trust_was_withdrawn_is_refused_at_the_next_fetch(tmp_path, hub):
    check(verifier(tmp_path, hub), "good/kernel")
    hub.trusted["good"] = False
    with pytest.raises(Refused):
        verifier(tmp_path, hub).precheck(candidate("good/kernel", source="hub"), ABOUT)
    with pytest.raises(Refused):
        check(verifier(tmp_path, hub), "good/kernel")


@pytest.mark.parametrize("source", ["dir", "bundled", "local"])
def test_nobody_publishes_what_is_on_this_machine(tmp_path, hub, source):
    assert "nobody publishes it" in check(verifier(tmp_path, hub), "bad/kernel", source)
    assert hub.asked == []


@pytest.mark.parametrize("trust", [True, ["bad/kernel"], ["bad"], "bad/kernel", ("x/y", "bad/kernel")])
def test_the_call_may_vouch_for_what_it_names_and_nothing_is_remembered_of_it(tmp_path, hub, trust):
    assert check(verifier(tmp_path, hub, trust=trust), "bad/kernel") == "vouched for by the call"
    assert hub.asked == []
    with pytest.raises(Refused):
        check(verifier(tmp_path, hub), "bad/kernel")


@pytest.mark.parametrize("trust", [False, [], ["bad/other"], ["ba"], "b", ["good"]])
def test_vouching_for_something_else_does_not_help(tmp_path, hub, trust):
    with pytest.raises(Refused):
        check(verifier(tmp_path, hub, trust=trust), "bad/kernel")


def test_a_policy_names_publishers_without_asking_anybody(tmp_path, hub):
    v = verifier(tmp_path, hub, policy=Policy(publishers=("bad/kernel",), origins=(("publishers", "kernelswap.toml"),)))
    assert check(v, "bad/kernel") == "named by kernelswap.toml"
    with pytest.raises(Refused, match=r"good is not among the publishers of kernelswap\.toml"):
        check(v, "good/kernel")
    assert hub.asked == []


def test_a_policy_that_does_not_accept_the_calls_word_goes_over_it(tmp_path, hub):
    v = verifier(tmp_path, hub, trust=True, policy=Policy(publishers=("trusted",), origins=(("publishers", "kernelswap.toml"),)))
    assert "trusted publisher" in check(v, "good/kernel")
    with pytest.raises(Refused, match=r"the call vouches for it, which kernelswap\.toml does not accept"):
        check(v, "bad/kernel")


def test_an_organisation_may_be_called_trusted_without_being_it(tmp_path, hub):
    with pytest.raises(Refused):
        check(verifier(tmp_path, hub), "trusted/kernel")
    with pytest.raises(Refused):
        check(verifier(tmp_path, hub), "named/kernel")


@pytest.mark.parametrize("name", ["../good", "..", ".hidden/x", "good\n/kernel", "", "/kernel", "a b/kernel"])
def test_a_name_that_is_no_name_is_neither_asked_about_nor_a_path(tmp_path, hub, name):
    with pytest.raises(Refused):
        check(verifier(tmp_path, hub), name)
    assert hub.asked == []
    assert not list(tmp_path.iterdir())


def test_the_memory_of_one_name_does_not_speak_for_another_spelling(tmp_path, hub):
    check(verifier(tmp_path, hub), "good/kernel")
    (tmp_path / "publishers" / "good.json").rename(tmp_path / "publishers" / "GOOD.json")  # as where case does not count
    with pytest.raises(Unreachable):
        check(verifier(tmp_path, None), "GOOD/kernel")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"publisher":"good","trusted":"yes","asked":"x"}', "[" * 100_000])
def test_a_damaged_memory_is_no_memory(tmp_path, hub, text):
    (tmp_path / "publishers").mkdir()
    (tmp_path / "publishers" / "good.json").write_text(text)
    with pytest.raises(Unreachable):
        check(verifier(tmp_path, None), "good/kernel")
    assert "asked now" in check(verifier(tmp_path, hub), "good/kernel")


def test_a_memory_that_cannot_be_written_does_not_stop_anything(tmp_path, hub):
    (tmp_path / "publishers").write_text("a file is in the way")
    assert "asked now" in check(verifier(tmp_path, hub), "good/kernel")
