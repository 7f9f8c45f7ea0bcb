import itertools

import pytest

from kernelswap import spec, table
from kernelswap.errors import TableError
from kernelswap.types import Device, Machine, Mode, Row, Use


def problems(text, **more):
    with pytest.raises(TableError) as e:
        table.parse(text, where="t.toml", **more)
    return e.value.found.splitlines()


def row(text):
    (found,) = table.parse(f"[[swap]]\n{text}", where="t.toml")
    return found


def test_a_row_says_everything():
    text = """
        layer   = "RMSNorm"
        kind    = "function"
        targets = ["*RMSNorm", "T5LayerNorm"]
        needs   = ["weight", "variance_epsilon|eps", ["a", " b "]]
        probe   = "rows"
        use     = ["kernelswap/layers:RMSNorm",
                   {spec = "org/norm@2:RMSNorm", on = ["cuda:sm90", "rocm:gfx942", "metal"], modes = ["inference", "TRAINING|TORCH_COMPILE"]}]
        off     = true
        note    = "why"
        at      = ["*.norm"]
    """
    assert row(text) == Row(
        "RMSNorm",
        "function",
        ("*RMSNorm", "T5LayerNorm"),
        (("weight",), ("variance_epsilon", "eps"), ("a", "b")),
        "rows",
        (
            Use("kernelswap/layers:RMSNorm"),
            Use("org/norm@2:RMSNorm", ("cuda:sm90", "rocm:gfx942", "mps"), (Mode.INFERENCE, Mode.TRAINING | Mode.TORCH_COMPILE)),
        ),
        off=True,
        note="why",
        at=("*.norm",),
    )


def test_a_row_may_say_little():
    assert row('layer = "SiLU"') == Row("SiLU")
    assert row('layer = "SiLU"\noff = true').off
    assert table.parse("", where="t.toml") == ()


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("inference", Mode.INFERENCE),
        ("training", Mode.TRAINING),
        ("inference+compile", Mode.INFERENCE | Mode.TORCH_COMPILE),
        ("Training | torch_compile", Mode.TRAINING | Mode.TORCH_COMPILE),
        ("FALLBACK", Mode.FALLBACK),
    ],
)
def test_modes_are_spelled_as_words(text, mode):
    assert row(f'layer = "x"\nuse = [{{spec = "a/b", modes = ["{text}"]}}]').use[0].modes == (mode,)


WRONG = [
    ("[swap]", "t.toml: `swap` is not a list of tables, rows begin with [[swap]]"),
    ("swap = [1]", "t.toml: `swap` is not a list of tables, rows begin with [[swap]]"),
    ("[[swaps]]\nlayer = 'a'", "t.toml: unknown key `swaps`, did you mean `swap`?"),
    ("[[swap]]", "t.toml:1: row 1: `layer` is missing"),
    ("[[swap]]\nlayer = ''", "t.toml:1: row 1: `layer` is '', expected a text"),
    ("[[swap]]\nlayer = 3", "t.toml:1: row 1: `layer` is 3, expected a text"),
    ("[[swap]]\nlayer = 'a'\ntaget = []", "t.toml:1: row 1 (a): unknown key `taget`, did you mean `targets`?"),
    (
        "[[swap]]\nlayer = 'a'\nkind = 'function'\nstatements = 'sum'",
        "t.toml:1: row 1 (a): `statements` is 'sum', expected residual_norm, norm_rotary or projections, with kind = \"function\"",
    ),
    (
        "[[swap]]\nlayer = 'a'\nstatements = 'residual_norm'",
        "t.toml:1: row 1 (a): `statements` is 'residual_norm', expected residual_norm, norm_rotary or projections, with kind = \"function\"",
    ),
    (
        "[[swap]]\nlayer = 'a'\nzzz = []",
        "t.toml:1: row 1 (a): unknown key `zzz`, known: layer, kind, targets, needs, at, probe, note, off, use, rivals, statements",
    ),
    (
        "[[swap]]\nlayer = 'a'\nkind = 'modul'",
        "t.toml:1: row 1 (a): `kind` is 'modul', expected one of module, function, attention",
    ),
    ("[[swap]]\nlayer = 'a'\noff = 1", "t.toml:1: row 1 (a): `off` is 1, expected true or false"),
    ("[[swap]]\nlayer = 'a'\ntargets = 'x'", "t.toml:1: row 1 (a): `targets` is 'x', expected a list"),
    ("[[swap]]\nlayer = 'a'\ntargets = [1, '']", "t.toml:1: row 1 (a): `targets` has 1, expected a text"),
    (
        "[[swap]]\nlayer = 'a'\nneeds = [1]",
        "t.toml:1: row 1 (a): `needs` has 1, expected attribute names, alternatives separated by `|`",
    ),
    (
        "[[swap]]\nlayer = 'a'\nneeds = ['a|']",
        "t.toml:1: row 1 (a): `needs` has 'a|', expected attribute names, alternatives separated by `|`",
    ),
    (
        "[[swap]]\nlayer = 'a'\nuse = [1]",
        "t.toml:1: row 1 (a): use 1: expected a spec or {spec = ..., on = ..., modes = ...}, found 1",
    ),
    ("[[swap]]\nlayer = 'a'\nuse = [{}]", "t.toml:1: row 1 (a): use 1: `spec` is missing or empty"),
    (
        "[[swap]]\nlayer = 'a'\nuse = ['x/y', {spec = 'a/b', mode = []}]",
        "t.toml:1: row 1 (a): use 2: unknown key `mode`, did you mean `modes`?",
    ),
    (
        "[[swap]]\nlayer = 'a'\nuse = [{spec = 'a/b', modes = ['eval']}]",
        "t.toml:1: row 1 (a): use 1: `modes` has 'eval', expected inference, training, inference+compile, training+compile, fallback",
    ),
    *(
        (
            f"[[swap]]\nlayer = 'a'\nuse = [{{spec = 'a/b', on = ['{on}']}}]",
            f"t.toml:1: row 1 (a): use 1: `on` has '{on}', expected `cpu`, `cuda`, `cuda:sm90`, `cuda:sm80+`, `rocm:gfx942`, `mps`, ...",
        )
        for on in ("gpu", "cuda:90", "cuda:gfx942", "rocm:sm90", "cpu:sm90", "cuda:0", "CUDA")
    ),
    ("\n[[swap]]\nlayer = 'a'\n\n[[swap]]\nlayer = 'a'", "t.toml:5: row 2 (a): claims what row 1 claims"),
    ("swap = [{layer = 'a'}, {layer = 'a'}]", "t.toml: row 2 (a): claims what row 1 claims"),
]


