"""Every error this library raises, as one tree.

::

    DocketError                     DC000
    ├── GraphError                  DC100   the graph is wired wrongly (all faults in one report)
    ├── InvalidArguments            DC101   a call's arguments do not fit (also a TypeError)
    ├── InvalidSettings             DC102   a ``docket_*`` setting is unknown or out of range (also a ValueError)
    ├── InvalidDeclaration          DC103   a GraphTask is declared wrongly (also a TypeError)
    ├── AbortError                  DC200   a step stopped the whole graph; never retried
    ├── StepFailed                  DC201   a step used up its attempts or may not be retried
    │   ├── StepTimedOut            DC202   its last attempt passed ``timeout``
    │   ├── WrongResult             DC203   it returned None or another type than it declares
    │   └── InputMutated            DC204   it changed one of its inputs (``docket_check_mutation``)
    ├── BatchFailed                 DC205   more items of a batch failed than ``max_failed`` allows
    ├── RunCancelled                DC300   someone outside stopped the run
    ├── RunTimedOut                 DC301   the run's own deadline passed
    ├── RunConflict                 DC302   the execution id already names another job
    ├── RunNotFound                 DC303   no run has that name
    ├── RunQuarantined              DC304   the run lost its worker too often; an operator must look
    ├── GraphChanged                DC305   a resumed run holds a checkpoint of a step that is gone
    ├── LeaseLost                   DC306   another worker took the run over
    ├── InputsChanged               DC307   a checkpoint was made from other inputs (``on_input_change="error"``)
    ├── TooManyAbandoned            DC308   timed-out steps hold too many threads
    ├── StoreMissing                DC400   a step persists but no store is configured
    ├── StoreUnavailable            DC401   the database did not answer; safe to retry
    ├── SchemaMismatch              DC402   the tables are missing or of another version
    ├── CorruptCheckpoint           DC403   a stored row does not match its checksum
    ├── CodecFailed                 DC404   the codec failed on a value, or the value was stored with or without one
    ├── CacheMismatch               DC405   a shared entry is of another type than the step returns
    ├── StoreRefused                DC406   the database refused for good: a missing right, its encoding
    ├── PayloadTooLarge             DC500   a message, job or result is over its limit
    ├── UnknownMessageType          DC501   no declared task uses this message type
    ├── DecodeFailed                DC502   the bytes are not a valid message of their type
    ├── PayloadUnavailable          DC503   a stored job or result cannot be had here
    └── ServersUnavailable          DC600   the development servers cannot be started

Every class passes its fields positionally to ``Exception.__init__`` and every field is a JSON value, so that
type, fields and text survive pickle and Celery's JSON result backend. A cause travels as type names and text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from docket_celery.frames import show, trim_traceback

MAX_CAUSE_CHARS = 4000
"""Most characters of a cause's text that a `StepFailed` or `AbortError` carries."""
MAX_OTHER_TRACES = 5
"""Most tracebacks of further steps that failed in the same run which a `StepFailed` shows."""


def type_path(kind: type) -> str:
    """Return the importable name of *kind*, as ``module.QualName``."""
    return f"{kind.__module__}.{kind.__qualname__}"


class DocketError(Exception):
    """Base of all errors of this library.

    Attributes:
        code: Stable code, explained in docs/errors.md; part of every message.
    """

    code: ClassVar[str] = "DC000"

    def describe(self) -> str:
        """Return what happened, which thing it concerns and what to do, without the code."""
        return " ".join(str(part) for part in self.args)

    def __str__(self) -> str:
        return f"[{self.code}] {self.describe()}"

    def __repr__(self) -> str:
        # Celery's log, its events and so Flower show an error's repr, not its text.
        return f"<{type(self).__name__} {self}>"


class _About(Exception):
    """Fields and text of errors that say of one thing what is wrong with it and what to do."""

    def __init__(self, what: str, problem: str) -> None:
        super().__init__(what, problem)
        self.what, self.problem = what, problem

    def describe(self) -> str:
        return f"{self.what}: {self.problem}"


class GraphError(DocketError):
    """A graph is wired wrongly, or a registration is refused. *faults* lists everything found."""

    code = "DC100"

    def __init__(self, graph: str, faults: Sequence[str]) -> None:
        super().__init__(graph, list(faults))
        self.graph, self.faults = graph, tuple(faults)

    def describe(self) -> str:
        head = f"graph {self.graph!r} has {len(self.faults)} fault{'s' if len(self.faults) != 1 else ''}"
        return "\n".join([head + ":", *(f"  - {fault}" for fault in self.faults)])


