"""What goes wrong: PyTorch goes on with one line for each reason; where trust is at stake there is an error."""

import pytest
from tests.adapters import world
from tests.adapters.world import close, logits, plain, serving
from tests.hub import kernel_files

from kernelswap.errors import Refused, Tampered

LIGER = "kernels-community/liger-kernels"


def load(qwen, spec, **more):
    return qwen(use_kernels=True, kernel_config={"RMSNorm": spec}, **more)


def goes_on(installed, model):
    assert serving(installed, model)["model.norm"] == "layers:RMSNorm"
    close(logits(model), logits(plain()))


REASONS = {
    "an unknown repository": ("kernels-community/none:RMSNorm", "none"),
    "an unknown version": (f"{LIGER}@7:LigerRMSNorm", "has v3"),
    "an unknown layer": (f"{LIGER}:LigerRMSNrm", "LigerRMSNorm"),
    "no build for this machine": ("kernels-community/for-cuda:RMSNorm", "cu128"),
    "a missing dependency": ("kernels-community/needs:RMSNorm", "nvidia-cutlass-dsl"),
    "a kernel that needs a later loader": ("kernels-community/later:RMSNorm", "99.0.0"),
    "an import error": ("kernels-community/breaks:RMSNorm", "boom"),
}


@pytest.mark.parametrize("what", REASONS)
def test_a15_pytorch_goes_on_and_one_line_says_why(qwen, installed, published, said, what):
    published.repo("kernels-community/for-cuda").branch("v1", kernel_files("torch213-cxx11-cu128-x86_64-linux", name="other"))
    published.repo("kernels-community/needs").branch(
        "v1", kernel_files("torch-cpu", name="other", metadata={"python-depends": ["nvidia-cutlass-dsl"]})
    )
    published.repo("kernels-community/later").branch(
        "v1", kernel_files("torch-cpu", name="other", metadata={"kernels-minver": "99.0.0"})
    )
    published.repo("kernels-community/breaks").branch("v1", kernel_files("torch-cpu", "raise RuntimeError('boom')", name="other"))
    spec, reason = REASONS[what]
    model = load(qwen, spec)
    goes_on(installed, model)
    (line,) = [line for line in said() if spec.partition(":")[0] in line]
    assert reason in line
    assert "RMSNorm (9)" in line


def test_a15_a_hub_that_fails_is_one_line(qwen, installed, published, said):
    published.fault("/api/kernels/*", "status", status=503)
    model = load(qwen, f"{LIGER}:LigerRMSNorm")
    goes_on(installed, model)
    assert len([line for line in said() if LIGER in line]) == 1


def test_a15_a_hub_that_goes_away_is_one_line_and_what_was_fetched_before_goes_on(qwen, installed, published, said):
    model = qwen(kernel_config={"RMSNorm": f"{LIGER}:LigerRMSNorm"})
    published.fault("*", "status", status=503)
    model.set_use_kernels(True, {"RMSNorm": f"{LIGER}:LigerRMSNorm"})
    assert serving(installed, model)["model.norm"] == f"{LIGER}:LigerRMSNorm"
    assert said() == []
    model.set_use_kernels(True, {"RMSNorm": "kernels-community/liger_kernels:LigerRMSNorm"})
    goes_on(installed, model)
    assert len([line for line in said() if "liger_kernels" in line]) == 1


def test_c9_layers_without_a_kernel_are_no_news(qwen, said):
    qwen(use_kernels=True)
    assert said() == []


def test_nothing_that_serves_is_said_too(qwen, installed, said, hub):
    model = qwen(use_kernels=True, kernel_config={"SwiGLUMLP": "kernels-community/none:MLP"})
    assert "model.layers.0.mlp" in serving(installed, model)
    model = qwen(use_kernels=True, kernel_config={"RMSNorm": "kernels-community/none:RMSNorm"})
    assert len(said()) == 2


def test_an_untrusted_publisher_is_an_error_that_names_it(qwen):
    with pytest.raises(Refused, match="stranger is not a trusted publisher"):
        load(qwen, "stranger/norms:LigerRMSNorm")


@pytest.mark.parametrize("how", ["allow_all_kernels", "trust_remote_code", "listed"])
def test_a_publisher_that_the_call_vouches_for_is_loaded(qwen, installed, how):
    if how == "allow_all_kernels":
        model = load(qwen, "stranger/norms:LigerRMSNorm", allow_all_kernels=True)
    else:
        trust = True if how == "trust_remote_code" else ["stranger"]
        model = load(qwen, ("stranger/norms:LigerRMSNorm", {"version": 1, "trust_remote_code": trust}))
    assert serving(installed, model)["model.norm"] == "stranger/norms:LigerRMSNorm"


def test_a_kernel_that_does_not_match_its_digest_is_an_error(qwen, published):
    files = world.kernel("liger", world.LIGER, version=5)
    files["build/torch-cpu/layers.py"] += b"\n# changed\n"
    published.repo(LIGER).branch("v5", files)
    with pytest.raises((Refused, Tampered)):
        load(qwen, f"{LIGER}@5:LigerRMSNorm")


def test_a_kernel_that_computes_something_else_is_passed_over(qwen, installed, published, said):
    wrong = "from torch import nn\n\n\nclass RMSNorm(nn.Module):\n    def forward(self, hidden_states):\n        return hidden_states\n"
    published.repo("kernels-community/wrong").branch("v1", world.kernel("wrong", wrong))
    goes_on(installed, load(qwen, "kernels-community/wrong:RMSNorm"))
    assert any("wrong differs" in line for line in said())


def test_everything_that_was_said_is_in_the_explanation(qwen, installed):
    model = load(qwen, "kernels-community/none:RMSNorm")
    assert "kernels-community/none" in installed.explain(model, long=True)
