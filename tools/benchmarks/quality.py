"""What the rules of curation find, and what they cost.

    python tools/benchmarks/quality.py filters            samples a second on one core, rule by rule
    python tools/benchmarks/quality.py copies             the search for copies among 1k, 4k and 16k samples
    python tools/benchmarks/quality.py pictures           how far copies of pictures lie apart, and different ones
    python tools/benchmarks/quality.py blur               sharpness and variance of the Laplacian, sharp and blurred
    python tools/benchmarks/quality.py score MODEL SHARDS  cosines of matching and of shuffled pairs

``--shards FOLDER`` takes pictures of your own instead of drawn ones. Times are of the processor, not of the clock.
"""

from __future__ import annotations

import argparse
import io
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # a script starts with its own folder there, not with the repository
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image as PILImage  # noqa: E402
from PIL import ImageFilter  # noqa: E402

from data_pipelines import filters  # noqa: E402
from data_pipelines.near_duplicates import SAMPLE, CopySearch, DuplicateRules, sign_text, signed_rows  # noqa: E402
from data_pipelines.record_texts import answer_of  # noqa: E402
from data_pipelines.shards import ShardSet  # noqa: E402
from mmagent.contamination import Fingerprint, Judged, Signed  # noqa: E402
from mmagent.records import decode_image, encode_image, from_sample  # noqa: E402
from mmagent.worlds import images  # noqa: E402

SIZES = (1000, 4000, 16000)


def texts(count: int, words: int = 200, seed: int = 0) -> list[str]:
    """Texts of words drawn by Zipf's law; one in ten copies an earlier one but for a few words."""
    random = np.random.default_rng(seed)
    out: list[str] = []
    for n in range(count):
        if n % 10 == 9:
            own = out[int(random.integers(0, n))].split()
            own[int(random.integers(0, words))] = "changed"
        else:
            own = [f"word{k}" for k in np.minimum(random.zipf(1.3, words), 50_000)]
        out.append(" ".join(own))
    return out


def pictures(count: int, shards: str = "") -> dict[str, list[np.ndarray]]:
    """By kind: those of a shard set, or drawn scenes, panels and crops of photographs."""
    if shards:
        opened = ShardSet(shards)
        chosen = (from_sample(opened.read(int(n))) for n in np.linspace(0, len(opened) - 1, count))
        return {Path(shards).name: [decode_image(r.images[0].data, r.key) for r in chosen if r.images]}
    return {
        "scenes": [images.draw_scene(n, "train").image for n in range(count)],
        "panels": [images.draw_panel(n, "train").image for n in range(count)],
        "photographs": [images.crop_photo(n, images.PHOTO_KINDS[n % 2], "train").image for n in range(count)],
    }


def copy_of(pixels: np.ndarray, scale: float, kind: str, quality: int) -> np.ndarray:
    """A picture scaled and encoded anew."""
    image = PILImage.fromarray(pixels)
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    buffer = io.BytesIO()
    image.resize(size, PILImage.Resampling.LANCZOS).save(buffer, kind, quality=quality)
    return np.asarray(PILImage.open(buffer).convert("RGB"))


COPIES = (
    ("JPEG 75", 1.0, "JPEG", 75),
    ("JPEG 40", 1.0, "JPEG", 40),
    ("half", 0.5, "PNG", 0),
    ("x 1.5, JPEG 75", 1.5, "JPEG", 75),
    ("x 0.77, WebP 60", 0.77, "WEBP", 60),
)


def measure_pictures(args: argparse.Namespace) -> None:
    """How far apart copies lie and different pictures do: bits, and grey levels of the worst cell."""
    for kind, shown in pictures(args.count, args.shards).items():
        signed = [Signed.of(picture) for picture in shown]
        for name, *how in COPIES:
            other = [Signed.of(copy_of(picture, *how)) for picture in shown]
            _distances(f"{kind}, {name}", list(zip(signed, other, strict=True)), (50, 90, 99, 100))
        pairs = [(signed[a], signed[b]) for a in range(len(signed)) for b in range(a)]
        _distances(f"{kind}, different", pairs, (0, 0.1, 1, 50))


