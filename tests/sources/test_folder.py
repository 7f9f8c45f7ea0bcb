"""Folders of kernels: in a directory, behind a web server, in an S3, in a zip. Each is written by `Mirror` from a hub."""

import contextlib
import functools
import http.server
import json
import threading
import time
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.contract.sources import SourceContract, Subject, on_disk
from tests.hub import kernel_files

from kernelswap.errors import BadMetadata, NotCached, Refused, StoreError, TableError, UnknownKernel, Unreachable
from kernelswap.sources import folder_files as folder
from kernelswap.sources.folder import FolderSource, Memory
from kernelswap.sources.folder_transports import DirectoryTransport, FsspecTransport, HttpTransport, transport
from kernelswap.sources.hub import HubSource
from kernelswap.sources.mirror import Mirror
from kernelswap.types import Requirement

NAME = "org/demo"
CODE = {"torch-cpu": "x = 1", "torch-universal": "x = 2"}
MORE = {"sub/data.json": b"{}", "empty.py": b"", "big.bin": bytes(range(256)) * 600}


def build_of(variant):
    return {p.removeprefix(f"build/{variant}/"): d for p, d in kernel_files(variant, CODE[variant], files=MORE).items()}


@pytest.fixture
def mirrored(hub, hub_cache, tmp_path):
    """A folder with two versions, a tag and a repository that moved."""
    repo = hub.repo(NAME)
    repo.branch("v1", {p: d for v in CODE for p, d in kernel_files(v, CODE[v], files=MORE).items()})
    repo.branch("v2", kernel_files("torch-cpu", "x = 3"))
    repo.tag("v2.1.0", "v2")
    hub.repo("org/old").branch("v1", {"kernel-status.toml": f'kind = "redirect"\ndestination = "{NAME}"\n'})
    source, root = HubSource(hub_cache, hub.url), tmp_path / "folder"
    for spec in (Requirement(NAME, version=1), Requirement(NAME, version=2), Requirement("org/old", version=1)):
        Mirror(root).add(source, spec)
    return root


class Server:
    """A static web server on loopback that counts, and that can fail."""

    def __init__(self, root):
        self.asked, self.faults, self.closed = [], [], False
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                if outer.closed:  # a connection that was kept open ends without an answer
                    self.close_connection = True
                    return
                outer.asked.append((self.path, dict(self.headers)))
                fault = outer.faults.pop(0) if outer.faults else None
                if fault is None:
                    super().do_GET()
                else:
                    fault(self)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=root))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.closed = True
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def served(mirrored):
    server = Server(mirrored)
    yield server
    server.close()


@pytest.fixture(scope="session")
def _s3():
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(_s3, mirrored, monkeypatch):
    """The address of the folder in an S3 on loopback."""
    boto3 = pytest.importorskip("boto3")
    for name, value in {
        "AWS_ENDPOINT_URL": _s3,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="kernels")
    for file in mirrored.rglob("*"):
        if file.is_file():
            client.upload_file(str(file), "kernels", f"mirror/{file.relative_to(mirrored).as_posix()}")
    yield "s3://kernels/mirror"
    importlib_clear()


def importlib_clear():
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


