"""Draw the rooms of the package and their imports into docs/contributing/map.md: ``python -m tools.draw_map``."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "docket_celery"
PAGE = ROOT / "docs" / "contributing" / "map.md"
PICTURE, FILES = "picture", "files"
APART = {"devserver", "testing"}


def room_of(module: str) -> str:
    """Return the room of a module of the package: a folder (``store.sql`` for the inner one), or a file."""
    parts = module.split(".")[1:]
    if not parts:
        return "docket_celery"
    folder = PACKAGE.joinpath(*parts)
    inside = parts if folder.is_dir() else parts[:-1]
    return ".".join(inside) or parts[0]


def count_imports() -> Counter[tuple[str, str]]:
    """Count the import statements from room to room, those inside functions included."""
    found: Counter[tuple[str, str]] = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("docket_celery."):
                pair = room_of(module), room_of(str(node.module))
                if pair[0] != pair[1] and pair[0] != "docket_celery":
                    found[pair] += 1
    return found


def draw() -> str:
    """Return the picture: an arrow from each room to each that it imports, with the number of imports."""
    names = {name: name.replace(".", "_") for pair in count_imports() for name in pair}
    lines = [f'  {node}["{name}"]' for name, node in sorted(names.items())]
    lines += [
        f"  {names[source]} -->|{count}| {names[target]}"
        for (source, target), count in sorted(count_imports().items())
        if target != "errors"
    ]
    return "```mermaid\nflowchart TD\n" + "\n".join(lines) + "\n```\n"


def first_line(path: Path) -> str:
    """Return the first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def list_files() -> str:
    """Return a table of all files, room by room, each with the first line of its docstring."""
    lines = ["| file | what it is |", "|---|---|"]
    for path in sorted(PACKAGE.rglob("*.py"), key=lambda path: (path.parent, path.name)):
        name = path.relative_to(PACKAGE)
        if (name.parts[0] not in APART and path.parent != PACKAGE) or path.name != "__init__.py":
            shown = f"**`{name.parent}/`**" if path.name == "__init__.py" else f"`{name}`"
            if name.parts[0] not in APART:
                lines.append(f"| {shown} | {first_line(path)} |")
    return "\n".join(lines) + "\n"


def describe(page: str) -> str:
    """Return *page* with what each numbered module is; which ones there are, and their order, stays."""
    number = 0

    def tell(line: re.Match[str]) -> str:
        nonlocal number
        number = 1 if line["number"] == "1" else number + 1
        path = PACKAGE / line["path"]
        return f"{number}. `{line['path']}`: {first_line(path) if path.exists() else 'is gone'}"

    return re.sub(r"^(?P<number>\d+)\. `(?P<path>[\w/]+\.py)`.*(\n    .*)*$", tell, page, flags=re.MULTILINE)


def fill(page: str, name: str, text: str) -> str:
    """Return *page* with *text* in the place called *name*."""
    head, begin, rest = page.partition(f"<!-- {name} -->\n")
    _, end, tail = rest.partition(f"<!-- end of {name} -->\n")
    return head + begin + text + end + tail


def render(page: str) -> str:
    """Return *page* with the picture, the files and their first lines as the code gives them now."""
    return describe(fill(fill(page, PICTURE, draw()), FILES, list_files()))


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
