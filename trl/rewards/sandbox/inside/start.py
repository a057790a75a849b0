"""Entry point in a sandbox: `python -I -S start.py ROLE LIMITS`, where LIMITS is JSON: name of a resource → its limit.

ROLE "program" runs program.py of the current folder as a script. "serve" runs it, and then answers requests of its tests, which
run in another sandbox. "tests" runs tests.py, where names that are not defined refer to the served program, and writes the
result to standard error. Only the standard library is used.
"""

import json
import os
import resource
import sys
import types


def limit(most):
    """Set hard limits; a limit that is already stricter is kept."""
    for name, value in most.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))


def run(name, module):
    """Run a file of the current folder in a fresh module `__main__`, where pickle and typing look for its classes."""
    with open(name, "rb") as file:
        source = file.read()
    sys.modules["__main__"] = module
    exec(compile(source, name, "exec"), vars(module))


def own_streams():
    """The pipes to the other side, as streams; standard input and output are redirected to /dev/null."""
    reader, writer = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    return reader, writer


def main():
    role, limits = sys.argv[1], json.loads(sys.argv[2])
    here = os.path.dirname(os.path.abspath(__file__))
    limit(limits)
    sys.argv = ["program.py"]
    if role == "program":
        run("program.py", types.ModuleType("__main__"))
        return
    sys.path.insert(0, here)
    import sides

    sys.path.remove(here)
    getattr(sides, role)(*own_streams(), run)


main()
