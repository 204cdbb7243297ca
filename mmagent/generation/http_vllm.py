"""vLLM's token-in, token-out endpoint ``/inference/v1/generate`` as a policy, and ``/v1/completions`` for text where a
server has no other.

What it must be started with (0.32)::

    VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --enable-scale-out --logprobs-mode processed_logprobs

``processed_logprobs`` are those at the request's temperature, with what cannot be sampled left out; else vLLM tells
them of the raw model (:meth:`VLLMPolicy.wait_ready` finds out). With top-p, top-k or min-p they would be of what these
leave, which is not what the trainer computes: such limits are refused. The development mode has the doors by which
weights are loaded; keep it away from strangers.

Facts about it that the protocol does not tell: stop ids hold with ``ignore_eos``, which leaves out those of the model's
own configuration; a request whose connection closes is aborted; a picture's place is one image id, which its processor
repeats, and ``return_token_ids`` tells the prompt as it was read after that.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmagent.generation.http import seed_of
from mmagent.generation.http_transport import EndpointRefused, EndpointUnavailable, read_object
from mmagent.generation.token_endpoints import Sampled, TokenPolicy
from mmagent.geometry import visual_tokens
from mmagent.trajectories import Limits, Trajectory

LEAST_BIAS = -100.0
"""What vLLM makes of every bias below: a factor of 4e-44."""


class VLLMPolicy(TokenPolicy):
    """``POST {url}/inference/v1/generate`` with token ids and pictures."""

    path = "/inference/v1/generate"

    def check(self, prompt: Trajectory, limits: Limits) -> None:
        """Beside what no server takes: limits under which its log-probs would not be ours."""
        super().check(prompt, limits)
        if limits.temperature > 0 and (limits.top_p < 1 or limits.top_k > 0 or limits.min_p > 0):
            raise ValueError(f"{prompt.key}: vLLM tells log-probs of what top_p, top_k and min_p leave: {limits}")

    async def sample(self, prompt: Trajectory, limits: Limits, urls: Sequence[str]) -> Sampled:
        """One try."""
        return await self._ask(prompt, self.body(prompt, limits, urls))

    async def _ask(self, prompt: Trajectory, body: Mapping[str, Any]) -> Sampled:
        answer = await self.transport.post(self.path, body)
        where = f"{prompt.key}: {self.transport.base}{self.path}"
        try:
            choice = answer["choices"][0]
            reason = choice["finish_reason"]
            if reason in ("abort", "error"):
                raise EndpointUnavailable(f"{where}: broken off there")
            ids = choice["token_ids"]
            usage = answer["usage"]
            if usage["completion_tokens"] != len(ids):
                raise EndpointRefused(f"{where}: {len(ids)} ids, counted as {usage['completion_tokens']}")
            versions = self.numbers(where, [span["version"] for span in choice.get("weight_versions") or ()])
            return Sampled(
                ids, self._logprobs(where, choice, ids), reason, usage["prompt_tokens"], choice.get("stop_reason"),
                int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0), versions,
                versions[-1] if versions else None, self._routed(choice.get("routed_experts")),
                self._prompt_ids(answer, choice),
            )  # fmt: skip
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EndpointRefused(f"{where}: no answer of this endpoint: {error!r}: {str(answer)[:200]}") from error

    def body(self, prompt: Trajectory, limits: Limits, urls: Sequence[str]) -> dict[str, Any]:
        """The request."""
        body: dict[str, Any] = {
            "model": self.config.model,
            "token_ids": self.places(prompt),
            "sampling_params": self.sampling(prompt, limits) | {"detokenize": bool(limits.stop_strings)},
            "return_token_ids": True,
        }
        if urls:
            body["content_parts"] = [{"type": "image_url", "url": url} for url in urls]
        return body

    def sampling(self, prompt: Trajectory, limits: Limits) -> dict[str, Any]:
        """What both endpoints call alike."""
        told: dict[str, Any] = {
            "max_tokens": limits.max_tokens, "temperature": limits.temperature, "top_p": limits.top_p,
            "top_k": limits.top_k, "min_p": limits.min_p, "seed": seed_of(limits),
            "stop_token_ids": list(limits.stop_ids), "stop": list(limits.stop_strings), "ignore_eos": True,
            "include_stop_str_in_output": True, "skip_special_tokens": False, "spaces_between_special_tokens": False,
            "logprobs": 0, "logit_bias": {str(index): LEAST_BIAS for index in self.barred},
        }  # fmt: skip
        return told | ({"routed_experts_prompt_start": len(prompt)} if self.config.moe_layers else {})

    def places(self, prompt: Trajectory) -> list[int]:
        """The prompt's ids with one for every picture."""
        counts = iter([visual_tokens(image.grid, self.geometry.merge_size) for image in prompt.images])
        ids, at = [], 0
        while at < len(prompt):
            ids.append(prompt.input_ids[at])
            at += next(counts) if ids[-1] == self.vocab.image_id else 1
        return ids

    def _prompt_ids(self, answer: Mapping[str, Any], choice: Mapping[str, Any]) -> Sequence[int]:
        return answer["prompt_token_ids"]

    def _logprobs(self, where: str, choice: Mapping[str, Any], ids: Sequence[int]) -> list[Any]:
        told = choice["logprobs"]["content"]
        if [entry["token_id"] for entry in told] != list(ids):
            raise EndpointRefused(f"{where}: {len(told)} log-probs that are not those of its {len(ids)} ids")
        return [entry["logprob"] for entry in told]

    def _routed(self, told: str | None) -> np.ndarray | None:
        if told is None or not self.config.moe_layers:
            return None
        return np.load(io.BytesIO(base64.b64decode(told, validate=True)), allow_pickle=False)

    async def load(self, folder: str | None, version: int) -> None:
        """Requests in flight are frozen meanwhile; what was computed for them is computed again by the new weights. One
        that fails leaves the server paused: it serves nothing half-written."""
        await self._told("/pause?mode=keep")
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder} if folder else {}}
        loaded = await self._told("/collective_rpc", body)
        if any(result is not None for result in loaded.get("results", [body])):
            raise EndpointRefused(f"{self.transport.base}: {folder} was not loaded: {str(loaded)[:300]}")
        reset = await self._told("/reset_prefix_cache?reset_running_requests=true")
        if reset.get("success") is not True:
            raise EndpointRefused(f"{self.transport.base}: keeps what other weights computed: {str(reset)[:300]}")
        for path in ("/reset_encoder_cache", "/reset_mm_cache"):
            await self.transport.tell(path, None, self.config.update_timeout)
        await self._told("/update_weight_version", {"new_version": str(version)})
        info = read_object(await self.transport.get("/weight_info"), f"{self.transport.base}/weight_info: the answer")
        if info.get("weight_version") != str(version):
            raise EndpointRefused(f"{self.transport.base}: serves {info}, not version {version}")
        await self._told("/resume")

    async def rehearse(self) -> None:
        """Not with a server that somebody else left paused, as a killed run does: it may hold half of its weights, and
        keeps whoever asks it waiting."""
        if self._whole is None:
            answer = f"{self.transport.base}/is_paused: the answer"
            if read_object(await self.transport.get("/is_paused"), answer).get("is_paused") is not False:
                told = "an update broke off there, and nobody knows what it holds; start it again"
                raise EndpointRefused(f"{self.transport.base} is paused: {told}")
        await super().rehearse()

    async def _told(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        said = await self.transport.tell(path, body, self.config.update_timeout)
        return read_object(said, f"{self.transport.base}{path}: the answer")

    async def inspect(self) -> None:
        """That its log-probs are those of what it samples from: of a request that may sample one id alone, 0."""
        prompt = Trajectory("probe", "probe")
        prompt.extend([self.vocab.end_id], trainable=False)
        only = self.vocab.encode("a")[-1]
        body = self.body(prompt, Limits(1), ())
        body.get("sampling_params", body)["allowed_token_ids"] = [only]
        sampled = await self.transport.retried(lambda: self._ask(prompt, body))
        if sampled.last not in (None, self.version):
            raise EndpointRefused(f"{self.transport.base} serves version {sampled.last}, this policy {self.version}")
        if list(sampled.ids) != [only] or not abs(sampled.logprobs[0]) < 1e-3:
            told = f"log-prob {sampled.logprobs[0]} of the one id {only} that it may sample, and {list(sampled.ids)}"
            raise EndpointRefused(f"{self.transport.base}: {told}; start it with --logprobs-mode processed_logprobs")


class VLLMCompletionsPolicy(VLLMPolicy):
    """``POST {url}/v1/completions`` with token ids: no pictures, and what loaded the weights is not told."""

    path = "/v1/completions"

    def check(self, prompt: Trajectory, limits: Limits) -> None:
        """Beside what vLLM does not take: pictures."""
        super().check(prompt, limits)
        if prompt.images:
            raise ValueError(f"{prompt.key}: {self.path} takes no pictures; {VLLMPolicy.path} does")

    def body(self, prompt: Trajectory, limits: Limits, urls: Sequence[str]) -> dict[str, Any]:
        """The request."""
        named = {"model": self.config.model, "prompt": list(prompt.input_ids), "add_special_tokens": False}
        return named | self.sampling(prompt, limits) | {"return_token_ids": True, "return_tokens_as_token_ids": True}

    def _prompt_ids(self, answer: Mapping[str, Any], choice: Mapping[str, Any]) -> Sequence[int]:
        return choice["prompt_token_ids"]

    def _logprobs(self, where: str, choice: Mapping[str, Any], ids: Sequence[int]) -> list[Any]:
        told = choice["logprobs"]
        if told["tokens"] != [f"token_id:{index}" for index in ids]:
            raise EndpointRefused(f"{where}: {len(told['tokens'])} log-probs that are not those of its {len(ids)} ids")
        return told["token_logprobs"]
