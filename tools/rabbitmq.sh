#!/bin/sh
# Install RabbitMQ for `make test-rabbitmq`, unless it is there: no wheel holds one, so the system's packages must.
# Usage: rabbitmq.sh [check]; "check" installs nothing. Needs Debian or Ubuntu, and root.
# Exit status: 0 it is there; 77 it is not, and cannot be installed here; 1 installing failed.
# The tests run the programs themselves, in folders of their own: no service of the system is started.
set -u

PACKAGE=rabbitmq-server
POLICY=/usr/sbin/policy-rc.d
CANNOT=77

is_there() {
    PATH=/usr/lib/rabbitmq/bin:$PATH:/usr/sbin command -v rabbitmq-server >/dev/null 2>&1 &&
        PATH=$PATH:/usr/sbin command -v epmd >/dev/null 2>&1
}

give_up() {
    echo "RabbitMQ is not installed: $1." >&2
    echo "On Debian and Ubuntu, as root: apt-get install -y --no-install-recommends $PACKAGE;" >&2
    echo "elsewhere install RabbitMQ >= 3.10 so that rabbitmq-server and epmd are on PATH." >&2
    exit $CANNOT
}

apt() {
    DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq -o DPkg::Lock::Timeout=60 -o Acquire::Retries=2 "$@" </dev/null
}

three_times() {
    for try in 1 2 3; do
        if "$@"; then
            return 0
        fi
        echo "try $try of 3 failed: $*" >&2
        if [ "$try" != 3 ]; then
            sleep $((try * 5))
        fi
    done
    return 1
}

if is_there; then
    echo "-- RabbitMQ is installed"
    exit 0
fi
if [ "${1:-}" = check ]; then
    give_up "make rabbitmq installs it where it can"
fi
if ! command -v apt-get >/dev/null 2>&1; then
    give_up "this system has no apt-get"
fi
if [ "$(id -u)" != 0 ]; then
    give_up "only root may install packages"
fi

echo "-- installing $PACKAGE from the system's packages"
# With yesterday's lists a package may be found all the same.
three_times apt update || echo "the lists of packages may be old" >&2
if ! LC_ALL=C apt-cache policy $PACKAGE | grep -q 'Candidate: [^(]'; then
    give_up "the system's sources of packages do not have it"
fi
# The packages' scripts ask this file whether they may start a service.
if [ ! -e $POLICY ]; then
    trap 'rm -f $POLICY' EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' >$POLICY && chmod 755 $POLICY || exit 1
fi
if ! three_times apt install -y --no-install-recommends $PACKAGE || ! is_there; then
    echo "installing $PACKAGE failed" >&2
    exit 1
fi
# Nor at the next boot: nobody has asked for a broker of the system.
if [ -d /run/systemd/system ]; then
    systemctl disable --quiet $PACKAGE || true
fi
echo "-- RabbitMQ is installed"
