import json
from dataclasses import replace
from pathlib import Path

import pytest

from kernelswap import metadata, render, spec
from kernelswap.resolve import resolve
from kernelswap.types import (
    Artifact,
    Candidate,
    Choice,
    Dependency,
    Device,
    Digest,
    Evidence,
    Implementation,
    Judged,
    Kept,
    Machine,
    Metadata,
    Provenance,
    Resolution,
    Row,
    Site,
    Swap,
    Verdict,
)

ASKED = spec.parse("org/norm@1:RMSNorm")
LINUX = {"os": "linux", "cpu": "x86_64", "python": (3, 12), "torch": (2, 13), "cxx11": True}
CUDA = Machine(
    **LINUX,
    backend="cuda",
    backend_version=(13, 0),
    devices=(Device("cuda", 0, "H100", (9, 0), "sm90"), Device("xpu", 1, "Arc"), Device("rocm", 0, "MI300X", None, "gfx942")),
    why=(("backend", "torch.version.cuda is 13.0"), ("cuda:0", "visible to torch")),
)
META = Metadata("norm", "_norm_0", 1, "MIT", "cuda")


def candidates(*variants):
    return [Candidate(ASKED, "hub", "org/norm", "0123456789abcdef" + "0" * 24, v) for v in variants]


# -- resolution ---------------------------------------------------------------------------------------------------


def test_a_resolution_is_one_line_for_each_build_with_its_reason():
    found = resolve(
        ASKED,
        candidates("torch-universal", "torch213-cu130-x86_64-linux", "torch-cpu"),
        CUDA,
        lambda _: META,
        notes=["followed a redirect"],
    )
    assert render.resolution(found).splitlines() == [
        "org/norm@1:RMSNorm: torch213-cu130-x86_64-linux",
        "  *  torch213-cu130-x86_64-linux  chosen, hub org/norm at 0123456789ab",
        "  +  torch-universal              fits",
        "  -  torch-cpu                    built for cpu, this is cuda",
        "  note: followed a redirect",
    ]


def test_when_nothing_fits_the_machine_is_named():
    found = resolve(ASKED, candidates("torch-cpu"), CUDA, lambda _: META)
    assert render.resolution(found).splitlines() == [
        "org/norm@1:RMSNorm: no build fits",
        "  -  torch-cpu  built for cpu, this is cuda",
        "  none of 1 builds fits x86_64 linux, torch 2.13, cuda 13.0",
    ]
    nothing = Resolution(ASKED, Machine("linux", "x86_64"), ())
    assert render.resolution(nothing).splitlines() == ["org/norm@1:RMSNorm: no build fits", "  no builds were found"]


def test_a_resolution_as_json_has_everything():
    full = replace(
        META,
        minver=(0, 17, 0),
        kernel_depends=(Dependency("org/base", version=1),),
        digest=Digest("sha256", (("a", "b"),)),
        provenance=Provenance("1", commit="c" * 40),
        archs=("9.0",),
    )
    found = resolve(ASKED, candidates("torch-cuda", "torch-cpu"), CUDA, lambda _: full, notes=["n"])
    plain = json.loads(json.dumps(render.resolution_json(found), allow_nan=False))
    here = {"source": "hub", "name": "org/norm", "commit": "0123456789abcdef" + "0" * 24}
    assert plain["requirement"] == {
        "text": "org/norm@1:RMSNorm",
        "source": "hub",
        "name": "org/norm",
        "version": 1,
        "revision": None,
        "constraints": None,
        "layer": "RMSNorm",
    }
    assert plain["chosen"] == {**here, "variant": "torch-cuda"}
    assert plain["candidates"] == [
        {**here, "variant": "torch-cuda", "rejected": None},
        {**here, "variant": "torch-cpu", "rejected": "built for cpu, this is cuda"},
    ]
    assert plain["notes"] == ["n"]
    assert plain["metadata"]["minver"] == "0.17.0"
    assert plain["metadata"]["kernel_depends"] == [{"name": "org/base", "version": 1, "revision": None}]
    assert (plain["metadata"]["digest"], plain["metadata"]["commit"], plain["metadata"]["archs"]) == ("sha256", "c" * 40, ["9.0"])


def test_what_there_is_none_of_is_null():
    plain = render.resolution_json(Resolution(ASKED, CUDA, ()))
    assert (plain["chosen"], plain["metadata"], plain["candidates"]) == (None, None, [])
    bare = render.metadata_json(metadata.parse(b"{}"))
    assert (bare["minver"], bare["digest"], bare["commit"]) == (None, None, None)
    json.dumps(bare, allow_nan=False)