class InvalidArguments(_About, DocketError, TypeError):
    """A call's arguments do not fit what it declares; nothing was sent and nothing ran."""

    code = "DC101"


class InvalidSettings(DocketError, ValueError):
    """A ``docket_*`` setting is unknown, or its value cannot be used."""

    code = "DC102"

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key, self.problem = key, problem

    def describe(self) -> str:
        return f"setting {self.key}: {self.problem}"


class InvalidDeclaration(DocketError, TypeError):
    """A GraphTask is declared in a way that cannot work."""

    code = "DC103"

    def __init__(self, task: str, problem: str) -> None:
        super().__init__(task, problem)
        self.task, self.problem = task, problem

    def describe(self) -> str:
        return f"task {self.task}: {self.problem}"


class AbortError(DocketError):
    """Raised by a step to stop the whole graph at once; nobody retries it.

    Args:
        message: Why going on would be wrong.
        cause: What led to it; kept as ``__cause__`` here, as text after transport.
    """

    code = "DC200"

    def __init__(self, message: str, cause: BaseException | str | None = None) -> None:
        text = f"{type(cause).__name__}: {safe_text(cause)}" if isinstance(cause, BaseException) else cause
        super().__init__(message, text)
        self.message, self.cause = message, text
        if isinstance(cause, BaseException):
            self.__cause__ = cause

    def describe(self) -> str:
        return self.message if self.cause is None else f"{self.message} ({self.cause})"


class StepFailed(DocketError):
    """A step failed for good; the run failed with it.

    Attributes:
        step: Name of the step.
        attempts: Calls made in this delivery, the first included.
        retriable: Whether the last error was one that another attempt may cure.
        cause_types: Importable names of the cause's class and its bases, nearest first.
        cause_text: The cause's own text, with its notes.
        others: One line for each other step that failed in the same run.
        item: Path of the item it worked on, in a batch or fan-out; else ''.
    """

    code = "DC201"

    def __init__(
        self,
        step: str,
        attempts: int,
        retriable: bool,
        cause_types: Sequence[str],
        cause_text: str,
        others: Sequence[str] = (),
        item: str = "",
    ) -> None:
        super().__init__(step, attempts, retriable, list(cause_types), cause_text, list(others), item)
        self.step, self.attempts, self.retriable, self.item = step, attempts, retriable, item
        self.cause_types, self.cause_text, self.others = tuple(cause_types), cause_text, tuple(others)

    @classmethod
    def from_cause(cls, step: str, attempts: int, retriable: bool, cause: BaseException) -> StepFailed:
        """Build the error for *cause* and chain it; its traceback starts in the user's code."""
        names = [type_path(kind) for kind in type(cause).__mro__ if kind is not object]
        error = StepFailed(step, attempts, retriable, names, safe_text(cause, notes=True))
        error.__cause__ = trim_traceback(cause)
        return error

    def caused_by(self, kind: type[BaseException]) -> bool:
        """Tell whether the cause is a *kind*, also after transport, by importable name."""
        return isinstance(self.__cause__, kind) or type_path(kind) in self.cause_types

    def add_others(self, failures: Sequence[StepFailed]) -> None:
        """Mention the other steps that failed in the same run.

        Their texts are part of the transported fields; the tracebacks of some of their causes are notes, so that
        they stand in logs and in Celery's ``result.traceback`` below the first one's.
        """
        self.others = (*self.others, *map(str, failures))
        self.args = (*self.args[:-2], list(self.others), self.item)
        for failure in failures[:MAX_OTHER_TRACES]:
            if failure.__cause__ is not None:
                self.add_note(f"step {failure.step!r} failed too:\n{show(failure.__cause__)}")

    def place(self, item: str) -> None:
        """Say on which item the step worked; part of the transported fields."""
        self.item = item
        self.args = (*self.args[:-1], item)

    def describe(self) -> str:
        cause = self.cause_types[0].rpartition(".")[2] if self.cause_types else "error"
        tries = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        why = "attempts used up" if self.retriable else "not retriable"
        return self._with_others(f"{self._shown()} failed after {tries} ({why}): {cause}: {self.cause_text}")

    def _shown(self) -> str:
        return f"step {self.step!r} of item {self.item}" if self.item else f"step {self.step!r}"

    def _with_others(self, text: str) -> str:
        return (
            text if not self.others else "\n".join([text, "also failed:", *(f"  - {o}" for o in self.others)])
        )


