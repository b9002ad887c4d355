"""Conversations as samples: rendered by the tokenizer's chat template, labels on what the assistant says.

The way of a row: messages -> checked -> text of the chat template and the spans of characters that the assistant wrote
-> tokens and labels -> cut to a length. A span begins where the generation prompt ends, which is where the model starts
when it is asked to answer, and ends where the template has finished the message: its end-of-turn token is trained.

Chat templates come with tokenizers. transformers renders them in the sandbox of jinja2.

Letters: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lightning_prune.pruning.running import IGNORE_INDEX
from lightning_prune.text.sequences import fingerprint

TrainOn = Literal["assistant", "all"]
Message = dict[str, str]
Span = tuple[int, int]
# text of messages; the second argument: whether the generation prompt, an assistant's header, follows them
Render = Callable[[Sequence[Message], bool], str]

ROLES = ("system", "user", "assistant", "tool")
# part of the cache key: raise it when rendering, tokenizing or labelling changes
_CACHE_VERSION = 1


class Conversations(NamedTuple):
    """Tokenized conversations.

    Attributes:
        dataset: Columns "input_ids" and "labels", one row a conversation that has a token to predict.
        truncated: Conversations that were longer than allowed.
        dropped: Conversations left out, as they have no token to predict (any more).
    """

    dataset: datasets.Dataset
    truncated: int
    dropped: int


def tokenize_conversations(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    messages_field: str = "messages",
    block_size: int = 512,
    train_on: TrainOn = "assistant",
    num_proc: int | None = None,
    origin: str = "the data",
) -> Conversations:
    """Tokenize conversations, one a row.

    Args:
        documents: A dataset whose column `messages_field` holds lists of {"role", "content"}.
        tokenizer: A fast tokenizer with a chat template.
        messages_field: Name of the column.
        block_size: Most tokens of a conversation; what follows is cut off.
        train_on: Labels on the "assistant"'s tokens, -100 elsewhere; or on "all".
        num_proc: Processes to use.
        origin: What error messages call the data.

    Returns:
        The conversations in their order, cached beside `documents`, and what was cut and left out.

    Raises:
        ValueError: If the column is missing, a row is malformed, the template does not fit, or no conversation has
            a token to predict.
    """
    check_chat_tokenizer(tokenizer)
    if messages_field not in documents.column_names:
        raise ValueError(
            f"messages_field={messages_field!r} is not in {origin}, which has the fields {documents.column_names}. "
            "Pass one that holds lists of messages."
        )
    # a tokenizer hashes differently once it has been used; its written form does not
    identity = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map
    token_ids = datasets.Sequence(datasets.Value("int32"))
    documents = documents.select_columns([messages_field])
    tokens: datasets.Dataset = documents.map(
        partial(
            _encode_rows,
            tokenizer=tokenizer,
            messages_field=messages_field,
            block_size=block_size,
            train_on=train_on,
            origin=origin,
        ),
        batched=True,
        batch_size=256,
        with_indices=True,
        num_proc=num_proc,
        remove_columns=documents.column_names,
        features=datasets.Features(
            {
                "input_ids": token_ids,
                "labels": token_ids,
                "truncated": datasets.Value("bool"),
                "predicted": datasets.Value("int32"),
            }
        ),
        new_fingerprint=fingerprint(documents, _CACHE_VERSION, identity, messages_field, block_size, train_on),
        desc="Tokenizing conversations",
    )
    counts = tokens.with_format("arrow")[:]
    kept = np.flatnonzero(counts.column("predicted").to_numpy())
    if not len(kept):
        raise ValueError(
            f"No conversation of {origin} has a token to predict within block_size={block_size} tokens "
            f"(train_on={train_on!r}). Pass a larger block_size, or data in which the assistant speaks."
        )
    truncated = int(pc.sum(counts.column("truncated")).as_py() or 0)
    dataset = tokens.select(kept).select_columns(["input_ids", "labels"])
    return Conversations(dataset, truncated, len(tokens) - len(kept))


def check_chat_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot render conversations, or cannot say where its tokens lie in the text.

    Raises:
        ValueError: If it has no chat template, or is not a fast one.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer={tokenizer.name_or_path!r} has no chat template, which turns messages into text. Pass the "
            "tokenizer of an instruction-tuned model, or save one with its chat_template set."
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer={tokenizer.name_or_path!r} is not a fast one, so the positions of its tokens in the text are "
            "unknown. Pass a folder with a tokenizer.json."
        )


def checked_messages(messages: Any) -> list[Message]:
    """The messages with their roles and contents alone.

    Args:
        messages: What a row holds. Keys other than "role" and "content" may be there if they are None.

    Raises:
        ValueError: If they are not a list of at least one {"role", "content"} of text, a role is not in `ROLES`, or
            a message holds more, such as tool calls.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{_shown(messages)} is no list of messages. Each is {{'role': ..., 'content': ...}}.")
    return [_checked_message(message, number) for number, message in enumerate(messages, 1)]


