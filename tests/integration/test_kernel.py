"""The Linux kernel's own client: nbd-client, ext4, TRIM, and a rollback between two attachments."""

import pytest

from .parts import MIB, Daemon, KernelMachine

# Attach, and say what to do at the end; every script begins with it.
ATTACH = """
set -e
attach() {{ nbd-client 10.0.2.2 {port} /dev/nbd0 -name disk -connections {connections}; }}
detach() {{ nbd-client -d /dev/nbd0; }}
"""

MAKE_FILES = """
attach
blockdev --getsize64 /dev/nbd0
mkfs.ext4 -q /dev/nbd0
mount /dev/nbd0 /mnt
mkdir /mnt/old
for number in 1 2 3 4 5 6 7 8; do
    dd if=/dev/urandom of=/mnt/old/$number bs=64k count=64 2>/dev/null
done
dd if=/dev/urandom of=/mnt/gone bs=1M count=32 2>/dev/null
(cd /mnt && sha256sum old/*) >/tmp/sums
cp /tmp/sums /mnt/sums
sync
rm /mnt/gone
# Blocks of a deleted file are free, and can be trimmed, once the journal has committed that.
sync
fstrim -v /mnt
(cd /mnt && sha256sum -c -s sums)
umount /mnt
detach

# Attached again, nothing comes from a cache.
attach
e2fsck -f -n /dev/nbd0
mount /dev/nbd0 /mnt
(cd /mnt && sha256sum -c -s sums)
cmp /tmp/sums /mnt/sums
umount /mnt
detach
echo files are made
"""

CHANGE_FILES = """
attach
mount /dev/nbd0 /mnt
(cd /mnt && sha256sum -c -s sums)
dd if=/dev/urandom of=/mnt/old/1 bs=64k count=64 conv=notrunc 2>/dev/null
rm /mnt/old/2 /mnt/old/3
dd if=/dev/urandom of=/mnt/new bs=1M count=16 2>/dev/null
sync
fstrim /mnt
if (cd /mnt && sha256sum -c -s sums 2>/dev/null); then echo nothing changed; exit 1; fi
umount /mnt
detach
echo files are changed
"""

FIND_OLD_FILES = """
attach
e2fsck -f -n /dev/nbd0
mount /dev/nbd0 /mnt
(cd /mnt && sha256sum -c -s sums)
test ! -e /mnt/new
dd if=/dev/urandom of=/mnt/after bs=1M count=4 2>/dev/null
umount /mnt
detach
echo old files are there
"""


@pytest.mark.parametrize("connections", [1, 2])
def test_file_system_and_rollback(
    daemon: Daemon, kernel_machine: KernelMachine, connections: int
) -> None:
    daemon.command("volume", "create", "disk", "--size", "1G")
    attach = ATTACH.format(port=daemon.port, connections=connections)

    output = kernel_machine.run(attach + MAKE_FILES)
    assert f"\n{1 << 30}\n" in output, output
    assert output.endswith("files are made\n"), output
    # The files, the file system's journal of 32 MiB and little else: fstrim gave back the deleted
    # file, which is as large as what stays.
    mapped = daemon.json("volume", "show", "disk")["mapped"]
    assert 64 * MIB < mapped < 64 * MIB + 16 * MIB

    daemon.command("snapshot", "create", "disk@made")
    output = kernel_machine.run(attach + CHANGE_FILES)
    assert output.endswith("files are changed\n"), output
    daemon.command("snapshot", "rollback", "disk@made")
    output = kernel_machine.run(attach + FIND_OLD_FILES)
    assert output.endswith("old files are there\n"), output


def test_snapshot_of_a_mounted_file_system(daemon: Daemon, kernel_machine: KernelMachine) -> None:
    """A snapshot under a mounted file system is what a power cut would leave: fsck-able, synced."""
    daemon.command("volume", "create", "disk", "--size", "512M")

    def take_snapshot() -> None:
        daemon.command("snapshot", "create", "disk@live")
        refused = daemon.command("snapshot", "rollback", "disk@live", check=False)
        assert refused.returncode == 1, "a rollback under a client is refused"

    attach = ATTACH.format(port=daemon.port, connections=2)
    kernel_machine.run(
        attach
        + """
        attach
        mkfs.ext4 -q /dev/nbd0
        mount /dev/nbd0 /mnt
        dd if=/dev/urandom of=/mnt/synced bs=1M count=8 2>/dev/null
        sha256sum /mnt/synced >/mnt/sums
        sync
        (while true; do dd if=/dev/urandom of=/mnt/busy bs=64k count=64 2>/dev/null; sync; done) &
        writer=$!
        echo ready for a snapshot
        read line
        kill $writer
        wait $writer || true
        dd if=/dev/urandom of=/mnt/synced bs=1M count=8 2>/dev/null
        umount /mnt
        detach
        """,
        {"ready for a snapshot": take_snapshot},
    )
    daemon.command("snapshot", "rollback", "disk@live")
    kernel_machine.run(
        attach
        + """
        attach
        mount /dev/nbd0 /mnt
        sha256sum -c -s /mnt/sums
        umount /mnt
        e2fsck -f -n /dev/nbd0
        detach
        """
    )
