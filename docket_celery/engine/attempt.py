"""One attempt of a step: the user's code is called once, with a deadline, and can be let go."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from docket_celery.engine.delivery import Delivery
from docket_celery.engine.process.instances import Factory, call_of, factory_of, holds_thread
from docket_celery.engine.process.limits import HeldCoroutine, Slot
from docket_celery.engine.process.pool import Worker
from docket_celery.engine.process.timer import Alarm
from docket_celery.engine.step_scope import await_within, call_within
from docket_celery.errors import StepTimedOut
from docket_celery.frames import fold
from docket_celery.observe.events import EventKind
from docket_celery.plan.context import StepContext, bind_context
from docket_celery.plan.messages import Value
from docket_celery.plan.step import Step
from docket_celery.store.identity import idempotency_key

_logger = logging.getLogger("docket_celery.attempt")


class Gate(Protocol):
    """The execution that an attempt belongs to: nothing begins and nothing counts once it is closed."""

    lock: threading.Lock
    closed: bool


class Caller(Protocol):
    """Who makes attempts and judges how they end."""

    @property
    def elapsed_s(self) -> float: ...
    def carry_on(self, work: Callable[[], None]) -> None: ...
    def returned(self, value: Any) -> None: ...
    def raised(self, error: BaseException, *, is_own: bool = True) -> None: ...


class Attempt:
    """One call of a step's code. Never waits on a thread.

    Whoever closes it first (its return, its deadline, or the end of the execution) decides; everything later is
    discarded.

    Args:
        step: The step.
        number: Which attempt of this delivery it is, from 1.
        values: The step's inputs.
        delivery: What the steps share.
        gate: The execution.
        caller: Told once how it ended, unless the execution ends before.
        slot: Given back when the code has really ended; None: the step has no limit.

    Attributes:
        in_flight: Whether user code runs now and its end would count. Written under the gate's lock.
        worker: The pool thread inside the step, while it is in flight.
    """

    __slots__ = (
        "_alarm",
        "_caller",
        "_delivery",
        "_future",
        "_gate",
        "_number",
        "_slot",
        "_step",
        "_unlink",
        "_values",
        "in_flight",
        "worker",
    )

    def __init__(
        self,
        step: Step,
        number: int,
        values: Sequence[Value],
        delivery: Delivery,
        gate: Gate,
        caller: Caller,
        slot: Slot | None,
    ) -> None:
        self._step, self._number, self._values = step, number, values
        self._delivery, self._gate, self._caller, self._slot = delivery, gate, caller, slot
        self._alarm: Alarm | None = None
        self._unlink: Callable[[], None] | None = None
        self._future: Future[Any] | None = None
        self.in_flight = False
        self.worker: Worker | None = None

    def start(self) -> bool:
        """Call the user's code, unless the execution is closed: then return False."""
        step, delivery = self._step, self._delivery
        context = step_context(step, delivery, self._number)
        with self._gate.lock:
            if self._gate.closed:
                return False
            thread = threading.current_thread()
            self.worker = thread if holds_thread(step) and isinstance(thread, Worker) else None
            if step.timeout_s is not None:
                ring = functools.partial(self._ring, context, step.timeout_s)
                self._alarm = delivery.runtime.timer.after(step.timeout_s, ring)
                self._unlink = functools.partial(delivery.cancellation.forget, context.cancelled.cancel)
            self.in_flight = True
        delivery.tell(EventKind.STEP_STARTED, step.name, self._number)
        if step.is_async:
            self._spawn(context)
            return True
        try:
            value = delivery.base.copy().run(self._invoke, context)
        except BaseException as error:  # noqa: BLE001 -- user code; every kind is judged by the caller
            self._ended(None, fold(error))
        else:
            self._ended(value, None)
        return True

    def abandon(self) -> None:
        """Replace the thread inside the step, unless it is the calling one. For whoever holds the gate's lock."""
        # Under the lock, as a step's return needs it first: the worker is surely inside that step.
        if self.worker is not None and self.worker is not threading.current_thread():
            self._delivery.runtime.pool.abandon(self.worker, self._step.name)

    def interrupt(self) -> None:
        """Let go of an attempt whose result will not count: no alarm any more, and a coroutine is cancelled."""
        alarm, self._alarm = self._alarm, None
        if alarm is not None:
            alarm.cancel()
        future, self._future = self._future, None
        if future is not None:
            future.cancel()

    # --- calling -----------------------------------------------------------------------------------------------

    def _invoke(self, context: StepContext) -> Any:
        bind_context(context)
        slot, scopes, hooks = self._slot, self._delivery.scopes, self._delivery.hooks
        if slot is not None:
            slot.bind()
        try:
            if not scopes and not hooks:
                return self._call(context)
            return call_within(scopes, hooks, self._call, context)
        finally:
            # Here and not where the attempt ends: a thread that was given up still does what the limit protects.
            if slot is not None:
                slot.cancel()

    def _call(self, context: StepContext) -> Any:
        return self._step.invoke(call_of(self._step), self._values, context)

    def _spawn(self, context: StepContext) -> None:
        # The coroutine's task copies the contextvars in force where it is made, so it is made inside the copy.
        submit = self._delivery.step_loop().submit
        try:
            if (factory := factory_of(self._step)) is not None:
                self._build(factory)
            future = self._delivery.base.copy().run(lambda: submit(self._coroutine(context)))
        except BaseException as error:  # noqa: BLE001 -- the call may fail before its first await
            if self._slot is not None:
                self._slot.cancel()
            self._ended(None, fold(error))
            return

        def finished(future: Future[tuple[Any, BaseException | None]]) -> None:
            if not future.cancelled():
                value, error = future.result()
            elif self._future is future:
                value, error = None, asyncio.CancelledError("the step cancelled itself")
            else:
                return
            self._caller.carry_on(lambda: self._ended(value, error))

        self._future = future
        future.add_done_callback(finished)
        with self._gate.lock:
            stopped = not self.in_flight or self._gate.closed
        if stopped and not future.done():
            self.interrupt()

    def _build(self, factory: Factory) -> None:
        """Make sure that the coroutine's instance is there, as loops only await.

        Raises:
            TimeoutError: The attempt has ended meanwhile; nobody asks for its error any more.
        """
        self._delivery.base.copy().run(factory.instance)
        with self._gate.lock:
            if not self.in_flight or self._gate.closed:
                raise TimeoutError
            self.worker = None

    def _coroutine(self, context: StepContext) -> Coroutine[Any, Any, tuple[Any, BaseException | None]]:
        coroutine = self._await(context)
        return coroutine if self._slot is None else HeldCoroutine(coroutine, self._slot)

    async def _await(self, context: StepContext) -> tuple[Any, BaseException | None]:
        """Return the step's result or error; asyncio would let SystemExit and KeyboardInterrupt end the loop."""
        bind_context(context)
        if self._slot is not None:
            self._slot.bind()
        scopes, hooks = self._delivery.scopes, self._delivery.hooks
        try:
            return await await_within(scopes, hooks, self._call, context), None
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 -- user code; every kind is judged by the caller
            return None, fold(error)

    # --- ending ------------------------------------------------------------------------------------------------

    def _close(self) -> bool:
        with self._gate.lock:
            if not self.in_flight or self._gate.closed:
                return False
            self.in_flight = False
            self.abandon()
            alarm, self._alarm = self._alarm, None
            unlink, self._unlink = self._unlink, None
        if alarm is not None:
            alarm.cancel()
        if unlink is not None:
            unlink()
        return True

    def _ring(self, context: StepContext, timeout_s: float) -> None:
        """End the attempt at its deadline; runs on the timer's thread, so it hands the rest to the pool."""
        step, worker = self._step, self.worker
        if not self._close():
            return
        error = StepTimedOut(step.name, self._number, timeout_s)
        context.cancelled.cancel(error)
        self.interrupt()
        if worker is not None:
            self._delivery.tell(EventKind.STEP_ABANDONED, step.name, self._number, detail=error.describe())
            _logger.warning(
                "run %r: %s; its thread goes on until the step returns", self._delivery.execution_id, error
            )
        self._caller.carry_on(lambda: self._caller.raised(error))

    def _ended(self, value: Any, error: BaseException | None) -> None:
        self._delivery.runtime.catch_up()  # a deadline that only this thread can ring has waited for the step
        if not self._close():
            elapsed = self._caller.elapsed_s
            self._delivery.tell(EventKind.STEP_LATE, self._step.name, self._number, elapsed_s=elapsed)
        elif error is None:
            self._caller.returned(value)
        else:
            self._caller.raised(error, is_own=self._is_own(error))

    def _is_own(self, error: BaseException) -> bool:
        """Tell whether the step's code raised *error*, rather than the host of the thread that it runs on.

        On a step thread there is no host: nothing but the step's code raises SystemExit or KeyboardInterrupt there.
        The thread of a caller gets both from signals and from its own end; gevent ends greenlets with GreenletExit.
        """
        if isinstance(error, Exception) or type(error).__name__ == "GreenletExit":
            return isinstance(error, Exception)
        if self._step.is_async:
            return self._delivery.loop is None and not self._delivery.runtime.inline
        return isinstance(threading.current_thread(), Worker)


def step_context(step: Step, delivery: Delivery, attempt: int) -> StepContext:
    """Return the context of one attempt; a timed attempt can be cancelled alone."""
    timed = step.timeout_s is not None
    return StepContext(
        graph=delivery.graph,
        execution_id=delivery.execution_id,
        step=step.name,
        item=delivery.item,
        make_key=functools.partial(
            idempotency_key, delivery.graph, delivery.execution_id, step.identity, delivery.item
        ),
        attempt=attempt,
        delivery=delivery.number,
        values=delivery.values,
        deadline=delivery.cancellation.now() + step.timeout_s if step.timeout_s is not None else None,
        cancelled=delivery.cancellation.child() if timed else delivery.cancellation,
    )