# -- machine ------------------------------------------------------------------------------------------------------


def test_a_machine_is_one_line_for_each_field_with_its_reason():
    assert render.machine(CUDA).splitlines() == [
        "os               linux",
        "cpu              x86_64",
        "python           3.12",
        "free_threaded    no",
        "torch            2.13",
        "cxx11            yes",
        "tvm_ffi          -",
        "backend          cuda              torch.version.cuda is 13.0",
        "backend_version  13.0",
        "macos            -",
        "cuda:0           H100 (9.0, sm90)  visible to torch",
        "xpu:1            Arc",
        "rocm:0           MI300X (gfx942)",
    ]


def test_a_machine_as_json_has_the_same_fields():
    plain = json.loads(json.dumps(render.machine_json(CUDA), allow_nan=False))
    assert plain["torch"] == [2, 13]
    assert plain["tvm_ffi"] is None
    assert plain["devices"][0] == {"type": "cuda", "index": 0, "name": "H100", "capability": [9, 0], "arch": "sm90"}
    assert plain["devices"][1]["capability"] is None
    assert plain["why"] == {"backend": "torch.version.cuda is 13.0", "cuda:0": "visible to torch"}
    assert set(plain) == set(CUDA.__dataclass_fields__)


# -- outcomes -----------------------------------------------------------------------------------------------------

ARTIFACT = Artifact(
    Candidate(spec.parse("kernelswap/layers"), "bundled", "layers", "c0ffee" * 6, "torch-cpu"),
    Path("somewhere"),
    "d" * 64,
    META,
    evidence=(Evidence("digest", "12 files"),),
)
BUILDS = tuple(
    Judged(replace(ARTIFACT.candidate, variant=variant), why)
    for variant, why in (("torch-cpu", None), ("torch-universal", None), ("torch-cuda", "built for cuda, this is cpu"))
)
NORM = Implementation(
    "RMSNorm", "module", lambda s, x: x, backward=True, compiles=False, origin=ARTIFACT, reads=("weight",), builds=BUILDS
)


def site(i, layer="RMSNorm", *, training=False):
    row = Row(layer)
    return Site(f"model.layers.{i}.norm", "module", layer, f"pkg.mod.Qwen3{layer}", "cpu", "torch.float32", training, row)


def good(kernel, original):
    reason = f"as accurate as the original: error {kernel:.1e}, original {original:.1e}"
    return Verdict(True, reason, key="k", error_original=original, error_kernel=kernel)


def swap(i, kernel=1e-7, original=2e-7, **more):
    choice = Choice(
        NORM, passed=(("other/norm@1:N", "is for cuda, this is cpu"),), verdict=good(kernel, original), later=("third/norm@2:N",)
    )
    return Swap(site(i, **more), inference=choice, training=choice)


HALF = Swap(
    site(9),
    inference=Choice(NORM, verdict=Verdict(True, "agrees with the original", seconds_original=2e-3, seconds_kernel=4.56789e-4)),
    training=Choice(None, passed=(("a/b:N", "has no backward"), ("a/b:N", "has no backward"))),
)
KEPT = Kept(site(8, "SwiGLUMLP"), "has a LoRA adapter", passed=(("a/b:M", "would bypass it"),))


def test_outcomes_are_grouped_with_counts_and_the_worst_error_of_each_group():
    text = render.outcomes([swap(0), KEPT, swap(1, kernel=3e-7), swap(2, original=5e-7), HALF])
    assert [[cell.strip() for cell in line.split("  ") if cell] for line in text.splitlines()] == [
        ["count", "layer", "original", "served by", "why"],
        [
            "3",
            "RMSNorm",
            "Qwen3RMSNorm",
            "kernelswap/layers:RMSNorm (torch-cpu)",
            "as accurate as the original; error 3.0e-07, original 5.0e-07",
        ],
        ["1", "SwiGLUMLP", "Qwen3SwiGLUMLP", "the original", "has a LoRA adapter"],
        [
            "1",
            "RMSNorm",
            "Qwen3RMSNorm",
            "inference: kernelswap/layers:RMSNorm (torch-cpu); training: the original",
            "inference: agrees with the original; training: a/b:N: has no backward",
        ],
        ["4 of 5 swapped"],
    ]
    assert len({line.index("Qwen3") for line in text.splitlines()[1:4]}) == 1  # the columns line up


