"""Worker processes: hosts of views outside the daemon's own process.

The daemon (``host``, ``export``) and each worker (``worker``, ``__main__``) speak over a Unix
socket pair (``channel``): calls of a ``ViewHost`` one way, clients' sockets with them, and both
ways what happens. A worker imports nothing that it does not need: no HTTP, no S3, no command line.
"""
