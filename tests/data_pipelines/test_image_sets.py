"""Folders, shards and data sets of others: the same images, labels and captions whatever they lie in."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.copies import without_copies
from data_pipelines.documents import Quarantine, QuarantineConfig, QuarantineError
from data_pipelines.galleries import ImageSetGallery, ShardGallery, losses_of, open_gallery
from data_pipelines.hub_images import ColumnsConfig
from data_pipelines.image_sets import open_images, open_pair
from data_pipelines.labelled import IGNORE, ImageSet, require, some_of
from data_pipelines.shards import ShardWriter
from mmagent.chat import Image as ImagePart
from mmagent.chat import Text
from mmagent.geometry import GeometryConfig
from mmagent.records import Record, RecordError, Region, encode_image
from tests.data_pipelines.image_samples import COLOURS, bomb, encoded, folder_of_classes, pixels, tar_of, write

GEOMETRY = GeometryConfig(min_tokens=1)
NAMES = tuple(COLOURS)


def _agree(images: ImageSet) -> None:
    """Every image shows the colour that its label names."""
    assert images.classes == NAMES
    for n in range(len(images)):
        picture = images[n]
        assert picture.label is not None
        mean = picture.image().reshape(-1, 3).mean(axis=0)
        assert np.abs(mean - COLOURS[images.classes[picture.label]]).max() < 20
        assert picture.size() == picture.image().shape[:2]


# ------------------------------------------------------------------------------------------ folders


def test_sub_folders_are_classes(tmp_path):
    root = folder_of_classes(tmp_path / "set", kind="JPEG")
    write(root / "red" / "deeper" / "x.png", encoded(pixels("red", 9)))
    write(root / ".hidden" / "x.png", b"no")
    write(root / "red" / "notes.md", "no image")
    images = open_images(str(root))
    assert len(images) == 13
    assert images.holds == {"label"}
    _agree(images)
    with pytest.raises(ValueError, match=r"has no captions; put captions of IMAGE.jpg into IMAGE.txt"):
        require(images, "caption")
    (root / "red" / "round").symlink_to(root / "red")  # a circle
    assert len(open_images(str(root))) == 13


def test_splits_of_a_folder_share_their_classes(tmp_path):
    folder_of_classes(tmp_path / "set" / "train", 3)
    write(tmp_path / "set" / "val" / "red" / "a.png", encoded(pixels("red", 50)))
    write(tmp_path / "set" / "devkit" / "readme.txt", "no images")
    train, test = open_pair(str(tmp_path / "set"))
    assert (len(train), len(test)) == (9, 1)
    _agree(train)
    _agree(test)
    assert len(open_images(str(tmp_path / "set"))) == 9
    assert len(open_images(str(tmp_path / "set"), "val")) == 1
    with pytest.raises(ValueError, match="no split 'dev'; there are train, val"):
        open_images(str(tmp_path / "set"), "dev")


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train", "test", "bus"):
        write(tmp_path / name / "a.png", encoded(pixels("red", 1)))
    assert open_images(str(tmp_path)).classes == ("bus", "test", "train")


def test_a_set_without_splits_is_split_by_name(tmp_path):
    root = folder_of_classes(tmp_path / "set", 40)
    train, test = open_pair(str(root))
    names = [{part.where(n) for n in range(len(part))} for part in (train, test)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 120
    assert 10 <= len(test) <= 40  # 24 expected; four deviations of a binomial each way
    folder_of_classes(root, 20, first=100)  # new samples move no old one
    again = [{part.where(n) for n in range(len(part))} for part in open_pair(str(root))]
    assert names[0] < again[0]
    assert names[1] < again[1]
    other = open_pair(str(root), seed=1)[1]
    assert {other.where(n) for n in range(len(other))} != again[1]
    assert train.fingerprint() != test.fingerprint()
    with pytest.raises(ValueError, match="3 images leave nothing for the part 'test by hash"):
        open_pair(str(folder_of_classes(tmp_path / "tiny", 1)), share=1e-9)


def test_captions_lie_beside_images_or_in_a_table(tmp_path):
    for n in range(2):
        write(tmp_path / "beside" / f"{n}.png", encoded(pixels("red", n)))
    write(tmp_path / "beside" / "0.txt", "a red field\n\nsomething red\n")
    beside = open_images(str(tmp_path / "beside"))
    assert beside.holds == {"caption"}
    assert [beside[n].captions for n in range(2)] == [("a red field", "something red"), ()]
    rows = [{"file_name": "0.png", "text": "one", "label": "b"}, {"file_name": "1.png", "captions": ["two", "three"]}]
    tables = {
        "metadata.jsonl": "\n".join(json.dumps(row) for row in rows),
        "captions.json": json.dumps(rows),
        "metadata.csv": "file_name,text,label\n0.png,one,b\n1.png,two,\n1.png,three,\n",
    }
    for name, text in tables.items():
        root = tmp_path / name.replace(".", "_")
        for n in range(2):
            write(root / f"{n}.png", encoded(pixels("red", n)))
        write(root / name, text)
        images = open_images(str(root))
        assert [images[n].captions for n in range(2)] == [("one",), ("two", "three")]
        assert [images[n].label for n in range(2)] == [0, None]
        assert images.classes == ("b",)


def test_tables_of_other_shapes(tmp_path):
    for n in range(2):
        write(tmp_path / f"{n}.png", encoded(pixels("red", n)))
    table = write(tmp_path / "captions.json", json.dumps({"0.png": "one", "1.png": ["two", "three"]}))
    assert open_images(str(tmp_path))[1].captions == ("two", "three")
    coco = {
        "images": [{"id": 7, "file_name": "0.png"}, {"id": 8, "file_name": "1.png"}],
        "annotations": [{"image_id": 7, "caption": "one"}, {"image_id": 7, "caption": "again"}],
    }
    table.write_text(json.dumps(coco))
    assert open_images(str(tmp_path))[0].captions == ("one", "again")
    for text, said in (
        ("[{]", "does not parse"),
        ('[{"text": "x"}]', "row 1 names no image"),
        ('[{"file_name": "0.png", "text": 3}]', "row 1"),
        ('[{"file_name": "0.png", "label": -1}]', "label -1 is negative"),
        ('[{"file_name": "9.png", "text": "x"}]', "images that are not there, such as '9.png'"),
        ('[{"file_name": "0.png", "label": 1}, {"file_name": "1.png", "label": "x"}]', "all names or all numbers"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=said):
            open_images(str(tmp_path))


def _mask(values: list[int]) -> np.ndarray:
    return np.repeat(np.array(values, dtype=np.uint8)[:, None], 44, axis=1).repeat(30 // len(values), axis=0)


def test_maps_lie_beside_images_or_in_a_folder_beside_theirs(tmp_path):
    root = tmp_path / "set"
    write(root / "a.png", encoded(pixels("red", 0)))
    write(root / "b.png", encoded(pixels("red", 1)))
    write(root / "a.mask.png", encoded(_mask([0, 2, 255])))
    palette = Image.fromarray(_mask([1, 0, 3])).convert("P")
    palette = Image.frombytes("P", (44, 30), _mask([1, 0, 3]).tobytes())
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    (tmp_path / "set_mask").mkdir()
    palette.save(tmp_path / "set_mask" / "b.png")
    write(root / "a.depth.png", encoded(np.full((15, 22), 1500, np.uint16)))
    images = open_images(str(root))
    assert len(images) == 2
    assert images.holds == {"mask", "depth"}
    assert np.unique(images[0].mask()).tolist() == [IGNORE, 0, 2]
    assert images[1].mask()[:, 0].tolist() == [1] * 10 + [0] * 10 + [3] * 10
    assert images[0].depth().shape == (15, 22)  # half as fine, of the same shape
    assert set(images[0].depth().ravel()) == {1500.0}
    assert images[1].depth() is None
    write(root / "a.mask.png", encoded(np.zeros((44, 30), np.uint8)))
    with pytest.raises(RecordError, match=r"a\.png: mask: a map of 30x44 pixels for an image of 44x30"):
        images[0].mask()
    write(root / "a.mask.png", encoded(pixels("red", 1)))
    with pytest.raises(RecordError, match="got RGB"):
        images[0].mask()
    write(root / "a.depth.png", bomb())
    with pytest.raises(RecordError, match="12000x12000 pixels exceed"):
        images[0].depth()


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match="no such folder, tar or glob; a data set of the hub is called datasets:ID"):
        open_images(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no image"):
        open_images(str(tmp_path))
    folder_of_classes(tmp_path / "a", 2)
    with pytest.raises(ValueError, match="are the same images"):
        open_pair(str(tmp_path / "a"), str(tmp_path / "a"))


def test_another_source_may_be_the_test(tmp_path):
    folder_of_classes(tmp_path / "a", 2)
    for name in ("blue", "red"):  # of three classes two occur: labels are numbers of the training's classes
        write(tmp_path / "b" / name / "9.png", encoded(pixels(name, 9)))
    train, test = open_pair(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (len(train), len(test)) == (6, 2)
    _agree(test)
    write(tmp_path / "b" / "violet" / "9.png", encoded(pixels("red", 9)))
    with pytest.raises(ValueError, match="class 'violet' is none of the 3"):
        open_pair(str(tmp_path / "a"), str(tmp_path / "b"))


def test_images_of_the_test_are_not_fitted_whatever_they_are_called(tmp_path):
    for n, name in enumerate(NAMES * 3):
        write(tmp_path / "cls" / name / f"{n}.png", encoded(pixels(name, n)))
        write(tmp_path / "super" / name / f"other{n}.png", encoded(pixels(name, n)))
    write(tmp_path / "cls" / "red" / "bad.png", b"")
    write(tmp_path / "super" / "red" / "new.png", encoded(pixels("red", 99)))
    train, test = open_pair(str(tmp_path / "super"), str(tmp_path / "cls"))
    fitted, copies = without_copies(train, test)
    assert ([fitted[n].key for n in range(len(fitted))], copies) == (["red/new.png"], 9)
    assert fitted.fingerprint() != train.fingerprint()
    assert without_copies(test, open_images(str(folder_of_classes(tmp_path / "far", 1, first=50))))[0] is test
    (tmp_path / "super" / "red" / "new.png").unlink()
    with pytest.raises(ValueError, match="are the same images: nothing is left to fit"):
        without_copies(*open_pair(str(tmp_path / "super"), str(tmp_path / "cls")))


def test_some_of_a_set_are_drawn_by_a_seed(tmp_path):
    images = open_images(str(folder_of_classes(tmp_path / "set", 4)))
    some = some_of(images, 5, 1)
    keys = [some.where(n) for n in range(5)]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(some) == 5
    assert keys != [some_of(images, 5, 2).where(n) for n in range(5)]
    assert some_of(images, 0, 1) is some_of(images, 12, 1) is images


# ------------------------------------------------------------------------------------------ shards


def _shards(root: Path) -> Path:
    for shard in range(3):
        members: dict[str, bytes | str] = {}
        for n, name in enumerate(NAMES):
            members[f"{n:04d}.{'jpg' if n else 'png'}"] = encoded(pixels(name, shard), "JPEG" if n else "PNG")
            members[f"{n:04d}.cls"] = str(n) if shard else name
            members[f"{n:04d}.txt"] = f"all {name}"
            members[f"{n:04d}.pyd"] = b"cos\nsystem\n(S'false'\ntR."
        tar_of(root / f"{shard:03d}.tar", members)
    write(root / "classes.txt", "\n".join(NAMES) + "\n")
    return root


def test_anybodys_shards_are_read(tmp_path):
    root = _shards(tmp_path / "shards")
    for location in (str(root), str(root / "{000..002}.tar"), str(root / "*.tar")):
        images = open_images(location)
        assert len(images) == 9
        assert images.holds == {"label", "caption"}
        _agree(images)
        assert {images[n].captions for n in range(9)} == {(f"all {name}",) for name in NAMES}
        assert len({images.where(n) for n in range(9)}) == len({images[n].key for n in range(9)}) == 9
    with ThreadPoolExecutor(4) as pool:
        assert [p.key for p in pool.map(images.__getitem__, range(9))] == [images[n].key for n in range(9)]
    with pytest.raises(ValueError, match=r"003\.tar is not there"):
        open_images(str(root / "{000..003}.tar"))


def test_shards_with_json_or_odd_members(tmp_path):
    image = encoded(pixels("red", 0))
    tar_of(
        tmp_path / "a.tar",
        {
            "one.png": image,
            "one.json": json.dumps({"label": 4, "caption": "one"}),
            "one.depth.png": encoded(np.full((30, 44), 7, np.uint16)),
            "two.png": image,
            "two.jpg": image,
            "three.cls": "1",
            "four.png": image,
            "four.cls": "cat",
            "five.png": image,
            "five.json": json.dumps({"label": 0.5}),
        },
    )
    images = open_images(str(tmp_path / "a.tar"))
    assert (images[0].label, images[0].captions, images.classes) == (4, ("one",), ())
    assert set(images[0].depth().ravel()) == {7.0}
    for n, said in ((1, "2 images where one"), (2, "0 images where one"), (3, "'cat' is no number"), (4, "0.5 is no")):
        with pytest.raises(RecordError, match=said):
            images[n]
    tar_of(tmp_path / "b" / "b.tar", {"x.cls": "1"})
    with pytest.raises(ValueError, match=r"none of 1 samples can be used; the first: b\.tar/x: image: 0 images"):
        open_images(str(tmp_path / "b"))


def test_shards_in_train_and_test_folders(tmp_path):
    _shards(tmp_path / "set" / "train")
    image = encoded(pixels("red", 77))
    tar_of(tmp_path / "set" / "test" / "0.tar", {"a.png": image, "a.cls": "2"})
    write(tmp_path / "set" / "classes.txt", "\n".join(NAMES))
    train, test = open_pair(str(tmp_path / "set"))
    assert (len(train), len(test)) == (9, 1)
    _agree(test)


# ------------------------------------------------------------------------------------------ data sets of the hub


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    library.disable_progress_bars()
    return library


def _table(datasets, rows: int = 6, **more):
    data = {
        "image": [{"bytes": encoded(pixels(NAMES[n % 3], n)), "path": None} for n in range(rows)],
        "label": [n % 3 for n in range(rows)],
        "text": [f"all {NAMES[n % 3]}" for n in range(rows)],
    }
    types = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=list(NAMES)),
        "text": datasets.Value("string"),
    }
    types |= {name: kind for name, (_, kind) in more.items()}
    return datasets.Dataset.from_dict(
        data | {name: values for name, (values, _) in more.items()}, features=datasets.Features(types)
    )


def test_folders_that_the_library_reads(datasets, tmp_path):
    folder_of_classes(tmp_path / "f" / "train", 3)
    folder_of_classes(tmp_path / "f" / "test", 1, first=50)
    train, test = open_pair(f"datasets:imagefolder:{tmp_path}/f")
    assert (len(train), len(test)) == (9, 3)
    _agree(train)
    _agree(test)
    _table(datasets).to_parquet(tmp_path / "pq" / "train.parquet")
    images = open_images(f"datasets:parquet:{tmp_path}/pq")
    _agree(images)
    assert images.holds == {"label", "caption"}
    assert len(open_images(f"datasets:{tmp_path}/pq:train")) == 6
    assert [len(part) for part in open_pair(f"datasets:{tmp_path}/pq", share=0.5)] != [6, 6]


def test_folders_that_the_library_saved(datasets, tmp_path):
    both = datasets.DatasetDict({"train": _table(datasets, 9), "test": _table(datasets, 3)})
    both.save_to_disk(tmp_path / "both")
    train, test = open_pair(f"datasets:{tmp_path}/both")
    assert (len(train), len(test)) == (9, 3)
    _agree(test)
    _table(datasets).save_to_disk(tmp_path / "one")
    one = open_images(f"datasets:{tmp_path}/one")
    _agree(one)
    assert one[0].captions == ("all blue",)
    assert one.fingerprint() == open_images(f"datasets:{tmp_path}/one").fingerprint()
    assert one.fingerprint() != train.fingerprint()
    with pytest.raises(ValueError, match="saved as one split"):
        open_images(f"datasets:{tmp_path}/one:train")


def test_columns_are_found_by_type_or_chosen(datasets, tmp_path):
    masks = [{"bytes": encoded(_mask([0, 1, 2])), "path": None}] * 6
    table = _table(
        datasets,
        annotation=(masks, datasets.Image()),
        coarse=([0] * 6, datasets.ClassLabel(names=["field"])),
        note=(["note"] * 6, datasets.Value("string")),
        kind=([NAMES[n % 3] for n in range(6)], datasets.Value("string")),
        many=([["one", "two"]] * 6, datasets.List(datasets.Value("string"))),
        number=([5] * 6, datasets.Value("int64")),
        weight=([0.5] * 6, datasets.Value("float32")),
    )
    table.save_to_disk(tmp_path / "t")
    source = f"datasets:{tmp_path}/t"

    def opened(**chosen: str) -> ImageSet:
        return open_images(source, columns=ColumnsConfig(**chosen))

    with pytest.raises(ValueError, match="image, annotation could be the image; choose with image=COLUMN"):
        opened()
    with pytest.raises(ValueError, match="label, coarse could be the label; choose with label=COLUMN or none"):
        opened(image="image")
    images = opened(mask="annotation", label="label")
    _agree(images)
    assert images.holds == {"label", "mask", "caption"}
    assert images[0].captions == ("all blue",)  # of several columns of text the one of a usual name
    assert np.unique(images[0].mask()).tolist() == [0, 1, 2]
    assert opened(image="image", label="none", caption="none").holds == frozenset()
    assert opened(image="image", label="label", caption="many")[0].captions == ("one", "two")
    named = opened(image="image", label="kind")
    _agree(named)
    assert opened(image="image", label="number")[0].label == 5
    for chosen, said in (
        ({"image": "img"}, "no column 'img' for image; there are image, label"),
        ({"image": "text"}, "'text' holds no images; image, annotation do"),
        ({"image": "image", "mask": "text"}, "'text' for mask holds no images"),
        ({"image": "image", "label": "weight"}, "'weight' for label holds .*no class"),
        ({"image": "image", "label": "label", "caption": "number"}, "'number' holds no text"),
    ):
        with pytest.raises(ValueError, match=said):
            opened(**chosen)


def test_captions_among_several_columns_of_text_are_not_guessed(datasets, tmp_path):
    table = _table(datasets, note=(["note"] * 6, datasets.Value("string"))).rename_column("text", "alt")
    table.save_to_disk(tmp_path / "t")
    images = open_images(f"datasets:{tmp_path}/t")
    assert images.holds == {"label"}
    with pytest.raises(ValueError, match="has no captions; alt, note hold text: choose with caption=COLUMN"):
        require(images, "caption")


def test_rows_without_an_image_and_sets_that_are_not_there(datasets, tmp_path):
    table = _table(datasets, 3, extra=([None, {"bytes": b"x", "path": None}, None], datasets.Image()))
    table.save_to_disk(tmp_path / "t")
    images = open_images(f"datasets:{tmp_path}/t", columns=ColumnsConfig(image="extra"))
    with pytest.raises(RecordError, match="row/0: extra: is empty"):
        images[0]
    with pytest.raises(RecordError, match="row/1: image: cannot decode"):
        images[1].image()
    with pytest.raises(ValueError, match="datasets:nobody/nothing: cannot be loaded: "):
        open_images("datasets:nobody/nothing")
    with pytest.raises(ValueError, match="no folder"):
        open_images(f"datasets:imagefolder:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="names no data set"):
        open_images("datasets:")


# ------------------------------------------------------------------------------------------ galleries


def test_a_gallery_goes_through_a_set_in_a_new_order_every_epoch(tmp_path):
    gallery = open_gallery(str(folder_of_classes(tmp_path / "set", 5)), GEOMETRY, seed=3)
    epochs = [[gallery(e * 15 + n).key for n in range(15)] for e in range(3)]
    assert all(len(set(epoch)) == 15 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = open_gallery(str(tmp_path / "set"), GEOMETRY, seed=3)
    assert [again(n).key for n in range(15)] == epochs[0]
    assert again.fingerprint() == gallery.fingerprint()
    assert gallery.fingerprint() != open_gallery(str(tmp_path / "set"), GEOMETRY, seed=4).fingerprint()
    assert {gallery(n).caption for n in range(15)} == set(NAMES)  # the class, where there is no caption
    write(tmp_path / "set" / "red" / "new.png", encoded(pixels("red", 99)))
    assert open_gallery(str(tmp_path / "set"), GEOMETRY, seed=3).fingerprint() != gallery.fingerprint()


def test_training_can_leave_out_what_an_evaluation_judges_by(tmp_path):
    root = str(folder_of_classes(tmp_path / "set", 20))
    judged = open_pair(root)[1]
    gallery = open_gallery(root, GEOMETRY, split="train")
    seen = {gallery(n).key for n in range(60 - len(judged))}
    assert len(seen) == 60 - len(judged)
    assert not seen & {judged[n].key for n in range(len(judged))}


def test_what_has_no_texts_is_refused_where_texts_are_learned_from(tmp_path):
    """All its pictures would share one empty caption, and any of them counts as found."""
    write(tmp_path / "flat" / "a.png", encoded(pixels("red", 0)))
    tar_of(tmp_path / "numbered" / "0.tar", {"a.png": encoded(pixels("red", 0)), "a.cls": "3"})
    with ShardWriter(tmp_path / "silent") as writer:
        writer.write(Record("r", "s", parts=(ImagePart(),), images=(encode_image(pixels("red", 0)),)))
    for name, said in (
        ("flat", "put captions of IMAGE.jpg into IMAGE.txt"),
        ("numbered", "a sample's captions are its KEY.txt"),
        ("silent", "a sample's captions are its KEY.txt"),
    ):
        with pytest.raises(ValueError, match=f"{name}: has no captions; {said}"):
            open_gallery(str(tmp_path / name), GEOMETRY, captions=True)
        assert open_gallery(str(tmp_path / name), GEOMETRY)(0).caption == ""
    write(tmp_path / "flat" / "a.txt", "a red field")
    assert open_gallery(str(tmp_path / "flat"), GEOMETRY, captions=True)(0).caption == "a red field"
    named = open_gallery(str(folder_of_classes(tmp_path / "named", 1)), GEOMETRY, captions=True)
    assert named(0).caption in NAMES
    with ShardWriter(tmp_path / "boxes") as writer:
        boxes = (Region(0, (0, 0, 20, 20), "button"),)
        writer.write(Record("r", "s", parts=(ImagePart(),), images=(encode_image(pixels("red", 0)),), boxes=boxes))
    assert open_gallery(str(tmp_path / "boxes"), GEOMETRY, captions=True)(0).caption == "button"


def test_maps_that_nobody_reads_stop_nothing(tmp_path):
    """Their classes are the user's, not the kinds of boxes; they may even be broken."""
    write(tmp_path / "set" / "a.png", encoded(pixels("red", 0)))
    write(tmp_path / "set" / "a.mask.png", encoded(_mask([0, 90, 255])))
    write(tmp_path / "set" / "b.png", encoded(pixels("red", 1)))
    write(tmp_path / "set" / "b.mask.png", b"no image")
    strict = Quarantine(QuarantineConfig(max_share=0.0, min_seen=1))
    gallery = open_gallery(str(tmp_path / "set"), GEOMETRY, quarantine=strict, kinds=("button",), maps=False)
    assert [gallery(n).classes for n in range(4)] == [None] * 4


