"""The benchmark runs, in its smallest size, and says what it measured."""

from __future__ import annotations

import json

import pytest
import torch

from mmagent.balance import CostWeights
from mmagent.models.peaks import peak_of
from tools import bench
from tools.benchmarks import balance, encoder, paged
from tools.benchmarks.row import Row, Settings, smaller_is_better, table, throughput, throughputs


def test_ratio_above_one_means_that_ours_is_better():
    calls: list[str] = []
    row = throughput("x", lambda: calls.append("a"), lambda: sum(range(200_000)), "slow", 10, "things/s", Settings(5))
    assert row.ratio > 1
    assert row.ours > row.peer
    assert len(calls) == 6  # one to warm up
    assert smaller_is_better("bytes", 10, 40, "wasteful", "MiB").ratio == 4


def test_peers_of_one_row_meet_the_same_runs_of_ours():
    calls: list[str] = []
    peers = {name: lambda name=name: calls.append(name) for name in ("b", "c")}
    rows = throughputs("x", lambda: calls.append("a"), peers, 10, "things/s", Settings(2))
    assert "".join(calls) == "abc" + "abc" + "cba"  # to warm up, then there and back
    assert [row.peer_name for row in rows] == ["b", "c"]
    assert rows[0].ours == rows[1].ours


def test_long_tail_is_the_distribution_that_is_stated():
    """Quantiles of a log-normal, cut at both ends; sides are even, so a size is met to within their rounding."""
    for size in encoder.SIZES.values():
        lengths = sorted(rows * columns for rows, columns in encoder.long_tail(size))
        assert all(side % encoder.MERGE == 0 for grid in encoder.long_tail(size) for side in grid)
        assert encoder.long_tail(size) == encoder.long_tail(size)
        middle = (lengths[size.images // 2 - 1] * lengths[size.images // 2]) ** 0.5
        assert 0.8 * size.median < middle < 1.25 * size.median
        assert lengths[-1] > 2 * sum(lengths) / len(lengths)


def test_sides_get_the_same_pixels():
    batch = encoder.Batch.of([(2, 4), (6, 2)], torch.device("cpu"))
    assert batch.valid.sum(1).tolist() == [8, 12]
    assert torch.equal(batch.padded[batch.valid], batch.rgb)
    frames = batch.vision.patches.unflatten(1, (3, encoder.FRAMES, -1))
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])
    # block by block: the first merged token of the first image is rows 0 and 1 of its columns 0 and 1
    assert torch.equal(frames[:4, :, 0].flatten(1), batch.rgb[[0, 1, 4, 5]])


def test_areas_refuse_options_that_they_do_not_have(capsys):
    with pytest.raises(SystemExit):
        bench.main(["data", "--size", "large"])
    assert "data has no --size" in capsys.readouterr().err
    for area, told in (("data", "data has no part 'steps'"), ("model", "model has no part 'nothing', but steps, mtp")):
        with pytest.raises(SystemExit):
            bench.main([area, "--part", "steps" if area == "data" else "nothing"])
        assert told in capsys.readouterr().err


def test_table_is_aligned():
    text = table([Row("a", 1234.5, 3.14159, "peer", 393.0, "tokens/s", 0.07)])
    lines = text.splitlines()
    assert len(lines) == 3
    assert "1,234" in lines[2]
    assert "±7%" in lines[2]


def test_unknown_areas_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["nothing"])
    assert "encoder" in capsys.readouterr().err


def test_helpers_are_no_areas():
    assert {"contrastive", "data", "encoder", "model", "vision_memory"} <= set(bench.areas())
    assert not {"__init__", "row", "glm", "memory"} & set(bench.areas())


def test_peaks_are_of_the_longest_name_that_fits():
    """A name that begins like another's is another device: twice or half as fast."""
    teraflops = {
        "NVIDIA A10G": 70,
        "NVIDIA A10": 125,
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA H100 NVL": 835,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H200": 989,
        "NVIDIA L4": 121,
        "NVIDIA L40": 181,
        "NVIDIA L40S": 362,
    }
    assert {name: peak_of(name) for name in teraflops} == {name: 1e12 * n for name, n in teraflops.items()}
    assert peak_of("AMD Instinct MI210") is None


