"""An object store in an S3 bucket, through the client of botocore, boto3's core.

boto3 itself would only add what nothing here uses, and a tenth of a second to every start.
Credentials, region and endpoint come the AWS way (environment, ``~/.aws``, instance role). Its
own retries are off; this module retries itself, because botocore bounds the number of tries but
not the time. A call is tried again, with growing random pauses, when the answer is a 5xx, 429 or a
dropped connection, until :data:`DEADLINE` has passed; until the endpoint has answered for the first
time it is :data:`FIRST_DEADLINE`, so a mistyped endpoint is reported quickly while one that was
there is waited for. The same goes for a reply, or a request, that was garbled on its way, as far as
that can be told: XML that is none, a listing that contradicts itself, a body that has not the
SHA-256 of its signature.

At most :data:`CONNECTIONS` requests are under way at once, and fewer when the store asks to slow
down (a 503 or a 429): backends/turns.py has the rules. A call holds a turn while it asks, not while
it pauses. It gives up when :data:`DEADLINE` seconds have passed in which it asked, paused, or
waited for its turn with nobody being served; waiting while the store serves others is not counted,
or a store that is slow but works would fail those that come last.

``put_if_absent`` is a PUT with ``If-None-Match: *``. When an attempt ends without a clear answer
(a time-out, a 500) it may have taken effect; a 412 to the next attempt may then be caused by
ourselves. So after an unclear attempt the object is read back and compared.

Storage class and server-side encryption are told by :class:`backends.s3_settings.S3Settings`. The
answer to a PUT says how the object was encrypted; a server that ignored what it was told is
refused.

With :meth:`S3ObjectStore.hold` every object is put under Object Lock; S3 then wants an MD5 of the
content, which nothing else does.

Checksums are only computed "when_required": the newer default adds trailing checksums that older
servers, radosgw 16 among them, do not understand. What is read is checked by the layers above.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import math
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

import botocore.exceptions as aws
import urllib3.exceptions
from botocore.config import Config
from botocore.parsers import ResponseParserError
from botocore.session import Session

from backends.errors import (
    CorruptError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from backends.locking import Retention
from backends.objects import check_key, check_prefix
from backends.s3_connections import use_prompt_connections
from backends.s3_settings import CUSTOMER_KEY_FILE, S3Settings
from backends.turns import Answer, Turns

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef, ListObjectsV2OutputTypeDef

Result = TypeVar("Result")

CONNECT_TIMEOUT = 5.0  # seconds
READ_TIMEOUT = 30.0  # seconds without a byte
FIRST_DEADLINE = 5.0  # seconds in which an endpoint that never answered is tried again
DEADLINE = 60.0  # seconds in which one that did answer is tried again
CONNECTIONS = 24  # requests at once: as many as threads of a push, restore or verify, and more

_LONGEST_PAUSE = 5.0  # seconds
_CODE = re.compile(r"[A-Za-z0-9.]{1,64}\Z")
_WRONG_CREDENTIALS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "ExpiredToken",
    "TokenRefreshRequired",
}
_NO_CREDENTIALS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.ProfileNotFound,
    aws.NoAuthTokenError,
)
_THROTTLING_CODES = {
    "RequestLimitExceeded",
    "SlowDown",
    "ServiceUnavailable",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "TooManyRequestsException",
}
_TRANSIENT_CODES = {
    "BadDigest",  # of a body that was garbled on its way
    "ConditionalRequestConflict",  # another conditional PUT of the key is under way
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "XAmzContentSHA256Mismatch",
} | _THROTTLING_CODES
# What a request that got no answer, or not all of it, ends with. botocore lets urllib3's own errors
# through where it reads the body of a reply that says that something failed.
_NO_ANSWER = (
    aws.HTTPClientError,
    aws.ConnectionError,
    aws.IncompleteReadError,
    urllib3.exceptions.HTTPError,
    OSError,
)
# What botocore's parser ends with when a reply is not what S3 says; of a number or a time that is
# none it is a ValueError.
_GARBLED = (ResponseParserError, ValueError)


class Version(NamedTuple):
    """A version of an object; a deletion has no ``size``. ``modified`` is the server's clock."""

    key: str
    version: str
    modified: float
    size: int | None


class _NoTurnError(Exception):
    """A call was never sent, see :class:`backends.turns.Turns`."""


