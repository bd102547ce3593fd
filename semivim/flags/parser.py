"""A command line parser: errors of one line, help with ranges and defaults, values from a YAML file checked alike."""

import argparse
import difflib
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from timm.utils import ParseKwargs

from semivim.utils.files import load_yaml
from semivim.utils.terminal import escape
from semivim.utils.user_error import did_you_mean_file, one_line, short

_logger = logging.getLogger(__name__)


class Number:
    """Type of a numeric flag: finite, and inside an interval.

    Args:
        low: Lower end; none if None.
        high: Upper end; none if None. Only together with ``low``.
        kind: ``float`` or ``int``.
        ends: Which ends belong to the interval: ``[]``, ``(]``, ``[)`` or ``()``.
    """

    def __init__(
        self,
        low: float | None = None,
        high: float | None = None,
        kind: Callable[[str], float] = float,
        ends: str = "[]",
    ) -> None:
        self.low, self.high, self.kind, self.ends = low, high, kind, ends

    @property
    def interval(self) -> str:
        """The interval as an error and the help say it."""
        if self.low is None:
            return ""
        if self.high is not None:
            return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"
        return f"> {self.low}" if self.ends[0] == "(" else f">= {self.low}"

    def __call__(self, text: str) -> float:
        """Read a value, or raise an argparse error that names it and what is wanted."""
        try:
            value = self.kind(text)
            fits = math.isfinite(value) and self._holds(value)
        except (ValueError, OverflowError):
            fits = False
        if not fits:
            noun = "whole number" if self.kind is int else "finite number"
            raise argparse.ArgumentTypeError(f"{text} is not a {noun} {self.interval}".rstrip())
        return value

    def _holds(self, value: float) -> bool:
        if self.low is not None and (value < self.low or (value == self.low and self.ends[0] == "(")):
            return False
        return self.high is None or value < self.high or (value == self.high and self.ends[1] == "]")


COUNT = Number(1, kind=int)
COUNT_OR_NONE = Number(0, kind=int)
SEED = Number(0, 2**31 - 1, kind=int)
SHARE = Number(0, 1)
SHARE_BELOW_ONE = Number(0, 1, ends="[)")
POSITIVE = Number(0, ends="()")
NON_NEGATIVE = Number(0)


class Name:
    """Type of a flag that is one of many names, too many to list in an error.

    Args:
        kind: What an error calls one of the names.
        names: Gives the names; called when a value is read.
    """

    def __init__(self, kind: str, names: Callable[[], Iterable[str]]) -> None:
        self.kind, self.names = kind, names

    def __call__(self, text: str) -> str:
        """Give the name back, or raise an argparse error that suggests the nearest."""
        names = list(self.names())
        if text not in names and text.lower() not in names:  # timm takes its optimizers in any case
            raise argparse.ArgumentTypeError(f"{text!r} is not {self.kind}{_suggest(text.lower(), names)}")
        return text


def assignment(text: str) -> str:
    """Type of a word of a ``ParseKwargs`` flag: ``NAME=VALUE``."""
    if not text.partition("=")[0].isidentifier() or "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return text


