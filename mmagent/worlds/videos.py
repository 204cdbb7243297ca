"""Short videos of moving shapes: when and in which order things happen, how they move, where they are frame by frame.

A clip is sampled at one frame a second, at two where order in time is asked for and at five for motion, as
Seed1.5-VL (arXiv:2505.07062) does; its frames are images, each with the time that it shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmagent.chat import Text, Video
from mmagent.records import Region
from mmagent.trajectories import Score
from mmagent.worlds import grading
from mmagent.worlds.canvas import SHAPES, Canvas, Paint, draw_shape, grounds, palette, shape_box
from mmagent.worlds.drawing import COLOURS
from mmagent.worlds.examples import Example, Idea, Seeded
from mmagent.worlds.passages import pick
from mmagent.worlds.things import box_text, frame_box

SIDE = 140
_LANES = 5
_WAYS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}


@dataclass(frozen=True)
class Track:
    """A shape through a clip: its place ``(x, y, radius)`` in every frame, None where it is not there; ``colours`` by
    frame, where they change."""

    shape: str
    colour: str
    places: tuple[tuple[int, int, int] | None, ...]
    colours: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def box(self, frame: int) -> tuple[float, float, float, float]:
        """In pixels of a frame that shows it."""
        place = self.places[frame]
        assert place is not None
        return shape_box(self.shape, *place)


@dataclass(frozen=True)
class Clip:
    """``tracks``, later ones over earlier ones, at ``rate`` frames a second; ``line``: the x of a dashed line."""

    tracks: tuple[Track, ...]
    rate: int
    line: int = 0

    @property
    def times(self) -> tuple[float, ...]:
        return tuple(n / self.rate for n in range(len(self.tracks[0].places)))


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("videos/order", "video-qa", 3, _order, grading.items),
        Seeded("videos/when", "video-temporal-grounding", 3, _when, grading.interval),
        Seeded("videos/direction", "video-qa", 3, _direction, grading.word),
        Seeded("videos/count", "video-qa", 3, _count, grading.number),
        Seeded("videos/change", "video-qa", 3, _change, grading.word),
        Seeded("videos/race", "video-qa", 3, _race, grading.word),
        Seeded("videos/track", "video-tracking", 3, _track, _judge_track),
    )


def paint_clip(clip: Clip, random: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Its frames, ``(140, 140, 3)`` uint8 each."""
    ground, ink = grounds(random, dark=0.15)
    return tuple(_frame(clip, n, ground, ink) for n in range(len(clip.times)))


def _frame(clip: Clip, n: int, ground: Paint, ink: Paint) -> np.ndarray:
    canvas = Canvas(SIDE, SIDE, ground)
    if clip.line:
        canvas.dashes([(clip.line, 0), (clip.line, SIDE)], 1.6, ink)
    for track in clip.tracks:
        if (place := track.places[n]) is not None:
            colour = track.colours[n] if track.colours else track.colour
            draw_shape(canvas, track.shape, *place, COLOURS[colour], ink)
    return canvas.pixels()


def _asked(clip: Clip, question: str, answer: str, reasoning: str = "", meant: Sequence[Track] = ()) -> Idea:
    boxes = tuple(
        Region(n, track.box(n), track.name)
        for track in meant
        for n, place in enumerate(track.places)
        if place is not None and _whole(track.box(n))
    )
    paint: Callable[[np.random.Generator], Sequence[np.ndarray]] = lambda random: paint_clip(clip, random)  # noqa: E731
    return Idea((Video(clip.times), Text(question)), answer, clip, paint, boxes=boxes, reasoning=reasoning)


def _whole(box: Sequence[float]) -> bool:
    return min(box) >= 0 and max(box) <= SIDE


