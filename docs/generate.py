"""Write docs/cli.md from the command line itself, and docs/performance.md from the results: `python docs/generate.py`.

tests/cli/test_docs.py and tests/bench/test_performance_page.py hold them together.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import typer

from kernelswap.cli import app, exits

PAGE = Path(__file__).with_name("cli.md")


def page() -> str:
    """The page, from verbs, options and exit codes."""
    root: Any = typer.main.get_command(app.build())
    lines = [
        "# The command line",
        "",
        "Written by `python3 dev.py docs` from the command line's own help; do not edit.",
        "",
        f"{app.HELP} Install it with `pip install 'kernelswap[cli]'`. `python -m kernelswap` is the same program.",
        "",
        "Every verb has `--json` (plain JSON on stdout; of `run`, on stderr), `--debug` (errors with their traceback) and",
        "`--help`. Errors are three parts on stderr: what was asked, what was found, what to do next. With `--json` they",
        "are also an object on stdout. `kernelswap --install-completion` completes verbs and options in your shell.",
        "",
    ]
    for panel in app.PANELS:
        lines += [f"## {panel}", ""]
        for name, command in sorted(root.commands.items()):
            if command.rich_help_panel == panel:
                lines += verb(name, command)
    lines += ["## Exit codes", "", "| code | meaning |", "| ---: | --- |"]
    lines += [f"| {code} | {meaning} |" for code, meaning in exits.TABLE]
    lines += ["", "`run` ends with the exit code of its script."]
    return "\n".join(lines) + "\n"


def verb(name: str, command: Any) -> list[str]:
    """One verb: how it is called, what it does, its arguments and options."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name not in {"json", "debug", "help"}]
    words = [f"[{metavar(p)}]" if not p.required else metavar(p) for p in arguments]
    usage = " ".join(["kernelswap", name, *(["[OPTIONS]"] if options else []), *words])
    lines = [f"### {name}", "", "```", usage, "```", "", *inspect.cleandoc(command.help).split("\n"), ""]
    if arguments or options:
        lines += ["| | |", "| --- | --- |"]
        lines += [f"| `{metavar(p)}` | {cell(p)} |" for p in arguments]
        for p in options:
            shown = ", ".join(sorted(p.opts, key=len)) + ("" if p.is_flag else f" {metavar(p)}")
            lines.append(f"| `{shown}` | {cell(p)} |")
        lines.append("")
    return lines


def metavar(parameter: Any) -> str:
    """Its placeholder."""
    return (parameter.metavar or parameter.name.upper()).strip("[]{}")


def cell(parameter: Any) -> str:
    """Its help, and a default that says something."""
    default = parameter.default
    tells = default not in (None, False, "", ()) and not callable(default) and not parameter.required
    tells = tells and "default" not in (parameter.help or "")
    return (parameter.help or "").replace("|", "\\|") + (
        f" Default: {default}." if tells and isinstance(default, str | int | float) else ""
    )


if __name__ == "__main__":
    import performance

    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.writelines(f"wrote {path.name}\n" for path in (PAGE, *performance.write()))
