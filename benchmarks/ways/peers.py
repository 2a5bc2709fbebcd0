"""Imports of the peers: they are in an environment of their own, where no type checker looks."""

from __future__ import annotations

import importlib
from typing import Any


def load(module: str) -> Any:
    """Import *module*, whose types nothing here knows."""
    return importlib.import_module(module)
