"""What is told of completions, as each door's clients read it: whole answers and the events of streams."""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from mmagent.chat import ChatConfig, Tool, ToolCall
from mmagent.replies import arguments_of
from mmagent.serve.policy import Delta
from mmagent.serve.prompts import Choice
from mmagent.serve.refusals import Refused, bad
from mmagent.serve.requests import TokenAsk, Wish, arguments_json
from mmagent.serve.spoken import Answer, PlainAnswer, Said
from mmagent.trajectories import Completion
from mmagent.vocab import Vocab


@dataclass
class Telling:
    """One choice being told: its reader, its place in the answer, and what it has come to."""

    number: int
    choice: Choice
    reader: Answer | PlainAnswer
    told: list[Said] = field(default_factory=list)
    calls: int = 0
    problem: str = ""

    @property
    def thought(self) -> str:
        return "".join(said.thought for said in self.told)

    @property
    def text(self) -> str:
        return "".join(said.text for said in self.told)

    def feed(self, ids: Sequence[int]) -> list[Said]:
        said = self.reader.feed(ids)
        self.told += said
        return said

    def finish(self, completion: Completion) -> list[Said]:
        """The rest of what is said. Raises :class:`Refused` (500) for a completion that a watchdog gave up, 503 for one
        that was cancelled."""
        if completion.reason == "sick":
            raise Refused(500, "a watchdog gave up what the model wrote: it repeats itself or is garbled", code="sick")
        if completion.reason == "cancelled":
            raise Refused(503, "the completion was cancelled", code="cancelled", retry_after=1)
        cut = self.reader.stopped or not completion.ids or completion.ids[-1] not in self.choice.limits.stop_ids
        said = self.reader.finish(cut=cut)
        self.told += said
        self.problem = self.problem or self.reader.problem  # a stream may have told of a call before
        return said

    def reason(self, completion: Completion) -> str:
        """Why it ended, as OpenAI's API says it."""
        if self.reader.stopped or completion.reason == "stop" or (not completion.reason and completion.stopped):
            return "tool_calls" if any(said.call for said in self.told) else "stop"
        return "length"


class Teller:
    """What the doors share: names, counts and tokens of an answer. ``model`` is what the server calls it."""

    kind = ""  # of an answer's id

    def __init__(self, model: str, vocab: Vocab, wish: Wish, choices: Sequence[Choice]):
        self.model, self.vocab, self.wish, self.choices = model, vocab, wish, choices
        self.id = f"{self.kind}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def usage(self, tellings: Sequence[Telling], done: Sequence[Completion]) -> dict[str, Any]:
        """Counts; a prompt that has several choices counts once."""
        prompts = {id(choice.prompt): len(choice.prompt.ids) for choice in self.choices}
        cached: dict[int, int] = {}
        for choice, completion in zip(self.choices, done, strict=True):
            cached[id(choice.prompt)] = max(cached.get(id(choice.prompt), 0), completion.cached_tokens)
        written = sum(len(completion.ids) for completion in done)
        return {
            "prompt_tokens": sum(prompts.values()),
            "completion_tokens": written,
            "total_tokens": sum(prompts.values()) + written,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
            "completion_tokens_details": {"reasoning_tokens": sum(t.reader.thought_tokens for t in tellings)},
        }

    def word(self, index: int) -> str:
        """A token by itself."""
        return self.vocab.decode([index])


def policies(versions: Sequence[int]) -> str:
    """Which versions of the weights wrote it, as a fingerprint."""
    return "policy-" + "-".join(map(str, versions)) if versions else "policy"


# ---------------------------------------------------------------------------------------------- chat


