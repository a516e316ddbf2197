"""Regenerate docs/differences.md: every deliberate difference from the reference implementations, as the modules say.

A module lists its own differences in its docstring, in a paragraph that begins with "Deliberate difference" or
"Difference" and in the list below it. This page is nothing but those paragraphs; a test compares it with them.

    python scripts/list_differences.py            # write docs/differences.md
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "differences.md"

HEADER = """# Deliberate differences from the reference implementations

Where this project does not do what LAVIS or diffusers 0.32.2 does, it says so in the docstring of the module concerned.
This page collects those lists; change a docstring, then run `python scripts/list_differences.py`. What is *not* listed
agrees, to the tolerances of [parity.md](parity.md).
"""

BEGINS = re.compile(r"(Deliberate differences?|Differences?)\b")


def differences(docstring: str) -> str | None:
    """The paragraphs of a module's docstring that tell how it differs, or None."""
    found: list[str] = []
    is_open = False  # a list may follow
    for paragraph in docstring.split("\n\n"):
        begins = BEGINS.match(paragraph) is not None
        if begins or (is_open and paragraph.startswith("* ")):
            found.append(paragraph)
        is_open = begins and paragraph.endswith(":")
    return "\n\n".join(found) or None


def as_markdown(text: str) -> str:
    """reStructuredText's ``code`` and :role:`name` as Markdown's `code`."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`").replace("\\\\", "\\")


def modules() -> dict[str, str]:
    """Path, relative to the repository, and docstring of every module of the package that has one."""
    docstrings = {}
    for file in sorted((ROOT / "blipdiff_train").rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
        if docstring:
            docstrings[file.relative_to(ROOT).as_posix()] = docstring
    return docstrings


def render() -> str:
    """The whole page."""
    sections = [HEADER]
    for path, docstring in modules().items():
        found = differences(docstring)
        if found is not None:
            title = docstring.split("\n\n")[0].replace("\n", " ")
            sections.append(f"## [{path}](../{path})\n\n{as_markdown(title)}\n\n{as_markdown(found)}\n")
    return "\n".join(sections)


def main() -> int:
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(render(), encoding="utf-8")
    print(f"{PAGE}: differences of {render().count('## [')} modules")
    return 0


if __name__ == "__main__":
    sys.exit(main())
