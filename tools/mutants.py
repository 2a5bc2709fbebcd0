"""Run mutation tests of single modules: ``python tools/mutants.py engine/execution plan/plan``.

Each mutant is one small change of the code; a good suite fails on it. mutmut makes the mutants, in a copy of the
tree under .docket/, and runs the tests that reach them. It is no part of the lock: install it beside the project,
``uv pip install mutmut``. docs/contributing/mutation-testing.md tells what was found.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / ".docket" / "mutants"
PACKAGE = "docket_celery"
COPIED = [PACKAGE, "tests", "examples", "docs", "changes", "README.md", "CHANGELOG.md", "pyproject.toml"]
TESTS = [
    "engine", "attempt", "run", "wiring", "identity", "global_checkpoints", "properties_identity", "hosts", "hooks",
    "slots", "factory", "cache_control", "timeouts", "runtime", "properties_runs", "step_scope", "batches",
]  # fmt: skip
LONGEST = [
    "tests/unit/test_global_checkpoints.py::test_a_claim_is_given_up_however_its_step_ends[cannot save]",
    "tests/unit/test_runtime.py::test_a_moment_without_threads_leaves_no_run_hanging[0]",
]
# What takes seconds and reaches nothing that the others do not.
SLOW = " and ".join(
    f"not {part}"
    for part in (
        "ten_thousand", "hundreds", "longer_than_its_lease", "leaves_the_other_runs", "any_moment",
        "any_mix", "leads_nowhere", "races", "sqlite", "forked", "do_not_pile_up", "map_fields", "order_of_a_map",
        "take_turns",
    )
)  # fmt: skip
QUIET = ["-p", "no:randomly", "-p", "no:cacheprovider", "--no-showlocals"]
# Few random examples, and a short wait where a mutant hangs.
FEWER = {"PROPERTY_EXAMPLES": "0.2", "TEST_WAIT_S": "4"}


def make_tree(modules: list[str]) -> None:
    """Copy what the tests need, with mutmut's settings; results of an earlier call are kept."""
    TREE.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.rmtree(TREE / name, ignore_errors=True)
            shutil.copytree(ROOT / name, TREE / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, TREE / name)
    options = {
        "source_paths": [PACKAGE],
        "only_mutate": [f"{PACKAGE}/{module}.py" for module in modules],
        "also_copy": [name for name in COPIED if name != PACKAGE],
        "pytest_add_cli_args": [*QUIET, "-k", SLOW, *(f"--deselect={test}" for test in LONGEST)],
        "pytest_add_cli_args_test_selection": [f"tests/unit/test_{name}.py" for name in TESTS],
        # A mutant may hang: a clean test takes well under a second.
        "timeout_multiplier": 2.0,
        "timeout_constant": 6.0,
    }
    # Lists of texts and numbers read alike in JSON and TOML.
    lines = ["", "[tool.mutmut]", *(f"{key} = {json.dumps(value)}" for key, value in options.items()), ""]
    with (TREE / "pyproject.toml").open("a") as settings:
        settings.write("\n".join(lines))


def main() -> int:
    """Run mutmut on the modules that the command line names; its results are kept under .docket/."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "modules", nargs="+", help=f"names of modules of {PACKAGE}, such as: engine/execution plan/plan"
    )
    parser.add_argument(
        "--only", nargs="*", default=[], help="patterns of mutants, such as: 'docket_celery.plan*'"
    )
    parser.add_argument(
        "--at-once", type=int, default=1, help="how many mutants run at once; most wait a lot"
    )
    options = parser.parse_args()
    modules: list[str] = options.modules
    missing = [name for name in modules if not (ROOT / PACKAGE / f"{name}.py").is_file()]
    if missing:
        parser.error(f"no such module: {', '.join(missing)}")
    if importlib.util.find_spec("mutmut") is None:
        parser.error("mutmut is missing; install it beside the project: uv pip install mutmut")
    make_tree(modules)
    mutmut = [sys.executable, "-m", "mutmut"]
    environment = {**os.environ, **FEWER}
    done = subprocess.run(
        [*mutmut, "run", "--max-children", str(options.at_once), *options.only],
        cwd=TREE,
        env=environment,
        check=False,
    )
    subprocess.run([*mutmut, "results"], cwd=TREE, env=environment, check=False)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
