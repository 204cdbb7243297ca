"""Who goes first, who steps back, who is given up, and what is left of those that fail."""

from __future__ import annotations

import asyncio

import pytest
import torch

from mmagent.generation import generator as room
from mmagent.generation.generator import Generator, GeneratorConfig
from mmagent.generation.local import LocalPolicy
from mmagent.trajectories import Completion, Limits, Trajectory
from mmagent.types import PatchedImage
from tests.agent_kit import picture, prompt, tiny_model, tiny_vocab
from tests.fire_kit import ToyModel


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setitem(room.BLOCK_TOKENS, "cpu", 4)
    monkeypatch.setattr(room, "BURST", 2)


def toy(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return ToyModel().double()


def words(count: int, first: int = 0, images: tuple[PatchedImage, ...] = ()) -> Trajectory:
    """``count`` tokens of text behind pictures of 4 tokens each."""
    said = tiny_vocab().encode("click(12,345) type the word into the field " * 20)[first : first + count]
    assert len(said) == count
    out = Trajectory(f"{count} words from {first}", "toy")
    out.extend([tiny_vocab().image_id] * (4 * len(images)) + said, trainable=False, images=images)
    return out


def undisturbed(request: Trajectory, limits: Limits, model: torch.nn.Module | None = None) -> Completion:
    (answer,) = Generator(model or toy(), tiny_vocab(), GeneratorConfig(reuse=False)).generate([(request, limits)])
    return answer


def finished(generator: Generator, most: int = 200) -> dict[int, Completion]:
    done: dict[int, Completion] = {}
    for _ in range(most):
        if not generator.busy:
            generator.pool.check([])
            return done
        done |= generator.step()
    raise AssertionError("it does not come to an end")


def same(got: Completion, want: Completion) -> None:
    assert (got.ids, got.reason) == (want.ids, want.reason)
    assert got.logprobs == pytest.approx(want.logprobs, abs=1e-5)


# ---------------------------------------------------------------- room


def test_a_long_prompt_steps_back_where_who_decodes_needs_its_room():
    """Not so long ago that was the end of all: only who decodes could be pushed out."""
    generator = Generator(toy(), tiny_vocab(), GeneratorConfig(cache_tokens=100, prefill_tokens=2))
    first, long = words(5), words(70, 9)
    tickets = [generator.submit(first, Limits(60)), generator.submit(long, Limits(4))]
    done = finished(generator)
    assert generator.counts["preempted"]
    same(done[tickets[0]], undisturbed(first, Limits(60)))
    same(done[tickets[1]], undisturbed(long, Limits(4)))


def test_who_decodes_steps_back_for_a_prompt_that_came_before():
    generator = Generator(toy(), tiny_vocab(), GeneratorConfig(cache_tokens=100, prefill_tokens=2))
    long, late = words(70, 9), words(5)
    tickets = [generator.submit(long, Limits(4)), generator.submit(late, Limits(60), priority=0)]
    generator.scheduler.requests[tickets[1]].priority = 1  # so that it is read first,
    generator.scheduler.waiting.sort(key=lambda s: s.rank)
    for _ in range(4):
        generator.step()
    assert len(generator.scheduler.running) == 1
    generator.scheduler.requests[tickets[1]].priority = 0  # and matters no more than the other
    done = finished(generator)
    assert generator.counts["preempted"]
    same(done[tickets[0]], undisturbed(long, Limits(4)))
    same(done[tickets[1]], undisturbed(late, Limits(60)))


def test_a_request_may_fill_the_cache_to_its_last_place():
    generator = Generator(toy(), tiny_vocab(), GeneratorConfig(cache_tokens=40, prefill_tokens=7))
    with pytest.raises(ValueError, match=r"21 tokens and 20 more do not fit the generator's cache of 40"):
        generator.submit(words(21), Limits(20))
    requests = [(words(21), Limits(19)), (words(39), Limits(1)), (words(1), Limits(39))]
    for got, (request, limits) in zip(generator.generate(requests), requests, strict=True):
        same(got, undisturbed(request, limits))


# ---------------------------------------------------------------- priorities


def test_a_prompt_that_matters_more_is_read_before_a_long_one_that_came_first():
    generator = Generator(toy(), tiny_vocab(), GeneratorConfig(prefill_tokens=4))
    long = generator.submit(words(200), Limits(1))
    generator.step()
    urgent = generator.submit(words(4, 3), Limits(2), priority=1)
    assert urgent in generator.step() | generator.step()
    assert long in finished(generator)


def test_a_prompt_that_matters_more_gets_the_room_of_one_that_is_being_read():
    for settings in ({"cache_tokens": 112}, {"max_sequences": 1}):
        generator = Generator(toy(), tiny_vocab(), GeneratorConfig(prefill_tokens=4, **settings))
        long = generator.submit(words(100), Limits(3))
        follower = generator.submit(words(100), Limits(2, seed=1))
        generator.step()
        urgent = generator.submit(words(4, 3), Limits(14), priority=1)
        done: dict[int, Completion] = {}
        while urgent not in done:
            done |= generator.step()
        assert not done.keys() & {long, follower}
        assert generator.counts["preempted"]
        done = finished(generator)
        same(done[long], undisturbed(words(100), Limits(3)))
        same(done[follower], undisturbed(words(100), Limits(2, seed=1)))


def test_a_prompt_matters_as_much_as_who_begins_where_it_ends():
    generator = Generator(toy(), tiny_vocab(), GeneratorConfig(prefill_tokens=4))
    generator.submit(words(12), Limits(1), priority=-1)
    generator.step()
    other = generator.submit(words(80, 3), Limits(1))
    follower = generator.submit(words(12), Limits(1), priority=1)
    done = generator.step() | generator.step()
    assert follower in done
    assert other not in done


def test_what_is_steady_is_not_pushed_out():
    """It would be read again as a prompt, and so by other instructions."""
    generator = Generator(tiny_model(), tiny_vocab(), GeneratorConfig(max_sequences=1, steady=True))
    alone = Generator(tiny_model(), tiny_vocab(), GeneratorConfig(steady=True))
    low = generator.submit(prompt("click the word"), Limits(8, seed=1))
    generator.step()
    high = generator.submit(prompt("type"), Limits(3, seed=2), priority=1)
    done = finished(generator)
    assert not generator.counts["preempted"]
    for ticket, (text, limits) in {
        low: ("click the word", Limits(8, seed=1)),
        high: ("type", Limits(3, seed=2)),
    }.items():
        (want,) = alone.generate([(prompt(text), limits)])
        assert (done[ticket].ids, done[ticket].logprobs) == (want.ids, want.logprobs)


def test_whoever_interrupts_all_the_time_stops_nobody():
    generator = Generator(toy(), tiny_vocab())
    generator.interrupt = lambda: True
    generator.submit(words(5), Limits(9))
    assert finished(generator, 9)


# ---------------------------------------------------------------- giving up


def test_one_that_is_cancelled_ends_once_wherever_it_is():
    generator = Generator(toy(), tiny_vocab(), GeneratorConfig(prefill_tokens=3, max_sequences=3))
    tickets = [generator.submit(words(9), Limits(5, seed=n)) for n in range(5)]
    generator.step()
    states = [
        len(generator.scheduler.filling),
        len(generator.scheduler.filling[0].followers),
        len(generator.scheduler.waiting),
    ]
    assert states == [1, 2, 2]
    for ticket in (tickets[0], tickets[2], tickets[4], tickets[4]):  # who is read, who follows, who waits
        generator.cancel(ticket)
    done = generator.step()
    assert {ticket: done[ticket].reason for ticket in done} == dict.fromkeys(
        (tickets[0], tickets[2], tickets[4]), "cancelled"
    )
    generator.cancel(tickets[0])  # it is gone
    done = finished(generator)
    for n in (1, 3):
        same(done[tickets[n]], undisturbed(words(9), Limits(5, seed=n)))
    assert generator.counts["cancelled"] == 3


def test_one_that_was_pushed_out_keeps_what_it_has_when_it_is_cancelled():
    generator = Generator(toy(), tiny_vocab(), GeneratorConfig(max_sequences=1))
    low = generator.submit(words(9), Limits(20))
    generator.step()
    generator.submit(words(3), Limits(9), priority=1)
    generator.step()
    ids, logprobs = generator.sampled(low)
    assert len(ids) == 3
    generator.cancel(low)
    got = generator.step()[low]
    assert (got.ids, got.logprobs, got.reason) == (tuple(ids), tuple(logprobs), "cancelled")
    assert got.ids == undisturbed(words(9), Limits(20)).ids[:3]


def test_a_bad_request_among_others_leaves_none_of_them_behind():
    generator = Generator(toy(), tiny_vocab())
    with pytest.raises(ValueError, match="more do not fit"):
        generator.generate([(words(5), Limits(3)), (words(5), Limits(1 << 30))])
    assert not generator.busy


def test_who_was_submitted_before_gets_an_answer_though_others_are_generated():
    generator = Generator(toy(), tiny_vocab())
    ticket = generator.submit(words(5), Limits(3))
    (got,) = generator.generate([(words(7), Limits(9))])
    same(got, undisturbed(words(7), Limits(9)))
    assert generator.busy
    same(generator.step()[ticket], undisturbed(words(5), Limits(3)))
    assert not generator.busy


def test_ids_beyond_the_vocabulary_are_refused_before_they_break_a_step():
    generator = Generator(toy(), tiny_vocab())
    for wrong in (-1, generator.model.config.vocab_size):
        request = Trajectory("wrong", "toy")
        request.extend([3, wrong], trainable=False)
        with pytest.raises(ValueError, match=r"wrong: ids must be in \[0, "):
            generator.submit(request, Limits(3))
    assert not generator.busy


# ---------------------------------------------------------------- failures


class OutOfMemory(RuntimeError):
    pass


@pytest.mark.parametrize("where", ["reading", "sampling"])
def test_a_step_that_fails_may_be_tried_again(where):
    """Nothing is lost, not even who had just ended, and nothing that the failure left is ever read."""
    model = toy()
    generator = Generator(model, tiny_vocab(), GeneratorConfig(record_routing=True))
    pairs = [(words(6 + n, n), Limits(1 + 4 * n, seed=n)) for n in range(4)]
    pairs += [(words(9, 3), Limits(5, seed=n)) for n in range(3)]
    tickets = [generator.submit(*pair) for pair in pairs]
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls % 3 == 0 and calls < 20:
            raise OutOfMemory

    if where == "reading":
        model.decoder.blocks[1].register_forward_pre_hook(fail)
    else:
        scores = generator.runner.scores
        generator.runner.scores = lambda *args: (fail(), scores(*args))[1]
    done: dict[int, Completion] = {}
    failures = 0
    while generator.busy:
        try:
            done |= generator.step()
        except OutOfMemory:
            failures += 1
            generator.pool.check([])
    assert failures > 2
    for ticket, (request, limits) in zip(tickets, pairs, strict=True):
        want = undisturbed(request, limits)
        same(done[ticket], want)
        assert len(done[ticket].routed_experts) == (len(want.ids) if len(want.ids) > 1 else 0)


def test_a_failure_in_the_middle_of_giving_blocks_leaves_a_generator_that_works(monkeypatch):
    """As a keyboard's interrupt may come: between a block and its owner."""
    generator = Generator(toy(), tiny_vocab())
    take = generator.pool.take
    monkeypatch.setattr(generator.pool, "take", lambda count: (take(count), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        generator.generate([(words(9), Limits(3))])
    monkeypatch.undo()
    monkeypatch.setitem(room.BLOCK_TOKENS, "cpu", 4)
    generator.pool.check([])
    assert not generator.busy
    same(generator.generate([(words(9), Limits(3))])[0], undisturbed(words(9), Limits(3)))


# ---------------------------------------------------------------- what is not finite


def nan_picture() -> PatchedImage:
    sound = picture(1, 56, 56)
    return PatchedImage(torch.full_like(sound.patches, float("nan")), sound.grid, sound.view)


@pytest.mark.parametrize("speculate", [0, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_that_is_not_finite_makes_only_itself_sick(temperature, speculate):
    model = tiny_model().double()
    limits = Limits(6, temperature, seed=1)
    rows = [words(9), words(9, 2, (picture(1, 56, 56),)), words(40, 3)]
    sick = [words(2, 0, (nan_picture(),)), words(30, 5, (nan_picture(),))]
    for settings in ({}, {"prefill_tokens": 5}):
        generator = Generator(model, tiny_vocab(), GeneratorConfig(speculate=speculate, **settings))
        alone = Generator(model, tiny_vocab(), GeneratorConfig(reuse=False, speculate=speculate))
        order = [sick[0], *rows, sick[1], sick[1]]
        done = generator.generate([(row, limits) for row in order])
        assert [c.reason for c in done] == ["sick", "length", "length", "length", "sick", "sick"]
        assert not any(c.ids or c.versions for c in done if c.reason == "sick")
        assert generator.counts["sick"] == 3
        for got, (want,) in zip(done[1:4], ([*alone.generate([(row, limits)])] for row in rows), strict=True):
            same(got, want)
        assert all(x.isfinite().all() for pair in generator.kv.layers.values() for x in pair), "it was not wiped"
        assert all(x.isfinite().all() for x in generator.features._kept.values())
        known = generator.pool.known
        generator.generate([(sick[1], limits)])
        assert generator.pool.known == known, "something of a sick request is known"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_that_falls_sick_on_the_way_keeps_what_was_sound(temperature):
    generator = Generator(toy(), tiny_vocab())
    rows = [words(9), words(30, 2), words(9)]
    tickets = [generator.submit(row, Limits(12, temperature, seed=n)) for n, row in enumerate(rows)]
    generator.step()
    victim = generator.scheduler.requests[tickets[0]]
    before = list(victim.ids[9:])
    shared = victim.blocks[0]
    assert generator.pool.owners[shared] == 2  # with the other that has the same prompt
    with torch.inference_mode():
        generator.kv.layers[1][1][victim.blocks[-1]] = float("nan")
    done = generator.step()
    got = done[tickets[0]]
    assert (got.reason, list(got.ids)) == ("sick", before)
    assert len(got.logprobs) == len(before)
    assert not any(key == shared for key in generator.pool._key), "nobody is to find what it had"
    assert generator.kv.layers[1][1][shared].abs().sum() > 0, "another's block was wiped"
    done |= finished(generator)
    for n in (1, 2):
        same(done[tickets[n]], undisturbed(rows[n], Limits(12, temperature, seed=n)))
    assert all(x.isfinite().all() for pair in generator.kv.layers.values() for x in pair)


def test_weights_that_are_not_finite_make_everybody_sick_until_they_are():
    model = toy()
    generator = Generator(model, tiny_vocab())
    sound = model.decoder.turn.detach().clone()
    with torch.no_grad():
        model.decoder.turn.fill_(float("nan"))
    assert {c.reason for c in generator.generate([(words(5 + n), Limits(3)) for n in range(3)])} == {"sick"}
    with torch.no_grad():
        model.decoder.turn.copy_(sound)
    same(generator.generate([(words(5), Limits(3))])[0], undisturbed(words(5), Limits(3)))


# ---------------------------------------------------------------- weights


def change(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)


def test_no_completion_is_of_one_version_by_its_tokens_and_of_two_by_its_cache():
    """The weights change while a prompt is half read, with another waiting to begin where it ends."""
    model = toy()
    generator = Generator(model, tiny_vocab(), GeneratorConfig(prefill_tokens=4))
    running = generator.submit(words(4, 7), Limits(20, seed=5))
    generator.step()
    tickets = [generator.submit(words(18), Limits(6, seed=n)) for n in range(2)]
    generator.step()
    assert 0 < generator.scheduler.filling[0].fed < 18
    change(model)
    generator.version = 1
    later = [generator.submit(words(18), Limits(6, seed=2)), generator.submit(words(16), Limits(6, seed=3))]
    done = finished(generator)
    assert done[running].versions == (0, 1)
    for n, ticket in enumerate((*tickets, later[0])):
        assert done[ticket].versions == (1,)
        same(done[ticket], undisturbed(words(18), Limits(6, seed=n), model))
    same(done[later[1]], undisturbed(words(16), Limits(6, seed=3), model))


def test_a_new_version_is_believed_where_its_weights_left_no_trace():
    model = toy()
    generator = Generator(model, tiny_vocab())
    generator.generate([(words(20), Limits(3))])
    for parameter in model.parameters():
        parameter.data.mul_(1.05)
    generator.version = 1
    (got,) = generator.generate([(words(20), Limits(3))])
    assert got.cached_tokens == 0
    same(got, undisturbed(words(20), Limits(3), model))


def test_a_policy_serves_on_after_a_failure_however_deep():
    model = toy()
    policy = LocalPolicy(Generator(model, tiny_vocab()))
    generator = policy.generator

    def fail(*_: object) -> None:
        with torch.inference_mode():
            for pair in generator.kv.layers.values():
                pair[1].fill_(float("nan"))  # as a kernel that breaks leaves its output
        raise OutOfMemory

    async def ask(count: int) -> list[Completion | BaseException]:
        asked = (policy.complete(words(6 + n, n), Limits(7, seed=n)) for n in range(count))
        return await asyncio.gather(*asked, return_exceptions=True)

    assert len(asyncio.run(ask(3))) == 3
    hook = model.decoder.blocks[1].register_forward_pre_hook(fail)
    assert all(isinstance(answer, OutOfMemory) for answer in asyncio.run(ask(5)))
    hook.remove()
    for n, answer in enumerate(asyncio.run(ask(5))):
        assert isinstance(answer, Completion)
        same(answer, undisturbed(words(6 + n, n), Limits(7, seed=n)))


def test_memory_that_ends_while_the_cache_grows_loses_nobody(monkeypatch):
    """Some layers have grown by then. Once, the pool had, too: nothing could be begun anew, and all waited for ever."""
    monkeypatch.setattr(room, "FIRST_BLOCKS", 4)
    generator = Generator(toy(), tiny_vocab(), GeneratorConfig(cache_tokens=200))
    requests = [(words(9), Limits(30, seed=1)), (words(12, 5), Limits(20, seed=2))]
    tickets = [generator.submit(*request) for request in requests]
    generator.step()
    left, cat = 3, torch.cat

    def ends(tensors, *args, **options):
        nonlocal left
        left -= tensors[0].shape[1:] == generator.kv.layers[0][0].shape[1:]
        if left == 0:
            raise RuntimeError("can't allocate memory")
        return cat(tensors, *args, **options)

    done: dict[int, Completion] = {}

    def on() -> None:
        while generator.busy:
            done.update(generator.step())

    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", ends)
        with pytest.raises(RuntimeError, match="can't allocate"):
            on()
    assert sorted(done.keys() | {s.ticket for s in generator.scheduler.waiting}) == tickets
    done |= finished(generator)
    for ticket, request in zip(tickets, requests, strict=True):
        same(done[ticket], undisturbed(*request))
