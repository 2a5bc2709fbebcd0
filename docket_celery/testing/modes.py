"""Where graphs run in tests: on the calling thread, by a fake clock, into memory, with or without eager Celery."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from docket_celery.engine.overrides import overridden, overrides
from docket_celery.engine.process.settings import PREFIX, Settings
from docket_celery.errors import InvalidSettings
from docket_celery.store.contract import Store
from docket_celery.testing.clocks import FakeClock

if TYPE_CHECKING:
    from celery import Celery

_EAGER = {"task_always_eager": True, "task_eager_propagates": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What the runs of a block use.

    Attributes:
        clock: Their time; ``clock.waited_s`` tells how long they waited.
        store: Where they persist.
    """

    clock: FakeClock
    store: Store


@contextmanager
def inline(
    *, clock: FakeClock | None = None, store: Store | None = None, **settings: Any
) -> Generator[Bench]:
    """Run every graph that is executed in the block on the calling thread, in plan order, by a fake clock.

    An hour's backoff passes at once. Inputs are checked for changes (``docket_check_mutation``). Other threads and
    asyncio tasks are not concerned. As ever without threads, ``aexecute`` and ``start`` are refused.

    Args:
        clock: A clock of your own; default: a new one.
        store: Where steps persist; default: a new `MemoryStore` on the clock. Wins over the graph's store and over
            ``docket_database_url``; ``execute(store=...)`` wins over this.
        **settings: ``docket_*`` values for the block, with or without the prefix.

    Raises:
        InvalidSettings: A setting is unknown or its value cannot be used.
    """
    from docket_celery.store import MemoryStore

    clock = FakeClock() if clock is None else clock
    store = MemoryStore(clock.time) if store is None else store
    named = {name.removeprefix(PREFIX): value for name, value in settings.items()}
    if named.setdefault("threads", 0) != 0:
        raise InvalidSettings("docket_threads", "is 0 here: inline and eager run on the calling thread")
    checked = Settings.read({PREFIX + name: value for name, value in named.items()}, {})
    changes = {"check_mutation": True, **{name: getattr(checked, name) for name in named}}
    with overridden(settings=changes, clock=clock, store=store):
        yield Bench(clock=clock, store=store)


@contextmanager
def eager(
    app: Celery, *, clock: FakeClock | None = None, store: Store | None = None, **settings: Any
) -> Generator[Bench]:
    """Run *app*'s tasks where they are submitted: ``.delay(order)`` returns with the run at its end.

    Graphs run as under `inline`. A failure is raised by ``.delay()`` itself; Celery's retries happen at once. The
    app's own settings are back after the block. Being eager is the whole app's: other threads see it too.

    Args:
        app: The Celery app.
        clock: As for `inline`.
        store: As for `inline`.
        **settings: As for `inline`.

    Raises:
        InvalidSettings: A setting is unknown or its value cannot be used.
    """
    with inline(clock=clock, store=store, **settings) as bench, conf_of(app, _EAGER):
        yield bench


@contextmanager
def check_inputs(*, enabled: bool = True) -> Generator[None]:
    """Fail steps that change their inputs with `InputMutated`, for every graph that is executed in the block."""
    with overridden(settings={"check_mutation": enabled}):
        yield


def overriding_store() -> Store | None:
    """Return the store of the `inline` or `eager` block around the caller, or None."""
    around = overrides()
    return None if around is None else around.store


@contextmanager
def conf_of(app: Celery, values: dict[str, Any]) -> Generator[None]:
    """Lay *values* over the app's configuration; nothing in it is written, so nothing has to be restored."""
    _ = app.conf.task_always_eager  # an app that has not read its configuration does so now
    conf: Any = app.conf
    # A key is looked for under the app's namespace first.
    layer = {name: value for key, value in values.items() for name in (key, conf._key(key))}
    conf.maps.insert(0, layer)
    try:
        yield
    finally:
        conf.maps[:] = [each for each in conf.maps if each is not layer]