class ChatTeller(Teller):
    """Chat completions. A thought goes into ``reasoning_content``, as servers of thinking models have it; a choice that
    left the chat format says how in ``format_problem``."""

    kind = "chatcmpl"

    def __init__(
        self,
        model: str,
        vocab: Vocab,
        wish: Wish,
        choices: Sequence[Choice],
        chat: ChatConfig,
        tools: Sequence[Tool],
    ):
        super().__init__(model, vocab, wish, choices)
        self.chat, self.tools = chat, tools

    def _tellings(self) -> list[Telling]:
        return [
            Telling(n, choice, Answer(self.vocab, self.chat, self.wish.stop)) for n, choice in enumerate(self.choices)
        ]

    def whole(self, done: Sequence[Completion]) -> dict[str, Any]:
        """The answer's body. Raises :class:`Refused` as :meth:`Telling.finish` does."""
        tellings = self._tellings()
        choices = []
        for telling, completion in zip(tellings, done, strict=True):
            calls = [self._call(telling, said.call) for said in telling.feed(completion.ids) if said.call is not None]
            telling.finish(completion)
            message: dict[str, Any] = {"role": "assistant", "content": telling.text or (None if calls else "")}
            message["refusal"] = None
            if telling.thought or self.chat.thinking:
                message["reasoning_content"] = telling.thought
            if calls:
                message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
            choice = {"index": telling.number, "message": message} | self._end(telling, completion)
            choice["logprobs"] = self._logprobs(completion.ids, completion.logprobs)
            choices.append(choice | ({"token_ids": list(completion.ids)} if self.wish.ids else {}))
        body = self.head("chat.completion") | {"choices": choices, "usage": self.usage(tellings, done)}
        body["system_fingerprint"] = policies(sorted({v for completion in done for v in completion.versions}))
        return body | self._prompt_ids()

    async def events(self, deltas: AsyncIterator[tuple[int, Delta]]) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream. Raises as :meth:`whole`."""
        tellings = self._tellings()
        done: dict[int, Completion] = {}
        for telling in tellings:
            yield self._chunk(telling.number, {"role": "assistant", "content": ""}) | (
                self._prompt_ids() if telling.number == 0 else {}
            )
        async for n, delta in deltas:
            telling = tellings[n]
            said = telling.feed(delta.ids)
            if delta.completion is not None:
                said += telling.finish(delta.completion)
            pieces = [self._piece(telling, piece) for piece in said]
            told = {"logprobs": self._logprobs(delta.ids, delta.logprobs)} if self.wish.logprobs and delta.ids else {}
            told |= {"token_ids": list(delta.ids)} if self.wish.ids and delta.ids else {}
            if told and not pieces:
                pieces = [{"content": ""}]
            for at, piece in enumerate(pieces):
                yield self._chunk(n, piece, told if at == 0 else {})
            if delta.completion is not None:
                done[n] = delta.completion
                yield self._chunk(n, {}, self._end(telling, delta.completion))
        if self.wish.usage:
            usage = self.usage(tellings, [done[n] for n in range(len(tellings))])
            yield self.head("chat.completion.chunk") | {"choices": [], "usage": usage}

    def _chunk(self, n: int, delta: dict[str, Any], more: dict[str, Any] | None = None) -> dict[str, Any]:
        choice = {"index": n, "delta": delta, "logprobs": None, "finish_reason": None} | (more or {})
        return self.head("chat.completion.chunk") | {"choices": [choice]}

    def _piece(self, telling: Telling, said: Said) -> dict[str, Any]:
        if said.call is not None:
            return {"tool_calls": [self._call(telling, said.call)]}
        return {"reasoning_content": said.thought} if said.thought else {"content": said.text}

    def _call(self, telling: Telling, call: ToolCall) -> dict[str, Any]:
        """Arguments as the values that the declaration asks for; as the texts they are where they do not fit it."""
        try:
            values = arguments_of(call, self.tools)
        except ValueError as error:
            telling.problem = telling.problem or str(error)
            values = dict(call.arguments)
        n, telling.calls = telling.calls, telling.calls + 1
        name = f"call_{self.id.partition('-')[2]}_{telling.number}_{n}"
        return {
            "index": n,
            "id": name,
            "type": "function",
            "function": {"name": call.name, "arguments": arguments_json(values)},
        }

    def _end(self, telling: Telling, completion: Completion) -> dict[str, Any]:
        end: dict[str, Any] = {"finish_reason": telling.reason(completion)}
        return end | ({"format_problem": telling.problem} if telling.problem else {})

    def _logprobs(self, ids: Sequence[int], logprobs: Sequence[float]) -> dict[str, Any] | None:
        if not self.wish.logprobs:
            return None
        content = []
        for index, logprob in zip(ids, logprobs, strict=True):
            word = self.word(index)
            spelled = word.encode() if self.vocab.is_control(index) else self.vocab.bytes_of(index)
            content.append({"token": word, "logprob": logprob, "bytes": list(spelled), "top_logprobs": []})
        return {"content": content, "refusal": None}

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self.choices[0].prompt.ids)} if self.wish.ids else {}


# ---------------------------------------------------------------------------------------------- text


class TextTeller(Teller):
    """Completions of texts and token ids."""

    kind = "cmpl"

    def _tellings(self) -> list[Telling]:
        return [Telling(n, choice, PlainAnswer(self.vocab, self.wish.stop)) for n, choice in enumerate(self.choices)]

    def whole(self, done: Sequence[Completion]) -> dict[str, Any]:
        """The answer's body. Raises :class:`Refused` as :meth:`Telling.finish` does."""
        tellings = self._tellings()
        choices = []
        for telling, completion in zip(tellings, done, strict=True):
            telling.feed(completion.ids)
            telling.finish(completion)
            choice = self._choice(telling, telling.text, completion.ids, completion.logprobs, 0)
            choice["finish_reason"] = telling.reason(completion)
            choices.append(choice | self._prompt_ids(telling))
        return self.head("text_completion") | {
            "choices": choices,
            "usage": self.usage(tellings, done),
            "system_fingerprint": policies(sorted({v for completion in done for v in completion.versions})),
        }

    async def events(self, deltas: AsyncIterator[tuple[int, Delta]]) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream. Raises as :meth:`whole`."""
        tellings = self._tellings()
        done: dict[int, Completion] = {}
        begun: set[int] = set()
        async for n, delta in deltas:
            telling = tellings[n]
            offset = len(telling.text)
            said = telling.feed(delta.ids)
            if delta.completion is not None:
                said += telling.finish(delta.completion)
            text = "".join(piece.text for piece in said)
            choice = self._choice(telling, text, delta.ids, delta.logprobs, offset)
            if delta.completion is not None:
                done[n] = delta.completion
                choice["finish_reason"] = telling.reason(delta.completion)
            if text or delta.completion is not None or self.wish.ids or self.wish.logprobs:
                first = {} if n in begun else self._prompt_ids(telling)
                begun.add(n)
                yield self.head("text_completion") | {"choices": [choice | first]}
        if self.wish.usage:
            usage = self.usage(tellings, [done[n] for n in range(len(tellings))])
            yield self.head("text_completion") | {"choices": [], "usage": usage}

    def _choice(
        self, telling: Telling, text: str, ids: Sequence[int], logprobs: Sequence[float], offset: int
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": telling.number, "text": text, "logprobs": None, "finish_reason": None}
        if self.wish.logprobs:
            words = [self.word(index) for index in ids]
            offsets = list(accumulate(map(len, words[:-1]), initial=offset))[: len(words)]
            choice["logprobs"] = {
                "tokens": words,
                "token_logprobs": list(logprobs),
                "top_logprobs": None,
                "text_offset": offsets,
            }
        return choice | ({"token_ids": list(ids)} if self.wish.ids else {})

    def _prompt_ids(self, telling: Telling) -> dict[str, Any]:
        return {"prompt_token_ids": list(telling.choice.prompt.ids)} if self.wish.ids else {}


# ---------------------------------------------------------------------------------------------- tokens


def _routed(completion: Completion) -> str:
    """The experts of every sampled token but the last: int32 of ``(n - 1, M, K)`` in base64. Raises :class:`Refused`
    where none were recorded."""
    if len(completion.ids) < 2:
        return ""
    if not completion.routed_experts:
        told = "return_routed_experts: none are recorded; start the server with --record-routing"
        raise bad(told, "return_routed_experts")
    rows = torch.stack(completion.routed_experts)[:-1].to(torch.int32)
    return base64.b64encode(rows.cpu().numpy().astype("<i4").tobytes()).decode()


def tokens_body(ask: TokenAsk, choice: Choice, completion: Completion, vocab: Vocab, version: int) -> dict[str, Any]:
    """The answer of ``/generate``. Raises :class:`Refused` as :meth:`Telling.finish` does."""
    wish = ask.wish
    telling = Telling(0, choice, PlainAnswer(vocab, () if ask.keep_stop else wish.stop, marks=ask.marks))
    telling.feed(completion.ids)
    telling.finish(completion)
    if completion.reason == "stop" or (not completion.reason and completion.stopped):
        last = completion.ids[-1]
        by_id = last in choice.limits.stop_ids
        matched = last if by_id else next((s for s in wish.stop if s in vocab.decode(completion.ids)), None)
        finish: dict[str, Any] = {"type": "stop", "matched": matched}
    else:
        finish = {"type": "length", "length": choice.limits.max_tokens}
    meta: dict[str, Any] = {
        "id": ask.name or f"gen-{secrets.token_hex(12)}",
        "finish_reason": finish,
        "prompt_tokens": len(choice.prompt.ids),
        "completion_tokens": len(completion.ids),
        "cached_tokens": completion.cached_tokens,
        "weight_version": str(completion.versions[-1] if completion.versions else version),
        "policy_versions": list(completion.versions or (version,)),
    }
    if wish.logprobs:
        pairs = zip(completion.ids, completion.logprobs, strict=True)
        meta["output_token_logprobs"] = [[logprob, index, None] for index, logprob in pairs]
    if ask.experts:
        meta["routed_experts"] = _routed(completion)
    return {"text": telling.text, "output_ids": list(completion.ids), "meta_info": meta}
