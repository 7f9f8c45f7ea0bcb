import ast
import os
import pathlib
import subprocess
import sys

import pytest

import kernelswap
from kernelswap.errors import TableError
from kernelswap.sources.environment import Environment


def read(**variables):
    return Environment.read(variables)


@pytest.mark.parametrize(
    ("variables", "cache"),
    [
        ({"KERNELS_CACHE": "/k", "HF_HUB_CACHE": "/h", "HF_HOME": "/home"}, "/k"),
        ({"HF_HUB_CACHE": "/h", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/home"}, "/h"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/home"}, "/old"),
        ({"HF_HOME": "/home", "XDG_CACHE_HOME": "/xdg"}, "/home/hub"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/huggingface/hub"),
        ({}, "~/.cache/huggingface/hub"),
    ],
)
def test_the_hub_cache_is_where_the_other_tools_have_it(variables, cache):
    assert read(**variables).hub_cache == pathlib.Path(cache).expanduser()


def test_the_hub_cache_is_where_huggingface_hub_has_it():
    variables = {"HF_HOME": "/somewhere", "PATH": os.environ["PATH"]}
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert Environment.read(variables).hub_cache == pathlib.Path(done.stdout.strip())


def test_our_own_cache_is_apart():
    assert read(KERNELSWAP_CACHE="/own").cache == pathlib.Path("/own")
    assert read().cache.name == "kernelswap"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("org/a=/x", {"org/a": "/x"}),
        ("org/a=/x:org/b=/y", {"org/a": "/x", "org/b": "/y"}),
        ("org/a=/x;org/b=/y;", {"org/a": "/x", "org/b": "/y"}),
        (r"org/a=C:\x:org/b=D:/y", {"org/a": r"C:\x", "org/b": "D:/y"}),
        (r"org/a=C:\x;org/b=D:\y", {"org/a": r"C:\x", "org/b": r"D:\y"}),
        ("org/a=/x:org/a=/z", {"org/a": "/x"}),
        (" org/a = /with space/x : org/b=rel/y", {"org/a": "/with space/x", "org/b": "rel/y"}),
        ("", {}),
    ],
)
def test_local_kernels_are_read_with_drive_letters(text, found):
    assert dict(read(LOCAL_KERNELS=text).local_kernels) == {name: pathlib.Path(path) for name, path in found.items()}


def test_every_bad_entry_is_named():
    with pytest.raises(TableError) as e:
        read(LOCAL_KERNELS="org/a:org/b=/x:org/c=", HF_HUB_ETAG_TIMEOUT="soon")
    assert isinstance(e.value, ValueError)
    assert [line.split(",")[0] for line in e.value.found.splitlines()] == [
        "LOCAL_KERNELS: 'org/a' is not repository=directory",
        "LOCAL_KERNELS: 'org/c=' is not repository=directory",
        "HF_HUB_ETAG_TIMEOUT is 'soon'",
    ]


@pytest.mark.parametrize(("value", "off"), [("0", 1), ("off", 1), ("No", 1), ("FALSE", 1), ("1", 0), ("yes", 0), ("", 0)])
def test_use_hub_kernels_disables(value, off):
    disabled = read(USE_HUB_KERNELS=value).disabled
    assert disabled == (f"USE_HUB_KERNELS is {value}" if off else None)


@pytest.mark.parametrize(("value", "off"), [("1", 1), ("2", 1), ("0", 0), ("", 0)])
def test_disable_kernel_mapping_disables(value, off):
    assert bool(read(DISABLE_KERNEL_MAPPING=value).disabled) == bool(off)


@pytest.mark.parametrize(
    ("name", "value", "is_"),
    [("HF_HUB_OFFLINE", "1", True), ("TRANSFORMERS_OFFLINE", "YES", True), ("HF_HUB_OFFLINE", "0", False)],
)
def test_offline(name, value, is_):
    assert read(**{name: value}).offline is is_


def test_the_endpoint_has_no_slash_at_the_end_and_a_default():
    assert read(HF_ENDPOINT="https://mirror.example/").endpoint == "https://mirror.example"
    assert read(HF_ENDPOINT="").endpoint == "https://huggingface.co"


def test_a_token_is_not_shown():
    environment = read(HF_TOKEN="hf_secret")
    assert environment.token == "hf_secret"
    assert "hf_secret" not in repr(environment)
    assert read(HF_TOKEN="hf_secret", HF_HUB_DISABLE_IMPLICIT_TOKEN="1").token is None


def test_telemetry_is_off_where_anybody_said_so():
    assert read().telemetry
    assert not read(DO_NOT_TRACK="1").telemetry


def test_sources_read_the_environment_in_one_place():
    root = pathlib.Path(kernelswap.__file__).parent / "sources"
    readers = [
        path.name
        for path in root.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
    ]
    assert readers == []
