"""Pages of a report: one HTML file without script, from the templates in this folder.

A page is drawn only from the files of a run folder, so that it can be drawn again at any time, and equal inputs give
equal bytes. Texts of data rows are untrusted: every value that a template prints passes through one function
(`finalize=marked`) that escapes it and makes control and bidirectional characters visible, so that no filter can be
forgotten. No data reaches a link, a style or a script, and the page's Content-Security-Policy forbids scripts and
network access.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

from datatools import DataError, files
from pipelines.texts import breakable, count, duration, first_line, marked, percent, plural, size, visible

SHOWN_EXAMPLES = 3  # examples that are open at first; the others can be expanded


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=marked,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "visible": visible,
        "breakable": breakable,
        "count": count,
        "percent": percent,
        "duration": duration,
        "size": size,
        "plural": plural,
    }
    return environment


@contextmanager
def damaged(path: Path | str, remedy: str) -> Iterator[None]:
    """Turn errors from missing or wrong values inside the `with` block into a DataError.

    Args:
        path: The file that contains the values.
        remedy: What to do, for the message.

    Raises:
        DataError: A value is missing or has another type.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, pa.ArrowException, TemplateError,
            AssertionError, RecursionError, StopIteration) as error:  # fmt: skip
        raise DataError(f"{path} is damaged ({type(error).__name__}: {first_line(error)}); {remedy}") from error


def page(template: str, /, **parts: object) -> str:
    """Return a page from a template, with its parts escaped as the module describes.

    Args:
        template: The file in `templates/`.
        **parts: The parts of the page.
    """
    return _environment().get_template(template).render(parts)


def write_page(folder: Path, text: str) -> Path:
    """Write folder/report.html.

    Args:
        folder: The folder of the run.
        text: The page.

    Returns:
        The file.
    """
    path = folder / "report.html"
    files.write_text(path, text)
    return path
