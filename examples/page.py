"""A page with tables, charts and pictures in one HTML file, for the examples that show their results.

Everything is inline: the page opens without a network, in light and dark mode, and on a phone.
"""

import argparse
import base64
import html
import inspect
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#667085;--line:#d5dae2;--paper:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#3a4352;--paper:#14181f}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:56rem;
margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem}
.wide{overflow-x:auto;margin:1rem 0}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .8rem;border-bottom:1px solid var(--line);text-align:right}
th:first-child,td:first-child{text-align:left}
figure{margin:1rem 0}figcaption{color:var(--soft);font-size:.9rem}
svg{width:100%;height:auto;max-width:44rem;display:block}text{fill:var(--ink);font:13px system-ui,sans-serif}
.axis{stroke:var(--line)}.pictures{display:flex;flex-wrap:wrap;gap:.6rem}.pictures figure{margin:0}
.pictures img{image-rendering:pixelated;height:6.5rem;display:block}
"""
COLOURS = "#3366cc", "#d9822b", "#2a9d6f", "#b5446e", "#7a6fbe", "#8a8f3c", "#4aa3b5", "#a0522d"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column has names."""
    cells = [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f'<div class="wide"><table><tr>{names}</tr>{"".join(cells)}</table></div>'


def bars(caption: str, values: Mapping[str, Sequence[float]], unit: str = "") -> str:
    """The mean of each list as a bar, and each value as a dot."""
    top = max(max(some) for some in values.values()) or 1.0
    parts, height = [], 30
    for i, (name, some) in enumerate(values.items()):
        y, mean = i * height, sum(some) / len(some)
        width = 330 * mean / top
        parts.append(f'<text x="225" y="{y + 20}" text-anchor="end">{html.escape(name)}</text>')
        parts.append(
            f'<rect x="235" y="{y + 6}" width="{width:.1f}" height="18" fill="{COLOURS[i % 8]}" opacity=".55"/>'
        )
        parts += [f'<circle cx="{235 + 330 * v / top:.1f}" cy="{y + 15}" r="3" fill="{COLOURS[i % 8]}"/>' for v in some]
        parts.append(f'<text x="580" y="{y + 20}">{mean:.3g}{html.escape(unit)}</text>')
    return _figure(caption, "".join(parts), 660, height * len(values) + 6)


def lines(caption: str, values: Mapping[str, Sequence[float]], x: Sequence[float], label: str) -> str:
    """One line for each list of values at the places `x`."""
    low, high = min(min(v) for v in values.values()), max(max(v) for v in values.values())
    high = high if high > low else low + 1.0
    span = (max(x) - min(x)) or 1.0

    def at(a: float, b: float) -> str:
        return f"{60 + 420 * (a - min(x)) / span:.1f},{210 - 190 * (b - low) / (high - low):.1f}"

    parts = [
        '<line class="axis" x1="60" y1="210" x2="480" y2="210"/><line class="axis" x1="60" y1="20" x2="60" y2="210"/>'
    ]
    parts += [f'<text x="54" y="{y}" text-anchor="end">{v:.3g}</text>' for v, y in ((high, 25), (low, 213))]
    parts += [f'<text x="{p}" y="228" text-anchor="middle">{v:g}</text>' for v, p in ((min(x), 60), (max(x), 480))]
    parts.append(f'<text x="270" y="232" text-anchor="middle">{html.escape(label)}</text>')
    for i, (name, some) in enumerate(values.items()):
        points = " ".join(at(a, b) for a, b in zip(x, some, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[i % 8]}" stroke-width="2"/>')
        parts.append(f'<rect x="495" y="{24 + 20 * i}" width="12" height="12" fill="{COLOURS[i % 8]}"/>')
        parts.append(f'<text x="513" y="{35 + 20 * i}">{html.escape(name)}</text>')
    return _figure(caption, "".join(parts), 700, max(240, 40 + 20 * len(values)))


def pictures(caption: str, images: Mapping[str, Tensor]) -> str:
    """Grey pictures [height, width] from black (smallest value) to white, each with its name."""
    shown = []
    for name, image in images.items():
        grey = image.float() - image.min()
        data = base64.b64encode(_png((255 * grey / grey.max().clamp_min(1e-9)).round().to(torch.uint8))).decode()
        name = html.escape(name)
        shown.append(
            f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'
        )
    return f'<p>{html.escape(caption)}</p><div class="pictures">{"".join(shown)}</div>'


def write(path: Path, title: str, sections: Mapping[str, Sequence[str]]) -> None:
    """Write the page; each section has a heading and parts that the functions above returned."""
    body = "".join(
        f"<section><h2>{html.escape(name)}</h2>{''.join(parts)}</section>" for name, parts in sections.items()
    )
    title = html.escape(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{body}</html>",
        encoding="utf-8",
    )


def run(main: Callable[..., None]) -> None:
    """Call `main` with what the command line says: each argument that is a number or a path is an option."""
    parser = argparse.ArgumentParser(
        description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    for name, one in inspect.signature(main).parameters.items():
        if isinstance(one.default, int):
            parser.add_argument(f"--{name}", type=int, default=one.default, metavar="N", help=f"the number of {name}")
        elif isinstance(one.default, Path):
            parser.add_argument(f"--{name}", type=Path, default=one.default, metavar="FILE", help="the page to write")
    main(**vars(parser.parse_args()))


def _figure(caption: str, inside: str, width: int, height: int) -> str:
    caption = html.escape(caption)
    drawing = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{caption}">{inside}</svg>'
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def _png(grey: Tensor) -> bytes:
    """A PNG file of uint8 [height, width]."""
    height, width = grey.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + bytes(row.tolist()) for row in grey)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
