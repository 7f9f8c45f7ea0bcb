"""Every snippet of Transformers' guide "Loading kernels", run as it stands in the guide.

The hub of the tests has a small Qwen3 under the guide's id. What is put in place: the device where there is no GPU, the
path of the local kernel, and `input_ids` and `labels`, which the guide leaves to the reader.
"""

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from tests.adapters import world
from tests.adapters.world import close, logits, serving

GUIDE = (pathlib.Path(__file__).parent / "loading_kernels.md").read_text(encoding="utf-8")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def snippets(language):
    """`(heading, code)` of every fenced block of that language, in the order of the guide."""
    heading, found = "", []
    for match in re.finditer(
        r"^#+ (?P<heading>[^\n]+)$|^```(?P<language>\w+)\n(?P<code>.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL
    ):
        if match["heading"]:
            heading = match["heading"]
        elif match["language"] == language:
            found.append((heading, match["code"]))
    return found


PY = snippets("py")
CODE = {
    "Loading kernels": 1,
    "Attention kernels": 2,
    "Mode-awareness": 2,
    "KernelConfig": 2,
    "Local kernels": 1,
    "Disabling kernels": 1,
}


def test_the_guide_is_read_whole():
    counted = [heading for heading, _ in PY]
    assert {heading: counted.count(heading) for heading in counted} == CODE
    assert len(re.findall(r"^```", GUIDE, re.MULTILINE)) == 2 * (len(PY) + len(snippets("bash")))


def run(code, tmp_path, **given):
    """The snippet's namespace after it ran."""
    if DEVICE != "cuda":
        code = code.replace('device_map="cuda"', f'device_map="{DEVICE}"')
    code = code.replace("/path/to/liger_kernels", str(tmp_path / "liger_kernels"))
    ids = torch.arange(2, 12, device=DEVICE)[None]
    namespace = {"input_ids": ids, "labels": ids, **given}
    exec(compile(code, "loading_kernels.md", "exec"), namespace)  # running it is the point
    return namespace


def find(heading, nth=0):
    return [code for h, code in PY if h == heading][nth]


@pytest.fixture
def local(tmp_path):
    """The folder of the local snippet."""
    for path, data in world.kernel("liger", world.LIGER).items():
        (tmp_path / "liger_kernels" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "liger_kernels" / path).write_bytes(data)
    return tmp_path / "liger_kernels"


@pytest.fixture
def expected(published):
    return logits(world.plain(), torch.arange(2, 12)[None])


def result(model):
    return logits(model, torch.arange(2, 12, device=DEVICE)[None]).cpu()


def test_use_kernels(installed, tmp_path, expected):
    model = run(find("Loading kernels"), tmp_path)["model"]
    assert serving(installed, model)["model.norm"] == "layers:RMSNorm"
    close(result(model), expected)


@pytest.mark.parametrize("nth", range(2))
def test_attention_kernels(installed, tmp_path, expected, published, nth):
    code = find("Attention kernels", nth)
    model = run(code, tmp_path)["model"]
    asked = re.findall(r'attn_implementation="(.+?)"', code)[-1]
    assert model.config._attn_implementation == asked
    close(result(model), expected)
    assert published.requests("*flash-attn2*")


