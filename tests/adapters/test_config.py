"""KernelConfig: every form of its mapping, what it means in a model, and the object itself."""

import copy
import json
import pickle
import threading
from pathlib import PureWindowsPath

import pytest
from tests import swapping
from tests.adapters import world
from tests.adapters.world import close, logits, plain, serving

from kernelswap.adapters.transformers.config import KernelConfig
from kernelswap.adapters.transformers.mapping import read
from kernelswap.errors import TableError
from kernelswap.types import Mode, Use

LIGER = "kernels-community/liger-kernels"
NORM = f"{LIGER}:LigerRMSNorm"


def uses(value, *, local=False, key="RMSNorm"):
    (entry,), problems = read({key: value}, local=local)
    assert problems == ()
    return entry.uses


# -- forms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "specs"),
    [
        ("org/repo:Layer", ["org/repo:Layer"]),
        ("org/repo@2:Layer", ["org/repo@2:Layer"]),
        ("org/repo@>=2.0,<3.0:Layer", ["org/repo@>=2.0,<3.0:Layer"]),
        ("kernelswap/layers:RMSNorm", ["kernelswap/layers:RMSNorm"]),
        (("org/repo:Layer", {"version": 3}), ["org/repo@3:Layer"]),
        (("org/repo:Layer", {"version": 0}), ["org/repo@0:Layer"]),
        (("org/repo:Layer", {"revision": "refs/pr/1"}), ["org/repo@refs/pr/1:Layer"]),
        (("org/repo:Layer", {"version": 1, "trust_remote_code": True}), ["org/repo@1:Layer"]),
        (["org/repo:Layer", {"version": 3}], ["org/repo@3:Layer"]),
        (["org/a:Layer", ("org/b:Layer", {"version": 1})], ["org/a:Layer", "org/b@1:Layer"]),
    ],
)
def test_a_kernel_is_written_as_a_text_a_pair_or_several(value, specs):
    assert uses(value) == tuple(Use(s) for s in specs)


@pytest.mark.parametrize(
    "device", ["cuda", "rocm", "xpu", "npu", "metal", "mps", "neuron", "tpu", "cpu", "cuda:sm90", "rocm:gfx942"]
)
def test_a5_a13_every_device_has_its_own_kernel(device):
    on = "mps" if device == "metal" else device
    assert uses({device: "org/repo:Layer"}) == (Use("org/repo:Layer", on=(on,)),)


@pytest.mark.parametrize(
    ("key", "mode"),
    [
        (Mode.TRAINING, Mode.TRAINING),
        (Mode.INFERENCE | Mode.TORCH_COMPILE, Mode.INFERENCE | Mode.TORCH_COMPILE),
        ("training", Mode.TRAINING),
        ("inference+compile", Mode.INFERENCE | Mode.TORCH_COMPILE),
        ("training | torch_compile", Mode.TRAINING | Mode.TORCH_COMPILE),
    ],
)
def test_every_mode_has_its_own_kernel(key, mode):
    expected = (Use("org/repo:Layer", on=("cuda",), modes=(mode,)),)
    assert uses({"cuda": {key: "org/repo:Layer"}}) == uses({key: {"cuda": "org/repo:Layer"}}) == expected


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("/abs/path:Layer", "dir:///abs/path:Layer"),
        (r"C:\kernels\liger:Layer", r"dir://C:\kernels\liger:Layer"),
        ("C:/kernels/liger:Layer", "dir://C:/kernels/liger:Layer"),
        (r"\\server\share\liger:Layer", r"dir://\\server\share\liger:Layer"),
        ("./liger:Layer", "dir://./liger:Layer"),
        (PureWindowsPath(r"D:\k\liger:Layer"), r"dir://D:\k\liger:Layer"),
    ],
)
def test_a7_local_kernels_are_paths_of_any_system(text, spec):
    assert uses(text, local=True) == (Use(spec),)


def test_several_names_have_one_kernel():
    for key in (("RMSNorm", "Qwen3RMSNorm"), "RMSNorm|Qwen3RMSNorm"):
        (entry,), _ = read({key: NORM}, local=False)
        assert entry.names == ("RMSNorm", "Qwen3RMSNorm")


@pytest.mark.parametrize("value", ["", None, "  "])
def test_nothing_leaves_a_layer_alone(value):
    (entry,), problems = read({"RMSNorm": value}, local=False)
    assert entry.off
    assert problems == ()


