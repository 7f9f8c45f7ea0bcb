"""What was loaded is on record, whole lines only, and never at the price of a load."""

import json
import logging
import os
import pickle
import subprocess
import sys
import threading

import pytest
from tests.kernel_files import Folder, candidate, metadata_of, write
from tests.swapping import CPU, Near

from kernelswap.api import Swapper
from kernelswap.audit import KEPT, Audit
from kernelswap.errors import LoadFailed
from kernelswap.store import Store


@pytest.fixture
def make_swapper(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return lambda **more: Swapper(cache=tmp_path / "cache", prover=Near(), machine=CPU, offline=True, **more)


@pytest.fixture
def artifact(tmp_path):
    root = write(tmp_path / "build")
    return Store(tmp_path / "store").materialize(candidate(), metadata_of(root), Folder(root))


def in_another_process(code, audit, artifact):
    values = pickle.dumps((audit, artifact))
    return subprocess.Popen([sys.executable, "-c", f"import pickle; audit, artifact = pickle.loads({values!r})\n{code}"])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_first_load_in_a_process_is_one_line_that_says_what_from_where_and_why(make_swapper, make_repo, tmp_path):
    root = make_repo("audited", {"torch-cpu": "VALUE = 1"})
    kernel = make_swapper().kernel(f"dir://{root}")
    make_swapper().kernel(f"dir://{root}")
    (line,) = lines(tmp_path / "cache" / "audit.jsonl")
    assert line["event"] == "load"
    assert line["digest"] == kernel.artifact.digest
    assert (line["spec"], line["source"], line["variant"]) == (f"dir://{root}", "dir", "torch-cpu")
    assert (line["name"], line["commit"]) == (kernel.artifact.candidate.name, kernel.artifact.candidate.commit)
    assert {verifier for verifier, _ in line["evidence"]} >= {"contents", "digest", "policy", "publisher"}
    assert line["process"]["pid"] == os.getpid()
    assert line["time"].endswith("+00:00")


def test_another_process_has_a_line_of_its_own(artifact, tmp_path):
    audit = Audit(tmp_path / "audit.jsonl")
    audit.loading(artifact)
    other = in_another_process("audit.loading(artifact); audit.loading(artifact)", audit, artifact)
    assert other.wait() == 0
    assert [line["process"]["pid"] for line in lines(audit.path)] == [os.getpid(), other.pid]


def test_looking_is_not_loading(make_swapper, make_repo, tmp_path):
    make_swapper().find(f"dir://{make_repo('looked-at', {'torch-cpu': ''})}")
    assert not (tmp_path / "cache" / "audit.jsonl").exists()


def test_a_kernel_that_ends_the_process_on_import_is_on_record(make_repo, tmp_path):
    root = make_repo("deadly", {"torch-universal": "import os; os._exit(7)"})
    command = [sys.executable, "-m", "kernelswap", "load", f"dir://{root}", "--cache", str(tmp_path / "cache"), "--offline"]
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "config"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 7
    assert [line["spec"] for line in lines(tmp_path / "cache" / "audit.jsonl")] == [f"dir://{root}"]


def test_an_import_that_fails_says_so_and_is_recorded_again_when_tried_again(make_swapper, make_repo, tmp_path):
    root, swapper = make_repo("failing", {"torch-cpu": "1 / 0"}), make_swapper()
    for _ in range(2):
        with pytest.raises(LoadFailed):
            swapper.kernel(f"dir://{root}")
    found = lines(tmp_path / "cache" / "audit.jsonl")
    assert [line["event"] for line in found] == ["load", "failed"] * 2
    assert "ZeroDivisionError" in found[1]["reason"]


@pytest.mark.parametrize("obstacle", ["directory", "link", "fifo", "parent"])
def test_a_log_that_cannot_be_written_is_noted_once_and_breaks_no_load(obstacle, make_swapper, make_repo, tmp_path, caplog):
    log = tmp_path / "cache" / "audit.jsonl"
    log.parent.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    swapper = make_swapper()
    if obstacle == "directory":
        log.mkdir()
    elif obstacle == "link":
        log.symlink_to(elsewhere)
    elif obstacle == "fifo":
        os.mkfifo(log)
    else:
        swapper.audit = Audit(elsewhere / "audit.jsonl")
    with caplog.at_level(logging.WARNING, "kernelswap.audit"):
        for value in (1, 2):
            assert value == swapper.load(f"dir://{make_repo(f'{obstacle}{value}', {'torch-cpu': f'VALUE = {value}'})}").VALUE
    assert len(caplog.records) == 1
    assert elsewhere.read_text() == "mine"


def test_lines_of_threads_and_processes_are_whole_and_all_there(artifact, tmp_path):
    audit = Audit(tmp_path / "audit.jsonl")

    def write_many():
        for _ in range(50):
            audit.failed(artifact, "x" * 1500)

    others = [in_another_process("for _ in range(50): audit.failed(artifact, 'x' * 1500)", audit, artifact) for _ in range(2)]
    threads = [threading.Thread(target=write_many) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [other.wait() for other in others] == [0, 0]
    assert len(lines(audit.path)) == 250


def test_a_full_log_is_put_aside_and_the_oldest_goes(artifact, tmp_path):
    audit = Audit(tmp_path / "audit.jsonl", max_bytes=4000)
    for n in range(40):
        audit.failed(artifact, f"{n:04}" + "x" * 500)
    files = sorted(tmp_path.glob("audit*.jsonl"))
    assert len(files) == KEPT + 1
    assert all(file.stat().st_size < 8000 for file in files)
    newest_first = [audit.path, *(tmp_path / f"audit.{n}.jsonl" for n in range(1, KEPT + 1))]
    numbers = [int(line["reason"][:4]) for file in reversed(newest_first) for line in lines(file)]
    assert numbers == list(range(numbers[0], 40))  # in order, and nothing in between is lost