class S3ObjectStore:
    """Objects in ``bucket`` whose keys begin with ``prefix``. See the module's text."""

    def __init__(self, bucket: str, prefix: str = "", settings: S3Settings | None = None) -> None:
        self._bucket = bucket
        self._prefix = prefix + "/" if prefix else ""
        self._settings = settings or S3Settings()
        self._retention: Retention | None = None
        self._answered = False
        self._stopping = threading.Event()
        self._turns = Turns(CONNECTIONS)
        where = f"s3://{bucket}/{prefix}".rstrip("/")
        self.name = where
        try:
            config = Config(
                connect_timeout=CONNECT_TIMEOUT,
                read_timeout=READ_TIMEOUT,
                max_pool_connections=CONNECTIONS,
                retries={"total_max_attempts": 1, "mode": "standard"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                tcp_keepalive=True,
            )
            self._client = cast("S3Client", Session().create_client("s3", config=config))
            use_prompt_connections(self._client)
        except ValueError:
            raise InvalidError(
                f"cannot open {where}: the endpoint in AWS_ENDPOINT_URL or the AWS configuration "
                "is not a URL such as http://host:port"
            ) from None
        except aws.BotoCoreError as error:
            raise UnavailableError(
                f"cannot open {where}: the AWS configuration does not work "
                f"({type(error).__name__}); check AWS_PROFILE and ~/.aws"
            ) from None
        endpoint = self._client.meta.endpoint_url
        self.name = f"{where} at {_without_user(endpoint)}"
        if self._settings.customer_key is not None and not _is_private(endpoint):
            raise InvalidError(
                f"{self.name} would be sent the key of {CUSTOMER_KEY_FILE} in plain: use https"
            )

    def put(self, key: str, data: bytes | bytearray) -> None:
        name = self._key(key)

        def attempt() -> None:
            answer = self._client.put_object(
                Bucket=self._bucket,
                Key=name,
                Body=cast(bytes, data),
                **self._for_put(key, data),
            )
            self._settings.check_put(answer, self.name)

        self._call("write", key, attempt)

    def put_if_absent(self, key: str, data: bytes | bytearray) -> bool:
        name = self._key(key)
        unclear = False

        def attempt() -> bool:
            nonlocal unclear
            try:
                answer = self._client.put_object(
                    Bucket=self._bucket,
                    Key=name,
                    Body=cast(bytes, data),
                    IfNoneMatch="*",
                    **self._for_put(key, data),
                )
            except aws.ClientError as error:
                if _status(error) == http.client.PRECONDITION_FAILED:
                    return False
                unclear = unclear or _status(error) >= http.client.INTERNAL_SERVER_ERROR
                raise
            except (*_NO_ANSWER, *_GARBLED):
                unclear = True
                raise
            self._settings.check_put(answer, self.name)
            return True

        try:
            created = self._call("write", key, attempt)
        except UnavailableError:
            if unclear and self._answered and self._holds(key, data):
                return True
            raise
        return created or (unclear and self._holds(key, data))

    def get(self, key: str, limit: int, version: str | None = None) -> bytes:
        name = self._key(key)
        given = self._for_get(version)

        def attempt() -> bytes:
            answer = self._client.get_object(Bucket=self._bucket, Key=name, **given)
            size = answer["ContentLength"]
            if size > limit:
                answer["Body"].close()
                raise CorruptError(
                    f"object {key} of {self.name} has {size} bytes, at most {limit} are expected"
                )
            return self._body(answer, key, size)

        return self._call("read", key, attempt)

    def get_range(self, key: str, offset: int, length: int, version: str | None = None) -> bytes:
        name = self._key(key)
        given = self._for_get(version)
        if length == 0:
            return b""
        span = f"bytes={offset}-{offset + length - 1}"

        def attempt() -> bytes:
            answer = self._client.get_object(Bucket=self._bucket, Key=name, Range=span, **given)
            whole = answer["ResponseMetadata"]["HTTPStatusCode"] != http.client.PARTIAL_CONTENT
            if answer["ContentLength"] != length or (whole and offset):
                answer["Body"].close()
                raise CorruptError(
                    f"object {key} of {self.name} does not have the bytes {offset} to "
                    f"{offset + length}: it is too short"
                )
            return self._body(answer, key, length)

        return self._call("read", key, attempt)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        full = self._prefix + check_prefix(prefix)
        token: str | None = None
        last = ""

        def attempt() -> ListObjectsV2OutputTypeDef:
            more: Any = {"ContinuationToken": token} if token else {}
            answer = self._client.list_objects_v2(Bucket=self._bucket, Prefix=full, **more)
            _check_listing(answer, full, last, token)
            return answer

        while True:
            answer = self._call("list", prefix, attempt)
            for item in answer.get("Contents", []):
                last = item["Key"]
                yield last[len(self._prefix) :], item["Size"]
            token = answer.get("NextContinuationToken")
            if not token:
                return

    def size(self, key: str) -> int | None:
        name = self._key(key)

        def attempt() -> int | None:
            try:
                answer = self._client.head_object(
                    Bucket=self._bucket, Key=name, **self._settings.for_get()
                )
            except aws.ClientError as error:
                # The answer to a HEAD has no body that would tell a missing key from a bucket.
                if _status(error) == http.client.NOT_FOUND:
                    self._answered = True
                    return None
                raise
            return answer["ContentLength"]

        return self._call("look at", key, attempt)

    def delete(self, key: str) -> None:
        name = self._key(key)

        def attempt() -> None:
            self._client.delete_object(Bucket=self._bucket, Key=name)

        self._call("delete", key, attempt)

    def list_versions(self) -> Iterator[Version]:
        """Yield all versions and deletions of all objects; those of one key, newest first."""
        markers: dict[str, Any] = {}
        while True:
            answer = self._call(
                "list",
                "versions",
                lambda markers=markers: self._client.list_object_versions(  # type: ignore[misc]
                    Bucket=self._bucket, Prefix=self._prefix, **markers
                ),
            )
            for item in answer.get("Versions", []):
                yield self._version(item, item["Size"])
            for marker in answer.get("DeleteMarkers", []):
                yield self._version(marker, None)
            following = {
                "KeyMarker": answer.get("NextKeyMarker"),
                "VersionIdMarker": answer.get("NextVersionIdMarker"),
            }
            following = {name: value for name, value in following.items() if value}
            if not answer.get("IsTruncated") or not following or following == markers:
                return
            markers = following

    def _version(self, item: Any, size: int | None) -> Version:
        key = item["Key"][len(self._prefix) :]
        return Version(key, item["VersionId"], item["LastModified"].timestamp(), size)

    # Object Lock: see backends/locking.py

    def require_lock(self) -> None:
        without = InvalidError(
            f"{self.name} was made without Object Lock: make a bucket that has it, and no other "
            "bucket gets it later"
        )

        def attempt() -> None:
            try:
                answer = self._client.get_object_lock_configuration(Bucket=self._bucket)
            except aws.ClientError as error:
                if _code(error) == "ObjectLockConfigurationNotFoundError":
                    raise without from None
                raise
            if answer.get("ObjectLockConfiguration", {}).get("ObjectLockEnabled") != "Enabled":
                raise without

        self._call("look at", "the Object Lock", attempt)

    def hold(self, retention: Retention) -> None:
        self._retention = retention

    def extend(self, key: str, until: float) -> None:
        name = self._key(key)
        assert self._retention is not None
        wanted: Any = {"Mode": self._retention.mode, "RetainUntilDate": _date(until)}

        def attempt() -> None:
            try:
                self._client.put_object_retention(Bucket=self._bucket, Key=name, Retention=wanted)
            except aws.ClientError as error:
                if _status(error) == http.client.METHOD_NOT_ALLOWED:  # a deletion is in front
                    raise NotFoundError(f"object {key} of {self.name} was deleted") from None
                if _status(error) != http.client.FORBIDDEN:
                    raise
                # It may be retained for longer already.
                if self._retained(name) < _date(until):
                    raise UnavailableError(
                        f"cannot retain {key} in {self.name}: access was denied ({_code(error)});"
                        " these credentials need s3:PutObjectRetention and s3:GetObjectRetention"
                    ) from None

        self._call("retain", key, attempt)

    def _retained(self, name: str) -> datetime:
        """Until when an object is retained, as far as one may know. Only within a turn."""
        try:
            answer = self._client.get_object_retention(Bucket=self._bucket, Key=name)
        except aws.ClientError:
            return _date(0)
        return answer.get("Retention", {}).get("RetainUntilDate", _date(0))

    def _for_put(self, key: str, data: bytes | bytearray) -> dict[str, Any]:
        given = self._settings.for_put(key)
        if self._retention is not None:
            digest = hashlib.md5(data, usedforsecurity=False).digest()
            given["ContentMD5"] = base64.b64encode(digest).decode("ascii")
            given["ObjectLockMode"] = self._retention.mode
            given["ObjectLockRetainUntilDate"] = _date(time.time() + self._retention.seconds)
        return given

    def _for_get(self, version: str | None) -> dict[str, Any]:
        given = self._settings.for_get()
        return given if version is None else {**given, "VersionId": version}

    def stop_retrying(self) -> None:
        self._stopping.set()
        self._turns.stop()

    def _key(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _holds(self, key: str, data: bytes | bytearray) -> bool:
        """Tell whether the object is there with these very bytes."""
        try:
            return self.get(key, len(data)) == data
        except (NotFoundError, CorruptError):
            return False

    def _body(self, answer: GetObjectOutputTypeDef, key: str, length: int) -> bytes:
        with answer["Body"] as body:
            data = body.read()
        if len(data) != length:
            raise aws.IncompleteReadError(actual_bytes=len(data), expected_bytes=length)
        return data

    def _call(self, doing: str, key: str, attempt: Callable[[], Result]) -> Result:
        """Run ``attempt`` until it succeeds, fails for good, or the deadline has passed.

        It must not call the store: there might be no turn left for that.
        """
        started = time.monotonic()
        pause = 0.1
        failure: Exception | None = None
        while True:
            deadline = DEADLINE if self._answered else FIRST_DEADLINE
            turn = self._turns.take(max(0.0, started + deadline - time.monotonic()))
            if turn is None:
                raise self._explain(doing, key, failure or _NoTurnError())
            started += turn.excused
            with turn:
                try:
                    result = attempt()
                except StorageError:
                    raise
                except (aws.ClientError, aws.BotoCoreError, *_NO_ANSWER, *_GARBLED) as error:
                    if isinstance(error, aws.ClientError):
                        self._answered = True
                    turn.answer = _answer(error)
                    failure = error
                else:
                    self._answered = True
                    turn.answer = Answer.SERVED
                    return result
            deadline = DEADLINE if self._answered else FIRST_DEADLINE
            left = started + deadline - time.monotonic()
            if not _is_transient(failure) or left <= 0 or self._stopping.is_set():
                raise self._explain(doing, key, failure)
            self._stopping.wait(min(left, pause * random.uniform(0.5, 1.0)))  # noqa: S311
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _explain(self, doing: str, key: str, error: Exception) -> StorageError:
        what = f"cannot {doing} {key or 'objects'} in {self.name}"
        if isinstance(error, aws.ClientError):
            return self._explain_answer(what, key, error)
        if isinstance(error, _NoTurnError):
            return UnavailableError(
                f"{what}: the endpoint asks to slow down, and serves nobody; try again later"
            )
        if isinstance(error, _NO_CREDENTIALS):
            return UnavailableError(
                f"{what}: no usable AWS credentials were found; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            )
        if isinstance(error, aws.ParamValidationError):
            return InvalidError(f"{what}: {self._bucket!r} is not a valid bucket name")
        if isinstance(error, aws.SSLError):
            return UnavailableError(
                f"{what}: the TLS connection failed; check the endpoint's certificate, and "
                "AWS_CA_BUNDLE for one of your own"
            )
        if isinstance(error, aws.ConnectTimeoutError | aws.ReadTimeoutError):
            return UnavailableError(f"{what}: the endpoint did not answer in time; try again later")
        if isinstance(error, aws.EndpointConnectionError | aws.ProxyConnectionError):
            return UnavailableError(
                f"{what}: cannot connect to the endpoint; check that it is up and that "
                "AWS_ENDPOINT_URL is right"
            )
        if isinstance(error, _GARBLED):
            return UnavailableError(
                f"{what}: the endpoint does not answer as S3 does; check AWS_ENDPOINT_URL"
            )
        if isinstance(error, _NO_ANSWER):
            return UnavailableError(f"{what}: the connection broke; try again later")
        return UnavailableError(
            f"{what}: the AWS configuration does not work ({type(error).__name__})"
        )

    @property
    def _or_key(self) -> str:
        if self._settings.customer_key is None and self._settings.kms_key_id is None:
            return ""
        return f", and the right key: see {self._settings.named}"

    def _explain_answer(self, what: str, key: str, error: aws.ClientError) -> StorageError:
        status = _status(error)
        code = _code(error)
        if code == "NoSuchBucket":
            return NotFoundError(f"{what}: there is no such bucket; create {self._bucket} first")
        if code in _WRONG_CREDENTIALS:
            return UnavailableError(
                f"{what}: the credentials were refused ({code}); check AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            )
        if code == "RequestTimeTooSkewed":
            return UnavailableError(f"{what}: the clock of this host is wrong ({code}); set it")
        if code == "QuotaExceeded" or status == http.client.INSUFFICIENT_STORAGE:
            return NoSpaceError(f"{what}: the bucket or its owner is over quota; free some space")
        if code == "InvalidRange":
            return CorruptError(f"object {key} of {self.name} is too short")
        if code == "NoSuchKey" or status == http.client.NOT_FOUND:
            return NotFoundError(f"there is no object {key} in {self.name}")
        if code == "InvalidObjectState":
            return UnavailableError(
                f"{what}: it is in an archive class of S3; bring it back first, with RestoreObject"
            )
        if status == http.client.FORBIDDEN:
            return UnavailableError(
                f"{what}: access was denied ({code}); these credentials need read, write, list and "
                f"delete rights on the bucket {self._bucket}{self._or_key}"
            )
        if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocation"):
            return UnavailableError(
                f"{what}: the bucket is in another region ({code}); set AWS_DEFAULT_REGION"
            )
        if status == http.client.NOT_IMPLEMENTED:
            return InvalidError(f"{what}: the endpoint does not support this request ({code})")
        if _is_transient(error):
            return UnavailableError(
                f"{what}: the endpoint keeps failing ({status} {code}); try again later"
            )
        if status == http.client.BAD_REQUEST:
            # What all requests have in common is right, or the listing before had failed.
            advice = (
                f"check {self._settings.named}"
                if self._settings.named
                else f"if it was encrypted with a customer's key, name that: {CUSTOMER_KEY_FILE}"
            )
            return UnavailableError(f"{what}: the endpoint refused it ({status} {code}); {advice}")
        return UnavailableError(f"{what}: the endpoint refused it ({status} {code})")


def _date(seconds: float) -> datetime:
    """A date that is not before ``seconds`` since the epoch: servers cut off the fraction."""
    return datetime.fromtimestamp(math.ceil(seconds), UTC)


def _status(error: aws.ClientError) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _code(error: aws.ClientError) -> str:
    """The server's error code; its message is left out, for it may quote what was sent."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return code if _CODE.match(code) else "unknown error"


def _answer(error: Exception) -> Answer:
    """What an error says of the server's load. The answer to a HEAD has a status alone."""
    if not isinstance(error, aws.ClientError):
        return Answer.OTHER
    status = _status(error)
    if (
        status in (http.client.SERVICE_UNAVAILABLE, http.client.TOO_MANY_REQUESTS)
        or _code(error) in _THROTTLING_CODES
    ):
        return Answer.THROTTLED
    return Answer.OTHER if status >= http.client.INTERNAL_SERVER_ERROR else Answer.SERVED


def _is_transient(error: Exception) -> bool:
    if isinstance(error, aws.ClientError):
        status = _status(error)
        if status == http.client.NOT_IMPLEMENTED:
            return False
        return (
            status >= http.client.INTERNAL_SERVER_ERROR
            or status == http.client.TOO_MANY_REQUESTS
            or _code(error) in _TRANSIENT_CODES
        )
    if isinstance(error, aws.SSLError | aws.ParamValidationError):
        return False
    if isinstance(error, _NO_ANSWER):
        return True
    return isinstance(error, _GARBLED) and not isinstance(error, aws.BotoCoreError)


def _check_listing(
    answer: ListObjectsV2OutputTypeDef, prefix: str, last: str, token: str | None
) -> None:
    """ValueError when an answer cannot be right: nothing else protects it on its way.

    ``last`` and ``token`` are the last key and the token of the answer before.
    """
    keys = [item["Key"] for item in answer.get("Contents", [])]
    following = answer.get("NextContinuationToken")
    if answer.get("KeyCount", len(keys)) != len(keys):
        raise ValueError("not as many keys as it says")
    if bool(answer.get("IsTruncated")) != bool(following) or (following and following == token):
        raise ValueError("it does not say how to go on")
    for key in keys:
        if not key.startswith(prefix) or key <= last:
            raise ValueError("a key is at the wrong place")
        last = key


def _is_private(endpoint: str) -> bool:
    """Tell whether nobody on the network reads what is sent there."""
    parts = urlsplit(endpoint)
    return parts.scheme == "https" or parts.hostname in ("127.0.0.1", "::1", "localhost")


def _without_user(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
