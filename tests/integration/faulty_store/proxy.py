"""A TCP proxy in front of an S3 server that does faults to requests and replies.

Which fault happens to a request follows from the seed, the epoch that the driver began, and the how
manieth request of its method and folder it is in that epoch: threads of the client that come in
another order change nothing for the others.

Everything that was begun ends: :meth:`FaultProxy.drain` waits until nothing is under way, neither
to the server nor late. After that only what a client sends anew can change the store.
"""

import contextlib
import enum
import random
import socket
import threading
import time
from collections import Counter
from dataclasses import replace

from .messages import EndOfStreamError, Wire, name_of

FOLDERS = frozenset({
    "config", "intents", "segments", "pages", "outcomes", "roots", "plans", "tombstones",
    "protections", "snapshots", "probes", "keys", "removals",
})  # fmt: skip
LONGEST_PAUSE = 2.0  # seconds of a slow reply
LATEST = 1.5  # seconds after which a late request is passed on


class Fault(enum.Enum):
    """What is done to a request, or to its reply."""

    INTERNAL_ERROR = "500 InternalError"
    SLOW_DOWN = "503 SlowDown"
    RESET_BEFORE = "reset before the request's body is read"
    RESET_IN_REQUEST = "reset in the middle of the request's body; the server gets that half"
    LOST_REPLY = "passed on, then reset instead of a reply"
    LATE = "reset; passed on later all the same"
    RESET_IN_REPLY = "reset in the middle of the reply's body"
    TRUNCATED = "the reply's body ends early, with a clean close"
    CORRUPT_REPLY = "some bytes of the reply's body are others"
    CORRUPT_REQUEST = "some bytes of the request's body are others"
    SLOW = "a slow reply"


# How often one is chosen, relative to the others.
WEIGHTS = {
    Fault.INTERNAL_ERROR: 3,
    Fault.SLOW_DOWN: 3,
    Fault.RESET_BEFORE: 2,
    Fault.RESET_IN_REQUEST: 2,
    Fault.LOST_REPLY: 4,
    Fault.LATE: 2,
    Fault.RESET_IN_REPLY: 2,
    Fault.TRUNCATED: 2,
    Fault.CORRUPT_REPLY: 3,
    Fault.CORRUPT_REQUEST: 2,
    Fault.SLOW: 2,
}
_ANSWERS = {
    Fault.INTERNAL_ERROR: (b"500 Internal Server Error", b"InternalError"),
    Fault.SLOW_DOWN: (b"503 Slow Down", b"SlowDown"),
}


