"""The control socket: HTTP and JSON over ``DATA/control.sock``.

Whoever holds the lock of a data directory serves this application there: the daemon for as long
as it runs, or, with no daemon, a command for its own lifetime (``offline``). Every command is a
client of it, so there is one way in which volumes and snapshots are changed.

* A request has a small JSON body (``bodies``) and a JSON answer (``documents``).
* An error is ``{"error": one line, "kind": class}`` with the status of its class (``errors``).
* Work that takes long, and claims that must end with the process that made them, are streams of
  JSON lines (``streams``): closing the connection gives up the claim, so a killed command leaves
  nothing behind.
"""
