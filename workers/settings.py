"""Where everything is: from the environment, with defaults for compose.yaml's servers on this machine."""

from __future__ import annotations

import os
from typing import Final

BROKER_URL: Final = os.environ.get("CELERY_BROKER_URL", "redis://localhost:6379/0")
RESULT_BACKEND: Final = os.environ.get("CELERY_RESULT_BACKEND", "redis://localhost:6379/1")
DATABASE_URL: Final = os.environ.get(
    "DOCKET_CELERY_DATABASE_URL", "postgresql+psycopg://docket:docket-development@localhost:5432/docket"
)

PROVIDER_LATENCY_S: Final = float(os.environ.get("PROVIDER_LATENCY_S", "0.1"))
"""Seconds a call of a stand-in for a remote service takes."""
PAYMENTS_DATABASE_URL: Final = os.environ.get("PAYMENTS_DATABASE_URL", DATABASE_URL)
"""Where the stand-in for the payment provider keeps its books."""
WAREHOUSE_CLOSED_FILE: Final = os.environ.get("WAREHOUSE_CLOSED_FILE")
"""While this file exists the warehouse ships nothing."""
