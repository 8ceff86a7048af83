"""The NBD protocol without input or output: bytes in, questions and requests out, and back.

``handshake`` is a state machine from the greeting to the transmission phase, ``options`` the data
of its options; ``requests`` holds the layout of requests and the rules they are judged by,
``replies`` the layout of replies; ``constants`` the protocol's numbers. Standard library only.
"""
