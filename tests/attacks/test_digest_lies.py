"""Digests that do not match, do not cover, or cover too much."""

import json

from tests.kernel_files import b64

from kernelswap.errors import BadMetadata, Refused


def test_an_init_that_differs_from_its_digest(world, refused):
    build = world.build({"__init__.py": "V = 1\n", "layers.py": ""})
    (build / "__init__.py").write_text(world.evil)
    refused(Refused, r"__init__\.py does not have the digest", lambda: world.put(build))


def test_equal_length_and_equal_time_do_not_help(world, refused):
    import os

    build = world.build({"__init__.py": "#" * len(world.evil)})
    found = (build / "__init__.py").stat()
    (build / "__init__.py").write_text(world.evil)
    os.utime(build / "__init__.py", ns=(found.st_atime_ns, found.st_mtime_ns))
    refused(Refused, "does not have the digest", lambda: world.put(build))


def test_a_digest_list_that_omits_a_file(world, refused):
    build = world.build({"__init__.py": "from . import extra\n"})
    (build / "extra.py").write_text(world.evil)
    refused(Refused, r"extra\.py is not listed", lambda: world.put(build))


def test_a_digest_list_that_omits_a_file_in_a_directory_named_like_an_exception(world, refused):
    """metadata.json is outside the digests at the top only."""
    build = world.build({"__init__.py": "from . import sub\n"})
    (build / "sub").mkdir()
    (build / "sub" / "metadata.json").write_text(world.evil)
    refused(Refused, r"sub/metadata\.json is not listed", lambda: world.put(build))


def test_bytecode_is_outside_the_digests_and_refused_for_that(world, refused):
    build = world.build({"__init__.py": "V = 1\n"})
    (build / "__pycache__").mkdir()
    (build / "__pycache__" / "__init__.cpython-311.pyc").write_bytes(b"evil")
    refused(Refused, "is bytecode", lambda: world.put(build))


def test_a_listed_file_that_is_missing(world, refused):
    build = world.build({"__init__.py": "V = 1\n", "guard.py": ""})
    (build / "guard.py").unlink()
    refused(Refused, r"guard\.py is missing", lambda: world.put(build))


def test_an_algorithm_that_is_none(world, refused):
    build = world.build({"__init__.py": world.evil})
    about = json.loads((build / "metadata.json").read_text())
    about["digest"] = {"algorithm": "crc32", "files": {"__init__.py": b64(b"")}}
    (build / "metadata.json").write_text(json.dumps(about))
    refused(BadMetadata, "crc32", lambda: world.put(build))
