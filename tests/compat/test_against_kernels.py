"""Side by side with a real `kernels`: the same questions to both, in a process each, on the same hub.

Not part of the usual run: `pip install --target DIR kernels==0.17.2 tomlkit`, then KERNELSWAP_AGAINST_KERNELS=DIR. What differs on purpose is
in docs/kernels-api.md; here it is `ON_PURPOSE`. Said to agree with 0.17.2.
"""

import json
import os
import random
import subprocess
import sys

import pytest
from tests.hub import kernel_files

THEIRS = os.environ.get("KERNELSWAP_AGAINST_KERNELS")
pytestmark = pytest.mark.skipif(not THEIRS, reason="KERNELSWAP_AGAINST_KERNELS does not name a directory with kernels")

BEGIN = """
import json, logging, os, random, sys, warnings
from pathlib import Path

warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)
if sys.argv[1] == "ours":
    from kernelswap import compat

    compat.install()
import kernels

found = {}
KINDS = ("FileNotFoundError", "OSError", "ValueError", "RuntimeError", "ImportError", "TypeError")


def ask(name, question):
    try:
        answer = question()
    except Exception as e:
        answer = {"error": [c.__name__ for c in type(e).__mro__ if c.__name__ in KINDS]}
    found[name] = answer if isinstance(answer, (bool, int, str, list, dict, type(None))) else getattr(answer, "VALUE", str(type(answer)))

"""
END = '\nprint("FOUND" + json.dumps(found))\n'