def _kinds(random: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Different shapes in different colours."""
    shapes = [SHAPES[int(n)] for n in random.permutation(len(SHAPES))[:count]]
    return list(zip(shapes, palette(random, count), strict=True))


def _still(random: np.random.Generator, lane: int) -> tuple[int, int, int]:
    """A place in one of five lanes, beside which no other lane's reaches."""
    tall = SIDE // _LANES
    return int(random.integers(16, SIDE - 16)), lane * tall + tall // 2, 11


def _order(random: np.random.Generator, level: int) -> Idea | None:
    """Shapes that come, each in a frame of its own, at two frames a second; from level 1 on they also go."""
    count, frames = (3, 4, 5)[level], (6, 8, 12)[level]
    lanes, starts = random.permutation(_LANES)[:count], np.sort(random.permutation(frames - 1)[:count] + 1)
    leaves = level > 0 and random.random() < 0.5
    kinds = _kinds(random, count)
    tracks = []
    for (shape, colour), lane, start in zip(kinds, lanes, starts, strict=True):
        place, start = _still(random, int(lane)), int(start)
        there = [(n < start) if leaves else (n >= start) for n in range(frames)]
        tracks.append(Track(shape, colour, tuple(place if shown else None for shown in there)))
    verb = "vanish" if leaves else "appear"
    question = f"In which order do the shapes {verb}? Answer with colour and shape of each, with commas between."
    clip = Clip(tuple(tracks[int(n)] for n in random.permutation(count)), 2)
    told = "; ".join(f"at {start / 2:.1f} seconds {track.name}" for track, start in zip(tracks, starts, strict=True))
    return _asked(clip, question, ", ".join(t.name for t in tracks), f"They {verb} {told}.")


def _when(random: np.random.Generator, level: int) -> Idea | None:
    """The first and the last frame that show something; level 2 moves it about."""
    count, frames, rate = (1, 3, 4)[level], (8, 10, 14)[level], (1, 1, 2)[level]
    kinds, lanes, tracks = _kinds(random, count), random.permutation(_LANES), []
    for n, (shape, colour) in enumerate(kinds):
        first = int(random.integers(0, frames - 3))
        last = int(random.integers(first + 2, frames))
        if n == 0 and (first, last) == (0, frames - 1):
            return None
        x, y, radius = _still(random, int(lanes[n]))
        pace = int(random.integers(-5, 6)) if level == 2 else 0
        places = [
            (min(max(x + pace * (k - first), 14), SIDE - 14), y, radius) if first <= k <= last else None
            for k in range(frames)
        ]
        tracks.append(Track(shape, colour, tuple(places)))
    asked = tracks[0]
    shown = [n for n, place in enumerate(asked.places) if place is not None]
    clip = Clip(tuple(tracks[int(n)] for n in random.permutation(count)), rate)
    question = (
        f"From when to when is the {asked.name} to be seen? Answer with the times of the first and the last frame that "
        "show it, in seconds, like 1.0-2.0."
    )
    answer = f"{clip.times[shown[0]]:.1f}-{clip.times[shown[-1]]:.1f}"
    return _asked(clip, question, answer, meant=[asked])


def _moving(
    random: np.random.Generator, frames: int, way: tuple[int, int], lane: int, pace: int, shape: str, colour: str
) -> Track:
    """Along a lane at ``pace`` pixels a frame, there from the first frame to the last."""
    radius, far = 11, pace * (frames - 1)
    low = int(random.integers(14, SIDE - 13 - far))
    along = [low + pace * n for n in range(frames)]
    along = along[::-1] if min(way) < 0 else along
    tall = SIDE // _LANES
    across = lane * tall + tall // 2
    return Track(shape, colour, tuple((a, across, radius) if way[0] else (across, a, radius) for a in along))


def _direction(random: np.random.Generator, level: int) -> Idea | None:
    """Which way one of some shapes moves; all keep to lanes along one axis, so none hides another."""
    count, frames = (1, 3, 4)[level], (5, 6, 8)[level]
    axis = [("right", "left"), ("down", "up")][int(random.integers(2))]
    lanes, tracks, ways = random.permutation(_LANES), [], []
    for n, (shape, colour) in enumerate(_kinds(random, count)):
        name = axis[int(random.integers(2))]
        pace = int(random.integers(4, 90 // frames))
        tracks.append(_moving(random, frames, _WAYS[name], int(lanes[n]), pace, shape, colour))
        ways.append(name)
    clip = Clip(tuple(tracks), 2)
    question = f"In which direction does the {tracks[0].name} move: right, left, up or down?"
    if level == 2 and ways.count(ways[0]) == 1:
        question = "Which shape moves against all the others? Answer with colour and shape."
        return _asked(clip, question, tracks[0].name, meant=tracks)
    return _asked(clip, f"{question} Answer with one word.", ways[0], meant=tracks[:1])


def _count(random: np.random.Generator, level: int) -> Idea | None:
    """How often a shape crosses a line, at five frames a second; it is on plainly one side or the other in each."""
    crossings = int(random.integers(*((0, 3), (1, 5), (3, 7))[level]))
    frames = (8, 12, 16)[level]  # whatever the crossings, which a length of their own would give away
    line, side = SIDE // 2, int(random.choice((-1, 1)))
    turns = sorted(int(n) for n in random.permutation(frames - 1)[:crossings] + 1)
    (shape, colour), *others = _kinds(random, 1 + level)
    places, y = [], int(random.integers(30, SIDE - 30))
    for n in range(frames):
        side = -side if n in turns else side
        y = min(max(y + int(random.integers(-8, 9)), 20), SIDE - 20)
        places.append((line + side * int(random.integers(20, 52)), y, 12))
    tracks = [Track(shape, colour, tuple(places))]
    for other, tint in others:  # those that stay on one side
        x, h = line + int(random.choice((-50, 50))), int(random.integers(16, SIDE - 16))
        tracks.insert(0, Track(other, tint, tuple((x, h, 9) for _ in range(frames))))
    clip = Clip(tuple(tracks), 5, line)
    question = f"How many times does the {colour} {shape} cross the dashed line? Answer with a number."
    told = ", ".join("left" if place[0] < line else "right" for place in places)
    return _asked(clip, question, str(crossings), f"Frame by frame it is {told}.", meant=tracks[-1:])


_CHANGES = ("grows", "shrinks", "changes its colour", "moves", "vanishes")


def _change(random: np.random.Generator, level: int) -> Idea | None:
    """What happens to one shape; from level 1 on, other things happen to others."""
    count, frames = (1, 2, 4)[level], (5, 6, 8)[level]
    kinds, lanes = _kinds(random, count), random.permutation(_LANES)
    happens = pick(random, _CHANGES, count)
    tracks = []
    for n, (shape, colour) in enumerate(kinds):
        x, y, _ = _still(random, int(lanes[n]))
        at = int(random.integers(2, frames - 1))
        places: list[tuple[int, int, int] | None] = [(x, y, 9)] * frames
        colours: tuple[str, ...] = ()
        if happens[n] == "grows":
            places = [(x, y, 6 + 8 * k // (frames - 1)) for k in range(frames)]
        elif happens[n] == "shrinks":
            places = [(x, y, 14 - 8 * k // (frames - 1)) for k in range(frames)]
        elif happens[n] == "moves":
            pace = 70 // frames * (1 if x < SIDE / 2 else -1)
            places = [(x + pace * k, y, 9) for k in range(frames)]
        elif happens[n] == "vanishes":
            places = [(x, y, 9) if k < at else None for k in range(frames)]
        else:
            new = next(name for name in palette(random, 6) if name not in [c for _, c in kinds])
            colours = tuple(colour if k < at else new for k in range(frames))
        tracks.append(Track(shape, colour, tuple(places), colours))
    shape, colour = kinds[0]
    question = f"What happens to the {shape}? Answer with one of: it {', it '.join(_CHANGES)}."
    return _asked(Clip(tuple(tracks), 2), question, f"it {happens[0]}")


def _race(random: np.random.Generator, level: int) -> Idea | None:
    """Shapes that move to the right at paces of their own: which is the fastest, or which is ahead at the end."""
    count, frames = (2, 3, 5)[level], (5, 6, 8)[level]
    lanes, kinds = random.permutation(_LANES), _kinds(random, count)
    most = 100 // frames - 1
    best = int(random.integers(most - 2, most + 1))
    rest = np.arange(1, int(min(best / 1.5, best - 3)) + 1)  # plainly slower
    paces = [int(n) for n in random.permutation([best, *random.permutation(rest)[: count - 1]])]
    tracks = [
        _moving(random, frames, (1, 0), int(lanes[n]), paces[n], shape, colour)
        for n, (shape, colour) in enumerate(kinds)
    ]
    ends = [track.places[-1][0] for track in tracks if track.places[-1] is not None]
    ranked = sorted(zip(paces, tracks, strict=True), key=lambda pair: -pair[0])
    front = sorted(ends)
    clip = Clip(tuple(tracks), 5)
    told = ", ".join(f"{track.name} {pace} pixels" for pace, track in ranked)
    if random.random() < 0.5 and front[-1] - front[-2] >= 10:
        first = tracks[ends.index(front[-1])].name
        return _asked(clip, "Which shape is farthest to the right at the end? Answer with colour and shape.", first)
    question = "Which shape is the fastest? Answer with colour and shape."
    return _asked(clip, question, ranked[0][1].name, f"From frame to frame: {told}.", meant=tracks)


def _track(random: np.random.Generator, level: int) -> Idea | None:
    """Where one shape is at three times, as it moves along a bow; the others do not cover it."""
    count, frames, rate = (1, 2, 3)[level], (6, 8, 12)[level], (1, 2, 5)[level]
    tracks: list[Track] = []
    for shape, colour in _kinds(random, count):
        tries = (Track(shape, colour, _bow(random, frames)) for _ in range(40))
        free = next((track for track in tries if not any(_touch(track, other) for other in tracks)), None)
        if free is None:
            return None
        tracks.append(free)
    asked, clip = tracks[0], Clip(tuple(tracks), rate)
    chosen = sorted(int(n) for n in random.permutation(frames)[:3])
    times = ", ".join(f"{clip.times[n]:.1f}" for n in chosen)
    question = (
        f"Where is the {asked.name} at {times} seconds? Answer with its box at each time on a line of its own, as "
        "x1,y1,x2,y2 in thousandths of the frame's width and height (0 to 999)."
    )
    answer = "\n".join(box_text(frame_box(asked.box(n), (SIDE, SIDE))) for n in chosen)
    return _asked(clip, question, answer, meant=[asked])


def _bow(random: np.random.Generator, frames: int) -> tuple[tuple[int, int, int], ...]:
    """Places along a bow, turned back before the border."""
    turn, bow = float(random.uniform(0, 2 * math.pi)), float(random.uniform(-0.25, 0.25))
    x, y, pace = *(float(v) for v in random.uniform(25, SIDE - 25, 2)), float(random.uniform(5, 12))
    places = []
    for _ in range(frames):
        places.append((round(x), round(y), 13))
        turn += bow
        if not 22 < x + pace * math.cos(turn) < SIDE - 22 or not 22 < y + pace * math.sin(turn) < SIDE - 22:
            turn += math.pi / 2
        x = min(max(x + pace * math.cos(turn), 16), SIDE - 16)
        y = min(max(y + pace * math.sin(turn), 16), SIDE - 16)
    return tuple(places)


def _touch(one: Track, other: Track) -> bool:
    pairs = zip(one.places, other.places, strict=True)
    return any(math.dist(a[:2], b[:2]) < 27 for a, b in pairs if a is not None and b is not None)


def _judge_track(example: Example, answer: str) -> Score:
    """The mean over the times of the boxes' intersection over union, 0 for each below a half."""
    truth = [grading.read_box(line) for line in example.answer.splitlines()]
    said = [grading.read_box(line) for line in answer.strip().splitlines()[: len(truth) + 1]]
    if len(said) != len(truth) or any(box is None for box in said):
        return grading.wrong("malformed")
    each = [grading.overlap(a, b) for a, b in zip(truth, said, strict=True) if a is not None and b is not None]
    value = sum(iou if iou >= 0.5 else 0.0 for iou in each) / len(each)
    return Score(value, {"iou": sum(each) / len(each), "right": float(min(each) >= 0.5)})
