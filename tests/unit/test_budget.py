from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "docket_celery"
MOST_LINES_OF_A_FUNCTION = 60
MOST_LINES_OF_NINE_IN_TEN_FUNCTIONS = 25
MOST_LINES_OF_A_CLASS = 300
MOST_LINES_OF_A_FILE = 450
ARGUMENTS = {"docket_celery.task.task"}
"""Modules of a class that functions below it get as an argument: they may name it in their annotations."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Edges = dict[str, set[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One parsed source file of the package."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    def at(self, node: ast.AST) -> str:
        """Name the place of *node*, as an editor opens it."""
        return f"{self.path.name}:{getattr(node, 'lineno', 1)}"


def read_package(root: Path, package: str = PACKAGE) -> dict[str, Module]:
    """Parse every source file of *package* under *root*, generated code aside, by module name."""
    modules = {}
    for path in sorted((root / package).rglob("*.py")):
        if not path.name.endswith("_pb2.py"):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = path.read_text(encoding="utf-8")
            modules[name] = Module(name=name, path=path, text=text, tree=ast.parse(text))
    return modules


def functions(module: Module) -> Iterator[tuple[Function, int]]:
    """Yield each function, nested ones too, with its lines from ``def`` to the end, docstring excluded."""
    for node in ast.walk(module.tree):
        if isinstance(node, Function):
            yield node, lines(node) - (lines(node.body[0]) if ast.get_docstring(node) is not None else 0)


def lines(node: ast.stmt) -> int:
    """Count the source lines that *node* covers."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def nonblank_lines(module: Module) -> int:
    """Count the lines of a file that hold something, comments and docstrings included."""
    return sum(1 for line in module.text.splitlines() if line.strip())


def percentile(values: list[int], share: float) -> int:
    """Return the smallest of *values* that at least *share* of them do not exceed."""
    ranked = sorted(values)
    return next(value for rank, value in enumerate(ranked, 1) if rank >= share * len(ranked))


def imports(modules: dict[str, Module], *, inside_functions: bool) -> Edges:
    """Say which of *modules* each one imports; imports for type checkers count too, except those of ARGUMENTS."""
    return {
        name: {
            target
            for node in (ast.walk(module.tree) if inside_functions else outside_functions(module.tree))
            for target in targets(node, module, modules)
            if target != name and not (target in ARGUMENTS and node in for_checkers(module))
        }
        for name, module in modules.items()
    }


def for_checkers(module: Module) -> set[ast.AST]:
    """Return what stands under ``if TYPE_CHECKING``."""
    guards = (node for node in ast.walk(module.tree) if isinstance(node, ast.If))
    return {
        inner for guard in guards if ast.unparse(guard.test) == "TYPE_CHECKING" for inner in ast.walk(guard)
    }


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """Walk *node* without entering functions: what runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.Lambda):
            yield child
            yield from outside_functions(child)


def targets(node: ast.AST, module: Module, modules: dict[str, Module]) -> Iterator[str]:
    """Yield the modules that an import names: the submodule where it names one, else the package."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
    elif isinstance(node, ast.ImportFrom):
        source = absolute(node, module)
        for alias in node.names:
            submodule = f"{source}.{alias.name}"
            if submodule in modules:
                yield submodule
            elif source in modules:
                yield source


def absolute(node: ast.ImportFrom, module: Module) -> str:
    """Resolve the source of a ``from`` import, relative ones against *module*."""
    if node.level == 0:
        return node.module or ""
    parts = module.name.split(".")
    base = parts[: len(parts) - node.level + (module.path.name == "__init__.py")]
    return ".".join([*base, node.module] if node.module else base)


def find_cycle(edges: Edges) -> list[str]:
    """Return one import cycle as a path that ends where it starts, or nothing."""
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


@pytest.fixture(scope="module")
def package() -> dict[str, Module]:
    """The package as it stands in this checkout."""
    modules = read_package(ROOT)
    assert f"{PACKAGE}.errors" in modules
    return modules


def test_no_function_is_too_long(package: dict[str, Module]) -> None:
    """A function longer than a screen hides what it does."""
    long = [
        f"{module.at(node)} {node.name} has {length} lines"
        for module in package.values()
        for node, length in functions(module)
        if length > MOST_LINES_OF_A_FUNCTION
    ]
    assert long == []


def test_nine_functions_in_ten_are_short(package: dict[str, Module]) -> None:
    """Long functions stay the exception."""
    lengths = [length for module in package.values() for _, length in functions(module)]
    assert percentile(lengths, 0.9) <= MOST_LINES_OF_NINE_IN_TEN_FUNCTIONS


def test_no_class_is_too_long(package: dict[str, Module]) -> None:
    """A class has one responsibility, and room for its documentation."""
    long = [
        f"{module.at(node)} {node.name} has {lines(node)} lines"
        for module in package.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef) and lines(node) > MOST_LINES_OF_A_CLASS
    ]
    assert long == []


