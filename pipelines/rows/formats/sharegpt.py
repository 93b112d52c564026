"""The format sharegpt: a conversation in the column `conversations`, with the system prompt in a separate column."""

from pipelines.rows.formats.record import BY_TEMPLATE, Format
from pipelines.rows.formats.turns import KEYS, from_messages

SHAREGPT = Format(
    name="sharegpt",
    title="sharegpt",
    learned="a conversation; loss on the assistant's turns",
    example='{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}',
    used_by="LLaMA-Factory",
    rendering=BY_TEMPLATE,
    columns=(("conversations",),),
    optional=(*KEYS, "system"),
    read=lambda given, _: from_messages(given.get("conversations"), "conversations", given.names, given.get("system")),
)