class StepTimedOut(StepFailed):
    """A step's last attempt passed its ``timeout``; its late result, if any, is discarded."""

    code = "DC202"

    def __init__(
        self,
        step: str,
        attempts: int,
        timeout_s: float,
        retriable: bool = True,
        others: Sequence[str] = (),
        item: str = "",
    ) -> None:
        super().__init__(step, attempts, retriable, [type_path(StepTimedOut)], "", others, item)
        self.args = (step, attempts, timeout_s, retriable, list(others), item)
        self.timeout_s = timeout_s

    def describe(self) -> str:
        return self._with_others(
            f"{self._shown()} passed timeout={self.timeout_s:g} s (attempt {self.attempts}); raise the timeout, "
            "split the step, or watch ctx.cancelled in it"
        )


class WrongResult(StepFailed):
    """A step returned None or another type than it declares. Never retried."""

    code = "DC203"

    def __init__(
        self,
        step: str,
        attempts: int,
        expected: str,
        actual: str,
        others: Sequence[str] = (),
        item: str = "",
    ) -> None:
        super().__init__(step, attempts, False, [type_path(WrongResult)], "", others, item)
        self.args = (step, attempts, expected, actual, list(others), item)
        self.expected, self.actual = expected, actual

    def describe(self) -> str:
        return self._with_others(
            f"{self._shown()} returned {self.actual}, but declares {self.expected}; return a {self.expected}"
        )


class InputMutated(StepFailed):
    """A step changed messages that it was given and that other steps share (``docket_check_mutation``)."""

    code = "DC204"

    def __init__(
        self, step: str, attempts: int, inputs: Sequence[str], others: Sequence[str] = (), item: str = ""
    ) -> None:
        super().__init__(step, attempts, False, [type_path(InputMutated)], "", others, item)
        self.args = (step, attempts, list(inputs), list(others), item)
        self.inputs = tuple(inputs)

    def describe(self) -> str:
        return self._with_others(
            f"{self._shown()} changed its input {', '.join(self.inputs)}, which other steps share; copy it first: "
            "mine = type(message)(); mine.CopyFrom(message)"
        )


class BatchFailed(DocketError):
    """More items of a batch failed than ``max_failed`` allows.

    Attributes:
        failed: How many failed.
        total: How many items there are.
        allowed: How many might have failed.
        lines: What the first of them failed with.
    """

    code = "DC205"

    def __init__(self, failed: int, total: int, allowed: int, lines: Sequence[str] = ()) -> None:
        super().__init__(failed, total, allowed, list(lines))
        self.failed, self.total, self.allowed, self.lines = failed, total, allowed, tuple(lines)

    def describe(self) -> str:
        text = (
            f"{self.failed} of {self.total} items failed, max_failed allows {self.allowed}; mend the cause and "
            f"submit the batch again under its execution id: only what is missing runs"
        )
        return "\n".join([text, *(f"  - {line}" for line in self.lines)])


class RunCancelled(DocketError):
    """Someone outside stopped the run."""

    code = "DC300"

    def __init__(self, execution_id: str, reason: str) -> None:
        super().__init__(execution_id, reason)
        self.execution_id, self.reason = execution_id, reason

    def describe(self) -> str:
        return f"run {self.execution_id!r} was cancelled: {self.reason}"


class RunTimedOut(DocketError):
    """The run's own deadline passed before its target was there."""

    code = "DC301"

    def __init__(self, execution_id: str, timeout_s: float) -> None:
        super().__init__(execution_id, timeout_s)
        self.execution_id, self.timeout_s = execution_id, timeout_s

    def describe(self) -> str:
        kept = "finished steps that persist are kept"
        return f"run {self.execution_id!r} passed its timeout of {self.timeout_s:g} s; {kept}"


class RunConflict(DocketError):
    """The execution id names a run of another job or target (*what*), or one whose submission is `UNDER_WAY`."""

    code = "DC302"
    UNDER_WAY = "submission under way"

    def __init__(self, graph: str, execution_id: str, what: str) -> None:
        super().__init__(graph, execution_id, what)
        self.graph, self.execution_id, self.what = graph, execution_id, what

    def describe(self) -> str:
        found = f"exists with another {self.what}; use another execution_id, or submit the same job again"
        if self.what == self.UNDER_WAY:
            found = "has a submission under way; wait for it, or for docket_lease_seconds if it broke off"
        return f"run {self.execution_id!r} of graph {self.graph!r} {found}"


