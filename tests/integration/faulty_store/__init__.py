"""A real object store that misbehaves as networks and object stores do.

* **The proxy** (proxy.py, and messages.py for what it knows of HTTP) stands in front of the S3
  server and does one of :class:`proxy.Fault` to some of the requests, and makes outages. It counts
  what it did to what.
* **The commands** (commands.py) are real processes of nbdserve; most are forked from one that has
  imported everything already, because a round must not cost a second of imports.
* **The rounds** (rounds.py) push, restore, delete and collect through the proxy, kill commands in
  the middle, and compare what is in the store, asked directly, with a model of what was
  acknowledged.
"""
