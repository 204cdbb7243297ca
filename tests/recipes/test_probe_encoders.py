"""Probing encoders: what the user can mend is told before anything is probed; an error of probing is a bug."""

from __future__ import annotations

import sys

import pytest
import torch

from mmagent.geometry import GeometryConfig
from mmagent.interop.encoder_folder import save_encoder
from mmagent.models.cogvit import CogViT, cogvit_debug
from mmagent.testing import ContractError, require
from mmagent.train.launch import launch
from mmagent.train.step import begun
from recipes import probe_encoders


def test_an_error_of_the_probing_itself_keeps_its_traceback(tmp_path, monkeypatch, capsys):
    probed = []

    def broken(*given):
        probed.append(given)
        require(False, "a probe of ours broke")

    monkeypatch.setattr(probe_encoders, "probe_sets", lambda *_: None)
    monkeypatch.setattr(probe_encoders, "probe_scores", broken)
    torch.manual_seed(0)
    encoder = CogViT(cogvit_debug())
    save_encoder(tmp_path / "one", encoder, GeometryConfig(patch_size=encoder.patch_size))
    begun.clear()
    monkeypatch.setattr(sys, "argv", ["probe_encoders", f"one={tmp_path}/one", f"two={tmp_path}/two"])
    with pytest.raises(SystemExit):
        launch(probe_encoders.main)
    assert capsys.readouterr().err.startswith("error: ")
    assert not probed
    monkeypatch.setattr(sys, "argv", ["probe_encoders", f"one={tmp_path}/one"])
    with pytest.raises(ContractError, match="a probe of ours broke"):
        launch(probe_encoders.main)
