"""What the machine boots into: busybox, this Python, and nbdserve as it is here."""

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
MODULES = ("virtio_pci", "virtio_net", "virtio_blk", "xfs")

INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs devtmpfs /dev
exec </dev/console >/dev/console 2>&1
/bin/busybox --install -s 2>/dev/null
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /tmp
for module in {modules}; do insmod "$module"; done
ip link set lo up
ip link set eth0 up
ip address add 10.0.2.15/24 dev eth0
stty -F /dev/ttyS1 raw -echo
stty -F /dev/ttyS2 raw -echo
for word in $(cat /proc/cmdline); do
    case $word in power.*) eval "${{word#power.}}" ;; esac
done
# Eager to write back, the kernel fills the disk's cache, of which a cut keeps any part; otherwise a
# cut finds in the guest's memory what nobody has synced.
if [ $eager = 1 ]; then
    echo 5 >/proc/sys/vm/dirty_writeback_centisecs
    echo 5 >/proc/sys/vm/dirty_expire_centisecs
fi
export BROKEN=$broken PYTHONPATH=${{broken:+/broken:}}{top} HOME=/tmp NBDSERVE_DATA=/mnt/data
exec </dev/ttyS1 >/dev/ttyS1 2>&1
echo booted
mount -t $file_system /dev/vda /mnt || exit
echo mounted
mkdir -p $NBDSERVE_DATA
nbdserve() {{ {python} -m nbdserve "$@"; }}
{python} -I -S {top}/bridge.py &
(
    {python} -m nbdserve serve --listen 0.0.0.0:10809 --workers $workers 2>/dev/ttyS2 &
    echo $! >/tmp/pid
    wait $!
    echo $? >/tmp/ended
) &
while read -r line; do
    eval "$line"
    echo "status $?"
done
"""

# The control socket, for those outside: with little to import, for emulated machines are slow.
BRIDGE = """\
import socket, threading

def pump(reader, writer):
    try:
        while data := reader.recv(1 << 16):
            writer.sendall(data)
        writer.shutdown(socket.SHUT_WR)
    except OSError:
        pass

def serve(outer):
    inner = socket.socket(socket.AF_UNIX)
    with outer, inner:
        try:
            inner.connect("/mnt/data/control.sock")
        except OSError:
            return
        back = threading.Thread(target=pump, args=(inner, outer))
        back.start()
        pump(outer, inner)
        back.join()

with socket.create_server(("0.0.0.0", 10810)) as listener:
    print("bridged", flush=True)
    while True:
        threading.Thread(target=serve, args=listener.accept()[:1]).start()
"""

# For the test of the test: a daemon for which one of the system's calls does nothing.
BROKEN = """\
import os
setattr(os, os.environ["BROKEN"], lambda descriptor: None)
"""


def load_kernel_vm():
    """The script scripts/kernel-vm as a module."""
    loader = SourceFileLoader("kernel_vm", str(PROJECT / "scripts" / "kernel-vm"))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


kernel_vm = load_kernel_vm()


def build_initramfs(version):
    """The archive that the kernel boots into."""
    archive = kernel_vm.Archive()
    for directory in ("dev", "proc", "sys", "tmp", "mnt", "etc", "sbin", "usr/bin", "usr/sbin"):
        archive.add_directory(Path("/") / directory)
    busybox = kernel_vm.find_tool("busybox")
    archive.add_file(Path("/bin/busybox"), busybox.read_bytes(), 0o755)
    modules = []
    for module in kernel_vm.list_modules(version, MODULES):
        modules.append(f"/modules/{module.name}")
        archive.add_file(Path(modules[-1]), module.read_bytes(), 0o644)
    kernel_vm.add_nbdserve(archive)
    archive.add_file(kernel_vm.PYTHON_PATH / "bridge.py", BRIDGE.encode(), 0o644)
    archive.add_file(Path("/broken/sitecustomize.py"), BROKEN.encode(), 0o644)
    init = INIT.format(
        modules=" ".join(modules), python=kernel_vm.PYTHON, top=kernel_vm.PYTHON_PATH
    )
    archive.add_file(Path("/init"), init.encode(), 0o755)
    return archive.finish()
