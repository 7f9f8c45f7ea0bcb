"""Taking Transformers over, and giving it back: whatever came first, and whatever `kernels` is there."""

import importlib
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
from tests.adapters import world

import kernelswap
from kernelswap.adapters.transformers import seams

WATCHED = ("transformers", seams.MODELING, seams.HUB_KERNELS, seams.CONFIG, "transformers.utils", "transformers.integrations")


def everything():
    import transformers
    import transformers.integrations.hub_kernels
    import transformers.modeling_utils

    assert transformers.KernelConfig
    getattr(transformers, "kernelize", None)  # since 5.15; looked up now, so that it is not new later
    found = {("class", k): v for k, v in vars(transformers.modeling_utils.PreTrainedModel).items()}
    for cls in (transformers.AutoModel, transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        found |= {(cls.__name__, k): v for k, v in vars(cls).items()}
    for name in WATCHED:
        found |= {(name, k): v for k, v in vars(sys.modules[name]).items()}
    return found


def test_uninstall_gives_every_attribute_back():
    before = everything()
    kernelswap.install()
    assert kernelswap.installed()
    taken = everything()
    changed = {key for key in before if taken.get(key) is not before[key]}
    assert {("class", "from_pretrained"), ("class", "use_kernels"), ("transformers", "KernelConfig")} <= changed
    assert {(seams.HUB_KERNELS, "get_kernel"), ("AutoModelForCausalLM", "from_pretrained")} <= changed
    kernelswap.uninstall()
    assert not kernelswap.installed()
    after = everything()
    assert set(after) == set(before)
    assert [key for key in before if after[key] is not before[key]] == []


def test_installing_twice_changes_nothing_more_and_uninstalling_twice_is_fine():
    before = everything()
    kernelswap.install()
    once = everything()
    kernelswap.install()
    assert all(everything()[key] is value for key, value in once.items())
    kernelswap.uninstall()
    kernelswap.uninstall()
    assert all(everything()[key] is value for key, value in before.items())


def test_what_somebody_replaced_after_us_is_left_to_them():
    import transformers.integrations.hub_kernels as module

    original = module.get_kernel
    kernelswap.install()
    theirs = module.get_kernel = lambda: None
    kernelswap.uninstall()
    assert module.get_kernel is theirs
    module.get_kernel = original


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, n, _ in seams.TOUCHED])
def test_what_is_touched_is_there_in_this_transformers(module, name):
    holder = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    if name in {"PreTrainedModel.kernelize", "kernelize"}:
        assert "kernelize" in vars(holder) or name != "kernelize" or "kernelize" in vars(_model_class())
        return  # a method before 5.15, a function since; both are there with us where the release has them
    assert last in vars(holder), f"{module}.{name} has moved: {[why for m, n, why in seams.TOUCHED if n == name]}"


def _model_class():
    return importlib.import_module(seams.MODELING).PreTrainedModel


def run(code, **env):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.skipif("KERNELSWAP_TRANSFORMERS" not in os.environ, reason="no release of Transformers was asked for")
def test_the_release_of_transformers_is_the_one_that_was_asked_for():
    import transformers

    wanted = os.environ["KERNELSWAP_TRANSFORMERS"] + "."
    assert transformers.__version__.startswith(wanted)
    assert run("import transformers; print(transformers.__version__)").startswith(wanted)


def test_importing_kernelswap_changes_nothing_and_installing_imports_nothing_heavy():
    assert (
        run(
            "import sys, kernelswap\n"
            "before = list(sys.meta_path)\n"
            "assert sys.meta_path == before\n"
            "kernelswap.install()\n"
            "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'kernels') if m in sys.modules])\n"
            "kernelswap.uninstall()\n"
            "assert sys.meta_path == before\n"
        )
        == "[]"
    )


