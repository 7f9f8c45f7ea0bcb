"""One metadata.json, two readings: duplicate keys, another file at another time, numbers that are none."""

import json

import pytest
from tests.kernel_files import metadata_of

from kernelswap.errors import BadMetadata, Refused


@pytest.mark.parametrize(
    "text",
    [
        '{"id": "_honest", "id": "_evil"}',
        '{"digest": {"algorithm": "sha256", "algorithm": "sha512", "files": {}}}',
        '{"version": NaN}',
        '{"version": Infinity}',
        '{"name": "\\ud800"}',
        '\ufeff{"name": "a"}',
        '{"name": "a"} {"name": "b"}',
    ],
)
def test_what_two_readers_could_read_differently_is_not_read(world, refused, text):
    build = world.build({"__init__.py": world.evil})
    (build / "metadata.json").write_text(text)
    refused(BadMetadata, ".", lambda: world.put(build))


@pytest.mark.parametrize(
    "change", [{"backend": {"type": "cuda"}}, {"python-depends": ["einops"]}, {"id": "_my_norm_evil"}, {"version": 9}]
)
def test_one_metadata_to_be_chosen_by_and_another_to_be_loaded_with(world, refused, change):
    build = world.build({"__init__.py": world.evil})
    judged = metadata_of(build)
    about = json.loads((build / "metadata.json").read_text())
    (build / "metadata.json").write_text(json.dumps({**about, **change}))
    refused(Refused, "not the one that this build was chosen by", lambda: world.put(build, metadata=judged))


def test_metadata_that_disappears_after_the_choice(world, refused):
    build = world.build({"__init__.py": world.evil})
    judged = metadata_of(build)
    (build / "metadata.json").unlink()
    refused(Refused, r"metadata\.json is missing", lambda: world.put(build, metadata=judged))


def test_metadata_that_appears_after_the_choice(world, refused):
    build = world.build({"__init__.py": world.evil}, digest=False)
    about = (build / "metadata.json").read_bytes()
    (build / "metadata.json").unlink()
    judged = metadata_of(build)
    assert judged.synthesised
    (build / "metadata.json").write_bytes(about)
    refused(Refused, "not the one that this build was chosen by", lambda: world.put(build, metadata=judged))
