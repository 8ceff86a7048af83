"""What the environment says of how objects are kept in S3, and what becomes of it in requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backends.errors import InvalidError, StorageError
from backends.object_urls import open_object_store
from backends.s3_objects import S3ObjectStore
from backends.s3_settings import S3Settings, settings_from_environment

KEY = bytes(range(32))


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    (tmp_path / "key").write_text(KEY.hex() + "\n")
    return str(tmp_path / "key")


def test_nothing_is_said() -> None:
    settings = settings_from_environment(environment={"NBDSERVE_S3_SSE": ""})
    assert settings == S3Settings()
    assert settings.for_put("segments/a") == settings.for_get() == {}
    assert settings.named == ""


def test_the_class_is_for_bulk_data_and_the_option_wins() -> None:
    environment = {"NBDSERVE_S3_STORAGE_CLASS": "STANDARD_IA"}
    settings = settings_from_environment(None, "segments/", environment)
    assert settings.for_put("segments/a/0") == {"StorageClass": "STANDARD_IA"}
    assert settings.for_put("pages/a/0") == settings.for_put("config") == {}
    settings = settings_from_environment("ONEZONE_IA", "segments/", environment)
    assert settings.for_put("segments/a/0") == {"StorageClass": "ONEZONE_IA"}


def test_encryption_is_for_all_and_a_customers_key_for_reads_too(key_file: str) -> None:
    said = {"NBDSERVE_S3_SSE": "aws:kms", "NBDSERVE_S3_SSE_KMS_KEY_ID": "arn:aws:kms:x:1:key/2"}
    settings = settings_from_environment(environment=said)
    assert settings.for_put("config") == {
        "ServerSideEncryption": "aws:kms",
        "SSEKMSKeyId": "arn:aws:kms:x:1:key/2",
    }
    assert settings.for_get() == {}
    settings = settings_from_environment(environment={"NBDSERVE_S3_SSE_C_KEY_FILE": key_file})
    expected = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": KEY}
    assert settings.for_put("config") == settings.for_get() == expected
    assert KEY.hex() not in repr(settings)
    assert str(KEY) not in repr(settings)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"STORAGE_CLASS": "GLACIER"}, "GLACIER_IR"),
        ({"STORAGE_CLASS": "deep_archive"}, "cannot be read for hours|nothing can be read"),
        ({"STORAGE_CLASS": "A B"}, "STANDARD_IA"),
        ({"SSE": "aes"}, "aws:kms"),
        ({"SSE_KMS_KEY_ID": "k"}, "NBDSERVE_S3_SSE=aws:kms"),
        ({"SSE": "AES256", "SSE_KMS_KEY_ID": "k"}, "NBDSERVE_S3_SSE=aws:kms"),
        ({"SSE": "aws:kms", "SSE_KMS_KEY_ID": "a\nb"}, "KMS_KEY_ID"),
        ({"SSE": "AES256", "SSE_C_KEY_FILE": "/x"}, "exclude each other"),
        ({"SSE_C_KEY_FILE": "/nonexistent/key"}, "no such file"),
        ({"SSE_C_KEY_FILE": "/"}, "is a directory"),
        ({"SSE_C_KEY_FILE": "a\0b"}, "no path"),
        ({"SSE_C_KEY_FILE": "/dev/zero"}, "64 hexadecimal"),
    ],
)
def test_what_is_refused(said: dict[str, str], words: str) -> None:
    environment = {f"NBDSERVE_S3_{name}": value for name, value in said.items()}
    with pytest.raises(InvalidError, match=words) as caught:
        settings_from_environment(environment=environment)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "00" * 31, "00" * 33, "zz" * 32, "00" * 32 + "\n\n"])
def test_key_files_that_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content)
    said = {"NBDSERVE_S3_SSE_C_KEY_FILE": str(tmp_path / "key")}
    with pytest.raises(InvalidError, match="64 hexadecimal digits") as caught:
        settings_from_environment(environment=said)
    assert content.strip() == "" or content.strip() not in str(caught.value)


class Ignorant:
    """A server that takes any header and does nothing about it."""

    def put_object(self, **_request: Any) -> dict[str, Any]:
        return {"ETag": "x"}


@pytest.mark.parametrize(
    "settings", [S3Settings(encryption="AES256"), S3Settings(customer_key=KEY)]
)
def test_a_server_that_does_not_encrypt_is_refused(
    monkeypatch: pytest.MonkeyPatch, settings: S3Settings
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    store = S3ObjectStore("bucket", "", settings)
    monkeypatch.setattr(store, "_client", Ignorant())
    for put in (store.put, store.put_if_absent):
        with pytest.raises(StorageError, match=r"s3://bucket.* ignores.*unset NBDSERVE_S3_SSE"):
            put("key", b"x")


def test_a_customers_key_is_not_sent_in_plain(
    monkeypatch: pytest.MonkeyPatch, key_file: str
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NBDSERVE_S3_SSE_C_KEY_FILE", key_file)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.example.com")
    with pytest.raises(InvalidError, match="use https"):
        open_object_store("s3://bucket")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://s3.example.com")
    open_object_store("s3://bucket")


def test_a_directory_has_no_classes(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="storage classes"):
        open_object_store(f"file://{tmp_path}", storage_class="STANDARD_IA")
