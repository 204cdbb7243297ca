"""Alignment and its text tower: captions and images of a pack do not see each other; the loss is SigLIP's."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmagent.engine.build import build_engine
from mmagent.engine.config import EngineConfig
from mmagent.geometry import GeometryConfig, patchify
from mmagent.models.cogvit import CogViT, CogViTConfig
from mmagent.models.layers import initialise
from mmagent.models.text_tower import TextTower, TextTowerConfig, text_debug
from mmagent.objectives.alignment import Alignment, AlignmentConfig
from mmagent.testing import check_objective
from mmagent.train.step import train_step
from mmagent.types import PackedVision, PairedBatch, Segments
from tests.alignment_kit import WORDS, pairs, plain_loss, small_alignment
from tests.engine_kit import ALONE

LENGTHS = [3, 1, 7, 3]


def batch() -> PairedBatch:
    random = np.random.default_rng(0)
    sizes = [(56, 84), (28, 28), (112, 56), (28, 140)]
    geometry = GeometryConfig(min_tokens=1)
    images = [patchify(random.integers(0, 256, (*size, 3), dtype=np.uint8), geometry) for size in sizes]
    ids = torch.from_numpy(random.integers(0, 50, sum(LENGTHS)))
    return PairedBatch(PackedVision.pack(images), ids, Segments(LENGTHS), tuple("abcd"))


def alignment() -> Alignment:
    torch.manual_seed(0)
    built = Alignment(
        CogViT(CogViTConfig(width=32, depth=2, heads=2, ffn=64, pooling="attention")),
        TextTower(text_debug(50)),
        AlignmentConfig(width=16),
    )
    initialise(built.encoder)
    initialise(built.text_tower)
    return built


@pytest.mark.parametrize("causal", [False, True])
def test_packed_captions_equal_captions_one_by_one(causal):
    torch.manual_seed(0)
    tower = TextTower(TextTowerConfig(vocab_size=50, width=32, depth=2, heads=2, ffn=64, causal=causal))
    pairs = batch()
    together = tower(pairs.text_ids, pairs.segments)
    for row, ids in zip(together, pairs.text_ids.split(LENGTHS), strict=True):
        assert torch.allclose(row, tower(ids, Segments([len(ids)]))[0], atol=1e-5)


def test_a_caption_that_is_too_long_is_named():
    tower = TextTower(TextTowerConfig(vocab_size=50, width=32, depth=1, heads=2, ffn=64, max_length=5))
    with pytest.raises(ValueError, match="caption of 7 ids"):
        tower(batch().text_ids, batch().segments)


def test_the_loss_is_the_sigmoid_loss_of_images_and_texts_embedded_one_by_one():
    model, pairs = alignment(), batch()
    sizes = pairs.vision.grids.prod(dim=1).tolist()
    images = torch.cat(
        [
            model.embed_images(PackedVision(patches, grid[None]))
            for patches, grid in zip(pairs.vision.patches.split(sizes), pairs.vision.grids, strict=True)
        ]
    )
    texts = torch.cat([model.embed_texts(ids, Segments([len(ids)])) for ids in pairs.text_ids.split(LENGTHS)])
    expected = plain_loss(images, texts, torch.tensor(math.log(10.0)), torch.tensor(-10.0))
    out = model(pairs)
    assert out.sums["contrastive"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert out.sums["contrastive"].shape == ()
    assert int(model.counts(pairs)["contrastive"]) == 4
    assert out.metrics["top1"].denominator.item() == 4
    expected_gradients = torch.autograd.grad(expected, model.encoder.embed.weight)[0]
    out.sums["contrastive"].backward()
    assert torch.allclose(model.encoder.embed.weight.grad, expected_gradients, rtol=1e-3, atol=1e-5)
    assert all(p.grad is not None for p in model.parameters())


def test_alignment_keeps_its_protocol():
    """So no metric is a view of temperature or bias, which a sharded engine frees before metrics are read."""
    check_objective(alignment(), batch())


def test_words_are_classified_and_empty_captions_add_nothing():
    pairs = batch()
    torch.manual_seed(0)
    model = Alignment(
        CogViT(CogViTConfig(width=32, depth=1, heads=2, ffn=64)),
        TextTower(text_debug(50)),
        AlignmentConfig(width=16, words_weight=0.5),
    )
    out = model(pairs)
    logits = model.heads["words"](model.encoder(pairs.vision).pooled)
    expected = 0.0
    for row, ids in zip(logits, pairs.text_ids.split(LENGTHS), strict=True):
        words = sorted(set(ids[:-1].tolist()))
        expected -= sum(row.log_softmax(0)[word].item() / len(words) for word in words)
    assert out.sums["words"].item() == pytest.approx(expected, rel=1e-4)
    assert int(model.counts(pairs)["words"]) == 3  # the caption of one id is nothing but its end
    assert model.weights["words"] == 0.5
    assert set(model.roles()) == {name for name, _ in model.named_parameters()}


def test_every_parameter_has_a_role_and_a_learning_rate_of_its_own():
    model = alignment()
    roles = model.roles()
    assert set(roles) == {name for name, _ in model.named_parameters()}
    assert {role.role for role in roles.values()} == {"encoder", "text", "projection"}
    assert len(list(model.blocks())) == 4  # two of the encoder, one of the text tower, and the temperature


def test_a_pooling_head_without_use_still_gets_a_gradient():
    """Classes of patches alone: nothing reads the summary, and engines must not wait for its head."""
    torch.manual_seed(0)
    encoder = CogViT(CogViTConfig(width=32, depth=2, heads=2, ffn=64, pooling="attention"))
    model = Alignment(encoder, TextTower(text_debug(50)), AlignmentConfig(contrastive_weight=0.0, classes=3))
    known = torch.ones(batch().num_patches, dtype=torch.int64)
    sum(model(replace(batch(), classes=known)).sums.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(p.grad.any() for p in encoder.pool.parameters())


def test_the_temperature_stays_in_bounds():
    model = alignment()
    with torch.no_grad():
        model.temperature.log_scale.fill_(9.0)
    model.after_step()
    assert model.temperature.log_scale.exp().item() == pytest.approx(100.0)


def test_patches_are_told_apart_where_the_batch_knows_them():
    """Unknown patches count nowhere; without any knowledge the loss is 0, not a number that is none."""
    pairs = batch()
    built = alignment()
    told = Alignment(built.encoder, built.text_tower, AlignmentConfig(width=16, classes=3, classes_weight=2.0))
    classes = torch.arange(pairs.num_patches) % 4 - 1
    known = replace(pairs, classes=classes)
    output = told(known)
    logits = told.heads["classes"](told.encoder(pairs.vision).tokens)[classes >= 0]
    expected = F.cross_entropy(logits, classes[classes >= 0], reduction="sum")
    assert torch.allclose(output.sums["classes"], expected, rtol=1e-5)
    assert int(told.counts(known)["classes"]) == int((classes >= 0).sum())
    assert told(pairs).sums["classes"] == 0
    assert told.counts(pairs)["classes"] == 0
    with pytest.raises(ValueError, match="classes for"):
        replace(pairs, classes=classes[1:])


def test_patches_say_where_the_middle_of_their_thing_lies():
    """Across and down are two questions; a middle on the far border is in the last step; nowhere does not count."""
    pairs = batch()
    built = alignment()
    told = Alignment(built.encoder, built.text_tower, AlignmentConfig(width=16, places=4, places_weight=0.5))
    places = torch.full((pairs.num_patches, 2), float("nan"))
    places[0], places[3] = torch.tensor([0.1, 1.0]), torch.tensor([0.5, 0.74])
    known = replace(pairs, places=places)
    output = told(known)
    logits = told.heads["places"](told.encoder(pairs.vision).tokens).unflatten(1, (2, 4)).log_softmax(dim=2)
    expected = -(logits[0, 0, 0] + logits[0, 1, 3] + logits[3, 0, 2] + logits[3, 1, 2])
    assert output.sums["places"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert int(told.counts(known)["places"]) == 4
    assert told.weights["places"] == 0.5
    assert told(pairs).sums["places"] == 0
    assert known.to("cpu").places is not None
    with pytest.raises(ValueError, match="places"):
        replace(pairs, places=places[1:])


def with_words(**config) -> Alignment:
    return small_alignment(AlignmentConfig(width=16, words_weight=0.5, **config))


def test_rare_words_weigh_more():
    """The weights are those of the counts by hand; an image's target sums to one all the same."""
    model = with_words(words_rarity=True).train()
    first, second = pairs([0, 1, 2]), pairs([3, 4, 5, 6])
    even = with_words()(first).sums["words"]
    torch.testing.assert_close(model(first).sums["words"], even)  # nothing was seen yet: all alike
    model.after_step()
    model(second)
    with torch.no_grad():
        model(second)  # what does not learn does not count
    model.after_step()
    captions = [ids[:-1].tolist() for some in (first, second) for ids in some.text_ids.split(some.segments.lengths)]
    had = [sum(word in caption for caption in captions) for word in range(WORDS)]
    assert int(model.rarity.captions) == 7
    assert model.rarity.frequency.tolist() == had
    weight = [math.log((7 + 2) / (1 + f)) for f in had]
    torch.testing.assert_close(model.rarity(), torch.tensor(weight))
    logits = model.heads["words"](model.encoder(first.vision).pooled)
    expected = 0.0
    for row, caption in zip(logits, captions, strict=False):
        total = sum(weight[word] for word in set(caption))
        expected -= sum(row.log_softmax(0)[word].item() * weight[word] / total for word in set(caption))
    assert model(first).sums["words"].item() == pytest.approx(expected, rel=1e-4)


