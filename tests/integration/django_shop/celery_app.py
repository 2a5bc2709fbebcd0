"""The Celery app, as Celery's manual has Django projects make it."""

from __future__ import annotations

import os

from celery import Celery

from docket_celery.engine.process import pool

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.integration.django_shop.settings")
if "DJANGO_SHOP_IDLE_S" in os.environ:
    pool.IDLE_S = float(os.environ["DJANGO_SHOP_IDLE_S"])

app = Celery("django_shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
