"""``python -m docket_celery protoc``: code and stubs beside a .proto, without an activated environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ORDER = 'syntax = "proto3";\npackage sample;\nmessage Order { string order_id = 1; }\n'


def protoc(folder: Path, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in *folder* with an empty PATH, after the code *before*."""
    program = f"import runpy, sys; {before or 'pass'}; sys.argv[:1] = ['docket_celery', 'protoc']; "
    program += "runpy.run_module('docket_celery', run_name='__main__')"
    argv = [sys.executable, "-c", program, *arguments]
    return subprocess.run(argv, cwd=folder, env={"PATH": ""}, capture_output=True, text=True, check=False)


def test_code_and_stub_are_written_beside_the_file(tmp_path: Path) -> None:
    """In a folder below the root of the imports too."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "order.proto").write_text(ORDER)
    done = protoc(tmp_path, "shop/order.proto")
    assert (done.returncode, done.stderr) == (0, "")
    written = sorted(path.name for path in (tmp_path / "shop").iterdir())
    assert written == ["order.proto", "order_pb2.py", "order_pb2.pyi"]
    assert "class Order" in (tmp_path / "shop" / "order_pb2.pyi").read_text()


def test_a_fault_in_the_file_is_told_with_its_line(tmp_path: Path) -> None:
    """The compiler's own message and its exit status."""
    (tmp_path / "order.proto").write_text(ORDER.replace("string", "strung"))
    done = protoc(tmp_path, "order.proto")
    assert done.returncode == 1
    assert 'order.proto:3:17: "strung" is not defined' in done.stderr


def test_a_file_that_cannot_be_compiled_here_is_refused(tmp_path: Path) -> None:
    """A missing file, and one that is not below the root."""
    assert protoc(tmp_path, "no.proto").stderr.endswith("protoc: no.proto: there is no such file\n")
    (tmp_path / "order.proto").write_text(ORDER)
    (tmp_path / "shop").mkdir()
    assert "name the root of its imports with --root" in protoc(tmp_path / "shop", "../order.proto").stderr


def test_without_the_extra_the_error_names_it(tmp_path: Path) -> None:
    """What to install, in which environment; nothing is written."""
    (tmp_path / "order.proto").write_text(ORDER)
    done = protoc(tmp_path, "order.proto", before="sys.modules['grpc_tools'] = None")
    assert done.returncode == 1
    assert "pip install 'docket-celery[protoc]'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["order.proto"]
