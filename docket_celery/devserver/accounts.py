"""Who the servers run as, and what that account can reach.

Postgres refuses to run as root, and a Redis server without a password has no business there. So root hands
both to an unprivileged account; an ordinary user runs them as itself.
"""

from __future__ import annotations

import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from docket_celery.errors import ServersUnavailable

# In order: Debian's and most images' server account, then the one that every Unix has.
_ACCOUNT_NAMES = ("postgres", "nobody")


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """An unprivileged account that root hands the servers to."""

    name: str
    uid: int
    gid: int


def server_account(directory: Path) -> Account | None:
    """Return the account to run a server in *directory* as, or None to run it as the current user.

    Root runs servers as the owner of the nearest folder that exists, so that data in a user's checkout stays
    the user's; where that is root itself, as ``postgres`` or ``nobody``.

    Raises:
        ServersUnavailable: Root found no unprivileged account.
    """
    if os.geteuid() != 0:
        return None
    nearest = next(step for step in (directory.absolute(), *directory.absolute().parents) if step.exists())
    if (owner := nearest.stat().st_uid) != 0:
        return _account_of(owner)
    for name in _ACCOUNT_NAMES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name=name, uid=entry.pw_uid, gid=entry.pw_gid)
    raise ServersUnavailable(
        "servers started by root",
        f"none of the accounts {', '.join(_ACCOUNT_NAMES)} exists, and Postgres refuses to run as root; "
        "add an account 'postgres' or start as an ordinary user",
    )


def _account_of(uid: int) -> Account:
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        # Files of a user that only the host of this container knows: ids are all that is needed.
        return Account(name=str(uid), uid=uid, gid=uid)
    return Account(name=entry.pw_name, uid=uid, gid=entry.pw_gid)


def can_enter(account: Account | None, directory: Path) -> bool:
    """Tell whether *account* may walk to *directory* and into it, by the permission bits."""
    if account is None:
        return os.access(directory, os.X_OK)
    resolved = directory.resolve()
    return all(_allows(account, step, stat.S_IXOTH) for step in (resolved, *resolved.parents))


def can_read(account: Account | None, file: Path) -> bool:
    """Tell whether *account* may walk to *file* and read it, by the permission bits."""
    if account is None:
        return os.access(file, os.R_OK)
    resolved = file.resolve()
    return _allows(account, resolved, stat.S_IROTH) and can_enter(account, resolved.parent)


def _allows(account: Account, path: Path, bit: int) -> bool:
    """Check one ``S_I?OTH`` *bit* in the class (owner, group, others) that *account* falls into."""
    status = path.stat()
    if status.st_uid == account.uid:
        return bool(status.st_mode & (bit << 6))
    if status.st_gid == account.gid:
        return bool(status.st_mode & (bit << 3))
    return bool(status.st_mode & bit)


def make_private(directory: Path, account: Account | None) -> Path:
    """Create *directory* if needed, 0700 and owned by *account*, and return it.

    Raises:
        ServersUnavailable: It exists and belongs to someone else.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if account is not None:
        os.chown(directory, account.uid, account.gid, follow_symlinks=False)
    owner = os.geteuid() if account is None else account.uid
    status = directory.lstat()
    if status.st_uid != owner or not stat.S_ISDIR(status.st_mode):
        raise ServersUnavailable(
            f"directory {directory}",
            f"it belongs to user id {status.st_uid}, but the servers run as {owner}; "
            "choose another data_dir or remove it",
        )
    directory.chmod(0o700)
    return directory