class RunNotFound(DocketError):
    """No run has that name."""

    code = "DC303"

    def __init__(self, graph: str, execution_id: str) -> None:
        super().__init__(graph, execution_id)
        self.graph, self.execution_id = graph, execution_id

    def describe(self) -> str:
        return f"graph {self.graph!r} has no run {self.execution_id!r}: no worker has begun it yet, or it is purged"


class RunQuarantined(DocketError):
    """The run lost its worker too often; its code is not started again until an operator says so."""

    code = "DC304"

    def __init__(self, graph: str, execution_id: str, lost: int) -> None:
        super().__init__(graph, execution_id, lost)
        self.graph, self.execution_id, self.lost = graph, execution_id, lost

    def describe(self) -> str:
        return (
            f"run {self.execution_id!r} of graph {self.graph!r} is quarantined: "
            f"its worker was lost {self.lost} times; find what kills it (memory, a crash in C code) first"
        )


class GraphChanged(DocketError):
    """A resumed run holds checkpoints of steps that are gone or have changed (in parentheses: how). Nothing ran."""

    code = "DC305"

    def __init__(self, graph: str, execution_id: str, steps: Sequence[str]) -> None:
        super().__init__(graph, execution_id, list(steps))
        self.graph, self.execution_id, self.steps = graph, execution_id, tuple(steps)

    def describe(self) -> str:
        what = f"{', '.join(self.steps)}; make the step what it was"
        if gone := ", ".join(repr(step) for step in self.steps if "(" not in step):
            what = f"{gone}, which the graph no longer has; put the step back, name the old one in renamed_from=(...)"
        run = f"run {self.execution_id!r} of graph {self.graph!r}"
        return f"{run} holds checkpoints of {what}, or use a new execution_id"


class LeaseLost(DocketError):
    """Another worker took the run over, so this one may not save anything more."""

    code = "DC306"

    def __init__(self, graph: str, execution_id: str, epoch: int) -> None:
        super().__init__(graph, execution_id, epoch)
        self.graph, self.execution_id, self.epoch = graph, execution_id, epoch

    def describe(self) -> str:
        return (
            f"run {self.execution_id!r} of graph {self.graph!r}: the lease of epoch {self.epoch} is gone; "
            "another worker goes on with the run"
        )


class InputsChanged(DocketError):
    """A step's checkpoint was made from other inputs than it would get now (``on_input_change="error"``)."""

    code = "DC307"

    def __init__(self, execution_id: str, step: str) -> None:
        super().__init__(execution_id, step)
        self.execution_id, self.step = execution_id, step

    def describe(self) -> str:
        return (
            f"run {self.execution_id!r}: the checkpoint of step {self.step!r} was made from other inputs; "
            'persist the step above it, use on_input_change="reuse", or submit under a new execution_id'
        )


class TooManyAbandoned(DocketError):
    """Steps that ignored their timeout hold so many threads that no run and no step with a timeout may start here."""

    code = "DC308"

    def __init__(self, abandoned: int, limit: int, steps: Sequence[str]) -> None:
        super().__init__(abandoned, limit, list(steps))
        self.abandoned, self.limit, self.steps = abandoned, limit, tuple(steps)

    def describe(self) -> str:
        return (
            f"{self.abandoned} threads are held by steps past their timeout (limit {self.limit}): "
            f"{', '.join(self.steps)}; let those steps watch ctx.cancelled, then restart the worker"
        )


class StoreMissing(DocketError):
    """A step persists its output, but there is no store to keep it in."""

    code = "DC400"

    def __init__(self, graph: str, step: str) -> None:
        super().__init__(graph, step)
        self.graph, self.step = graph, step

    def describe(self) -> str:
        return (
            f"step {self.step!r} of graph {self.graph!r} persists its output, but no store is configured; set "
            "docket_database_url (or DOCKET_CELERY_DATABASE_URL), or pass store= to the graph or the call"
        )


class StoreUnavailable(DocketError):
    """The database did not answer or refused for a passing reason; trying again is safe."""

    code = "DC401"

    def __init__(self, action: str, problem: str) -> None:
        super().__init__(action, problem)
        self.action, self.problem = action, problem

    def describe(self) -> str:
        return f"the database did not {self.action}: {self.problem}"


class SchemaMismatch(DocketError):
    """The database's tables are missing or of a version that this release does not know."""

    code = "DC402"

    def __init__(self, found: int | None, expected: int) -> None:
        super().__init__(found, expected)
        self.found, self.expected = found, expected

    def describe(self) -> str:
        state = "has no docket tables" if self.found is None else f"has docket tables of version {self.found}"
        newer = (self.found or 0) > self.expected
        fix = "upgrade docket-celery" if newer else "run 'celery -A APP docket migrate', or store.migrate()"
        return f"the database {state}, this release needs version {self.expected}; {fix}"


