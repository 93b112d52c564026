"""Help texts that end with examples, which can be pasted whatever the width of the terminal."""

import re
from typing import Any

import typer
import typer.core

WIDTH = 56
"""The width of an example in characters; it fits on a narrow terminal."""

_WORD = re.compile(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""")


class Command(typer.core.TyperCommand):
    """A command whose help ends with examples, which are neither padded nor wrapped."""

    examples: tuple[str, ...] = ()

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of typer, then the examples.

        Args:
            ctx: The context of the command.
            formatter: The formatter of typer.
        """
        super().format_help(ctx, formatter)
        typer.echo("\n".join([" Examples:", *self.examples]))


def command_class(examples: tuple[str, ...]) -> type[Command]:
    """Return the class of a command with examples.

    Args:
        examples: The examples.
    """
    return type("Command", (Command,), {"examples": tuple(map(pasteable, examples))})


def pasteable(command: str) -> str:
    r"""Return a command in lines of at most `WIDTH` characters with backslashes; an option stays with its value.

    Args:
        command: The command on one line.

    Example:
        >>> print(pasteable("datatools select --model M --train pool.jsonl --target dev.jsonl --out runs/less"))
          datatools select --model M --train pool.jsonl \
              --target dev.jsonl --out runs/less
    """
    words: list[str] = []
    for word in _WORD.findall(command):
        if words and words[-1].startswith("--") and " " not in words[-1] and not word.startswith("-"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    lines = [f"  {words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 <= WIDTH + 2:
            lines[-1] += f" {word}"
        else:
            lines.append(f"      {word}")
    return " \\\n".join(lines)


def first_sentence(text: str) -> str:
    """Return the first sentence of a help text, for the list of commands.

    Args:
        text: The help text.
    """
    return re.split(r"(?<=[.?:]) ", text.split("\n")[0])[0].rstrip(":")
