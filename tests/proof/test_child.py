"""What would have killed the process becomes a reason."""

import os

import pytest
import torch
from tests.proof.zoo import ORIGINALS, site
from tests.proof.zoo_crash import CRASHES, HARMLESS, artifact, implementation
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kernelswap.api import Swapper
from kernelswap.proof import Check, Verdicts, child, memory
from kernelswap.proof.child import Contact, is_native
from kernelswap.types import Machine, Row, Run, Use

SAYS = {
    "segfaults": "SIGSEGV",
    "aborts": "SIGABRT",
    "exits": "exit code 3",
    "is_killed": "SIGKILL",
    "hangs": "does not return within",
    "segfaults_on_nothing": "SIGSEGV",
}


@pytest.fixture(scope="module")
def contact():
    """One child for all tests, started anew after each crash, as in a plan with many kernels."""
    contact = Contact("native", 20.0)
    yield contact
    contact.close()


@pytest.fixture
def check(contact, tmp_path):
    check = Check(Verdicts(tmp_path / "verdicts", key=tmp_path / "key"))
    check.contact = contact
    return check


def kernel(self, hidden_states):
    return LlamaRMSNorm.forward(self, hidden_states)


def prove(check, found, module=None, forward=kernel, *, training=False):
    module = module or LlamaRMSNorm(64)
    return check.equivalent(
        site(module, "rows"), module, type(module).forward, implementation(found, forward), Run(training=training)
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals have names on posix")
@pytest.mark.parametrize("name", CRASHES)
def test_a_crash_is_a_reason(check, contact, tmp_path, name, monkeypatch):
    monkeypatch.setattr(contact, "time_limit", 3.0 if name == "hangs" else 60.0)
    verdict = prove(check, artifact(tmp_path / "kernel", CRASHES[name]), forward=None)
    assert not verdict.accepted
    assert SAYS[name] in verdict.reason
    assert "in a child process" in verdict.reason


MORE_THAN_A_GRID = "        import ctypes\n        hidden_states.numel() > 65535 * 64 and ctypes.string_at(0)"
AT_AN_ODD_ADDRESS = "        import ctypes\n        hidden_states.data_ptr() % 16 and ctypes.string_at(0)"


@pytest.mark.slow
@pytest.mark.parametrize("body", [MORE_THAN_A_GRID, AT_AN_ODD_ADDRESS], ids=["many rows", "an odd address"])
def test_what_would_crash_here_later_in_the_proof_crashes_there_first(check, tmp_path, body):
    verdict = prove(check, artifact(tmp_path / "kernel", body), forward=None)
    assert "SIGSEGV" in verdict.reason


def test_a_tensor_that_is_sent_keeps_its_gaps_and_its_place():
    base = torch.arange(60.0)
    for view in (base[1:31].view(5, 6), base.view(6, 10)[:, 3:7], base.view(6, 10).t(), base[:4].expand(3, 4), base[:0]):
        sent = memory.moved(view, torch.device("meta"))  # another device, and one that every machine has
        assert (sent.shape, sent.stride(), sent.storage_offset()) == (view.shape, view.stride(), view.storage_offset())
        assert sent.untyped_storage().nbytes() == base.untyped_storage().nbytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", HARMLESS)
def test_what_survives_is_judged_by_its_numbers(check, tmp_path, name):
    assert prove(check, artifact(tmp_path / "kernel", HARMLESS[name])).accepted
    other = artifact(tmp_path / "other", HARMLESS[name] + "\n        # another digest")
    assert not prove(check, other, forward=lambda self, x: kernel(self, x) * 2).accepted


@pytest.mark.slow
def test_the_child_is_asked_once_per_kernel_and_machine(check, contact, tmp_path):
    found = artifact(tmp_path / "kernel", "")
    assert prove(check, found, training=True).accepted
    process = contact._child.process.pid
    asked = []
    contact_first, contact.first = contact.first, lambda *a: asked.append(a)
    try:
        again = Check(check.store)
        again.contact = contact
        assert prove(again, found, LlamaRMSNorm(128), training=True).accepted, (
            "another shape, a new process: the contact was made"
        )
    finally:
        contact.first = contact_first
    assert not asked
    assert contact._child.process.pid == process


@pytest.mark.slow
def test_a_module_that_only_this_process_knows_is_sent_as_its_attributes(check, tmp_path):
    class Local(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states)

    verdict = prove(check, artifact(tmp_path / "kernel", CRASHES["segfaults"]), Local(64), forward=None)
    assert "SIG" in verdict.reason or "exit code" in verdict.reason


def test_a_module_that_cannot_be_sent_is_not_contained_and_the_note_says_so(check, tmp_path, contact):
    module = LlamaRMSNorm(64)
    module.lock = __import__("threading").Lock()
    assert prove(check, artifact(tmp_path / "kernel", ""), module).accepted
    assert any("not contained" in v.reason for v in check._memo.values())
    assert not any("not contained" in v.reason for v in check.store), "the next process tries again"


def test_which_kernels_meet_the_machine_in_a_child_first(tmp_path):
    native = artifact(tmp_path / "native", "")
    python = artifact(tmp_path / "python", "", native=False)
    bundled = artifact(tmp_path / "bundled", "", source="bundled")
    triton = artifact(tmp_path / "triton", "        import triton", native=False)
    assert [is_native(a) for a in (native, python, bundled, triton)] == [True, False, True, True]
    installed = artifact(tmp_path / "installed", "", native=False, source="installed")
    assert Contact("native", 1.0).wanted(installed), "what the package brings does not lie here"
    wanted = {c: [Contact(c, 1.0).wanted(a) for a in (native, python, bundled)] for c in ("native", "always", "never")}
    assert wanted == {"native": [True, False, False], "always": [True] * 3, "never": [False] * 3}


@pytest.mark.slow
def test_an_import_can_be_tried_alone(contact, tmp_path):
    crash = artifact(tmp_path / "kernel", "")
    (crash.path / "__init__.py").write_text("import os\nos.abort()\n")
    from dataclasses import replace

    from kernelswap import tree

    crash = replace(crash, digest=tree.digest_of(tree.hashes(crash.path)))
    why, _ = contact.imports(crash)
    assert "SIGABRT" in why if os.name == "posix" else why


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals have names on posix")
@pytest.mark.parametrize(("line", "says"), [("os.abort()", "SIGABRT"), ("time.sleep(600)", "does not return within 2 s")])
def test_a_kernel_that_ends_the_process_or_hangs_at_its_import_keeps_the_original(
    contact, make_repo, tmp_path, monkeypatch, line, says
):
    monkeypatch.setattr(contact, "time_limit", 2.0)
    files = {"_kernel.abi3.so": "no library, but named as one"}
    root = make_repo("crash", {"torch-cpu": {"code": f"import os, time\n{line}\n", "files": files}})
    monkeypatch.chdir(tmp_path)
    row = Row("RMSNorm", targets=("*RMSNorm",), probe="rows", use=(Use(f"dir://{root}:Norm"),))
    machine = Machine(os="linux", cpu="x86_64", torch=(2, 13), cxx11=True)

    def swapper():
        check = Check(Verdicts(tmp_path / "verdicts", key=tmp_path / "key"))
        check.contact = contact
        return Swapper(cache=tmp_path / "cache", table=(row,), prover=check, machine=machine, verifiers=(), offline=True)

    model = nn.Sequential(LlamaRMSNorm(64))
    (kept,) = swapper().plan(model)
    assert says in kept.reason
    assert "its import" in kept.reason
    contact_imports, contact.imports = contact.imports, None
    try:
        (again,) = swapper().plan(model)
    finally:
        contact.imports = contact_imports
    assert again.reason == kept.reason, "asked once per machine"


@pytest.mark.slow
def test_the_child_outlives_what_crashes_in_it_and_one_kernel_is_not_blamed_for_another(check, contact, tmp_path):
    if not child.FORKS:
        pytest.skip("the child itself meets the kernel here, and is started anew")
    assert prove(check, artifact(tmp_path / "fine", "")).accepted
    process = contact._child.process.pid
    damage = "        import torch\n        torch.nn.functional.silu = None\n        torch.rsqrt = None"
    verdict = prove(check, artifact(tmp_path / "damages", damage))
    assert verdict.accepted, "it broke a process that is gone"
    assert not prove(check, artifact(tmp_path / "crashes", CRASHES["segfaults"]), forward=None).accepted
    assert prove(check, artifact(tmp_path / "after", "        torch.nn.functional.silu(hidden_states)")).accepted
    assert contact._child.process.pid == process


@pytest.mark.slow
def test_an_mlp_travels_with_its_submodules(check, tmp_path):
    module = ORIGINALS["mlp"].make(32)
    body = "        assert type(self.act_fn).__module__.startswith('transformers')\n        self.act_fn(self.gate_proj(hidden_states))"
    body += "\n        import os\n        os._exit(7)"
    found = artifact(tmp_path / "kernel", body)
    verdict = check.equivalent(site(module, "mlp"), module, type(module).forward, implementation(found, None), Run())
    assert "exit code 7" in verdict.reason


def test_the_time_limit_and_the_child_end_with_the_check(tmp_path):
    with torch.no_grad():
        check = Check(None, contain="never")
        assert prove(check, artifact(tmp_path / "kernel", ""), nn.LayerNorm(32), nn.LayerNorm.forward).accepted
        check.close()
        check.close()