class FolderContract(SourceContract):
    @pytest.fixture
    def subject(self, source):
        return Subject(source, Requirement(NAME, version=1), {v: build_of(v) for v in CODE}, Requirement("org/none", version=1))

    @pytest.mark.parametrize(
        ("asked", "code"),
        [
            ({}, b"x = 3"),
            ({"version": 2}, b"x = 3"),
            ({"constraints": ">=2.0,<3"}, b"x = 3"),
            ({"revision": "v2.1.0"}, b"x = 3"),
            ({"version": 1}, b"x = 1"),
        ],
    )
    def test_versions_mean_what_they_mean_on_the_hub(self, source, asked, code):
        found = {c.variant: c for c in source.find(Requirement(NAME, **asked))[0]}
        assert source.read(found["torch-cpu"], "__init__.py") == code

    def test_a_commit_is_itself(self, source, hub):
        commit = hub.repo(NAME).branches["v2"]
        assert {c.commit for c in source.find(Requirement(NAME, revision=commit))[0]} == {commit}

    def test_a_version_that_is_not_there_lists_those_that_are(self, source):
        with pytest.raises(UnknownKernel, match=r"has 1, 2, v1, v2, v2\.1\.0 of org/demo"):
            source.find(Requirement(NAME, version=7))

    def test_a_kernel_that_moved_is_found_under_its_new_name_and_bears_it(self, source):
        found, notes = source.find(Requirement("org/old", version=1))
        assert {c.name for c in found} == {NAME}
        assert notes == ("org/old moved to org/demo",)
        assert source.read(found[0], "__init__.py")

    def test_a_changed_byte_is_not_handed_on(self, source, mirrored, tmp_path, spoil):
        candidate = next(c for c in source.find(Requirement(NAME, version=1))[0] if c.variant == "torch-cpu")
        spoil(f"{NAME}/{candidate.commit}/build/torch-cpu/big.bin")
        (tmp_path / "into").mkdir()
        with pytest.raises((Unreachable, Refused), match=r"big\.bin is not what"):
            source.fetch(candidate, tmp_path / "into")

    @pytest.mark.parametrize("name", ["../org/demo", "org/..", "org", "/etc/passwd", "org/demo/v1", "a/b%2f..%2fc", ""])
    def test_a_name_that_is_none_leads_nowhere(self, source, name):
        with pytest.raises(UnknownKernel):
            source.find(Requirement(name))


def flipped(data):
    return bytes(b ^ 1 for b in data)


class TestDirectory(FolderContract):
    @pytest.fixture
    def source(self, mirrored):
        return FolderSource(transport(str(mirrored)))

    @pytest.fixture
    def spoil(self, mirrored):
        return lambda path: (mirrored / path).write_bytes(flipped((mirrored / path).read_bytes()))

    def test_a_link_that_leads_out_is_not_followed(self, mirrored, tmp_path):
        (tmp_path / "secret").write_bytes(b"secret")
        (mirrored / "org" / "link").symlink_to(tmp_path / "secret")
        assert DirectoryTransport(mirrored).read("org/link", 100) is None

    def test_a_folder_that_is_not_there_may_not_be_mounted(self, tmp_path):
        with pytest.raises(Unreachable, match=r"^there is no directory \S+\ncheck the path"):
            FolderSource(transport(str(tmp_path / "none"))).find(Requirement(NAME))


