"""A small repository that becomes a large one: by number, by size, by depth, by length."""

import os

import pytest
from tests.kernel_files import Folder

from kernelswap import store
from kernelswap.errors import BadMetadata, Refused
from kernelswap.verifiers.contents import ContentsVerifier


def test_a_million_files_are_refused_after_the_first_too_many(world, refused, monkeypatch):
    monkeypatch.setattr(store, "_CONTENTS", ContentsVerifier(max_files=100))
    build = world.build({"__init__.py": "", **{f"{i}.txt": "" for i in range(200)}}, digest=False)
    refused(Refused, "more than 100 files", lambda: world.put(build))


def test_directories_count_as_files(world, refused, monkeypatch):
    monkeypatch.setattr(store, "_CONTENTS", ContentsVerifier(max_files=100))
    build = world.build({"__init__.py": ""})
    for i in range(200):
        (build / f"d{i}").mkdir()
    refused(Refused, "more than 100 files", lambda: world.put(build))


def test_a_sparse_terabyte_is_refused_without_being_read(world, refused):
    class Sparse(Folder):
        def fetch(self, candidate, into):
            super().fetch(candidate, into)
            with (into / "big.bin").open("wb") as file:
                file.truncate(1 << 40)

    build = world.build({"__init__.py": ""}, digest=False)
    refused(Refused, "1099511627776 bytes", lambda: world.put(build, source=Sparse(build)))


def test_a_fifo_does_not_hang_anything(world, refused):
    class Blocks(Folder):
        def fetch(self, candidate, into):
            super().fetch(candidate, into)
            os.mkfifo(into / "layers.py")

    build = world.build({"__init__.py": ""}, digest=False)
    refused(Refused, r"'layers\.py' is a fifo", lambda: world.put(build, source=Blocks(build)))


def test_a_file_that_becomes_a_fifo_in_the_store_does_not_hang_anything(world, refused):
    from kernelswap.errors import Tampered

    artifact = world.put(world.build({"__init__.py": "", "layers.py": ""}))
    (artifact.path / "layers.py").unlink()
    os.mkfifo(artifact.path / "layers.py")
    refused(Tampered, r"'layers\.py' cannot be read", lambda: world.load(artifact))


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "' + "a" * (2 << 20) + '"}',
        '{"name": "' + "a" * 10_000 + '"}',
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 1000 + "1" + "}" * 1000,
        '{"version": ' + "9" * 100_000 + "}",
        '{"digest": {"algorithm": "sha256", "files": {' + ",".join(f'"{i}":""' for i in range(30_000)) + "}}}",
    ],
    ids=["huge file", "huge string", "deep list", "deep object", "huge number", "huge digest list"],
)
def test_metadata_is_read_within_hard_limits(world, refused, text):
    build = world.build({"__init__.py": world.evil})
    (build / "metadata.json").write_text(text)
    error = refused(BadMetadata, ".", lambda: world.put(build))
    assert len(str(error)) < 4000
