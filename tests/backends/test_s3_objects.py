"""How the S3 store takes errors, forced at the client; a real server is tested as integration."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import botocore.exceptions as aws
import pytest
import urllib3.exceptions
from botocore.parsers import ResponseParserError

import backends.s3_objects as s3_module
from backends.errors import (
    CorruptError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from backends.locking import Retention
from backends.object_urls import open_object_store
from backends.s3_objects import S3ObjectStore
from backends.turns import Turns

SECRET = "verysecretkey"


def answer(status: int, code: str) -> aws.ClientError:
    response: Any = {
        "Error": {"Code": code, "Message": f"something with {SECRET} in it"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return aws.ClientError(response, "Operation")


class Scripted:
    """Stands in for the boto3 client: each PUT takes the next of ``script``."""

    def __init__(self, script: list[Any]) -> None:
        self.script = script
        self.objects: dict[str, bytes] = {}
        self.calls = 0

    def put_object(self, **request: Any) -> None:
        self.calls += 1
        step = self.script.pop(0) if self.script else "store"
        if isinstance(step, tuple):  # takes effect, and the reply is lost
            self.objects[request["Key"]] = bytes(request["Body"])
            step = step[1]
        if isinstance(step, Exception):
            raise step
        if "IfNoneMatch" in request and request["Key"] in self.objects:
            raise answer(412, "PreconditionFailed")
        self.objects[request["Key"]] = bytes(request["Body"])

    def get_object(self, **request: Any) -> dict[str, Any]:
        if request["Key"] not in self.objects:
            raise answer(404, "NoSuchKey")
        data = self.objects[request["Key"]]
        return {
            "ContentLength": len(data),
            "Body": Body(data),
            "ResponseMetadata": {"HTTPStatusCode": 200},
        }


class Body:
    def __init__(self, data: bytes) -> None:
        self.read = lambda: data

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setattr(s3_module, "FIRST_DEADLINE", 0.2)
    monkeypatch.setattr(s3_module, "DEADLINE", 0.5)
    yield


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Any]], tuple[S3ObjectStore, Any]]:
    def make(script: list[Any]) -> tuple[S3ObjectStore, Scripted]:
        store = S3ObjectStore("bucket", "pre/fix")
        client = Scripted(script)
        monkeypatch.setattr(store, "_client", client)
        return store, client

    return make


Make = Callable[[list[Any]], tuple[S3ObjectStore, Scripted]]
TIMEOUT = aws.ReadTimeoutError(endpoint_url="http://127.0.0.1:1")


def test_transient_errors_are_tried_again(scripted: Make) -> None:
    store, client = scripted([answer(503, "SlowDown"), TIMEOUT])
    store.put("key", b"x")
    assert client.calls == 3
    assert client.objects == {"pre/fix/key": b"x"}


def test_retries_end_at_the_deadline_or_when_asked_to(scripted: Make) -> None:
    store, client = scripted([answer(503, "SlowDown")] * 1000)
    with pytest.raises(UnavailableError, match=r"bucket.*503 SlowDown"):
        store.put("key", b"x")
    assert 1 < client.calls < 50
    store, client = scripted([TIMEOUT] * 10)
    store.stop_retrying()
    with pytest.raises(UnavailableError):
        store.put("key", b"x")
    assert client.calls == 1


def test_a_put_whose_reply_was_lost_is_known_as_ours(scripted: Make) -> None:
    for lost in (TIMEOUT, answer(500, "InternalError")):
        store, _ = scripted([("store", lost)])
        assert store.put_if_absent("key", b"mine") is True


def test_a_put_that_lost_a_race_after_an_unclear_answer(scripted: Make) -> None:
    store, client = scripted([TIMEOUT])
    client.objects["pre/fix/key"] = b"theirs"
    assert store.put_if_absent("key", b"mine") is False


def test_a_412_without_an_unclear_answer_is_not_ours(scripted: Make) -> None:
    store, client = scripted([])
    client.objects["pre/fix/key"] = b"same"
    assert store.put_if_absent("key", b"same") is False


def test_the_last_attempt_of_all_may_have_worked(scripted: Make) -> None:
    store, client = scripted([answer(503, "SlowDown"), ("store", TIMEOUT)])
    store.stop_retrying()
    client.script.pop(0)
    client.script.insert(0, ("store", answer(500, "InternalError")))
    assert store.put_if_absent("key", b"mine") is True


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (answer(404, "NoSuchBucket"), NotFoundError, "no such bucket"),
        (answer(403, "InvalidAccessKeyId"), UnavailableError, "AWS_ACCESS_KEY_ID"),
        (answer(403, "SignatureDoesNotMatch"), UnavailableError, "AWS_SECRET_ACCESS_KEY"),
        (answer(403, "AccessDenied"), UnavailableError, "rights"),
        (answer(403, "RequestTimeTooSkewed"), UnavailableError, "clock"),
        (answer(403, "QuotaExceeded"), NoSpaceError, "quota"),
        (answer(301, "PermanentRedirect"), UnavailableError, "AWS_DEFAULT_REGION"),
        (answer(501, "NotImplemented"), InvalidError, "does not support"),
        (answer(503, "<b>"), UnavailableError, "unknown error"),
        (aws.NoCredentialsError(), UnavailableError, "no usable AWS credentials"),
        (aws.ParamValidationError(report=SECRET), InvalidError, "bucket name"),
        (aws.SSLError(endpoint_url="", error=SECRET), UnavailableError, "certificate"),
        (TIMEOUT, UnavailableError, "in time"),
        (aws.ConnectTimeoutError(endpoint_url=""), UnavailableError, "in time"),
        (aws.EndpointConnectionError(endpoint_url=""), UnavailableError, "AWS_ENDPOINT_URL"),
        (aws.ConnectionClosedError(endpoint_url=""), UnavailableError, "broke"),
        (aws.ResponseStreamingError(error=SECRET), UnavailableError, "broke"),
        (urllib3.exceptions.ProtocolError(SECRET), UnavailableError, "broke"),
        (ResponseParserError(SECRET), UnavailableError, "as S3 does"),
        (ValueError(SECRET), UnavailableError, "as S3 does"),
        (answer(400, "XAmzContentSHA256Mismatch"), UnavailableError, "keeps failing"),
    ],
)
def test_one_clear_line_for_each_error(
    scripted: Make, error: Exception, kind: type[StorageError], words: str
) -> None:
    store, _ = scripted([error] * 1000)
    store.stop_retrying()
    for put in (store.put, store.put_if_absent):
        with pytest.raises(kind, match=words) as caught:
            put("key", b"x")
        line = str(caught.value)
        assert "\n" not in line
        assert "s3://bucket/pre/fix at http://127.0.0.1:1" in line
        assert SECRET not in line
        assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "error",
    [
        urllib3.exceptions.ProtocolError("the body of a 404 broke off"),
        ResponseParserError("no XML"),
        ValueError("invalid literal for int()"),
        answer(400, "XAmzContentSHA256Mismatch"),
        answer(400, "BadDigest"),
    ],
)
def test_what_is_garbled_on_its_way_is_tried_again(scripted: Make, error: Exception) -> None:
    store, client = scripted([error])
    store.put("key", b"x")
    assert client.calls == 2
    store, client = scripted([("store", error)])
    if not isinstance(error, aws.ClientError):  # the store refused that, and has nothing
        assert store.put_if_absent("key", b"x") is True


def listing(*keys: str, **more: Any) -> dict[str, Any]:
    contents = [{"Key": f"pre/fix/{key}", "Size": 1} for key in keys]
    return {"Contents": contents, "KeyCount": len(keys), "IsTruncated": False, **more}


@pytest.mark.parametrize(
    "wrong",
    [
        listing("a", "b", KeyCount=3),
        listing("b", "a"),
        listing("a", "a"),
        {**listing(), "Contents": [{"Key": "pre/fiy/a", "Size": 1}], "KeyCount": 1},
        listing("a", "b", NextContinuationToken="more"),  # IsTruncated said true
        listing("a", "b", IsTruncated=True),
    ],
)
def test_a_listing_that_cannot_be_right_is_asked_for_again(
    scripted: Make, wrong: dict[str, Any]
) -> None:
    right = [
        listing("a", "b", IsTruncated=True, NextContinuationToken="more"),
        listing("c"),
    ]
    for script in ([wrong, *right], [right[0], listing("b"), wrong, right[1]]):
        store, client = scripted([])
        client.list_objects_v2 = lambda script=script, **_: script.pop(0)
        assert list(store.list("")) == [("a", 1), ("b", 1), ("c", 1)]
        assert not script


def test_an_object_that_is_too_long_is_not_read(scripted: Make) -> None:
    store, client = scripted([])
    client.objects["pre/fix/key"] = b"0123456789"
    with pytest.raises(CorruptError, match="key"):
        store.get("key", 9)


def test_an_endpoint_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET}@127.0.0.1:{port}")
        store = open_object_store("s3://bucket/prefix/")
        with pytest.raises(UnavailableError, match=f"127.0.0.1:{port}.*AWS_ENDPOINT_URL") as caught:
            store.get("key", 1)
        assert SECRET not in str(caught.value)


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UnavailableError, match="no usable AWS credentials"):
        open_object_store("s3://bucket").put("key", b"x")


def test_configuration_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(InvalidError, match="AWS_ENDPOINT_URL"):
        open_object_store("s3://bucket")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UnavailableError, match="AWS_PROFILE"):
        open_object_store("s3://bucket")


class Busy(Scripted):
    """A server that serves ``most`` requests at a time and asks all others to slow down."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__([])
        self.most = most
        self.error = error
        self.now = self.throttled = 0
        self.ever: list[int] = []  # in flight as each request came
        self.lock = threading.Lock()

    def put_object(self, **request: Any) -> None:
        with self.lock:
            self.now += 1
            self.ever.append(self.now)
            refused = self.now > self.most
            self.throttled += refused
        try:
            threading.Event().wait(0.001)
            if refused:
                raise self.error
            with self.lock:
                self.objects[request["Key"]] = bytes(request["Body"])
        finally:
            with self.lock:
                self.now -= 1


