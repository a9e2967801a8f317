"""A command line: its flags, its exit code, and one line on stderr for a mistake.

This module imports nothing that is slow to import: ``--help`` and a wrong flag are answered before torch is imported.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from train.keys import CLASSIFY, KEYS, flags_of

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from train.config import Settings

EXIT_DONE = 0
EXIT_USAGE_ERROR = 2  # a mistake of the user's, or of the machine (a full disk)
EXIT_INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: saved after SIGTERM, SIGUSR1 or SIGINT; the same command goes on


class Program(NamedTuple):
    """A command line that configures a run.

    Attributes:
        name, description: What its help and messages say.
        flags: Its flags, and the keys that they set.
        recipe: The recipe that is read where --cfg names none.
        task: The TASK that it is for.
    """

    name: str
    description: str
    flags: Mapping[str, str]
    recipe: str | None = None
    task: str = CLASSIFY


MAIN = Program(
    "main_repopt.py",
    "Search scales (-hs), train a plain network with them (-target), evaluate it, measure its speed.",
    flags_of(CLASSIFY),
)


def parse_flags(argv: Sequence[str], program: Program) -> argparse.Namespace:
    """Return what a command line says: `cfg`, `opts`, and by their keys the flags that were given (else None).

    Prints the help and exits where --help is asked for; a wrong flag is one line on stderr and exits with 2.
    """
    parser = _Parser(
        prog=program.name,
        description=program.description,
        epilog="Any key of train/keys.py is set by --opts or a recipe; --opts wins over flags, flags over --cfg.",
        allow_abbrev=False,
    )
    for flag, name in program.flags.items():
        key = KEYS[name]
        if isinstance(key.default, bool):
            parser.add_argument(flag, dest=name, action="store_const", const="True", help=key.help)
        else:
            metavar = "|".join(filter(None, key.choices)) if key.choices else name.split(".")[-1]
            parser.add_argument(flag, dest=name, help=key.help, metavar=metavar)
    default = f" (default: {program.recipe})" if program.recipe else ""
    parser.add_argument("--cfg", metavar="FILE", help=f"YAML recipe{default}.")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="Set by old launchers; LOCAL_RANK counts.")
    parser.add_argument("--opts", nargs="*", metavar="KEY VALUE", help="Any other keys and their values.")
    flags, opts = _without_opts(argv, {*program.flags, "-h", "--help", "--cfg", "--local_rank", "--local-rank"})
    arguments, rest = parser.parse_known_args(flags)
    arguments.opts = opts
    if rest:
        near = difflib.get_close_matches(rest[0].lower(), [*program.flags, "--cfg", "--opts"], n=1, cutoff=0.5)
        parser.error(f"unknown flag {rest[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return arguments


def _without_opts(argv: Sequence[str], known: Collection[str]) -> tuple[list[str], list[str]]:
    """Return a command line without its --opts, and what follows them: argparse would take -1e+16 for a flag."""
    flags: list[str] = []
    opts: list[str] = []
    taking = False
    for word in argv:
        if word == "--opts" or word.split("=")[0] in known:
            taking = word == "--opts"
        is_value = taking and (len(opts) % 2 == 1 or not word.startswith("-"))
        if word != "--opts":
            (opts if is_value else flags).append(word)
    return flags, opts


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_mistake(self.prog, message))


def train(settings: Settings, argv: Sequence[str], program: Program) -> CfgNode | None:
    """Train, evaluate or measure, as `train.run.start` does."""
    from train import run  # imports torch, which takes seconds

    return run.start(settings, argv, program)


def run_program(
    program: Program,
    argv: Sequence[str] | None,
    *,
    start: Callable[[Settings, Sequence[str], Program], CfgNode | None] = train,
    draw: Callable[[CfgNode], None] | None = None,
) -> int:
    """Configure and do a run, and return its exit code.

    Args:
        program: Whose command line it is.
        argv: The command line; None: this process's.
        start: Does the run, and returns its configuration; None where a signal stopped it.
        draw: Draws what came of it, in the first process.
    """
    argv = sys.argv[1:] if argv is None else argv
    flags = parse_flags(argv, program)

    def command() -> int:
        from train import config

        cfg = start(config.read(flags, program), argv, program)
        if cfg is None:
            return EXIT_INTERRUPTED
        if draw is not None and os.environ.get("RANK", "0") == "0":
            draw(cfg)
        return EXIT_DONE

    return run_command(program.name, command)


def run_command(name: str, command: Callable[[], int | None]) -> int:
    """Return the exit code of a command (0 for None); what stops it, of user or machine, is one line on stderr."""
    from repopt.errors import UserError  # imports torch, which takes seconds

    try:
        return command() or EXIT_DONE
    except UserError as error:
        message = str(error)
    except OSError as error:  # of the machine: no permission, no space, a path that is none
        message = f"{error.strerror or error}: {error.filename}" if error.filename else error.strerror or str(error)
    return _mistake(name, message)


def _mistake(name: str, message: str) -> int:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)  # mostly the first process has the same to say; torchrun then ends this one before it does
    print(f"{name}: {message}", file=sys.stderr)
    return EXIT_USAGE_ERROR
