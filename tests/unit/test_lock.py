from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ["dev.txt", "image.txt", "bench.txt"]
PIN = re.compile(r"^(?P<name>[a-z0-9-]+)==(?P<version>\S+)(?: ; (?P<marker>[^\\]+))?(?: \\)?$")
HASH = re.compile(r"^ {4}--hash=sha256:[0-9a-f]{64}(?: \\)?$")

Project = dict[str, Any]


def parse(text: str) -> tuple[dict[str, tuple[str, int]], list[str]]:
    """Return each pinned package's version and number of hashes, and the lines that are none of a lock's."""
    pins: dict[str, tuple[str, int]] = {}
    strange: list[str] = []
    name = ""
    for line in text.splitlines():
        if (pin := PIN.match(line)) is not None:
            name = pin["name"]
            pins[name] = (pin["version"], 0)
        elif HASH.match(line) is not None and name:
            version, hashes = pins[name]
            pins[name] = (version, hashes + 1)
        elif not line.startswith("#"):
            strange.append(line)
    return pins, strange


def unmet(requirements: Iterator[Requirement], pins: dict[str, tuple[str, int]]) -> list[str]:
    """Say which requirements have no pin that satisfies them."""
    faults = []
    for requirement in requirements:
        version, _ = pins.get(canonicalize_name(requirement.name), ("", 0))
        if not version:
            faults.append(f"{requirement} is not in the lock")
        elif Version(version) not in requirement.specifier:
            faults.append(f"{requirement} is locked at {version}")
    return faults


def group(project: Project, name: str) -> Iterator[Requirement]:
    """Yield the requirements of a dependency group, those of the groups that it includes too."""
    for entry in project["dependency-groups"][name]:
        if isinstance(entry, str):
            yield Requirement(entry)
        else:
            yield from group(project, entry["include-group"])


def everything(project: Project) -> Iterator[Requirement]:
    """Yield what development needs: the build backend, the dependencies, all extras and groups."""
    yield from map(Requirement, project["build-system"]["requires"])
    yield from beside_the_project(project, "image")
    for extra in project["project"]["optional-dependencies"].values():
        yield from map(Requirement, extra)
    yield from group(project, "dev")


def beside_the_project(project: Project, name: str) -> Iterator[Requirement]:
    """Yield the project's dependencies, and those of a group that has a lock of its own."""
    yield from map(Requirement, project["project"]["dependencies"])
    yield from group(project, name)


@pytest.fixture(scope="module")
def project() -> Project:
    """The project file of this checkout."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(lock: str) -> dict[str, tuple[str, int]]:
    """Return the pins of one committed lock."""
    return parse((ROOT / "requirements" / lock).read_text(encoding="utf-8"))[0]


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_pins_and_hashes_alone(lock: str) -> None:
    """No option, address, path or range has a place in a lock, and no pin goes without a hash."""
    pins, strange = parse((ROOT / "requirements" / lock).read_text(encoding="utf-8"))
    assert strange == []
    assert [name for name, (_, hashes) in pins.items() if hashes == 0] == []


def test_the_lock_satisfies_every_requirement(project: Project) -> None:
    """What the project asks for is what `make setup` installs."""
    assert unmet(everything(project), read("dev.txt")) == []


@pytest.mark.parametrize("lock", ["image", "bench"])
def test_the_image_and_the_peers_are_locked_at_the_versions_that_were_tested(
    project: Project, lock: str
) -> None:
    """A package in two locks has one version."""
    pins = read(f"{lock}.txt")
    assert unmet(beside_the_project(project, lock), pins) == []
    tested = read("dev.txt")
    assert {name: pin for name, pin in pins.items() if tested.get(name, pin) != pin} == {}


def test_the_image_holds_nothing_that_was_not_tested() -> None:
    """Development's lock has every package of the image's."""
    assert read("image.txt").keys() - read("dev.txt").keys() == set()


@pytest.mark.parametrize(
    "line",
    [
        "--no-index",
        "-e .",
        "celery>=5",
        "celery @ file:///tmp/celery",
        "./celery.whl",
        "    --hash=md5:00",
    ],
)
def test_a_line_that_is_no_pin_is_found(line: str) -> None:
    """The first test can fail."""
    assert parse(f"# made by\namqp==5.4.2 \\\n    --hash=sha256:{'0' * 64}\n{line}\n") == (
        {"amqp": ("5.4.2", 1)},
        [line],
    )


def test_a_missing_and_an_unsatisfied_requirement_are_found() -> None:
    """The other tests can fail."""
    pins = {"celery": ("5.6.0", 1)}
    wanted = map(Requirement, ["celery>=5.7", "kombu>=5", "Celery<6"])
    assert unmet(wanted, pins) == ["celery>=5.7 is locked at 5.6.0", "kombu>=5 is not in the lock"]
