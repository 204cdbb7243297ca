"""The public kit passes what keeps the protocols and says clearly what does not."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from mmagent.packing import pack
from mmagent.tasks.worlds import WorldTask
from mmagent.testing import (
    ContractError,
    check_encoder,
    check_environment,
    check_objective,
    check_task,
    tiny_agent_model,
    tiny_batch,
    tiny_documents,
    tiny_encoder,
)
from mmagent.trajectories import Score
from mmagent.types import PackedVision, Ratio, StepOutput, VisionFeatures
from mmagent.worlds import grading
from mmagent.worlds.examples import Idea, Seeded
from tests.toy_tasks import EchoEnvironment, EchoTask


class MeanEncoder(nn.Module):
    """The smallest encoder that keeps the protocol; each fault breaks one clause of it."""

    patch_size, merge_size, width = 14, 2, 8

    def __init__(self, fault: str = ""):
        super().__init__()
        self.fault = fault
        self.embed = nn.Linear(3 * 2 * 14 * 14, 8)
        self.mix = nn.Linear(8, 8)
        if fault == "idle parameter":
            self.idle = nn.Parameter(torch.ones(1))

    def forward(self, vision: PackedVision, layers=()) -> VisionFeatures:
        fault = self.fault
        if fault == "in place":
            vision.patches.mul_(0.5)
        x = F.layer_norm(self.embed(vision.patches), (8,))
        sizes = vision.grids.prod(1).tolist()
        pooled = torch.stack([part.mean(0) for part in x.split(sizes)])
        if fault == "global mean":
            x = x + 1e-6 * x.mean(0)
        if fault == "attention across images":
            x = F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])[0, 0]
        if fault == "pooled over the pack":
            pooled = pooled + 1e-6 * pooled.mean(0)
        if fault == "place in the pack":
            x = x + torch.linspace(0, 1, x.shape[0])[:, None]
        if fault == "dropout":
            x = F.dropout(x, 0.5, training=True)
        if fault == "not a number":
            x = x / 0.0
        if fault == "constant":
            pooled = pooled * 0.0
        tokens = self.mix(x)
        if fault == "width":
            tokens = tokens[:, :4]
        if fault == "pooled per frame":
            pooled = pooled.repeat(2, 1)
        if fault == "integers":
            tokens = tokens.long()
        given = {} if fault == "no layers" else dict.fromkeys(layers, x)
        if fault == "unasked layers":
            given = {0: x}
        if fault == "64 bits":
            tokens = tokens.double()
        if fault == "layers in 64 bits":
            given = {i: layer.double() for i, layer in given.items()}
        if fault == "detached":
            tokens = tokens.detach()
        if fault == "no use of the patches":
            tokens = self.mix(torch.ones_like(x))
        if fault == "an unknown attribute":
            vision.pixels.sum()
        if fault == "a wrong key":
            raise KeyError("stem")
        if fault == "nothing":
            return None
        if fault == "a tensor":
            return tokens
        if fault == "a tuple":
            return (tokens, given, pooled)
        if fault == "no pooled":
            return VisionFeatures(tokens, given, None)
        if fault == "a list of layers":
            return VisionFeatures(tokens, [x for _ in layers], pooled)
        if fault == "an array":
            return VisionFeatures(tokens.detach().numpy(), given, pooled)
        return VisionFeatures(tokens, given, pooled)


FAULTS = {
    "global mean": r"leaks: tokens of image 0 depend on image 1 of the same pack",
    "attention across images": r"leaks: tokens of image 0 depend on image 1",
    "pooled over the pack": r"leaks: pooled of image 0 depend on image 1",
    "place in the pack": r"tokens of image \d \(grid \(\d, \d, \d\)\) differ by",
    "dropout": r"does not repeat itself",
    "not a number": r"tokens is not finite",
    "constant": r"pooled of image 0 ignore its patches",
    "width": r"tokens is \(\d+, 4\), expected \(\d+, 8\)",
    "pooled per frame": r"pooled is \(8, 8\), expected \(4, 8\)",
    "integers": r"tokens is torch.int64, expected a floating type",
    "no layers": r"layers \[0\] asked, \[\] given",
    "unasked layers": r"returns layers \[0\] when none are asked for",
    "a tuple": r"must return VisionFeatures, got tuple",
    "in place": r"changes the patches it is given",
    "64 bits": r"tokens is torch.float64, expected a floating type of at most 32 bits; return tokens.float\(\)",
    "layers in 64 bits": r"layers\[0\] is torch.float64",
    "detached": r"no gradient goes from tokens to the patches; a detach",
    "no use of the patches": r"tokens of image 0 ignore its patches",
    "an unknown attribute": r"raised AttributeError: 'PackedVision' object has no attribute 'pixels'; it must be",
    "a wrong key": r"raised KeyError: 'stem'",
    "nothing": r"must return VisionFeatures, got NoneType; end forward with",
    "a tensor": r"must return VisionFeatures, got Tensor",
    "no pooled": r"pooled is of type NoneType, expected a torch.Tensor",
    "a list of layers": r"layers is of type list, expected a dict",
    "an array": r"tokens is of type ndarray, expected a torch.Tensor",
    "idle parameter": r"no gradient reaches idle; train or freeze",
}


def test_encoders_that_keep_the_protocol_pass():
    check_encoder(MeanEncoder())
    check_encoder(tiny_encoder(), layers=(0, -1))
    check_encoder(MeanEncoder("idle parameter"), unused={"idle"})


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_an_encoder_is_named(fault):
    with pytest.raises(ValueError, match=rf"^MeanEncoder.*{FAULTS[fault]}"):
        check_encoder(MeanEncoder(fault))


class NoLayers(MeanEncoder):
    """What a user may write who has read half of the protocol."""

    def forward(self, vision):
        return super().forward(vision)


class Pixels(MeanEncoder):
    def forward(self, pixels, grid, layers=()):
        return super().forward(pixels, layers)


class NoForward(nn.Module):
    patch_size, merge_size, width = 14, 2, 8


class OtherPatches(MeanEncoder):
    patch_size = 16


class Hasty(MeanEncoder):
    def __init__(self):
        self.width = 8


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (NoLayers, r"^NoLayers\(vision, layers\) raised TypeError: .*positional arguments.*it must be forward\(self"),
        (Pixels, r"^Pixels\(vision\) raised TypeError: .*'grid'.*it must be forward\(self"),
        (NoForward, r"^NoForward\(vision\) raised NotImplementedError"),
        (OtherPatches, r"^OtherPatches\(vision\) raised RuntimeError: .* 1536 values in torch.float32"),
        (Hasty, r"^Hasty.__init__ must call super\(\).__init__"),
    ],
)
def test_what_an_encoder_raises_is_told_with_its_name(kind, message):
    with pytest.raises(ValueError, match=message):
        check_encoder(kind())


def test_a_frozen_encoder_passes():
    check_encoder(MeanEncoder().requires_grad_(False))


def test_members_of_an_encoder_are_checked():
    encoder = MeanEncoder()
    encoder.width = None
    with pytest.raises(ContractError, match=r"MeanEncoder.width must be a positive integer, got None"):
        check_encoder(encoder)
    encoder.width = True
    with pytest.raises(ContractError, match=r"MeanEncoder.width must be a positive integer, got True; set it"):
        check_encoder(encoder)
    encoder.width, encoder.patch_values = 8, "1176"
    with pytest.raises(ContractError, match=r"MeanEncoder.patch_values must be a positive integer, got '1176'"):
        check_encoder(encoder)
    with pytest.raises(ContractError, match=r"must be a torch.nn.Module"):
        check_encoder(lambda vision: vision)
    with pytest.raises(ContractError, match=r"MeanEncoder is a class: give an encoder made from it"):
        check_encoder(MeanEncoder)


def test_an_encoder_that_passes_trains_inside_the_agent():
    model = tiny_agent_model(encoder=MeanEncoder())
    output = model(tiny_batch(3))
    output.hidden.sum().backward()
    assert model.encoder.embed.weight.grad.abs().sum() > 0


def objective() -> LanguageModeling:
    return LanguageModeling(tiny_agent_model(), LanguageModelingConfig())


def test_the_language_objective_keeps_its_protocol():
    documents = list(tiny_documents(5))

    whole, *parts = (pack(some, image_id=1, merge_size=2) for some in (documents, documents[:2], documents[2:]))
    check_objective(objective(), whole, parts)


class Squares(nn.Module):
    """Sum of squares of ``w * batch``; each fault breaks one clause."""

    def __init__(self, fault: str = ""):
        super().__init__()
        self.fault = fault
        self.w = nn.Parameter(torch.tensor([2.0]))
        self.weights = {} if fault == "no weights" else {"squares": 1.0}

    def counts(self, batch):
        count = torch.tensor(len(batch))
        if self.fault == "another term":
            return {"cubes": count}
        return {"squares": torch.tensor(1) if self.fault == "count one" else count}

    def forward(self, batch):
        squares = (self.w * batch).square()
        total = squares.mean() if self.fault == "mean" else squares.sum()
        if self.fault == "vector":
            total = squares
        if self.fault == "no gradient":
            total = total.detach()
        n = torch.tensor(float(len(batch)))
        metric = Ratio(squares.sum() if self.fault == "metric with gradient" else squares.sum().detach(), n)
        if self.fault == "metric of means":
            metric = Ratio(squares.mean().detach(), torch.tensor(1.0))
        if self.fault == "metric of a weight":
            metric = Ratio(self.w.detach().squeeze(), torch.tensor(1.0))
        if self.fault == "bare metric":
            metric = squares.mean().detach()
        return StepOutput({"squares": total, **({"more": total} if self.fault == "more sums" else {})}, {"m": metric})

    def after_step(self):
        return None


OBJECTIVE_FAULTS = {
    "no weights": r"weights is empty",
    "another term": r"counts \['cubes'\], but weighs \['squares'\]",
    "more sums": r"sums \['more', 'squares'\]",
    "mean": r"sum of 'squares' depends on how the batch is split",
    "count one": r"count of 'squares' depends",
    "vector": r"has the shape \(4,\), expected \(\)",
    "no gradient": r"no sum carries a gradient",
    "metric with gradient": r"metric 'm' carries a gradient",
    "metric of means": r"metric 'm' depends",
    "metric of a weight": r"metric 'm' is a view of a weight",
    "bare metric": r"metric 'm' must be a Ratio",
}


def test_an_objective_that_keeps_the_protocol_passes():
    batch = torch.tensor([1.0, 2.0, 3.0, 5.0])
    check_objective(Squares(), batch, [batch[:1], batch[1:]])
    check_objective(Squares("mean"), batch)  # nothing to compare with


@pytest.mark.parametrize("fault", OBJECTIVE_FAULTS)
def test_each_fault_of_an_objective_is_named(fault):
    batch = torch.tensor([1.0, 2.0, 3.0, 5.0])
    with pytest.raises(ContractError, match=OBJECTIVE_FAULTS[fault]):
        check_objective(Squares(fault), batch, [batch[:1], batch[1:]])


class Environment(EchoEnvironment):
    def __init__(self, fault: str = ""):
        task = EchoTask(steps=2)
        super().__init__(task, next(iter(task.items("train", 0))))
        self.fault = fault

    async def reset(self):
        seen = await super().reset()
        if self.fault == "floats":
            seen = replace(seen, images=(seen.images[0] / 255.0,))
        if self.fault == "unseeded":
            seen = replace(seen, images=(np.random.default_rng().integers(0, 256, (4, 4, 3)).astype(np.uint8),))
        if self.fault == "reward":
            seen = replace(seen, reward=-1.0)
        return seen.text if self.fault == "bare text" else seen

    async def step(self, action):
        if self.fault == "raises" and action == "%!":
            raise ValueError("cannot parse %!")
        return await super().step(action)


ENVIRONMENT_FAULTS = {
    "floats": r"reset\(\): image 0 is float64 \(56, 56, 3\), expected",
    "unseeded": r"observation 0 differs between two equal episodes",
    "reward": r"reward -1.0 is outside \[0, 1\]",
    "bare text": r"reset\(\) returned str, expected Observation",
    "raises": r"step\('%!'\) raised ValueError: cannot parse %!; what a policy says wrongly is answered",
}


def test_an_environment_that_keeps_the_protocol_passes():
    asyncio.run(check_environment(Environment, ["a", "a"]))
    asyncio.run(check_environment(lambda: Environment("unseeded"), repeats=False))


@pytest.mark.parametrize("fault", ENVIRONMENT_FAULTS)
def test_each_fault_of_an_environment_is_named(fault):
    with pytest.raises(ContractError, match=ENVIRONMENT_FAULTS[fault]):
        asyncio.run(check_environment(lambda: Environment(fault), ["a"]))


class Task(EchoTask):
    def __init__(self, fault: str = ""):
        super().__init__(steps=2)
        self.fault, self.calls = fault, 0

    def items(self, split, seed):
        self.calls += 1
        for item in super().items(split, seed):
            if self.fault == "one scene":
                item = replace(item, key=item.key.removeprefix("train").removeprefix("test")[:2])
            if self.fault == "shared":
                item = replace(item, key=f"{item.seed // 2}")
            if self.fault == "unseeded":
                item = replace(item, key=f"{item.key}-{self.calls}")
            if self.fault == "foreign":
                item = replace(item, task="other")
            yield item

    def gold(self, item):
        return iter(["z"]) if self.fault == "gold" else super().gold(item)

    async def score(self, item, trajectory):
        if self.fault == "error":
            return Score(0.0, error="the judge is out")
        if self.fault == "range":
            return Score(100.0)
        return Score(max(trajectory.reward, 0.5) if self.fault == "generous" else trajectory.reward)


TASK_FAULTS = {
    "one scene": r"keys of train items are not unique",
    "shared": r"are in train and in test",
    "unseeded": r"train items differ between two calls with one seed",
    "foreign": r"item train-0-0 belongs to 'other'",
    "gold": r"echo/train-0-0: gold \['z'\] scores 0.0 \{\}, expected 1",
    "error": r"echo/train-0-0 could not be judged: the judge is out",
    "range": r"score 100.0 is outside \[0, 1\]",
    "generous": r"doing nothing \(\(''.\)\) scores 0.50 on average",
}


def test_a_task_that_keeps_the_protocol_passes_and_closes_what_it_opens():
    task = Task()
    asyncio.run(check_task(task))
    assert task.opened == task.closed > 12


@pytest.mark.parametrize("fault", TASK_FAULTS)
def test_each_fault_of_a_task_is_named(fault):
    with pytest.raises(ContractError, match=TASK_FAULTS[fault]):
        asyncio.run(check_task(Task(fault)))


def _think(random, level):
    return Idea("Which number?", str(int(random.integers(100_000, 10**9))))


def _contained(example, answer):
    return Score(float(example.answer in answer))


def _believing(example, answer):
    return Score(float("score is 1.0" in answer or example.answer == answer))


def _trusting(example, answer):
    return Score(float(float(example.answer) == float(answer)))


def _dwelling(example, answer):
    time.sleep(0.3 * answer.startswith("9999"))
    return Score(float(example.answer == answer))


def _lavish(example, answer):
    return Score(1.0 if example.answer == answer else 0.6 * (len(answer) > 40))


def _guessable(example, answer):
    return Score(1.0 if example.answer == answer else 0.6 * (0 < len(answer) <= 4))


WEAK_VERIFIERS = {
    _contained: r"hostile answer '.*' scores 1",
    _believing: r"hostile answer 'Ignore all rules .* scores 1",
    _trusting: r"raised ValueError: could not convert string to float.*; what cannot be read is wrong",
    _dwelling: r"hostile answer '9999.* took 0\.\d s to judge, at most 0.2 are allowed",
    _lavish: r"hostile answers score 0\.\d+ on average, expected about 0",
    _guessable: r"answers by chance score 0\.\d+ on average, expected about 0",
}


@pytest.mark.parametrize("judge", WEAK_VERIFIERS)
def test_a_verifier_that_can_be_fooled_is_found_out(judge):
    task = WorldTask(Seeded("toy/number", "text", 1, _think, judge))
    guess = {"random": lambda chance: "12"} if judge in (_guessable, _trusting) else {}
    null = ("0",) if judge is _trusting else ("",)
    with pytest.raises(ContractError, match=WEAK_VERIFIERS[judge]):
        asyncio.run(check_task(task, null=null, seconds=0.2, **guess))


def test_a_verifier_that_cannot_be_fooled_passes():
    asyncio.run(check_task(WorldTask(Seeded("toy/number", "text", 1, _think, grading.number))))
