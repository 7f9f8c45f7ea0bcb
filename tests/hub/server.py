"""The HTTP side: a Starlette application under uvicorn on loopback, in a thread of the test process."""

import asyncio
import contextlib
import fnmatch
import hashlib
import re
import socket
import threading
import urllib.parse
from dataclasses import dataclass

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from .repos import Repo, blob_id, is_lfs

TYPES = {"models": "model", "datasets": "dataset", "spaces": "space", "kernels": "kernel"}


@dataclass
class Fault:
    """One thing that goes wrong. `pattern` is a glob over the path; `times` None is forever."""

    pattern: str
    kind: str
    """`status drop truncate corrupt stale-etag slow hold missing nonsense loop`."""
    status: int = 500
    retry_after: int | None = None
    times: int | None = None
    method: str | None = None
    seconds: float = 0.0
    gate: threading.Event | None = None

    def hits(self, method, path):
        if self.times == 0 or (self.method and self.method != method) or not fnmatch.fnmatch(path, self.pattern):
            return False
        if self.times is not None:
            self.times -= 1
        return True


def error(status, code, message=""):
    return JSONResponse({"error": message or code}, status, headers={"X-Error-Code": code, "X-Error-Message": message or code})


class Hub:
    """Starts on entering, stops on leaving. `url` is what HF_ENDPOINT would be."""

    def __init__(self, *, page=1000):
        self.stopped = False
        self.reset(page)

    def reset(self, page=1000):
        """As if just made: nothing in it, nothing broken, nothing logged."""
        if hasattr(self, "faults"):
            self.clear()
        self.page = page
        """Entries per page of the tree API."""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.organizations: dict[str, dict] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, dict[str, str]]] = []
        """(method, path, headers) of every request."""
        self.tokens = {"hf_good"}
        self.elsewhere = None
        """Where `Link` headers point to instead of here."""
        self._blobs: dict[str, bytes] = {}

    # -- what it holds

    def repo(self, name, type="kernel", **more):  # noqa: A002 -- the hub's own word
        """The repository of that name, made when it is new."""
        return self.repos.setdefault((type, name), Repo(name, type, **more))

    def model(self, name, **more):
        return self.repo(name, "model", **more)

    def organization(self, name, *, trusted=False):
        self.organizations[name] = {
            "avatarUrl": "",
            "name": name,
            "fullname": name,
            "numUsers": 1,
            "trustedKernelPublisher": trusted,
        }

    def fault(self, pattern, kind, **more):
        """From now on requests whose path matches go wrong. Returns the Fault; `clear()` heals everything."""
        fault = Fault(pattern, kind, **more)
        if kind == "hold":
            fault.gate = threading.Event()
        self.faults.append(fault)
        return fault

    def clear(self):
        """Heal every fault and forget the log."""
        for fault in self.faults:
            if fault.gate:
                fault.gate.set()
        self.faults.clear()
        self.log.clear()

    def requests(self, pattern="*"):
        """(method, path) of every request so far whose path matches, without the client's own daily errands."""
        return [(m, p) for m, p, _ in self.log if fnmatch.fnmatch(p, pattern) and p != "/api/agent-harnesses"]

    # -- running

    def __enter__(self):
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self._app,
            interface="asgi3",
            log_config=None,
            log_level="error",
            ws="none",
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([sock],), daemon=True)
        sock.listen(64)  # a client that comes before uvicorn does waits in the queue
        self._thread.start()
        return self

    def __exit__(self, *_):
        if not self.stopped:
            self.stopped = True
            self.clear()
            self._server.should_exit = self._server.force_exit = True
            self._thread.join(10)

    def stop(self):
        """The hub goes away: connections are refused from here on."""
        self.__exit__()

    async def _app(self, scope, receive, send):
        request = Request(scope, receive)
        path = re.sub(r"^http://[^/]+", "", scope["raw_path"].decode())  # a client that takes us for its proxy says all of it
        self.log.append((request.method, path, dict(request.headers)))
        fault = next((f for f in self.faults if f.hits(request.method, path)), None)
        response = await self._answer(request, path, fault)
        with contextlib.suppress(ConnectionResetError):  # how a `drop` ends, on purpose
            await response(scope, receive, send)

    async def _answer(self, request, path, fault):
        if fault and fault.kind == "status":
            headers = {"Retry-After": str(fault.retry_after)} if fault.retry_after is not None else {}
            return Response("fault", fault.status, headers)
        if fault and fault.kind == "loop":
            return Response(status_code=302, headers={"Location": f"{self.url}{path}"})
        if fault and fault.kind == "missing":
            return error(404, "EntryNotFound")
        if fault and fault.kind == "nonsense":
            return Response("<html>Please log in to the hotel network</html>", 200, media_type="text/html")
        if fault and fault.kind == "hold":
            await asyncio.get_running_loop().run_in_executor(None, fault.gate.wait, 60)
            fault = None
        parts = [urllib.parse.unquote(p) for p in path.strip("/").split("/")]
        if parts[0] == "api":
            return self._api(request, parts[1:])
        if parts[0] == "lfs":
            return self._bytes(request, self._blobs[parts[1]], {"ETag": f'"{parts[1]}"'}, fault)
        kind = TYPES.get(parts[0], "model")
        rest = parts[1:] if parts[0] in TYPES else parts
        if len(rest) >= 5 and rest[2] == "resolve":
            return self._resolve(request, kind, "/".join(rest[:2]), rest[3], "/".join(rest[4:]), fault)
        return error(404, "NotFound")

    # -- API

    def _api(self, request, parts):
        if parts[:1] == ["organizations"]:
            found = self.organizations.get(parts[1])
            return JSONResponse(found) if found else error(404, "NotFound", "This organization does not exist")
        if parts[0] not in TYPES or len(parts) < 3:
            return error(404, "NotFound")
        name, verb, rest = "/".join(parts[1:3]), parts[3:4], parts[4:]
        repo, refusal = self._open(request, TYPES[parts[0]], name)
        if refusal:
            return refusal
        if verb == ["refs"]:
            return JSONResponse(repo.refs())
        commit = repo.resolve(rest[0] if rest else "main")
        if commit is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {rest[0] if rest else 'main'}")
        if verb == ["tree"]:
            return self._tree(request, repo, commit, "/".join(rest[1:]))
        info = {"_id": name, "id": name, "sha": commit, "private": repo.private, "tags": []}
        if repo.type != "kernel":  # the hub lists no files in what it says about a kernel
            info["siblings"] = [{"rfilename": p} for p in repo.commits[commit]]
        return JSONResponse(info)

    def _tree(self, request, repo, commit, under):
        entries = repo.tree(commit, under, recursive=request.query_params.get("recursive", "").lower() == "true")
        if entries is None:
            return error(404, "EntryNotFound", f"{under} does not exist on {commit}")
        start = int(request.query_params.get("cursor", 0))
        headers = {}
        if start + self.page < len(entries):
            query = urllib.parse.urlencode({**request.query_params, "cursor": start + self.page})
            headers["Link"] = f'<{self.elsewhere or self.url}{request.scope["raw_path"].decode()}?{query}>; rel="next"'
        return JSONResponse(entries[start : start + self.page], headers=headers)

    def _open(self, request, kind, name):
        """The repository, or the refusal: (repo, None) or (None, response)."""
        repo = self.repos.get((kind, name))
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if repo is None or (repo.private and bearer not in self.tokens):
            return None, error(401 if bearer not in self.tokens else 404, "RepoNotFound", "Repository not found")
        if repo.gated and bearer not in self.tokens:
            return None, error(403, "GatedRepo", "Access to this repository is restricted")
        return repo, None

    # -- files

    def _resolve(self, request, kind, name, revision, path, fault):
        repo, refusal = self._open(request, kind, name)
        if refusal:
            return refusal
        commit = repo.resolve(revision)
        if commit is None:
            return error(404, "RevisionNotFound")
        data = repo.commits[commit].get(path)
        if data is None:
            missing = error(404, "EntryNotFound")
            missing.headers["X-Repo-Commit"] = commit
            return missing
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob_id(data)}"'}
        if fault and fault.kind == "stale-etag":
            headers["ETag"] = f'"{blob_id(b"what it was before")}"'
        if not is_lfs(path, data):
            return self._bytes(request, data, headers, fault)
        sha = hashlib.sha256(data).hexdigest()
        self._blobs[sha] = data
        # Another host name is another origin, as the real hub's CDN is: the client must drop its token there.
        headers |= {
            "Location": f"http://localhost:{self.port}/lfs/{sha}",
            "X-Linked-Etag": f'"{sha}"',
            "X-Linked-Size": str(len(data)),
        }
        return Response(status_code=302, headers=headers)

    def _bytes(self, request, data, headers, fault):
        kind = fault.kind if fault else ""
        size = len(data)
        if kind == "corrupt":
            data = _corrupt(data)
        if kind == "truncate":
            data, size = data[: len(data) // 2], len(data) // 2
        if request.method == "HEAD":
            return Response(headers={**headers, "Content-Length": str(size), "Accept-Ranges": "bytes"})
        status, start = 200, 0
        if found := re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", "")):
            start, status = int(found[1]), 206
            if start >= size:
                return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
            headers = {**headers, "Content-Range": f"bytes {start}-{size - 1}/{size}"}
        body = data[start:]

        async def pieces():
            half = max(1, len(body) // 2)
            yield body[:half]
            if kind == "drop":
                raise ConnectionResetError
            for at in range(half, len(body), max(1, half // 8)):
                if kind == "slow":
                    await asyncio.sleep(fault.seconds)
                yield body[at : at + max(1, half // 8)]

        return StreamingResponse(pieces(), status, headers={**headers, "Content-Length": str(len(body))})


def _corrupt(data):
    """Wrong bytes, right length."""
    return bytes(b ^ 1 for b in data)
