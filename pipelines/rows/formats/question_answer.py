"""The format question and answer, by any of the usual column names."""

from pipelines.rows.formats.pair import ALONGSIDE, from_pair
from pipelines.rows.formats.record import BY_TEMPLATE, Format

QUESTION_ANSWER = Format(
    name="question_answer",
    title="question, answer",
    learned="loss on the answer",
    example='{"question": "2 + 2 = ?", "answer": "4"}',
    used_by=(
        "GSM8K; also query, response; instruction, response (Dolly); input, output; context, system, history optional"
    ),
    rendering=BY_TEMPLATE,
    columns=(
        ("question", "answer"),
        ("query", "response"),
        ("instruction", "response"),
        ("prompt", "response"),
        ("input", "output"),
    ),
    optional=ALONGSIDE,
    read=from_pair,
)
