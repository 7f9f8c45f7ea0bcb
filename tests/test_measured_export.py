"""Verdicts travel with a lock: those of the builds that it names, to a machine of the same kind, and no further than their keys say."""

import json

import pytest
import torch
from tests.swapping import LAYERS
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from kernelswap.api import Swapper
from kernelswap.cli import main
from kernelswap.types import Mode, Row, Use

pytestmark = pytest.mark.usefixtures("one_thread")


class Wasteful(Qwen3RMSNorm):
    def forward(self, hidden_states):
        for _ in range(12):
            out = super().forward(hidden_states)
        return out


@pytest.fixture
def machine_at(tmp_path, monkeypatch):
    """A user's machine: a cache, a home with the key that signs, and a project."""

    def at(name):
        home = tmp_path / name
        home.mkdir(exist_ok=True)
        monkeypatch.chdir(home)
        for variable in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "HOME"):
            monkeypatch.setenv(variable, str(home))
        return home

    return at


def swapper(home, *roots):
    uses = tuple(Use(f"dir://{root}:RMSNorm") for root in roots)
    row = Row("RMSNorm", targets=("Wasteful",), needs=(("weight",), ("variance_epsilon",)), probe="rows", use=uses)
    return Swapper(cache=home / "cache", table=(row,), verifiers=(), offline=True)


def verdicts(home, *more):
    assert main(["verdicts", "--cache", str(home / "cache"), *map(str, more)]) == 0


def test_measurements_of_locked_builds_and_no_others_go_along_and_are_void_when_a_part_of_their_key_is_another(
    machine_at, make_repo, tmp_path, capsys
):
    code = {"code": "from . import layers", "files": {"layers.py": LAYERS}}
    ours, other = (make_repo(name, {"torch-cpu": code}, unique=f"{i}" * 7) for i, name in ((1, "ours"), (2, "other")))
    here, model = machine_at("here"), nn.Sequential(Wasteful(64)).eval()
    swapper(here, ours, other).measure(model, seconds=120, compile=False)
    applied = swapper(here, ours).swap(model, mode=Mode.INFERENCE, choose="measured", lock=here)
    applied.undo()

    verdicts(here, "--export", tmp_path / "all.json")
    capsys.readouterr()
    verdicts(here, "--lock", here, "--export", tmp_path / "v.json")
    text = capsys.readouterr().out
    assert "x as fast as the original" in text
    assert "of an earlier kernelswap" not in text
    taken, every = (json.loads((tmp_path / f).read_text())["verdicts"] for f in ("v.json", "all.json"))
    names = {dict(v["details"])["kernel"] for v in taken}
    assert names == {f"{ours}:RMSNorm"}
    assert len(taken) < len(every)
    assert sum("speedup" in dict(v["details"]) for v in taken) == 5

    there = machine_at("there")
    verdicts(there, "--import", tmp_path / "v.json")
    assert swapper(there, ours).measure(model, seconds=0, compile=False).left == 0
    assert swapper(there, ours, other).measure(model, seconds=0, compile=False).left == 5, "of the other, nothing came along"
    (outcome,) = swapper(there, ours).plan(model, choose="measured", mode=Mode.INFERENCE)
    assert any(times is not None for _, _, times in outcome.inference.measured)

    assert swapper(there, ours).measure(nn.Sequential(Wasteful(32)).eval(), seconds=0, compile=False).left == 5, "another width"
    assert swapper(there, ours).measure(model.bfloat16(), seconds=0, compile=False).left == 5, "another dtype"
    model.float()
    torch.set_num_threads(2)
    assert swapper(there, ours).measure(model, seconds=0, compile=False).left == 5, "another number of threads"
    torch.set_num_threads(1)
    edited = {"code": "from . import layers", "files": {"layers.py": LAYERS + "\n# edited\n"}}
    make_repo("ours", {"torch-cpu": edited}, unique="1" * 7)
    assert swapper(there, ours).measure(model, seconds=0, compile=False).left == 5, "another build"


def test_a_directory_without_a_lock_is_said(machine_at, tmp_path, capsys):
    here = machine_at("here")
    assert main(["verdicts", "--cache", str(here / "cache"), "--lock", str(here)]) != 0
    err = capsys.readouterr().err
    assert "there is no" in err
    assert "kernelswap lock" in err
