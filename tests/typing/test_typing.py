"""What mypy --strict and pyright --strict say of the public API, of wrong calls, and of the README's snippets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from tests.readme import make_project, snippets

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
MARK = "# expect-error"
LEAST_MARKS = 40
Fault = tuple[str, int, str]
Checker = Callable[[Sequence[Path], Path], set[Fault]]

pytestmark = pytest.mark.timeout(300)


def run(argv: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a checker; 1 says that it found errors, anything else that it did not work."""
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode in {0, 1}, f"{argv[:3]} failed with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


def mypy(files: Sequence[Path], folder: Path) -> set[Fault]:
    """Return mypy's errors as file name, line and text.

    All runs share a cache beside *folder*: most of the time goes into other people's stubs.
    """
    config = folder / "mypy.ini"
    config.write_text(
        f"[mypy]\nstrict = true\npython_version = 3.11\nexplicit_package_bases = true\n"
        f"mypy_path = {ROOT}:{folder}\nenable_error_code = ignore-without-code\n"
    )
    argv = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(config),
        "--cache-dir",
        str(folder.parent / "mypy-cache"),
    ]
    done = run([*argv, "--output=json", *map(str, files)], ROOT)
    assert not done.stderr, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {
        (Path(f["file"]).name, f["line"], f"{f['message']} [{f['code']}]")
        for f in found
        if f["severity"] == "error"
    }


def pyright(files: Sequence[Path], folder: Path) -> set[Fault]:
    """Return pyright's errors and warnings as file name, line and text."""
    config = {
        "include": list(map(str, files)),
        "extraPaths": [str(ROOT), str(folder)],
        "typeCheckingMode": "strict",
        "pythonVersion": "3.11",
        # The ignores in generated stubs are mypy's.
        "reportUnnecessaryTypeIgnoreComment": False,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    argv = [sys.executable, "-m", "basedpyright", "--project", str(folder), "--pythonpath", sys.executable]
    report = json.loads(run([*argv, "--outputjson"], folder).stdout)
    assert report["summary"]["filesAnalyzed"] >= len(files)
    found = report["generalDiagnostics"]
    return {(Path(f["file"]).name, f["range"]["start"]["line"] + 1, f["message"]) for f in found}


checkers = pytest.mark.parametrize("checker", [mypy, pyright])


def shown(faults: Iterable[Fault]) -> str:
    """Return faults as lines."""
    return "\n".join(f"{name}:{line}: {text}" for name, line, text in sorted(faults))


@checkers
def test_the_public_api_has_the_types_it_promises(checker: Checker, tmp_path: Path) -> None:
    """`api.py` asserts what is inferred for steps, execute, delay, get and direct calls: no error anywhere."""
    faults = checker([HERE / "api.py"], tmp_path)
    assert not faults, shown(faults)


@checkers
def test_wrong_calls_are_refused_where_they_stand(checker: Checker, tmp_path: Path) -> None:
    """Each marked line of the cases has an error, and no other line has one."""
    cases = HERE / "cases" / "rejected.py"
    marked = {n for n, line in enumerate(cases.read_text().splitlines(), 1) if MARK in line}
    assert len(marked) >= LEAST_MARKS
    faults = checker([cases], tmp_path)
    refused = {line for _, line, _ in faults}
    assert not marked - refused, f"accepted, but marked {MARK!r}: lines {sorted(marked - refused)}"
    assert not refused - marked, shown(f for f in faults if f[1] not in marked)


@checkers
def test_a_marked_line_that_is_right_would_be_noticed(checker: Checker, tmp_path: Path) -> None:
    """The checkers report nothing on a right line: a mark there fails the test above."""
    file = tmp_path / "right.py"
    file.write_text(f"number: int = 1  {MARK}\nother: int = '1'\n")
    assert {line for _, line, _ in checker([file], tmp_path)} == {2}


def test_every_public_name_of_the_tasks_is_covered() -> None:
    """The three typed declarations are in both files: a new one must be added to them."""
    for file in (HERE / "api.py", HERE / "cases" / "rejected.py"):
        text = file.read_text()
        for form in (r"@graph_task\(", r"@shared_graph_task\(", r"GraphTask\[\["):
            assert re.search(form, text), f"{file.name} lacks {form}"


@checkers
def test_the_snippets_of_the_readme_are_clean(checker: Checker, tmp_path: Path) -> None:
    """Readers may paste them into a strict project."""
    make_project(tmp_path)
    files: list[Path] = []
    for number, snippet in enumerate(snippets("python"), 1):
        file = tmp_path / (snippet.file or f"snippet_{number}.py")
        file.write_text(snippet.text)
        files.append(file)
    assert len(files) >= 2
    faults = checker(files, tmp_path)
    assert not faults, shown(faults)
