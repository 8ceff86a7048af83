"""The command line of nbd-conformance."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from collections.abc import Sequence

from . import report
from .catalogue import CHECKS
from .check import Check
from .runner import Runner
from .strings import printable
from .target import Target
from .tls import Tls, TlsError, gather
from .uri import UriError, parse_uri
from .verdicts import Level, Refused, Result, Unreachable, Verdict

GOOD, FINDINGS, USAGE, UNREACHABLE = range(4)
INTERRUPTED = 130

_DESCRIPTION = """\
Check an NBD server against the protocol's specification, point by point.

URI names the server and one of its exports, as in libnbd and qemu:
  nbd://HOST[:PORT]/EXPORT            nbds://...        the same over TLS
  nbd+unix:///EXPORT?socket=PATH      nbds+unix://...
with tls-certificates=DIRECTORY among the queries for TLS.
"""

_EPILOG = """\
What is at stake: without --write nothing is sent that could change the export if the server did
as it was asked, or did something else instead of refusing it. With --write the content of the
export is overwritten and not restored; on a read-only export, too, should the server not keep it
read-only. Whoever else is connected may be disturbed: one point is whether a server stays up.

Every check says which sentence it tests, and how strong that is:
  MUST    the specification says MUST, MUST NOT or REQUIRED
  SHOULD  it says SHOULD, SHOULD NOT or RECOMMENDED
  RULE    it says so without such a word (a format, a definition), or it follows from what it says

Exit status: 0 no findings that count; 1 some (those of MUST; with --strict all), or checks that
could not be carried out because the server has gone, or never let us in; 2 wrong usage; 3 no
connection to begin with, or no such export.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    try:
        status = _main(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINDINGS


def _main(arguments: Sequence[str] | None) -> int:
    options = _parse(arguments)
    checks = _select(options.only)
    if not checks:
        return _complain(f"no check matches {' '.join(options.only)}; --list shows them all")
    if options.list:
        print(report.format_list(checks))
        return GOOD
    if options.uri is None:
        return _complain("no URI given; --help tells more")
    try:
        uri = parse_uri(options.uri)
        tls = gather(
            uri,
            Tls(
                options.tls_ca,
                options.tls_certificate,
                options.tls_key,
                options.tls_server_name,
                not options.tls_no_verify,
            ),
        )
        if uri.tls:
            tls.context()
    except (UriError, TlsError) as error:
        return _complain(str(error))
    target = Target(uri, tls, options.timeout)
    try:
        target.explore()
    except Unreachable as error:
        return _complain(f"no connection: {error}", UNREACHABLE)
    except Refused as error:
        return _complain(f"{uri}: {error}", UNREACHABLE)
    results = _run(target, checks, options)
    if options.json:
        print(report.format_json(str(uri), target.facts, results))
    elif options.markdown:
        print(report.format_markdown(str(uri), target.facts, results))
    else:
        for note in target.facts.notes:
            print(f"note: {printable(note)}")
        print(f"\n{report.summarize(results)}")
    if target.facts.broken:
        _complain(f"most was not checked: {target.facts.refusal}")
        return FINDINGS
    return _status(results, strict=options.strict)


def _run(target: Target, checks: Sequence[Check], options: argparse.Namespace) -> list[Result]:
    runner = Runner(target, write=options.write, patience=options.patience)
    table = not (options.json or options.markdown)
    if table:
        for what, how in target.facts.describe():
            print(f"{what + ':':<20}{printable(how)}")
        print()
    results = []
    gone = False
    for result in runner.run(checks):
        results.append(result)
        interesting = result.verdict in (Verdict.FAIL, Verdict.ERROR)
        if table and not gone and (interesting or not options.quiet):
            print(report.format_row(result), flush=True)
        gone = runner.server_is_gone
    return results


def _status(results: Sequence[Result], *, strict: bool) -> int:
    found = report.count_findings(results)
    counted = sum(found.values()) if strict else found[Level.MUST]
    broken = any(result.verdict is Verdict.ERROR for result in results)
    return FINDINGS if counted or broken else GOOD


def _select(patterns: Sequence[str]) -> list[Check]:
    if not patterns:
        return list(CHECKS)
    return [
        check
        for check in CHECKS
        if any(fnmatch.fnmatchcase(check.name, f"*{pattern}*") for pattern in patterns)
    ]


def _complain(line: str, status: int = USAGE) -> int:
    print(f"nbd-conformance: {printable(line)}", file=sys.stderr)
    return status


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "nbd-conformance",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("uri", metavar="URI", nargs="?", help="the server and its export")
    add("--write", action="store_true", help="run the checks that overwrite the export, too")
    add(
        "--only",
        metavar="PATTERN",
        action="append",
        default=[],
        help="run the checks whose names hold PATTERN (with * and ?); may be repeated",
    )
    add("--list", action="store_true", help="list the checks and their sentences, then end")
    add("--strict", action="store_true", help="findings of SHOULD and RULE count for the status")
    add("--quiet", action="store_true", help="show only what failed")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown")
    add(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=3.0,
        help="how long to wait for a reply (default 3)",
    )
    add(
        "--patience",
        metavar="SECONDS",
        type=_seconds,
        default=5.0,
        help="how long a server that has crashed may take to be back (default 5)",
    )
    tls = parser.add_argument_group("TLS")
    tls.add_argument(
        "--tls-ca",
        metavar="FILE",
        default="",
        help="certificates that sign the server's (default: the system's)",
    )
    tls.add_argument("--tls-certificate", metavar="FILE", default="", help="our own certificate")
    tls.add_argument("--tls-key", metavar="FILE", default="", help="its key")
    tls.add_argument(
        "--tls-server-name",
        metavar="NAME",
        default="",
        help="name in the server's certificate (default: the host of the URI)",
    )
    tls.add_argument("--tls-no-verify", action="store_true",
                     help="accept any certificate of the server")  # fmt: skip
    return parser.parse_args(arguments)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError("between 0 and 3600 seconds")
    return value
