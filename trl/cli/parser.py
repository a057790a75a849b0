"""Parse the command line and YAML files into option values: `trl sft --config sft.yaml --learning_rate 1e-5`.

The command line overrides files, and later files override earlier ones. Defaults are filled in by the dataclasses that
receive the values. Every error is a ConfigError that names the option or key, what it was given, and what it takes.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import dropwhile
from pathlib import Path
from typing import Any, NoReturn

import yaml

from trl.cli.fields import REQUIRED, Option, merge_options, options_of
from trl.cli.other_words import counterparts, suggest_option, tool_of
from trl.cli.values import FALSE, NONE, TRUE, Mismatch, from_data, from_words
from trl.compat.options import asks_for_nothing, said_today
from trl.errors import ConfigError, TrlError, suggest, suggest_beside
from trl.option_bounds import check_share
from trl.option_types import settable

logger = logging.getLogger(__name__)

HELP = {"-h": "short", "--help": "short", "--help-all": "all", "--help_all": "all"}
NEGATION = "no_"
RESUMES = "resume_from_checkpoint"
"""The option of text, the name of a checkpoint, that may also be true (the newest one) or false."""


MOST_NODES = 100_000
"""Maximum number of values in a YAML file; values that an alias repeats count again."""
KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


@dataclass
class ParsedOptions:
    """The result of parsing a command line and its files: option values, environment variables, and remaining words."""

    values: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    rest_of_files: list[str] = field(default_factory=list)
    """Unknown keys of files and their values, written as words."""
    help: str = ""
    """"short" or "all" if help was requested, else empty."""
    outdated: dict[str, Any] = field(default_factory=dict)
    """Options of older versions that no longer have an effect, and their values."""

    def arguments_for(self, cls: type) -> Any:
        """An instance of the dataclass `cls`, from the values of its fields."""
        names = [f.name for f in settable(cls) if f.init and f.name in self.values]
        return cls(**{name: self.values[name] for name in names})


class OptionParser:
    """Parses words and files; `aliases` maps old names of options to current ones, or to "" for a removed option."""

    def __init__(self, options: Sequence[Option], aliases: Mapping[str, str] | None = None) -> None:
        self.options = {option.name: option for option in options}
        self.aliases = {old: new for old, new in (aliases or {}).items() if new in ("", *self.options)}

    def parse(
        self, words: Sequence[str], *, keep_words: bool = False, keep_rest: bool = False, keep_keys: bool = False
    ) -> ParsedOptions:
        """Parse `words` and the files named in them.

        With `keep_words`, positional words are collected in `rest` instead of refused; with `keep_rest`, unknown
        options too; with `keep_keys`, unknown keys of files in `rest_of_files`. Raises ConfigError.
        """
        given = ParsedOptions(help=next((HELP[word] for word in words if word in HELP), ""))
        if given.help:
            return given
        spoken = self._read_words(list(words), given, keep_words, keep_rest)
        for path in given.files:
            self._read_file(path, given, keep_keys)
        given.values |= spoken
        missing = [o for o in self.options.values() if o.default is REQUIRED and o.name not in given.values]
        if missing:
            what = f" {missing[0].summary}" if missing[0].help else ""
            raise ConfigError(f"--{missing[0].name} is missing: it takes {missing[0].kind}.{what}")
        return given

    def _today(self, name: str) -> str | None:
        """The current name of an option, "" for a removed option, None for an unknown one."""
        name = name.replace("-", "_")
        if name in self.options:
            return name
        return self.aliases.get(name)

    # ---- words ----

    def _read_words(self, words: list[str], given: ParsedOptions, keep_words: bool, keep_rest: bool) -> dict[str, Any]:
        values: dict[str, Any] = {}
        spelled: dict[str, str] = {}
        mistakes: list[str] = []
        before = ""
        while words:
            word = words.pop(0)
            name, equals, text = word.removeprefix("--").partition("=")
            try:
                if word.startswith("--"):
                    self._refuse_two_names(f"--{name}", self._today(name), spelled)
                if word.startswith("--") and self._read_option(name, [text] if equals else None, words, values, given):
                    before = name
                elif keep_rest or (keep_words and not word.startswith("-")):
                    given.rest.append(word)
                elif word.startswith("--"):
                    self._refuse_option(name)
                else:
                    self._refuse_word(word, before)
            except ConfigError as error:
                mistakes.append(str(error))
                words[:] = dropwhile(lambda each: not each.startswith("--"), words)  # the values of the refused option
        raise_all(mistakes)
        return values

    def _refuse_two_names(self, name: str, today: str | None, spelled: dict[str, str]) -> None:
        """Raise ConfigError if an option is given under two names; `spelled` maps current names to the given ones."""
        plain = name.lstrip("-").replace("-", "_")
        if today and spelled.setdefault(today, plain) != plain:
            raise ConfigError(f"{spelled[today]} and {plain} are two names of the option {today}: keep one.")

    def _read_option(
        self, name: str, attached: list[str] | None, words: list[str], values: dict[str, Any], given: ParsedOptions
    ) -> bool:
        """Store an option's value (`attached` by "=", or the words after it) in `values`. False for an unknown
        option."""
        found = self._today(name)
        if name == "config" and name not in self.options:
            given.files += attached or self._take_many(words, name, "a YAML file")
        elif found:
            values[found] = self._value(name, self.options[found], words, attached)
            check_share(name.replace("-", "_"), values[found])
        elif found == "":
            self._store_outdated(name.replace("-", "_"), self._outdated_value(words, attached), values, given)
        elif switch := self._negated(name):
            values[switch] = False
        else:
            return False
        return True

    def _negated(self, name: str) -> str | None:
        """The switch that `--no_name` turns off, or None."""
        name = name.replace("-", "_")
        switch = self._today(name.removeprefix(NEGATION)) if name.startswith(NEGATION) else None
        return switch if switch and "bool" in self.options[switch].kind.scalars else None

    def _value(self, name: str, option: Option, words: list[str], attached: list[str] | None) -> Any:
        kind = option.kind
        if attached is None and kind.item is None and "bool" in kind.scalars and not self._next_is_value(words, option):
            return True
        if attached is None:
            take = self._take_one if kind.item is None else self._take_many
            attached = take(words, name, str(kind))
        if len(attached) == 1 and attached[0] == option.default:
            return option.default
        if option.name == RESUMES and attached[0] in ("true", "false"):
            return attached[0] == "true"
        try:
            return from_words(kind, attached)
        except Mismatch as error:
            shown = " ".join(attached)
            raise ConfigError(f"--{name} was given {shown!r}, but takes {error}.{_nearest(option, shown)}") from None

    def _next_is_value(self, words: list[str], option: Option) -> bool:
        """True if the word after a switch is its value."""
        if not words or words[0].startswith("--"):
            return False
        if set(option.kind.scalars) <= {"bool", "none"} and not option.kind.choices:
            return words[0].lower() in TRUE + FALSE + (NONE if "none" in option.kind.scalars else ())
        return True

    def _take_one(self, words: list[str], name: str, expected: str) -> list[str]:
        if not words or words[0].startswith("--"):
            raise ConfigError(f"--{name} was given nothing, but takes {expected}.")
        return [words.pop(0)]

    def _take_many(self, words: list[str], name: str, expected: str) -> list[str]:
        taken = self._take_one(words, name, expected)
        while words and not words[0].startswith("--"):
            if "_" in words[0] and words[0].replace("-", "_") in self.options:
                self._refuse_word(words[0], name)
            if words[0].startswith("-") and words[0][1:2].isalpha():
                self._refuse_word(words[0], "")
            taken.append(words.pop(0))
        return taken

    def _outdated_value(self, words: list[str], attached: list[str] | None) -> Any:
        """The value of an option that no longer has an effect: True for a switch, or the words after it."""
        taken = list(attached or ())
        while attached is None and words and not words[0].startswith("--"):
            taken.append(words.pop(0))
        return taken if len(taken) > 1 else not taken or taken[0].lower() not in FALSE

    def _store_outdated(self, name: str, value: Any, values: dict[str, Any], given: ParsedOptions) -> None:
        """Store what a removed option says in today's words in `values`, or else the option itself in `given.outdated`."""
        today, now = said_today(name, value) or ("", None)
        if today in self.options:
            values[today] = now
        else:
            given.outdated[name] = value

    def _refuse_word(self, word: str, before: str) -> NoReturn:
        name = before.replace("-", "_")
        if name in self.options and word not in self.options:
            raise ConfigError(f"Unexpected {word!r} after --{before}, which takes {self.options[name].kind}.")
        if not before and Path(word).is_file() and "dataset_name" in self.options:
            raise ConfigError(
                f"Unexpected {word!r}: options start with two dashes. Did you mean '--dataset_name {word}'?"
            )
        if not before and (Path(word).is_dir() or word.count("/") == 1) and "model_name_or_path" in self.options:
            raise ConfigError(
                f"Unexpected {word!r}: options start with two dashes. Did you mean '--model_name_or_path {word}'?"
            )
        dashes = f" Did you mean '--{word.lstrip('-')}'?" if word.lstrip("-").replace("-", "_") in self.options else ""
        raise ConfigError(f"Unexpected {word!r}: options start with two dashes.{dashes}")

    def _renamed(self) -> list[str]:
        """Older names of options that have an effect."""
        return [old for old, new in self.aliases.items() if new]

    def _refuse_option(self, name: str) -> NoReturn:
        hint = suggest_option(name, self.options, ("config", *self._renamed()), dashes="--")
        raise ConfigError(f"Unknown option --{name}.{hint}")

    # ---- files ----

    def _read_file(self, path: str, given: ParsedOptions, keep_keys: bool) -> None:
        data = read_yaml(path, "--config") or {}
        if not isinstance(data, dict):
            raise ConfigError(
                f"{path}: a configuration is a list of `option: value` lines, not a {type(data).__name__}."
            )
        environment = data.pop("env", None) or {}
        if not isinstance(environment, dict):
            raise ConfigError(f"{path}: env takes names of environment variables with values, not {environment!r}.")
        given.environment |= {str(name): str(value) for name, value in environment.items()}
        mistakes, strange = [], []
        spelled: dict[str, str] = {}
        for key, value in data.items():
            name = self._today(str(key))
            self._refuse_two_names(str(key), name, spelled)
            if name is None and keep_keys:
                given.rest_of_files += [f"--{key}", str(value)]
            elif name is None and asks_for_nothing(str(key), value):
                given.outdated[str(key)] = value
            elif name is None:
                strange.append(str(key))
                hint = suggest_option(str(key), self.options, (*self._renamed(), "env"))
                mistakes.append(f"unknown key {key!r}.{hint}")
            elif not name:
                self._store_outdated(str(key), value, given.values, given)
            else:
                try:
                    given.values[name] = self._checked(str(key), self.options[name], value)
                    check_share(str(key), given.values[name])
                except (Mismatch, ConfigError) as error:
                    mistakes.append(str(error))
        if (tool := tool_of(strange)) is not None:
            listed = "\n".join(counterparts(tool, strange, self.options))
            raise ConfigError(f"{path} is a configuration of {tool.name}. Write its keys as follows:\n{listed}")
        raise_all(mistakes, f"{path}: ")

    def _checked(self, key: str, option: Option, value: Any) -> Any:
        """The value of a key in a file. Raises Mismatch with the whole error message."""
        if isinstance(value, str) and value == option.default:
            return value
        if option.name == RESUMES and value in (True, False, "true", "false"):
            return value in (True, "true")
        try:
            return from_data(option.kind, value)
        except Mismatch as error:
            quotes = " Put it in quotes." if "str" in option.kind.scalars and not isinstance(value, list | dict) else ""
            told = f"{key} was given {value!r}, but takes {error}.{quotes}{_nearest(option, str(value))}"
            raise Mismatch(told) from None


