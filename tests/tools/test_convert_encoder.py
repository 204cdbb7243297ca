"""The command between our encoder folders and stock towers: there and back, bit for bit; one line for every error."""

from __future__ import annotations

import torch

from mmagent.geometry import GeometryConfig
from mmagent.interop.encoder_folder import load_encoder, save_encoder
from mmagent.models.cogvit import CogViT, CogViTConfig
from tools.convert_encoder import main


def test_there_and_back(tmp_path, capsys):
    torch.manual_seed(0)
    encoder = CogViT(CogViTConfig(width=32, depth=2, heads=2, ffn=64, mask_token=True))
    geometry = GeometryConfig(min_tokens=4, max_tokens=64)
    save_encoder(tmp_path / "ours", encoder, geometry)
    out = ["export", str(tmp_path / "ours"), str(tmp_path / "theirs")]
    assert main(out) == 1
    assert "name the width of a new one" in capsys.readouterr().err
    assert main([*out, "--merger-width", "48"]) == 0
    assert "GlmOcrVisionModel; left behind: mask token" in capsys.readouterr().out
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "back")]) == 0
    back = load_encoder(tmp_path / "back")
    assert back.geometry == geometry
    state = back.model.state_dict()
    assert set(state) == set(encoder.state_dict()) - {"mask_token"}
    assert all(torch.equal(encoder.state_dict()[name], tensor) for name, tensor in state.items())


def test_an_encoder_of_its_own_is_not_called_unasked(tmp_path, capsys):
    save_encoder(tmp_path / "ours", CogViT(CogViTConfig(width=32, depth=1, heads=2, ffn=64)), GeometryConfig())
    config = tmp_path / "ours" / "config.yaml"
    config.write_text(config.read_text().replace("custom: ''", "custom: os:abort"))
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--merger-width", "48"]) == 1
    assert "os:abort, which is imported and called: if you trust" in capsys.readouterr().err


def test_what_cannot_be_converted_is_told_in_one_line(tmp_path, capsys):
    for argv in (["import", str(tmp_path / "nope"), "x"], ["export", str(tmp_path), "x", "--merger-width", "4"]):
        assert main(argv) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert len(said.splitlines()) == 1, said
