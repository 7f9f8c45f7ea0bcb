"""Fixtures for every test: a hub on loopback, caches below tmp_path, and kernels made in one line."""

import os
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings
from tests.hub import Hub, kernel_files
from tests.kernels import layers_alone, layers_build, native_build, native_of_a_hub  # noqa: F401  # fixtures

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # a busy machine is no finding; pytest-timeout ends what hangs


def pytest_configure(config):
    """A home of this run: tests see nothing of what is kept for the user, and leave nothing there."""
    if not hasattr(config, "workerinput"):  # workers have the environment of the process that starts them
        os.environ["HOME"] = home = tempfile.mkdtemp(prefix="kernelswap-tests-")
        config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
        for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
            os.environ.pop(name, None)


@pytest.fixture(scope="session")
def _hubs():
    """Starting one takes longer than most tests: it is used again until a test stops it."""
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
    started = []
    yield started
    for running in started:
        running.stop()


@pytest.fixture
def hub(_hubs):
    """An empty hub on loopback: `hub.repo("org/name").branch("v1", files={...})`, `hub.url`."""
    if not _hubs or _hubs[-1].stopped:
        _hubs.append(Hub().__enter__())
    _hubs[-1].reset()
    yield _hubs[-1]
    _hubs[-1].reset()


@pytest.fixture
def hub_cache(tmp_path):
    """An empty cache directory in the hub's layout."""
    cache = tmp_path / "hf-cache"
    cache.mkdir()
    return cache


@pytest.fixture
def make_repo(tmp_path):
    """Write a kernel repository to disk: `make_repo("demo", {"torch-cpu": "code of __init__.py"})` gives its path.

    A value may also be a dict of keywords for `tests.hub.kernel_files`.
    """

    def make(name, variants, *, where=None, **more):
        root = (where or tmp_path / "repos") / name
        for variant, given in variants.items():
            keywords = given if isinstance(given, dict) else {"code": given}
            for path, data in kernel_files(variant, name=name, **{**more, **keywords}).items():
                target = root / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
        return root

    return make


@pytest.fixture
def as_default_hub(hub, hub_cache, monkeypatch):
    """Point this process's `huggingface_hub` (and so Transformers) at `hub` and at `hub_cache`; gives the hub."""
    import huggingface_hub.hf_api
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub_cache))
    return hub


@pytest.fixture
def one_thread():
    """Torch computes in one thread: what small models are quickest with, and what two workers do not fight over."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium by Playwright; skips with the reason where either is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium on the PATH ({', '.join(names)}); apt-get install chromium-headless-shell")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])  # tests may run as root, on our own page
        yield running
        running.close()
