"""Power cuts, simulated: everything acknowledged as durable must be there afterwards.

The real code, from the catalogue down to backends/local_layers.py, runs on a simulated file system
(disk.py), which its system calls on files are routed to (calls.py). The file system knows of every
change since when it is durable. At many moments of a random workload (workload.py) it is copied,
together with what a model says must hold (model.py); from each copy many of the states are built
that a power cut could leave then; each is opened by the real recovery code and compared with the
model (simulation.py). Some recoveries are cut themselves. From some states the workload goes on.

**Which states a power cut can leave.** What was synced is there. Of everything else:

* A 512-byte **sector** of a file holds what it held when last synced or anything that was written
  to it since: pages are written back in any order, at any time and more than once, and a disk
  writes sectors whole. Sectors are independent of each other, also those of one write.
* A **hole** is metadata, so it comes for whole pages of 4 KiB or not. A page that was punched and
  written again holds only old bytes (the hole never came), or only zeroes and new ones.
* The **size** of a file is any that it had since its last sync, and while a long write made it
  longer, one in between at a page's border. It is independent of the data: where it came and the
  data did not, there are zeroes; where the data came and it did not, there is nothing. fdatasync
  makes both durable, since the data could not be read without the size.
* A change of **directories** (create, mkdir, rename, unlink, rmdir) happened as a whole or not at
  all. Changes are independent of each other unless they touch the same name: one that does
  needs those before it. fsync of a directory makes all changes in it durable, those of names in
  another directory too when a rename joins the two. fsync of a file does not make its name durable,
  nor fsync of a directory its own name in the one above.

ext4, XFS and btrfs keep more order than that in places (a journal keeps changes of directories in
order; syncing a new file brings its name along), each in its own: POSIX promises none of it, and a
program that is right here is right on each of them. What no such file system does is left
out: bytes of other files in new space, half a rename, sectors torn inside.

**A kill** (kill -9 of the daemon) loses nothing of that: the next process finds everything that
was written, but still has to sync it. So a kill followed by a power cut can lose what the
second process has read.
"""
