"""Tokens for the eye: one mark each, by whether it is trained on; a picture's slots are one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from mmagent.geometry import visual_tokens
from mmagent.html.pieces import join
from mmagent.vocab import Vocab

SHOWN = 6000
"""Tokens of one document that are shown."""
LEGEND = Markup(
    '<p class="small tokens"><i class="yes">trained on</i> <i>read only</i> <i class="control">control</i> '
    '<i class="picture">[image rows x columns]</i></p>'
)


def token_view(
    ids: Sequence[int], trained: Sequence[bool], grids: Sequence[Sequence[int]], vocab: Vocab, merge_size: int
) -> Markup:
    """Ids with their marks; ``grids`` are those of the pictures whose slots are among them, in patches."""
    marks = join(_marks(list(ids[:SHOWN]), list(trained), list(grids), vocab, merge_size))
    rest = f"… {len(ids) - SHOWN:,} more tokens" if len(ids) > SHOWN else ""
    return Markup('<div class="tokens">{}{}</div>').format(marks, rest)


def _marks(
    ids: list[int], trained: list[bool], grids: list[Sequence[int]], vocab: Vocab, merge_size: int
) -> Iterator[Markup]:
    at = picture = 0
    while at < len(ids):
        if ids[at] == vocab.image_id:
            frames, rows, cols = grids[picture]
            count = visual_tokens((frames, rows, cols), merge_size)
            shape = f"{rows // merge_size} x {cols // merge_size}"
            yield Markup('<i class="picture" title="{} tokens">[image {}]</i>').format(count, shape)
            at, picture = at + count, picture + 1
            continue
        end = _whole(ids, at, vocab)
        control = vocab.is_control(ids[at])
        kind = " ".join(name for name, yes in (("control", control), ("yes", trained[at])) if yes)
        text = vocab.decode(ids[at:end])
        title = " ".join(map(str, ids[at:end]))
        yield Markup('<i class="{}" title="{}">{}</i>').format(kind, title, text.replace("\n", "⏎\n"))
        at = end


def _whole(ids: Sequence[int], start: int, vocab: Vocab) -> int:
    """Where the shortest run of tokens ends that is whole characters: a character may take several tokens."""
    for end in range(start + 1, min(start + 5, len(ids) + 1)):
        if vocab.is_control(ids[end - 1]) or "\ufffd" not in vocab.decode(ids[start:end]):
            return end if end == start + 1 or not vocab.is_control(ids[end - 1]) else end - 1
    return start + 1
