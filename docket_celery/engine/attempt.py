"""One attempt of a step: the user's code is called once, with a deadline, and can be let go.

Around the code are the host's scopes and the hooks. A scope is bound to its thread, as Celery's current task is: an
``async def`` step leaves it whenever it waits, since the loop's thread then runs other steps. A hook belongs to the
call: it is entered before and exited after.
"""

from __future__ import annotations

import _thread
import functools
import logging
import threading
import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

from docket_celery.engine.process.hooks import MakeContext
from docket_celery.engine.process.inline import InlineRuntime
from docket_celery.engine.process.instances import Factory
from docket_celery.engine.process.limits import Slot
from docket_celery.engine.process.pool import Worker
from docket_celery.engine.process.state import process
from docket_celery.engine.process.timer import Alarm
from docket_celery.engine.run_context import Ending, RunContext
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

    Its return, its deadline or the end of the execution closes it, whichever comes first; everything later is
    discarded.

    It is the attempt *number* of a step whose first one *began* at that time of the run's clock. Nothing begins and
    nothing counts once its *gate*, the execution, is closed. The *slot* is given back when the code has really
    ended.

    `in_flight` tells whether user code runs now and its end would count; it is written under the gate's lock. The
    pool thread inside the step meanwhile is `worker`. Code that ran `on_host`, a thread of the host, may get what
    signal handlers raise. `result` tells how it ended, if it ended on the thread that started it; else `go_on` is
    given work for the pool that returns how it ended, or None where that does not count.
    """

    in_flight = False
    on_host = False
    worker: Worker | None = None
    result: Result | None = None
    go_on: Callable[[Callable[[], Result | None]], None]
    _context: StepContext | None = None
    _alarm: Alarm | None
    _future: Future[Any] | None = None

    def __init__(
        self,
        step: Step,
        number: int,
        values: Sequence[Value],
        run: RunContext,
        gate: Ending,
        slot: Slot | None,
        began: float,
    ) -> None:
        self._step, self._number, self._values, self._began = step, number, values, began
        self._run, self._gate, self._slot, self._alarm = run, gate, slot, None

    def start(self, thread: Worker | None) -> bool:
        """Call the user's code on the calling *thread*, unless the execution is closed: then return False."""
        step, run = self._step, self._run
        # No deadline ends it, and no pool gives up a thread that is not its own: then nothing else writes here.
        self._undisturbed = thread is None and step.ends_here
        self.in_flight = not self._gate.closed if self._undisturbed else self._begin(thread)
        if not self.in_flight:
            return False
        if run.submission.listeners:
            run.tell(EventKind.STEP_STARTED, step.name, self._number)
        if step.is_async:
            self._spawn()
            return True
        try:
            result: Result = run.base.copy().run(self._invoke), None
        except BaseException as error:  # noqa: BLE001 -- user code; every kind is judged
            self.on_host = thread is None
            result = None, trim_traceback(error)
        self.result = self._ended(result)
        return True

    def _begin(self, thread: Worker | None) -> bool:
        step, timeout_s = self._step, self._step.timeout_s
        with self._gate.lock:
            if self._gate.closed:
                return False
            if thread is not None and (not step.is_async or process.holds_thread(step)):
                self.worker = thread
            if timeout_s is not None:
                context = self.context()
                ring = functools.partial(self._ring, context, timeout_s)
                self._alarm = self._run.runtime.timer.after(timeout_s, ring)
            # Under the lock: an abort that finds it closes it.
            self.in_flight = True
        return True

    def context(self) -> StepContext:
        """Return what the step may ask about this attempt; a timed one can be cancelled alone."""
        if self._context is None:
            run, step = self._run, self._step
            cancelled, timeout_s = run.cancellation, step.timeout_s
            make_key = functools.partial(
                idempotency_key, run.graph, run.execution_id, step.identity, run.item
            )
            self._context = StepContext(
                graph=run.graph,
                execution_id=run.execution_id,
                step=step.name,
                item=run.item,
                make_key=make_key,
                attempt=self._number,
                delivery=run.number,
                values=run.submission.values,
                deadline=None if timeout_s is None else cancelled.now() + timeout_s,
                cancelled=cancelled if timeout_s is None else cancelled.child(),
            )
        return self._context

    def release(self) -> None:
        """Give the slot back; may be called again."""
        if self._slot is not None:
            self._slot.cancel()

    def abandon(self) -> None:
        """Replace the thread inside the step, unless it is the calling one. The caller holds the gate's lock."""
        # Under the lock, as a step's return needs it first: the worker is surely inside that step.
        if self.worker is not None and self.worker is not threading.current_thread():
            self._run.runtime.pool.abandon(self.worker, self._step.name)

    def interrupt(self) -> None:
        """Give up an attempt whose result will not count: no alarm any more, and a coroutine is cancelled."""
        alarm, self._alarm = self._alarm, None
        if alarm is not None:
            alarm.cancel()
        future, self._future = self._future, None
        if future is not None:
            future.cancel()

    def _invoke(self) -> Any:
        bind_context(self.context)
        slot, scopes, hooks = self._slot, self._run.submission.scopes, self._run.hooks
        if slot is None and not scopes and not hooks:
            code = self._step.plain_code
            return self._call() if code is None else code(*self._values)
        if slot is not None:
            slot.bind()
        makes = (*scopes, *hooks)
        try:
            if len(makes) == 1:
                with makes[0]():
                    return self._call()
            with ExitStack() as stack:
                _enter(stack, makes)
                return self._call()
        finally:
            # Here and not where the attempt ends: a thread that was given up still does what the limit protects.
            if slot is not None:
                slot.cancel()

    def _call(self) -> Any:
        step = self._step
        call = step.call if step.make is None else process.factory_of(step, step.make).instance().compute
        return step.invoke(call, self._values, self.context() if step.takes_context else None)

    def _spawn(self) -> None:
        import asyncio

        run = self._run
        submit = (run.runtime.loop if run.loop is None else run.loop).submit
        try:
            if (make := self._step.make) is not None:
                self._build(process.factory_of(self._step, make))
            # The coroutine's task copies the contextvars in force where it is made, so it is made inside the copy.
            future = run.base.copy().run(lambda: submit(self._await(), self.release))
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
        """Make sure that the coroutine's instance is there, as loops only await; raise if the attempt has ended."""
        self._run.base.copy().run(factory.instance)
        with self._gate.lock:
            if not self.in_flight or self._gate.closed:
                raise TimeoutError
            self.worker = None

    async def _await(self) -> Result:
        """Return the step's result or error; asyncio would let SystemExit and KeyboardInterrupt end the loop."""
        import asyncio

        bind_context(self.context)
        if self._slot is not None:
            self._slot.bind()
        run = self._run
        try:
            return await await_within(run.submission.scopes, run.hooks, self._call), None
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 -- user code; every kind is judged
            if self._slot is not None and isinstance(error, GeneratorExit):
                # A loop that was closed calls nothing back. The collector may close the coroutine on a thread that
                # holds the very locks which giving back a slot needs, so another thread does it.
                _thread.start_new_thread(self.release, ())
            self.on_host = run.loop is not None or run.runtime.inline
            return None, trim_traceback(error)

    def _close(self, *, late: bool = False) -> bool:
        gate = self._gate
        if self._undisturbed:
            self.in_flight = False
            return not gate.closed
        with gate.lock:
            if not self.in_flight or gate.closed:
                return False
            self.in_flight = False
            if late:
                self.abandon()
            alarm, self._alarm = self._alarm, None
        if alarm is not None:
            alarm.cancel()
            self._run.cancellation.forget(self.context().cancelled.cancel)
        return True

    def _ring(self, context: StepContext, timeout_s: float) -> None:
        """End the attempt at its deadline; runs on the timer's thread, so it hands the rest to the pool."""
        step, worker = self._step, self.worker
        if not self._close(late=True):
            return
        error = StepTimedOut(step.name, self._number, timeout_s)
        context.cancelled.cancel(error)
        self.interrupt()
        if worker is not None:
            self._run.tell(EventKind.STEP_ABANDONED, step.name, self._number, detail=error.describe())
            _logger.warning(
                "run %r: %s; its thread continues until the step returns", self._run.execution_id, error
            )
        self.go_on(lambda: (None, error))

    def _ended(self, result: Result) -> Result | None:
        """Return *result* if it counts."""
        run = self._run
        if (runtime := run.runtime).inline and isinstance(runtime, InlineRuntime):
            runtime.catch_up()  # a deadline that only this thread can ring has waited for the step
        if self._close():
            return result
        elapsed_s = run.cancellation.now() - self._began
        run.tell(EventKind.STEP_LATE, self._step.name, self._number, elapsed_s=elapsed_s)
        return None


