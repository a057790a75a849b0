"""`trl completion bash|zsh|fish` prints what makes the shell complete commands, options and choices.

    eval "$(trl completion bash)"          in ~/.bashrc;  zsh likewise;  fish: trl completion fish | source

The shell hands over the words typed so far (`trl completion words …`) and is given the candidates, one a line.
"""

from __future__ import annotations

from collections.abc import Sequence

from trl.cli.commands import methods, tools
from trl.errors import ConfigError, unknown

SHELLS = {
    "bash": """_trl() {
  COMPREPLY=($(compgen -W "$(trl completion words "${COMP_WORDS[@]:1:COMP_CWORD}")" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _trl trl""",
    "zsh": """_trl() {
  local -a found
  found=(${(f)"$(trl completion words "${words[@]:1:$((CURRENT - 1))}")"})
  (( $#found )) && compadd -a found || _files
}
compdef _trl trl""",
    "fish": """complete -c trl -f -a '(trl completion words (commandline -opc)[2..] (commandline -ct))'""",
}


def run(words: Sequence[str]) -> int:
    if words and words[0] == "words":
        print("\n".join(candidates(words[1:])))
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(f"Usage  trl completion SHELL    SHELL is one of {', '.join(SHELLS)}\n")
        print('bash, zsh:  eval "$(trl completion bash)"\nfish:       trl completion fish | source')
        return 0
    if words[0] not in SHELLS:
        raise ConfigError(unknown("shell", words[0], SHELLS))
    print(SHELLS[words[0]])
    return 0


def candidates(words: Sequence[str]) -> list[str]:
    """What may stand in place of the last of `words`, the words after `trl`; empty where only the shell knows."""
    *before, last = words or [""]
    if before[:1] == ["preview"] and before[1:2] and not before[1].startswith("--"):
        before = before[1:]
    found = methods()
    if not before:
        return _starting(last, [*found, *tools()])
    if before == ["preview"]:
        return _starting(last, list(found))
    if before == ["completion"]:
        return _starting(last, list(SHELLS))
    if before[0] not in found:
        return []
    options = {f"--{option.name}": option for option in found[before[0]].options()}
    if last.startswith("--"):
        return _starting(last, [*options, "--config", "--help", "--help-all"])
    if before[-1] in options:
        return _starting(last, [str(choice) for choice in options[before[-1]].kind.choices])
    return []


def _starting(prefix: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name.startswith(prefix)]
