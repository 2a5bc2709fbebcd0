from __future__ import annotations

from pathlib import Path

import pytest

from tools import proto

ORDER = 'syntax = "proto3";\npackage sample;\nmessage Order { string order_id = 1; }\n'


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with one .proto and the code that it gives."""
    root = tmp_path / "tree"
    (root / "examples" / "order").mkdir(parents=True)
    (root / "examples" / "order" / "order.proto").write_text(ORDER, encoding="utf-8")
    proto.generate(root, proto.find_sources(root), root)
    return root


def changes(root: Path, scratch: Path) -> dict[str, str]:
    """Say what a new generation would change in the tree at *root*."""
    scratch.mkdir()
    proto.generate(root, proto.find_sources(root), scratch)
    return {path.as_posix(): fault for path, fault in proto.compare(root, scratch).items()}


def test_the_committed_code_is_what_the_definitions_give(tmp_path: Path) -> None:
    """Nobody edited generated code, or a .proto without generating again."""
    assert changes(proto.ROOT, tmp_path / "scratch") == {}


def test_code_lies_beside_its_definition(tree: Path, tmp_path: Path) -> None:
    """Python and stub have the definition's name, and generating again changes nothing."""
    assert sorted(path.name for path in (tree / "examples" / "order").iterdir()) == [
        "order.proto",
        "order_pb2.py",
        "order_pb2.pyi",
    ]
    assert changes(tree, tmp_path / "scratch") == {}


def test_stale_missing_and_edited_code_are_found(tree: Path, tmp_path: Path) -> None:
    """The check of the real tree can fail, in each way."""
    folder = tree / "examples" / "order"
    (folder / "gone_pb2.py").write_text("", encoding="utf-8")
    (folder / "order_pb2.pyi").unlink()
    with (folder / "order_pb2.py").open("a", encoding="utf-8") as edited:
        edited.write("# by hand\n")
    assert changes(tree, tmp_path / "scratch") == {
        "examples/order/gone_pb2.py": "has no .proto any more",
        "examples/order/order_pb2.py": "is out of date",
        "examples/order/order_pb2.pyi": "is missing",
    }


def test_a_message_that_two_files_define_is_refused(tree: Path, tmp_path: Path) -> None:
    """One process could not import both."""
    (tree / "examples" / "again.proto").write_text(ORDER, encoding="utf-8")
    with pytest.raises(SystemExit, match=r'"sample\.Order" is already defined'):
        proto.generate(tree, proto.find_sources(tree), tmp_path)
