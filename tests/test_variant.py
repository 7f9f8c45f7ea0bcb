import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelswap.errors import BadMetadata
from kernelswap.types import Device, Machine
from kernelswap.variant import Variant, arch_misfit, misfit, parse, rank

LINUX = {"os": "linux", "cpu": "x86_64", "torch": (2, 13), "cxx11": True}
CUDA = Machine(**LINUX, backend="cuda", backend_version=(13, 0))
ROCM = Machine(**LINUX, backend="rocm", backend_version=(7, 1))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("torch213-cu130-x86_64-linux", ("torch", "cuda", (2, 13), None, (13, 0), "x86_64", "linux")),
        ("torch27-cxx11-cu126-x86_64-linux", ("torch", "cuda", (2, 7), "cxx11", (12, 6), "x86_64", "linux")),
        ("torch26-cxx98-cu118-x86_64-linux", ("torch", "cuda", (2, 6), "cxx98", (11, 8), "x86_64", "linux")),
        ("torch210-metal-aarch64-darwin", ("torch", "metal", (2, 10), None, None, "aarch64", "darwin")),
        ("torch212-cpu-aarch64-darwin", ("torch", "cpu", (2, 12), None, None, "aarch64", "darwin")),
        ("torch213-cu130-x86_64-windows", ("torch", "cuda", (2, 13), None, (13, 0), "x86_64", "windows")),
        ("torch212-cxx11-rocm71-x86_64-linux", ("torch", "rocm", (2, 12), "cxx11", (7, 1), "x86_64", "linux")),
        ("torch213-cxx11-xpu20260-x86_64-linux", ("torch", "xpu", (2, 13), "cxx11", (2026, 0), "x86_64", "linux")),
        ("torch28-cxx11-cann81-aarch64-linux", ("torch", "cann", (2, 8), "cxx11", (8, 1), "aarch64", "linux")),
        ("torch213-neuron-x86_64-linux", ("torch", "neuron", (2, 13), None, None, "x86_64", "linux")),
        ("torch213-tpu-x86_64-linux", ("torch", "tpu", (2, 13), None, None, "x86_64", "linux")),
        ("torch-stable-abi29-cu126-x86_64-linux", ("torch-stable-abi", "cuda", (2, 9), None, (12, 6), "x86_64", "linux")),
        ("torch-stable-abi210-cpu-aarch64-linux", ("torch-stable-abi", "cpu", (2, 10), None, None, "aarch64", "linux")),
        ("tvm-ffi01-cu130-x86_64-linux", ("tvm-ffi", "cuda", (0, 1), None, (13, 0), "x86_64", "linux")),
        ("tvm-ffi123-cpu-x86_64-linux", ("tvm-ffi", "cpu", (1, 23), None, None, "x86_64", "linux")),
        *(
            (f"torch-{b}", ("noarch", b, None, None, None, None, None))
            for b in ("cpu", "cuda", "rocm", "metal", "xpu", "npu", "universal", "x-y")
        ),
    ],
)
def test_every_form_on_the_hub(name, parts):
    v = parse(name)
    assert (v.framework, v.backend, v.framework_version, v.abi, v.backend_version, v.cpu, v.os) == parts
    assert str(v) == name


@pytest.mark.parametrize(
    ("token", "backend", "version"),
    [
        ("cu92", "cuda", (9, 2)),
        ("cu126", "cuda", (12, 6)),
        ("cu1310", "cuda", (13, 10)),
        ("cu1300", "cuda", (130, 0)),  # neither reading is plausible; it will never match a machine
        ("rocm71", "rocm", (7, 1)),
        ("rocm710", "rocm", (7, 10)),
        ("rocm100", "rocm", (10, 0)),
        ("cann81", "cann", (8, 1)),
        ("cann810", "cann", (8, 10)),
        ("xpu20253", "xpu", (2025, 3)),
        ("xpu202510", "xpu", (2025, 10)),
        ("xpu12", "xpu", (1, 2)),
    ],
)
def test_the_last_two_digits_are_the_minor_only_where_one_gives_no_plausible_major(token, backend, version):
    v = parse(f"torch213-{token}-x86_64-linux")
    assert (v.backend, v.backend_version) == (backend, version)


