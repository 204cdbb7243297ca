"""Policy losses, advantages and penalties against trl's own lines, where that library is installed.

``GRPOTrainer`` needs accelerate, a model and a data set to exist; its loss needs none of them. The method is taken out
of the installed source as it stands, and given per-token numbers instead of a model.
"""

from __future__ import annotations

import ast
import importlib.util
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mmagent.agent.advantages import group_advantages
from mmagent.agent.rewards import overlong
from mmagent.losses.policy import reverse_kl
from mmagent.objectives.policy_gradient import PolicyGradientConfig
from mmagent.objectives.surrogates import Surrogate, Tokens

spec = importlib.util.find_spec("trl")
pytestmark = pytest.mark.skipif(spec is None, reason="trl is not installed")
LENGTHS, WIDTH = (5, 3, 1, 4), 5


def method(file: str, name: str):
    """A function of trl, out of its source."""
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / file
    tree = ast.parse(path.read_text())
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    found.decorator_list = []
    names = {"torch": torch, "Callable": object, "nanmin": torch.min, "nanmax": torch.max}
    exec(compile(ast.Module([found], []), str(path), "exec"), names)
    return names[name]


def rows() -> dict[str, Tensor]:
    """Log-probs ``(4, 5)`` of a policy that has moved from the one before, which differs from the sampler."""
    generator = torch.Generator().manual_seed(3)
    new = -torch.rand(4, WIDTH, generator=generator) * 2
    old = new + 0.4 * torch.randn(4, WIDTH, generator=generator)
    return {
        "new": new,
        "old": old,
        "sampler": old + 0.5 * torch.randn(4, WIDTH, generator=generator),
        "reference": new + 0.3 * torch.randn(4, WIDTH, generator=generator),
        "advantages": torch.tensor([1.2, -0.7, 0.4, -1.1]),
        "mask": (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).float(),
    }


def theirs(of: dict[str, Tensor], loss_type: str, correction: Tensor | None = None, **settings) -> tuple[float, Tensor]:
    """Loss and gradient by trl."""
    new = of["new"].clone().requires_grad_()
    args = SimpleNamespace(delta=settings.pop("delta", None), use_bias_correction_kl=False, steps_per_generation=1)
    beside = SimpleNamespace(gather=lambda x: x, reduce=lambda x, **_: x, num_processes=1, sync_gradients=False)
    trainer = SimpleNamespace(
        **{"importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.28, "beta": 0.0} | settings,
        loss_type=loss_type,
        args=args,
        accelerator=beside,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=correction is not None,
        vllm_importance_sampling_correction=correction is not None,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=WIDTH,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros_like(new), None),
    )
    ids = torch.ones(4, WIDTH, dtype=torch.int64)
    inputs = {
        **{"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": of["mask"]},
        **{"advantages": of["advantages"], "old_per_token_logps": of["old"]},
        **{"ref_per_token_logps": of["reference"], "num_items_in_batch": of["mask"].sum()},
        "importance_sampling_ratio": correction,
    }
    loss = method("trainer/grpo_trainer.py", "_compute_loss")(trainer, None, inputs)
    loss.backward()
    return loss.item(), new.grad


def ours(of: dict[str, Tensor], kl: float = 0.0, **settings) -> tuple[float, Tensor]:
    """The same by the surrogate over a flat stream of tokens."""
    config = PolicyGradientConfig(constant_tokens=WIDTH, **{"ratio": "trainer", "importance_cap": 0.0} | settings)
    surrogate, kept = Surrogate(config), of["mask"].bool()
    new = of["new"].clone().requires_grad_()
    row = torch.arange(4)[:, None].expand(4, WIDTH)[kept]
    weights = surrogate.reduce(row, 4)
    correction = surrogate.correct(of["old"][kept], of["sampler"][kept])
    corrected = weights if correction is None else weights * correction
    advantages = of["advantages"][:, None].expand(4, WIDTH)[kept]
    tokens = Tokens(new[kept], of["old"][kept], of["sampler"][kept], advantages, corrected, row, 4)
    loss = surrogate(tokens).loss + kl * reverse_kl(new[kept], of["reference"][kept], weights)
    loss = loss / surrogate.count(row, 4)
    loss.backward()
    return loss.item(), new.grad


@pytest.mark.parametrize(
    ("loss_type", "trl", "mine"),
    [
        ("grpo", {}, {}),
        ("grpo", {"epsilon_high": 0.2}, {"clip_high": 0.2}),
        ("grpo", {"beta": 0.3}, {"kl": 0.3}),
        ("dapo", {}, {"reduction": "token"}),
        ("bnpo", {}, {"reduction": "token"}),
        ("dr_grpo", {}, {"reduction": "constant"}),
        ("cispo", {"epsilon_high": 1.3}, {"loss": "cispo", "cispo_cap": 1.3, "reduction": "token"}),
        (
            "grpo",
            {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15},
            {"loss": "gspo", "clip_low": 0.1, "clip_high": 0.15},
        ),
    ],
)
def test_loss_and_gradient_are_those_of_trl(loss_type, trl, mine):
    of = rows()
    (expected, gradient), (loss, found) = theirs(of, loss_type, **trl), ours(of, **mine)
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("cap", "band"), [(1.3, None), (1e9, (0.7, 1.5))])
def test_corrections_for_the_sampler_are_those_of_trl(cap, band):
    """Truncated importance sampling, and IcePop with the weight left in."""
    of = rows()
    ratio = (of["old"] - of["sampler"]).exp()
    weight = ratio.clamp(max=cap) if band is None else torch.where((ratio >= band[0]) & (ratio <= band[1]), ratio, 0.0)
    (expected, gradient), (loss, found) = (
        theirs(of, "grpo", weight),
        ours(of, importance_cap=cap, importance_band=band),
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)


def test_the_soft_punishment_is_that_of_trl():
    reward = method("rewards/other_rewards.py", "get_soft_overlong_punishment")
    tree = ast.parse((Path(spec.origin).parent / "rewards/other_rewards.py").read_text())  # type: ignore
    kinds = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    names: dict = {"Callable": object}
    exec(compile(ast.Module(kinds, []), "trl", "exec"), names)
    reward.__globals__.update(names)
    lengths = [1, 80, 81, 90, 100, 101, 300]
    expected = reward(100, 20)([[0] * n for n in lengths])
    assert [overlong(n, 100, 20) for n in lengths] == pytest.approx(expected)


def test_group_advantages_are_those_of_trl():
    """``scale_rewards`` "group" and "none": its lines add 1e-4 to the deviation."""
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25, 0.0, 0.0, 1.0, 0.75])
    grouped = rewards.view(2, 4)
    centred = (grouped - grouped.mean(1, keepdim=True)).flatten()
    names = ["a"] * 4 + ["b"] * 4
    torch.testing.assert_close(group_advantages(rewards, names, "dr_grpo"), centred)
    scaled = centred / (grouped.std(1).repeat_interleave(4) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, names), scaled, rtol=5e-4, atol=0)
