"""Fuzzing: hostile bytes against the parts that read what strangers send.

A **target** is a function of bytes that raises ``AssertionError`` when a rule is broken: the rules,
and what the bytes mean, are in its module's text (handshake.py, transmission.py, channel.py).
``python -m tests.fuzz TARGET`` lets atheris look for such bytes, guided by which code they reach;
``python -m tests.fuzz TARGET FILE`` replays one. ``corpus/TARGET`` holds inputs that reach the
code between them, and all that was ever found; test_corpus.py replays them without atheris.

wire.py has the protocol's layouts a second time, written from the specification and not from
``nbdserve.protocol``: who reads the server's output must not share its mistakes. messages.py makes
random messages, right and nearly right. live.py drives a daemon with them.
"""
