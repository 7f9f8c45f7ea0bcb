"""Finds the verbs, gives each `--json` and `--debug`, and turns errors into three lines and an exit code."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pkgutil
import shlex
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Any

import typer
import typer.core

from .._version import __version__
from ..errors import KernelSwapError
from . import exits, verbs
from .output import Answer, complain, console, say_three

PANELS = ("Models", "Kernels", "This machine")
HELP = "Make a PyTorch model faster without touching its code: find, verify, prove and swap in optimised kernels, and take them back."


class Group(typer.core.TyperGroup):
    """Lists the verbs by panel, and the exit codes after them."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  # click's signature
        """The verbs, by what they are about."""
        panels: dict[str, list[tuple[str, str]]] = {p: [] for p in PANELS}
        for name, command in self.commands.items():
            panels.setdefault(str(getattr(command, "rich_help_panel", None)), []).append(
                (name, command.get_short_help_str(limit=200))
            )
        for panel, rows in panels.items():
            if rows:
                with formatter.section(panel):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  # click's signature
        """The exit codes."""
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in exits.TABLE])


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"kernelswap {__version__}\n")
        raise typer.Exit


def build() -> typer.Typer:
    """The application, from the files in `verbs/`."""
    app = typer.Typer(
        name="kernelswap",
        help=HELP,
        cls=Group,
        rich_markup_mode=None,  # specs are full of brackets, and plain help starts faster
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
        ] = False,
    ) -> None:
        pass

    for name in sorted(m.name for m in pkgutil.iter_modules(verbs.__path__)):
        add(app, name.replace("_", "-"), importlib.import_module(f"{verbs.__name__}.{name}"))
    return app


def add(app: typer.Typer, name: str, module: ModuleType) -> None:
    """One verb: `module.command`, whose docstring is the help. `PANEL` places it; `SETTINGS` (optional) are click's."""
    settings: dict[str, Any] = getattr(module, "SETTINGS", {})
    app.command(name, context_settings=settings, rich_help_panel=module.PANEL)(guarded(name, module.command))


def guarded(verb: str, command: Callable[..., Answer]) -> Callable[..., None]:
    """`command` with `--json` and `--debug`, its `Answer` printed, its errors said in three parts."""
    here = inspect.signature(command, eval_str=True)
    own = list(here.parameters.values())
    keyword = inspect.Parameter.KEYWORD_ONLY
    flags = [
        inspect.Parameter("json", keyword, default=False, annotation=Annotated[bool, typer.Option("--json", help="JSON.")]),
        inspect.Parameter(
            "debug", keyword, default=False, annotation=Annotated[bool, typer.Option("--debug", help="Errors with traceback.")]
        ),
    ]

    @functools.wraps(command)
    def wrapper(*args: Any, json: bool, debug: bool, **kwargs: Any) -> None:
        asked = shlex.join(["kernelswap", *_ARGV]) if _ARGV else f"kernelswap {verb}"
        try:
            if "as_json" in here.parameters:  # the verb wants to know, to keep its progress quiet
                kwargs["as_json"] = json
            answer = command(*args, **kwargs)
            answer.show(as_json=json)
        except KernelSwapError as e:
            if debug:
                console(stderr=True).print_exception(show_locals=False)
            complain(e, asked, as_json=json)
            raise typer.Exit(exits.of(e)) from None
        except ModuleNotFoundError as e:
            if debug or (e.name or "").partition(".")[0] not in _EXTRAS:
                raise
            extra = _EXTRAS[(e.name or "").partition(".")[0]]
            say_three(asked, f"it needs {e.name}, which is not installed", f"pip install 'kernelswap[{extra}]'")
            raise typer.Exit(exits.MACHINE) from None
        if answer.code:
            raise typer.Exit(answer.code)

    shown = [p for p in own if p.name != "as_json"]
    # keyword-only parameters come last, whatever the verb declared
    wrapper.__signature__ = here.replace(  # type: ignore[attr-defined]  # the way to give a wrapper a signature
        parameters=[*(p.replace(kind=keyword) for p in shown), *flags], return_annotation=None
    )
    wrapper.__annotations__ = {p.name: p.annotation for p in [*shown, *flags]}
    return wrapper


_EXTRAS = {
    "torch": "torch",
    "transformers": "transformers",
    "safetensors": "transformers",
    "tokenizers": "transformers",
    "matplotlib": "cli",
    "jinja2": "cli",
    "sigstore": "sign",
}
_ARGV: list[str] = []


def run(argv: list[str]) -> int:  # noqa: PLR0911  # one return per way to end
    """Parse and run. Never a traceback, unless `--debug` (or KERNELSWAP_DEBUG=1)."""
    _ARGV[:] = argv
    asked = shlex.join(["kernelswap", *argv])
    debug = "--debug" in argv or os.environ.get("KERNELSWAP_DEBUG") == "1"
    try:
        done = typer.main.get_command(build()).main(argv or ["--help"], prog_name="kernelswap", standalone_mode=False)
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123  # the reader went away; nobody reads the rest
        return exits.OK
    except SystemExit as e:  # a script under `run`, or completion
        return e.code if isinstance(e.code, int) else exits.OK if e.code is None else exits.NO
    except Exception as e:  # the last line of defence: whatever it is, it is said in three parts
        if type(e).__name__ == "Abort":
            return exits.INTERRUPTED
        if hasattr(e, "format_message"):  # click's own, whichever click typer brought
            usage = getattr(getattr(e, "ctx", None), "command_path", "kernelswap")
            say_three(asked, e.format_message(), f"`{usage} --help` shows what can be asked")
            return exits.USAGE
        if debug:
            raise
        say_three(asked, f"unexpected {type(e).__name__}: {e}", "add --debug to see where; please report it")
        return exits.BUG
    return done if isinstance(done, int) else exits.OK
