"""The format messages: a conversation in the column `messages`."""

from pipelines.rows.formats.record import BY_TEMPLATE, Format
from pipelines.rows.formats.turns import KEYS, from_messages

MESSAGES = Format(
    name="messages",
    title="messages",
    learned=(
        "a conversation; loss on the assistant's turns, with their reasoning_content and tool_calls; tools beside it"
    ),
    example='{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}',
    used_by="TRL, OpenAI, LESS",
    rendering=BY_TEMPLATE,
    columns=(("messages",),),
    optional=KEYS,
    read=lambda given, _: from_messages(given.get("messages"), "messages", given.names),
)
