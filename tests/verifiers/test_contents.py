import os
import socket

import pytest
from tests.kernel_files import candidate, write

from kernelswap.errors import Refused
from kernelswap.types import Metadata
from kernelswap.verifiers.contents import ContentsVerifier

ABOUT = Metadata("my-norm", "_my_norm", 1, "MIT", "cpu")


def check(root, **limits):
    return ContentsVerifier(**limits).check(candidate(), ABOUT, root)


def test_an_honest_build_passes(tmp_path):
    build = write(
        tmp_path / "b",
        {"__init__.py": "", "sub/deep/data.json": "{}", "_my_norm.abi3.so": b"x", ".gitattributes": "", "a b.py": ""},
    )
    assert check(build).statement.endswith("no links, no bytecode, no odd names")


@pytest.mark.parametrize(
    "name",
    [
        "__pycache__/a.py", "a.pyc", "a.pyo", "sub/b.pyc", "a:b.py", "a\\b.py", "a\nb.py", "a\u202eyp.py", "a\u200b.py", "a\x7f.py",
        "con", "CON.py", "nul.txt", "com1.log", "aux.h", "LPT9", " a.py", "a.py ", "a.", "a*b", "a?b", "a|b", 'a"b', "<a>", "a\u2028b",
    ],
)  # fmt: skip  # one name per case
def test_an_odd_name_is_refused(tmp_path, name):
    build = write(tmp_path / "b")
    path = build / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    with pytest.raises(Refused) as e:
        check(build)
    assert e.value.found.isascii()  # what is shown cannot play tricks on a terminal


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    build = write(tmp_path / "b")
    (build / os.fsdecode(b"a\xff.py")).write_text("")
    with pytest.raises(Refused, match="not UTF-8"):
        check(build)


@pytest.mark.parametrize(
    ("one", "other"),
    [("Layers.py", "layers.py"), ("é.py", "e\u0301.py"), ("ﬁ.py", "fi.py"), ("straße.py", "STRASSE.py"), ("D/a.py", "d/a.py")],
)
def test_two_names_for_one_file_are_refused(tmp_path, one, other):
    with pytest.raises(Refused, match="are one file where case or accents do not count"):
        check(write(tmp_path / "b", {"__init__.py": "", one: "1", other: "2"}))


def test_links_are_refused_whatever_they_point_to(tmp_path):
    build = write(tmp_path / "b")
    (build / "in.py").symlink_to("__init__.py")
    (build / "out.py").symlink_to("/etc/passwd")
    (build / "dir").symlink_to(tmp_path)
    (build / "loop").symlink_to("loop")
    os.link(build / "layers.py", build / "hard.py")
    with pytest.raises(Refused) as e:
        check(build)
    for line in (
        "'in.py' is a symbolic link",
        "'out.py' is a symbolic link",
        "'dir' is a symbolic link",
        "'loop' is",
        "'hard.py' is a hard link",
        "'layers.py' is a hard link",
    ):
        assert line in e.value.found


def test_fifos_sockets_and_setuid_are_refused_without_being_opened(tmp_path, monkeypatch):
    build = write(tmp_path / "b")
    os.mkfifo(build / "pipe.py")
    monkeypatch.chdir(build)
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("sock")
        (build / "layers.py").chmod(0o4755)
        with pytest.raises(Refused) as e:
            check(build)
    for line in ("'pipe.py' is a fifo", "'sock' is a socket", "'layers.py' runs as another user"):
        assert line in e.value.found


@pytest.mark.skipif(os.name == "nt" or os.getuid() != 0, reason="only root makes devices")
def test_devices_are_refused(tmp_path):
    build = write(tmp_path / "b")
    try:
        os.mknod(build / "null", 0o20666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("not even root may, in here")
    with pytest.raises(Refused, match="a character device"):
        check(build)


def test_bombs_by_count_size_depth_and_length(tmp_path):
    build = write(tmp_path / "b", {f"f{i}.py": "x" for i in range(30)})
    with pytest.raises(Refused, match="more than 20 files"):
        check(build, max_files=20)
    with pytest.raises(Refused, match="bytes in all, at most 100"):
        check(build, max_bytes=100)
    with pytest.raises(Refused, match="at most 10 are accepted"):
        check(build, max_file_bytes=10)
    deep = write(tmp_path / "d", {"/".join("a" * 40) + "/x.py": ""})
    with pytest.raises(Refused, match="directories deep"):
        check(deep)
    long = write(tmp_path / "l", {"/".join(["d" * 200] * 6) + "/x.py": ""})
    with pytest.raises(Refused, match="too long a name"):
        check(long)


def test_a_sparse_file_counts_with_the_size_that_it_claims(tmp_path):
    build = write(tmp_path / "b")
    with (build / "big.bin").open("wb") as file:
        file.truncate(5 << 30)
    with pytest.raises(Refused, match="5368709120 bytes"):
        check(build)


def test_an_empty_build_is_refused(tmp_path):
    (tmp_path / "b" / "sub").mkdir(parents=True)
    with pytest.raises(Refused, match="no file in it"):
        check(tmp_path / "b")


def test_a_long_list_of_problems_is_cut_and_says_so(tmp_path):
    build = write(tmp_path / "b", {f"f{i}.pyc": "x" for i in range(100)})
    with pytest.raises(Refused) as e:
        check(build)
    assert len(e.value.found.splitlines()) == 21
    assert e.value.found.endswith("and 80 more")
