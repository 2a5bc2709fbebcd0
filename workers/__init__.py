"""A deployable Celery app over real graphs: ``celery -A workers worker``. Copy it as a start of your own.

``celery -A workers docket migrate`` makes the tables first. `settings` says where everything is, `providers`
holds the services that the steps call; `orders`, `users` and `videos` hold a graph and its task each.
"""

from __future__ import annotations

from workers.celery import app

__all__ = ["app"]
