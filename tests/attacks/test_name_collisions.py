"""A repository with two names for one file: what is verified on Linux is not what macOS or Windows would load."""

import pytest

from kernelswap.errors import Refused


@pytest.mark.parametrize(
    ("honest", "evil"),
    [
        ("layers.py", "Layers.py"),
        ("layers.py", "LAYERS.PY"),
        ("café.py", "cafe\u0301.py"),
        ("fi.py", "\ufb01.py"),
        ("strasse.py", "straße.py"),
        ("sub/a.py", "Sub/a.py"),
        ("k.py", "\u212a.py"),  # the Kelvin sign
    ],
)
def test_one_file_under_two_names(world, refused, honest, evil):
    build = world.build({"__init__.py": "", honest: "V = 1\n", evil: world.evil})
    refused(Refused, "are one file where case or accents do not count", lambda: world.put(build))


@pytest.mark.parametrize(
    "name", ["__init__.py ", "__init__.py.", "con.py", "layers.py:stream", "layers\u200b.py", "\u202eyp.sreyal", "a\x1b[2Jb.py"]
)
def test_a_name_that_some_systems_read_differently(world, refused, name):
    build = world.build({"__init__.py": "", name: world.evil}, digest=False)
    error = refused(Refused, ".", lambda: world.put(build))
    assert str(error).isascii()
    assert str(error).replace("\n", "").isprintable()  # what is shown plays no tricks on a terminal
