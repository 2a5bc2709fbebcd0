"""Generate Python and its stubs beside each .proto, or check that the committed code is what they give.

Usage: proto.py [--check]

Names are relative to the repository's root: examples/order/order.proto becomes examples.order.order_pb2. All
files go through one protoc call, so that a message that two files define is refused here and not at import.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("docket_celery", "examples", "workers", "tests")
SUFFIXES = ("_pb2.py", "_pb2.pyi")


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Generate code from the .proto files.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file would change")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="docket-proto-") as folder:
        sources = find_sources(ROOT)
        generate(ROOT, sources, Path(folder))
        changes = compare(ROOT, Path(folder))
        if options.check:
            return report(changes, len(sources))
        apply(ROOT, Path(folder), changes)
    print(f"-- generated code of {len(sources)} .proto files: {len(changes)} files changed")
    return 0


def find_sources(root: Path) -> list[Path]:
    """List the .proto files of the tree at *root*, sorted, relative to it."""
    return sorted(path.relative_to(root) for folder in FOLDERS for path in (root / folder).rglob("*.proto"))


def generate(root: Path, sources: list[Path], out: Path) -> None:
    """Write the code of *sources* under *out*, at the paths it has under *root*.

    Raises:
        SystemExit: protoc refused a file; its own message names the line.
    """
    if not sources:
        return
    plugin = Path(sys.executable).with_name("protoc-gen-mypy")
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc", "-I", str(root)),
        *(f"--plugin=protoc-gen-mypy={plugin}", f"--python_out={out}", f"--mypy_out=quiet:{out}"),
        *(path.as_posix() for path in sources),
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr.strip() or f"protoc ended with {done.returncode}")


def compare(root: Path, out: Path) -> dict[Path, str]:
    """Say for each generated file that differs between *out* and the tree at *root* what is wrong with it."""
    wanted = generated(out, ["."])
    present = generated(root, FOLDERS)
    changes = dict.fromkeys(present - wanted, "has no .proto any more")
    changes |= dict.fromkeys(wanted - present, "is missing")
    both = wanted & present
    changes |= {path: "is out of date" for path in both if differs(root / path, out / path)}
    return dict(sorted(changes.items()))


def generated(root: Path, folders: list[str] | tuple[str, ...]) -> set[Path]:
    """List the generated files in *folders* of the tree at *root*, relative to it."""
    files = (path for folder in folders for path in (root / folder).rglob("*_pb2.py*"))
    return {path.relative_to(root) for path in files if path.name.endswith(SUFFIXES)}


def differs(one: Path, other: Path) -> bool:
    """Tell whether two files hold different bytes."""
    return one.read_bytes() != other.read_bytes()


def report(changes: dict[Path, str], count: int) -> int:
    """Print each fault and the fix, or that all is well; return the exit status."""
    for path, fault in changes.items():
        print(f"{path} {fault}: run make proto", file=sys.stderr)
    if not changes:
        print(f"-- generated code of {count} .proto files is up to date")
    return 1 if changes else 0


def apply(root: Path, out: Path, changes: dict[Path, str]) -> None:
    """Bring the tree at *root* in line with *out*."""
    for path in changes:
        if (out / path).exists():
            (root / path).write_bytes((out / path).read_bytes())
        else:
            (root / path).unlink()


if __name__ == "__main__":
    sys.exit(main())
