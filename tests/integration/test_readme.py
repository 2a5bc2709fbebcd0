"""The README as its reader follows it: every snippet and every command runs, and prints what is shown."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import StartWorker
from tests.readme import README, ROOT, Command, commands, make_project, snippets

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]
_FIRST_SCREEN_LINES = 50
LANGUAGES = {"python", "pycon", "console", "proto", "text", "mermaid"}


def kind(command: Command) -> str:
    """Return how a command of the README is proven: the name of the test below that does it."""
    for name, pattern in {
        "make": r"make [\w-]+$",
        "install": r"pip install [\w', \[\]-]+$",
        "protoc": r"python -m docket_celery protoc shop\.proto$",
        "example": r"python -m examples\.order$",
        "devserver": r"python -m docket_celery\.devserver$",
        "source": r"\. \.docket/env$",
        "worker": r"celery -A shop worker$",
        "docket": r"celery -A shop docket ",
    }.items():
        if re.match(pattern, command.text):
            return name
    pytest.fail(f"README.md, block at line {command.line}: no test runs {command.text!r}")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the files that the README names, and their generated code."""
    folder = tmp_path / "project"
    folder.mkdir()
    make_project(folder)
    return folder


def environment(worker_env: Mapping[str, str], project: Path) -> dict[str, str]:
    """Return a reader's environment: the project's folder is importable, the venv's programs are found."""
    path = os.pathsep.join([str(project), worker_env["PYTHONPATH"]])
    programs = os.pathsep.join([str(Path(sys.executable).parent), worker_env["PATH"]])
    return {**worker_env, "PYTHONPATH": path, "PATH": programs}


def run(argv: list[str], cwd: Path, env: Mapping[str, str], stdin: str = "") -> str:
    """Run a command that must succeed; return what it printed."""
    done = subprocess.run(
        argv, cwd=cwd, env=dict(env), input=stdin, capture_output=True, text=True, check=False, timeout=90
    )
    assert done.returncode == 0, f"{argv}:\n{done.stdout}{done.stderr}"
    return done.stdout


def test_every_block_and_every_command_is_proven() -> None:
    """Nothing stands in the README that the tests below pass over."""
    assert {snippet.language for snippet in snippets()} == LANGUAGES
    steps = [kind(command) for command in commands()][3:]
    assert list(dict.fromkeys(steps)) == ["install", "protoc", "devserver", "source", "docket", "worker"]
    files = [(snippet.language, snippet.file) for snippet in snippets() if snippet.file is not None]
    assert files == [("proto", "shop.proto"), ("python", "shop.py")]
    # Each text block is the output of the python block before it.
    order = [snippet.language for snippet in snippets() if snippet.language in {"python", "text"}]
    assert order == ["python", "python", "text"]


def test_make_targets_exist_and_the_two_commands_come_first() -> None:
    """`make demo` and `make test` stand on the first screen; each make target is one of the Makefile."""
    named = [command.text.split()[1] for command in commands() if kind(command) == "make"]
    assert named[:2] == ["demo", "test"]
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(named) <= targets
    first_screen = README.read_text().splitlines()[:_FIRST_SCREEN_LINES]
    assert {"$ make demo", "$ make test"} <= {line.partition("  #")[0].strip() for line in first_screen}


def test_what_is_to_be_installed_is_this_project_and_what_it_is_built_with() -> None:
    """Distribution, extras and tools have the names that pyproject.toml gives them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {"dev", "protoc"} <= set(project["project"]["optional-dependencies"])
    for command in commands():
        if kind(command) == "install":
            assert shlex.split(command.text)[2:] == [f"{project['project']['name']}[dev,protoc]"]


def test_the_example_prints_what_is_shown() -> None:
    """The resumed run in the README is the output of the example."""
    (command,) = (command for command in commands() if kind(command) == "example")
    assert run([sys.executable, *command.text.split()[1:]], ROOT, os.environ) == command.output


def test_the_picture_is_the_plan_of_the_task(project: Path, worker_env: dict[str, str]) -> None:
    """The graph is drawn from shop.py."""
    (picture,) = snippets("mermaid")
    env = environment(worker_env, project)
    printed = run(["sh", "-c", "celery -A shop docket plan --mermaid process_order"], project, env)
    assert picture.text.strip() in printed


def test_links_lead_to_files() -> None:
    """A link to a file of the repository has one at its end."""
    targets = re.findall(r"\]\(([^)]+)\)", README.read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
    modules = re.findall(r"`python -m (examples\.\w+)`", README.read_text())
    assert modules
    assert [m for m in modules if not (ROOT / m.replace(".", "/") / "__main__.py").exists()] == []


def test_the_commands_and_the_client_print_what_is_shown(
    project: Path, worker_env: dict[str, str], start_worker: StartWorker
) -> None:
    """Tables, plan, a real worker, and a client that gets the shipment: each output as in the README."""
    env = environment(worker_env, project)
    for command in commands():
        if kind(command) == "docket":
            printed = run(["sh", "-c", command.text], project, env)
            assert not command.output or printed == command.output
    start_worker(app="shop", env={"PYTHONPATH": env["PYTHONPATH"]})
    (session,) = snippets("pycon")
    (project / "session.txt").write_text(session.text)
    run([sys.executable, "-m", "doctest", "session.txt"], project, env)


def test_scripts_print_what_is_shown_below_them(project: Path, worker_env: dict[str, str]) -> None:
    """A python block that is no file of the project is a script; the text block after it is its output."""
    blocks = snippets()
    scripts = [n for n, block in enumerate(blocks) if block.language == "python" and block.file is None]
    assert scripts
    for number in scripts:
        shown = blocks[number + 1]
        assert shown.language == "text"
        printed = run([sys.executable, "-c", blocks[number].text], project, environment(worker_env, project))
        assert printed == shown.text


def test_the_second_terminal_has_the_servers_of_the_first(project: Path, worker_env: dict[str, str]) -> None:
    """What the devserver keeps is sourced, and the README's own migration works there."""
    (command,) = (command for command in commands() if kind(command) == "devserver")
    env = {
        name: value
        for name, value in environment(worker_env, project).items()
        if not name.startswith(("CELERY_", "DOCKET_"))
    }
    program, *arguments = shlex.split(command.text)
    assert program == "python"
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "DOCKET_CELERY_DATABASE_URL"):
        assert name in README.read_text()
    (source,) = {command.text for command in commands() if kind(command) == "source"}
    typed = f"{source} && celery -A shop docket migrate && echo $CELERY_BROKER_URL $CELERY_RESULT_BACKEND"
    first = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=project,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with first:
        assert first.stdout is not None
        shown = [first.stdout.readline() for _ in range(4)]
        assert source in shown[-1]
        printed = run(["sh", "-c", typed], project, env)
        assert (project / ".docket" / "env").read_text() == "".join(shown[:3])
        assert (project / ".docket" / "env").stat().st_mode & 0o777 == 0o600
        assert first.stdin is not None
        first.stdin.close()
        assert first.wait(30) == 0
    assert not (project / ".docket" / "env").exists()
    assert re.search(r"docket tables of version \d+\nredis://\S+/0 redis://\S+/1\n\Z", printed), printed
