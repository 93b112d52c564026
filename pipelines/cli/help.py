"""Help that ends with examples, which can be pasted whatever the width of the terminal."""

import re
from typing import Any

import typer
import typer.core

WIDTH = 56
"""Of an example, in characters: a narrow terminal shows it as it is."""

_WORD = re.compile(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""")


class Command(typer.core.TyperCommand):
    """A command whose help ends with examples: nothing pads or wraps them."""

    examples: tuple[str, ...] = ()

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Typer's help, then the examples."""
        super().format_help(ctx, formatter)
        typer.echo("\n".join([" Examples:", *self.examples]))


def command_class(examples: tuple[str, ...]) -> type[Command]:
    """The class of a command with these examples."""
    return type("Command", (Command,), {"examples": tuple(map(pasteable, examples))})


def pasteable(command: str) -> str:
    """A command in lines of at most `WIDTH` characters, broken with backslashes; an option stays with its value."""
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
    """What the list of commands says about one."""
    return re.split(r"(?<=[.?:]) ", text.split("\n")[0])[0].rstrip(":")
