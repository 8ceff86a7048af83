"""Power cuts that are real for the daemon: its machine is killed, its disk forgets.

A virtual machine runs ``nbdserve serve`` on a file system of its own. Three parts outside of it
make that honest:

* **The disk** (disk.py) is served to qemu over NBD by a small server of this package's own. It has
  a volatile cache: a write is in the cache until the next FLUSH, and a cut keeps any of what the
  cache holds, by sectors of 512 bytes, and drops the rest. Killing qemu alone would lose only the
  guest's memory: what the guest had written would be safe in the host's page cache.
* **The client** (client.py) writes numbered, checksummed sectors to several volumes, with FLUSH
  and FUA, while it has snapshots taken, deleted, rolled back and cloned, and keeps a model
  (model.py) of what was acknowledged and what was made durable. After the next boot it reads
  everything back.
* **The machine** (machine.py, and guest.py for what it boots into) is killed at random moments:
  under load, in the middle of a snapshot or a merge, while it recovers from the cut before.

rounds.py puts them together; the same disk lives through all of its rounds. By hand:

    python -m tests.integration.power --rounds 3 --file-system xfs

What is compared shares no code with nbdserve. The disk and the client know NBD from libnbd and from
the specification.
"""