def _distances(name: str, pairs: Sequence[tuple[Signed, Signed]], shares: tuple[float, ...]) -> None:
    bits = [int(np.bitwise_count(a.bits ^ b.bits).sum()) for a, b in pairs]
    local = [int(np.abs(a.thumb.astype(int) - b.thumb).max()) for a, b in pairs]
    told = ", ".join(f"{share:g} %" for share in shares)
    shown = [" ".join(f"{value:5.0f}" for value in np.percentile(values, shares)) for values in (bits, local)]
    print(f"{name:<32} bits {shown[0]}   worst cell {shown[1]}   (at {told})")


def measure_blur(args: argparse.Namespace) -> None:
    """Sharp pictures and the same behind Gaussians, by our measure and by the variance of the Laplacian."""
    from sklearn.metrics import roc_auc_score

    def laplacian(pixels: np.ndarray) -> float:
        grey = np.asarray(PILImage.fromarray(pixels).convert("L"), np.float32)
        inside = grey[1:-1, 1:-1]
        return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inside).var())

    found: dict[str, list[tuple[float, float]]] = {"sharp": [], "blurred": []}
    for kind, shown in pictures(args.count, args.shards).items():
        for name, radius in (("sharp", 0.0), ("Gaussian 1.2", 1.2), ("Gaussian 2", 2.0)):
            seen = [_blurred(picture, radius) for picture in shown]
            ours = [value for picture in seen if (value := filters.sharpness(picture)) is not None]
            theirs = [laplacian(picture) for picture in seen]
            if radius != 1.2:
                both = [(filters.sharpness(p) or 0.0, laplacian(p)) for p in seen]
                found["blurred" if radius else "sharp"] += both
            print(
                f"{kind:<14}{name:<14} sharpness {np.percentile(ours, [1, 50, 99]).round(2)}, below 0.3: "
                f"{np.mean(np.array(ours) < 0.3):4.0%}   Laplacian {np.percentile(theirs, [1, 50, 99]).round(0)}"
            )
    values = np.array(found["sharp"] + found["blurred"])
    truth = [1] * len(found["sharp"]) + [0] * len(found["blurred"])
    for column, name in enumerate(("sharpness", "variance of the Laplacian")):
        print(f"{name}: area under the curve over all kinds {roc_auc_score(truth, values[:, column]):.4f}")