def test_calls_are_summed_where_they_were_counted():
    text = render.outcomes([swap(0), swap(1), KEPT], calls={"model.layers.0.norm": 3, "model.layers.1.norm": 4})
    assert text.splitlines()[1].endswith("; 7 calls")
    assert "calls" not in text.splitlines()[2]


def test_no_sites_is_said():
    assert render.outcomes([]) == "no sites"
    assert render.outcomes_json([]) == []


def test_the_long_form_is_one_block_for_each_module():
    assert render.outcomes([swap(0, training=True), HALF, KEPT], long=True, calls={"model.layers.0.norm": 2}).splitlines() == [
        "model.layers.0.norm: RMSNorm, pkg.mod.Qwen3RMSNorm, cpu, torch.float32",
        "  inference: kernelswap/layers:RMSNorm (torch-cpu)",
        "    chosen as candidate 2 of 3, the first that serves inference here; build torch-cpu, the best of 2 that fit",
        "    from bundled layers at c0ffeec0ffee, digest dddddddddddd",
        "    checked: as accurate as the original; error 1.0e-07, original 2.0e-07",
        "    passed over other/norm@1:N: is for cuda, this is cpu",
        "    not tried, since this serves: third/norm@2:N",
        "    build torch-universal not taken: fits, but torch-cpu is preferred",
        "    build torch-cuda not taken: built for cuda, this is cpu",
        "  training (now): kernelswap/layers:RMSNorm (torch-cpu)",
        "    chosen as candidate 2 of 3, the first that serves training here; build torch-cpu, the best of 2 that fit",
        "    from bundled layers at c0ffeec0ffee, digest dddddddddddd",
        "    checked: as accurate as the original; error 1.0e-07, original 2.0e-07",
        "    passed over other/norm@1:N: is for cuda, this is cpu",
        "    not tried, since this serves: third/norm@2:N",
        "    build torch-universal not taken: fits, but torch-cpu is preferred",
        "    build torch-cuda not taken: built for cuda, this is cpu",
        "  calls served: 2",
        "model.layers.9.norm: RMSNorm, pkg.mod.Qwen3RMSNorm, cpu, torch.float32",
        "  inference (now): kernelswap/layers:RMSNorm (torch-cpu)",
        "    chosen as the only candidate; build torch-cpu, the best of 2 that fit",
        "    from bundled layers at c0ffeec0ffee, digest dddddddddddd",
        "    checked: agrees with the original; 457 us, original 2 ms",
        "    build torch-universal not taken: fits, but torch-cpu is preferred",
        "    build torch-cuda not taken: built for cuda, this is cpu",
        "  training: the original",
        "    passed over a/b:N: has no backward",
        "    passed over a/b:N: has no backward",
        "  calls served: 0",
        "model.layers.8.norm: SwiGLUMLP, pkg.mod.Qwen3SwiGLUMLP, cpu, torch.float32",
        "  kept: has a LoRA adapter",
        "    passed over a/b:M: would bypass it",
    ]


def test_the_root_module_and_what_was_not_checked_are_named():
    bare = Choice(NORM)
    root = Swap(replace(site(0), path=""), inference=bare, training=Choice(None))
    text = render.outcomes([root], long=True)
    assert text.startswith("(the model): RMSNorm")
    assert "calls served" not in text
    line = render.outcomes([root]).splitlines()[1]
    assert line.endswith("inference: not checked; training: nothing is registered for it")


def test_a_refused_verdict_says_refused_and_keeps_its_numbers():
    refused = Verdict(False, "differs in output: error 1.0e-01", error_original=1e-7, error_kernel=1e-1)
    text = render.outcomes([Swap(site(0), Choice(NORM, verdict=refused), Choice(None))], long=True)
    assert "refused: differs in output: error 1.0e-01; error 1.0e-01, original 1.0e-07" in text


def test_configurations_that_were_measured_on_this_device_are_told():
    tuned = replace(NORM, tuned=("rms_norm.forward (1 of 2 measured)", "rope (1 of 1 measured)"))
    rows = [Swap(site(0), inference=Choice(tuned), training=Choice(NORM))]
    said = "    configurations measured on this device: rms_norm.forward (1 of 2 measured), rope (1 of 1 measured)"
    assert render.outcomes(rows, long=True).splitlines().count(said) == 1
    plain = render.outcomes_json(rows)[0]
    assert plain["inference"]["implementation"]["tuned"] == list(tuned.tuned)
    assert plain["training"]["implementation"]["tuned"] == []


