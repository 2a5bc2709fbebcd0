"""One table."""

from __future__ import annotations

from django.db import models


class Line(models.Model):
    """What a step wrote, and over which database session and from which thread."""

    order = models.TextField(db_index=True)
    step = models.TextField()
    site = models.TextField()
    session = models.IntegerField()
    thread = models.TextField()