class TestHttp(FolderContract):
    @pytest.fixture
    def source(self, served):
        return FolderSource(HttpTransport(served.url, backoff=0.01))

    spoil = TestDirectory.spoil

    def test_the_hubs_token_is_not_sent(self, served, source, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        source.find(Requirement(NAME, version=1))
        assert served.asked
        assert not [headers for _, headers in served.asked if "hf_secret" in str(headers)]


class TestS3(FolderContract):
    @pytest.fixture
    def source(self, bucket):
        return FolderSource(transport(bucket))

    @pytest.fixture
    def spoil(self, bucket, mirrored):
        import boto3

        def change(path):
            boto3.client("s3").put_object(Bucket="kernels", Key=f"mirror/{path}", Body=flipped((mirrored / path).read_bytes()))

        return change

    def test_a_bucket_that_is_not_there_is_said_so(self, bucket):
        with pytest.raises((UnknownKernel, Unreachable), match="s3://none/mirror"):
            FolderSource(transport("s3://none/mirror")).find(Requirement(NAME))

    def test_a_server_that_is_not_there_is_a_network_failure(self, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        importlib_clear()
        with pytest.raises(Unreachable, match="network failure"):
            FolderSource(FsspecTransport("s3://kernels/mirror", patience=1.0)).find(Requirement(NAME))
        importlib_clear()


# -- what a machine remembers of a folder


def test_what_a_commit_holds_is_asked_for_once_and_names_again_after_a_while(served, tmp_path):
    def source(**more):
        return FolderSource(HttpTransport(served.url), Memory(tmp_path / "memory"), **more)

    first = source()
    candidate = first.find(Requirement(NAME, version=1))[0][0]
    first.read(candidate, "metadata.json")
    first.find(Requirement(NAME, version=1))
    assert len(served.asked) == 3
    later = source()
    later.read(later.find(Requirement(NAME, version=1))[0][0], "metadata.json")
    assert [path for path, _ in served.asked[3:]] == [f"/{NAME}/refs.json"]
    pinned = source()
    pinned.read(pinned.find(Requirement(NAME, revision=candidate.commit))[0][0], "metadata.json")
    assert len(served.asked) == 4


def test_offline_answers_for_what_was_asked_before_and_for_nothing_else(served, tmp_path):
    memory = Memory(tmp_path / "memory")
    found = FolderSource(HttpTransport(served.url), memory).find(Requirement(NAME, version=1))
    before = len(served.asked)
    offline = FolderSource(HttpTransport(served.url), memory, offline=True)
    assert offline.find(Requirement(NAME, version=1)) == found
    with pytest.raises(NotCached):
        offline.find(Requirement("org/other"))
    assert len(served.asked) == before


def test_a_folder_that_is_gone_counts_as_it_was_with_a_note(served, tmp_path):
    memory = Memory(tmp_path / "memory")
    found, _ = FolderSource(HttpTransport(served.url), memory).find(Requirement(NAME, version=1))
    served.close()
    again, notes = FolderSource(HttpTransport(served.url, backoff=0.01), memory).find(Requirement(NAME, version=1))
    assert again == found
    assert "last time: network failure" in notes[0]


# -- faults of a web server


def status(code, **headers):
    def fault(handler):
        handler.send_response(code)
        for name, value in {"Content-Length": "0", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return fault


def body(data, length=None, pause=0.0):
    def fault(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data) if length is None else length))
        handler.end_headers()
        for at in range(0, len(data), max(1, len(data) // 20) if pause else len(data)):
            handler.wfile.write(data[at : at + (max(1, len(data) // 20) if pause else len(data))])
            handler.wfile.flush()
            time.sleep(pause)
        handler.close_connection = True

    return fault


@pytest.mark.parametrize(
    "fault",
    [status(500), status(503), status(429, Retry_After="0"), body(b'{"format"', length=900)],
    ids=["500", "503", "429", "dropped"],
)
def test_trouble_that_passes_is_not_noticed(served, fault):
    served.faults.append(fault)
    assert FolderSource(HttpTransport(served.url, backoff=0.01)).find(Requirement(NAME, version=1))[0]
    assert len(served.asked) == 3


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (status(500), "network failure: .* answered 500"),
        (status(429, Retry_After="3600"), "answered 429, and asks to wait 3600 s"),
        (status(403), "answered 403"),
        (body(b"<html>Please log in to the hotel network</html>"), "no folder of kernels"),
        (body(b"[" * 100_000), "no folder of kernels"),
        (lambda h: status(302, Location=h.path)(h), "TooManyRedirects"),
        (status(302, Location="file:///etc/passwd"), "network failure"),
    ],
    ids=["500", "429", "403", "portal", "nested", "redirect loop", "file redirect"],
)
def test_trouble_that_stays_is_said(served, fault, said):
    served.faults += [fault] * 100
    with pytest.raises(Unreachable, match=said):
        FolderSource(HttpTransport(served.url, backoff=0.01)).find(Requirement(NAME, version=1))


def test_a_slow_drip_ends_with_the_patience(served):
    served.faults += [body(b"x" * 4000, pause=0.2)] * 3
    began = time.monotonic()
    with pytest.raises(Unreachable, match="was not done after"):
        FolderSource(HttpTransport(served.url, patience=0.5)).find(Requirement(NAME, version=1))
    assert time.monotonic() - began < 3


def test_an_answer_without_end_is_cut(served):
    served.faults += [body(b"x" * (folder.MOST_REFS + 5000))] * 3
    with pytest.raises(Unreachable, match="larger than"):
        FolderSource(HttpTransport(served.url)).find(Requirement(NAME, version=1))


def test_a_file_that_is_longer_than_listed_is_not_taken(served, tmp_path):
    source = FolderSource(HttpTransport(served.url), workers=1)
    candidate = next(c for c in source.find(Requirement(NAME, version=1))[0] if c.variant == "torch-cpu")
    served.faults += [body(b"x" * 1_000_000)] * 20
    with pytest.raises(Unreachable, match="sends more than"):
        source.fetch(candidate, tmp_path)


def test_a_dropped_file_comes_whole_at_the_second_try(served, tmp_path):
    source = FolderSource(HttpTransport(served.url, backoff=0.01), workers=1)
    candidate = next(c for c in source.find(Requirement(NAME, version=1))[0] if c.variant == "torch-cpu")
    served.faults.append(body(b"half", length=5000))
    (tmp_path / "into").mkdir()
    source.fetch(candidate, tmp_path / "into")
    assert on_disk(tmp_path / "into") == build_of("torch-cpu")


# -- writing, and reading what anybody may have written


def test_a_mirror_of_a_mirror_is_the_same(mirrored, tmp_path):
    source = FolderSource(DirectoryTransport(mirrored))
    for version in (1, 2):
        Mirror(tmp_path / "second").add(source, Requirement(NAME, version=version))
    first, second = on_disk(mirrored / "org" / "demo"), on_disk(tmp_path / "second" / "org" / "demo")
    assert first.pop("refs.json")
    assert second.pop("refs.json")
    assert first == second


def test_what_a_kernel_depends_on_comes_along(hub, hub_cache, tmp_path):
    hub.repo("org/dep").branch("v1", kernel_files("torch-cpu", "y = 1", name="dep"))
    needs = {"kernel-depends": [{"repo-id": "org/dep", "version": 1}]}
    hub.repo("org/top").branch("v1", kernel_files("torch-cpu", "x = 1", name="top", metadata=needs))
    added = Mirror(tmp_path / "f").add(HubSource(hub_cache, hub.url), Requirement("org/top", version=1))
    assert [c.name for c in added] == ["org/top", "org/dep"]


def test_a_full_disk_is_a_clean_error(mirrored, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        Mirror(blocked).add(FolderSource(DirectoryTransport(mirrored)), Requirement(NAME, version=1))


@pytest.mark.parametrize(
    "value",
    [
        {"branches": {"v1": "x"}},
        {"moved": "../x"},
        {"asked": {"1": 1}},
        {"branches": []},
        {"files": {"../x": [1, "a" * 64]}},
        {"files": {"build/torch-cpu/x": [True, "a" * 64]}},
        {"files": {"build/torch-cpu/x": [-1, "a" * 64]}},
        {"files": {"build/torch-cpu/x": [1 << 70, "a" * 64]}},
        {"files": {"build/torch-cpu/x": [1, "a"]}},
        {"files": []},
    ],
)
def test_what_makes_no_sense_is_refused(value):
    parse = folder.parse_files if "files" in value else folder.parse_names
    with pytest.raises(BadMetadata):
        parse(json.dumps({"format": 1, **value}).encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("a" * 40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["format", "branches", "tags", "asked", "moved", "files"]), JSON | st.just(1)))
def test_any_json_is_read_or_refused(value):
    for parse in (folder.parse_names, folder.parse_files):
        with contextlib.suppress(BadMetadata):
            parse(json.dumps(value).encode())


@pytest.mark.parametrize("text", ["", "nonsense", "://x", "s3://", "http://"])
def test_what_is_no_source_is_said_so(text):
    with pytest.raises(TableError, match="is no source"):
        transport(text)


def test_a_scheme_that_fsspec_does_not_know_is_said_so():
    with pytest.raises(TableError, match="fsspec does not know"):
        FolderSource(transport("nosuch://x/y")).find(Requirement(NAME))


def test_addresses_are_quoted(served):
    assert HttpTransport(served.url).read("org/demo/a b?c#d", 10) is None
    assert urllib.parse.unquote(served.asked[-1][0]) == "/org/demo/a b?c#d"