@given(
    backend=st.sampled_from([("cu", range(9, 30)), ("rocm", range(5, 30)), ("cann", range(5, 30)), ("xpu", range(2020, 2100))]),
    data=st.data(),
)
def test_every_plausible_version_with_a_minor_below_ten_reads_back(backend, data):
    short, majors = backend
    major, minor = data.draw(st.sampled_from(majors)), data.draw(st.integers(0, 9))
    assert parse(f"torch213-{short}{major}{minor}-x86_64-linux").backend_version == (major, minor)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "torch",
        "torch-",
        "torch2-cpu-x86_64-linux",
        "torch213",
        "torch213-",
        "torch213-cpu",
        "torch213-cpu-x86_64",
        "torch213-cpu-x86_64-linux-gnu",
        "torch213-cpu--linux",
        "torch213-cxx11",
        "torch213-cxx14-cpu-x86_64-linux",
        "torch-stable-abi29",
        "torch-stable-abi-cpu-x86_64-linux",
        "torch-stable-abi29-cxx11-cpu-x86_64-linux",
        "torch213-cu1-x86_64-linux",
        "torch213-cu-x86_64-linux",
        "torch213-cpu13-x86_64-linux",
        "torch213-npu-x86_64-linux",
        "torch²13-cpu-x86_64-linux",
        "torch-a\nb",
        "tvm-ffi-cpu-x86_64-linux",
        "tvm-ffi1-cpu-x86_64-linux",
        "tvm-cpu",
        "jax-cpu",
        "TORCH-cpu",
    ],
)
def test_what_is_no_variant_is_said_with_a_reason(name):
    with pytest.raises(BadMetadata, match="is not a variant name that this version understands: "):
        parse(name)


words = st.sampled_from(
    [
        "torch",
        "tvm",
        "ffi01",
        "stable",
        "abi29",
        "torch213",
        "cxx11",
        "cu130",
        "cu",
        "rocm71",
        "cpu",
        "x86_64",
        "linux",
        "",
        "9",
        "\n",
    ]
)


@given(st.text(max_size=40) | st.lists(words, max_size=7).map("-".join))
def test_any_text_is_a_variant_that_prints_itself_or_bad_metadata(text):
    try:
        v = parse(text)
    except BadMetadata:
        return
    assert str(v) == text
    assert isinstance(misfit(v, CUDA), str | None)
    rank(v)


def test_a_backend_without_a_version_here_fits_no_versioned_build():
    unknown = Machine(**LINUX, backend="cuda")
    assert misfit(parse("torch213-cu130-x86_64-linux"), unknown) == "built for cuda 13.0, this is unknown"


def test_the_first_rule_that_fails_gives_the_reason():
    v = parse("torch212-cxx98-cu126-aarch64-darwin")
    fixes = [
        ("built for aarch64, this is x86_64", {"cpu": "aarch64"}),
        ("built for darwin, this is linux", {"os": "darwin"}),
        ("built for torch 2.12, this is 2.13", {"torch": (2, 12)}),
        ("built for the C++ ABI cxx98, torch here uses cxx11", {"cxx11": False}),
        ("built for CUDA 12.6, this is 13.0", {"backend_version": (12, 9)}),
    ]
    given_ = {**LINUX, "backend": "cuda", "backend_version": (13, 0)}
    for reason, fix in fixes:
        assert misfit(v, Machine(**given_)) == reason
        given_ |= fix
    assert misfit(v, Machine(**given_)) is None


def test_the_order_of_preference():
    best_first = [
        "torch-stable-abi210-cu126-x86_64-linux",
        "torch-stable-abi29-cu128-x86_64-linux",
        "torch-stable-abi29-cu126-x86_64-linux",
        "torch213-cu126-x86_64-linux",
        "torch213-cxx11-cu128-x86_64-linux",
        "torch213-cxx11-cu126-x86_64-linux",
        "tvm-ffi01-cu130-x86_64-linux",
        "torch-cuda",
        "torch-universal",
    ]
    for shuffled in itertools.islice(itertools.permutations(best_first), 0, 362_880, 1009):
        assert sorted(shuffled, key=lambda name: rank(parse(name))) == best_first


