"""Types of command-line arguments that subjects share."""

from __future__ import annotations

import argparse
import math

from benchmarks.timing import Rounds


def positive(text: str) -> int:
    """Return a whole number from 1 on."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def above_zero(text: str) -> float:
    """Return a number above 0, infinity included."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def add_rounds(parser: argparse.ArgumentParser, default: int) -> None:
    """Add the arguments that say how often contenders take turns; `rounds_of` reads them."""
    rounds = "in which all take turns; medians are reported (default: %(default)s)"
    parser.add_argument("--rounds", type=positive, default=default, help=rounds)
    seconds = "of a comparison, after which no round begins; medians are of the rounds until then, of one at least"
    parser.add_argument("--seconds", type=above_zero, default=math.inf, help=f"{seconds} (default: no limit)")


def rounds_of(arguments: argparse.Namespace) -> Rounds:
    """Return the rounds that the command line asks for."""
    return Rounds(arguments.rounds, arguments.seconds)