def test_counts_of_words_live_in_the_checkpoint():
    model, other = with_words(words_rarity=True).train(), with_words(words_rarity=True)
    model(pairs([0, 1, 2]))
    model.after_step()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.rarity(), model.rarity())
    assert not torch.equal(other.rarity(), with_words(words_rarity=True).rarity())


def test_words_alone_need_no_text_tower():
    model, batch = with_words(words_rarity=True, contrastive_weight=0.0), pairs([0, 1, 2, 3])
    assert model.weights == {"words": 0.5}
    assert {role.role for role in model.roles().values()} == {"encoder", "projection"}
    assert set(model.roles()) == {name for name, _ in model.named_parameters()}
    assert not any(name.startswith("text") for name in model.state_dict())
    engine = build_engine(model, torch.optim.SGD(model.parameters(), lr=0.1), EngineConfig("none"), ALONE)
    losses = [train_step(model, engine, [batch, batch], ALONE).loss for _ in range(4)]
    assert losses[-1] < losses[0]
    check_objective(with_words(contrastive_weight=0.0), batch, [pairs([0]), pairs([1, 2, 3])])


def test_the_contrastive_weight_weighs():
    assert small_alignment(AlignmentConfig(width=16, contrastive_weight=0.25)).weights == {"contrastive": 0.25}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"negatives": "world"}, "'world' is neither step nor microbatch"),
        ({"words_rarity": True}, "words_weight 0 leaves out"),
        ({"contrastive_weight": 0.0}, "nothing would be learned"),
    ],
)
def test_configs_that_say_nothing_are_refused(config, said):
    with pytest.raises(ValueError, match=said):
        AlignmentConfig(**config)


