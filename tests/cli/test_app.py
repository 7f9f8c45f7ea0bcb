"""The frame of the command line: verbs, exit codes, errors, completion, start-up."""

import json
import os
import subprocess
import sys
import types

import pytest
import typer

from kernelswap import errors
from kernelswap.cli import app, exits, main, output


def run(*argv, capsys):
    code = main(list(argv))
    done = capsys.readouterr()
    return code, done.out, done.err


def leaves(cls):
    return [cls, *(leaf for sub in cls.__subclasses__() if sub.__module__ == "kernelswap.errors" for leaf in leaves(sub))]


@pytest.fixture
def verb(monkeypatch):
    """Add a verb that raises what it is given, for this test only."""

    def add(command):
        real = app.build

        def build():
            built = real()
            app.add(built, "trouble", types.SimpleNamespace(command=command, PANEL="Models"))
            return built

        monkeypatch.setattr(app, "build", build)

    return add


def test_every_error_has_an_exit_code_by_whose_fault_it_is():
    def of(cls):  # whatever its arguments are
        return exits.of(type(cls.__name__, (cls,), {"__init__": lambda self: None})())

    codes = {cls.__name__: of(cls) for cls in leaves(errors.KernelSwapError)}
    assert codes["SpecError"] == exits.USAGE
    assert codes["NoVariant"] == exits.MACHINE
    assert codes["Unreachable"] == exits.NETWORK
    assert codes["Tampered"] == exits.PUBLISHER
    assert codes["LoadFailed"] == exits.KERNEL
    assert set(codes.values()) <= {code for code, _ in exits.TABLE}


def test_no_two_meanings_share_an_exit_code():
    codes = [code for code, _ in exits.TABLE]
    assert sorted(set(codes)) == sorted(codes)


def test_an_error_is_three_parts_on_stderr_and_no_traceback(verb, capsys):
    def command() -> output.Answer:
        raise errors.Unreachable("nobody answers\nsecond line", asked="asking the hub", todo="plug it in")

    verb(command)
    code, out, err = run("trouble", capsys=capsys)
    assert (code, out) == (exits.NETWORK, "")
    assert err == "asked: asking the hub\nfound: nobody answers\n       second line\nnext:  plug it in\n"


def test_an_error_that_says_only_what_it_found_is_completed(verb, capsys):
    def command() -> output.Answer:
        raise errors.BuildFailed("no compiler")

    verb(command)
    _, _, err = run("trouble", capsys=capsys)
    assert err.splitlines() == [
        "asked: kernelswap trouble",
        "found: no compiler",
        "next:  `kernelswap doctor` says what this machine has",
    ]


def test_with_json_an_error_is_an_object_too(verb, capsys):
    def command() -> output.Answer:
        raise errors.Refused("the digest differs")

    verb(command)
    code, out, err = run("trouble", "--json", capsys=capsys)
    said = json.loads(out)["error"]
    assert code == exits.PUBLISHER
    assert (said["type"], said["fault"], said["found"]) == ("Refused", "publisher", "the digest differs")
    assert "the digest differs" in err


def test_a_bug_is_one_sentence_unless_debug(verb, capsys):
    def command() -> output.Answer:
        raise ZeroDivisionError("by zero")

    verb(command)
    code, _, err = run("trouble", capsys=capsys)
    assert code == exits.BUG
    assert "unexpected ZeroDivisionError: by zero" in err
    assert "Traceback" not in err
    with pytest.raises(ZeroDivisionError):
        main(["trouble", "--debug"])


def test_debug_shows_the_traceback_of_an_error_of_ours(verb, capsys):
    def command() -> output.Answer:
        raise errors.Refused("the digest differs")

    verb(command)
    _, _, err = run("trouble", "--debug", capsys=capsys)
    assert "Traceback" in err
    assert "found: the digest differs" in err


def test_a_missing_optional_package_names_the_extra(verb, capsys):
    def command() -> output.Answer:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.figure")

    verb(command)
    code, _, err = run("trouble", capsys=capsys)
    assert code == exits.MACHINE
    assert "pip install 'kernelswap[cli]'" in err


def test_interrupting_is_no_traceback(verb, capsys):
    def command() -> output.Answer:
        raise KeyboardInterrupt

    verb(command)
    code, _, err = run("trouble", capsys=capsys)
    assert (code, err) == (exits.INTERRUPTED, "")


def test_markup_in_an_error_is_printed_as_it_is(verb, capsys):
    def command() -> output.Answer:
        raise errors.UnknownKernel("there is no [bold]org/repo[/bold] @[1,2]")

    verb(command)
    _, _, err = run("trouble", capsys=capsys)
    assert "found: there is no [bold]org/repo[/bold] @[1,2]\n" in err


@pytest.mark.parametrize("argv", [["nope"], ["find"], ["find", "a/b", "--nope"], ["--nope"]])
def test_wrong_usage_is_three_parts_and_exit_code_2(argv, capsys):
    code, out, err = run(*argv, capsys=capsys)
    assert (code, out) == (exits.USAGE, "")
    assert [line[:6] for line in err.splitlines()] == ["asked:", "found:", "next: "]


def test_no_arguments_shows_the_help(capsys):
    code, out, _ = run(capsys=capsys)
    assert code == 0
    assert "Usage: kernelswap" in out
    assert "Exit codes:" in out


def test_every_verb_has_a_panel_json_and_debug():
    root = typer.main.get_command(app.build())
    assert {"run", "demo", "find", "explain", "load", "verify", "doctor", "build"} <= set(root.commands)
    for name, command in root.commands.items():
        assert command.rich_help_panel in app.PANELS, name
        assert command.help, name
        assert {"json", "debug"} <= {p.name for p in command.params}, name


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_no_help_is_wider_than_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for verb in ["", *typer.main.get_command(app.build()).commands]:
        main([verb, "--help"] if verb else ["--help"])
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= columns, verb


def test_help_and_version_import_nothing_heavy():
    code = """
import sys
from kernelswap.cli import main
main(["--help"]), main(["demo", "--help"]), main(["--version"])
print([m for m in ("torch", "transformers", "huggingface_hub", "matplotlib", "numpy") if m in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_without_typer_one_line_says_what_to_install(tmp_path):
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "kernelswap", "--help"], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == exits.MACHINE
    assert done.stderr == "kernelswap: the command line needs typer: pip install 'kernelswap[cli]'\n"


@pytest.mark.parametrize(
    ("words", "expected"), [("kernelswap fi", "find"), ("kernelswap find --mach", "--machine"), ("kernelswap de", "demo")]
)
def test_the_shell_completes_verbs_and_options(words, expected):
    env = {**os.environ, "_KERNELSWAP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run([sys.executable, "-m", "kernelswap"], capture_output=True, text=True, env=env, check=False)
    assert expected in done.stdout.split()
