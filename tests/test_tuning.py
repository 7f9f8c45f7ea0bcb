"""Measured configurations on disk: found for what they hold for and nothing else, whole or not at all, shared by processes."""

import json
import os
import subprocess
import sys

import pytest
from tests.kernel_files import write

from kernelswap import Swapper
from kernelswap.tuning import Tunings, place, won

AT = {"device": "NVIDIA H200", "capability": "9.0", "torch": "2.11.0", "triton": "3.6.0"}
DIGEST = "a" * 64
RECORD = {"config": {"ROWS": 2}, "default": {"ROWS": 1}, "us": 65.1, "default_us": 66.4}


@pytest.fixture
def tunings(tmp_path):
    found = Tunings(tmp_path / "tuning")
    found.put(DIGEST, AT, "rms_norm.forward", "bfloat16; 4096 wide", RECORD, kernel="kernelswap/layers")
    return found


def test_what_was_put_is_found_and_can_be_read_by_a_person(tunings):
    assert tunings.read(DIGEST, AT) == {"rms_norm.forward": {"bfloat16; 4096 wide": RECORD}}
    data = json.loads(tunings.file(DIGEST, AT).read_text())
    assert data["kernel"] == "kernelswap/layers"
    assert {name: data[name] for name in AT} == AT
    assert "\n" in tunings.file(DIGEST, AT).read_text()


@pytest.mark.parametrize("part", ["digest", *AT])
def test_it_holds_for_nothing_else(tunings, part):
    """Another kernel, device, capability, torch or Triton."""
    digest, at = ("b" * 64, AT) if part == "digest" else (DIGEST, {**AT, part: "another"})
    assert tunings.read(digest, at) == {}


def test_a_file_under_another_name_is_not_believed(tunings):
    other = {**AT, "device": "NVIDIA A100"}
    tunings.file(DIGEST, AT).rename(tunings.file(DIGEST, other))
    assert tunings.read(DIGEST, other) == {}
    assert tunings.read(DIGEST, AT) == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda _: "",
        lambda _: "[]",
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"choices": {', '"choices": {"x": 1, '),
        lambda text: text.replace('"format": 1', '"format": 1, "format": 1'),
        lambda text: text.replace("65.1", "NaN"),
        lambda text: "[" * 100_000 + text,
    ],
)  # fmt: skip
def test_a_damaged_file_counts_as_not_there_and_is_replaced(tunings, damage):
    file = tunings.file(DIGEST, AT)
    file.write_text(damage(file.read_text()))
    assert tunings.read(DIGEST, AT) == {}
    assert list(tunings) == []
    tunings.put(DIGEST, AT, "rope", "x", RECORD)
    assert tunings.read(DIGEST, AT) == {"rope": {"x": RECORD}}


def test_what_lost_is_kept_and_changes_nothing(tunings, tmp_path):
    here = place(-1)
    tunings.put(DIGEST, here, "rope", "few", {"config": None, "complete": True})
    tunings.put(DIGEST, here, "rope", "many", {"config": {"HB": 8}})
    tunings.put(DIGEST, here, "glu.forward", "many", {"config": None})
    find = tunings.finder(DIGEST)
    assert find("rope", "few", -1) is None
    assert find("rope", "many", -1) == {"HB": 8}
    assert find("rope", "others", -1) is None
    assert tunings.tuned(DIGEST, -1) == ("rope (1 of 2 measured)",) == won(tunings.read(DIGEST, here))
    tunings.file(DIGEST, here).unlink()
    assert find("rope", "many", -1) == {"HB": 8}, "the disk is asked once"


def test_processes_share_a_directory(tmp_path):
    code = (
        "import sys; from pathlib import Path; from kernelswap.tuning import Tunings\n"
        f"for i in range(20): Tunings(Path(sys.argv[1])).put({DIGEST!r}, {AT!r}, 'rope', sys.argv[2] + str(i), {{'config': {{'HB': i}}}})"
    )
    each = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "abc"]
    assert [p.wait() for p in each] == [0, 0, 0]
    assert len(Tunings(tmp_path).read(DIGEST, AT)["rope"]) == 60
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_raises_and_is_left_alone(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="tuning"):
        Tunings(tmp_path / "tuning").put(DIGEST, AT, "rope", "x", RECORD)


SCRIPT = """
import sys, torch
from pathlib import Path
import kernelswap as ks
from kernelswap.tuning import place

swapper = ks.Swapper(cache=Path(sys.argv[1]))
digest = swapper.artifact("kernelswap/loss").digest
bucket = "bfloat16; 64 to 151936; 8192-16383 rows"
swapper.tunings.put(digest, place(-1), "linear_cross_entropy", bucket, {"config": {"MIB": 594}})
kernel = swapper.kernel("kernelswap/loss")
x = torch.empty(8192, 64, dtype=torch.bfloat16)
print(kernel.module.loss._step(8192, 151936, x, None, on_gpu=True))
print(kernel.module.tuning.serving)
"""


def test_a_bundled_kernel_is_handed_what_was_measured_here_when_it_is_loaded(tmp_path):
    """In a process of its own: what a process has imported, it keeps."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, serving = done.stdout.splitlines()
    assert rows == "2048"  # 1920 without
    assert serving == "{('linear_cross_entropy', 'bfloat16; 64 to 151936; 8192-16383 rows', -1): {'MIB': 594}}"


def test_a_kernel_of_others_is_asked_for_nothing(tmp_path):
    """`tuning.use` of a stranger's kernel may be anything."""
    files = {"__init__.py": "from . import tuning\n", "tuning.py": "def use(find):\n    raise SystemExit('asked')\n"}
    write(tmp_path / "norm" / "build" / "torch-cpu", files, name="norm", id_="_norm_1")
    kernel = Swapper(cache=tmp_path / "cache").kernel(f"dir://{tmp_path / 'norm'}")
    with pytest.raises(SystemExit, match="asked"):
        kernel.module.tuning.use(None)