def test_what_cannot_be_used_is_counted_and_replaced(tmp_path):
    root = folder_of_classes(tmp_path / "set", 5)
    write(root / "red" / "bad.png", encoded(pixels("red", 9))[:60])
    write(root / "red" / "bomb.png", bomb())
    write(root / "red" / "thin.png", encoded(np.zeros((1, 999, 3), np.uint8)))
    quarantine = Quarantine(QuarantineConfig(str(tmp_path / "log"), max_share=1.0))
    gallery = open_gallery(str(root), GEOMETRY, name="mine", quarantine=quarantine)
    keys = [gallery(n).key for n in range(18)]
    assert not {"red/bad.png", "red/bomb.png", "red/thin.png"} & set(keys)
    assert losses_of(gallery).samples >= 3
    logged = [json.loads(line) for line in (tmp_path / "log" / "quarantine-0.jsonl").read_text().splitlines()]
    assert {line["key"] for line in logged} == {"red/bad.png", "red/bomb.png", "red/thin.png"}
    assert any("exceed the limit" in line["problem"] for line in logged)
    strict = open_gallery(str(root), GEOMETRY, quarantine=Quarantine(QuarantineConfig(max_share=0.0, min_seen=1)))
    with pytest.raises(QuarantineError):
        [strict(n) for n in range(18)]


