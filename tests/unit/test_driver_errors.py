"""What is told of an error of the database's driver: its words, without the password."""

from __future__ import annotations

import pytest
from psycopg import OperationalError as DriverError
from sqlalchemy import URL
from sqlalchemy.exc import OperationalError

from docket_celery.store.sql.faults import describe

SAID = 'connection to server at "db" failed: timeout expired'


@pytest.mark.parametrize(
    ("password", "said", "shown"),
    [
        ("e", SAID, SAID),
        ("to", SAID, SAID),
        ("out", SAID, SAID),
        ("onnection", SAID, SAID),
        (
            "to",
            "invalid connection option in postgresql://me:to@db/shop",
            "invalid connection option in postgresql://me:***@db/shop",
        ),
        ("to", "password=to host=db", "password=*** host=db"),
        ("s3cret-word", "no pg_hba.conf entry, s3cret-word", "no pg_hba.conf entry, ***"),
        ("s3cret-word", "in postgresql://me:s3cret-word@db", "in postgresql://me:***@db"),
    ],
)
def test_a_password_is_hidden_and_no_other_word(password: str, said: str, shown: str) -> None:
    """A short one may be part of any text: it is hidden only where a password is written."""
    error = OperationalError("SELECT 1", None, DriverError(said))
    assert describe(error, URL.create("postgresql", "me", password, "db", database="shop")) == shown
