"""A Docker client without Docker: containers are local processes.

pytest-celery reaches Docker through one fixture, ``docker_client``. This client implements the docker-py calls
that pytest-celery 1.3 and pytest-docker-tools 3.1 make, so that their stock node classes run unmodified.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import os
import shutil
import tarfile
import uuid
import warnings
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import DockerException, ImageNotFound

from tests.infra.containers import Creation, Postgres, ProcessContainer, Redis, Worker

VARIABLE = "DOCKET_TEST_INFRA"
_KINDS = (("redis", Redis), ("valkey", Redis), ("postgres", Postgres), ("worker", Worker))


def uses_docker() -> bool:
    """Tell whether nodes are Docker containers: as DOCKET_TEST_INFRA says, else if an engine answers.

    Raises:
        ValueError: The variable is none of ``auto``, ``docker``, ``process``.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in {"auto", "docker", "process"}:
        raise ValueError(f"{VARIABLE} is {wanted!r}; set it to auto, docker or process")
    if wanted != "auto":
        return wanted == "docker"
    return _engine_answers()


@functools.cache
def _engine_answers() -> bool:
    with warnings.catch_warnings():
        # docker-py leaves its socket to the garbage collector where no engine listens.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            with contextlib.closing(docker.from_env(timeout=5)) as client:
                return bool(client.ping())
        except DockerException:
            return False
        finally:
            gc.collect()


@contextlib.contextmanager
def process_client(directory: Path) -> Generator[ProcessDockerClient]:
    """Yield a client whose containers keep their logs and volumes in *directory*; end what is left of them."""
    with pytest.MonkeyPatch.context() as patch:
        # Tests may themselves run in a container; the nodes' ports are on this side all the same.
        patch.setattr("pytest_docker_tools.wrappers.container.tests_inside_container", lambda: False)
        client = ProcessDockerClient(directory)
        try:
            yield client
        finally:
            client.close()


class ProcessDockerClient:
    """See the module.

    Attributes:
        containers, images, networks, volumes: As of `docker.DockerClient`.
    """

    def __init__(self, directory: Path) -> None:
        self.volumes = _Volumes(directory)
        self.containers = _Containers(directory, self.volumes)
        self.images = _Images()
        self.networks = _Networks()

    def close(self) -> None:
        """End the containers that nobody removed."""
        for container in self.containers.started:
            container.remove(force=True)


class _Named:
    """A network, or an image: nothing but a name here."""

    def __init__(self, name: str) -> None:
        self.name = self.id = name

    def remove(self, *, force: bool = False) -> None:
        """Nothing to remove."""


class _Networks:
    def create(self, name: str, **_: Any) -> _Named:
        return _Named(name)


class _Images:
    def build(self, *, tag: str | None = None, **_: Any) -> tuple[_Named, list[str]]:
        """Return the image without building it: its program is in this environment."""
        return _Named(tag or f"untagged:{uuid.uuid4().hex}"), []

    def pull(self, repository: str, tag: str | None = None, **_: Any) -> _Named:
        return _Named(repository if tag is None else f"{repository}:{tag}")

    def get(self, name: str) -> _Named:
        return _Named(name)


class _Volume:
    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory

    def remove(self, force: bool = False) -> None:
        shutil.rmtree(self.directory, ignore_errors=force)


class _Volumes:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.made: dict[str, _Volume] = {}

    def create(self, name: str, **_: Any) -> _Volume:
        volume = self.made[name] = _Volume(name, self._directory / f"volume-{uuid.uuid4().hex}")
        volume.directory.mkdir()
        return volume


class _Loader:
    """A container that is created but never run: files are put into its volumes."""

    def __init__(self, volumes: Mapping[Path, str]) -> None:
        self._directories = {bound: host for host, bound in volumes.items()}

    def put_archive(self, path: str, data: io.BytesIO) -> None:
        data.seek(0)
        with tarfile.open(fileobj=data) as archive:
            # The filter came with 3.11.4; the archive is pytest-celery's own.
            if hasattr(tarfile, "data_filter"):
                archive.extraction_filter = tarfile.data_filter
            archive.extractall(self._directories[path])  # noqa: S202 -- filtered above

    def remove(self, *, force: bool = False) -> None:
        """Nothing runs."""


class _Containers:
    def __init__(self, directory: Path, volumes: _Volumes) -> None:
        self._directory, self._volumes = directory, volumes
        self.started: list[ProcessContainer] = []

    def create(self, *, volumes: Mapping[str, Mapping[str, str]], **_: Any) -> _Loader:
        return _Loader(self._directories(volumes))

    def run(
        self,
        *,
        image: str,
        network: str,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        volumes: Mapping[str, Mapping[str, str]] | None = None,
        labels: Mapping[str, str] | None = None,
        **_: Any,
    ) -> ProcessContainer:
        """Start what *image* names and return it when it is up."""
        kind = next((kind for part, kind in _KINDS if part in image), None)
        if kind is None:
            raise ImageNotFound(f"no local program for image {image!r}; known are redis, postgres and worker")
        creation = Creation(
            image=image,
            command=list(command or ()),
            environment=dict(environment or {}),
            network=network,
            volumes=self._directories(volumes or {}),
            labels=dict(labels or {}),
        )
        container = kind(creation, self._directory)
        self.started.append(container)
        return container

    def _directories(self, volumes: Mapping[str, Mapping[str, str]]) -> dict[Path, str]:
        found: dict[Path, str] = {}
        for name, binding in volumes.items():
            volume = self._volumes.made.get(name)
            found[Path(name) if volume is None else volume.directory] = binding["bind"]
        return found
