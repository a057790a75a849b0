"""Run untrusted programs with isolation and resource limits."""

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
