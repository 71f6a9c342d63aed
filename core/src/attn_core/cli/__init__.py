"""The command `attn`: finds the subcommand, and turns every error into a message and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

from attn_core.errors import AttnError

#: what a subcommand is for; its code is attn_core.cli.<name with underscores>:command, imported when it is called
COMMANDS: Final = {
    "list-backends": "Every installed backend: usable here or why not, what it can do, how that was proved.",
    "info": "All that one backend claims, clause by clause, in words.",
    "explain": "The plan for a model: which backend runs each phase, why, and why not the others.",
    "doctor": "This machine, its drivers, and each plugin loaded with a time limit.",
    "generate": "Text from a real model over the paged cache.",
    "verify": "Prove what a backend claims: the conformance kit.",
    "matrix": "The support matrix, from manifests and evidence.",
    "bench": "Time a backend's phases on this device.",
    "tune": "Measure which backend is fastest for a model here, for auto to choose by.",
    "warmup": "Compile or load ahead what a backend needs for a model.",
    "new": "A new plugin package that works, from a template.",
    "completion": "The completion script of a shell.",
}

#: exit code of an error that nobody foresaw (EX_SOFTWARE of sysexits.h); AttnError carries its own, 1 to 5
UNEXPECTED: Final = 70
#: a file or a stream that cannot be read or written: a full disk, a folder that is not there (EX_IOERR)
IO_FAILED: Final = 74
INTERRUPTED: Final = 130
#: what a shell reports of a command that a closed pipe ended (128 + SIGPIPE)
PIPE_CLOSED: Final = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``attn`` with these arguments (default: the process's own) and give its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if sys.stderr is None:  # closed by whoever called us
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    if sys.stdout is None:
        print("attn: stdout is closed", file=sys.stderr)
        return IO_FAILED
    try:
        code = _run(args)
        sys.stdout.flush()  # here, where a full disk is an error with a message and a code
        return code
    except AttnError as error:
        return fail(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit, and would complain about the same pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        if os.environ.get("ATTN_DEBUG") == "1":
            raise
        if isinstance(error, OSError) and error.strerror:
            return _failed_io(error)
        print(f"attn: unexpected {type(error).__name__}: {error}", file=sys.stderr)
        print("next: ATTN_DEBUG=1 shows where; this is a bug, please report it", file=sys.stderr)
        return UNEXPECTED


def _failed_io(error: OSError) -> int:
    """Say what cannot be read or written. What is left for stdout goes nowhere, or the interpreter would try again."""
    where = f": {error.filename}" if error.filename else ""
    print(f"attn: {error.strerror}{where}\nnext: ATTN_DEBUG=1 shows what was read or written", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return IO_FAILED


def fail(error: AttnError) -> int:
    """Say on stderr what went wrong; the exit code that the error carries."""
    print(f"attn: {error} [{error.code}]" if "\n" not in str(error) else _with_code(error), file=sys.stderr)
    return error.exit_code


def _with_code(error: AttnError) -> str:
    first, _, rest = str(error).partition("\n")
    return f"attn: {first} [{error.code}]\n{rest}"


def _run(args: list[str]) -> int:
    # Listing without click: shells call it for every completion, and click is a third of its time.
    if args[:1] == ["list-backends"]:
        from attn_core.cli import listing

        if set(args[1:]) <= listing.FLAGS:
            return listing.list_backends(args[1:])
    from attn_core.cli import group

    return group.run(args)