ORDERS = {
    "before transformers": "import kernelswap; kernelswap.install(); import transformers",
    "after transformers": "import transformers; transformers.PreTrainedModel; import kernelswap; kernelswap.install()",
    "after a part of it": "import transformers.utils; import kernelswap; kernelswap.install(); import transformers",
    "by the import": "import kernelswap.transformers as transformers",
}
CHECK = """
import transformers as real
from kernelswap.adapters.transformers.config import KernelConfig
assert transformers.KernelConfig is KernelConfig is real.KernelConfig is real.utils.KernelConfig
assert transformers.AutoModelForCausalLM is real.AutoModelForCausalLM
assert "kernelize" in vars(transformers.PreTrainedModel)
newer = hasattr(transformers, "kernelize")  # since 5.15
assert not newer or transformers.kernelize.__module__.startswith("kernelswap")
import kernelswap
kernelswap.uninstall()
assert real.KernelConfig is real.utils.kernel_config.KernelConfig is not KernelConfig
assert not newer or real.kernelize is real.integrations.hub_kernels.kernelize
assert not newer or real.kernelize.__module__ == "transformers.integrations.hub_kernels"
import sys
for name in ("transformers.modeling_utils", "transformers.utils.kernel_config"):
    assert type(sys.modules[name].__spec__.loader).__name__ == "SourceFileLoader", name
for cls in (real.PreTrainedModel, real.AutoModel, real.AutoModelForCausalLM):
    assert "kernelswap" not in cls.from_pretrained.__code__.co_filename, cls
print("fine")
"""


@pytest.mark.parametrize("order", ORDERS)
def test_installing_works_in_every_order(order):
    assert run(ORDERS[order] + CHECK) == "fine"


def test_kernelswap_transformers_hands_everything_through():
    code = (
        "import kernelswap.transformers as ours, transformers as theirs\n"
        "from kernelswap.transformers import AutoConfig, KernelConfig, pipeline\n"
        "assert AutoConfig is theirs.AutoConfig and ours.__version__ == theirs.__version__ and 'Qwen3Config' in dir(ours)\n"
        "import kernelswap; print(kernelswap.installed())"
    )
    assert run(code) == "True"


KERNELS = ["0.11.0", "0.17.2", "99.0"]


@pytest.mark.parametrize("version", KERNELS)
def test_a1_a16_any_version_of_kernels_may_be_installed(version, tmp_path, hub, hub_cache):
    """A package that says it is `kernels` of that version, and that no code of ours needs: importing it fails."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("raise ImportError('not for us')")
    about = site / f"kernels-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (about / "RECORD").write_text("kernels/__init__.py,,\n")
    world.publish(hub)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import kernelswap; kernelswap.install(build='never')\n"
        "from transformers import AutoModelForCausalLM, KernelConfig\n"
        "config = KernelConfig({'RMSNorm': 'kernels-community/liger-kernels:LigerRMSNorm'}, inherit_mapping=False)\n"
        "model = AutoModelForCausalLM.from_pretrained('Qwen/Qwen3-0.6B', use_kernels=True, kernel_config=config)\n"
        "print(kernelswap.api.default().applied(model).report['swapped'])"
    )
    cache = {"KERNELSWAP_CACHE": str(tmp_path / "cache"), "HF_HUB_CACHE": str(hub_cache), "HF_HOME": str(tmp_path / "home")}
    assert run(code, HF_ENDPOINT=hub.url, OMP_NUM_THREADS="1", **cache) == "9"


def test_the_mode_of_the_guide_can_be_imported_while_installed(monkeypatch):
    if importlib.util.find_spec("kernels") is not None:
        pytest.skip("kernels is installed here")
    kernelswap.install()
    mode = importlib.import_module("kernels").Mode
    assert mode.TRAINING | mode.TORCH_COMPILE == kernelswap.Mode.TRAINING | kernelswap.Mode.TORCH_COMPILE
    kernelswap.uninstall()
    assert "kernels" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("kernels")


def test_the_page_lists_what_is_touched():
    from kernelswap.adapters.transformers import attention

    page = (pathlib.Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
    rows = [f"| `{module}` | `{name}` | {why} |" for module, name, why in (*seams.TOUCHED, *attention.TOUCHED)]
    assert [row for row in rows if row not in page] == []