@pytest.mark.parametrize(("comment", "version"), [("pin to a specific version", "2.1.0"), ("semantic versioning", "2.2.0")])
def test_a3_a4_an_attention_string_takes_the_version_that_it_names(installed, tmp_path, published, monkeypatch, comment, version):
    (code,) = [part for part in re.split(r"\n(?=#)", find("Attention kernels", 1)) if comment in part]
    loaded = []
    load = installed.load
    monkeypatch.setattr(installed, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    run("from transformers import AutoModelForCausalLM\n" + code, tmp_path)
    assert {module.VERSION for module in loaded} == {version}


def test_mode_awareness(installed, tmp_path, published):
    names = run(find("Mode-awareness"), tmp_path)
    assert names["output"].shape[1] > names["input_ids"].shape[1]
    assert names["model"].training
    assert all(p.grad is not None for p in names["model"].parameters())
    reference = world.plain().train()
    reference(torch.arange(2, 12)[None], labels=torch.arange(2, 12)[None]).loss.backward()
    for mine, theirs in zip(names["model"].parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.cpu(), theirs.grad, atol=1e-4, rtol=1e-3)


def test_kernelize_with_the_modes_of_the_guide(installed, tmp_path, published):
    model = run(find("Loading kernels"), tmp_path)["model"]
    code = find("Mode-awareness", 1)
    steps = ast.parse(code).body
    assert len(steps) == 4
    names = {"model": model}
    for i in range(1, len(steps)):
        part = ast.unparse(ast.Module([steps[0], steps[i]], []))
        run(part, tmp_path, **names)
        assert serving(installed, model)["model.norm"] == "layers:RMSNorm"
    run(code, tmp_path, **names)


def test_kernel_config(installed, tmp_path, expected, published, said):
    model = run(find("KernelConfig"), tmp_path)["model"]
    assert serving(installed, model)["model.norm"] == "kernels-community/liger_kernels:LigerRMSNorm"
    assert [line for line in said() if "LlamaAttention" in line] == [
        "LlamaAttention: this model has none (it has Qwen3Attention)"
    ]
    close(result(model), expected)


def test_kernel_config_by_device(installed, tmp_path, expected, published):
    config = run(find("KernelConfig", 1), tmp_path)["kernel_config"]
    code = find("Loading kernels").replace("use_kernels=True,", "use_kernels=True, kernel_config=kernel_config,")
    model = run(code, tmp_path, kernel_config=config)["model"]
    serves = "kernels-community/liger_kernels:LigerRMSNorm" if DEVICE == "cuda" else "layers:RMSNorm"
    assert serving(installed, model)["model.norm"] == serves
    close(result(model), expected)


def test_local_kernels(installed, tmp_path, expected, local):
    model = run(find("Local kernels"), tmp_path)["model"]
    assert serving(installed, model)["model.norm"] == f"{local}:LigerRMSNorm"
    close(result(model), expected)


def test_disabling_a_layer(installed, tmp_path, expected):
    model = run(find("Disabling kernels"), tmp_path)["model"]
    assert not [path for path in serving(installed, model) if "norm" in path]
    assert serving(installed, model)["model.layers.0.mlp"] == "layers:SwiGLUMLP"
    close(result(model), expected)


# -- the shell ------------------------------------------------------------------------------------------------------


def shell(tmp_path, hub, hub_cache, before, code, python=f"{sys.executable} -W ignore", **env):
    """`before` in a shell, then Python with `code`, as a user does it."""
    script = tmp_path / "script.py"
    script.write_text(code)
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(hub_cache),
        "HF_HOME": str(tmp_path / "home"),
        "KERNELSWAP_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        **env,
    }
    done = subprocess.run(
        ["/bin/sh", "-c", f"{before}\nexec {python} {script}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip(), done.stderr


def test_the_shell_snippets_are_those_that_are_tested():
    assert [heading for heading, _ in snippets("bash")] == ["Loading kernels", "Disabling kernels", "Installation issues"]
    assert snippets("bash")[0] == ("Loading kernels", "pip install -U kernels\n")
    assert snippets("bash")[2][1] == snippets("bash")[0][1]  # whatever that brings: tests/adapters/test_seams.py, a1


def test_the_environment_variable_disables_kernels_globally(tmp_path, published, hub_cache):
    code = (
        "import kernelswap; kernelswap.install(build='never')\n"
        + find("KernelConfig").replace('"cuda"', '"cpu"')
        + "print(model.use_kernels, kernelswap.api.default().applied(model))"
    )
    out, err = shell(tmp_path, published, hub_cache, snippets("bash")[1][1], code)
    assert out == "False None"
    assert err.count("kernels are switched off: USE_HUB_KERNELS is 0") == 1
    assert not published.requests("*kernels*")


WAYS = {
    "install": "import kernelswap; kernelswap.install()\n",
    "import": "",
    "run": "",
}


@pytest.mark.parametrize("way", WAYS)
def test_three_ways_to_switch_on_in_a_script_of_its_own(tmp_path, published, hub_cache, way):
    """Nothing is prepared: kernels come from the hub, and there is no compiler for those that come with kernelswap."""
    code = WAYS[way] + find("KernelConfig").replace('"cuda"', '"cpu"')
    if way == "import":
        code = code.replace("from transformers import", "from kernelswap.transformers import")
    code += (
        "\nimport kernelswap.api as api"
        "\nprint(sorted({o.site.layer for o in api.default().applied(model).outcomes if hasattr(o, 'inference')}))"
    )
    python = f"{sys.executable} -W ignore -m kernelswap run" if way == "run" else f"{sys.executable} -W ignore"
    out, err = shell(tmp_path, published, hub_cache, ":", code, python, CXX="/nonexistent/c++")
    assert out == "['RMSNorm']"
    assert err.count("kernelswap/layers") == 1