def _checked_message(message: Any, number: int) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is {_shown(message)}, not {{'role': ..., 'content': ...}}.")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {_shown(role)}. Use one of {', '.join(map(repr, ROLES))}.")
    if not isinstance(content, str):
        raise ValueError(f"message {number} has the content {_shown(content)}, which is no text.")
    if more := sorted(key for key, value in message.items() if key not in ("role", "content") and value is not None):
        raise ValueError(
            f"message {number} has the fields {more} beside role and content, which would be lost. Remove them."
        )
    return {"role": role, "content": content}


def assistant_spans(messages: Sequence[Message], render: Render) -> tuple[str, list[Span]]:
    """The text of a conversation, and where in it the assistant's messages are.

    A message's span is found by rendering what precedes it, with the generation prompt, and what precedes it together
    with the message itself. Both must begin the whole text; else the template writes a message differently when
    others follow, and the spans would be wrong.

    Args:
        messages: At least one.
        render: The chat template.

    Returns:
        The text, and spans of its characters (start, stop), stop excluded, in order.

    Raises:
        ValueError: If the conversation begins with the assistant, or a rendered part does not begin the whole text.

    Examples:
        >>> def render(messages, prompt):
        ...     return "".join(f"{m['role'][0]}:{m['content']};" for m in messages) + "a:" * prompt
        >>> talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> assistant_spans(talk, render)
        ('u:Hi;a:Hello;', [(7, 13)])
    """
    text = render(messages, False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise ValueError(
                "message 1 is the assistant's, with nothing to answer. Put a message before it, or use train_on='all'."
            )
        prompt = render(messages[:i], True)
        answered = render(messages[: i + 1], False)
        for part, described in ((prompt, "with the generation prompt"), (answered, "and the answer")):
            if not text.startswith(part):
                raise ValueError(
                    f"the chat template writes the first {i} message(s) {described} differently from how the whole "
                    f"conversation begins: {_difference(part, text)}. So the assistant's tokens cannot be told. "
                    "Use train_on='all', one answer a conversation, or a template that only appends."
                )
        spans.append((len(prompt), len(answered)))
    return text, spans


def label_tokens(input_ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Labels of the tokens that lie in spans of characters, -100 for the others.

    A token belongs to the span in which it ends: one that joins the end of a prompt and the begin of an answer is the
    answer's, since the prompt alone would have been tokenized otherwise.

    Args:
        input_ids: T token ids.
        offsets: Characters (start, stop) of each token.
        spans: Characters (start, stop), stop excluded.

    Returns:
        T labels, unshifted.

    Examples:
        >>> label_tokens([5, 6, 7, 8], [(0, 2), (2, 5), (5, 6), (6, 9)], [(4, 6)])
        [-100, 6, 7, -100]
    """
    ends = np.array([stop for _, stop in offsets], dtype=np.int64)
    inside = np.zeros(len(ends), dtype=bool)
    for start, stop in spans:
        inside |= (start < ends) & (ends <= stop)
    labels: list[int] = np.where(inside, np.asarray(input_ids, dtype=np.int64), IGNORE_INDEX).tolist()
    return labels


def _encode_rows(
    rows: Mapping[str, list[Any]],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    messages_field: str,
    block_size: int,
    train_on: TrainOn,
    origin: str,
) -> dict[str, list[Any]]:
    render = partial(_render, tokenizer)
    texts: list[str] = []
    every: list[list[Span]] = []
    for index, messages in zip(indices, rows[messages_field], strict=True):
        try:
            checked = checked_messages(messages)
            if train_on == "all":
                texts.append(render(checked, False))
            else:
                text, spans = assistant_spans(checked, render)
                texts.append(text)
                every.append(spans)
        except ValueError as error:
            raise ValueError(f"row {index + 1} of {origin}, field {messages_field!r}: {error}") from error
    # as apply_chat_template does: the template writes the special tokens. verbose=False: too long ones are cut below
    encoded = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    result: dict[str, list[Any]] = {"input_ids": [], "labels": [], "truncated": [], "predicted": []}
    for row, (ids, offsets) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
        labels = (ids if train_on == "all" else label_tokens(ids, offsets, every[row]))[:block_size]
        result["input_ids"].append(ids[:block_size])
        result["labels"].append(labels)
        result["truncated"].append(len(ids) > block_size)
        result["predicted"].append(sum(label != IGNORE_INDEX for label in labels[1:]))  # the first token never is
    return result


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refuses messages of the roles {roles}: {error}") from error
    return text


def _difference(part: str, whole: str) -> str:
    """The first place at which two texts differ, shown with a little of both."""
    at = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    return f"at character {at}, {part[at : at + 30]!r} against {whole[at : at + 30]!r}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
