"""`kernelswap benchmark`: scripts that kernels ship, through the command line, from a hub and from a directory."""

import itertools
import json
import sys
import textwrap

import pytest
import torch
from tests.compat.conftest import published

from kernelswap import compat
from kernelswap.bench import scripts
from kernelswap.bench.turns import take_turns
from kernelswap.cli import app

KERNEL = """
import torch


def silu_and_mul(out, x):
    gate, value = x.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * value)


def double(x):
    return x + x
"""
SCRIPT = """
import torch
import torch.nn.functional as F
from helper import WIDTH
from kernels.benchmark import Benchmark


class Gated(Benchmark):
    seed = 3

    def setup(self):
        self.x = torch.randn(32, 2 * WIDTH, device=self.device)
        self.out = torch.empty(32, WIDTH, device=self.device)

    def benchmark_base(self):
        self.kernel.silu_and_mul(self.out, self.x)

    def verify_base(self):
        return F.silu(self.x[..., :WIDTH]) * self.x[..., WIDTH:]


class Doubling(Benchmark):
    def setup(self):
        raise AssertionError("every workload has a setup of its own, which stands in for this one")

    def setup_parts(self):
        self.x = torch.ones(4, 4)

    def benchmark_parts(self):
        self.made = self.kernel.double(self.x)

    def verify_parts(self):  # puts `out` together itself, as the rotary kernel's does
        self.out = torch.cat([self.made, self.made])
        return torch.cat([self.x * 2, self.x * 2])

    setup_alone = setup_parts
    benchmark_alone = benchmark_parts
"""
WRONG = """
from kernels.benchmark import Benchmark
import torch


class Wrong(Benchmark):
    def setup(self):
        self.x = torch.ones(3)

    def benchmark_base(self):
        self.out = self.kernel.double(self.x)

    def verify_base(self):
        return self.x * 3

    def benchmark_raises(self):
        self.kernel.nothing()
"""


def publish(hub, script=SCRIPT, **more):
    commit = published(hub, code=KERNEL, files={"layers.py": ""}, **more)
    files = dict(hub.repo("org/demo").commits[commit])
    files |= {"benchmarks/benchmark_demo.py": script.encode(), "benchmarks/helper.py": b"WIDTH = 16\n"}
    return hub.repo("org/demo").branch("v1", files)


def test_benchmarks_of_a_repository_run_as_they_are_written(cli, hub):
    commit = publish(hub)
    before = set(sys.modules)
    code, said = cli("benchmark", "org/demo", "--version", "1", "--iterations", "6", "--warmup", "1")
    assert (code, said["commit"], said["variant"], said["iterations"]) == (0, commit, "torch-cpu", 6)
    found = {f"{w['benchmark']}.{w['workload']}": w for w in said["workloads"]}
    assert set(found) == {"Gated.base", "Doubling.parts", "Doubling.alone"}
    gated = found["Gated.base"]
    assert gated["matches"]
    assert gated["error"] < 1e-6
    assert set(gated["warm"]) == {"kernel", "reference", "compiled"} == set(gated["cold"]), gated["notes"]
    for times in (*gated["warm"].values(), *gated["cold"].values()):
        assert 0 < times["low"] <= times["median"] <= times["high"]
        assert times["runs"] == 6
    assert (found["Doubling.parts"]["matches"], found["Doubling.alone"]["matches"]) == (True, None)
    assert set(found["Doubling.alone"]["warm"]) == {"kernel"}
    left = {
        name for name in set(sys.modules) - before if name.partition(".")[0] in {"kernels", "helper"} or "benchmark_0" in name
    }
    assert not left
    assert not compat.installed()


def test_a_wrong_answer_and_a_failure_are_said_and_end_with_1(cli, hub, tmp_path):
    publish(hub, WRONG)
    code, said = cli("benchmark", "org/demo@1", "--iterations", "2", "--no-compile", "--output", tmp_path / "out.json")
    assert code == 1
    wrong, failed = said["workloads"]
    assert (wrong["workload"], wrong["matches"], wrong["bad"]) == ("base", False, True)
    assert wrong["error"] == pytest.approx(1 / 3)
    assert set(wrong["warm"]) == {"kernel", "reference"}
    assert failed["failed"].startswith("AttributeError")
    assert json.loads((tmp_path / "out.json").read_text()) == said


