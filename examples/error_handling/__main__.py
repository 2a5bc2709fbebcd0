"""``python -m examples.error_handling``: four queries, four outcomes."""

from __future__ import annotations

from docket_celery import AbortError, StepFailed
from examples.error_handling.attempts import Attempts
from examples.error_handling.error_handling_pb2 import LetterTotal, Query
from examples.error_handling.faults import NetworkError, ValidationError
from examples.error_handling.graph import CRITICAL, UNREACHABLE, fetching


def run(value: str) -> Attempts:
    """Run the graph for *value*, print what happened, and return what was seen of ``fetch_data``."""
    attempts = Attempts("fetch_data")
    fetching.listeners.append(attempts)
    try:
        total = fetching.execute(LetterTotal, Query(value=value))
        print(f"   result: count={total.count}")
    except StepFailed as failure:
        kinds = [kind.__name__ for kind in (ValidationError, NetworkError) if failure.caused_by(kind)]
        print(f"   failed, caused by {' and '.join(kinds)}")
        print(f"   {failure}")
    except AbortError as abort:
        print("   aborted; the cause is at hand:", repr(abort.__cause__))
        print(f"   {abort}")
    finally:
        fetching.listeners.remove(attempts)
    return attempts


def main() -> None:
    """Show a success, an error that is not retried, one that is, and one that stops the graph."""
    print("=== 1. Valid input ===")
    run("hello world")
    print("\n=== 2. Validation error: not retried ===")
    run("")
    print("\n=== 3. Network error: retried until the attempts are used up ===")
    attempts = run(UNREACHABLE)
    print(f"   {attempts.made} attempts, {len(attempts.waits_s)} waits: one fewer than attempts")
    print("\n=== 4. Critical failure: AbortError stops the graph ===")
    run(CRITICAL)


if __name__ == "__main__":
    main()