def test_captions_are_drawn_and_maps_come_along(tmp_path):
    root = tmp_path / "set"
    write(root / "a.png", encoded(pixels("red", 0)))
    write(root / "a.txt", "one\ntwo")
    write(root / "a.mask.png", encoded(_mask([0, 2, 255])))
    gallery = open_gallery(str(root), GEOMETRY, kinds=("button", "link"))
    assert isinstance(gallery, ImageSetGallery)
    assert {gallery(n).caption for n in range(20)} == {"one", "two"}
    assert gallery(4).caption == gallery(4).caption
    assert np.unique(gallery(0).classes).tolist() == [-1, 0, 2]
    assert open_gallery(str(root), GEOMETRY)(0).classes is None
    few = open_gallery(str(root), GEOMETRY, kinds=("button",), quarantine=Quarantine(QuarantineConfig(max_share=1.0)))
    with pytest.raises(RecordError, match="100 samples in a row"):
        few(0)


def test_the_librarys_own_shards_keep_their_gallery(tmp_path):
    with ShardWriter(tmp_path / "ours") as writer:
        for n in range(3):
            parts = (ImagePart(), Text(f"number {n}"))
            writer.write(Record(f"r{n}", "s", parts=parts, images=(encode_image(pixels("red", n)),)))
    assert isinstance(open_gallery(str(tmp_path / "ours"), GEOMETRY), ShardGallery)
    images = open_images(str(tmp_path / "ours"))
    assert {images[n].captions for n in range(3)} == {("number 0",), ("number 1",), ("number 2",)}
    theirs = open_gallery(str(_shards(tmp_path / "theirs")), GEOMETRY)
    assert isinstance(theirs, ImageSetGallery)
    assert {theirs(n).caption for n in range(9)} == {f"all {name}" for name in NAMES}
    torn = tmp_path / "torn.tar"
    torn.write_bytes((tmp_path / "theirs" / "001.tar").read_bytes()[:-9000])
    assert losses_of(open_gallery(str(torn), GEOMETRY)).torn_shards == 1


def test_a_hub_set_trains_too(datasets, tmp_path):
    _table(datasets).save_to_disk(tmp_path / "t")
    gallery = open_gallery(f"datasets:{tmp_path}/t", GEOMETRY, columns=ColumnsConfig(caption="none"))
    assert {gallery(n).caption for n in range(6)} == set(NAMES)
