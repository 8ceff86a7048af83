"""Commands that quiesce guests for the moment of a snapshot, and let them go on.

A guest that stays frozen is worse than a backup that fails. So not the backup runs these commands
but a **watcher**, a process of its own that outlives it:

    waiting ──instructions──▶ freezing ──done──▶ frozen ──end of the socket──▶ thawing ──▶ ended
       │                         │                 └────── time-out ──────────────▲
       └─ end of the socket:     └─ failed, time-out, end of the socket ──────────┘
          ended

* The time-out counts from the beginning of the freeze until the thaw begins. A freeze that takes
  longer is killed, with its process group.
* Every freeze that was begun is followed by a thaw, once the freeze command has ended: also by one
  that failed, for it may have frozen half of what it was to freeze. A freeze command that cannot be
  killed is followed by two, one at once and one when it is gone.
* A thaw that fails, or takes longer than the time-out, is tried again (PAUSES).
* The backup says that its snapshot is taken by shutting its side of a socket pair, which is also
  what the kernel does when the backup ends in whatever way. The watcher is in a session of its own,
  and signals that are meant for the backup do not end it. Should it be killed, the backup thaws.

``commands`` runs a command, ``watcher`` is the process (the standard library alone: it has to be
there quickly), ``freezing`` is the backup's side.
"""
