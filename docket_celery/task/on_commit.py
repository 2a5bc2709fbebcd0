"""Submitting when Django's transaction commits, by the methods that Celery gives its own tasks in Django projects."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Mapping
from typing import Any, ParamSpec, TypeVar

from celery import Task

from docket_celery.task.headers import PREPARED

P = ParamSpec("P")
R = TypeVar("R")


class OnCommitTask(Task[P, R]):
    """A task that can wait for a commit. Celery picks `DjangoTask` for this, unless a task names its own base."""

    abstract = True

    def delay_on_commit(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Submit a job when Django's transaction commits; at once outside of one, never if it is rolled back.

        Raises:
            InvalidArguments, PayloadTooLarge: As `delay`, here and now; what a server says, at the commit.
            ImportError: Django is not installed.
        """
        self.apply_async_on_commit(args, kwargs)

    def apply_async_on_commit(
        self,
        args: Any = None,
        kwargs: Any = None,
        *more: Any,
        execution_id: str | None = None,
        context: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Submit a job like `apply_async` when Django's transaction commits: the job as it is now.

        Arguments as for `apply_async`.

        Raises:
            InvalidArguments, PayloadTooLarge: As `apply_async`, here and now; what a server says, at the commit.
            ImportError: Django is not installed.
        """
        headers = dict(options.pop("headers", None) or {})
        job = copy.deepcopy(self._prepare(args, kwargs, headers, execution_id, context))
        self._note_order(headers, options)
        options |= {"headers": headers, PREPARED: True}
        transaction: Any = importlib.import_module("django.db.transaction")
        transaction.on_commit(functools.partial(self.apply_async, *job, *more, **options))

    def _prepare(
        self,
        args: Any,
        kwargs: Any,
        headers: dict[str, Any],
        execution_id: str | None,
        context: Mapping[str, Any] | None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Check the job and write down in *headers* what names it; return its arguments."""
        raise NotImplementedError

    def _note_order(self, headers: dict[str, Any], options: dict[str, Any]) -> None:
        """Move what *options* say of a batch into *headers*."""
        raise NotImplementedError