def test_a_checkout_is_benchmarked_wherever_in_it_one_points(tmp_path, make_repo, capsys, monkeypatch):
    monkeypatch.setenv("KERNELSWAP_CACHE", str(tmp_path / "cache"))
    root = make_repo("here", {"torch-cpu": KERNEL})
    (root / "benchmarks").mkdir()
    (root / "benchmarks" / "benchmark.py").write_text(SCRIPT.replace("from helper import WIDTH", "WIDTH = 16"))
    for at in (root, root / "build", root / "build" / "torch-cpu"):
        assert app.run(["benchmark", str(at), "--iterations", "2", "--no-compile", "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["workloads"]) == 3


@pytest.mark.parametrize("columns", [80, 200])
def test_the_table_fits_the_terminal_and_names_every_workload(tmp_path, make_repo, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("KERNELSWAP_CACHE", str(tmp_path / "cache"))
    root = make_repo("here", {"torch-cpu": KERNEL})
    (root / "benchmarks").mkdir()
    (root / "benchmarks" / "benchmark.py").write_text(SCRIPT.replace("from helper import WIDTH", "WIDTH = 16"))
    given = ["--iterations", "2", "--no-compile", "--visual", str(tmp_path / "picture")]
    assert app.run(["benchmark", str(root), *given]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines()[1:])) <= columns
    assert all(name in said for name in ("Gated.base  matches", "Doubling.parts", "Doubling.alone", "eager", "cold caches"))
    assert {p.name for p in tmp_path.glob("picture*")} == {"picture_light.svg", "picture_dark.svg"}


def test_without_benchmarks_it_says_so(cli, hub):
    published(hub)
    code, said = cli("benchmark", "org/demo@1")
    assert code == 2
    assert "has no benchmarks/benchmark*.py" in said["error"]["found"]


def test_a_script_that_cannot_be_imported_or_ends_the_process_is_the_kernels_fault(cli, hub):
    for script in ("import nothing_of_that_name", "raise SystemExit(0)"):
        publish(hub, script)
        code, said = cli("benchmark", "org/demo@1", "--iterations", "1")
        assert code == 6
        assert "benchmark_demo.py" in said["error"]["asked"]
    ends = WRONG.replace("self.kernel.nothing()", "raise SystemExit(0)")
    publish(hub, ends)
    assert cli("benchmark", "org/demo@1", "--iterations", "1", "--no-compile")[1]["workloads"][1]["failed"].startswith(
        "SystemExit"
    )


def test_where_the_policy_asks_for_digests_scripts_without_one_are_not_run(cli, hub, tmp_path):
    publish(hub, "raise SystemExit('it was run')")
    (tmp_path / "kernelswap.toml").write_text("[policy]\nrequire_digest = true\n")
    code, said = cli("benchmark", "org/demo@1")
    assert code == 5
    assert "no digest or signature covers" in said["error"]["found"]


def test_a_script_that_leads_out_of_its_repository_is_not_read(tmp_path, make_repo, capsys, monkeypatch):
    monkeypatch.setenv("KERNELSWAP_CACHE", str(tmp_path / "cache"))
    root = make_repo("here", {"torch-cpu": KERNEL})
    (root / "benchmarks").mkdir()
    (tmp_path / "secret.py").write_text("raise SystemExit('it was run')")
    (root / "benchmarks" / "benchmark.py").symlink_to(tmp_path / "secret.py")
    assert app.run(["benchmark", str(root), "--json"]) == 5
    assert "leads out" in capsys.readouterr().out


def test_a_changed_benchmark_on_the_way_is_not_run(cli, hub, hub_cache):
    publish(hub)
    assert cli("benchmark", "org/demo@1", "--iterations", "1", "--no-compile")[0] == 0
    for file in hub_cache.rglob("benchmark_demo.py"):
        file.resolve().write_text("raise SystemExit('it was run')")
    assert cli("benchmark", "org/demo@1", "--iterations", "1", "--no-compile")[0] == 0  # fetched again


def test_only_the_benchmarks_that_a_script_defines_run_or_those_it_imports(kernels, tmp_path):
    file = tmp_path / "benchmark.py"
    base = "from kernels.benchmarks import LayerNormBenchmark\n"
    for text, names in ((base, ["LayerNormBenchmark"]), (base + "class Mine(LayerNormBenchmark):\n    pass\n", ["Mine"])):
        file.write_text(text)
        with scripts.modules([file]) as (module,):
            assert [c.__name__ for c in scripts.classes(module, kernels.Benchmark)] == names


class Community:
    """The functions of published kernels that inherit these workloads, by PyTorch."""

    @staticmethod
    def silu_and_mul(out, x):
        gate, value = x.float().chunk(2, -1)
        out.copy_(torch.nn.functional.silu(gate) * value)

    @staticmethod
    def dropout_add_ln_fwd(*, input, gamma, epsilon, is_rms_norm, z_numrows, **rest):  # noqa: A002  # its name
        x = input.float()
        mean = 0 if is_rms_norm else x.mean(-1, keepdim=True)
        y = (x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + epsilon) * gamma
        return [y.to(input.dtype), None]

    @staticmethod
    def flash_attn_func(q, k, v, causal):
        scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float()).to(q.dtype)

    @classmethod
    def flash_attn_varlen_func(cls, q, k, v, cu_q, cu_k, max_q, max_k):
        ends = cu_q.tolist()
        assert max_q == max(b - a for a, b in itertools.pairwise(ends))
        parts = [cls.flash_attn_func(q[None, a:b], k[None, a:b], v[None, a:b], False)[0] for a, b in itertools.pairwise(ends)]
        return torch.cat(parts), None


@pytest.mark.parametrize(
    "name",
    [
        "SiluAndMulBenchmark",
        "LayerNormBenchmark",
        "RMSNormBenchmark",
        "FlashAttentionBenchmark",
        "FlashAttentionCausalBenchmark",
        "FlashAttentionVarlenBenchmark",
    ],
)
def test_workloads_that_published_kernels_inherit_have_three_sizes_and_right_answers(kernels, name):
    import kernels.benchmarks

    cls = getattr(kernels.benchmarks, name)
    assert cls.workloads() == ("large", "medium", "small")
    one = cls()
    one.kernel = Community
    if name == "SiluAndMulBenchmark":  # its own small one has 16 million elements
        one.sizes = {"small": (2, 4, 8)}
    one.prepare("small")
    one.benchmark_small()
    out, right = one.verified("small")
    assert out.dtype == right.dtype == torch.float16
    torch.testing.assert_close(out, right, atol=1e-2, rtol=1e-2)


def test_sides_take_turns_and_who_goes_first_changes():
    order = []
    sides = {name: lambda name=name: order.append(name) for name in "abc"}
    found = take_turns(sides, turns=3, warmup=1, cold=True)
    assert "".join(order[-9:]) == "abcbcacab"
    assert all(times.runs == 3 for times in found.values())


def test_a_replaced_tolerance_of_the_author_counts(kernels, tmp_path):
    file = tmp_path / "benchmark.py"
    file.write_text(textwrap.dedent(WRONG) + "\ntorch.allclose = lambda *a, **k: True\n")
    kept = torch.allclose
    try:
        with scripts.modules([file]) as found:
            rows = scripts.measure(found, kernels.Benchmark, Double, scripts.Asked(iterations=1, warmup=0, compile=False))
    finally:
        torch.allclose = kept
    assert rows[0].matches


class Double:
    @staticmethod
    def double(x):
        return x + x


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_kernel_is_also_replayed_from_a_graph(kernels, tmp_path):
    file = tmp_path / "benchmark.py"
    file.write_text(SCRIPT.replace("from helper import WIDTH", "WIDTH = 16"))
    code = {}
    exec(KERNEL, code)
    kernel = type("Kernel", (), {"silu_and_mul": staticmethod(code["silu_and_mul"]), "double": staticmethod(code["double"])})
    with scripts.modules([file]) as found:
        rows = scripts.measure(found, kernels.Benchmark, kernel, scripts.Asked("cuda", iterations=5))
    assert next(r for r in rows if r.benchmark == "Gated").graph.median > 0
