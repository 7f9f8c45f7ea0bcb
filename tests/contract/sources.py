"""What every Source promises. Inherit `SourceContract`, give it the fixture `subject`."""

import threading
from dataclasses import dataclass
from typing import Any

import pytest

from kernelswap.errors import UnknownKernel
from kernelswap.types import Requirement


@dataclass
class Subject:
    """A source, a requirement that it knows with the files of every build, and one that it does not know."""

    source: Any
    known: Requirement
    builds: dict[str, dict[str, bytes]]
    """variant -> path -> content, as it was put there."""
    unknown: Requirement


def on_disk(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


class SourceContract:
    @pytest.fixture
    def candidates(self, subject):
        found, _ = subject.source.find(subject.known)
        return {c.variant: c for c in found}

    def test_every_build_is_found(self, subject, candidates):
        assert candidates.keys() == subject.builds.keys()

    def test_a_candidate_carries_what_was_asked_and_names_bytes(self, subject, candidates):
        for candidate in candidates.values():
            assert candidate.requirement == subject.known
            assert len(candidate.commit) >= 40
            assert candidate.source == subject.source.key or candidate.source

    def test_finding_twice_finds_the_same(self, subject):
        first, _ = subject.source.find(subject.known)
        again, _ = subject.source.find(subject.known)
        assert set(first) == set(again)
        assert len(first) == len(set(first))

    def test_read_gives_the_bytes_of_a_file(self, subject, candidates):
        for variant, files in subject.builds.items():
            assert subject.source.read(candidates[variant], "metadata.json") == files.get("metadata.json")

    @pytest.mark.parametrize("name", ["no-such-file", "../../outside.txt", "/etc/passwd", "..", "", "metadata.json/x"])
    def test_read_gives_none_for_what_the_build_does_not_have(self, subject, candidates, name):
        for candidate in candidates.values():
            assert subject.source.read(candidate, name) is None

    def test_fetch_yields_exactly_the_files_of_the_build(self, subject, candidates, tmp_path):
        for variant, files in subject.builds.items():
            into = tmp_path / "into" / variant
            into.mkdir(parents=True)
            subject.source.fetch(candidates[variant], into)
            assert on_disk(into) == files

    def test_fetch_copies_contents_and_leaves_no_link(self, subject, candidates, tmp_path):
        variant = next(iter(subject.builds))
        (tmp_path / "into").mkdir()
        subject.source.fetch(candidates[variant], tmp_path / "into")
        assert not [p for p in (tmp_path / "into").rglob("*") if p.is_symlink() or (p.is_file() and p.stat().st_nlink > 1)]

    def test_fetch_writes_nothing_beside_its_target(self, subject, candidates, tmp_path):
        (tmp_path / "target" / "into").mkdir(parents=True)
        subject.source.fetch(next(iter(candidates.values())), tmp_path / "target" / "into")
        assert [p.name for p in (tmp_path / "target").iterdir()] == ["into"]

    def test_two_threads_may_fetch_at_once(self, subject, candidates, tmp_path):
        variant = next(iter(subject.builds))
        failed = []

        def fetch(into):
            try:
                into.mkdir()
                subject.source.fetch(candidates[variant], into)
            except Exception as e:  # noqa: BLE001 -- the assertion below shows it
                failed.append(e)

        threads = [threading.Thread(target=fetch, args=(tmp_path / f"t{i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert all(on_disk(tmp_path / f"t{i}") == subject.builds[variant] for i in range(4))

    def test_an_unknown_name_says_what_was_asked_what_is_so_and_what_to_do(self, subject):
        with pytest.raises(UnknownKernel) as e:
            subject.source.find(subject.unknown)
        assert str(subject.unknown) in e.value.asked
        assert e.value.found
        assert e.value.todo
