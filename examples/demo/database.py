"""Plain SQL over the tables, as anybody would write it, printed with its rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from textwrap import dedent, indent
from typing import Any, LiteralString

import psycopg

Row = tuple[Any, ...]


class Database:
    """A reader of the demo's database.

    Args:
        url: SQLAlchemy URL.
    """

    def __init__(self, url: str) -> None:
        # SQLAlchemy's URLs name the driver as well.
        self._url = url.replace("postgresql+psycopg://", "postgresql://")

    def rows(self, query: LiteralString, *values: object) -> list[Row]:
        """Return all rows of *query*; no rows while its tables are not there yet."""
        return self._ask(query, values)[1]

    def show(self, query: LiteralString) -> list[Row]:
        """Print *query* and its rows, and return them."""
        names, rows = self._ask(query, ())
        print(indent(dedent(query).strip(), "   "))
        print(indent(_table(names, rows), "      | ") + "\n")
        return rows

    def _ask(self, query: LiteralString, values: Sequence[object]) -> tuple[list[str], list[Row]]:
        with psycopg.connect(self._url) as connection:
            try:
                cursor = connection.execute(query, values)
            except psycopg.errors.UndefinedTable:
                return [], []
            return [column.name for column in cursor.description or ()], cursor.fetchall()


def _table(names: Sequence[str], rows: Sequence[Row]) -> str:
    cells = [list(names), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return f"{value:.1f}" if isinstance(value, float) else str(value)