@pytest.mark.parametrize(("text", "problem"), WRONG, ids=[w[1][-60:] for w in WRONG])
def test_a_problem_is_named_with_its_row_and_line(text, problem):
    assert problem in problems(text)


def test_every_problem_is_reported_at_once():
    assert problems("[[swap]]\nlayer = 'a'\noff = 1\n[[swap]]\nkind = 'x'\nuse = [1]") == [
        "t.toml:1: row 1 (a): `off` is 1, expected true or false",
        "t.toml:4: row 2: `layer` is missing",
        "t.toml:4: row 2: `kind` is 'x', expected one of module, function, attention",
        "t.toml:4: row 2: use 1: expected a spec or {spec = ..., on = ..., modes = ...}, found 1",
    ]


def test_what_is_not_toml_says_where():
    (problem,) = problems("[[swap]]\nlayer = \nkind = 'module'")
    assert problem.startswith("t.toml: not TOML: ")
    assert "line 2" in problem


def test_specs_are_asked_about_where_a_check_is_given():
    text = "[[swap]]\nlayer = 'a'\nuse = ['org/norm:Layer', 'norm', {spec = 'a--b/c'}]"
    assert len(table.parse(text, where="t.toml")[0].use) == 3
    assert problems(text, check=spec.parse) == [
        "t.toml:1: row 1 (a): use 2: 'norm': a hub name is `org/name`, here one half is missing",
        "t.toml:1: row 1 (a): use 3: 'a--b/c': `--` is not allowed in a name",
    ]


# -- the table that ships -----------------------------------------------------------------------------------------


def test_the_default_table_reads_and_every_spec_of_it_parses():
    rows = table.default()
    assert {"RMSNorm", "LayerNorm", "SwiGLUMLP", "GeGLUMLP", "SiLU", "rotary_pos_emb"} <= {r.layer for r in rows}
    for use in itertools.chain.from_iterable(r.use for r in rows):
        assert spec.parse(use.spec).layer


# -- merging ------------------------------------------------------------------------------------------------------

BASE = (
    Row("RMSNorm", "module", ("*RMSNorm",), (("weight",),), "rows", (Use("a/a:N"), Use("b/b:N")), note="base"),
    Row("rope", "function", ("apply_rope",), use=(Use("a/a:R"),)),
)


def test_nothing_laid_over_changes_nothing():
    assert table.merge(BASE, ()) == BASE


def test_a_row_says_only_what_differs_and_its_uses_come_first():
    mine = Row("rope", use=(Use("c/c:R", on=("cuda",)),))
    merged = table.merge(BASE, (mine,))
    assert merged == (Row("rope", "function", ("apply_rope",), use=(Use("c/c:R", on=("cuda",)), Use("a/a:R"))), BASE[0])


def test_a_spec_that_both_name_has_the_new_place_and_conditions():
    merged = table.merge(BASE, (Row("RMSNorm", use=(Use("b/b:N", on=("cuda",)),)),))
    assert merged[0].use == (Use("b/b:N", on=("cuda",)), Use("a/a:N"))


