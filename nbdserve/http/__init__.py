"""The read-only HTTP listener: metrics and health, for machines that watch the daemon, and a page.

It is off unless the configuration names an address, and apart from the control socket: nothing that
can be reached here changes anything.
"""
