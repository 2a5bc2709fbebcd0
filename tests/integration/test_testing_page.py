"""docs/testing.md as its reader would use it: its snippets are one test file, and all its tests pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import readme

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

# The plugin by its module: this checkout may be installed with an older entry point, or with none.
OPTIONS = ("-p", "docket_celery.testing.plugin", "-p", "no:cacheprovider")
PAGE = readme.ROOT / "docs" / "testing.md"


def snippets() -> list[str]:
    """Return the page's Python blocks, in order."""
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_every_snippet_runs(tmp_path: Path) -> None:
    """pytest, as strict as it can be, in a folder that holds the README's shop and the page's tests."""
    readme.make_project(tmp_path)
    (tmp_path / "test_page.py").write_text("\n\n".join(snippets()), encoding="utf-8")
    # Its own: the folder may lie inside a checkout, whose configuration is not the reader's.
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    # Neither what this run of pytest was told: a scratch folder named from here is another one from there.
    hidden = ("DOCKET_", "CELERY_", "PYTEST_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(readme.ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", *OPTIONS, "test_page.py"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tests = sum(block.count("\ndef test_") + block.startswith("def test_") for block in snippets())
    assert re.search(rf"^{tests} passed", done.stdout, re.MULTILINE), done.stdout
