"""``python -m examples.parallel``: watch three fetches overlap."""

from __future__ import annotations

from examples.parallel.show import show_parallel

if __name__ == "__main__":
    print("=== Steps in parallel, from their types ===\n")
    show_parallel()
