"""SGLang's native ``/generate`` as a policy.

What it must be started with: the exported model, and nothing that changes log-probs. Without
``SGLANG_RETURN_ORIGINAL_LOGPROB`` they are those of the distribution at the request's temperature, before top-p, top-k
and min-p, which is what ours are. A seed has its way under ``--enable-deterministic-inference`` alone.

Facts about it (version 0.5) that the protocol does not tell:

- With ``ignore_eos`` the stop ids are ignored as well, so it is set only where a request has none.
- With pictures the ids are decoded, cut at the pictures' marks, and encoded anew. Ids that are not how the tokenizer
  would write their text would become others: such prompts are refused before they are sent.
- ``abort_request`` ends every request whose name begins as told, so all names here are equally long.
- A model that computes NaN "stops" for the text "NaN happened", on a token that it never sampled.
"""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mmagent.generation.http import seed_of
from mmagent.generation.http_transport import EndpointRefused, EndpointUnavailable, logger, read_object
from mmagent.generation.token_endpoints import Sampled, TokenPolicy
from mmagent.trajectories import Limits, Trajectory

ABORT_TIMEOUT = 5.0
"""Seconds that ending a request over there may take; the server ends one whose caller is gone by itself, later."""


class SGLangPolicy(TokenPolicy):
    """``POST {url}/generate`` with token ids and pictures; ``/abort_request`` for what is cancelled or given up;
    ``/update_weights_from_disk``."""

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.vocab.definition)

    def check(self, prompt: Trajectory, limits: Limits) -> None:
        """Beside what no server takes: ids next to pictures that would be read as others."""
        super().check(prompt, limits)
        if not prompt.images:
            return
        text = self._tokenizer.decode(prompt.input_ids, skip_special_tokens=False)
        read = self._tokenizer.encode(text, add_special_tokens=False).ids
        if read != prompt.input_ids:
            pairs = enumerate(zip(read, prompt.input_ids, strict=False))
            place = next((n for n, (a, b) in pairs if a != b), min(len(read), len(prompt)))
            ours, theirs = prompt.input_ids[place : place + 4], read[place : place + 4]
            raise ValueError(
                f"{prompt.key}: SGLang writes prompts with pictures out and reads them again, which makes other ids of "
                f"this one from place {place} on: {ours} becomes {theirs}"
            )

    async def sample(self, prompt: Trajectory, limits: Limits, urls: Sequence[str]) -> Sampled:
        """One try, under a name of its own: one that broke off may still be known over there."""
        name = uuid.uuid4().hex
        try:
            answer = await self.transport.post("/generate", self.body(name, prompt, limits, urls))
            return self._read(prompt, answer)
        except (EndpointUnavailable, asyncio.CancelledError) as error:
            if not getattr(error, "answered", False):  # else it goes on sampling for nobody
                await asyncio.shield(self._abort(name))
            raise

    def body(self, name: str, prompt: Trajectory, limits: Limits, urls: Sequence[str]) -> dict[str, Any]:
        """The request."""
        sampling = {
            "max_new_tokens": limits.max_tokens, "temperature": limits.temperature, "top_p": limits.top_p,
            "top_k": limits.top_k or -1, "min_p": limits.min_p, "sampling_seed": seed_of(limits),
            "stop_token_ids": list(limits.stop_ids), "stop": list(limits.stop_strings),
            "ignore_eos": not limits.stop_ids, "no_stop_trim": True,
            "skip_special_tokens": False, "spaces_between_special_tokens": False,
            "logit_bias": {str(index): -1e4 for index in self.barred},
        }  # fmt: skip
        body = {"rid": name, "input_ids": prompt.input_ids, "sampling_params": sampling, "return_logprob": True}
        if urls:
            body["image_data"] = list(urls)
        if self.config.moe_layers:
            body |= {"return_routed_experts": True, "routed_experts_start_len": len(prompt)}
        return body

    def _read(self, prompt: Trajectory, answer: Mapping[str, Any]) -> Sampled:
        where = f"{prompt.key}: {self.transport.base}"
        try:
            meta = answer["meta_info"]
            ended = meta["finish_reason"]
            if ended is None or ended["type"] == "abort":
                raise EndpointUnavailable(f"{where}: broken off there: {(ended or {}).get('message', '')!r}")
            told = meta["output_token_logprobs"]
            ids, logprobs = [entry[1] for entry in told], [entry[0] for entry in told]
            if meta["completion_tokens"] != len(ids) or answer.get("output_ids", ids) != ids:
                count = meta["completion_tokens"]
                raise EndpointRefused(f"{where}: {len(ids)} log-probs that are not those of its {count} ids")
            versions = self.numbers(where, [span["version"] for span in meta.get("weight_versions") or ()])
            return Sampled(
                ids, logprobs, ended["type"], meta["prompt_tokens"], ended.get("matched"),
                int(meta.get("cached_tokens") or 0), versions, self._last(where, meta),
                self._routed(meta.get("routed_experts")),
            )  # fmt: skip
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EndpointRefused(f"{where}: no answer of /generate: {error!r}: {str(answer)[:200]}") from error

    def _last(self, where: str, told: Mapping[str, Any]) -> int | None:
        name = told.get("weight_version")
        return None if name is None else self.numbers(where, [name])[0]

    def _routed(self, told: str | None) -> np.ndarray | None:
        if told is None or not self.config.moe_layers:
            return None
        flat = np.frombuffer(base64.b64decode(told, validate=True), np.dtype("<i4"))
        return flat.reshape(-1, self.config.layers, self.config.experts_per_token)

    async def _abort(self, name: str) -> None:
        try:
            await self.transport.tell("/abort_request", {"rid": name, "abort_all": False}, ABORT_TIMEOUT)
        except (EndpointUnavailable, EndpointRefused) as error:
            logger.warning("%s may go on with a request that nobody waits for: %s", self.transport.base, error)

    async def load(self, folder: str | None, version: int) -> None:
        """SGLang itself waits for what is in flight, and flushes its cache."""
        if folder is None:
            folder = (await self._info()).get("model_path")
            if not isinstance(folder, str) or not folder:
                raise EndpointRefused(f"{self.transport.base}: /get_model_info names no model_path to load again")
        body = {"model_path": folder, "weight_version": str(version), "flush_cache": True, "abort_all_requests": False}
        answer = read_object(
            await self.transport.tell("/update_weights_from_disk", body, self.config.update_timeout),
            f"{self.transport.base}/update_weights_from_disk: the answer",
        )
        if answer.get("success") is not True:
            raise EndpointRefused(f"{self.transport.base}: {folder} was not loaded: {str(answer)[:300]}")

    async def inspect(self) -> None:
        """That its weights are those this policy takes them for, where it tells."""
        version = self._last(self.transport.base, await self._info())
        if version not in (None, self.version):
            raise EndpointRefused(f"{self.transport.base} serves version {version}, this policy {self.version}")

    async def _info(self) -> dict[str, Any]:
        what = f"{self.transport.base}/get_model_info: the answer"
        return read_object(await self.transport.get("/get_model_info"), what)