class CorruptCheckpoint(DocketError):
    """A stored row does not match its checksum, its type or its key. It is never used and never overwritten."""

    code = "DC403"

    def __init__(self, table: str, row: str, problem: str) -> None:
        super().__init__(table, row, problem)
        self.table, self.row, self.problem = table, row, problem

    def describe(self) -> str:
        return f"row {self.row} of {self.table} is damaged ({self.problem}); restore it from a backup or delete it"


class CodecFailed(_About, DocketError):
    """A value cannot be encoded, or a stored one not decoded; such a row is never used and never overwritten."""

    code = "DC404"


class CacheMismatch(DocketError):
    """A GLOBAL entry is of another type than the step returns: another step's, or of an earlier release."""

    code = "DC405"

    def __init__(self, graph: str, step: str, cache: str | None, found: str, expected: str) -> None:
        super().__init__(graph, step, cache, found, expected)
        self.graph, self.step, self.cache = graph, step, cache
        self.found, self.expected = found, expected

    def describe(self) -> str:
        whose = "its entry" if self.cache is None else f"the entry of cache {self.cache!r}"
        fix = "version=" if self.cache is None else "cache= or version="
        return (
            f"step {self.step!r} of graph {self.graph!r} returns {self.expected}, but {whose} for these inputs is a "
            f"{self.found}; give the step another {fix}, or drop the entry with graph.forget({self.step!r}, ...)"
        )


class StoreRefused(_About, DocketError):
    """The database refused for a reason that trying again does not cure: a missing right, its encoding, a table."""

    code = "DC406"


class PayloadTooLarge(DocketError):
    """A message is larger than ``docket_max_message_bytes``, or a job or result than ``docket_max_stored_bytes``.

    Attributes:
        setting: The limit's name.
    """

    code = "DC500"

    def __init__(
        self, what: str, size_bytes: int, limit_bytes: int, setting: str = "docket_max_message_bytes"
    ) -> None:
        super().__init__(what, size_bytes, limit_bytes, setting)
        self.what, self.size_bytes, self.limit_bytes, self.setting = what, size_bytes, limit_bytes, setting

    def describe(self) -> str:
        advice = f"raise {self.setting}, or store the data elsewhere and send its key"
        if self.setting == "docket_max_message_bytes":
            advice += (
                "; or let the store take it: a step that persists, and docket_database_url where it is sent"
            )
        return f"{self.what} has {self.size_bytes} bytes, over the limit of {self.limit_bytes}; {advice}"


class UnknownMessageType(DocketError):
    """A message names a type that no declared task uses in this process."""

    code = "DC501"

    def __init__(self, type_name: str) -> None:
        super().__init__(type_name)
        self.type_name = type_name

    def describe(self) -> str:
        return (
            f"message type {self.type_name!r} belongs to no declared GraphTask of this process; import the module "
            "that declares the task, on the worker and where you call .get()"
        )


class DecodeFailed(DocketError):
    """The bytes of a message cannot be read as its type."""

    code = "DC502"

    def __init__(self, type_name: str, problem: str) -> None:
        super().__init__(type_name, problem)
        self.type_name, self.problem = type_name, problem

    def describe(self) -> str:
        return f"a message of type {self.type_name!r} cannot be read: {self.problem}"


class PayloadUnavailable(_About, DocketError):
    """A job or result that was too large for a message lies in the store, and cannot be had from there here."""

    code = "DC503"

    def describe(self) -> str:
        return f"{self.what} lies in the store: {self.problem}"


class ServersUnavailable(_About, DocketError):
    """The development servers cannot be found or started."""

    code = "DC600"


def safe_text(error: BaseException, *, notes: bool = False) -> str:
    """Return the text of *error*, with its *notes* if asked for, bounded: it travels through brokers and backends.

    An exception whose ``__str__`` raises must not hide what happened.
    """
    try:
        text = str(error)
        if notes and hasattr(error, "__notes__"):
            text = "; ".join([text, *map(str, error.__notes__)])
    except Exception as broken:  # noqa: BLE001 -- user code; its failure must not hide the first one
        return f"<{type(error).__name__} whose text raised {type(broken).__name__}>"
    return text if len(text) <= MAX_CAUSE_CHARS else text[: MAX_CAUSE_CHARS - 1] + "…"