def test_repositories_of_other_libraries_are_read():
    class LayerRepository:
        def __init__(self):
            self._repo_id, self.layer_name, self._version, self._revision, self._trust_remote_code = (
                "org/repo",
                "Layer",
                2,
                None,
                False,
            )

    class LocalLayerRepository:
        _repo_path, layer_name = PureWindowsPath("C:/k"), "Layer"

    assert uses({"cuda": {Mode.TRAINING: LayerRepository()}}) == (Use("org/repo@2:Layer", ("cuda",), (Mode.TRAINING,)),)
    assert uses(LocalLayerRepository(), local=True) == (Use(r"dir://C:\k:Layer"),)


PROBLEMS = [
    ({"RMSNorm": "org/repo"}, "RMSNorm: 'org/repo' names no layer, expected org/repo:Layer"),
    ({"RMSNorm": "repo:Layer"}, "RMSNorm: 'repo:Layer'"),
    ({"RMSNorm": {"cudda": NORM}}, "did you mean cuda?"),
    ({"RMSNorm": {"trianing": NORM}}, "did you mean training?"),
    ({"RMSNorm": {}}, "RMSNorm: an empty dict says nothing"),
    ({"RMSNorm": []}, "names no kernel"),
    ({"RMSNorm": 3}, "RMSNorm: 3 is not a kernel"),
    ({3: NORM}, "is not a name"),
    ({"RMSNorm": {Mode(Mode.INFERENCE.value + Mode.TRAINING.value): NORM}}, "exclude each other"),
    ({"RMSNorm": {"cuda": {"cpu": NORM}}}, "cpu inside cuda"),
    ({"RMSNorm": {"training": ""}}, "cannot be left alone in TRAINING only"),
    ({"RMSNorm": (NORM, {"version": 1, "revision": "main"})}, "exclude each other"),
    ({"RMSNorm": (f"{LIGER}@3:LigerRMSNorm", {"version": 1})}, "has a version already"),
    ({"RMSNorm": (NORM, {"verison": 1})}, "did you mean 'version'?"),
    ({"RMSNorm": (NORM, {"version": 1.5})}, "expected a number"),
    ({"RMSNorm": (NORM, {"trust_remote_code": "yes"})}, "expected True, False or a list"),
    (["RMSNorm"], "kernel_mapping is list, expected a dict"),
]


@pytest.mark.parametrize(("mapping", "problem"), PROBLEMS)
def test_a_mistake_is_reported_where_it_is(mapping, problem):
    with pytest.raises(TableError) as e:
        KernelConfig(mapping)
    assert problem in str(e.value)


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(TableError) as e:
        KernelConfig({"RMSNorm": "org/repo", "SiLU": {"cudda": NORM, "cpu": 3}}, use_local_kernel="yes")
    assert len(str(e.value).splitlines()) == 5  # what was asked, and four


# -- the object -----------------------------------------------------------------------------------------------------

FULL = KernelConfig(
    {
        ("RMSNorm", "Qwen3RMSNorm"): {"cuda": (NORM, {"version": 3}), "metal": "org/repo:Layer"},
        "SiLU": {Mode.TRAINING: [NORM, "org/b:Layer"], Mode.INFERENCE | Mode.TORCH_COMPILE: "org/c:Layer"},
        "model.layers.0.*": "",
    },
    inherit_mapping=False,
)


def test_it_round_trips_through_json_files_and_pickle(tmp_path):
    FULL.save_pretrained(tmp_path / "model")
    for again in (
        KernelConfig.from_pretrained(tmp_path / "model"),
        KernelConfig.from_dict(json.loads(FULL.to_json_string())),
        pickle.loads(pickle.dumps(FULL)),
        copy.deepcopy(FULL),
    ):
        assert again == FULL
        assert {e.names: set(e.uses) for e in again.entries()} == {e.names: set(e.uses) for e in FULL.entries()}


def test_it_compares_by_content_and_prints_itself():
    same = KernelConfig({"RMSNorm": {"cuda": {"training": NORM}}})
    assert same == KernelConfig({"RMSNorm": {"cuda": {Mode.TRAINING: NORM}}})
    assert same != KernelConfig({"RMSNorm": {"cuda": {"training": NORM}}}, inherit_mapping=False)
    assert same != "something else"
    assert repr(KernelConfig({"RMSNorm": NORM}, use_local_kernel=True)) == (
        f"KernelConfig(kernel_mapping={{'RMSNorm': '{NORM}'}}, use_local_kernel=True)"
    )


