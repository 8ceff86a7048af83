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


def make_odd_client(directory, name, alternative_name):
    """The same, with an alternative name as OpenSSL's configuration writes it."""
    (directory / name).mkdir()
    (directory / name / "ca-cert.pem").write_bytes((directory / "ca-cert.pem").read_bytes())
    config = directory / name / "config"
    config.write_text("[req]\ndistinguished_name=name\n[name]\n")
    subprocess.run(
        ["openssl", "req", "-x509", "-config", config, "-newkey", "ec",
         "-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", f"/CN={name}", "-nodes",
         "-CA", directory / "ca-cert.pem", "-CAkey", directory / "ca-key.pem",
         "-addext", f"subjectAltName={alternative_name}", "-addext", "extendedKeyUsage=clientAuth",
         "-keyout", directory / name / "client-key.pem",
         "-out", directory / name / "client-cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip


def client_context(directory, *, identify=False):
    """What a client verifies the server with, and itself when ``identify``."""
    context = ssl.create_default_context(cafile=directory / "ca-cert.pem")
    if identify:
        context.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
    return context