@pytest.mark.parametrize("causal", [False, True])
def test_no_gradient_crosses_captions(causal):
    """Each summary depends on its own caption's ids only; in a causal tower as in one that looks both ways."""
    torch.manual_seed(0)
    tower = TextTower(TextTowerConfig(vocab_size=50, width=32, depth=2, heads=2, ffn=64, causal=causal))
    rows = []
    tower.embedding.register_forward_hook(lambda _, __, out: rows.append(out))
    summary = tower(batch().text_ids, batch().segments)
    for n, at in enumerate(batch().segments.offsets()[:-1]):
        (gradient,) = torch.autograd.grad((summary[n] * torch.arange(32)).sum(), rows[0], retain_graph=True)
        own = torch.zeros(sum(LENGTHS), dtype=torch.bool)
        own[at : at + LENGTHS[n]] = True
        assert not gradient[~own].any()
        assert gradient[own].any(dim=1).all()


def test_an_empty_micro_batch_adds_nothing():
    """A rank may have no pair for one of its micro-batches, and still every parameter gets its gradient of zero."""
    model = small_alignment(AlignmentConfig(width=16, words_weight=0.5, words_rarity=True, classes=3, places=4))
    engine = build_engine(model, torch.optim.SGD(model.parameters(), lr=0.1), EngineConfig("none"), ALONE)
    with_empty = train_step(model, engine, [pairs([0, 1]), pairs([]), pairs([2])], ALONE)
    again = small_alignment(model.config)
    engine = build_engine(again, torch.optim.SGD(again.parameters(), lr=0.1), EngineConfig("none"), ALONE)
    assert with_empty.loss == pytest.approx(train_step(again, engine, [pairs([0, 1, 2])], ALONE).loss, rel=1e-5)
    for got, wanted in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, atol=5e-6, rtol=1e-4)
