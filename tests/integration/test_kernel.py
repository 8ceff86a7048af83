"""The Linux kernel's own client: nbd-client, ext4, TRIM, and a rollback between two attachments.

A machine takes long to boot, so one attaches both ways: with TLS, for which nbd-client relays
between the kernel and the server (slowly, in an emulated machine: the files are small), and
without.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from .parts import GIB, MIB, Daemon, KernelMachine, serve_options

# Scripts begin with it: `attach TRANSPORT DEVICE VOLUME CONNECTIONS`, `detach DEVICE`, and
# `say_and_wait LINE` until it has been answered.
TOOLS = """
set -e
cat >/tmp/ca.pem <<'END'
{authority}END
attach() {{
    test $1 = plain || set -- "$@" -cacertfile /tmp/ca.pem -tlshostname localhost
    local device=$2 volume=$3 connections=$4
    shift 4
    nbd-client 10.0.2.2 {port} $device -name $volume -connections $connections "$@"
}}
detach() {{
    nbd-client -d $1
    echo 3 >/proc/sys/vm/drop_caches
}}
say_and_wait() {{
    echo $1
    read line
}}
"""

CHANGE_FILES_AND_FIND_OLD_ONES = """
attach $first /dev/nbd0 disk $connections
blockdev --getsize64 /dev/nbd0
mkfs.ext4 -q -J size=8 /dev/nbd0
mount /dev/nbd0 /mnt
mkdir /mnt/old
for number in 1 2 3 4 5 6 7 8; do
    dd if=/dev/urandom of=/mnt/old/$number bs=64k count=16 2>/dev/null
done
dd if=/dev/urandom of=/mnt/gone bs=1M count=16 2>/dev/null
(cd /mnt && sha256sum old/*) >/tmp/sums
cp /tmp/sums /mnt/sums
sync
rm /mnt/gone
# Blocks of a deleted file are free, and can be trimmed, once the journal has committed that.
sync
fstrim -v /mnt
(cd /mnt && sha256sum -c -s sums)
umount /mnt
detach /dev/nbd0

attach $second /dev/nbd0 disk $connections
e2fsck -f -n /dev/nbd0
mount /dev/nbd0 /mnt
(cd /mnt && sha256sum -c -s sums)
cmp /tmp/sums /mnt/sums
umount /mnt
detach /dev/nbd0
say_and_wait made

attach $second /dev/nbd0 disk $connections
mount /dev/nbd0 /mnt
(cd /mnt && sha256sum -c -s sums)
dd if=/dev/urandom of=/mnt/old/1 bs=64k count=16 conv=notrunc 2>/dev/null
rm /mnt/old/2 /mnt/old/3
dd if=/dev/urandom of=/mnt/new bs=1M count=4 2>/dev/null
sync
fstrim /mnt
if (cd /mnt && sha256sum -c -s sums 2>/dev/null); then echo nothing changed; exit 1; fi
umount /mnt
detach /dev/nbd0
say_and_wait changed

attach $first /dev/nbd0 disk $connections
e2fsck -f -n /dev/nbd0
mount /dev/nbd0 /mnt
(cd /mnt && sha256sum -c -s sums)
test ! -e /mnt/new
dd if=/dev/urandom of=/mnt/after bs=1M count=2 2>/dev/null
umount /mnt
detach /dev/nbd0
echo old files are there
"""

WRITE_AND_FIND_WHAT_WAS_SYNCED = """
attach plain /dev/nbd0 plain 2
attach tls /dev/nbd1 tls 2
for number in 0 1; do
    mkdir /mnt/$number
    mkfs.ext4 -q /dev/nbd$number
    mount /dev/nbd$number /mnt/$number
    dd if=/dev/urandom of=/mnt/$number/synced bs=1M count=4 2>/dev/null
    (cd /mnt/$number && sha256sum synced >sums)
done
sync
write() { while true; do dd if=/dev/urandom of=$1 bs=64k count=64 2>/dev/null; sync; done; }
write /mnt/0/busy &
writers=$!
write /mnt/1/busy &
writers="$writers $!"
say_and_wait writing
kill $writers
wait $writers || true
for number in 0 1; do
    dd if=/dev/urandom of=/mnt/$number/synced bs=1M count=4 2>/dev/null
    umount /mnt/$number
    detach /dev/nbd$number
done
say_and_wait detached

for transport in plain tls; do
    attach $transport /dev/nbd0 $transport 2
    mount /dev/nbd0 /mnt
    (cd /mnt && sha256sum -c -s sums)
    umount /mnt
    e2fsck -f -n /dev/nbd0
    detach /dev/nbd0
done
"""


@pytest.fixture
def daemon(start_daemon: Callable[..., Daemon], data_directory: Path, certificates: Path) -> Daemon:
    """Return a daemon with which clients may use TLS or not."""
    return start_daemon(data_directory, *serve_options(certificates), "--tls", "optional")


@pytest.fixture
def tools(daemon: Daemon, certificates: Path) -> str:
    """Return what scripts begin with."""
    authority = (certificates / "ca-cert.pem").read_text()
    return TOOLS.format(port=daemon.port, authority=authority)


@pytest.mark.parametrize(
    ("first", "second", "connections"), [("plain", "tls", 1), ("tls", "plain", 2)]
)
def test_file_system_and_rollback(
    daemon: Daemon,
    kernel_machine: KernelMachine,
    tools: str,
    first: str,
    second: str,
    connections: int,
) -> None:
    daemon.create("disk", GIB)

    def made() -> None:
        # The files, the file system's journal and little else: fstrim gave back the deleted file,
        # which is as large as what stays.
        mapped = daemon.json("volume", "show", "disk")["mapped"]
        assert 16 * MIB < mapped < 16 * MIB + 12 * MIB
        daemon.command("snapshot", "create", "disk@made")

    def changed() -> None:
        daemon.command("snapshot", "rollback", "disk@made")

    output = kernel_machine.run(
        f"first={first} second={second} connections={connections}\n"
        + tools
        + CHANGE_FILES_AND_FIND_OLD_ONES,
        {"made": made, "changed": changed},
    )
    assert f"\n{GIB}\n" in output, output
    assert output.endswith("old files are there\n"), output


def test_snapshot_of_mounted_file_systems(
    daemon: Daemon, kernel_machine: KernelMachine, tools: str
) -> None:
    """A snapshot under a mounted file system is what a power cut would leave: fsck-able, synced."""
    snapshots = ["plain@live", "tls@live"]
    for volume in ("plain", "tls"):
        daemon.create(volume, 512 * MIB)

    def take_snapshot() -> None:
        daemon.command("snapshot", "create", *snapshots)
        for snapshot in snapshots:
            refused = daemon.command("snapshot", "rollback", snapshot, check=False)
            assert refused.returncode == 1, "a rollback under a client is refused"

    def roll_back() -> None:
        for snapshot in snapshots:
            daemon.command("snapshot", "rollback", snapshot)

    output = kernel_machine.run(
        tools + WRITE_AND_FIND_WHAT_WAS_SYNCED,
        {"writing": take_snapshot, "detached": roll_back},
    )
    assert "detached" in output