def raise_all(mistakes: Sequence[str], place: str = "") -> None:
    """Raise one ConfigError with all mistakes, if there are any."""
    if len(mistakes) > 1:
        listed = "\n".join(f"    {each}" for each in mistakes)
        raise ConfigError(f"{place}{len(mistakes)} mistakes:\n{listed}")
    if mistakes:
        raise ConfigError(f"{place}{mistakes[0]}")


def _nearest(option: Option, text: str) -> str:
    return suggest(text, map(str, option.kind.names))


class Loader(yaml.SafeLoader):
    """Reads `1e-5` as a number; in YAML 1.1 it is text, because it has no decimal point."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str, option: str) -> Any:
    """The content of the YAML file given to `option`. Raises ConfigError if it does not exist or is not YAML."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise ConfigError(f"{option} {path}: this is a folder, not a file.")
    if not file.is_file():
        raise ConfigError(f"{option} {path}: there is no such file.{suggest_beside(file)}")
    try:
        node = yaml.compose(text := file.read_text(encoding="utf-8"), Loader)
        _check_nodes(path, node)
        return yaml.load(text, Loader)
    except UnicodeDecodeError:
        raise ConfigError(f"{option} {path}: this is not UTF-8 text, so not YAML.") from None
    except RecursionError:
        raise ConfigError(f"{option} {path}: this is nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date
        if isinstance(error, TrlError):
            raise
        raise ConfigError(f"{option} {path} is not YAML: {_what_is_wrong(error)}.") from None


def _check_nodes(path: str, root: Any) -> None:
    """Raise ConfigError for keys that are not names, for duplicate keys (of which YAML readers keep only the last), and
    for aliases that expand to more than `MOST_NODES` values."""
    waiting, seen = [root] if root is not None else [], 0
    while waiting:
        node = waiting.pop()
        seen += 1
        if seen > MOST_NODES:
            raise ConfigError(f"{path}: its aliases expand to more than {MOST_NODES:,} values. Write the values out.")
        if node.id == "mapping":
            _check_keys(path, node)
            waiting += [value for _, value in node.value]
        elif node.id == "sequence":
            waiting += node.value


def _check_keys(path: str, node: Any) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.id != "scalar" or key.tag not in KEY_TAGS:
            shown = repr(key.value) if key.id == "scalar" else f"a {key.id}"
            raise ConfigError(f"{path}: the key in line {line} is {shown}, not a name. Put it in quotes.")
        if key.value in lines:
            raise ConfigError(f"{path}: {key.value} is given twice, in lines {lines[key.value]} and {line}: keep one.")
        lines[key.value] = line


def _what_is_wrong(error: Any) -> str:
    """The error in one line: `while parsing a flow sequence: expected ',' or ']', but got '<stream end>' (line 2)`."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    told = ": ".join(each for each in (error.context, error.problem) if each)
    hint = ". YAML is indented with spaces, never with tabs" if "'\\t'" in told else ""
    return f"{told} (line {error.problem_mark.line + 1}){hint}"


class TrlParser:
    """Makes dataclasses from the command line and YAML files.

    script, training, model = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config()

    Every field is an option, `--config file.yaml` reads files, and their `env:` section sets environment variables. A
    field that several dataclasses have in common is one option, which sets it in all of them.
    """

    def __init__(
        self, dataclass_types: type | Iterable[type], *, prog: str | None = None, description: str = ""
    ) -> None:
        self.dataclass_types = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)
        self.prog, self.description = prog or Path(sys.argv[0]).name, description
        self.options = merge_options(*[options_of(cls) for cls in self.dataclass_types])
        aliases = {old: new for cls in self.dataclass_types for old, new in getattr(cls, "ALIASES", {}).items()}
        self._parser = OptionParser(self.options, aliases)

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """Return one instance per dataclass and, with `return_remaining_strings`, the list of unknown words last.

        Unknown keys of files are among these words, or with `separate_remaining_strings` a list of their own before
        them. Without `fail_with_unknown_args`, they are skipped with a warning.

        Raises ConfigError for mistakes in `args`. Without `args`, parse the command line of this process; a mistake
        then prints an error and exits with status 2.
        """
        words = sys.argv[1:] if args is None else list(args)
        try:
            given = self._parse(words, return_remaining_strings, fail_with_unknown_args)
            os.environ.update(given.environment)
            made = tuple(given.arguments_for(cls) for cls in self.dataclass_types)
        except ConfigError as error:
            if args is not None:
                raise
            print(f"{self.prog}: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        if not return_remaining_strings:
            return made
        rest = (given.rest_of_files, given.rest)
        return (*made, *rest) if separate_remaining_strings else (*made, rest[0] + rest[1])

    def _parse(self, words: list[str], keep_rest: bool, fail_with_unknown: bool) -> ParsedOptions:
        given = self._parser.parse(words, keep_rest=keep_rest, keep_keys=keep_rest or not fail_with_unknown)
        if given.help:
            from trl.cli.help import print_options

            print_options(self.prog, self.description, self.options, everything=given.help == "all")
            raise SystemExit(0)
        if given.rest_of_files and not keep_rest:
            logger.warning("Options in %s without effect: %s.", ", ".join(given.files), " ".join(given.rest_of_files))
        return given
