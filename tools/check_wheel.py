"""Prove the built distributions: what the wheel holds, and that it imports in a bare environment elsewhere.

Usage: check_wheel.py DIST
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

PACKAGE = "docket_celery"
SDIST_TOP = {PACKAGE, "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml", ".gitignore"}
LOCK = Path(__file__).resolve().parent.parent / "requirements" / "image.txt"
UV = Path(sys.executable).with_name("uv")


def main(dist: Path) -> int:
    """Check the one wheel and the one sdist in *dist*; print what was proven."""
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    faults = [*wheel_faults(wheel), *sdist_faults(sdist)]
    if not faults:
        faults = import_faults(wheel)
    for fault in faults:
        print(f"check_wheel: {fault}", file=sys.stderr)
    if not faults:
        print(f"{wheel.name} holds {PACKAGE} alone and imports in a bare environment")
    return 1 if faults else 0


def wheel_faults(wheel: Path) -> list[str]:
    """Say what *wheel* holds too much and what it lacks."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = wheel.name.split("-py3")[0] + ".dist-info"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    strangers = [name for name in names if not name.startswith((f"{PACKAGE}/", f"{info}/"))]
    faults = [f"{wheel.name} holds {name}" for name in strangers]
    faults += [f"{wheel.name} lacks {name}" for name in missing(names)]
    if metadata["Name"] != "docket-celery":
        faults.append(f"{wheel.name} names itself {metadata['Name']}")
    if "[console_scripts]" in entry_points:
        faults.append(f"{wheel.name} installs a console script; another package owns the name docket")
    return faults


def missing(names: list[str]) -> list[str]:
    """Name the package's source files that *names* does not list."""
    root = Path(__file__).resolve().parent.parent
    kept = {".py", ".pyi", ".proto", ".typed", ".sql"}
    source = (path for path in (root / PACKAGE).rglob("*") if path.suffix in kept or path.name == "py.typed")
    wanted = {path.relative_to(root).as_posix() for path in source} | {f"{PACKAGE}/py.typed"}
    return sorted(wanted - set(names))


def sdist_faults(sdist: Path) -> list[str]:
    """Say which files of *sdist* are not part of the distribution."""
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    return [f"{sdist.name} holds {name}" for name in sorted(tops - SDIST_TOP)]


def import_faults(wheel: Path) -> list[str]:
    """Install *wheel* over its locked dependencies in a new environment; import it from elsewhere."""
    with tempfile.TemporaryDirectory(prefix="docket-wheel-") as folder:
        python = Path(folder, "venv", "bin", "python")
        commands: list[list[str | Path]] = [
            [UV, "venv", "--quiet", "--python", sys.executable, python.parent.parent],
            [UV, "pip", "install", "--quiet", "--python", python, "--require-hashes", "-r", LOCK],
            [UV, "pip", "install", "--quiet", "--python", python, "--no-deps", wheel.resolve()],
            [UV, "pip", "check", "--quiet", "--python", python],
            [python, "-c", f"import {PACKAGE}; assert 'site-packages' in {PACKAGE}.__file__"],
            [python, "-m", "celery", "docket", "--help"],
        ]
        for command in commands:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                words = " ".join(str(word) for word in command)
                return [f"{words} ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"]
    return []


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
