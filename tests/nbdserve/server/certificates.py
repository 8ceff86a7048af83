"""A CA and certificates for one run of the tests."""

import ssl
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "make-test-certificates"


def make_certificates(directory):
    """Let the script make them; returns the directory."""
    subprocess.run([SCRIPT, directory], check=True)
    return directory


def make_client(directory, name):
    """A directory in that one for another client, of that DNS name."""
    subprocess.run([SCRIPT, "--client", name, directory, directory / name], check=True)


def client_context(directory, *, identify=False):
    """What a client verifies the server with, and itself when ``identify``."""
    context = ssl.create_default_context(cafile=directory / "ca-cert.pem")
    if identify:
        context.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
    return context
