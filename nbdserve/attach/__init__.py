"""Volumes as disks of this machine: the kernel's nbd client, and the process that keeps it served.

``netlink`` speaks to the kernel, ``connecting`` to the server, ``device`` reads what sysfs and
procfs tell; ``keeper`` puts them together. docs/attach.md says why it is made as it is.
"""
