"""The hub of the tests is a hub: the real client agrees."""

import hashlib
import pathlib

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from packaging.version import Version
from tests.hub import Hub, kernel_files
from tests.small import SIZE, qwen3


def download(hub, cache, name, path, **more):
    at = huggingface_hub.hf_hub_download(
        name, path, repo_type=more.pop("repo_type", "kernel"), endpoint=hub.url, cache_dir=cache, **more
    )
    return pathlib.Path(at).read_bytes()


def test_the_client_lists_refs_and_trees_over_several_pages():
    with Hub(page=3) as hub:
        files = kernel_files("torch-cpu", files={f"data/{i}.json": "{}" for i in range(10)})
        commit = hub.repo("org/demo").branch("v1", files=files)
        hub.repo("org/demo").tag("v1.0.0", "v1")
        api = huggingface_hub.HfApi(endpoint=hub.url)
        refs = api.list_repo_refs("org/demo", repo_type="kernel")
        assert [(b.name, b.target_commit) for b in refs.branches + refs.tags] == [("v1", commit), ("v1.0.0", commit)]
        tree = api.list_repo_tree("org/demo", recursive=True, revision="v1", repo_type="kernel")
        assert {e.path for e in tree if hasattr(e, "size")} == set(files)
        assert len(hub.requests("*/tree/*")) > 1


def test_the_client_downloads_small_and_large_files_and_sends_no_token_to_another_host(hub, hub_cache):
    big = bytes(range(256)) * 64
    hub.repo("org/demo", private=True).branch("main", files={"a.txt": "hello", "k.so": big})
    for path, want in (("a.txt", b"hello"), ("k.so", big)):
        assert download(hub, hub_cache, "org/demo", path, token="hf_good") == want
    to_lfs = [headers for _, path, headers in hub.log if path.startswith("/lfs/")]
    assert to_lfs
    assert not any("authorization" in headers for headers in to_lfs)


@pytest.mark.skipif(Version(huggingface_hub.__version__) < Version("1.22"), reason="clients of that age do not resume")
def test_a_drop_in_the_middle_is_resumed_with_a_range(hub, hub_cache):
    big = hashlib.sha256(b"x").digest() * 4096
    hub.repo("org/demo").branch("main", files={"k.so": big})
    hub.fault("/lfs/*", "drop", times=1, method="GET")
    assert download(hub, hub_cache, "org/demo", "k.so") == big
    ranges = [headers.get("range") for _, path, headers in hub.log if path.startswith("/lfs/")]
    assert len(ranges) == 2


@pytest.mark.parametrize(
    ("name", "revision", "error"),
    [
        ("org/none", "main", RepositoryNotFoundError),
        ("org/private", "main", RepositoryNotFoundError),
        ("org/gated", "main", GatedRepoError),
        ("org/demo", "v9", RevisionNotFoundError),
    ],
)
def test_refusals_are_the_ones_the_client_knows(hub, hub_cache, name, revision, error):
    hub.repo("org/demo").branch("main", files={"a": "a"})
    hub.repo("org/private", private=True).branch("main", files={"a": "a"})
    hub.repo("org/gated", gated=True).branch("main", files={"a": "a"})
    with pytest.raises(error):
        download(hub, hub_cache, name, "a", revision=revision, token=False)


def test_transformers_loads_a_model_from_it(as_default_hub, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    qwen3().save_pretrained(tmp_path / "model")
    files = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    as_default_hub.model("org/tiny").branch("main", files=files)
    model = transformers.AutoModelForCausalLM.from_pretrained("org/tiny")
    assert model.config.hidden_size == SIZE["hidden_size"]
    assert as_default_hub.requests("/org/tiny/resolve/*")


def test_an_organisation_says_whether_it_is_trusted(hub):
    hub.organization("org", trusted=True)
    import urllib.request

    with urllib.request.urlopen(f"{hub.url}/api/organizations/org/overview") as answer:
        assert b'"trustedKernelPublisher":true' in answer.read()