class _Help(argparse.HelpFormatter):
    """Adds the range of a number and the default of a flag to its help."""

    def _get_help_string(self, action: argparse.Action) -> str:
        notes = [action.type.interval] if isinstance(action.type, Number) else []
        default = action.default
        if not (default is None or default is False or default in ("", argparse.SUPPRESS, {})):
            values = default if isinstance(default, list) else [default]
            shown = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
            notes.append(f"default {shown}")
        return "; ".join(filter(None, [action.help, *notes]))

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if isinstance(action.type, Number):
            return "N" if action.type.kind is int else "X"
        return super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and suggest the nearest flag.

    Attributes:
        checks: What :meth:`check` calls; a function that adds a group of flags appends the check of that group.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Help, **options)
        self.checks: list[Callable[[Parser, argparse.Namespace], None]] = []
        self._unused: dict[str, list[str]] = {}

    def check(self, args: argparse.Namespace) -> None:
        """Exit with one line where flags contradict each other, or one is given that nothing would read.

        Flags that are left unused for good reason are logged in one line (see :meth:`name_unused`).
        """
        for check in self.checks:
            check(self, args)
        for holder, flags in self._unused.items():
            _logger.warning("%s leaves unused: %s", holder, ", ".join(flags))

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line, naming the nearest known flag where one was misspelt."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            flags = self._option_strings()
            suggestions = (_suggest(word.split("=")[0], flags) for word in message.removeprefix(prefix).split())
            message += next(filter(None, suggestions), "")
        self.exit(2, f"{self.prog}: error: {escape(message)}\n")

    def _option_strings(self) -> list[str]:
        """All flags, those of subcommands included."""
        flags = [option for action in self._actions for option in action.option_strings]
        for action in self._actions:
            if isinstance(action.choices, dict):  # subcommands
                flags += [option for command in action.choices.values() for option in command._option_strings()]
        return flags

    def read_config(self, path: str) -> dict[str, Any]:
        """Read a YAML file of flag values and hold each key and value against the flags.

        Args:
            path: File of ``flag: value`` lines, names as in the namespace.

        Returns:
            Values as the command line would give them.

        Raises:
            SystemExit: With status 2 and one line, for an unreadable file, an unknown key or a bad value.
        """
        try:
            values = load_yaml(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            self.error(f"--config {path}: {error.strerror}{did_you_mean_file(path)}")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"--config {path}: not YAML: {one_line(error)}")
        if not isinstance(values, dict):
            self.error(f"--config {path}: wanted 'flag: value' lines, got {type(values).__name__}")
        return self.checked(values, f"--config {path}")

    def checked(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Give values the types that the command line would give them, and refuse those that it would refuse.

        Args:
            values: A value for each flag, by its name in the namespace.
            where: What an error calls their source.
        """
        actions = {action.dest: action for action in self._actions if action.dest not in ("help", "config")}
        result = {}
        for key, value in values.items():
            if key not in actions:
                self.error(f"{where}: unknown key '{key}'{_suggest(str(key), actions)}")
            try:
                result[key] = _typed(actions[key], value)
            except (argparse.ArgumentTypeError, ValueError) as error:
                self.error(f"{where}: {key}: {error}")
        return result

    def refuse_falling(self, args: argparse.Namespace, names: str, equal: bool = False) -> None:
        """Exit with one line where the values of a flag do not rise.

        Args:
            args: The parsed flags.
            names: Names of flags with several values.
            equal: Take neighbours that are the same.
        """
        for name in names.split():
            values = getattr(args, name) or []
            if not all(a < b or (equal and a == b) for a, b in itertools.pairwise(values)):
                self.error(f"argument {flag(name)}: wanted rising values, got {spaced(values)}")

    def refuse_unread(self, args: argparse.Namespace, conditions: Mapping[str, tuple[object, str]]) -> None:
        """Exit with one line where a flag is given that nothing would read.

        Args:
            args: The parsed flags; a flag counts as given where it differs from its default, or its ``-c`` file's.
            conditions: A condition in words, with whether it holds and the names of flags that are read only then.
        """
        for condition, (holds, names) in conditions.items():
            for name in names.split():
                value = getattr(args, name)
                if not holds and value != self.get_default(name):
                    self.error(f"{flag(name)} is read only with {condition}, got {value}")

    def name_unused(self, args: argparse.Namespace, holder: str, names: str) -> None:
        """Note which of the given flags are left unused, for the one line of a holder that :meth:`check` logs.

        Args:
            args: The parsed flags.
            holder: What leaves them unused.
            names: Names of the flags.
        """
        if given := [flag(name) for name in names.split() if getattr(args, name) != self.get_default(name)]:
            self._unused.setdefault(holder, []).extend(given)


def _suggest(word: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _typed(action: argparse.Action, value: Any) -> Any:
    """Give one YAML value the type that the command line would give it; a flag's own default is always right."""
    if type(value) is type(action.default) and value == action.default:
        return value
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError(f"wanted true or false, got {short(value)}")
        return value
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise argparse.ArgumentTypeError(f"wanted a mapping from names, got {short(value)}")
        return value
    if action.nargs is not None and action.nargs != "?":
        wanted = f"{action.nargs} values" if isinstance(action.nargs, int) else "values"
        if not isinstance(value, list) or not value or (isinstance(action.nargs, int) and len(value) != action.nargs):
            raise argparse.ArgumentTypeError(f"wanted a list of {wanted}, got {short(value)}")
        return [_scalar(action, item) for item in value]
    return _scalar(action, value)


def _scalar(action: argparse.Action, value: Any) -> Any:
    if value is None or isinstance(value, (dict, list, bool)):
        raise argparse.ArgumentTypeError(f"wanted one value, got {short(value)}")
    value = action.type(str(value)) if callable(action.type) else str(value)
    if action.choices is not None and value not in action.choices:
        raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(map(str, action.choices))}")
    return value


def flag(name: str) -> str:
    """A flag as the command line has it, of its name in the namespace."""
    return f"--{name.replace('_', '-')}"


def spaced(values: Sequence[float]) -> str:
    """Numbers as the command line has them."""
    return " ".join(f"{value:g}" for value in values)


def parse_flags(
    parser: Parser, argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Parse ``defaults``, then ``-c FILE.yaml``, then the command line; what comes later wins.

    Args:
        parser: The script's parser; it gets ``-c``, and what was set becomes the flags' defaults.
        argv: Words of the command line; None takes ``sys.argv``.
        defaults: Values in place of the flags' own defaults.

    Returns:
        The namespace, without ``config``.

    Raises:
        SystemExit: With status 2 and one line, for an unreadable file, an unknown key or a bad value.
    """
    parser.usage = "%(prog)s [-c FILE] [--FLAG VALUE ...]"
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file of defaults, keys as in a run's args.yaml")
    first = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("-c", "--config")
    known, _ = first.parse_known_args(argv)
    values = parser.checked(defaults or {}, "defaults") | (parser.read_config(known.config) if known.config else {})
    parser.set_defaults(**values)
    args = parser.parse_args(argv)
    del args.config
    return args
