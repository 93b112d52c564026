"""The format alpaca: an instruction, optionally an input, and its output."""

from pipelines.rows.formats.pair import ALONGSIDE, from_pair
from pipelines.rows.formats.record import BY_TEMPLATE, Format

ALPACA = Format(
    name="alpaca",
    title="alpaca",
    learned="loss on the output",
    example='{"instruction": "Add.", "input": "2 2", "output": "4"}',
    used_by="LLaMA-Factory; input, system and history may be absent",
    rendering=BY_TEMPLATE,
    columns=(("instruction", "output"),),
    optional=ALONGSIDE,
    read=from_pair,
)
