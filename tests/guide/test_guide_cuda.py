"""The guide's snippets on a GPU, with the kernels that come with kernelswap and the prover of users."""

import pytest
import torch
from tests.adapters import world
from tests.adapters.world import logits, serving
from tests.guide.test_guide import find, run

import kernelswap
from kernelswap.api import Swapper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
IDS = torch.arange(2, 12)[None]
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (5e-2, 5e-2)}


@pytest.fixture
def installed(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    swapper = Swapper(cache=tmp_path / "cache")
    kernelswap.install(swapper)
    yield swapper
    kernelswap.uninstall()


def origins(swapper, model):
    return {place: served for place, served in serving(swapper, model).items() if served.startswith("layers:")}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_use_kernels(installed, tmp_path, dtype):
    code = find("Loading kernels").replace("use_kernels=True", f'use_kernels=True, dtype="{str(dtype).partition(".")[2]}"')
    model = run(code, tmp_path)["model"]
    assert model.device.type == "cuda"
    assert origins(installed, model)["model.norm"] == "layers:RMSNorm", installed.explain(model)
    atol, rtol = TOLERANCE[dtype]
    expected = logits(run(code.replace("use_kernels=True,", ""), tmp_path)["model"], IDS.cuda())
    for _ in range(2):
        torch.testing.assert_close(logits(model, IDS.cuda()), expected, atol=atol, rtol=rtol)
    assert installed.applied(model).refusals == (), installed.explain(model)
    model.use_kernels = False
    assert torch.equal(logits(model, IDS.cuda()), expected)


def test_mode_awareness_and_the_modes_of_kernelize(installed, tmp_path):
    names = run(find("Mode-awareness"), tmp_path)
    model = names["model"]
    assert origins(installed, model)["model.norm"] == "layers:RMSNorm"
    reference = world.plain().cuda().train()
    reference(IDS.cuda(), labels=IDS.cuda()).loss.backward()
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    run(find("Mode-awareness", 1), tmp_path, model=model)
    assert origins(installed, model)["model.norm"] == "layers:RMSNorm"


def test_attention_and_the_loss_serve_by_themselves_and_not_where_the_program_chose(installed, tmp_path):
    model = run(find("Loading kernels"), tmp_path)["model"]
    plain = world.plain().cuda()
    assert model.config._attn_implementation.startswith("kernelswap/attention"), installed.explain(model)
    more = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    for cache in (None, "static"):
        found, wanted = (m.generate(IDS.cuda(), cache_implementation=cache, **more) for m in (model, plain))
        assert torch.equal(found, wanted)
    late = []
    for one in (model, plain):
        optimizer = torch.optim.SGD(one.train().parameters(), 0.0)
        out = one(IDS.cuda(), labels=IDS.cuda())
        assert (type(out.logits) is torch.Tensor) == (one is plain)
        out.loss.backward()
        optimizer.step()
        late.append(out.logits.detach().clone())
    torch.testing.assert_close(*late, atol=1e-4, rtol=1e-3)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    assert installed.applied(model).refusals == (), installed.explain(model)
    model.use_kernels = False
    assert model.config._attn_implementation == "sdpa"
    chosen = find("Loading kernels").replace("use_kernels=True", 'use_kernels=True, attn_implementation="sdpa"')
    assert run(chosen, tmp_path)["model"].config._attn_implementation == "sdpa"


def test_attention_that_comes_with_kernelswap(installed, tmp_path):
    code = find("Attention kernels").replace("kernels-community/flash-attn2", "kernelswap/attention")
    model = run(code, tmp_path)["model"]
    assert model.config._attn_implementation == "kernelswap/attention"
    plain = world.plain().cuda()
    torch.testing.assert_close(logits(model, IDS.cuda()), logits(plain, IDS.cuda()), atol=1e-4, rtol=1e-3)
    more = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(IDS.cuda(), **more), plain.generate(IDS.cuda(), **more))
