"""Choose a runner: the strongest isolation that works on this machine."""

from __future__ import annotations

import functools
import logging
import shutil

from trl.errors import ConfigError
from trl.rewards.sandbox.bubblewrap import BubblewrapRunner
from trl.rewards.sandbox.runner import CodeRunner, SubprocessRunner, run_tests
from trl.rewards.sandbox.watch import Limits

logger = logging.getLogger(__name__)


def try_out(runner: CodeRunner) -> str:
    """ "" if the runner can run programs and tests on this machine; else the reason why not."""
    try:
        outcome = run_tests(runner, "def double(x): return 2 * x", "assert double(2) == 4", limits=Limits(seconds=30))
    except OSError as error:
        return str(error)
    return "" if outcome.held else outcome.stderr.strip()[-300:]


@functools.cache
def find_runner(*, without_isolation: bool = False) -> CodeRunner:
    """The strongest runner that works on this machine, which is logged.

    Raises ConfigError, which says what is missing, if isolation does not work and `without_isolation` is not set.
    """
    if shutil.which("bwrap") is None:
        missing = "bubblewrap is not installed (apt-get install bubblewrap)"
    elif reason := try_out(runner := BubblewrapRunner()):
        missing = f"bubblewrap does not work here ({reason})"
    else:
        logger.info("Programs run in %s.", runner.name)
        return runner
    if not without_isolation:
        raise ConfigError(
            f"Programs cannot be isolated: {missing}. In a container, this needs the right to create user namespaces. "
            "To run programs without isolation, with all rights of this user, set without_isolation=True."
        )
    logger.warning("Programs run in %s: %s.", SubprocessRunner.name, missing)
    return SubprocessRunner()
