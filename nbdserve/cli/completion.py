"""``nbdserve completion``, and completion in bash as it has to be for names with ``@``.

The scripts call ``nbdserve`` itself, with ``_NBDSERVE_COMPLETE`` in the environment; click does the
rest. Its own script for bash hands over the words as readline cuts them, at ``@``, ``:`` and ``=``,
so that neither a snapshot nor anything behind a URL could be completed. This one hands over the
line up to the cursor.
"""

import os
from typing import Final

import click
from click.shell_completion import (
    BashComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from nbdserve.cli.application import COMPLETION

SHELLS: Final = ("bash", "zsh", "fish")

_BASH = """\
# Completion of nbdserve for bash 4.4 or newer.
%(complete_func)s() {
    local line=${COMP_LINE:0:COMP_POINT} response type value
    COMPREPLY=()
    response=$(COMPLETED_LINE=$line %(complete_var)s=bash_complete "$1" 2>/dev/null)
    while IFS=, read -r type value; do
        case $type in
            plain) COMPREPLY+=("$value"); [[ $value != *@ ]] || compopt -o nospace ;;
            dir) compopt -o filenames -o dirnames ;;
            file) compopt -o filenames -o default ;;
        esac
    done <<<"$response"
    # To readline a word begins with its @, and what is in front of that stays.
    if [[ $COMP_WORDBREAKS == *@* && ${line##*[[:space:]]} == *@* ]]; then
        COMPREPLY=("${COMPREPLY[@]/#*@/@}")
    fi
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class Bash(BashComplete):
    """bash, for words in which readline sees several."""

    source_template = _BASH

    def source(self) -> str:
        return self.source_template % self.source_vars()

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ.get("COMPLETED_LINE", "")
        words = split_arg_string(line)
        incomplete = words.pop() if words and not line[-1].isspace() else ""
        return words[1:], incomplete


add_completion_class(Bash)


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes nbdserve's commands in a shell.

    It completes commands and options, and the names of volumes and snapshots in the data directory.
    For bash, eval "$(nbdserve completion bash)" in ~/.bashrc loads it; for zsh the same with zsh in
    ~/.zshrc, behind compinit. fish looks for it in ~/.config/fish/completions/nbdserve.fish.
    """
    root = click.get_current_context().find_root().command
    click.echo(script_for(shell, root), nl=False)


def script_for(shell: str, application: click.Command) -> str:
    """The script that completes ``application``, whose program is nbdserve."""
    kind = get_completion_class(shell)
    assert kind is not None
    return kind(application, {}, "nbdserve", COMPLETION).source()
