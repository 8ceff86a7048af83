"""What commands report of their work on repositories: how far it is, and how it ended.

A job (``jobs``) is a claim: it is listed while the answer is open. A push whose command ended
without saying how is noted as a failure (``history``), unless it is this process that ends.
"""

import dataclasses
from typing import Final

from aiohttp import web

from backends.errors import InvalidError
from nbdserve.control.bodies import Fields
from nbdserve.control.claims import hold
from nbdserve.control.history import MOST_TEXT, Success
from nbdserve.control.jobs import KINDS, Job
from nbdserve.control.state import State, state_of

routes = web.RouteTableDef()

_MOST_BYTES: Final = 1 << 60
_MOST_SECONDS: Final = 1e11


@routes.post("/v1/jobs")
async def begin_job(request: web.Request) -> web.StreamResponse:
    """``{"kind", "volume", "snapshot", "repository"}``; first line: ``{"job": id}``."""
    state = state_of(request)
    fields = await Fields.of(request)
    kind, volume, snapshot = (
        fields.text("kind"),
        _short(fields, "volume"),
        _short(fields, "snapshot"),
    )
    repository = _repository(fields)
    fields.end()
    if kind not in KINDS:
        raise InvalidError(f"'kind' must be one of {', '.join(KINDS)}")
    job = Job(kind, volume, snapshot, repository)
    identifier = state.jobs.begin(job)
    try:
        return await hold(request, {"job": identifier})
    finally:
        state.jobs.end(identifier)
        if kind == "push" and not job.settled and not state.stopping.is_set():
            why = (
                f"the command that pushed {volume}@{snapshot} ended without a word: was it killed?"
            )
            state.operations.start(_note_failure(state, volume, repository, why))


@routes.post("/v1/jobs/{job}")
async def update_job(request: web.Request) -> web.Response:
    """``{"done", "total"}``, in bytes."""
    job = state_of(request).jobs.find(request.match_info["job"])
    fields = await Fields.of(request)
    done, total = _count(fields, "done"), _count(fields, "total")
    fields.end()
    job.done, job.total = done, total
    return web.json_response({})


@routes.post("/v1/history")
async def note_outcome(request: web.Request) -> web.Response:
    """``{"volume", "repository"}`` with ``"failure"``, or with what :class:`Success` has."""
    state = state_of(request)
    fields = await Fields.of(request)
    volume, repository = fields.text("volume"), _repository(fields)
    failure = fields.optional_text("failure")
    if failure is not None:
        fields.end()
        change = _note_failure(state, volume, repository, " ".join(failure.split()))
    else:
        success = Success(
            _short(fields, "repository_id"),
            _short(fields, "snapshot"),
            fields.number("created", _MOST_SECONDS),
            _count(fields, "uploaded"),
            fields.number("seconds", _MOST_SECONDS),
        )
        fields.end()
        identifier = state.catalogue.volume_id(volume)
        change = state.history.succeeded(identifier, repository, success)
    state.jobs.settle(volume, repository)
    await state.operations.run(change)
    return web.json_response({})


@routes.delete("/v1/history")
async def forget(request: web.Request) -> web.Response:
    """``?volume=VOL&repository=URL``: for a repository that is no longer backed up to."""
    state = state_of(request)
    try:
        volume, repository = request.query["volume"], request.query["repository"]
    except KeyError as error:
        raise InvalidError(f"the query lacks {error}") from None
    identifier = state.catalogue.volume_id(volume)
    forgotten = await state.operations.run(state.history.forget(identifier, repository))
    return web.json_response({"forgotten": forgotten})


async def _note_failure(state: State, volume: str, repository: str, why: str) -> None:
    await state.history.failed(state.catalogue.volume_id(volume), repository, why)


def job_documents(state: State) -> list[dict[str, object]]:
    """The jobs, as JSON; times are seconds since the epoch."""
    return [
        {key: value for key, value in dataclasses.asdict(job).items() if key != "settled"}
        for job in state.jobs.list()
    ]


def _short(fields: Fields, name: str) -> str:
    value = fields.text(name)
    if not 0 < len(value) <= MOST_TEXT or not value.isprintable():
        raise InvalidError(f"{name!r} must be a text of 1 to {MOST_TEXT} characters")
    return value


def _repository(fields: Fields) -> str:
    url = _short(fields, "repository")
    if "@" in url:  # it could be a password, and this is shown to people
        raise InvalidError("'repository' must be a URL without '@'")
    return url


def _count(fields: Fields, name: str) -> int:
    value = fields.number(name, _MOST_BYTES)
    if not isinstance(value, int):
        raise InvalidError(f"{name!r} must be a whole number")
    return value