class Pushed:
    """Keeps the second of each pair on top of the first, a stack of the host with ``push`` and ``pop``."""

    def __init__(self, *pairs: tuple[Any, Any]) -> None:
        self._pairs = pairs

    def __enter__(self) -> None:
        for stack, value in self._pairs:
            stack.push(value)

    def __exit__(self, *_: object) -> None:
        for stack, _value in self._pairs:
            stack.pop()


async def await_within(
    scopes: Sequence[MakeContext],
    hooks: Sequence[MakeContext],
    call: Callable[..., Coroutine[Any, Any, Any]],
    *args: Any,
) -> Any:
    """Return what the coroutine of ``call(*args)`` returns; *hooks* last over its waits, *scopes* do not."""
    coroutine = _hooked(hooks, call, *args) if hooks else call(*args)
    return await (_resumed_within(scopes, coroutine) if scopes else coroutine)


async def _hooked(
    hooks: Sequence[MakeContext], call: Callable[..., Coroutine[Any, Any, Any]], *args: Any
) -> Any:
    with ExitStack() as stack:
        _enter(stack, hooks)
        return await call(*args)


@types.coroutine
def _resumed_within(
    scopes: Sequence[MakeContext], coroutine: Coroutine[Any, Any, Any]
) -> Generator[Any, Any, Any]:
    """Drive *coroutine*: *scopes* are entered for each resume and left at each suspension."""
    resume: Callable[[Any], Any] = coroutine.send
    given: Any = None
    try:
        while True:
            with ExitStack() as stack:
                _enter(stack, scopes)
                try:
                    wanted = resume(given)
                except StopIteration as end:
                    return end.value
            try:
                given = yield wanted
                resume = coroutine.send
            except GeneratorExit:
                with ExitStack() as stack:
                    _enter(stack, scopes)
                    coroutine.close()
                raise
            except BaseException as error:  # noqa: BLE001 -- whatever is thrown in is the coroutine's to handle
                given, resume = error, coroutine.throw
    finally:
        # If a scope could not be entered the coroutine has never begun, or is left in the middle.
        coroutine.close()


def _enter(stack: ExitStack, makes: Sequence[MakeContext]) -> None:
    """Enter what *makes* return, the first outermost."""
    for make in makes:
        stack.enter_context(make())
