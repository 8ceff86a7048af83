"""Tests that drive real clients and servers: qemu, libnbd, fio, a Linux kernel, radosgw.

Each needs programs that scripts/install-test-dependencies installs. Where one is missing its tests
are skipped with the reason, except in continuous integration (CI=true), where that is a failure.
"""