def test_no_two_names_tie():
    assert rank(parse("torch-cuda")) != rank(parse("torch-rocm"))
    assert rank(parse("torch213-cpu-x86_64-linux")) < rank(parse("torch213-cpu-x86_64-windows"))


def test_the_key_is_a_plain_value():
    assert rank(Variant("torch-cuda", "noarch", "cuda")) == rank(parse("torch-cuda"))


# -- architectures ------------------------------------------------------------------------------------------------


def gpu(major, minor, index=0):
    return Device("cuda", index, f"GPU {index}", (major, minor), f"sm{major}{minor}")


def with_devices(*devices, machine=CUDA):
    return Machine(**LINUX, backend=machine.backend, backend_version=machine.backend_version, devices=devices)


@pytest.mark.parametrize(
    ("arch", "runs_on", "not_on"),
    [
        ("9.0", [(9, 0), (9, 5)], [(8, 9), (10, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("9.0a", [(9, 0)], [(9, 1), (10, 0), (8, 9)]),
        ("9.0a+PTX", [(9, 0)], [(9, 1), (10, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("10.0f+PTX", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("10.3f", [(10, 3)], [(10, 0)]),
        ("9.0+PTX", [(9, 0), (9, 1), (12, 0)], [(8, 9)]),
        ("12.0", [(12, 0), (12, 1)], [(10, 0)]),
    ],
)
def test_what_a_cuda_arch_string_runs_on(arch, runs_on, not_on):
    for capability in runs_on:
        assert arch_misfit([arch], with_devices(gpu(*capability))) is None
    for capability in not_on:
        here = f"cuda:0 (GPU 0) is {capability[0]}.{capability[1]}"
        assert arch_misfit([arch], with_devices(gpu(*capability))) == f"its code is for {arch}; {here}"


def test_one_entry_that_runs_is_enough_and_unreadable_ones_do_not_count():
    assert arch_misfit(["8.0", "9.0a"], with_devices(gpu(9, 0))) is None
    assert arch_misfit(["sm_90", "9.0"], with_devices(gpu(8, 0))) is not None
    assert arch_misfit(["sm_90", "9", "9.0b", "9.0 +PTX"], with_devices(gpu(8, 0))) is None


def test_every_visible_device_counts_unless_one_is_named():
    both = with_devices(gpu(9, 0, 0), gpu(12, 0, 1))
    assert arch_misfit(["9.0"], both) == "its code is for 9.0; cuda:1 (GPU 1) is 12.0"
    assert arch_misfit(["9.0"], both, "cuda") is not None
    assert arch_misfit(["9.0"], both, "cuda:0") is None
    assert arch_misfit(["9.0"], both, "cuda:1") == "its code is for 9.0; cuda:1 (GPU 1) is 12.0"
    assert arch_misfit(["9.0"], both, "cuda:7") == "there is no cuda:7 here"
    assert arch_misfit(["9.0"], both, "cpu") is None


def test_rocm_compares_the_name_of_the_chip():
    mi300 = with_devices(Device("rocm", 0, "MI300X", None, "gfx942:sramecc+:xnack-"), machine=ROCM)
    assert arch_misfit(["gfx90a", "gfx942"], mi300) is None
    assert arch_misfit(["gfx942"], mi300, "cuda:0") is None  # as torch spells it
    assert arch_misfit(["gfx1151"], mi300, "cuda:0") == "its code is for gfx1151; rocm:0 (MI300X) is gfx942:sramecc+:xnack-"
    assert arch_misfit(["gfx1151"], with_devices(Device("rocm", 0, "?"), machine=ROCM)) is None


def test_nothing_is_checked_where_there_is_nothing_to_check():
    assert arch_misfit([], with_devices(gpu(9, 0))) is None
    assert arch_misfit(["9.0"], with_devices()) is None
    assert arch_misfit(["9.0"], with_devices(), "cuda:0") is None
    assert arch_misfit(["9.0"], with_devices(Device("cuda", 0, "?"))) is None
    assert arch_misfit(["9.0"], Machine("linux", "x86_64", backend="cuda", devices=(gpu(8, 0),))) is None  # no torch
    assert arch_misfit(["9.0"], Machine(**LINUX, backend="metal", devices=(Device("mps", 0, "M4"),))) is None
