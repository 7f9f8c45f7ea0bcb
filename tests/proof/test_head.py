"""A head is proved together with its loss: logits that are right do not excuse a loss, or a gradient of it, that is not."""

import sys
from pathlib import Path

import pytest
import torch
from tests.kernels import opened
from tests.proof.zoo import implementation, site
from torch import nn

from kernelswap.proof import Check
from kernelswap.types import Run

BUILD = Path(__file__).parents[2] / "src" / "kernelswap" / "bundled" / "loss" / "build" / "torch-universal"


@pytest.fixture
def kernel():
    with opened("head_under_proof", BUILD) as module:
        yield module


def prove(kernel, dtype=torch.float32, hidden=32, vocabulary=100):
    torch.manual_seed(0)
    head = nn.Linear(hidden, vocabulary, bias=False, dtype=dtype)
    candidate = implementation(kernel.layers.LMHead.forward)
    return Check(None).equivalent(site(head, "head"), head, nn.Linear.forward, candidate, Run(training=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bundled_head_is_accepted(kernel, dtype):
    verdict = prove(kernel, dtype)
    assert verdict.accepted, verdict.reason


@pytest.mark.slow
def test_the_rounding_of_a_products_threads_is_no_fault_of_the_kernel(kernel, one_thread):
    """Eleven rows and 65536 terms: what MKL's second thread sums, it sums one after another, for the original as for the kernel."""
    torch.set_num_threads(2)
    verdict = prove(kernel, hidden=16, vocabulary=65536)
    assert verdict.accepted, verdict.reason


FAULTS = {
    "a loss that is off": ("losses.copy_(F.nll_loss(p", "losses.copy_(1.01 * F.nll_loss(p"),
    "a gradient without the target": ("terms.smoothing - 1.0", "terms.smoothing - 0.0"),
    "a gradient of rows that do not count": ("f.masked_fill_(~live[:, None], 0.0)", "pass"),
    "a mean over all rows": ("losses.sum() / count", "losses.sum() / len(target)"),
    "a gradient of the sum": ("grad = grad if scale is None else grad * scale", "pass"),
    "a weight's gradient of the first piece alone": (
        "for start in range(0, rows, step):",
        "for start in range(0, min(rows, 8), step):",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_head_whose_loss_is_wrong_is_refused_though_its_logits_are_right(kernel, fault):
    right, wrong = FAULTS[fault]
    source = (BUILD / "loss.py").read_text()
    assert source.count(right) == 1
    broken = {"__name__": "head_under_proof.loss", "__package__": "head_under_proof"}
    exec(
        compile(source.replace(right, wrong).replace("LEAST = 128", "LEAST = 8").replace("64 << 20", "1"), "loss.py", "exec"),
        broken,
    )
    sys.modules["head_under_proof.lazy"].of_terms = broken["of_terms"]
    verdict = prove(kernel)
    assert not verdict.accepted
    assert "differs in" in verdict.reason
