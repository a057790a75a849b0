"""Which runner is used: the strongest isolation that works on this machine, named in the log."""

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
    """ "" if programs run here and their tests hold; else what is in the way."""
    try:
        outcome = run_tests(runner, "def double(x): return 2 * x", "assert double(2) == 4", limits=Limits(seconds=30))
    except OSError as error:
        return str(error)
    return "" if outcome.held else outcome.stderr.strip()[-300:]


@functools.cache
def find_runner(*, without_isolation: bool = False) -> CodeRunner:
    """The strongest runner that works here, named in the log.

    Raises ConfigError, with what is missing, where only a runner is left that isolates nothing and that is not agreed to
    by `without_isolation`.
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
            f"Programs cannot be isolated: {missing}. In a container it takes the right to make user namespaces. "
            "To run programs all the same, with all that this user may do, set without_isolation=True."
        )
    logger.warning("Programs run in %s: %s.", SubprocessRunner.name, missing)
    return SubprocessRunner()