@pytest.fixture
def both(hub, tmp_path):
    """`both(script, **env)`: what `kernels` found and what we found."""

    def run(script, **env):
        answers = []
        for who, first in (("theirs", [THEIRS]), ("ours", [])):
            home = tmp_path / who
            home.mkdir()
            given = {
                **os.environ,
                **env,
                "PYTHONPATH": os.pathsep.join([*first, *(p for p in sys.path if p)]),
                "HF_ENDPOINT": hub.url,
                "HF_HUB_CACHE": str(home / "hub"),
                "HF_HOME": str(home / "hf"),
                "XDG_CONFIG_HOME": str(home / "config"),
                "KERNELSWAP_CACHE": str(home / "cache"),
            }
            argv = [sys.executable, "-W", "ignore", "-c", BEGIN + script + END, who]
            done = subprocess.run(argv, capture_output=True, text=True, env=given, cwd=home, timeout=280, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            answers.append(json.loads(next(line[5:] for line in done.stdout.splitlines() if line.startswith("FOUND"))))
        return answers

    return run


POOL = [
    *(f"torch-{b}" for b in ("cpu", "universal", "cuda", "rocm", "metal", "npu", "cann", "xpu", "neuron", "tpu")),
    *(f"torch213-{abi}cpu-x86_64-linux" for abi in ("", "cxx11-", "cxx98-")),
    "torch212-cxx11-cpu-x86_64-linux",
    "torch213-cxx11-cpu-aarch64-linux",
    "torch213-cpu-x86_64-windows",
    "torch213-metal-aarch64-darwin",
    *(f"torch213-cxx11-cu{v}-x86_64-linux" for v in (126, 130)),
    *(f"torch-stable-abi{v}-cpu-x86_64-linux" for v in (29, 210, 214)),
    "torch-stable-abi29-cu126-x86_64-linux",
    "tvm-ffi01-cpu-x86_64-linux",
]


def test_builds_are_chosen_and_ordered_alike(hub, both):
    hub.organization("org", trusted=True)
    chance = random.Random(7)
    for i in range(40):
        files = {}
        for name in chance.sample(POOL, chance.randint(1, 8)):
            named = [b for b in ("cuda", "-cu", "rocm", "metal", "xpu", "npu", "cann", "neuron", "tpu", "cpu") if b in name]
            backend = {"-cu": "cuda", "npu": "cann"}.get(named[0], named[0]) if named else "cpu"
            files |= kernel_files(name, "VALUE = 1", name=f"k{i:02d}", backend=backend, unique=f"{i:03d}{len(name):04x}")
        hub.repo(f"org/k{i:02d}").branch("v1", files)
    theirs, ours = both(
        """
def variants(name):
    return [[type(v).__name__, v.variant.variant_str] for v in kernels.get_kernel_variants(name, version=1)]

for i in range(40):
    name = f"org/k{i:02d}"
    ask(name, lambda: variants(name))
    ask(name + " there", lambda: kernels.has_kernel(name, version=1))
    ask(name + " loaded", lambda: kernels.get_kernel(name, version=1))
"""
    )

    def in_order(answers):
        """Those that fit, in order; those that do not, in any."""
        return {
            name: [[v for kind, v in a if kind == "VariantAccepted"], sorted(v for kind, v in a if kind != "VariantAccepted")]
            if isinstance(a, list)
            else a
            for name, a in answers.items()
        }

    assert in_order(ours) == in_order(theirs)


ON_PURPOSE = {
    "a layer with a constructor": "load() tells at once what kernelize would tell",
}
QUESTIONS = """
get = kernels.get_kernel
layer = kernels.LayerRepository
commit, local = os.environ["COMMIT"], Path(os.environ["LOCAL"])
ask("a version", lambda: get("org/one", version=1))
ask("a branch", lambda: get("org/one", revision="v1"))
ask("a commit", lambda: get("org/one", revision=commit))
ask("a pull request", lambda: get("org/one", revision="refs/pr/1"))
ask("a tag", lambda: get("org/one", revision="a-tag"))
ask("version and revision", lambda: get("org/one", revision="v1", version=1))
ask("an unknown version", lambda: get("org/one", version=5))
ask("an unknown revision", lambda: get("org/one", revision="nope"))
ask("an unknown repository", lambda: get("org/none", version=1))
ask("an untrusted publisher", lambda: get("evil/one", version=1))
ask("one that is vouched for", lambda: get("evil/one", version=1, trust_remote_code=True))
ask("one that is named", lambda: get("evil/one", version=1, trust_remote_code=["evil/one"]))
ask("a person", lambda: get("nobody/one", version=1))
ask("backend cpu", lambda: get("org/one", version=1, backend="cpu"))
ask("backend cuda", lambda: get("org/one", version=1, backend="cuda"))
ask("a dependency", lambda: get("org/top", version=1).base.VALUE)
ask("a cycle", lambda: get("org/first", version=1))
ask("a dependency outside", lambda: kernels.get_kernel_dep("org/one"))
ask("the kernel raises", lambda: get("org/raises", version=1))
ask("a missing package", lambda: get("org/needs", version=1))
ask("an unknown package", lambda: get("org/unknown", version=1))
ask("a newer loader", lambda: get("org/newer", version=1))
ask("bad metadata", lambda: get("org/bad", version=1))
ask("no builds", lambda: get("org/empty", version=1))
ask("builds for others", lambda: get("org/gpu", version=1))
ask("builds for others, asked", lambda: kernels.has_kernel("org/gpu", version=1))
lock = Path("kernels.lock")
lock.write_text(json.dumps([{"dependency": {"repo-id": "org/one", "version": 1}, "lock": {"commit": commit}}]))
ask("locked", lambda: kernels.get_locked_kernel("org/one", lockfile=lock))
ask("not locked", lambda: kernels.get_locked_kernel("org/top", lockfile=lock))
Path("bad.lock").write_text("{}")
ask("a bad lock", lambda: kernels.get_locked_kernel("org/one", lockfile=Path("bad.lock")))
ask("no lock", lambda: kernels.get_locked_kernel("org/one", lockfile=Path("nowhere.lock")))
ask("a layer", lambda: layer("org/layers", layer_name="Good", version=1).load().__name__)
ask("no such layer", lambda: layer("org/layers", layer_name="Nope", version=1).load().__name__)
ask("a layer with a constructor", lambda: layer("org/layers", layer_name="State", version=1).load().__name__)
ask("no layers at all", lambda: layer("org/one", layer_name="Good", version=1).load().__name__)
same = {"layer_name": "Good", "version": 1}
ask("equal", lambda: layer("org/layers", **same) == layer("org/layers", **same, user_agent="x"))
ask("a directory", lambda: kernels.get_local_kernel(local))
ask("its builds", lambda: kernels.get_local_kernel(local / "build"))
ask("one build", lambda: kernels.get_local_kernel(local / "build" / "torch-cpu"))
ask("no directory", lambda: kernels.get_local_kernel(Path("/nonexistent")))
"""
LAYERS = """
from torch import nn


class Good(nn.Module):
    def forward(self, x):
        return x


class State(nn.Module):
    def __init__(self):
        super().__init__()

    def forward(self, x):
        return x
"""


def test_questions_have_the_same_answers_and_errors_the_types_that_are_caught(hub, both, make_repo):
    for organization, trusted in (("org", True), ("evil", False)):
        hub.organization(organization, trusted=trusted)
    published = 0

    def publish(name, code="VALUE = 1", variant="torch-cpu", files=None, **metadata):
        nonlocal published
        published += 1
        given = kernel_files(
            variant, code, name=name.partition("/")[2], unique=f"{published:07x}", files=files, metadata=metadata
        )
        return hub.repo(name).branch("v1", given)

    def needs(name):
        return {"kernel-depends": [{"repo-id": name, "version": 1}]}

    commit = publish("org/one")
    hub.repo("org/one").tag("a-tag", "v1")
    hub.repo("org/one").pull_request(1, kernel_files("torch-cpu", "VALUE = 2", name="one", unique="00000ff"))
    publish("evil/one")
    publish("nobody/one")
    publish("org/top", "import kernels\nbase = kernels.get_kernel_dep('org/one')", **needs("org/one"))
    publish("org/first", **needs("org/second"))
    publish("org/second", **needs("org/first"))
    publish("org/raises", "raise RuntimeError('no')")
    publish("org/needs", **{"python-depends": ["helion"]})
    publish("org/unknown", **{"python-depends": ["numpy"]})
    publish("org/newer", **{"kernels-minver": "9.0.0"})
    publish("org/bad", version="x")
    publish("org/gpu", variant="torch-cuda")
    publish("org/layers", "from . import layers", files={"layers.py": LAYERS})
    hub.repo("org/empty").branch("v1", {"README.md": "nothing"})
    theirs, ours = both(QUESTIONS, COMMIT=commit, LOCAL=str(make_repo("here", {"torch-cpu": "VALUE = 9"})))
    wrong = {}
    for name, answer in theirs.items():
        if isinstance(answer, dict) and isinstance(ours[name], dict):
            right = set(answer["error"]) <= set(ours[name]["error"])  # more may be caught, not less
        else:
            right = ours[name] == answer
        if right is (name in ON_PURPOSE):
            wrong[name] = (answer, ours[name])
    assert not wrong


def test_what_is_registered_serves_the_same_modules_with_the_same_layers(both, make_repo):
    """Hundreds of random mappings, modes and fallbacks, for a module on the CPU."""
    flags = {"Both": (True, True), "NoBackward": (False, True), "NoCompile": (True, False), "Neither": (False, False)}
    text = "from torch import nn\n" + "".join(
        f"\n\nclass {name}(nn.Module):\n    has_backward, can_torch_compile = {can}\n\n    def forward(self, x):\n        return x + x\n"
        for name, can in flags.items()
    )
    root = make_repo("here", {"torch-cpu": {"code": "from . import layers", "files": {"layers.py": text}}})
    theirs, ours = both(
        """
import torch
from torch import nn

mode, fallback, chance = kernels.Mode, kernels.KernelizeFallback, random.Random(11)
layers = ["Both", "NoBackward", "NoCompile", "Neither"]
compiled = [mode.INFERENCE | mode.TORCH_COMPILE, mode.TRAINING | mode.TORCH_COMPILE]
legal, wanted = [*mode, *compiled], [mode.INFERENCE, mode.TRAINING, *compiled]
flags = [fallback.NONE, *fallback, fallback.DEFAULT, fallback.ALL, True, False]


def repository(name):
    return kernels.LocalLayerRepository(Path(os.environ["REPOSITORY"]), layer_name=name)


@kernels.use_kernel_forward_from_hub("Mine")
class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x + x


def served(model, asked):
    if sys.argv[1] == "theirs":
        return model.forward.__func__.__qualname__.partition(".")[0].replace("Mine", "original")
    from kernelswap.compat import state
    from kernelswap.compat.kernelizing import OnRealTensors

    applied = state.for_layers(OnRealTensors).applied(model)
    for outcome in applied.outcomes if applied else ():
        if hasattr(outcome, "inference"):
            choice = outcome.inference if mode.INFERENCE in asked else outcome.training
            return choice.implementation.layer if choice.implementation else "original"
    return "original"


def one():
    devices = {}
    for device in chance.sample(["cpu", "cuda", "rocm", "xpu"], chance.choice([0, 1, 1, 1, 2])):
        modes = {m: chance.choice(layers) for m in chance.sample(legal, chance.randint(1, 4))}
        devices[device] = chance.choice(layers) if chance.random() < 0.3 else modes
    asked, given, name = chance.choice(wanted), chance.choice(flags), "Mine" if chance.random() < 0.9 else "Other"
    registered = {
        device: {m: repository(n) for m, n in value.items()} if isinstance(value, dict) else repository(value)
        for device, value in devices.items()
    }
    model = Mine().train(mode.TRAINING in asked)

    def question():
        with kernels.use_kernel_mapping({name: registered}, inherit_mapping=False):
            kernels.kernelize(model, mode=asked, device="cpu", use_fallback=given)
        return served(model, asked)

    ask(f"{len(found)} {name} {devices} {asked} {given}", question)


for _ in range(400):
    one()
""",
        REPOSITORY=str(root),
    )
    assert list(theirs) == list(ours)
    assert {name: (answer, ours[name]) for name, answer in theirs.items() if ours[name] != answer} == {}
    assert len(set(map(str, theirs.values()))) > 4  # all four layers, the original, and errors
