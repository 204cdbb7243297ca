"""Documents as questions: prompts with their pictures, first answers, and draws that are a function of a seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipelines.build import BuildConfig, build
from data_pipelines.documents import DocumentBuilder
from data_pipelines.questions import Questions, question, verbatim
from mmagent.chat import ChatConfig
from mmagent.geometry import GeometryConfig
from mmagent.trajectories import Completion
from mmagent.types import Document
from mmagent.vocab import Vocab
from tests.agent_kit import picture

IMAGE = 1


def test_what_stands_before_the_first_answer_is_the_prompt():
    seen, later = picture(0), picture(1)
    slots = [IMAGE] * (seen.patches.shape[0] // 4)
    ids = [5, *slots, 6, 7, 8, 9, 5, *[IMAGE] * (later.patches.shape[0] // 4), 7]
    trainable = [False] * len(ids)
    at = 2 + len(slots)
    trainable[at : at + 2] = [True, True]
    trainable[-1] = True
    document = Document(torch.tensor(ids), torch.tensor(trainable), (seen, later), "d", "s")
    found = question(document, IMAGE, 2)
    assert found is not None
    prompt, answer = found
    assert prompt.input_ids == ids[:at]
    assert len(prompt.images) == 1
    assert answer == ids[at : at + 2]
    judge = verbatim([found])
    assert judge(prompt, Completion(tuple(answer), (0.0, 0.0), True)) == 1
    assert judge(prompt, Completion((7,), (0.0,), True)) == 0


@pytest.mark.parametrize("flags", [[True, True, False], [False, False, False]])
def test_documents_without_a_prompt_or_an_answer_are_no_questions(flags):
    document = Document(torch.tensor([5, 6, 7]), torch.tensor(flags), (), "d", "s")
    assert question(document, IMAGE, 2) is None


def test_draws_are_a_function_of_their_seed(tmp_path):
    build(BuildConfig(folder=str(tmp_path), pretrain={"captions": 12, "text": 12}, validation={}, browser="none",
                      vocab_size=400))  # fmt: skip
    vocab = Vocab.load(tmp_path / "tokenizer.json")
    builder = DocumentBuilder(vocab, GeometryConfig(), ChatConfig())
    questions = Questions(tmp_path / "pretrain", builder, vocab.image_id, 2)
    one, two, other = (questions.draw(seed, 5, 4000) for seed in (3, 3, 4))
    assert [(p.key, a) for p, a in one] == [(p.key, a) for p, a in two] != [(p.key, a) for p, a in other]
    assert all(len(p) + len(a) <= 4000 for p, a in one)
    with pytest.raises(ValueError, match="questions of at most 1 tokens"):
        questions.draw(0, 2, 1)
    with pytest.raises(ValueError, match="no sub-folder"):
        Questions(Path(tmp_path / "nothing"), builder, vocab.image_id, 2)
