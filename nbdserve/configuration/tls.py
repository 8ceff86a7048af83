"""What the configuration says about TLS, of all listeners or of one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from backends.errors import InvalidError
from nbdserve.configuration.table import Table
from nbdserve.protocol.handshake import TlsMode

TLS_MODES: Final = tuple(mode.value for mode in TlsMode)
TLS_KEYS: Final = ("tls", "tls_certificate", "tls_key", "tls_client_ca")

_GIVE_FILES: Final = (
    "give --tls-certificate and --tls-key, or tls_certificate and tls_key in the file"
)


@dataclass(frozen=True)
class TlsSettings:
    """One source's say about TLS; ``mode`` is one of TLS_MODES."""

    mode: str | None = None
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None


NOTHING_OF_TLS: Final = TlsSettings()


@dataclass(frozen=True)
class TlsConfiguration:
    """Files in PEM. Without ``client_ca``, clients are not asked who they are."""

    mode: TlsMode
    certificate: Path
    key: Path
    client_ca: Path | None


def read_tls(table: Table) -> TlsSettings:
    mode = table.choice("tls", TLS_MODES)
    files = [table.path(key, "the path of a file in PEM") for key in TLS_KEYS[1:]]
    return TlsSettings(mode, *files)


def override(common: TlsSettings, own: TlsSettings) -> TlsSettings:
    return TlsSettings(
        own.mode or common.mode,
        own.certificate or common.certificate,
        own.key or common.key,
        own.client_ca or common.client_ca,
    )


def combine_tls(wanted: TlsSettings) -> TlsConfiguration | None:
    mode, certificate, key = wanted.mode, wanted.certificate, wanted.key
    if mode == TlsMode.OFF.value:
        return None
    if certificate is None and key is None:
        if mode is not None or wanted.client_ca is not None:
            raise InvalidError(f"TLS needs a certificate: {_GIVE_FILES}")
        return None
    if certificate is None or key is None:
        raise InvalidError(f"TLS needs both a certificate and its key: {_GIVE_FILES}")
    return TlsConfiguration(
        TlsMode.REQUIRED if mode is None else TlsMode(mode), certificate, key, wanted.client_ca
    )