def test_outcomes_as_json_have_everything():
    rows = [swap(0), HALF, KEPT]
    plain = json.loads(json.dumps(render.outcomes_json(rows, calls={"model.layers.0.norm": 2}), allow_nan=False))
    assert plain[0] == {
        "path": "model.layers.0.norm",
        "kind": "module",
        "layer": "RMSNorm",
        "target": "pkg.mod.Qwen3RMSNorm",
        "device": "cpu",
        "dtype": "torch.float32",
        "mode": "inference",
        "name": None,
        "active": "kernelswap/layers:RMSNorm (torch-cpu)",
        "swapped": True,
        "inference": {**plain[0]["training"], "why": plain[0]["training"]["why"].replace("training", "inference")},
        "training": {
            "implementation": {
                "spec": "kernelswap/layers:RMSNorm",
                "requirement": "kernelswap/layers",
                "source": "bundled",
                "name": "layers",
                "commit": "c0ffee" * 6,
                "variant": "torch-cpu",
                "digest": "d" * 64,
                "id": "_norm_0",
                "version": 1,
                "license": "MIT",
                "evidence": [{"verifier": "digest", "statement": "12 files"}],
                "layer": "RMSNorm",
                "backward": True,
                "compiles": False,
                "reads": ["weight"],
                "other_builds": [
                    {"variant": "torch-universal", "why": "fits, but torch-cpu is preferred"},
                    {"variant": "torch-cuda", "why": "built for cuda, this is cpu"},
                ],
                "tuned": [],
            },
            "why": "candidate 2 of 3, the first that serves training here; build torch-cpu, the best of 2 that fit",
            "verdict": {
                "accepted": True,
                "reason": "as accurate as the original: error 1.0e-07, original 2.0e-07",
                "key": "k",
                "error_original": 2e-7,
                "error_kernel": 1e-7,
                "seconds_original": None,
                "seconds_kernel": None,
                "details": {},
            },
            "measured": [],
            "passed": [{"spec": "other/norm@1:N", "why": "is for cuda, this is cpu"}],
            "not_tried": ["third/norm@2:N"],
        },
        "calls": 2,
    }
    assert plain[1]["training"]["implementation"] is None
    assert plain[1]["training"]["verdict"] is None
    assert plain[1]["training"]["why"] is None
    assert plain[2]["active"] == "the original"
    assert plain[1]["calls"] == 0
    assert (plain[2]["swapped"], plain[2]["reason"]) == (False, "has a LoRA adapter")
    assert render.outcomes_json(rows)[0]["calls"] is None


def test_what_was_measured_is_said_by_what_serves():
    one = (("1 row", "a/b:N", 2.0), ("2-16 rows", "a/b:N", 3.456), ("17-256 rows", "", None), ("over 4096 rows", "a/b:N", None))
    text = "measured: 2.00x on 1 row, 3.46x on 2-16 rows, not measured on over 4096 rows; the original on 17-256 rows"
    assert render.measured(Choice(NORM, measured=one)) == text
    line = render.outcomes([Swap(site(0), Choice(NORM, measured=one), Choice(NORM, measured=one))]).splitlines()[1]
    assert line.endswith(f"not checked; {text}")
    two = (("1 row", "a/b:N", 2.0), ("2-16 rows", "torch.compile", 4.0))
    assert render.measured(Choice(NORM, measured=two)) == "measured: a/b:N 2.00x on 1 row; torch.compile 4.00x on 2-16 rows"
    assert render.measured(Choice(NORM)) == ""
    plain = render.outcomes_json([Swap(site(0), Choice(NORM, measured=one), Choice(None))])[0]
    assert plain["inference"]["measured"][2] == {"size": "17-256 rows", "serves": None, "speedup": None}


@pytest.mark.parametrize("error", [float("nan"), float("inf"), float("-inf")])
def test_what_json_cannot_say_goes_as_text(error):
    plain = render.verdict_json(Verdict(False, "x", error_kernel=error))
    assert plain["error_kernel"] == str(error)
    json.dumps(plain, allow_nan=False)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 ns"), (3.2e-9, "3.2 ns"), (1.5e-6, "1.5 us"), (0.0123456, "12.3 ms"), (1.0, "1 s"), (72.4, "72.4 s")],
)
def test_durations(value, text):
    assert render.seconds(value) == text
