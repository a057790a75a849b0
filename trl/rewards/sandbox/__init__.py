"""Running programs that are not trusted: what isolates them, what they may use up, and what became of them."""

from trl.rewards.sandbox.choice import find_runner
from trl.rewards.sandbox.runner import (
    CodeRunner,
    Limits,
    Outcome,
    SubprocessRunner,
    run_program,
    run_tests,
)

__all__ = ["CodeRunner", "Limits", "Outcome", "SubprocessRunner", "find_runner", "run_program", "run_tests"]