def test_it_keeps_its_own_copy_of_the_mapping():
    mapping = {"RMSNorm": {"cuda": NORM}}
    config = KernelConfig(mapping)
    mapping["RMSNorm"]["cuda"] = "org/other:Layer"
    assert config.kernel_mapping == {"RMSNorm": {"cuda": NORM}}


def test_d3_update_kernel_adds_to_what_is_there_and_its_result_is_valid():
    config = KernelConfig({"SiLU": "org/repo:SiLU"})
    config.update_kernel("org/a", "RMSNorm", "Layer", "cuda", Mode.TRAINING, revision="main")
    config.update_kernel("org/b", "RMSNorm", "Layer", "cuda", Mode.INFERENCE, version=2)
    config.update_kernel("org/c", "RMSNorm", "Layer", "cpu", Mode.INFERENCE)
    entry = next(e for e in config.entries() if e.names == ("RMSNorm",))
    assert set(entry.uses) == {
        Use("org/a@main:Layer", ("cuda",), (Mode.TRAINING,)),
        Use("org/b@2:Layer", ("cuda",), (Mode.INFERENCE,)),
        Use("org/c:Layer", ("cpu",), (Mode.INFERENCE,)),
    }
    with pytest.raises(TableError):
        config.update_kernel("org/c", "RMSNorm", "Layer", "cpuu", Mode.INFERENCE)
    assert len(config.kernel_mapping) == 2


def test_one_of_transformers_own_is_as_good(qwen, installed):
    import kernelswap

    kernelswap.uninstall()
    from transformers.utils.kernel_config import KernelConfig as Theirs

    theirs = Theirs({"RMSNorm": NORM})
    kernelswap.install(installed)
    from transformers import KernelConfig as Ours

    assert Ours is KernelConfig
    assert Theirs is not Ours
    assert isinstance(theirs, Ours)
    assert serving(installed, qwen(kernel_config=theirs))["model.norm"] == NORM
    with pytest.raises(TableError, match="expected `kernel_config` to be a KernelConfig, found str"):
        qwen(kernel_config="RMSNorm")


# -- in a model -----------------------------------------------------------------------------------------------------


def norms(installed, model):
    return {path: served for path, served in serving(installed, model).items() if "norm" in path}


def test_a_kernel_config_is_enough_to_switch_on(qwen, installed):
    model = qwen(kernel_config=KernelConfig({"RMSNorm": NORM}))
    assert set(norms(installed, model).values()) == {NORM}
    assert model.kernel_config == KernelConfig({"RMSNorm": NORM})
    close(logits(model), logits(plain()))


def test_a5_the_kernel_for_this_device_is_taken_and_no_other(qwen, installed, hub):
    by_device = {"cuda": "kernels-community/none:A", "rocm": "org/none:B", "metal": "org/none:C", "xpu": "org/none:D"}
    model = qwen(kernel_config={"RMSNorm": {**by_device, "cpu": NORM}})
    assert set(norms(installed, model).values()) == {NORM}
    assert set(norms(installed, qwen(kernel_config={"RMSNorm": by_device})).values()) == {"layers:RMSNorm"}
    assert not hub.requests("*none*")


def test_a6_an_empty_value_leaves_the_layer_alone(qwen, installed):
    model = qwen(kernel_config={"RMSNorm": ""})
    assert norms(installed, model) == {}
    assert "model.layers.0.mlp" in serving(installed, model)
    assert "left alone: you asked for it" in installed.explain(model)


def test_a6_a_layer_can_be_left_alone_on_one_device(qwen, installed):
    assert norms(installed, qwen(kernel_config={"RMSNorm": {"cpu": "", "cuda": NORM}})) == {}
    assert len(norms(installed, qwen(kernel_config={"RMSNorm": {"cuda": ""}}))) == 9


def test_a7_local_kernels(qwen, installed, make_repo):
    root = swapping.repository(make_repo, "local-norms")
    model = qwen(kernel_config=KernelConfig({"RMSNorm": f"{root}:RMSNorm"}, use_local_kernel=True))
    assert set(norms(installed, model).values()) == {f"{root}:RMSNorm"}
    assert serving(installed, model)["model.layers.0.mlp"] == "layers:SwiGLUMLP"  # the rest of the table goes on


def test_inherit_mapping_false_leaves_only_the_mapping(qwen, installed):
    model = qwen(kernel_config=KernelConfig({"RMSNorm": NORM}, inherit_mapping=False))
    assert set(serving(installed, model).values()) == {NORM}


