"""What a row holds as text: plain text, or chat messages in the forms in which they are met."""

from __future__ import annotations

from typing import Any

from moemerge.data.rows import BadRow, Text

# Senders as ShareGPT calls them, and the roles that they stand for.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
CALLS = ("tool_calls", "function_call")

Message = dict[str, str]


def parse_text(value: Any, name: str) -> Text:
    """`value`, of the field that stands for `name`, as text or as messages {role, content}. Raises BadRow.

    Messages may be written {from, value}, their content as a list of parts of type text, and one message may
    stand without a list. Fields of a message that hold numbers (weights, marks for training) are left out;
    what a chat template would need and text cannot hold (tool calls, images) is refused.
    """
    if value is None:
        raise BadRow(f"missing {name}")
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"{name} is neither text nor messages")
    return [_message(message, name) for message in value]


def encodable(text: str) -> str:
    """`text`, if it can be written as UTF-8. Raises BadRow."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("not UTF-8") from None
    return text


def is_blank(text: Text) -> bool:
    """Whether there is nothing but white space, in all messages of a chat."""
    return not (text if isinstance(text, str) else "".join(m["content"] for m in text)).strip()


def repeats(prompt: Text, answer: Text) -> bool:
    """Whether `answer` begins with `prompt`, so that prompt + answer would hold it twice.

    A chat does so too if it begins with the last messages of the prompt, a system message before them or not.
    """
    if isinstance(prompt, str):
        return isinstance(answer, str) and _begins_with(answer.lstrip(), prompt.strip())
    if isinstance(answer, str):
        return False
    after_system = next((i for i, m in enumerate(answer) if m["role"] != "system"), len(answer))
    ends = [prompt[i:] for i in range(len(prompt))]
    return any(begin[: len(end)] == end for begin in (answer, answer[after_system:]) for end in ends)


def _begins_with(text: str, start: str) -> bool:
    """Whether `text` begins with the words of `start`: "we" does not begin "west".

    A single word is no sign of a prompt that was repeated: both answers to "Paris" may begin so.
    """
    if not text.startswith(start) or (start.isascii() and len(start.split()) < 2):
        return False
    around = start[-1] + text[len(start) :][:1]
    # Scripts without spaces between words are no ASCII: there every beginning counts.
    return len(around) < 2 or not (around.isascii() and around.isalnum())


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise BadRow(f"{name} is neither text nor messages")
    if any(value.get(key) for key in CALLS):
        raise BadRow(f"{name} has tool calls, which cannot be honoured")
    if value.get("role") is None and value.get("from") is not None:
        value = _of_sharegpt(value, name)
    value = {**value, "content": _joined(value.get("content"), name)}
    if not isinstance(value.get("role"), str) or not isinstance(value["content"], str):
        raise BadRow(f"{name} is neither text nor messages")
    kept = {key: part for key, part in value.items() if part == "" or part}
    kept = {key: part for key, part in kept.items() if not isinstance(part, (int, float))}
    if not all(isinstance(part, str) for part in kept.values()):
        raise BadRow(f"{name} has a message with fields that are neither text nor numbers")
    return {encodable(key): encodable(part) for key, part in kept.items()}


def _of_sharegpt(message: dict[str, Any], name: str) -> dict[str, Any]:
    sender = message["from"]
    if not isinstance(sender, str) or sender not in ROLES:
        raise BadRow(f"{name} has a message from neither human, gpt nor system")
    rest = {key: part for key, part in message.items() if key not in ("from", "value", "role", "content")}
    return {"role": ROLES[sender], "content": message.get("value"), **rest}


def _joined(content: Any, name: str) -> Any:
    """The text of content that comes as a list of parts; other content as it is."""
    if not isinstance(content, list):
        return content
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    if len(texts) < len(content):
        raise BadRow(f"{name} has content parts that are not text")
    return "".join(texts)
