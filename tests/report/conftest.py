"""One small model, swapped and measured: three kinds are served, one of a width is refused on real tensors, one is left alone."""

import pytest
import torch
from tests.hub import kernel_files
from tests.small import qwen3
from tests.swapping import LAYERS, rows

from kernelswap import Swapper, machine
from kernelswap.bench import subject
from kernelswap.bench.observe import observe

HIDDEN, HEAD = 64, 16
TURNS = "        return self.weight * (x * torch"
# Right until somebody says so: what random tensors cannot find, and real ones do.
LAYERS_THAT_TURN = "TURNED = []\n" + LAYERS.replace(
    TURNS, f"        if TURNED and x.shape[-1] == {HEAD}:\n            x = x + 0.1\n{TURNS}", 1
)


def tiny():
    model = qwen3(hidden_size=HIDDEN, intermediate_size=96, head_dim=HEAD)
    ids = torch.arange(48)[None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return subject.Subject("tiny <script>alert(1)</script>", model, "causal", given)


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """`(applied, observed)`; the model lives as long as the session."""
    where = tmp_path_factory.mktemp("report")
    files = kernel_files("torch-cpu", "from . import layers", name="turning", files={"layers.py": LAYERS_THAT_TURN})
    for path, data in files.items():
        (where / "repo" / path).parent.mkdir(parents=True, exist_ok=True)
        (where / "repo" / path).write_bytes(data)
    about = tiny()
    swapper = Swapper(cache=where / "cache", table=rows(where / "repo"), machine=machine.look(), offline=True)
    outcomes = swapper.plan(about.model)
    kernel = swapper.kernel(f"dir://{where / 'repo'}")
    kernel.module.layers.TURNED.append(True)
    applied, observed = observe(about, outcomes, swapper.machine, seconds=0.3)
    yield about, applied, observed
    applied.undo()


@pytest.fixture(scope="session")
def facts(measured):
    about, applied, observed = measured
    return applied.facts(name=about.name, observed=observed)


@pytest.fixture(scope="session")
def page(measured, tmp_path_factory):
    """The file."""
    about, applied, observed = measured
    return applied.html(tmp_path_factory.mktemp("page") / "report.html", name=about.name, observed=observed)