def test_a8_a_plain_text_is_at_the_version_that_the_table_names(qwen, installed):
    model = qwen(kernel_config={"RMSNorm": NORM})
    (outcome,) = [o for o in installed.applied(model).outcomes if o.site.path == "model.norm"]
    assert outcome.inference.implementation.origin.candidate.requirement.version == 3


def test_classes_paths_and_globs_can_be_named(qwen, installed):
    config = {"Qwen3RMSNorm": NORM, "model.layers.0.*": "", "model.norm": "kernelswap/layers:RMSNorm", "apply_rotary_pos_emb": ""}
    found = serving(installed, qwen(kernel_config=config))
    assert not [path for path in found if path.startswith("model.layers.0")]
    assert found["model.layers.1.input_layernorm"] == NORM
    assert "model.layers.1.self_attn|apply_rotary_pos_emb" not in found
    assert norms(installed, qwen(kernel_config={"layers.1.*norm": NORM})) | {"model.norm": ""} != {}
    one = norms(installed, qwen(kernel_config={"layers.1.*norm": NORM}))
    assert {path.split(".")[2] for path, served in one.items() if served == NORM} == {"1"}


def test_a_class_that_only_another_model_has_is_one_line(qwen, installed, said):
    model = qwen(kernel_config={"LlamaAttention": "kernels-community/flash-attn2:FlashAttention2", "LlamaRMSNorm": NORM})
    assert set(norms(installed, model).values()) == {"layers:RMSNorm"}
    assert "LlamaAttention: this model has none (it has Qwen3Attention)" in said()
    assert "LlamaRMSNorm: this model has none (it has Qwen3RMSNorm)" in said()


def test_names_that_mean_nothing_are_an_error_with_the_nearest(qwen):
    with pytest.raises(TableError) as e:
        qwen(kernel_config={"RMSNrom": NORM, "Qwen3ML": "", "model.layer.0.mlp": "", "Nothing": NORM})
    assert str(e.value).splitlines()[1:] == [
        "RMSNrom: is nothing in this model, did you mean RMSNorm?",
        "Qwen3ML: is nothing in this model, did you mean Qwen3MLP?",
        "model.layer.0.mlp: is nothing in this model, did you mean model.layers.0.mlp?",
        "Nothing: is no layer, class or module path of this model, which has LMHead, RMSNorm, SiLU, SwiGLUMLP, rotary_pos_emb",
    ]


def test_d2_a_config_is_not_changed_by_use_and_serves_other_models(qwen, installed):
    config = KernelConfig({"RMSNorm": {"cpu": (NORM, {"version": 3})}, "SwiGLUMLP": ""})
    before = copy.deepcopy(vars(config))
    for model in (qwen(kernel_config=config), qwen(of="org/llama", kernel_config=config), qwen(kernel_config=config)):
        assert set(norms(installed, model).values()) == {NORM}
        model.train()
    assert vars(config) == before


def test_d4_a_config_leaves_nothing_behind_for_models_without(qwen, installed):
    qwen(kernel_config={"RMSNorm": NORM, "Qwen3MLP": ""})
    model = qwen(use_kernels=True)
    assert set(norms(installed, model).values()) == {"layers:RMSNorm"}
    assert "model.layers.0.mlp" in serving(installed, model)


def test_two_configs_in_two_threads(qwen, installed):
    configs = [{"RMSNorm": NORM}, {"RMSNorm": "kernels-community/liger-kernels:Trains"}] * 2
    models = [qwen() for _ in configs]
    threads = [
        threading.Thread(target=m.set_use_kernels, args=(True, KernelConfig(c))) for m, c in zip(models, configs, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, config in zip(models, configs, strict=True):
        assert set(norms(installed, model).values()) == {config["RMSNorm"]}


def test_d8_layers_that_no_class_is_decorated_with_have_targets(qwen, installed, published):
    mlp = "import torch\nfrom torch import nn\n\n\nclass Mlp(nn.Module):\n    def forward(self, x):\n        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))\n"
    published.repo("kernels-community/mlp").branch("v1", world.kernel("mlp", mlp))
    assert serving(installed, qwen(kernel_config={"SwiGLUMLP": "kernels-community/mlp:Mlp"}))["model.layers.0.mlp"].endswith(
        "mlp:Mlp"
    )
    assert "model.layers.0.mlp.act_fn" in serving(
        installed, qwen(kernel_config={"SwiGLUMLP": "", "SiLU": "kernelswap/layers:SiLU"})
    )