class FaultProxy:
    """Listens on a port of 127.0.0.1 from the beginning; ``stop`` ends it."""

    def __init__(self, endpoint, seed=0):
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._seed = seed
        self._epoch = 0
        self._rate = 0.0
        self._weights = WEIGHTS
        self._met = Counter()
        self._lock = threading.Condition()
        self._under_way = 0
        self._clients = set()
        self._answering = threading.Event()
        self._answering.set()
        self._listener = None
        self._outage = None
        #: (fault's name or "passed on", method, folder) -> how often
        self.counts = Counter()
        self.outages = Counter()
        self.port = 0
        self._listen()

    @property
    def url(self):
        """What clients use as the endpoint."""
        return f"http://127.0.0.1:{self.port}"

    def begin(self, rate, epoch=0, weights=None):
        """Do faults to this share of the requests from now on; 0 for none."""
        with self._lock:
            self._rate, self._epoch = rate, epoch
            self._weights = weights or WEIGHTS
            self._met.clear()

    def begin_outage(self, seconds, refuse=True):
        """For so long refuse connections, or take them and say nothing; returns at once."""
        self.end_outage()
        self.outages["refused" if refuse else "ignored"] += 1
        self._answering.clear()
        if refuse:
            self._shut()
            with self._lock:
                clients = list(self._clients)
            for wire in clients:
                with contextlib.suppress(OSError):
                    wire.sock.shutdown(socket.SHUT_RDWR)
        self._outage = threading.Timer(seconds, self._recover)
        self._outage.daemon = True
        self._outage.start()

    def end_outage(self):
        """End an outage early; wait for the end of one that is just ending."""
        if self._outage is not None:
            self._outage.cancel()
            self._outage.join()
            self._outage = None
        self._recover()

    def calm(self):
        """No faults from now on, and everything that was begun has ended."""
        self.begin(0.0)
        self.end_outage()
        self.drain()

    def drain(self):
        """Wait until no request is on its way, not even a late one."""
        with self._lock:
            if not self._lock.wait_for(lambda: not self._under_way, timeout=120):
                raise TimeoutError("the S3 server does not answer the proxy")

    def stop(self):
        """End the proxy."""
        self.end_outage()
        self._shut()

    def summary(self):
        """Return lines for people: what was done, to how many requests."""
        totals = Counter()
        for (what, _, _), count in self.counts.items():
            totals[what] += count
        lines = [f"{count:7} {what}" for what, count in totals.most_common()]
        return lines + [f"{count:7} outages, {what}" for what, count in self.outages.items()]

    def _listen(self):
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=100)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _shut(self):
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _recover(self):
        with self._lock:
            if self._listener is None:
                self._listen()
        self._answering.set()

    def _accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._serve, args=(Wire(client),), daemon=True).start()

    def _serve(self, client):
        with self._lock:
            self._clients.add(client)
        server = _Server(self._target)
        try:
            while self._exchange(client, server):
                pass
        except (OSError, ValueError):
            pass  # one of the two has gone: so does the other
        finally:
            with self._lock:
                self._clients.discard(client)
            client.close()
            server.close()

    @contextlib.contextmanager
    def _busy(self):
        with self._lock:
            self._under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1
                self._lock.notify_all()

    def _choose(self, name):
        """Return the fault for the next request of this method and folder, and its dice."""
        with self._lock:
            number = self._met[name]
            self._met[name] += 1
            dice = random.Random(f"{self._seed} {self._epoch} {name} {number}")
            if dice.random() >= self._rate:
                return None, dice
            kinds = list(self._weights)
            return dice.choices(kinds, [self._weights[kind] for kind in kinds])[0], dice

    def _count(self, fault, name):
        with self._lock:
            self.counts[fault.value if fault else "passed on", *name] += 1

    def _exchange(self, client, server):
        """Pass one request and its reply on; whether the connection goes on."""
        head = client.read_head()
        with self._busy():
            if not self._answering.wait(0):
                self._answering.wait()
                raise EndOfStreamError("it came during an outage")
            name = name_of(head, FOLDERS)
            fault, dice = self._choose(name)
            if fault is Fault.RESET_BEFORE:
                self._count(fault, name)
                client.reset()
                return False
            if head.header(b"Expect").lower() == b"100-continue":
                client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                head = head.without(b"Expect")
            request = self._read_request(client, server, head, fault, name)
            if request is None:
                return False
            if fault in _ANSWERS:
                self._count(fault, name)
                client.send(_refusal(*_ANSWERS[fault], request.method))
                return not request.must_close
            if fault is Fault.LATE:
                self._count(fault, name)
                client.reset()
                time.sleep(dice.uniform(0, LATEST))
                server.ask(request)
                return False
            if fault is Fault.CORRUPT_REQUEST:
                if request.body:
                    request = replace(request, body=_corrupt(request.body, dice))
                else:
                    fault = None
            reply = server.ask(request)
            return self._answer(client, request, reply, fault, name, dice)

    def _read_request(self, client, server, head, fault, name):
        """Return the whole request; None when half of it was enough."""
        length = int(head.header(b"Content-Length") or 0)
        if fault is not Fault.RESET_IN_REQUEST:
            return client.read_body(head)
        half = client.exactly(length // 2)
        self._count(fault, name)
        client.reset()
        if length:
            server.abandon(head, half)
        return None

    def _answer(self, client, request, reply, fault, name, dice):
        head, body = reply.head(), reply.wire_body()
        if request.method == "HEAD":
            body = b""
        if fault is Fault.CORRUPT_REPLY:
            if body:
                body = replace(reply, body=_corrupt(reply.body, dice)).wire_body()
            else:
                fault = None
        self._count(fault, name)
        if fault is Fault.LOST_REPLY:
            client.reset()
            return False
        if fault in (Fault.RESET_IN_REPLY, Fault.TRUNCATED):
            # Without a body there is nothing at all: clients take half a head for a whole one.
            client.send(head + body[: len(body) // 2] if body else b"")
            if fault is Fault.RESET_IN_REPLY:
                time.sleep(0.01)  # so that what was sent is read before the reset drops it
                client.reset()
            return False
        if fault is Fault.SLOW:
            time.sleep(dice.uniform(0, LONGEST_PAUSE / 2))
            client.send(head + body[: len(body) // 2])
            time.sleep(dice.uniform(0, LONGEST_PAUSE / 2))
            client.send(body[len(body) // 2 :])
        else:
            client.send(head + body)
        return not (request.must_close or reply.must_close)


class _Server:
    """The connection to the real server; made anew when the server has closed it meanwhile."""

    def __init__(self, target):
        self._target = target
        self._wire = None

    def ask(self, request):
        """Return the reply to a request."""
        if self._wire is not None:
            try:
                return self._ask(request)
            except OSError:  # idle for too long: the server had closed it before it came
                self.close()
        self._connect()
        return self._ask(request)

    def abandon(self, head, half):
        """Send the half of a request and go."""
        self.close()
        self._connect()
        self._wire.send(head.head() + half)
        self.close()

    def close(self):
        """Close the connection."""
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def _connect(self):
        sock = socket.create_connection(self._target)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._wire = Wire(sock)

    def _ask(self, request):
        wire = self._wire
        wire.send(request.head() + request.wire_body())
        while True:
            reply = wire.read_body(wire.read_head(), of_reply_to=request.method)
            if reply.status >= 200:
                break
        if reply.must_close:
            self.close()
        return reply


def _corrupt(body, dice):
    changed = bytearray(body)
    for _ in range(dice.randint(1, 3)):
        changed[dice.randrange(len(changed))] ^= dice.randint(1, 255)
    return bytes(changed)


def _refusal(status, code, method):
    body = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code></Error>' % code
    head = b"HTTP/1.1 %s\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n"
    return head % (status, len(body)) + (b"" if method == "HEAD" else body)
