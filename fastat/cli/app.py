"""The commands. A user's mistake is one line, exit code 2; a failure one line, exit code 1."""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fastat import __version__
from fastat.cli.data import demo, extract, pack
from fastat.cli.doctor import doctor
from fastat.cli.paper import models, procs
from fastat.cli.profile import profile
from fastat.cli.report import report
from fastat.cli.streams import prepare_standard_streams
from fastat.cli.study import ablate, compare, landscape
from fastat.cli.train import train
from fastat.cli.trained import convert, evaluate, predict
from fastat.system.compiling import compiler_failed, compiler_said
from fastat.system.display import show_messages
from fastat.system.errors import Failure, RankZeroFailed, UserError, one_line

app = typer.Typer(
    name="fastat",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
COMMANDS: dict[str, Callable[..., object]] = {
    "demo": demo,
    "pack": pack,
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "extract": extract,
    "convert": convert,
    "models": models,
    "procs": procs,
    "profile": profile,
    "ablate": ablate,
    "compare": compare,
    "landscape": landscape,
    "report": report,
    "doctor": doctor,
}


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fastat {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version."),
    ] = False,
) -> None:
    """Train audio taggers fast, and see what every choice costs."""


PASSES_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""A command that hands to ``fastat train`` what it does not know."""
for name, command in COMMANDS.items():
    app.command(name, context_settings=PASSES_ON if command is ablate else None)(command)

OUT_OF_MEMORY = "out of memory: a smaller --batch or fewer workers need less"

# What typer raises for a wrong command line; it exports only this subclass of it.
USAGE_ERROR: Any = next(c for c in typer.BadParameter.mro() if c.__name__ == "ClickException")


def main() -> None:
    """The ``fastat`` command."""
    prepare_standard_streams()
    show_messages()
    try:
        os.getcwd()
    except FileNotFoundError:  # MKL would abort with an unclear message
        _fail("the current folder has been deleted: change to one that exists", 2)
    try:
        # standalone_mode off: usage errors come here, to be one line like every other mistake
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except RankZeroFailed as error:
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):  # Abort is a RuntimeError
        _fail("interrupted", 130)
    except USAGE_ERROR as error:
        _fail(_usage_message(error), 2)
    except UserError as error:
        _fail(str(error), 2)
    except Failure as error:
        _fail(str(error), 1)
    except RuntimeError as error:
        from fastat.system.environment import memory_is_full  # imports torch, which raised this

        if memory_is_full(error):
            _fail(OUT_OF_MEMORY, 1)
        if not compiler_failed(error):
            raise
        _fail(f"torch.compile failed ({compiler_said(error)}); --no-compile does without it", 1)
    except MemoryError:
        _fail(OUT_OF_MEMORY, 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _usage_message(error: Any) -> str:
    """typer's message; about a value of another type, pydantic wrote it, without the value."""
    message = str(error.format_message()).replace("Value error, ", "")
    for detail in getattr(error.__cause__, "errors", list)()[:1]:
        given = repr(detail["input"])
        message += "" if given in message else f", got {given}"
    return message


def _fail(message: str, code: int) -> None:
    rank = os.environ.get("RANK", "0")  # of torchrun
    who = "fastat" if rank == "0" else f"fastat, rank {rank}"
    print(f"{who}: {one_line(message)}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
