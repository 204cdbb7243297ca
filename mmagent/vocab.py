"""Token ids: plain text, and the control tokens that only the chat renderer may write.

A :class:`Vocab` reads any byte-level ``tokenizer.json`` of the GLM family, or trains a small one. Text is
always encoded by a tokenizer from which every control token has been removed, so no string a user or a
tool supplies can become control.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
    "<|begin_of_box|>",
    "<|end_of_box|>",
    "/nothink",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
)
"""Control tokens of the GLM-4.5 family that the renderer or the losses rely on."""

STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")
PAD_TOKEN = "[MASK]"
"""What fills the tail of a pack. No stop token, as the family's padding is: what is padding cannot be sampled."""
_SHORT, _KNOWN = 16, 1 << 16  # characters of texts whose ids are remembered, and how many are
NEVER_SAMPLED = (
    *("<|image|>", "<|begin_of_image|>", "<|end_of_image|>", "<|video|>", "<|begin_of_video|>", "<|end_of_video|>"),
    *(PAD_TOKEN, "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>"),
)
"""What the policy can never produce: places for images would crash the trainer, prefixes make no sense mid-turn."""


def _bytes_of_letters() -> dict[str, int]:
    """Byte-level vocabularies spell every byte as a letter: itself where it shows, one above 255 where not (GPT-2)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTES = _bytes_of_letters()


class Vocab:
    """Text and control tokens as ids.

    ``size`` is one more than the largest id; a model may round its table up.
    """

    def __init__(self, definition: str):
        """``definition`` is the text of a ``tokenizer.json``, kept as it is.

        Raises ``ValueError`` naming control tokens that are missing, or that plain text could reach.
        """
        parsed = json.loads(definition)
        self.definition = definition
        self._special = {token["content"]: int(token["id"]) for token in parsed.get("added_tokens", [])}
        missing = [token for token in SPECIAL_TOKENS if token not in self._special]
        if missing:
            raise ValueError(f"tokenizer lacks the control tokens {missing}")
        self._names = {index: name for name, index in self._special.items()}
        self._known: dict[str, list[int]] = {}
        self._spelled: dict[int, bytes] = {}
        self._plain = Tokenizer.from_str(json.dumps({**parsed, "added_tokens": [], "post_processor": None}))
        if reachable := sorted(set(self._names) & set(self._plain.get_vocab().values())):
            names = [self._names[index] for index in reachable]
            raise ValueError(
                f"tokenizer: {names} are words of the model's own vocabulary, so text could become control"
            )
        self.size = max(max(self._special.values()), max(self._plain.get_vocab().values())) + 1
        self.image_id = self._special["<|image|>"]
        self.end_id = self._special["<|endoftext|>"]
        self.pad_id = self._special[PAD_TOKEN]
        self.stop_ids = tuple(self._special[token] for token in STOP_TOKENS)
        self.never_sampled = tuple(self._special[token] for token in NEVER_SAMPLED)

    @classmethod
    def load(cls, path: Path | str) -> Vocab:
        """Read ``tokenizer.json`` itself or the folder that holds it."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"no tokenizer at {path}; data_pipelines.build makes a tokenizer.json: name its path")
        try:
            return cls(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no tokenizer.json: {error}") from error

    def save(self, path: Path | str) -> None:
        path = Path(path)
        (path / "tokenizer.json" if path.is_dir() else path).write_text(self.definition, encoding="utf-8")

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> Vocab:
        """Train a byte-level BPE of at most ``size`` ids; digits stay single, so that coordinates are spelled alike."""
        floor = 256 + len(SPECIAL_TOKENS)
        if size < floor:
            raise ValueError(f"size {size} is below the {floor} ids that bytes and control tokens need")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size - len(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        parsed = json.loads(tokenizer.to_str())
        first = tokenizer.get_vocab_size()
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        parsed["added_tokens"] = [
            {"id": first + n, "content": token, **flags} for n, token in enumerate(SPECIAL_TOKENS)
        ]
        return cls(json.dumps(parsed, ensure_ascii=False, indent=1))

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """All of them, those that nothing here uses included."""
        return tuple(self._special)

    def id(self, token: str) -> int:
        """The id of a control token."""
        if token not in self._special:
            raise ValueError(f"{token!r} is not a control token")
        return self._special[token]

    def barred(self, rows: int) -> tuple[int, ...]:
        """Ids that a policy can never sample: :data:`NEVER_SAMPLED` and the rows of a table of ``rows`` that name
        nothing. The generator and the policy loss both take them from here, so that their log-probs agree."""
        if rows < self.size:
            raise ValueError(f"a table of {rows} rows cannot hold a vocabulary of {self.size} ids")
        known = {*self._special.values(), *self._plain.get_vocab().values()}
        return tuple(n for n in range(rows) if n in self.never_sampled or n not in known)

    def is_control(self, index: int) -> bool:
        """Whether ``index`` is a control token."""
        return index in self._names

    def encode(self, text: str) -> list[int]:
        """Plain text to ids; never a control id, whatever the text says. Raises ``ValueError`` for half a surrogate
        pair, which is no text."""
        if len(text) > _SHORT:
            return self._encode(text)
        ids = self._known.get(text)  # line breaks, roles and names come over and over, and a call costs more than they
        if ids is None:
            ids = self._encode(text)
            if len(self._known) < _KNOWN:
                self._known[text] = ids
        return list(ids)

    def _encode(self, text: str) -> list[int]:
        try:
            return self._plain.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise ValueError(f"no text that can be encoded: {text!r:.80}") from error

    def caption_ids(self, caption: str, most: int) -> list[int]:
        """A caption as text towers read it: at most ``most`` ids, the last of them the end, however much is cut before
        it; an empty caption is the end alone."""
        return [*self.encode(caption)[: most - 1], self.end_id]

    def bytes_of(self, index: int) -> bytes:
        """What ``index`` adds to the bytes of a text, often part of a character only; nothing if it is a control token
        or names nothing. The bytes of ids between control tokens, joined and read as UTF-8 with what is none replaced,
        are what :meth:`decode` gives for them."""
        spelled = self._spelled.get(index)
        if spelled is None:
            token = "" if index in self._names else self._plain.id_to_token(index) or ""
            letters = [_BYTES.get(letter) for letter in token]
            # a word that is not spelled in such letters stands for itself, as it does for the decoder
            spelled = token.encode() if None in letters else bytes(letters)  # type: ignore[arg-type]
            self._spelled[index] = spelled
        return spelled

    def decode(self, ids: Sequence[int], *, control: bool = True) -> str:
        """Ids to text; control tokens by name, or left out when ``control`` is false."""
        out: list[str] = []
        run: list[int] = []
        for index in ids:
            if index in self._names:
                out.append(self._plain.decode(run))
                run = []
                if control:
                    out.append(self._names[index])
            else:
                run.append(index)
        return "".join(out) + self._plain.decode(run)
