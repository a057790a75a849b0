"""`trl completion bash|zsh|fish` prints shell code that completes commands, options and choices.

    eval "$(trl completion bash)"          in ~/.bashrc;  for zsh in ~/.zshrc, after compinit;
    trl completion fish | source           in ~/.config/fish/config.fish

On each completion the shell calls `trl completion words …` with the words typed so far, which prints one candidate per
line; `trl completion described …` adds a tab and a description. If none is printed, the shell completes file names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trl.cli.commands import methods, tools
from trl.cli.fields import Option
from trl.errors import ConfigError, unknown

SHELLS = {
    "bash": """_trl() {
  COMPREPLY=($(compgen -W "$(trl completion words "${COMP_WORDS[@]:1:COMP_CWORD}")" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _trl trl""",
    "zsh": """_trl() {
  local -a found
  found=(${(f)"$(trl completion described "${(@)words[2,CURRENT]}")"})
  if (( $#found )); then
    found=(${found//:/\\\\:})
    found=(${found/$'\\t'/:})
    _describe 'trl' found
  else
    _files
  fi
}
compdef _trl trl""",
    "fish": """function __trl_complete
  set -l found (trl completion described (commandline -opc)[2..] (commandline -ct))
  if set -q found[1]
    printf '%s\\n' $found
  else
    __fish_complete_path (commandline -ct)
  end
end
complete -c trl -f -a '(__trl_complete)'""",
}

EVERYWHERE = {"--help": "The most used options", "--help-all": "All options"}
CONFIG = {"--config": "YAML files with options"}


def run(words: Sequence[str]) -> int:
    if words and words[0] in ("words", "described"):
        for name, text in candidates(words[1:]).items():
            print(f"{name}\t{text}" if text and words[0] == "described" else name)
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(f"Usage  trl completion SHELL    SHELL is one of {', '.join(SHELLS)}\n")
        print('bash, zsh:  eval "$(trl completion bash)"\nfish:       trl completion fish | source')
        return 0
    if words[0] not in SHELLS:
        raise ConfigError(unknown("shell", words[0], SHELLS))
    print(SHELLS[words[0]])
    return 0


def candidates(words: Sequence[str]) -> dict[str, str]:
    """Candidates for the last of `words` (those after `trl`), with their descriptions.

    Empty where a file name is expected, which the shell completes itself.
    """
    *before, last = words or [""]
    other = tools()
    trained = {name: method.summary for name, method in methods().items()}
    if not before:
        return _starting(last, trained | {name: tool.summary for name, tool in other.items()})
    if before == ["completion"]:
        return _starting(last, dict.fromkeys(SHELLS, ""))
    if len(before) == 1 and before[0] in other and other[before[0]].method and not last.startswith("-"):
        return _starting(last, trained)
    options = {f"--{option.name}": option for option in _options(before)}
    if last.startswith("-"):
        config = CONFIG if options else {}
        described = {name: option.summary for name, option in options.items()}
        return _starting(last, config | described | EVERYWHERE)
    return _starting(last, dict.fromkeys(_choices(before, options), ""))


def _options(before: Sequence[str]) -> list[Option]:
    """The options of the command that the first word names."""
    command, *rest = before
    found = methods()
    if command in (other := tools()):
        tool, _ = other[command].about([word for word in rest[:1] if word in found])
        return tool.known_options()
    return found[command].options() if command in found else []


def _choices(before: Sequence[str], options: Mapping[str, Option]) -> list[str]:
    """The choices of the option whose value, or next value of a list, is being typed."""
    at = max((i for i, word in enumerate(before) if word.startswith("--")), default=None)
    option = None if at is None else options.get(before[at])
    if option is None or (at < len(before) - 1 and option.kind.item is None):
        return []
    return list(map(str, option.kind.names))


def _starting(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in names.items() if name.startswith(prefix)}
