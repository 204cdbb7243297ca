"""Fine-tuning an exported folder with transformers' own Trainer, as its users do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmagent.interop.agent_folder import load_agent
from mmagent.interop.conversion import convert, export_model
from tests.interop.hub_kit import tiny_agent

PIXELS = np.random.default_rng(1).integers(0, 256, (84, 112, 3), dtype=np.uint8)


def chat(n: int) -> list[dict]:
    question = [{"type": "image", "image": PIXELS}, {"type": "text", "text": f"say {n} " * (n % 3 + 1)}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": f"{n} it is"}]


@pytest.mark.slow
def test_the_trainer_learns_and_its_checkpoint_comes_home(tmp_path):
    """Padded batches, accumulation, recomputation, evaluation; the mask of the renderer gives the labels."""
    pytest.importorskip("accelerate", reason="Trainer needs it")
    from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

    export_model(tmp_path / "hub", tiny_agent(), "hub")
    processor = AutoProcessor.from_pretrained(tmp_path / "hub", trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hub", trust_remote_code=True)
    model.config.mtp_weight = 0.1

    def collate(rows: list[list[dict]]) -> dict[str, torch.Tensor]:
        batch = processor.apply_chat_template(
            rows, tokenize=True, return_dict=True, return_tensors="pt", padding=True, return_assistant_tokens_mask=True
        )
        said = batch.pop("assistant_masks")
        return {**batch, "labels": batch["input_ids"].masked_fill(said == 0, -100)}

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=8,
        learning_rate=5e-3, logging_steps=1, report_to=[], use_cpu=True, remove_unused_columns=False, seed=0,
        eval_strategy="steps", eval_steps=4, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model.gradient_checkpointing_enable()
    chats = [chat(n) for n in range(8)]
    trainer = Trainer(model=model, args=arguments, train_dataset=chats, eval_dataset=chats, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert float(losses[-1]) < 0.5 * float(losses[0])
    assert float(evaluated[-1]) < float(evaluated[0])
    trainer.save_model(str(tmp_path / "saved"))
    processor.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "home", "native")
    home = load_agent(tmp_path / "home").model.state_dict()
    assert all(torch.equal(home[name], tensor) for name, tensor in model.state_dict().items())
