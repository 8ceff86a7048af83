"""NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT, and the names of metadata contexts."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ..check import Section
from ..constants import BASE_ALLOCATION, MAX_STRING, Cmd, Errno, Option, Rep
from ..handshake import Answer, Handshake, encode_queries
from ..target import UNLIKELY_NAME, Target
from ..transmission import Mode, Transmission
from ..verdicts import Closed, Unavailable, Violation
from .asking import check_in_step, check_refused, check_survives, require_error, require_reply

QUERYING = Section("Metadata querying")
BASE = Section("The base: metadata namespace")
LIST_META = Section("NBD_OPT_LIST_META_CONTEXT")
SET_META = Section("NBD_OPT_SET_META_CONTEXT")

_BOTH = (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT)


def _ready(target: Target) -> Handshake:
    """A handshake with structured or extended replies, on a server that has contexts."""
    target.need_context()
    handshake = target.haggle()
    target.negotiate(handshake, Mode.STRUCTURED if target.facts.structured else Mode.EXTENDED)
    return handshake


def _mode(target: Target) -> Mode:
    return Mode.STRUCTURED if target.facts.structured else Mode.EXTENDED


def _query(
    target: Target, handshake: Handshake, option: Option, queries: Sequence[str], what: str = ""
) -> Answer:
    data = encode_queries(target.name, [query.encode() for query in queries])
    answer = handshake.ask(option, data, what or (", ".join(queries) or "without queries"))
    require_reply(answer, Rep.ACK)
    return answer


def _need_base(target: Target) -> None:
    target.need_context()
    target.need(BASE_ALLOCATION in target.facts.contexts, "base:allocation is not offered")


def _names(answer: Answer) -> list[str]:
    return sorted(name for _, name in answer.contexts)


def _require_none(answer: Answer) -> None:
    if answer.contexts:
        raise Violation("no metadata context", ", ".join(_names(answer)))


def _require_no_status(transmission: Transmission) -> None:
    """No context is selected: BLOCK_STATUS must be refused."""
    transmission.refuse((Errno.EINVAL,), Cmd.BLOCK_STATUS, 0, 512)


# Names


@QUERYING.must("the name MUST consist of a namespace, followed by a colon, followed by a leaf-name")
def names(target: Target) -> None:
    for name in _names(_query(target, _ready(target), Option.LIST_META_CONTEXT, ())):
        space, colon, _ = name.partition(":")
        if not space or not colon or not space.isprintable() or " " in space:
            raise Violation("a namespace, a colon and a leaf-name", repr(name))


@QUERYING.must("namespaces MUST be base, nbd-server, x-*, or one that is registered: qemu")
def namespaces(target: Target) -> None:
    for name in _names(_query(target, _ready(target), Option.LIST_META_CONTEXT, ())):
        space = name.partition(":")[0]
        if space not in ("base", "nbd-server", "qemu") and not space.startswith("x-"):
            raise Violation("a registered namespace or x-*", repr(name))


@BASE.must("base: the server MUST support this as a wildcard during LIST_META_CONTEXT")
def wildcard_in_list(target: Target) -> None:
    _need_base(target)
    answer = _query(target, _ready(target), Option.LIST_META_CONTEXT, ("base:",))
    if _names(answer) != [BASE_ALLOCATION]:
        raise Violation(BASE_ALLOCATION, ", ".join(_names(answer)) or "no context")


@BASE.must("base: the server MUST ignore this form during SET_META_CONTEXT")
def wildcard_in_set(target: Target) -> None:
    _need_base(target)
    handshake = _ready(target)
    _require_none(_query(target, handshake, Option.SET_META_CONTEXT, ("base:",)))


@BASE.must(
    "if a leaf-name is not recognized, the server MUST ignore it rather than report an error"
)
def unknown_leaf(target: Target) -> None:
    for option in _BOTH:
        for leaf in ("base:unheard-of", "base:allocation2", "base:alloc", "base:ALLOCATION"):
            _require_none(_query(target, _ready(target), option, (leaf,)))


# LIST


@LIST_META.must(
    "zero queries: the server MUST return all the metadata contexts that are available to select"
)
def without_queries(target: Target) -> None:
    _need_base(target)
    found = _names(_query(target, _ready(target), Option.LIST_META_CONTEXT, ()))
    if BASE_ALLOCATION not in found and "base:" not in found:
        raise Violation(BASE_ALLOCATION, ", ".join(found) or "no context")


@LIST_META.must("queries: the server MUST return those metadata contexts that match one of them")
def exact_query(target: Target) -> None:
    target.need_context()
    for name in target.facts.contexts:
        found = _names(_query(target, _ready(target), Option.LIST_META_CONTEXT, (name,)))
        if found != [name]:
            raise Violation(name, ", ".join(found) or "no context")


@LIST_META.must("the server MUST ignore query strings belonging to an unknown namespace")
def unknown_namespace_in_list(target: Target) -> None:
    unknown = ("x-nobody:nothing", "x-nobody:", "unregistered:a:b:c")
    answer = _query(target, _ready(target), Option.LIST_META_CONTEXT, unknown)
    _require_none(answer)
    name = target.facts.contexts[0]
    found = _names(_query(target, _ready(target), Option.LIST_META_CONTEXT, (*unknown, name)))
    if found != [name]:
        raise Violation(name, ", ".join(found) or "no context")


@LIST_META.should("the metadata context ID in these replies is reserved and SHOULD be zero")
def ids_are_zero(target: Target) -> None:
    answer = _query(target, _ready(target), Option.LIST_META_CONTEXT, ())
    if any(number for number, _ in answer.contexts):
        raise Violation("IDs of 0", str(answer.contexts))


@LIST_META.rule("listing changes nothing: what was set before it stays selected")
def listing_keeps_the_selection(target: Target) -> None:
    name = target.need_context()
    target.need_size(512)
    handshake = _ready(target)
    chosen = target.choose_contexts(handshake, (name,))
    _query(target, handshake, Option.LIST_META_CONTEXT, ())
    transmission = target.go(handshake, _mode(target), chosen)
    transmission.succeed(Cmd.BLOCK_STATUS, 0, target.block)


# LIST and SET


def _malformed(target: Target) -> list[tuple[str, bytes]]:
    name = target.name
    query = b"base:allocation"
    good = encode_queries(name, [query])
    return [
        ("without data", b""),
        ("of 3 bytes", b"\0\0\0"),
        ("without a number of queries", struct.pack(">I", len(name)) + name),
        ("with a name beyond the data", encode_queries(name, name_length=len(name) + 5)),
        ("with a name of 4 GiB", encode_queries(name, [query], name_length=0xFFFFFFFF)),
        ("with 2 queries announced, 1 sent", encode_queries(name, [query], count=2)),
        ("with 4 G queries announced, 1 sent", encode_queries(name, [query], count=0xFFFFFFFF)),
        ("with a query of 4 bytes too few", good[:-4]),
        (
            "with a query of 4 GiB",
            encode_queries(name, (), count=1) + struct.pack(">I", 0xFFFFFFFF) + query,
        ),
    ]


_SYNTAX = (
    "if the option request is syntactically invalid (such as a query length beyond the data), the "
    "server MUST fail the request with NBD_REP_ERR_INVALID"
)


@LIST_META.must(_SYNTAX)
def malformed_list(target: Target) -> None:
    target.need_context()
    variants = _malformed(target)
    check_refused(target, Option.LIST_META_CONTEXT, variants, Rep.ERR_INVALID, Rep.ERR_TOO_BIG)


@SET_META.must(_SYNTAX)
def malformed_set(target: Target) -> None:
    target.need_context()
    variants = _malformed(target)
    check_refused(target, Option.SET_META_CONTEXT, variants, Rep.ERR_INVALID, Rep.ERR_TOO_BIG)


@SET_META.rule("the data ends with the last query: more is syntactically invalid")
def trailing_data(target: Target) -> None:
    target.need_context()
    data = encode_queries(target.name, [b"base:allocation"]) + b"more"
    for option in _BOTH:
        check_refused(target, option, [("with 4 bytes behind its queries", data)], Rep.ERR_INVALID)


@SET_META.rule("a query without a colon, an empty one, or one that is no UTF-8 is answered")
def strange_queries(target: Target) -> None:
    for option in _BOTH:
        for query in (b"nocolon", b"", b":", b":leaf", b"base:\xff\xfe", b"base:a\0b"):
            handshake = _ready(target)
            answer = handshake.ask(option, encode_queries(target.name, [query]), repr(query))
            if option == Option.SET_META_CONTEXT:
                _require_none(answer)
            check_in_step(handshake)


@SET_META.must("a string MUST be no longer than 4096 bytes: a query that is: error or disconnect")
def query_too_long(target: Target) -> None:
    for option in _BOTH:
        handshake = _ready(target)
        query = b"base:" + b"q" * MAX_STRING
        try:
            answer = handshake.ask(option, encode_queries(target.name, [query]), "of 4101 bytes")
            _require_none(answer)
            check_in_step(handshake)
        except Closed:
            continue


@SET_META.rule("too many queries: answered, or NBD_REP_ERR_TOO_BIG; haggling goes on")
def many_queries(target: Target) -> None:
    for option in _BOTH:
        handshake = _ready(target)
        queries = [b"x-many:%d" % number for number in range(1000)]
        answer = handshake.ask(option, encode_queries(target.name, queries), "with 1000 queries")
        require_reply(answer, Rep.ACK, Rep.ERR_TOO_BIG)
        _require_none(answer)
        check_in_step(handshake)


@SET_META.rule("NBD_REP_ERR_UNKNOWN: the requested export is not available, here neither")
def unknown_export(target: Target) -> None:
    target.need_refused_names()
    for option in _BOTH:
        handshake = _ready(target)
        data = encode_queries(UNLIKELY_NAME.encode(), [b"base:allocation"])
        require_error(handshake.ask(option, data, "for an export that does not exist"))
        check_in_step(handshake)


@SET_META.should(
    "without structured replies or extended headers, a server SHOULD send NBD_REP_ERR_INVALID or "
    "NBD_REP_ERR_EXT_HEADER_REQD"
)
def without_structured_replies(target: Target) -> None:
    target.need_context()
    handshake = target.haggle()
    answer = handshake.ask(
        Option.SET_META_CONTEXT,
        encode_queries(target.name, [b"base:allocation"]),
        "before NBD_OPT_STRUCTURED_REPLY",
    )
    require_reply(answer, Rep.ERR_INVALID, Rep.ERR_EXT_HEADER_REQD)
    check_in_step(handshake)


@LIST_META.rule("without structured replies: answered, or NBD_REP_ERR_INVALID; haggling goes on")
def list_without_structured_replies(target: Target) -> None:
    target.need_context()
    handshake = target.haggle()
    answer = handshake.ask(
        Option.LIST_META_CONTEXT,
        encode_queries(target.name),
        "before NBD_OPT_STRUCTURED_REPLY",
    )
    require_reply(answer, Rep.ACK, Rep.ERR_INVALID, Rep.ERR_EXT_HEADER_REQD)
    check_in_step(handshake)


@SET_META.rule("malformed data does not keep a server waiting, without structured replies either")
def malformed_without_structured_replies(target: Target) -> None:
    for option in _BOTH:
        check_survives(target, option, _malformed(target))


# SET


@SET_META.must(
    "the server MUST reply with a number of NBD_REP_META_CONTEXT replies, one for each selected "
    "metadata context, each with a unique ID, followed by NBD_REP_ACK"
)
def unique_ids(target: Target) -> None:
    target.need_context()
    wanted = target.facts.contexts
    answer = _query(target, _ready(target), Option.SET_META_CONTEXT, wanted)
    numbers = [number for number, _ in answer.contexts]
    if len(numbers) != len(set(numbers)) or set(_names(answer)) != set(wanted):
        raise Violation(f"{', '.join(wanted)}, each with an ID of its own", str(answer.contexts))


@SET_META.must(
    "one reply for each selected metadata context, each with a unique ID: a query that is repeated "
    "selects it once"
)
def repeated_query(target: Target) -> None:
    name = target.need_context()
    answer = _query(target, _ready(target), Option.SET_META_CONTEXT, (name, name, name))
    if _names(answer) != [name]:
        raise Violation(f"{name} once", str(answer.contexts))


@SET_META.must("if zero queries are sent, the server MUST select no metadata contexts")
def zero_queries(target: Target) -> None:
    handshake = _ready(target)
    target.need_size(512)
    _require_none(_query(target, handshake, Option.SET_META_CONTEXT, ()))
    _require_no_status(target.go(handshake, _mode(target)))


@SET_META.must("the server MUST ignore query strings belonging to an unknown namespace")
def unknown_namespace_in_set(target: Target) -> None:
    target.need_context()
    name = target.facts.contexts[0]
    queries = ("x-nobody:nothing", name, "unregistered:a")
    answer = _query(target, _ready(target), Option.SET_META_CONTEXT, queries)
    if _names(answer) != [name]:
        raise Violation(name, ", ".join(_names(answer)) or "no context")


@SET_META.rule("issuing this command replaces all previously-set metadata contexts")
def replaced_by_a_later_one(target: Target) -> None:
    name = target.need_context()
    target.need_size(512)
    handshake = _ready(target)
    target.choose_contexts(handshake, (name,))
    _query(target, handshake, Option.SET_META_CONTEXT, ())
    _require_no_status(target.go(handshake, _mode(target)))


@SET_META.rule(
    "issuing this command replaces all previously-set metadata contexts, including when it fails"
)
def cleared_by_a_failure(target: Target) -> None:
    name = target.need_context()
    target.need_size(512)
    handshake = _ready(target)
    target.choose_contexts(handshake, (name,))
    answer = handshake.ask(
        Option.SET_META_CONTEXT,
        encode_queries(target.name, [name.encode()], count=2),
        "with 2 queries announced, 1 sent",
    )
    if answer.accepted:
        raise Unavailable("the server accepts a malformed option")
    _require_no_status(target.go(handshake, _mode(target)))


@SET_META.rule(
    "BLOCK_STATUS needs contexts that were set for the export that is opened: others do not count"
)
def for_another_export(target: Target) -> None:
    name = target.need_context()
    target.need_size(512)
    handshake = _ready(target)
    others = [other for other in target.facts.exports if other != target.uri.export]
    if target.facts.serves_any_name:
        others.append(UNLIKELY_NAME)
    for other in others:
        answer = handshake.ask(
            Option.SET_META_CONTEXT,
            encode_queries(other.encode(), [name.encode()]),
            f"{name} of export {other!r}",
        )
        if answer.accepted and answer.contexts:
            _require_no_status(target.go(handshake, _mode(target)))
            return
    raise Unavailable("there is no other export with metadata contexts")
