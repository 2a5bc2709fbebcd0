from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "compose.yaml"
DOCKERFILE = ROOT / "Dockerfile"
#: A tag that names at least a minor version, or a digest.
PINNED = re.compile(r"(:v?\d+\.\d+[\w.-]*|@sha256:[0-9a-f]{64})$")

Compose = dict[str, Any]


def check_schema(path: Path) -> subprocess.CompletedProcess[str]:
    """Validate *path* against the compose specification's own schema, which ships with the checker."""
    checker = Path(sys.executable).with_name("check-jsonschema")
    command: list[str | Path] = [checker, "--builtin-schema", "vendor.compose-spec", path]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def dangling(compose: Compose) -> Iterator[str]:
    """Yield what a service refers to and the file does not define; the schema does not see these."""
    services = compose["services"]
    for name, service in services.items():
        for other in service.get("depends_on", []):
            if other not in services:
                yield f"{name} depends on the service {other}"
            elif waits_for_health(service, other) and "healthcheck" not in services[other]:
                yield f"{name} waits for the health of {other}, which has no healthcheck"
        for kind in ("volumes", "networks", "secrets", "configs"):
            for used in map(source, service.get(kind, [])):
                if (
                    used not in (compose.get(kind) or {})
                    and not is_path(used)
                    and (kind, used) != ("networks", "default")
                ):
                    yield f"{name} uses the {kind[:-1]} {used}"


def waits_for_health(service: Compose, other: str) -> bool:
    """Tell whether *service* starts only once *other* is healthy."""
    wanted = service["depends_on"]
    return isinstance(wanted, dict) and wanted[other].get("condition") == "service_healthy"


def source(entry: str | Compose) -> str:
    """Return what an entry in short or long form refers to."""
    return entry.split(":")[0] if isinstance(entry, str) else str(entry.get("source", ""))


def is_path(name: str) -> bool:
    """Tell a bind mount from a named volume."""
    return name.startswith((".", "/", "~", "$"))


def unused(compose: Compose) -> set[str]:
    """Return the named volumes that no service mounts."""
    used = {source(entry) for service in compose["services"].values() for entry in service.get("volumes", [])}
    return set(compose.get("volumes") or {}) - used


@pytest.fixture
def compose() -> Compose:
    """The file as YAML reads it, anchors resolved."""
    loaded: Compose = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return loaded


def test_compose_follows_the_specification() -> None:
    """Docker would accept every key and type."""
    checked = check_schema(COMPOSE)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_compose_refers_only_to_what_it_defines(compose: Compose) -> None:
    """No service waits for, or mounts, what is not there."""
    assert list(dangling(compose)) == []
    assert unused(compose) == set()


def test_the_four_parts_are_there_and_tell_their_health(compose: Compose) -> None:
    """Broker, database, worker and monitor each report whether they work."""
    services = compose["services"]
    assert {"redis", "postgres", "worker", "flower"} <= set(services)
    assert [name for name, service in services.items() if "healthcheck" not in service] == ["migrate"]


def test_images_are_pinned(compose: Compose) -> None:
    """The same file gives the same servers next year."""
    images = [service["image"] for service in compose["services"].values()]
    images += re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(images) > len(compose["services"])
    assert [image for image in images if PINNED.search(image) is None] == []


def test_ports_are_published_on_this_machine_alone(compose: Compose) -> None:
    """A development password is no protection on a network."""
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_the_password_can_be_replaced(compose: Compose) -> None:
    """Server and clients take the one password from the environment; what is written down is a default."""
    default = "${POSTGRES_PASSWORD:-docket-development}"
    assert compose["services"]["postgres"]["environment"]["POSTGRES_PASSWORD"] == default
    assert f":{default}@" in compose["services"]["worker"]["environment"]["DOCKET_CELERY_DATABASE_URL"]


def test_the_image_copies_what_exists_and_is_not_ignored() -> None:
    """Each source that the Dockerfile copies is in the tree and let through by .dockerignore."""
    copies = re.findall(r"^COPY (.+) \S+$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    sources = [name for copy in copies for name in copy.split()]
    let_through = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert len(sources) >= 5
    assert [name for name in sources if not (ROOT / name).exists()] == []
    assert [name for name in sources if f"!{name}" not in let_through] == []


def test_the_schema_check_can_fail(tmp_path: Path) -> None:
    """A key that compose does not know is refused."""
    wrong = tmp_path / "compose.yaml"
    wrong.write_text("services:\n  redis:\n    imagee: redis:8.2.1\n", encoding="utf-8")
    checked = check_schema(wrong)
    assert checked.returncode == 1
    assert "imagee" in checked.stdout


@pytest.mark.parametrize(
    ("service", "fault"),
    [
        ({"depends_on": ["cache"]}, "app depends on the service cache"),
        ({"depends_on": {"cache": {"condition": "service_started"}}}, "app depends on the service cache"),
        (
            {"depends_on": {"db": {"condition": "service_healthy"}}},
            "app waits for the health of db, which has no healthcheck",
        ),
        ({"volumes": ["data:/data"]}, "app uses the volume data"),
        ({"volumes": [{"type": "volume", "source": "data", "target": "/data"}]}, "app uses the volume data"),
        ({"networks": {"back": {}}}, "app uses the network back"),
    ],
)
def test_a_dangling_reference_is_found(service: Compose, fault: str) -> None:
    """Each kind of reference is followed, in both of its forms."""
    assert list(dangling({"services": {"app": service, "db": {}}})) == [fault]


def test_bind_mounts_and_the_default_network_need_no_definition() -> None:
    """Paths and the network that compose makes itself are not names of ours."""
    service = {"volumes": ["./data:/data", "/etc/ssl:/etc/ssl:ro"], "networks": ["default"]}
    assert list(dangling({"services": {"app": service}})) == []


@pytest.mark.parametrize("image", ["redis", "redis:latest", "redis:8", "redis:bookworm"])
def test_a_floating_tag_is_found(image: str) -> None:
    """A tag that moves is no pin."""
    assert PINNED.search(image) is None
