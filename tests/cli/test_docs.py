"""What is written about the command line is what it is."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[2]


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_about_the_command_line_is_up_to_date():
    made = generator().page()
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == made, "run: python3 dev.py docs"
