"""``/metrics``: all numbers as Prometheus wants them, in seconds and bytes (docs/monitoring.md).

Names begin with ``nbdserve_``. The label ``volume`` is the name of an export: a volume, or
``VOLUME@SNAPSHOT`` for what clients read of a snapshot. Exports that were never used have no
series of requests.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Final
from urllib.parse import urlsplit, urlunsplit

from aiohttp import web
from prometheus_client import Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from nbdserve.control.state import State, state_of
from nbdserve.http.exposition import expose
from nbdserve.http.survey import SURVEY, Seen
from nbdserve.measuring import Measurement
from nbdserve.server.meter import BOUNDS, CommandNumbers
from snapshots.listings import VolumeInfo

routes = web.RouteTableDef()

_BOUNDS: Final = (*map(str, BOUNDS), "+Inf")
_process = ProcessCollector(registry=None)


@routes.get("/metrics")
async def metrics(request: web.Request) -> web.Response:
    state = state_of(request)
    seen = await request.app[SURVEY].look()
    measured = await state.measuring.read(state.catalogue.names_of)
    space = await state.store.space()
    families = itertools.chain(
        _of_daemon(state),
        _of_requests(measured),
        _of_volumes(state, seen),
        _of_backups(state),
        [
            _gauge("data_free_bytes", "Free space of the data directory.", space.free),
            _gauge("data_total_bytes", "Size of the data directory's file system.", space.total),
        ],
        _process.collect(),
    )
    text, content_type = await expose(families, request.headers.get("Accept", ""))
    return web.Response(body=text, headers={"Content-Type": content_type})


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"nbdserve_{name}", text, value=value)


def _labelled(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"nbdserve_{name}", text, labels=labels)


def _of_daemon(state: State) -> Iterator[Metric]:
    build = _labelled("build_info", "1, of this version.", "version")
    build.add_metric([version("nbdserve")], 1)
    yield build
    yield _gauge("merges", "Merges of layers under way or put off.", state.catalogue.merges())
    yield _gauge("start_time_seconds", "When the daemon started.", state.host.started)
    up = _labelled("worker_up", "Whether the process that serves volumes answers.", "worker")
    processes = state.measuring.processes
    for number, process in enumerate(processes):
        up.add_metric([str(number)], int(process.responding))
    if not processes:
        up.add_metric(["0"], 1)  # the daemon itself
    yield up
    restarts = CounterMetricFamily(
        "nbdserve_worker_restarts", "Workers that were started because one had died."
    )
    restarts.add_metric([], sum(process.restarts for process in processes))
    yield restarts


def _of_requests(measured: Iterable[Measurement]) -> Iterator[Metric]:
    commands = ("volume", "command")
    seconds = HistogramMetricFamily(
        "nbdserve_request_duration_seconds",
        "From the receipt of a request to its reply being sent.",
        labels=commands,
    )
    size = CounterMetricFamily(
        "nbdserve_request_bytes", "Bytes read, written, trimmed, zeroed or cached.", labels=commands
    )
    errors = CounterMetricFamily(
        "nbdserve_request_errors",
        "Requests that were answered with an error.",
        labels=(*commands, "error"),
    )
    throttled = CounterMetricFamily(
        "nbdserve_requests_throttled_seconds",
        "Seconds that connections have waited because of limits.",
        labels=["volume"],
    )
    flight = _labelled("requests_in_flight", "Requests that are not answered.", "volume")
    connections = _labelled("connections", "Clients that have the export open.", "volume")
    for one in measured:
        name = one.volume if one.snapshot is None else f"{one.volume}@{one.snapshot}"
        throttled.add_metric([name], one.numbers.throttled)
        flight.add_metric([name], one.numbers.in_flight)
        connections.add_metric([name], one.numbers.connections)
        for command, numbers in one.numbers.commands.items():
            seconds.add_metric([name, command], _buckets(numbers), numbers.seconds)
            size.add_metric([name, command], numbers.bytes)
            for error, count in numbers.errors.items():
                errors.add_metric([name, command, error], count)
    yield from (seconds, size, errors, throttled, flight, connections)


def _buckets(numbers: CommandNumbers) -> list[tuple[str, float]]:
    """The histogram as the library wants it: each bucket counts what is in those before it too."""
    return list(zip(_BOUNDS, itertools.accumulate(numbers.buckets), strict=True))


def _of_volumes(state: State, seen: Seen | None) -> Iterator[Metric]:
    if seen is None:
        return
    yield _gauge(
        "volumes_age_seconds",
        "How long ago the volumes were looked at.",
        max(0.0, time.monotonic() - seen.at),
    )
    room = seen.room
    if room is not None:
        yield _gauge("provisioned_bytes", "Sizes of all volumes.", room.provisioned)
        yield _gauge("used_bytes", "Disk space that volumes and snapshots use.", room.used)
        yield _gauge("reserved_bytes", "Disk space that volumes are promised.", room.reserved)
        yield _gauge(
            "overcommit_ratio", "Provisioned over what the disk can hold.", room.overcommit
        )
    yield _gauge("volumes", "Volumes that can be read.", len(seen.volumes))
    yield _gauge("volumes_unreadable", "Volumes that cannot be read.", len(seen.unreadable))
    readings: tuple[tuple[str, str, Callable[[VolumeInfo], int | None]], ...] = (
        ("volume_size_bytes", "Size of the volume.", lambda v: v.size),
        ("volume_mapped_bytes", "What the volume holds data for.", lambda v: v.mapped),
        ("volume_own_bytes", "Disk space that only this volume and its snapshots use.",
         lambda v: v.own),
        ("volume_shared_bytes", "Disk space that other volumes use too.", lambda v: v.shared),
        ("volume_journal_bytes", "Journal of the head, space reserved in it included.",
         lambda v: v.journal),
        ("volume_layers", "Layers of the volume.", lambda v: v.layers),
        ("volume_snapshots", "Snapshots of the volume.", lambda v: v.snapshots),
    )  # fmt: skip
    for name, text, value in readings:
        family = _labelled(name, text, "volume")
        for volume in seen.volumes:
            found = value(volume)
            if found is not None:
                family.add_metric([volume.name], found)
        yield family
    failures = state.catalogue.failures()
    read_only = _labelled(
        "volume_read_only", "Whether the volume refuses writes after a failure.", "volume"
    )
    fetched = _labelled("hydration_fetched_bytes", "What is here of a lazy restore.", "volume")
    total = _labelled("hydration_total_bytes", "What a lazy restore will have fetched.", "volume")
    for volume in seen.volumes:
        read_only.add_metric([volume.name], int(volume.name in failures))
        if volume.hydration is not None:
            fetched.add_metric([volume.name], volume.hydration.fetched)
            total.add_metric([volume.name], volume.hydration.total)
    yield from (read_only, fetched, total)


def _of_backups(state: State) -> Iterator[Metric]:
    labels = ("kind", "volume", "repository")
    done = _labelled("job_done_bytes", "What a push or restore under way has done.", *labels)
    total = _labelled("job_total_bytes", "What a push or restore under way has to do.", *labels)
    jobs: dict[tuple[str, str, str], tuple[int, int]] = {}
    for job in state.jobs.list():
        key = (job.kind, job.volume, without_credentials(job.repository))
        so_far = jobs.get(key, (0, 0))
        jobs[key] = (so_far[0] + job.done, so_far[1] + job.total)
    for key, (so_far_done, so_far_total) in jobs.items():
        done.add_metric(key, so_far_done)
        total.add_metric(key, so_far_total)
    yield from (done, total)
    pairs = ("volume", "repository")
    families = [
        (_labelled(f"backup_{name}", text, *pairs), attribute)
        for name, text, attribute in (
            ("last_success_timestamp_seconds", "When the last backup ended.", "last_success"),
            ("last_failure_timestamp_seconds", "When a backup failed last.", "last_failure"),
            ("last_duration_seconds", "How long the last backup took.", "seconds"),
            ("last_uploaded_bytes", "What the last backup uploaded.", "uploaded"),
        )
    ]
    for record in state.history.records():
        values = [record.volume, without_credentials(record.repository)]
        for family, attribute in families:
            value = getattr(record, attribute)
            if value is not None:
                family.add_metric(values, value)
    yield from (family for family, _ in families)


def without_credentials(url: str) -> str:
    """A repository's URL as it may be shown: without user, password and query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "?"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
