"""A model to serve, from a folder of any format that the library knows."""

from __future__ import annotations

from pathlib import Path

import torch

from mmagent.interop.agent_folder import CONFIG, Agent, build_agent, load_agent, read_agent_config
from mmagent.interop.encoder_folder import require_trust
from mmagent.interop.live_model import load_stored
from mmagent.interop.model_source import open_source
from mmagent.interop.packed_folder import PACKING


def load(folder: Path, *, device: str, trust_code: bool = False) -> tuple[Agent, list[str]]:
    """The agent in ``folder``, in evaluation mode, and lines for people about what was found.

    ``folder`` is one of ours, or one that :func:`~mmagent.interop.model_source.open_source` takes; an encoder of its
    own is imported with ``trust_code`` alone. Raises ``ValueError`` naming what is missing or does not fit.
    """
    if (folder / PACKING).is_file():
        if not trust_code:
            require_trust(read_agent_config(folder)[0].encoder, str(folder))
        return load_agent(folder, device), ["packed: layers hold what pruning left of them"]
    with open_source(folder, trust_code=trust_code) as source:
        if (folder / CONFIG).is_file():
            return load_agent(folder, device), list(source.notes)
        model = build_agent(source.config)
        load_stored(model, source.tensors, f"{folder} does not fit {type(model).__name__}", device)
        config = source.config
        agent = Agent(model.to(torch.device(device)).eval(), source.vocab, config.geometry, config.chat, config.encoder)
        return agent, [f"format: {source.format}", *source.notes]