def _blurred(pixels: np.ndarray, radius: float) -> np.ndarray:
    if not radius:
        return pixels
    return np.asarray(PILImage.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def measure_filters(args: argparse.Namespace) -> None:
    """Each rule on texts of 200 words and on pictures of one size."""
    said = texts(args.count)
    rules = filters.TextRules(languages=["en"], blocklists=["en", "zh"], repetition=True, least_characters=1)
    duplicates, row = DuplicateRules(), np.zeros((), SAMPLE)
    judged = Fingerprint(Judged(f"item {n}", text) for n, text in enumerate(texts(2000, 40, seed=1)))
    for name, ask in (
        ("length", lambda text: filters.length_problem(text, rules)),
        ("words of two blocklists", lambda text: filters.blocked_problem(text, rules)),
        ("language", lambda text: filters.language_problem(text, rules)),
        ("repetition", lambda text: filters.repetition_problem(text, rules)),
        ("signature for copies", lambda text: sign_text(row, text, duplicates)),
        ("search in 2,000 judged items", lambda text: judged.find([text], [])),
    ):
        _rate(f"text of 200 words: {name}", ask, said)
    side = (args.height, args.width)
    shown = [np.asarray(PILImage.fromarray(p).resize(side[::-1])) for p in pictures(args.count // 20)["scenes"]]
    encoded = [encode_image(picture) for picture in shown]
    signed = [Signed.of(picture) for picture in shown]
    known = Fingerprint(Judged(f"{n}", "", (signed[n % len(signed)],)) for n in range(2000))
    size = f"picture of {side[1]}x{side[0]}"
    _rate(f"{size}: decoding its PNG", lambda image: decode_image(image.data, ""), encoded)
    _rate(f"{size}: sharpness", filters.sharpness, shown)
    _rate(f"{size}: signature", Signed.of, shown)
    _rate(f"{size}: search in 2,000 judged pictures", lambda one: known.find([], [one]), signed)


def _rate(name: str, ask: Callable, given: Sequence) -> None:
    ask(given[0])  # what is read once is read now
    started = time.process_time()
    for one in given:
        ask(one)
    print(f"{name:<52}{len(given) / (time.process_time() - started):>12,.0f} samples/s a core")


def measure_copies(args: argparse.Namespace) -> None:
    """Texts, and pages of one text and layout each, at three sizes: growth, memory and disk."""
    rules = DuplicateRules()
    shown = [Signed.of(picture) for group in pictures(300).values() for picture in group]
    for kind in ("texts", "pictures"):
        times = []
        for size in SIZES:
            rows = np.zeros(size, SAMPLE)
            signed: list[Signed] = []
            said = texts(size) if kind == "texts" else ["one question"] * size
            started = time.process_time()
            for n in range(size):
                sign_text(rows[n], said[n], rules)
                if kind == "pictures":
                    rows[n]["first"], rows[n]["pictures"] = n, 1
                    signed.append(_varied(shown[n % len(shown)], n // len(shown)))
            signing = time.process_time() - started
            with tempfile.TemporaryDirectory() as folder:
                started = time.process_time()
                found = CopySearch(rows, signed_rows(signed), rules, Path(folder)).run(np.ones(size, bool))
                times.append(time.process_time() - started)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{size:>6} {kind}: signed in {signing:6.2f} s, compared in {times[-1]:6.2f} s "
                f"({1e6 * times[-1] / size:5.0f} us each), {int((found >= 0).sum()):>5} copies, peak {memory:.0f} MiB"
            )
        grown = np.log(times[-1] / times[0]) / np.log(SIZES[-1] / SIZES[0])
        print(f"       {kind}: time grows with the {grown:.2f}th power of their number")


def _varied(signed: Signed, turn: int) -> Signed:
    """Another picture of the same build: its bits turned, and its cells with them."""
    moved = np.roll(np.unpackbits(signed.bits.view(np.uint8), bitorder="little"), 7 * turn)
    return Signed(np.packbits(moved, bitorder="little").view("<u8"), np.roll(signed.thumb, 11 * turn))


def measure_score(args: argparse.Namespace) -> None:
    """What an image-text model gives to pairs that match, and to the same ones shuffled."""
    from sklearn.metrics import roc_auc_score

    from mmagent.interop.image_text import load_image_text

    model = load_image_text(args.model)
    opened = ShardSet(args.pairs)
    records = [from_sample(opened.read(n)) for n in range(min(len(opened), args.count))]
    records = [record for record in records if len(record.images) == 1 and answer_of(record)]
    looked = model.embed_images(decode_image(record.images[0].data, record.key) for record in records).numpy()
    read = model.embed_texts(map(answer_of, records)).numpy()
    matching = (looked * read).sum(1)
    others = np.concatenate([(looked * np.roll(read, turn, 0)).sum(1) for turn in range(1, min(len(read), 20))])
    auc = roc_auc_score([1] * len(matching) + [0] * len(others), np.concatenate([matching, others]))
    print(f"{len(records)} pairs: matching above shuffled with probability {auc:.3f} (area under the curve)")
    shares = (1, 5, 25, 50, 75, 95, 99)
    for name, values in (("matching", matching), ("shuffled", others)):
        print(f"{name}: cosines at {', '.join(map(str, shares))} %: {np.percentile(values, shares).round(3)}")
    for share in (0.8, 0.9, 0.95, 0.99):
        least = float(np.quantile(matching, 1 - share))
        kept = np.mean(others >= least)
        print(f"least_score={least:.3f} keeps {share:.0%} of matching pairs and {kept:.1%} of shuffled ones")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(required=True, metavar="WHAT")
    for name, run, count in (
        ("filters", measure_filters, 2000),
        ("copies", measure_copies, 0),
        ("pictures", measure_pictures, 100),
        ("blur", measure_blur, 60),
        ("score", measure_score, 400),
    ):
        one = what.add_parser(name)
        one.set_defaults(run=run)
        one.add_argument("--count", type=int, default=count, help="samples (default: %(default)s)")
        one.add_argument("--shards", default="", metavar="FOLDER", help="pictures of your own")
        one.add_argument("--width", type=int, default=1024)
        one.add_argument("--height", type=int, default=768)
        if name == "score":
            one.add_argument("model", help="folder of recipes.align_encoder (image_text), or of a CLIP or SigLIP")
            one.add_argument("pairs", help="shards of pictures with their captions")
    args = parser.parse_args(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
