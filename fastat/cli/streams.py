"""Standard streams that take whatever is printed."""

import codecs
import io
import os
import sys


def prepare_standard_streams() -> None:
    """Makes the standard streams ready for everything that is printed: an entry's first act.

    One that is closed becomes /dev/null: the next file opened would take its number, and what
    libraries print would end up in that file. Names of files and classes may hold what the
    terminal's encoding does not have: ``_encode_anything``.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            assert opened == number
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))
    codecs.register_error("fastat", _encode_anything)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fastat")


def _encode_anything(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a file name that are no text come out as they are, other characters escaped."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)
