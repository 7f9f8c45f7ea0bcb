"""The public names are those of `__all__`, each is where it is said to be, and nothing else is public."""

import inspect
import subprocess
import sys

import pytest

import kernelswap
from kernelswap import api


@pytest.mark.parametrize("name", kernelswap.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name):
    value = getattr(kernelswap, name)
    assert name == "__version__" or (value.__doc__ or "").strip()


def test_all_is_sorted_and_is_what_dir_shows():
    assert kernelswap.__all__ == sorted(kernelswap.__all__)
    assert dir(kernelswap) == kernelswap.__all__


def test_all_names_what_can_be_asked_for_and_nothing_more():
    assert set(kernelswap._WHERE) | {"__version__"} == set(kernelswap.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kernelswap.nothing


def test_a_public_name_stays_itself_when_submodules_are_imported():
    code = (
        "import kernelswap, importlib\n"
        "for name in ('api', 'loader', 'plan', 'sites', 'apply', 'cli'): importlib.import_module(f'kernelswap.{name}')\n"
        "assert callable(kernelswap.load) and callable(kernelswap.explain) and callable(kernelswap.find) and callable(kernelswap.swap)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_functions_are_methods_of_one_swapper():
    for name in ("explain", "find", "kernelize", "load", "unkernelize"):
        method = inspect.signature(getattr(api.Swapper, name)).parameters
        function = inspect.signature(getattr(api, name)).parameters
        assert list(function) == [p for p in method if p != "self"]


def test_the_default_swapper_is_made_once_even_by_many_threads(monkeypatch, tmp_path):
    import threading

    monkeypatch.setenv("KERNELSWAP_CACHE", str(tmp_path))
    monkeypatch.setattr(api, "_default", None)
    found = []
    threads = [threading.Thread(target=lambda: found.append(api.default())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(s) for s in found}) == 1
