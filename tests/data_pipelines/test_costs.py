"""What a record costs is told where it is made: the packs are those of the presets, and the advice holds."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from chat_kit import VOCAB
from ingest_kit import INLINE, at, encoded, pdf, records, run
from shard_samples import record

from data_pipelines.costs import PACKS, TEXT_BYTES, Costs, Pack, cost_lines, picture_tokens
from data_pipelines.documents import DocumentBuilder
from data_pipelines.ingest.__main__ import main, parser
from data_pipelines.packing import Size
from data_pipelines.shards import ShardWriter
from data_pipelines.validate import examine
from data_pipelines.validate import main as validate
from mmagent.chat import assistant, user
from mmagent.geometry import GeometryConfig
from mmagent.records import RecordError
from recipes import pretrain, sft

LAPTOP = "recipes.pretrain --preset laptop"


def test_the_packs_are_those_of_the_presets():
    found = {
        LAPTOP: pretrain.laptop(),
        "recipes.sft --preset laptop": sft.laptop(),
        "--preset small": pretrain.small(),
    }
    assert {name: (pack.tokens, pack.patches) for name, pack in PACKS.items()} == {
        name: (config.data.tokens_per_microbatch, config.data.patches_per_microbatch) for name, config in found.items()
    }
    assert sft.small().data.budget == pretrain.small().data.budget
    sizes = {(c.geometry.patch_size, c.geometry.merge_size, c.geometry.max_tokens) for c in found.values()}
    assert sizes == {(14, 2, GeometryConfig().max_tokens)}


def test_a_record_is_over_a_pack_by_its_tokens_or_by_one_picture():
    costs = Costs()
    costs.add("small", [(280, 280)], 10)
    assert costs.over == {}
    costs.add("long", [], 3000)
    costs.add("several", [(560, 560)] * 4, 10)  # 1,600 tokens are 6,400 patches
    assert (costs.over[LAPTOP], costs.alone.get(LAPTOP, 0)) == (2, 0)
    costs.add("large", [(1584, 1224)], 10)
    assert (costs.over[LAPTOP], costs.alone[LAPTOP]) == (3, 1)
    assert costs.picture == {"tokens": 57 * 44, "width": 1224, "height": 1584, "key": "large"}
    assert costs.record == {"tokens": 3000, "patches": 0, "key": "long"}
    assert "--preset small" not in costs.over


@pytest.mark.parametrize("side", [60, 280, 900, 1400])
def test_a_picture_within_the_limit_of_a_pack_is_taken_and_no_other(side):
    """Against the builder that training asks."""
    pack = Pack(2048, 4096)
    builder = DocumentBuilder(VOCAB, GeometryConfig(), limit=Size(pack.tokens, pack.patches), split_long=True)
    one = record(0)
    one = replace(one, images=(replace(one.images[0], data=encoded(side, side)),))
    try:
        builder.drafts(one)
        taken = True
    except RecordError:
        taken = False
    assert taken == (picture_tokens(side, side) <= pack.picture)


def test_pages_that_no_pack_holds_are_told_and_the_advice_holds(tmp_path, capsys):
    (tmp_path / "book.pdf").write_bytes(pdf([at(72, 700, "One"), at(72, 700, "Two")]))
    assert main([str(tmp_path / "book.pdf"), "--to", str(tmp_path / "to"), "--processes", "0"]) == 0
    out = capsys.readouterr().out
    assert "largest picture 2508 tokens (1224x1584, book-pdf/page-00001); longest record about 2511 tokens" in out
    assert f"2 records exceed a pack of {LAPTOP}, 2048 tokens and 4096 patches, 2 of them by one picture" in out
    assert "refused, data.split_long or not: draw pages with --dpi" in out
    assert "geometry.max_tokens=1024" in out
    dpi = re.search(r"--dpi (\d+)", out)
    page = (tmp_path / "to/report.html").read_text()
    assert dpi
    assert dpi[0] in page
    body = json.loads((tmp_path / "to/report.json").read_text())
    assert body["costs"]["alone"][LAPTOP] == 2
    assert run([tmp_path / "book.pdf"], tmp_path / "smaller", dpi=int(dpi[1]))["costs"]["over"] == {}
    shrunk = DocumentBuilder(VOCAB, GeometryConfig(max_tokens=1024), limit=Size(2048, 4096))
    assert [shrunk.draft(one).size.patches <= 4096 for one in records(tmp_path / "to")] == [True, True]


def test_the_dpi_of_the_readme_fits_a_pack_of_the_laptop(tmp_path):
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    dpi, told = map(int, re.search(r"book\.pdf .*--dpi (\d+) +# (\d+) visual tokens an A4 page", readme).groups())
    (tmp_path / "book.pdf").write_bytes(pdf([at(72, 700, "One")], 595.276, 841.89))
    costs = run([tmp_path / "book.pdf"], tmp_path / "to", dpi=dpi)["costs"]
    assert (costs["over"], costs["picture"]["tokens"]) == ({}, told)
    assert f"{dpi} gives {told}" in parser().format_help()


def test_long_texts_are_told_with_what_cuts_them(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "word " * 4000}))
    report = run([tmp_path / "x.jsonl"], tmp_path / "to")
    assert report["costs"]["record"]["tokens"] == 20_000 // TEXT_BYTES
    told = list(cost_lines(Costs(**report["costs"])))
    assert not any("picture" in line for line in told)
    assert any(
        "longer records are cut between turns, parts and paragraphs by data.split_long=true" in line for line in told
    )


def test_costs_go_on_with_a_stopped_ingestion(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": "word " * n}) for n in (9000, 5, 8000, 4)))
    whole = run([tmp_path / "x.jsonl"], tmp_path / "whole", shard_samples=1)
    append, left = ShardWriter.append, [3]

    def stop(self, sample):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        append(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            run([tmp_path / "x.jsonl"], tmp_path / "to", shard_samples=1)
    assert run([tmp_path / "x.jsonl"], tmp_path / "to", shard_samples=1)["costs"] == whole["costs"]


def test_validation_tells_the_same_and_counts_with_a_tokenizer(tmp_path: Path, capsys):
    with ShardWriter(tmp_path / "a") as writer:
        for n, side in enumerate((60, 1400)):
            one = record(n)
            picture = replace(one.images[0], data=encoded(side, side))
            writer.write(replace(one, images=(picture,), messages=(one.messages[0], assistant("x y z " * 50))))
        writer.write(replace(record(2), images=(), messages=(user("q"), assistant("word " * 5000))))
    assert validate([str(tmp_path / "a"), "--processes", "0", "--json", str(tmp_path / "found.json")]) == 0
    out = capsys.readouterr().out
    assert "largest picture 2500 tokens (1400x1400, sample-000001); longest record about 6251 tokens" in out
    assert "2 records exceed a pack of recipes.pretrain --preset laptop" in out
    assert json.loads((tmp_path / "found.json").read_text())["costs"]["alone"][LAPTOP] == 1
    VOCAB.save(tmp_path)
    tokenizer = str(tmp_path / "tokenizer.json")
    found = examine([str(tmp_path / "a")], tokenizer=tokenizer, limits=INLINE)
    exact = [DocumentBuilder(VOCAB, GeometryConfig()).draft(one).size for one in records(tmp_path / "a")]
    longest = max(exact, key=lambda size: size.tokens)
    assert found.tally.costs.record == {
        "tokens": longest.tokens, "patches": longest.patches, "key": "sample-000002"
    }  # fmt: skip
