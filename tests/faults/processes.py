"""What test_faults.py runs in processes of its own, because it forks, kills, or changes what the process can do.

python -m tests.faults.processes kill|crowd|full|links|clock|readonly HUB DIRECTORY [N]
"""

import importlib
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from tests.store_processes import fork

from kernelswap.api import Swapper
from kernelswap.errors import KernelSwapError
from kernelswap.types import Machine

SPEC, VALUE = "org/kernel@1", 42
CPU = Machine(os="linux", cpu="x86_64", torch=(2, 13), cxx11=True)


def swapper(root):
    return Swapper(cache=root / "cache", machine=CPU)


def load(root):
    """The value in the kernel, by a Swapper that knows nothing yet."""
    module = swapper(root).load(SPEC)
    assert len(module.more.read()) == module.more.LENGTH, "half of a file"
    return module.VALUE


def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def right(root):
    assert load(root) == VALUE


def kill(root, rounds):
    """SIGKILL a process that finds, fetches, verifies, stores and imports, at a random moment of that; then the next one loads."""
    rng, landed = random.Random(4), 0
    for name in ("huggingface_hub.file_download", "huggingface_hub.utils", "torch"):  # or every child spends its time on them
        importlib.import_module(name)
    began = time.monotonic()
    assert status(fork(lambda: right(root))) == 0
    whole = time.monotonic() - began
    for _ in range(rounds):
        for folder in rng.choice((("cache",), ("cache", "hf"), ("cache", "hf"), ("hf",), ())):
            shutil.rmtree(root / folder, ignore_errors=True)
        pid = fork(lambda: right(root))
        time.sleep(rng.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        landed += status(pid) == -signal.SIGKILL
        assert status(fork(lambda: right(root))) == 0
        store = swapper(root).store
        assert not any(store.verify_all().values())
        store.clean()
        assert not any((root / "cache" / "staging").glob("*"))
    print(f"killed {landed}")  # noqa: T201  # what the test reads


def crowd(root, threads):
    """Two processes with many threads each want the same kernel at once."""

    def work():
        found, barrier = [], threading.Barrier(threads)

        def one():
            barrier.wait()
            found.append(load(root))

        each = [threading.Thread(target=one) for _ in range(threads)]
        for thread in each:
            thread.start()
        for thread in each:
            thread.join()
        assert found == [VALUE] * threads

    assert [status(pid) for pid in [fork(work), fork(work)]] == [0, 0]
    assert len(swapper(root).store.verify_all()) == 1


def full(root, _):
    """No file may grow past a limit, as on a full disk."""
    import resource

    said = []
    for size in (0, 300, 3000, 20_000, 60_000, 1 << 22):
        ready, tell = os.pipe()

        def limited(size=size, tell=tell):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            try:
                right(root)
                os.write(tell, b"loaded")
            except KernelSwapError as e:
                os.write(tell, f"{type(e).__name__} {e.reason}".encode())

        assert status(fork(limited)) == 0
        os.close(tell)
        said.append(os.read(ready, 4096).decode())
        os.close(ready)
        assert not any(swapper(root).store.verify_all().values())
    print("\n".join(said))  # noqa: T201


def links(root, _):
    """A file system that has no symbolic links."""

    def refuse(*_args, **_more):
        raise OSError(1, "Operation not permitted")

    os.symlink = refuse
    right(root)
    assert not [p for p in root.rglob("*") if p.is_symlink()]
    os.environ["HF_HUB_OFFLINE"] = "1"
    right(root)


def clock(root, years):
    """The program's clock is `years` away from that of the disk and of the hub."""
    real = time.time
    time.time = lambda: real() + years * 365 * 86_400
    right(root)
    alive = root / "cache" / "staging" / "somebody"
    alive.mkdir()
    import filelock

    with filelock.FileLock(alive.with_suffix(".lock")):
        swapper(root).store.clean()
        assert alive.exists()
    os.environ["HF_HUB_OFFLINE"] = "1"
    right(root)


def readonly(root, _):
    """Caches that somebody else filled."""
    right(root)
    folders = [p for p in (root, *root.rglob("*")) if p.is_dir()]

    def reader():
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        right(root)
        try:
            swapper(root).load("org/other@1")
        except KernelSwapError as e:
            os.write(1, f"{type(e).__name__}\n{e}\n".encode())

    for folder in folders:
        folder.chmod(0o555)
    try:
        assert status(fork(reader)) == 0
    finally:
        for folder in folders:
            folder.chmod(0o755)


if __name__ == "__main__":
    what, hub, at, *more = sys.argv[1:]
    os.environ |= {"HF_ENDPOINT": hub, "HF_HUB_CACHE": f"{at}/hf", "HOME": at, "XDG_CONFIG_HOME": at, "HF_HUB_DISABLE_XET": "1"}
    globals()[what](Path(at), *(int(a) for a in more or ("0",)))
