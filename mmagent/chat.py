"""Conversations to token ids and, in the same pass, the mask of what is trained on.

One renderer writes both; no mask comes from searching in text. Only the renderer writes control ids, and
rendering is append-only: turns ``1..n+1`` extend the ids of turns ``1..n`` (thinking of turns before the
last user turn, which the template collapses, is the documented exception).

The signal that ends an assistant turn is the *next role token*, and it is supervised: masking it teaches
a model never to stop. Formats after the released GLM-4.5 and GLM-4.7 chat templates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from mmagent.vocab import Vocab

JSON = None | bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"]


@dataclass(frozen=True)
class Text:
    """Plain text; control tokens spelled inside it stay text."""

    text: str

    def __post_init__(self) -> None:
        require_text("text", self.text)


@dataclass(frozen=True)
class Image:
    """A place for the next image of the conversation."""


@dataclass(frozen=True)
class Video:
    """A place for the next clip: one entry of ``timestamps`` (seconds) a temporal group of frames."""

    timestamps: tuple[float, ...]


@dataclass(frozen=True)
class Thinking:
    """Reasoning of an assistant turn."""

    text: str

    def __post_init__(self) -> None:
        require_text("thinking", self.text)


@dataclass(frozen=True)
class Box:
    """The final answer within an assistant's text, framed for whoever extracts it."""

    text: str

    def __post_init__(self) -> None:
        require_text("box", self.text)


@dataclass(frozen=True)
class ToolCall:
    """A function call of an assistant turn; argument values are text already (:func:`argument_text`)."""

    name: str
    arguments: Mapping[str, str]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.arguments, Mapping):
            raise ValueError(f"a tool call is a name and a mapping, got {self.name!r:.80} and {self.arguments!r:.80}")
        if not self.name or self.name != self.name.strip() or "\n" in self.name:
            raise ValueError(f"the name of a tool call must be one line without spaces around it, got {self.name!r}")
        odd = [key for key, value in self.arguments.items() if not (isinstance(key, str) and isinstance(value, str))]
        if odd:
            raise ValueError(f"tool call {self.name!r}: argument {odd[0]!r} must be text; argument_text writes others")
        require_text("the name of a tool call", self.name)
        for key, value in self.arguments.items():
            require_text(f"tool call {self.name!r}: the name of an argument", key)
            require_text(f"tool call {self.name!r}: argument {key!r}", value)


@dataclass(frozen=True)
class Tool:
    """A function that the assistant may call, as the system turn declares it.

    ``declaration`` is one JSON object: ``{"type": "function", "function": {"name": ..., "parameters": ...}}``, or the
    function alone. It is kept as the templates of the family write it (the keys in their order, a space behind colon
    and comma, no escapes but those of JSON), so that equal declarations have equal ids however they were spaced.
    """

    declaration: str

    def __post_init__(self) -> None:
        try:
            parsed = parse_json(self.declaration)
        except ValueError as error:
            raise ValueError(f"a tool's declaration must be JSON: {error}") from error
        function = _function(parsed)
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"a tool's declaration must be an object with the function's name, got {parsed!r:.200}")
        if name != name.strip() or "\n" in name:
            raise ValueError(f"the name of a tool must be one line without spaces around it, got {name!r}")
        for field, kind in (("description", str), ("parameters", dict)):
            if not isinstance(function.get(field), kind | None):
                raise ValueError(f"tool {name!r}: {field} must be {kind.__name__}, got {function[field]!r:.200}")
        require_text(f"tool {name!r}", json_text(parsed))
        object.__setattr__(self, "declaration", json_text(parsed))

    @property
    def name(self) -> str:
        return str(_function(json.loads(self.declaration))["name"])


def _function(declaration: JSON) -> Mapping[str, JSON]:
    inner = declaration.get("function", declaration) if isinstance(declaration, dict) else {}
    return inner if isinstance(inner, dict) else {}


