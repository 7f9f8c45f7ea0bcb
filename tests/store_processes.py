"""What test_store.py runs in a process of its own, because it forks, kills or changes its user.

python -m tests.store_processes full|kill|race|lockless|readonly DIRECTORY [ROUNDS SEED]
"""

import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import filelock
from tests.kernel_files import Folder, candidate, metadata_of, write

from kernelswap import tree
from kernelswap.errors import StoreError
from kernelswap.store import Store


class Slow(Folder):
    """Writes in small pieces, so that a kill lands between files and inside of one. Every fetch leaves a line in `log`."""

    log = None

    def fetch(self, candidate, into):
        if self.log is not None:
            with self.log.open("a") as file:
                file.write("fetched\n")
        for path in sorted(self.root.iterdir()):
            data = path.read_bytes()
            with (into / path.name).open("wb", buffering=0) as file:
                for at in range(0, len(data), 4096):
                    file.write(data[at : at + 4096])


def build_in(root, i=0):
    files = {"__init__.py": "", **{f"f{n}.bin": bytes([n]) * (n * 3000 + i) for n in range(12)}}
    return write(root / f"repo{i}", files)


def fork(work):
    """The pid of a child that does `work` and says by its exit status whether that raised."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    finally:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def joined(pids):
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def kill(root, rounds, seed):
    """SIGKILL a writer at random moments; whatever it left is whole, and the next writer goes on and tidies up."""
    random.seed(seed)
    builds = {str(i) * 40: build_in(root, i) for i in range(2)}
    store = Store(root / "cache")
    seen = {"staged": 0, "known": 0, "orphaned": 0}

    def writer(tell):
        os.write(tell, b"x")
        while True:
            for commit, build in builds.items():
                artifact = store.materialize(candidate(commit=commit), metadata_of(build), Slow(build))
                if random.random() < 0.5:
                    store.remove(artifact)

    for _ in range(rounds):
        ready, tell = os.pipe()
        pid = fork(lambda tell=tell: writer(tell))
        select.select([ready], [], [], 30)
        time.sleep(random.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert joined([pid]) == [-signal.SIGKILL]
        os.close(ready)
        os.close(tell)
        known = [a for commit in builds if (a := store.known(candidate(commit=commit))) is not None]
        for artifact in known:
            store.reverify(artifact)
        whole = store.verify_all()
        assert not any(whole.values()), whole
        staging = root / "cache" / "staging"
        seen["staged"] += staging.exists() and any(staging.iterdir())
        seen["known"] += bool(known)
        seen["orphaned"] += len(whole) > len(store.entries())
        for commit, build in builds.items():
            store.reverify(store.materialize(candidate(commit=commit), metadata_of(build), Folder(build)))
        store.clean()
        assert not any(staging.iterdir())
    sys.stdout.write(f"{seen}\n")


def race(root):
    """Eight processes want the same kernel at once."""
    build = build_in(root)
    Slow.log = root / "fetches"

    def work():
        store = Store(root / "cache")
        store.reverify(store.materialize(candidate(), metadata_of(build), Slow(build)))

    assert joined([fork(work) for _ in range(8)]) == [0] * 8
    assert Store(root / "cache").verify_all() == {tree.digest(build): None}
    assert not any((root / "cache" / "staging").iterdir())
    sys.stdout.write(f"{len(Slow.log.read_text().splitlines())} fetches\n")


def lockless(root):
    """The same, where the file system has no locks: more work, the same result."""

    def refuse(self, *args, **kwargs):
        raise NotImplementedError("FileSystem does not appear to support flock")

    filelock.FileLock.acquire = refuse
    race(root)


def readonly(root):
    """A cache that somebody else filled and that this user may only read."""
    root = Path(tempfile.mkdtemp(dir=None if os.getuid() == 0 else root))  # pytest's own is closed to other users
    root.chmod(0o755)
    build, other = build_in(root, 0), build_in(root, 1)
    store = Store(root / "cache")
    artifact = store.materialize(candidate(), metadata_of(build), Slow(build))
    directories = [path for path in (root / "cache", *(root / "cache").rglob("*")) if path.is_dir()]

    def reader():
        if os.getuid() == 0:  # root may write anywhere
            os.setgid(65534)
            os.setuid(65534)
        assert store.known(candidate()) == artifact
        assert tree.digest_of(store.reverify(artifact)) == artifact.digest
        assert store.materialize(candidate(), metadata_of(build), Folder(build)) == artifact
        try:
            store.materialize(candidate(commit="d" * 40), metadata_of(other), Folder(other))
        except StoreError as e:
            os.write(1, str(e).encode())
        else:
            raise AssertionError("it could write")

    for path in directories:
        path.chmod(0o555)
    done = joined([fork(reader)])
    for path in directories:
        path.chmod(0o755)
    shutil.rmtree(root)
    assert done == [0]


def full(root):
    """No file may grow past a limit, as on a full disk or over quota: fetching fails, then the manifest, then the index."""
    import resource

    build = build_in(root)
    seen = []

    def limited(size, tell):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            Store(root / "cache").materialize(candidate(), metadata_of(build), Slow(build))
        except StoreError as e:
            os.write(tell, str(e).encode())

    for size in (0, 100, 500, 1000, 1500, 5_000, 20_000, 32_000, 1 << 20):
        ready, tell = os.pipe()
        assert joined([fork(lambda size=size, tell=tell: limited(size, tell))]) == [0]
        os.close(tell)
        said = os.read(ready, 4096).decode()
        os.close(ready)
        store = Store(root / "cache")
        assert not any((root / "cache" / "staging").glob("*")), size
        assert not any(store.verify_all().values())
        assert (store.known(candidate()) is None) is ("no space left" in said), (size, said)
        seen.append("full" if said else "fits")
    sys.stdout.write(" ".join(seen))


if __name__ == "__main__":
    {"full": full, "kill": kill, "race": race, "lockless": lockless, "readonly": readonly}[sys.argv[1]](
        Path(sys.argv[2]), *(int(a) for a in sys.argv[3:])
    )
