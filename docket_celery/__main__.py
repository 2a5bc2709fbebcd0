"""``python -m docket_celery protoc FILE.proto ...``: the commands that need no Celery app.

It imports nothing of the package: the code that it generates may be what an import is waiting for.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

_EXTRA = "pip install 'docket-celery[protoc]'"
_PLUGIN = "protoc-gen-mypy"
_DESCRIPTION = """\
Generate FILE_pb2.py and its type stub FILE_pb2.pyi beside each FILE.proto.

Imports between .proto files, and the module names in the generated code, are relative to --root."""


def main(argv: Sequence[str]) -> int:
    """Run the command line *argv*, which generates the code of files; return the exit status."""
    options = _parser().parse_args(argv)
    files: list[Path] = options.files
    root: Path = options.root.resolve()
    if importlib.util.find_spec("grpc_tools") is None:
        return _refuse(f"grpcio-tools is not installed in {sys.prefix}; {_EXTRA}")
    plugin = _find_plugin()
    if plugin is None:
        return _refuse(f"mypy-protobuf is not installed in {sys.prefix}; {_EXTRA}")
    for file in files:
        if not file.is_file():
            return _refuse(f"{file}: there is no such file")
        if not file.resolve().is_relative_to(root):
            return _refuse(f"{file} is not below {root}; name the root of its imports with --root")
    names = [file.resolve().relative_to(root).as_posix() for file in files]
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc", "-I", "."),
        *(f"--plugin={_PLUGIN}={plugin}", "--python_out=.", "--mypy_out=quiet:."),
        *names,
    ]
    return subprocess.run(command, cwd=root, check=False).returncode  # noqa: S603 -- this interpreter's own protoc


def _find_plugin() -> str | None:
    """Return the path of mypy-protobuf's program: this environment's, activated or not, else one in PATH."""
    folders = (Path(sys.executable).parent, Path(sysconfig.get_path("scripts")))
    found = [folder / _PLUGIN for folder in folders if (folder / _PLUGIN).is_file()]
    return str(found[0]) if found else shutil.which(_PLUGIN)


def _refuse(problem: str) -> int:
    sys.stderr.write(f"python -m docket_celery protoc: {problem}\n")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m docket_celery", description="Commands of docket_celery.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    protoc = commands.add_parser(
        "protoc",
        help="generate Python and type stubs from .proto files",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    protoc.add_argument("files", nargs="+", type=Path, metavar="FILE.proto")
    protoc.add_argument(
        "--root", type=Path, default=Path(), metavar="DIR", help="default: the current directory"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