@pytest.mark.parametrize("error", [answer(503, "SlowDown"), answer(429, "429"), answer(503, "503")])
def test_a_store_that_asks_to_slow_down_is_sent_less(
    scripted: Make, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(s3_module, "DEADLINE", 60.0)
    monkeypatch.setattr(s3_module, "_LONGEST_PAUSE", 0.02)
    store, _ = scripted([])
    busy = Busy(5, error)
    monkeypatch.setattr(store, "_client", busy)
    with ThreadPoolExecutor(40) as pool:
        list(pool.map(lambda number: store.put(f"key{number}", b"x"), range(600)))
    assert len(busy.objects) == 600
    assert max(busy.ever) <= s3_module.CONNECTIONS
    assert 0 < store._turns._halvings <= busy.throttled
    # Wanted again by nobody else, the store is sent all that it takes.
    busy.most = s3_module.CONNECTIONS
    with ThreadPoolExecutor(40) as pool:
        list(pool.map(lambda number: store.put(f"more{number}", b"x"), range(600)))
    assert store._turns.bound == s3_module.CONNECTIONS


def test_one_that_fails_takes_no_turn_with_it(
    scripted: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of all kinds, from more threads than there are turns: nothing hangs."""
    monkeypatch.setattr(s3_module, "_LONGEST_PAUSE", 0.001)
    store, client = scripted([])
    errors = [answer(503, "SlowDown"), answer(500, "InternalError"), TIMEOUT, answer(403, "No")]
    errors += [KeyboardInterrupt(), MemoryError()]  # type: ignore[list-item]
    client.script[:] = errors * 40
    client.put_object = synchronized(client.put_object)  # type: ignore[method-assign]

    def put(number: int) -> None:
        with contextlib.suppress(StorageError, KeyboardInterrupt, MemoryError):
            store.put_if_absent(f"key{number}", b"x")

    with ThreadPoolExecutor(40) as pool:
        list(pool.map(put, range(300)))
    client.script.clear()
    store.put("last", b"x")
    assert store._turns._in_flight == 0


def test_reading_back_needs_no_second_turn(scripted: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store, client = scripted([])
    monkeypatch.setattr(store, "_turns", Turns(1))
    client.script[:] = [TIMEOUT]
    client.objects["pre/fix/key"] = b"mine"  # it took effect after all
    assert store.put_if_absent("key", b"mine") is True


def test_stop_wakes_who_waits_for_a_turn(scripted: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "DEADLINE", 3600.0)
    monkeypatch.setattr(s3_module, "FIRST_DEADLINE", 3600.0)
    store, client = scripted([])
    turns = Turns(1)
    monkeypatch.setattr(store, "_turns", turns)
    held = turns.take(0)
    assert held is not None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.put, "key", b"x")
        while not turns._waiting:
            threading.Event().wait(0.001)
        store.stop_retrying()
        with pytest.raises(UnavailableError, match=r"cannot write key in s3://bucket.*try again"):
            waiting.result()
    assert client.calls == 0


def synchronized(function: Callable[..., Any]) -> Callable[..., Any]:
    lock = threading.Lock()

    def call(**request: Any) -> Any:
        with lock:
            return function(**request)

    return call


class Locked(Scripted):
    """A bucket with Object Lock, of which one object is retained until ``until``."""

    def __init__(self, error: Exception, until: datetime | Exception) -> None:
        super().__init__([])
        self.error = error
        self.until = until
        self.requests: list[dict[str, Any]] = []

    def put_object(self, **request: Any) -> None:
        self.requests.append(request)

    def put_object_retention(self, **request: Any) -> None:
        self.requests.append(request)
        raise self.error

    def get_object_retention(self, **_request: Any) -> dict[str, Any]:
        if isinstance(self.until, Exception):
            raise self.until
        return {"Retention": {"Mode": "COMPLIANCE", "RetainUntilDate": self.until}}

    def get_object_lock_configuration(self, **_request: Any) -> dict[str, Any]:
        raise self.error


DENIED = answer(403, "AccessDenied")


@pytest.mark.parametrize(
    ("error", "until", "kind", "words"),
    [
        (DENIED, datetime.fromtimestamp(1000, UTC), None, ""),
        (DENIED, datetime.fromtimestamp(999, UTC), UnavailableError, "s3:PutObjectRetention"),
        (DENIED, DENIED, UnavailableError, "s3:GetObjectRetention"),
        (DENIED, answer(404, "NoSuchKey"), UnavailableError, "s3:PutObjectRetention"),
        (answer(405, "MethodNotAllowed"), DENIED, NotFoundError, "was deleted"),
        (answer(404, "NoSuchKey"), DENIED, NotFoundError, "no object key"),
        (answer(501, "NotImplemented"), DENIED, InvalidError, "does not support"),
    ],
)
def test_extending_a_retention(
    scripted: Make,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    until: datetime | Exception,
    kind: type[StorageError] | None,
    words: str,
) -> None:
    store, _ = scripted([])
    locked = Locked(error, until)
    monkeypatch.setattr(store, "_client", locked)
    store.hold(Retention("COMPLIANCE", 60.0))
    if kind is None:
        store.extend("key", 999.5)
    else:
        with pytest.raises(kind, match=words):
            store.extend("key", 999.5)
    wanted = {"Mode": "COMPLIANCE", "RetainUntilDate": datetime.fromtimestamp(1000, UTC)}
    assert locked.requests == [{"Bucket": "bucket", "Key": "pre/fix/key", "Retention": wanted}]


def test_what_is_put_under_object_lock(scripted: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = scripted([])
    locked = Locked(answer(404, "ObjectLockConfigurationNotFoundError"), DENIED)
    monkeypatch.setattr(store, "_client", locked)
    with pytest.raises(InvalidError, match="made without Object Lock"):
        store.require_lock()
    store.put("key", b"123")
    assert "ObjectLockMode" not in locked.requests.pop()
    monkeypatch.setattr(s3_module.time, "time", lambda: 5000.25)
    store.hold(Retention("GOVERNANCE", 60.0))
    for put in (store.put, store.put_if_absent):
        put("key", b"123")
        request = locked.requests.pop()
        assert request["ContentMD5"] == "ICy5YqxZB1uWSwcVLSNLcA=="  # RFC 1864 has the form
        assert request["ObjectLockMode"] == "GOVERNANCE"
        assert request["ObjectLockRetainUntilDate"] == datetime.fromtimestamp(5061, UTC)
