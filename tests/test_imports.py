"""Who may import whom: a file imports only from rows above its own. Imports inside functions count."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROWS = [
    {"_version", "errors"},
    {"types", "strict"},
    {"spec", "variant", "metadata", "lock", "table", "render", "mode", "policy", "reads", "record", "tree", "buildfile", "sbom"},
    {"resolve", "layers", "report", "mapping"},
    {"backends", "sources", "verifiers", "slots", "toolchain"},
    {"machine", "store", "loader", "sites", "signature", "build", "background", "audit", "job", "locking", "replay", "tuning"},
    {"plan", "required", "apply", "proof", "provider", "whole"},
    {"api"},
    {"adapters", "compat", "bench", "forecast", "serve", "bundling", "verifying"},
    {"takeover"},
    {"transformers"},
    {"cli"},
]
PURE = {
    "_version",
    "errors",
    "types",
    "strict",
    "spec",
    "variant",
    "metadata",
    "lock",
    "table",
    "render",
    "mode",
    "policy",
    "record",
    "resolve",
    "buildfile",
    "sbom",
}
PURE_MAY_USE = {"packaging", "tomli", "tomllib", "__future__"}
ROOT = pathlib.Path(__file__).parents[1] / "src" / "kernelswap"
RANK = {name: row for row, names in enumerate(ROWS) for name in names}
LONG_ALLOWED = "# long:"  # the reason at the top of a file that is over 400 lines


def files():
    return [p for p in sorted(ROOT.rglob("*.py")) if "bundled" not in p.relative_to(ROOT).parts]


def edges():
    for path in files():
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts == ("__init__",) or parts == ("__main__",):
            continue
        for node in ast.walk(ast.parse(path.read_text())):  # walk, not body: an import hidden in a function counts
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and node.level:
                base = list(parts[: len(parts) - node.level])
                for alias in node.names:
                    yield parts[0], (base + (node.module or alias.name).split("."))[0], where
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                for name in names:
                    yield parts[0], "!" + name.split(".")[0], where


def test_imports_point_down():
    up = [
        f"{where}: {a} imports {b}"
        for a, b, where in edges()
        if not b.startswith("!") and a != b and b != "_version" and RANK[b] >= RANK[a]
    ]
    assert not up, "\n".join(up)


def test_every_file_has_a_row():
    unknown = (
        {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in files()} - set(RANK) - {"__init__", "__main__", "transformers"}
    )
    assert not unknown


def test_the_pure_half_needs_only_the_standard_library():
    impure = [
        f"{where}: {b[1:]}"
        for a, b, where in edges()
        if a in PURE and b.startswith("!") and b[1:] not in sys.stdlib_module_names | PURE_MAY_USE and b[1:] != "torch"
    ]
    assert not impure, "\n".join(impure)


def test_a_long_file_says_why():
    long = [
        f"{p.relative_to(ROOT)}: {n}"
        for p in sorted(ROOT.rglob("*.py"))
        if (n := p.read_text().count("\n")) > 400 and LONG_ALLOWED not in "\n".join(p.read_text().splitlines()[:40])
    ]
    assert not long


@pytest.mark.parametrize(
    ("first", "heavy"),
    [
        ("", ("torch", "huggingface_hub", "transformers", "packaging")),
        ("kernelswap.install(); ", ("torch", "huggingface_hub", "transformers", "kernels")),
    ],
)
def test_importing_and_installing_us_imports_nothing_heavy(first, heavy):
    code = f"import sys, kernelswap; {first}print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


def modules_imported(path):
    """The files of ours that a file imports, by whatever form, also for type checkers and inside functions."""
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.ImportFrom) and node.level):
            continue
        base = package[: len(package) - (node.level - 1)] + (node.module or "").split(".") * bool(node.module)
        for name in [[*base, alias.name] for alias in node.names] + [base]:
            target = ROOT.joinpath(*name)
            found = target.with_suffix(".py") if target.with_suffix(".py").exists() else target / "__init__.py"
            if (
                found.exists()
                and found not in {path, ROOT / "__init__.py"}
                and not (name == base and found.name == "__init__.py")
            ):
                yield found


def test_no_import_circles():
    graph = {path: set(modules_imported(path)) for path in files()}
    while leaves := [path for path, needs in graph.items() if not needs & graph.keys()]:
        for path in leaves:
            del graph[path]
    circle = {
        str(p.relative_to(ROOT)): sorted(str(n.relative_to(ROOT)) for n in needs & graph.keys()) for p, needs in graph.items()
    }
    assert not circle
