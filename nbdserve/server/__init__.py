"""The NBD server on raw non-blocking sockets: ``Server(registry)`` serves what a registry exports.

``server`` holds the listeners (``listening``) and the connections (``connection``: handshake, then
transmission, then the end). ``transmission`` is the path of every request, ``output`` the replies
on their way, ``operations`` what cannot be done in place. ``exports`` is what an export must offer.
"""

from nbdserve.server.exports import Export, ExportDescription, ExportRegistry
from nbdserve.server.server import Server

__all__ = ["Export", "ExportDescription", "ExportRegistry", "Server"]
