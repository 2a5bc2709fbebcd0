"""Django's settings, Celery's among them."""

from __future__ import annotations

import os

from sqlalchemy import make_url

_url = make_url(os.environ["DJANGO_SHOP_DATABASE_URL"])
_AGES = {"": 0, "none": None}

SECRET_KEY = "of a test"
USE_TZ = True
TIME_ZONE = "UTC"
INSTALLED_APPS = ["tests.integration.django_shop"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _url.database,
        "USER": _url.username,
        "PASSWORD": _url.password,
        "HOST": _url.host,
        "PORT": _url.port,
        "CONN_MAX_AGE": _AGES[os.environ.get("DJANGO_SHOP_CONN_MAX_AGE", "")],
        "OPTIONS": {"application_name": "django-shop"},
    }
}

CELERY_BROKER_URL = os.environ.get("CELERY_BROKER_URL")
CELERY_RESULT_BACKEND = os.environ.get("CELERY_RESULT_BACKEND")
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_TASK_ALWAYS_EAGER = "DJANGO_SHOP_EAGER" in os.environ
CELERY_DOCKET_THREADS = int(os.environ.get("DJANGO_SHOP_THREADS", "4"))
CELERY_DOCKET_STEP_HOOKS = ["tests.integration.django_shop.hooks:site"]
