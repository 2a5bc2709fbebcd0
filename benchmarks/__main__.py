"""``python -m benchmarks``."""

from __future__ import annotations

import os

from benchmarks import in_process


def main() -> None:
    """Print where and how loaded the machine is, then the figures."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores, load average {load}")
    in_process.main()


if __name__ == "__main__":
    main()
