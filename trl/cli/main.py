"""The `trl` command: train models, preview rows, chat, evaluate, serve.

    trl sft --model_name_or_path facebook/opt-125m --dataset_name imdb --output_dir opt-sft-imdb

Options are read and checked before torch is imported. Errors that a user can mend print one message and exit with
status 2; errors of files, disks and networks print one message and exit with status 1.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

from trl import __version__
from trl.callbacks.signals import SIGNALS
from trl.cli.commands import Method, load, methods, tools
from trl.cli.launch import launch, needs_launcher
from trl.cli.parser import HELP
from trl.errors import ConfigError, TrlError, suggest
from trl.noise import silence
from trl.printable import printable
from trl.training.streams import prepare_streams, steady_streams

INTERRUPTED, UNREAD = 130, 141
STOPPED = tuple(128 + number for number in SIGNALS)
"""Exit statuses of a run that saved a checkpoint after a signal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `trl` with the words `argv`, by default those of this process. Return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    prepare_streams()
    os.environ.update({name: value for name, value in _bars().items() if name not in os.environ})
    silence()
    try:
        status = dispatch(words)
        sys.stdout.flush()
        return status
    except TrlError as error:
        return _fail(error, status=2)
    except ImportError as error:
        if error.name is not None:
            raise
        return _fail(error, status=2)  # an optional dependency: Python's own import errors carry the module's name
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except OSError as error:
        return _fail(error, status=1)
    except KeyboardInterrupt:
        print("\r", end="", file=sys.stderr)  # overwrite the ^C that terminals print
        return _fail("interrupted", status=INTERRUPTED)
    finally:
        if argv is None:  # the process ends: a further Ctrl-C kills it without a traceback
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _bars() -> dict[str, str]:
    """Environment variables of tqdm: show bars only for work of a second or more, and clear them when done; disable
    them where the terminal cannot draw them, and in all processes but the first of a node."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    drawn = is_first and sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return {"TQDM_DELAY": "1", "TQDM_LEAVE": ""} if drawn else {"TQDM_DISABLE": "1"}


def _fail(error: Exception | str, *, status: int) -> int:
    print(f"trl: error: {printable(str(error))}", file=sys.stderr)
    return status


def dispatch(words: list[str]) -> int:
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words or words[0] in HELP:
        return print_overview()
    if words[0] in ("--version", "-V"):
        print(f"trl {__version__}")
        return 0
    name, *rest = words
    if name in (found := methods()):
        return run_method(found[name], rest)
    if name in (other := tools()):
        return other[name].start(rest)
    raise ConfigError(
        f"Unknown command {name!r}.{suggest(name, [*found, *other])} Commands: {', '.join([*found, *other])}."
    )


def run_method(method: Method, words: list[str]) -> int:
    given = method.parser().parse(words)
    if given.help:
        from trl.cli.help import print_options

        command = f"trl {method.name}"
        examples = [f"{command} {method.example}", f"{command} --config {method.name}.yaml --learning_rate 1e-5"]
        everything = given.help == "all"
        print_options(command, method.summary, method.shown(), everything=everything, examples=examples)
        return 0
    from trl.cli.train import check_weights, read_run, train

    if not given.values.get("dry_run"):
        check_weights(given.values.get("model_name_or_path"))
        if needs_launcher(given):
            return _say_how_to_resume(launch(given, [method.name, *words]), [method.name, *words])
    run = read_run(method, given)
    if given.values.get("dry_run"):
        return load(method.check)(run)
    with steady_streams():
        status = train(run)
    if "LOCAL_RANK" in os.environ and status in STOPPED:
        return 0  # the launcher received the signal too, and treats any other status as a failure
    return _say_how_to_resume(status, [method.name, *words])


def _say_how_to_resume(status: int, words: Sequence[str]) -> int:
    if status in STOPPED:
        again = words if "--resume" in words else [*words, "--resume"]
        print(f"Stopped, with a checkpoint. To resume:\n\n    {shlex.join(['trl', *again])}\n", file=sys.stderr)
    return status


def print_overview() -> int:
    from trl.cli.help import console, print_examples, print_head, print_rows, print_title

    out = console()
    print_head(
        out, "trl COMMAND [--option VALUE …]", "Fine-tune and align language, vision-language and diffusion models."
    )
    print_rows(out, "Train", [(each.name, each.summary) for each in methods().values()])
    print_rows(out, "Tools", [(each.name, each.summary) for each in tools().values()])
    print_rows(
        out,
        "Help",
        [
            ("trl COMMAND --help", "The most used options, by topic"),
            ("trl COMMAND --help-all", "All options"),
            ("trl --version", "The version"),
        ],
    )
    first = next(iter(methods().values()))
    print_title(out, "Example")
    print_examples(out, [f"trl {first.name} {first.example}"])
    return 0


class _Command(ModuleType):
    """Makes this module callable: `from trl.cli import main; main(["sft", …])`."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        return main(argv)


sys.modules[__name__].__class__ = _Command

if __name__ == "__main__":
    sys.exit(main())