def test_a_row_may_replace_what_the_known_one_says():
    (merged, _) = table.merge(BASE, (Row("RMSNorm", targets=("Mine",), needs=(("scale",),), probe="mlp"),))
    assert (merged.targets, merged.needs, merged.probe) == (("Mine",), (("scale",),), "mlp")


def test_a_layer_is_turned_off_and_on_again_and_stays_known():
    off = table.merge(BASE, (Row("RMSNorm", off=True, note="slow here"),))
    assert off[0].off
    assert off[0].note == "slow here"
    assert off[0].targets == ("*RMSNorm",)
    assert not table.merge(off, (Row("RMSNorm"),))[0].off


def test_a_new_layer_is_added_and_later_rows_lead():
    new = Row("Mine", targets=("Mine",), use=(Use("x/x:M"),))
    assert table.merge(BASE, (new,)) == (new, *BASE)
    twice = table.merge(BASE, (Row("rope", use=(Use("1/1:R"),)), Row("rope", use=(Use("2/2:R"),))))
    assert [u.spec for u in twice[0].use] == ["2/2:R", "1/1:R", "a/a:R"]


def test_the_kind_changes_only_with_the_targets():
    assert table.merge(BASE, (Row("rope", "module", ("Rope",)),))[0].kind == "module"
    assert table.merge(BASE, (Row("rope", "module"),))[0].kind == "function"


# -- where a use may serve ----------------------------------------------------------------------------------------

LINUX = {"os": "linux", "cpu": "x86_64"}
CUDA = Machine(
    **LINUX,
    backend="cuda",
    devices=(Device("cuda", 0, "A100", (8, 0), "sm80"), Device("cuda", 1, "H100", (9, 0), "sm90"), Device("cuda", 2, "?")),
)
ROCM = Machine(**LINUX, backend="rocm", devices=(Device("rocm", 0, "MI300X", None, "gfx942:xnack-"),))


@pytest.mark.parametrize(
    ("on", "device", "machine", "fits"),
    [
        ((), "cpu", CUDA, True),
        (("cpu",), "cpu", CUDA, True),
        (("cpu",), "cuda:0", CUDA, False),
        (("cuda",), "cuda:0", CUDA, True),
        (("cuda",), "cuda", CUDA, True),
        (("cuda:sm80",), "cuda", CUDA, True),
        (("cuda:sm80",), "cuda:1", CUDA, False),
        (("cuda:sm80+",), "cuda:1", CUDA, True),
        (("cuda:sm90+",), "cuda:0", CUDA, False),
        (("cuda:sm80",), "cuda:0", CUDA, True),
        (("cuda:sm80+",), "cuda:0", CUDA, True),
        (("cuda:sm100", "cuda:sm90"), "cuda:1", CUDA, True),
        (("cuda:sm90",), "cuda:2", CUDA, False),  # nobody knows what it can do
        (("cuda:sm90",), "cuda:7", CUDA, False),
        (("cuda",), "cuda:0", ROCM, False),
        (("rocm",), "cuda:0", ROCM, True),
        (("rocm:gfx942",), "cuda:0", ROCM, True),
        (("rocm:gfx90a",), "cuda:0", ROCM, False),
        (("mps",), "mps:0", CUDA, True),
        (("metal",), "mps", CUDA, True),
        (("nonsense",), "cpu", CUDA, False),
    ],
)
def test_where_a_use_may_serve(on, device, machine, fits):
    assert (table.misfit(Use("a/b", on), device, machine) is None) is fits


def test_why_it_may_not_is_said():
    assert table.misfit(Use("a/b", ("cuda:sm90", "rocm")), "cuda:0", CUDA) == "is for cuda:sm90, rocm, this is cuda:0, sm80"
    assert table.misfit(Use("a/b", ("cuda",)), "cpu", CUDA) == "is for cuda, this is cpu"


def test_rivals_are_read_merged_and_kept_apart_from_what_serves_unmeasured():
    text = '[[swap]]\nlayer = "N"\ntargets = ["N"]\nuse = ["a/b:N"]\nrivals = ["c/d:N", {spec = "e/f:N", on = ["cuda"]}]\n'
    (row,) = table.parse(text, where="t.toml")
    assert [u.spec for u in row.use] == ["a/b:N"]
    assert [(u.spec, u.on) for u in row.rivals] == [("c/d:N", ()), ("e/f:N", ("cuda",))]
    (merged,) = table.merge([row], [Row("N", use=(Use("e/f:N"),), rivals=(Use("g/h:N"),))])
    assert [u.spec for u in merged.use] == ["e/f:N", "a/b:N"]
    assert [u.spec for u in merged.rivals] == ["g/h:N", "c/d:N"], "what serves anyway is no rival"
    with pytest.raises(TableError, match=r"row 1 \(N\): rivals 1: `spec` is missing"):
        table.parse('[[swap]]\nlayer = "N"\nrivals = [{}]', where="t.toml")
