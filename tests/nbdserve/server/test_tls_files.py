"""Certificates and keys that are read at start: what is wrong is said in one line."""

import logging
import ssl
import subprocess

import pytest

from backends.errors import InvalidError
from nbdserve.protocol.handshake import TlsMode
from nbdserve.server.tls import load_tls

from .certificates import SCRIPT, make_certificates


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def load(certificates, certificate="server-cert.pem", key="server-key.pem", client_ca=None):
    return load_tls(
        TlsMode.REQUIRED,
        certificates / certificate,
        certificates / key,
        None if client_ca is None else certificates / client_ca,
    )


def refusal(certificates, **files):
    with pytest.raises(InvalidError) as caught:
        load(certificates, **files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_certificate_and_key(certificates, caplog):
    assert load(certificates).mode is TlsMode.REQUIRED
    assert load(certificates, client_ca="ca-cert.pem").mode is TlsMode.REQUIRED
    assert not caplog.records


def test_chain_with_comments(certificates):
    chain = certificates / "chain.pem"
    parts = [(certificates / name).read_text() for name in ("server-cert.pem", "ca-cert.pem")]
    chain.write_text("Herkunft: Müller\n".join(["", *parts]))
    load(certificates, certificate="chain.pem")


@pytest.mark.parametrize("which", ["certificate", "key", "client_ca"])
def test_file_that_cannot_be_read(certificates, which):
    message = refusal(certificates, **{which: "absent.pem"})
    assert "absent.pem" in message and "No such file" in message
    (certificates / "directory").mkdir(exist_ok=True)
    message = refusal(certificates, **{which: "directory"})
    assert str(certificates / "directory") in message and "directory" in message


@pytest.mark.parametrize("which", ["certificate", "key", "client_ca"])
@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", bytes(range(256)), b"-----BEGIN CERTIFICATE-----\nAAAA\n"],
)
def test_file_that_is_something_else(certificates, which, content):
    (certificates / "other.pem").write_bytes(content)
    assert str(certificates / "other.pem") in refusal(certificates, **{which: "other.pem"})


def test_key_in_place_of_the_certificate_and_the_reverse(certificates):
    assert "server-key.pem" in refusal(certificates, certificate="server-key.pem")
    assert "server-cert.pem holds no private key" in refusal(certificates, key="server-cert.pem")


def test_key_that_is_broken(certificates):
    text = (certificates / "server-key.pem").read_text().splitlines()
    (certificates / "broken.pem").write_text("\n".join([text[0], "A" * 64, text[-1], ""]))
    assert "broken.pem" in refusal(certificates, key="broken.pem")


def test_key_of_another_certificate(certificates):
    message = refusal(certificates, key="client-key.pem")
    assert "client-key.pem does not belong" in message and "server-cert.pem" in message


def test_encrypted_key(certificates):
    encrypted = certificates / "encrypted.pem"
    subprocess.run(
        ["openssl", "pkey", "-in", certificates / "server-key.pem", "-aes256",
         "-passout", "pass:secret", "-out", encrypted], check=True,
    )  # fmt: skip
    assert f"{encrypted} is encrypted" in refusal(certificates, key="encrypted.pem")


def test_key_that_everybody_can_read_is_warned_of(certificates, caplog):
    key = certificates / "open.pem"
    key.write_bytes((certificates / "server-key.pem").read_bytes())
    key.chmod(0o640)
    load(certificates, key="open.pem")
    assert not caplog.records
    key.chmod(0o644)
    load(certificates, key="open.pem")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and str(key) in record.getMessage()


def test_old_versions_are_not_spoken(certificates):
    context = load(certificates)._context
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.maximum_version is ssl.TLSVersion.MAXIMUM_SUPPORTED


def test_script_refuses_to_write_over_files(certificates):
    before = {path: path.read_bytes() for path in certificates.glob("*-key.pem")}
    another = ["--client", "other.example.com", certificates]
    for arguments in ([certificates], [*another, certificates]):
        done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "is there already" in done.stderr
    assert subprocess.run([SCRIPT, *another], capture_output=True, check=False).returncode == 2
    assert {path: path.read_bytes() for path in certificates.glob("*-key.pem")} == before