def test_model_rows_have_their_names_a_share_of_the_peak_and_a_picture(tmp_path, capsys):
    rows_file, picture = tmp_path / "rows.json", tmp_path / "growth.png"
    options = ["--quick", "--repeats", "1", "--peak", "0.5", "--json", str(rows_file), "--plot", str(picture)]
    assert bench.main(["model", *options]) == 0
    rows = {(row["name"], row["peer_name"]): row for row in json.loads(rows_file.read_text())}
    names = {name for name, _ in rows}
    for kind in ("fp32", "bf16"):
        for start in ("long tail 64 tokens", "equal 32 tokens"):
            assert {f"{start}, {kind}{rest}" for rest in ("", ": MFU", ": peak")} <= names
        forms = {peer.split(",")[0] for name, peer in rows if name == f"long tail 64 tokens, {kind}"}
        assert forms == {"padded", "packed"}
        (best,) = (peer for name, peer in rows if name == f"equal 32 tokens, {kind}")
        assert best.startswith("best: ")
        pace, share = (rows[f"equal 32 tokens, {kind}{rest}", best] for rest in ("", ": MFU"))
        assert share["ours"] / share["peer"] == pytest.approx(pace["ours"] / pace["peer"])
        assert 0 < share["ours"] < 100
    assert {name.split()[1] for name in names if name.startswith("growth ")} == {"length", "experts", "images"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "% of peak" in capsys.readouterr().out


@pytest.mark.parametrize(
    "area",
    [
        "mtp",
        "data",
        "contrastive",
        "checkpoint",
        "sparsity",
        *(pytest.param(area, marks=pytest.mark.slow) for area in ("muon", "ingest", "pages", "worlds")),
    ],
)
def test_areas_run_and_write_json(area, tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert bench.main([area, "--quick", "--repeats", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert len(rows) >= 2
    assert rows[0].keys() == {"name", "ours", "peer", "peer_name", "ratio", "unit", "spread"}
    assert all(row["ratio"] > 0 for row in rows)
    assert rows[0]["name"] in capsys.readouterr().out


def test_simulated_ranks_are_dealt_what_weighs_alike():
    """Eight ranks of four packs by hand. In turn the first gets all four that are long; dealt, four get one each."""
    long, short = (balance.Plan((balance.Item(tokens, ()),)) for tokens in (4000, 100))
    packs = [long] * 4 + [short] * 28
    rows = list(balance.simulated("x", packs, 8, CostWeights(0, 0, 0, 1.0)))
    assert [row.peer_name for row in rows] == ["in turn", "samples in turn", "by eights"]
    mean = (4 * 4000 + 28 * 100) / 8
    assert rows[0].peer == pytest.approx(100 * (4 * 4000 / mean - 1))
    assert rows[0].ours == rows[2].peer == pytest.approx(100 * ((4000 + 3 * 100) / mean - 1))  # eight are one group
    assert rows[0].ratio == pytest.approx(4 * 4000 / (4000 + 3 * 100))


@pytest.mark.slow
def test_balance_of_simulated_ranks_runs_and_writes_json(tmp_path):
    path = tmp_path / "rows.json"
    assert bench.main(["balance", "--part", "simulated", "--quick", "--repeats", "1", "--json", str(path)]) == 0
    rows = {(row["name"], row["peer_name"]): row for row in json.loads(path.read_text())}
    assert rows["max/mean work, 64 ranks", "in turn"]["ours"] < 2 < rows["max/mean work, 64 ranks", "in turn"]["peer"]
    assert rows["max/mean encoder work, eight ranks trade images", "kept"]["ratio"] > 1


@pytest.mark.slow
def test_memory_of_vision_modules_is_flat_in_chunks_and_drawn(tmp_path):
    rows_file, picture = tmp_path / "rows.json", tmp_path / "memory.png"
    arguments = ["vision_memory", "--quick", "--repeats", "1", "--json", str(rows_file), "--plot", str(picture)]
    assert bench.main(arguments) == 0
    rows = {(row["name"], row["peer_name"]): row for row in json.loads(rows_file.read_text())}
    assert (
        rows["flat 32/16 images, trained", "at once"]["ours"]
        < 1.03
        < rows["flat 32/16 images, trained", "at once"]["peer"]
    )
    assert rows["32 images, trained", "transformers"]["ratio"] > 1.5
    assert rows["1 images, trained", "at once"]["ratio"] == pytest.approx(1)  # fits into one chunk
    assert {"recomputed", "transformers, checkpointing"} <= {peer for _, peer in rows}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_encoder_rows_have_their_names_and_a_picture(tmp_path, capsys):
    rows_file, picture = tmp_path / "rows.json", tmp_path / "growth.png"
    arguments = ["encoder", "--quick", "--repeats", "1", "--json", str(rows_file), "--plot", str(picture)]
    assert bench.main(arguments) == 0
    rows = json.loads(rows_file.read_text())
    for start in ("long tail ", "equal "):
        peers = {row["peer_name"] for row in rows if row["name"].startswith(start)}
        assert {"transformers Siglip2", "timm NaFlexVit"} <= peers
    assert {row["name"].split()[1] for row in rows if row["name"].startswith("growth ")} == {"64", "256"}
    assert any(row["name"].startswith("same weights") for row in rows)
    assert all(row["ratio"] > 0 for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "transformers Siglip2" in capsys.readouterr().out


def test_attention_over_blocks_is_compared_with_what_gives_the_same():
    rows = list(paged.rows(Settings(1, True, None, None, "")))
    assert [row.peer_name for row in rows] == ["padded", "gathered"] * 4
    assert all(row.ours > 0 and row.peer > 0 for row in rows)


@pytest.mark.slow
def test_blocks_are_compared_with_one_by_one_at_the_quality_that_each_has(tmp_path):
    rows_file = tmp_path / "rows.json"
    assert bench.main(["diffusion", "--quick", "--repeats", "1", "--json", str(rows_file)]) == 0
    rows = {(row["name"], row["peer_name"]): row for row in json.loads(rows_file.read_text())}
    names = ("4 requests, 0.9", "tokens a forward, 0.9", "exact, 0.9")
    assert set(rows) == {(name, peer) for name in names for peer in ("one by one", "drafts")}
    assert rows["tokens a forward, 0.9", "one by one"]["peer"] == 1
    assert rows["tokens a forward, 0.9", "one by one"]["ours"] > 0.5  # it may look at places behind the end
    assert rows["tokens a forward, 0.9", "drafts"]["peer"] >= 1
