"""A conformance suite for NBD servers, point by point of the protocol's specification.

Python 3.9 or newer and its standard library are all it needs: copy this directory and the launcher
``nbd-conformance`` beside it to wherever a server is to be checked. It shares no code with any
server: a mistake made twice would go unseen.

From the bottom up: ``constants`` are the protocol's numbers; ``connection`` is a socket that never
waits for ever; ``handshake`` and ``transmission`` speak the two phases and judge the format of
every message that they read; ``uri`` and ``tls`` say where the server is; ``target`` is the server
being checked, what it offers, and how a check gets a connection in the state that it wants;
``check`` is what a check is; ``checks`` holds them, a module for each part of the specification;
``runner`` runs them; ``report`` prints what came out; ``program`` is the command line.

Words: "the specification" is doc/proto.md of the reference implementation, with the text of its
branch extension-ext-header for NBD_OPT_EXTENDED_HEADERS.
"""
