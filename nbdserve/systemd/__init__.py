"""What passes between a service manager and the daemon: sockets, notifications, the watchdog.

The protocols are systemd's (sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3)); others speak
them, too. All of it is in the environment, and nothing happens where that says nothing.
"""
