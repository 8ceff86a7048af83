"""What holds for every test."""

import signal

# A shell that starts us in the background ignores SIGINT for us and for all our children; tests
# of Ctrl-C need it to be as in the foreground.
signal.signal(signal.SIGINT, signal.default_int_handler)
