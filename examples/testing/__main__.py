"""``python -m examples.testing``: run the tests of the order example's graph, as ``pytest`` would in a project."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def main() -> int:
    """Run the test file next to this one; return pytest's exit status."""
    return pytest.main(["-v", "-c", str(HERE / "pytest.ini"), "-p", "no:cacheprovider", str(HERE)])


if __name__ == "__main__":
    sys.exit(main())
