"""Verdicts outlive the process, belong to one user, and cannot be forged by who can write the cache."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from kernelswap.errors import BadMetadata
from kernelswap.proof import Verdicts
from kernelswap.types import Verdict

KEY = "ab" * 32
VERDICT = Verdict(True, "as accurate", KEY, 1e-3, 5e-4, None, 2.0, (("reference", "float64"),))


@pytest.fixture
def store(tmp_path):
    return Verdicts(tmp_path / "verdicts", key=tmp_path / "home" / "key")


def again(store):
    """As another process sees it."""
    return Verdicts(store.path, key=store._key_file)


def file_of(store):
    return store.path / KEY[:2] / f"{KEY}.json"


def test_what_was_put_is_found_by_another_process(store):
    assert store.get(KEY) is None
    store.put(VERDICT)
    assert again(store).get(KEY) == VERDICT
    assert list(again(store)) == [VERDICT]
    store.forget(KEY)
    assert again(store).get(KEY) is None


@pytest.mark.parametrize(
    "tamper",
    [
        lambda raw: raw["verdict"].update(accepted=not raw["verdict"]["accepted"]),
        lambda raw: raw["verdict"].update(reason="fine"),
        lambda raw: raw.update(mac=""),
        lambda raw: raw.pop("mac"),
        lambda raw: raw.update(format=2),
        lambda raw: raw.update(verdict=None),
    ],
)
def test_a_changed_file_is_no_verdict(store, tamper):
    store.put(replace(VERDICT, accepted=False))
    raw = json.loads(file_of(store).read_text())
    tamper(raw)
    file_of(store).write_text(json.dumps(raw))
    assert again(store).get(KEY) is None
    store = again(store)
    store.put(VERDICT)
    assert again(store).get(KEY) == VERDICT


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b"[" * 100_000, b" " * (1 << 17)])
def test_a_damaged_file_is_no_verdict(store, text):
    store.put(VERDICT)
    file_of(store).write_bytes(text)
    assert again(store).get(KEY) is None
    assert list(again(store)) == []


def test_a_verdict_of_another_user_is_not_ours(store, tmp_path):
    other = Verdicts(store.path, key=tmp_path / "other home" / "key")
    other.put(VERDICT)
    assert store.get(KEY) is None


def test_a_verdict_under_another_name_is_not_taken(store):
    store.put(VERDICT)
    elsewhere = store.path / "cd" / f"{'cd' * 32}.json"
    elsewhere.parent.mkdir()
    file_of(store).rename(elsewhere)
    assert again(store).get("cd" * 32) is None
    assert list(again(store)) == []


@pytest.mark.skipif(os.name != "posix", reason="modes are posix")
def test_the_secret_is_the_users_alone(store):
    store.put(VERDICT)
    assert store._key_file.stat().st_mode & 0o777 == 0o600
    assert len(store._key_file.read_bytes()) == 32
    store._key_file.chmod(0o644)
    assert again(store).get(KEY) is None, "what others could read, others could sign with"
    second = again(store)
    second.put(VERDICT)
    assert store._key_file.stat().st_mode & 0o777 == 0o600
    assert again(second).get(KEY) == VERDICT


def test_no_place_for_a_secret_or_for_verdicts_keeps_them_in_this_process(tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = Verdicts(tmp_path / "file" / "verdicts", key=tmp_path / "file" / "key")
    store.put(VERDICT)
    assert store.get(KEY) == VERDICT
    assert again(store).get(KEY) is None
    assert list(store) == []


def test_keys_are_digests_and_nothing_else(store):
    for key in ("../../etc/passwd", "", "AB" * 32, "zz"):
        with pytest.raises(ValueError, match="hexadecimal"):
            store.get(key)
    with pytest.raises(ValueError, match="holds for nothing"):
        store.put(Verdict(True, "of what?"))


def test_exported_verdicts_are_taken_over_by_who_imports_them(store, tmp_path):
    store.put(VERDICT)
    exported = json.loads(json.dumps(store.export()))
    other = Verdicts(tmp_path / "elsewhere", key=tmp_path / "other home" / "key")
    assert other.import_(exported) == 1
    assert again(other).get(KEY) == VERDICT


@pytest.mark.parametrize(
    "exported",
    [
        {},
        {"format": 9, "verdicts": []},
        {"format": 1},
        {"format": 1, "verdicts": [{"accepted": True}]},
        {"format": 1, "verdicts": [7]},
    ],
)
def test_what_is_no_export_is_refused_whole(store, exported):
    with pytest.raises(BadMetadata):
        store.import_(exported)
    assert list(store) == []


def test_threads_and_processes_share_one_store(store):
    keys = [f"{i:02x}" * 32 for i in range(32)]

    def write(part):
        for key in part:
            store.put(replace(VERDICT, key=key))

    threads = [threading.Thread(target=write, args=(keys[i::4],)) for i in range(4)]
    code = (
        "import sys; from pathlib import Path; from dataclasses import replace\n"
        "from kernelswap.proof.verdicts import Verdicts; from kernelswap.types import Verdict\n"
        "s = Verdicts(Path(sys.argv[1]), key=Path(sys.argv[2]))\n"
        "for i in range(32): s.put(Verdict(True, 'as accurate', f'{i:02x}' * 32))\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(store.path), str(store._key_file)], env={**os.environ, "PYTHONPATH": "src"}
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [child.wait() for child in children] == [0, 0]
    assert {v.key for v in again(store)} == set(keys)
    assert not list(store.path.rglob("*.part"))