def test_no_file_is_too_long(package: dict[str, Module]) -> None:
    """A module that outgrows its budget is split."""
    sizes = {name: nonblank_lines(module) for name, module in package.items()}
    assert {name: size for name, size in sizes.items() if size > MOST_LINES_OF_A_FILE} == {}


@pytest.mark.parametrize("inside_functions", [False, True], ids=["module-level", "with-function-imports"])
def test_no_modules_import_each_other(package: dict[str, Module], inside_functions: bool) -> None:
    """An import hidden in a function does not make a cycle less of one."""
    assert find_cycle(imports(package, inside_functions=inside_functions)) == []


def sample(root: Path, files: dict[str, str]) -> dict[str, Module]:
    """Write a package of *files* under *root* and read it back."""
    for name, text in files.items():
        path = root / "sample" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
    return read_package(root, "sample")


def test_a_function_is_measured_without_its_docstring(tmp_path: Path) -> None:
    """Documentation is never what makes a function too long."""
    text = '''
        def one(a,
                b):
            """Say.

            More.
            """
            def two():
                return a

            return two
    '''
    module = sample(tmp_path, {"__init__.py": text})["sample"]
    assert {node.name: length for node, length in functions(module)} == {"one": 6, "two": 2}


def test_a_method_counts_as_a_function(tmp_path: Path) -> None:
    """Methods, asynchronous ones too, are held to the same length."""
    module = sample(tmp_path, {"__init__.py": "class A:\n    async def one(self):\n        return 1\n"})[
        "sample"
    ]
    assert [(node.name, length) for node, length in functions(module)] == [("one", 2)]


def test_blank_lines_do_not_count_for_a_file(tmp_path: Path) -> None:
    """Air between functions is free; comments are not."""
    module = sample(tmp_path, {"__init__.py": "# why\n\n\nx = 1\n   \n"})["sample"]
    assert nonblank_lines(module) == 2


def test_generated_code_is_left_out(tmp_path: Path) -> None:
    """What protoc writes has the length that protoc gives it."""
    assert list(sample(tmp_path, {"__init__.py": "", "order_pb2.py": "x = 1\n"})) == ["sample"]


def test_a_percentile_is_one_of_the_values() -> None:
    """Nine in ten are at most the ninth of ten values; the tenth may be anything."""
    assert percentile([*range(1, 10), 1000], 0.9) == 9
    assert percentile([7], 0.9) == 7


@pytest.mark.parametrize(
    "statement",
    [
        "import sample.a",
        "from sample import a",
        "from sample.a import x",
        "from . import a",
        "from .a import x",
    ],
)
def test_every_form_of_import_closes_a_cycle(tmp_path: Path, statement: str) -> None:
    """Absolute and relative imports, of a module or of a name in it, are one edge."""
    modules = sample(
        tmp_path, {"__init__.py": "", "a.py": "import sample.b\nx = 1\n", "b.py": statement + "\n"}
    )
    assert set(find_cycle(imports(modules, inside_functions=False))) == {"sample.a", "sample.b"}


def test_a_function_level_import_closes_a_cycle_by_the_second_count_only(tmp_path: Path) -> None:
    """The first count sees what runs at import, the second everything."""
    lazy = "def f():\n    from sample import a\n    return a\n"
    modules = sample(tmp_path, {"__init__.py": "", "a.py": "from sample import b\n", "b.py": lazy})
    assert find_cycle(imports(modules, inside_functions=False)) == []
    assert set(find_cycle(imports(modules, inside_functions=True))) == {"sample.a", "sample.b"}


def test_a_cycle_through_the_package_itself_is_found(tmp_path: Path) -> None:
    """A module that imports a name from the package that imports it waits for itself."""
    modules = sample(tmp_path, {"__init__.py": "from sample.a import x\n", "a.py": "from sample import y\n"})
    assert set(find_cycle(imports(modules, inside_functions=False))) == {"sample", "sample.a"}


def test_imports_in_class_bodies_and_conditions_are_module_level(tmp_path: Path) -> None:
    """They run at import, or a type checker follows them."""
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sample import b\n"
    modules = sample(
        tmp_path, {"__init__.py": "", "a.py": guarded, "b.py": "class B:\n    import sample.a\n"}
    )
    assert set(find_cycle(imports(modules, inside_functions=False))) == {"sample.a", "sample.b"}


def test_modules_that_import_downward_have_no_cycle(tmp_path: Path) -> None:
    """A diamond is no cycle, and neither is a subpackage that imports its own modules."""
    files = {
        "__init__.py": "from sample import a\n",
        "a.py": "from sample import b, c\nfrom sample.store import SQL\n",
        "b.py": "from sample import d\n",
        "c.py": "from sample.d import x\n",
        "d.py": "x = 1\n",
        "store/__init__.py": "from .sql import SQL\n",
        "store/sql.py": "from ..d import x\nSQL = x\n",
    }
    modules = sample(tmp_path, files)
    edges = imports(modules, inside_functions=True)
    assert edges["sample.store.sql"] == {"sample.d"}
    assert edges["sample.store"] == {"sample.store.sql"}
    assert find_cycle(edges) == []
