"""One attempt of a step: the user's code is called once, with a deadline, and can be let go."""

from __future__ import annotations

import _thread
import asyncio
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from docket_celery.engine.delivery import Delivery
from docket_celery.engine.ending import Ending
from docket_celery.engine.process.instances import Factory
from docket_celery.engine.process.limits import Slot
from docket_celery.engine.process.pool import Worker
from docket_celery.engine.process.state import process
from docket_celery.engine.process.timer import Alarm
from docket_celery.engine.step_scope import await_within, call_within
from docket_celery.errors import StepTimedOut, trim_traceback
from docket_celery.observe.events import EventKind
from docket_celery.plan.context import StepContext, bind_context
from docket_celery.plan.messages import Value
from docket_celery.plan.step import Step
from docket_celery.store.identity import idempotency_key

_logger = logging.getLogger("docket_celery.attempt")


Result = tuple[Any, BaseException | None]
"""What a step's code returned, or what it raised."""


class Attempt:
    """One call of a step's code: what the life of a step yields to have it made. Never waits on a thread.

    Whatever closes it first (its return, its deadline, or the end of the execution) decides; everything later is
    discarded.

    Args:
        step: The step.
        number: Which attempt of this delivery it is, from 1.
        values: The step's inputs.
        delivery: What the steps share.
        gate: The execution that it belongs to: nothing begins and nothing counts once that is closed.
        slot: Given back when the code has really ended; None: the step has no limit.
        began: When the step's first attempt began, in seconds of the delivery's clock.

    Attributes:
        in_flight: Whether user code runs now and its end would count. Written under the gate's lock.
        worker: The pool thread inside the step, while it is in flight.
        on_host: The code ran on a thread of the host, where signal handlers raise too.
        result: How it ended, if it ended on the thread that started it.
        go_on: Given work for the pool that returns how the attempt ended, or None where that does not count.
    """

    __slots__ = (
        "_alarm",
        "_began",
        "_delivery",
        "_future",
        "_gate",
        "_number",
        "_slot",
        "_step",
        "_unlink",
        "_values",
        "go_on",
        "in_flight",
        "on_host",
        "result",
        "worker",
    )

    def __init__(
        self,
        step: Step,
        number: int,
        values: Sequence[Value],
        delivery: Delivery,
        gate: Ending,
        slot: Slot | None,
        began: float,
    ) -> None:
        self._step, self._number, self._values = step, number, values
        self._delivery, self._gate, self._slot = delivery, gate, slot
        self._began = began
        self._alarm: Alarm | None = None
        self._unlink: Callable[[], None] | None = None
        self._future: Future[Any] | None = None
        self.in_flight = False
        self.on_host = False
        self.worker: Worker | None = None
        self.result: Result | None = None
        self.go_on: Callable[[Callable[[], Result | None]], None]

    def start(self) -> bool:
        """Call the user's code, unless the execution is closed: then return False."""
        step, delivery = self._step, self._delivery
        context = step_context(step, delivery, self._number)
        with self._gate.lock:
            if self._gate.closed:
                return False
            thread = threading.current_thread()
            pooled = thread if isinstance(thread, Worker) else None
            self.worker = pooled if process.holds_thread(step) else None
            if step.timeout_s is not None:
                ring = functools.partial(self._ring, context, step.timeout_s)
                self._alarm = delivery.runtime.timer.after(step.timeout_s, ring)
                self._unlink = functools.partial(delivery.cancellation.forget, context.cancelled.cancel)
            self.in_flight = True
        if delivery.listeners:
            delivery.tell(EventKind.STEP_STARTED, step.name, self._number)
        if step.is_async:
            self._spawn(context)
            return True
        try:
            result: Result = delivery.base.copy().run(self._invoke, context), None
        except BaseException as error:  # noqa: BLE001 -- user code; every kind is judged
            self.on_host = not isinstance(threading.current_thread(), Worker)
            result = None, trim_traceback(error)
        self.result = self._ended(result)
        return True

    def release(self) -> None:
        """Give the slot back; may be called again."""
        if self._slot is not None:
            self._slot.cancel()

    def abandon(self) -> None:
        """Replace the thread inside the step, unless it is the calling one. The caller holds the gate's lock."""
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
        return self._step.invoke(process.call_of(self._step), self._values, context)

    def _spawn(self, context: StepContext) -> None:
        # The coroutine's task copies the contextvars in force where it is made, so it is made inside the copy.
        submit = self._delivery.step_loop().submit
        try:
            if (factory := process.factory_of(self._step)) is not None:
                self._build(factory)
            future = self._delivery.base.copy().run(lambda: submit(self._await(context), self.release))
        except BaseException as error:  # noqa: BLE001 -- the call may fail before its first await
            self.release()
            self.result = self._ended((None, trim_traceback(error)))
            return

        def finished(future: Future[Result]) -> None:
            result: Result
            if not future.cancelled():
                result = future.result()
            elif self._future is future:
                result = None, asyncio.CancelledError("the step cancelled itself")
            else:
                return
            self.go_on(lambda: self._ended(result))

        self._future = future
        future.add_done_callback(finished)
        with self._gate.lock:
            stopped = not self.in_flight or self._gate.closed
        if stopped and not future.done():
            self.interrupt()

    def _build(self, factory: Factory) -> None:
        """Make sure that the coroutine's instance is there, as loops only await.

        Raises:
            TimeoutError: The attempt has ended meanwhile; its error counts no more.
        """
        self._delivery.base.copy().run(factory.instance)
        with self._gate.lock:
            if not self.in_flight or self._gate.closed:
                raise TimeoutError
            self.worker = None

    async def _await(self, context: StepContext) -> Result:
        """Return the step's result or error; asyncio would let SystemExit and KeyboardInterrupt end the loop."""
        bind_context(context)
        if self._slot is not None:
            self._slot.bind()
        scopes, hooks = self._delivery.scopes, self._delivery.hooks
        try:
            return await await_within(scopes, hooks, self._call, context), None
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 -- user code; every kind is judged
            if self._slot is not None and isinstance(error, GeneratorExit):
                # A loop that was closed calls nothing back. The collector may close the coroutine on a thread that
                # holds the very locks which giving back a slot needs, so another thread does it.
                _thread.start_new_thread(self.release, ())
            self.on_host = self._delivery.loop is not None or self._delivery.runtime.inline
            return None, trim_traceback(error)

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
        self.go_on(lambda: (None, error))

    def _ended(self, result: Result) -> Result | None:
        """Return *result* if it counts."""
        self._delivery.runtime.catch_up()  # a deadline that only this thread can ring has waited for the step
        if self._close():
            return result
        elapsed = self._delivery.cancellation.now() - self._began
        self._delivery.tell(EventKind.STEP_LATE, self._step.name, self._number, elapsed_s=elapsed)
        return None


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