def require_text(where: str, text: str) -> str:
    """``text``, which must be Unicode: half of a surrogate pair cannot be written, and no tokenizer takes it. Raises
    ``ValueError`` that begins with ``where``."""
    if not isinstance(text, str):
        raise ValueError(f"{where} must be text, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise ValueError(f"{where}: {half} at character {error.start} is half of a surrogate pair, no text") from error
    return text


def json_text(value: JSON) -> str:
    """JSON as the templates of the family write it. Raises ``ValueError`` for what JSON cannot hold."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"no JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error


def parse_json(text: str) -> Any:
    """What ``text`` says in JSON. Raises ``ValueError`` for all else: NaN, a number beyond floats, an object that names
    a key twice, lists in lists deeper than Python reads (a model that repeats itself writes them)."""
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_said_once)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error


_TOO_DEEP = "lists and objects stand in each other too deep"


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text:.20} is no number of JSON that can be kept")
    return float(text)


def _said_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is said twice")
    return read


def argument_text(value: JSON) -> str:
    """The value of an argument as a call writes it: strings as they are, everything else as JSON."""
    return value if isinstance(value, str) else json_text(value)


Part = Text | Image | Video | Thinking | Box | ToolCall
ROLES = ("system", "user", "assistant", "observation")


@dataclass(frozen=True)
class Message:
    """One turn. ``role`` is one of system, user, assistant, observation (a tool's answer).

    ``trainable`` false keeps an assistant turn out of the loss (a bad turn left in as context).
    """

    role: str
    parts: tuple[Part, ...]
    trainable: bool = True

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} is none of {', '.join(ROLES)}")
        if odd := [part for part in self.parts if not isinstance(part, Part)]:
            raise ValueError(f"a {self.role} message: {odd[0]!r:.80} is no part; texts are Text")
        spoken = [type(p).__name__ for p in self.parts if isinstance(p, Thinking | Box | ToolCall)]
        if spoken and self.role != "assistant":
            raise ValueError(f"{spoken[0]} in a {self.role} message: only the assistant thinks, answers and calls")
        seen = [type(p).__name__ for p in self.parts if isinstance(p, Image | Video)]
        if seen and self.role in ("assistant", "system"):
            raise ValueError(f"{seen[0]} in a {self.role} message")

    @property
    def calls_tool(self) -> bool:
        return any(isinstance(part, ToolCall) for part in self.parts)


def user(*parts: Part | str) -> Message:
    """A user turn from text and images."""
    return Message("user", _parts("user", parts))


def assistant(*parts: Part | str, trainable: bool = True) -> Message:
    """An assistant turn from text, thinking, boxes and tool calls."""
    return Message("assistant", _parts("assistant", parts), trainable)


def observation(*parts: Part | str) -> Message:
    """A tool's answer; consecutive text parts are joined with a newline, as the big servers do."""
    return Message("observation", _parts("observation", parts))


def _parts(role: str, parts: Sequence[Part | str]) -> tuple[Part, ...]:
    try:
        return tuple(Text(part) if isinstance(part, str) else part for part in parts)
    except ValueError as error:
        raise ValueError(f"a {role} message: {error}") from error


class Generation(Enum):
    """Which released template is followed: they differ in newlines and in how thinking is switched off."""

    GLM45 = "glm45"
    GLM47 = "glm47"


@dataclass
class ChatConfig:
    """``thinking`` false renders the direct-answer mode. ``preserve_thinking`` keeps all earlier thoughts.

    ``hybrid``: of conversations to train on, each has the mode that its answers show (:meth:`mode_of`), so that one
    model learns both; ``thinking`` then says only how it is asked."""

    generation: Generation = Generation.GLM45
    thinking: bool = False
    preserve_thinking: bool = False
    hybrid: bool = False

    def mode_of(self, messages: Sequence[Message]) -> ChatConfig:
        """How to render a conversation for training: of a hybrid model, with thinking where an assistant thinks."""
        if not self.hybrid:
            return self
        thinks = any(isinstance(part, Thinking) for message in messages for part in message.parts)
        return replace(self, thinking=thinks)


@dataclass(frozen=True)
class Rendered:
    """``ids`` and ``trainable`` of equal length."""

    ids: list[int]
    trainable: list[bool]


class _Writer:
    """Collects ids and mask; adjacent text of one kind is encoded together, as a template's string would be."""

    def __init__(self, vocab: Vocab):
        self.vocab = vocab
        self.ids: list[int] = []
        self.trainable: list[bool] = []
        self._text = ""
        self._text_trainable = False

    def text(self, text: str, trainable: bool = False) -> None:
        if trainable != self._text_trainable:
            self.flush()
            self._text_trainable = trainable
        self._text += text

    def control(self, token: str, trainable: bool = False) -> None:
        self.flush()
        self._put([self.vocab.id(token)], trainable)

    def image(self, tokens: int) -> None:
        self.control("<|begin_of_image|>")
        self._put([self.vocab.image_id] * tokens, False)
        self.control("<|end_of_image|>")

    def flush(self) -> None:
        if self._text:
            self._put(self.vocab.encode(self._text), self._text_trainable)
            self._text = ""

    def _put(self, ids: Sequence[int], trainable: bool) -> None:
        self.ids.extend(ids)
        self.trainable.extend([trainable] * len(ids))


def render(
    messages: Sequence[Message],
    vocab: Vocab,
    image_tokens: Sequence[int] = (),
    config: ChatConfig | None = None,
    *,
    tools: Sequence[Tool] = (),
    generate: bool = False,
) -> Rendered:
    """A conversation as ids and mask.

    ``image_tokens[i]`` is the number of visual tokens of the i-th image; a clip takes one entry a
    timestamp. ``tools`` are declared in a system turn before everything else. ``generate`` ends with the
    assistant's opening, ready for a completion; otherwise a conversation that ends with the assistant closes with
    the supervised role token of whoever comes next.

    Raises ``ValueError`` when roles cannot follow each other, or images and ``image_tokens`` disagree.
    """
    config = config or ChatConfig()
    check_order(messages, generate)
    writer = _Writer(vocab)
    writer.control("[gMASK]")
    writer.control("<sop>")
    if tools:
        _declare(writer, tools, config)
    remaining = list(image_tokens)
    last_user = max((n for n, m in enumerate(messages) if m.role == "user"), default=-1)
    previous: Message | None = None
    for n, message in enumerate(messages):
        if not (message.role == "observation" and previous is not None and previous.role == "observation"):
            supervised = previous is not None and previous.role == "assistant" and previous.trainable
            writer.control(f"<|{message.role}|>", supervised)
        if message.role == "assistant":
            keep = config.preserve_thinking or n > last_user
            _assistant(writer, message, config, keep_thinking=keep)
        else:
            _listener(writer, message, config, remaining)
        previous = message
    if generate:
        writer.control("<|assistant|>")
        _open_thinking(writer, config)
    elif previous is not None and previous.role == "assistant":
        writer.control("<|observation|>" if previous.calls_tool else "<|user|>", previous.trainable)
    return _finish(writer, image_tokens, remaining)


def render_parts(
    parts: Sequence[Part], vocab: Vocab, image_tokens: Sequence[int] = (), *, ended: bool = True
) -> Rendered:
    """An interleaved document, ``[gMASK]<sop>`` parts ``<|endoftext|>``: all text and the end are supervised.

    Texts stand as they are, with nothing between them; ``image_tokens`` as in :func:`render`. One that is not ``ended``
    goes on in another document: it has no end, as none would be true.
    """
    writer = _Writer(vocab)
    writer.control("[gMASK]")
    writer.control("<sop>")
    remaining = list(image_tokens)
    for part in parts:
        if isinstance(part, Text):
            writer.text(part.text, trainable=True)
        else:
            _see(writer, part, remaining)
    if ended:
        writer.control("<|endoftext|>", trainable=True)
    return _finish(writer, image_tokens, remaining)


def _finish(writer: _Writer, image_tokens: Sequence[int], remaining: Sequence[int]) -> Rendered:
    writer.flush()
    if remaining:
        raise ValueError(
            f"image_tokens: {len(image_tokens)} given, {len(image_tokens) - len(remaining)} images in the text"
        )
    return Rendered(writer.ids, writer.trainable)


def turn_opening(vocab: Vocab, config: ChatConfig | None = None) -> list[int]:
    """Ids that open an assistant turn after a closed user turn; what `generate` appends."""
    writer = _Writer(vocab)
    writer.control("<|assistant|>")
    _open_thinking(writer, config or ChatConfig())
    writer.flush()
    return writer.ids


def next_turn(
    message: Message,
    vocab: Vocab,
    image_tokens: Sequence[int] = (),
    config: ChatConfig | None = None,
    *,
    role_sampled: bool = True,
) -> list[int]:
    """Ids that follow a sampled completion: a turn the model reads, then the assistant's opening.

    A completion that stopped by itself ends with the role token of this turn (``role_sampled``); one that was
    cut by a limit, or ended otherwise, does not, and the token is written here.

    Raises ``ValueError`` for a turn of the user where ``config`` then drops the thoughts before it: nothing that is
    appended could be what :func:`render` writes.
    """
    config = config or ChatConfig()
    if message.role not in ("user", "observation"):
        raise ValueError(f"next_turn: a {message.role} message cannot follow a completion")
    if message.role == "user" and config.thinking and not config.preserve_thinking:
        raise ValueError("next_turn: a turn of the user drops the thoughts before it, unless preserve_thinking")
    writer = _Writer(vocab)
    if not role_sampled:
        writer.control(f"<|{message.role}|>")
    remaining = list(image_tokens)
    _listener(writer, message, config, remaining)
    writer.flush()
    if remaining:
        raise ValueError(f"image_tokens: {len(image_tokens)} given, {len(remaining)} without an image in the text")
    return [*writer.ids, *turn_opening(vocab, config)]


def completion_text(ids: Sequence[int], vocab: Vocab, config: ChatConfig | None = None) -> str:
    """The visible answer of a sampled completion: what follows the thinking, without control tokens.

    A completion that never ended its thinking (``config.thinking``) has none: a thought is not said.
    """
    ids = list(ids)
    if still_thinking(ids, vocab, config):
        return ""
    closing = vocab.id("</think>")
    if closing in ids:
        ids = ids[ids.index(closing) + 1 :]
    return vocab.decode(ids, control=False).strip()


def still_thinking(ids: Sequence[int], vocab: Vocab, config: ChatConfig | None = None) -> bool:
    """Whether a completion, perhaps a cut one, is inside its thinking at its end."""
    return (config or ChatConfig()).thinking and vocab.id("</think>") not in ids


def forced_answer(vocab: Vocab) -> list[int]:
    """Ids that end a thought from outside, where it has used up its budget: the model goes on with its answer.

    They were not sampled, and are not trained on.
    """
    return [vocab.id("</think>")]


def check_order(messages: Sequence[Message], generate: bool = False) -> None:
    """Raises ``ValueError`` naming the first message that cannot follow the one before it."""
    for n, message in enumerate(messages):
        before = messages[n - 1] if n else None
        if message.role == "system" and n:
            raise ValueError(f"message {n}: a system message must come first")
        if message.role == "observation" and not (before and (before.role == "observation" or before.calls_tool)):
            raise ValueError(f"message {n}: an observation must follow a tool call")
        if message.role == "user" and before is not None and before.calls_tool:
            raise ValueError(f"message {n}: a tool call must be answered by an observation")
        if message.role == "assistant" and (before is None or before.role == "assistant"):
            raise ValueError(f"message {n}: an assistant turn must follow a user or an observation")
    if generate and (not messages or messages[-1].role in ("assistant", "system")):
        raise ValueError("generate: the conversation must end with a user turn or an observation")


def _declare(writer: _Writer, tools: Sequence[Tool], config: ChatConfig) -> None:
    """The system turn that tells of the tools, word for word that of the released templates."""
    newline = _newline(config)
    writer.control("<|system|>")
    writer.text(
        "\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    )
    writer.text("".join(tool.declaration + "\n" for tool in tools) + "</tools>\n\n")
    writer.text("For each function call, output the function name and arguments within the following XML format:\n")
    example = {f"{{arg-key-{n}}}": f"{{arg-value-{n}}}" for n in (1, 2)}
    _call(writer, ToolCall("{function-name}", example), newline, False, ending="..." + newline)


def _newline(config: ChatConfig) -> str:
    return "\n" if config.generation is Generation.GLM45 else ""


def _open_thinking(writer: _Writer, config: ChatConfig) -> None:
    if config.thinking:
        writer.text(_newline(config))
        writer.control("<think>")
    else:
        _no_thinking(writer, config)


def _no_thinking(writer: _Writer, config: ChatConfig) -> None:
    """An answer without thoughts: an empty pair in GLM-4.5, only the closing mark in GLM-4.7."""
    writer.text(_newline(config))
    if config.generation is Generation.GLM45:
        writer.control("<think>")
    writer.control("</think>")


def _assistant(writer: _Writer, message: Message, config: ChatConfig, *, keep_thinking: bool) -> None:
    trainable = message.trainable
    thought = "\n".join(part.text for part in message.parts if isinstance(part, Thinking)).strip()
    if config.thinking and keep_thinking:
        writer.text(_newline(config))
        writer.control("<think>")
        writer.text(thought, trainable)
        writer.control("</think>", trainable)
    else:
        _no_thinking(writer, config)
    said = spoken_parts(message.parts)
    if said:
        writer.text(_newline(config), trainable)
    for part in said:
        if isinstance(part, Box):
            writer.control("<|begin_of_box|>", trainable)
            writer.text(part.text, trainable)
            writer.control("<|end_of_box|>", trainable)
        else:
            writer.text(part.text, trainable)
    for part in message.parts:
        if isinstance(part, ToolCall):
            writer.text(_newline(config), trainable)
            _call(writer, part, _newline(config), trainable)


def spoken_parts(parts: Sequence[Part]) -> tuple[Text | Box, ...]:
    """What an assistant's turn says, as it is written: neighbouring texts are one, joined with a newline, and the
    whole is stripped of the space around it."""
    said: list[Text | Box] = []
    for part in parts:
        if isinstance(part, Text) and said and isinstance(said[-1], Text):
            said[-1] = Text(said[-1].text + "\n" + part.text)
        elif isinstance(part, Text | Box):
            said.append(part)
    if said and isinstance(said[0], Text):
        said[0] = Text(said[0].text.lstrip())
    if said and isinstance(said[-1], Text):
        said[-1] = Text(said[-1].text.rstrip())
    return tuple(part for part in said if isinstance(part, Box) or part.text)


def _call(writer: _Writer, call: ToolCall, newline: str, trainable: bool, ending: str = "") -> None:
    writer.control("<tool_call>", trainable)
    writer.text(call.name + newline, trainable)
    for key, value in call.arguments.items():
        for tag, text in (("arg_key", key), ("arg_value", value)):
            writer.control(f"<{tag}>", trainable)
            writer.text(text, trainable)
            writer.control(f"</{tag}>", trainable)
            writer.text(newline, trainable)
    writer.text(ending, trainable)
    writer.control("</tool_call>", trainable)


def _listener(writer: _Writer, message: Message, config: ChatConfig, remaining: list[int]) -> None:
    """A turn the model only reads: system, user or a tool's answer."""
    newline = _newline(config)
    writer.text(newline)
    if message.role == "observation":
        writer.control("<tool_response>")
        writer.text(newline)
    before: Part | None = None
    for part in message.parts:
        if isinstance(part, Text):
            writer.text(("\n" if isinstance(before, Text) else "") + part.text)
        else:
            _see(writer, part, remaining)
        before = part
    if message.role == "observation":
        writer.text(newline)
        writer.control("</tool_response>")
    if message.role == "user" and not config.thinking and config.generation is Generation.GLM45:
        writer.control("/nothink")


def _see(writer: _Writer, part: Part, remaining: list[int]) -> None:
    if isinstance(part, Image):
        writer.image(_take(remaining))
    elif isinstance(part, Video):
        writer.control("<|begin_of_video|>")
        for seconds in part.timestamps:
            writer.image(_take(remaining))
            writer.text(f"{seconds:.1f} seconds")
        writer.control("<|end_of_video|>")
    else:
        raise ValueError(f"{type(part).__name__} can only stand in an assistant turn")


def _take(remaining: list[int]) -> int:
    if not remaining:
        raise ValueError("image_tokens: more images in the conversation than counts given")
    return remaining.pop(0)
