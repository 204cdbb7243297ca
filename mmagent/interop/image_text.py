"""Two towers that put images and texts into one space, to classify and retrieve with: ours as a folder that alignment
leaves behind, or an image-text model of transformers.

``FOLDER/encoder/``            the image tower, an encoder folder of its own
``FOLDER/config.yaml``         :class:`ImageTextConfig`: the text tower, and what both were shown in training
``FOLDER/model.safetensors``   the text tower, both heads, temperature and bias
``FOLDER/tokenizer.json``      the vocabulary
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmagent.config import first_line, load_yaml, to_yaml
from mmagent.files import new_folder, require_own
from mmagent.geometry import GeometryConfig, patchify
from mmagent.interop.encoder_folder import load_encoder, save_encoder
from mmagent.interop.live_model import load_weights
from mmagent.models.layers import Linear, evaluating
from mmagent.models.temperature import Temperature
from mmagent.models.text_tower import TextTower, TextTowerConfig
from mmagent.ops.state import save_weights
from mmagent.ops.torchvision_shim import ensure_torchvision
from mmagent.types import PackedVision, PatchedImage, Segments
from mmagent.vocab import Vocab

ENCODER, CONFIG, WEIGHTS, TOKENIZER = "encoder", "config.yaml", "model.safetensors", "tokenizer.json"
Given, Ready = TypeVar("Given"), TypeVar("Ready")


class ImageTextModel(nn.Module, ABC):
    """Embeds images and texts, wherever its parameters are, in evaluation mode and without gradients.

    ``width`` is E of the common space; two embeddings match with the probability ``sigmoid(logit_scale * cosine +
    logit_bias)``, or among several by a softmax where the model was trained with one (CLIP, whose bias is 0).
    """

    width: int
    logit_scale: float
    logit_bias: float

    def embed_images(self, images: Iterable[np.ndarray], patches_per_batch: int = 16384) -> Tensor:
        """``(height, width, 3)`` uint8 images of any sizes to ``(I, E)`` float32 of unit length, on the host. A batch
        holds at most ``patches_per_batch`` patches, or one larger image; images are taken as they are needed. Raises
        ``ValueError`` naming, by its number, an image that cannot be cut into patches."""
        return self._embed("image", images, self._prepare_image, self._look, patches_per_batch)

    def embed_texts(self, texts: Iterable[str], tokens_per_batch: int = 16384) -> Tensor:
        """Texts, cut to the length of the training, to ``(N, E)`` float32 of unit length, on the host."""
        return self._embed("text", texts, self._prepare_text, self._read, tokens_per_batch)

    @torch.no_grad()
    def _embed(
        self,
        kind: str,
        items: Iterable[Given],
        prepare: Callable[[Given], tuple[Ready, int]],
        run: Callable[[list[Ready]], Tensor],
        budget: int,
    ) -> Tensor:
        if budget < 1:
            raise ValueError(f"a batch of at most {budget} patches or tokens holds nothing")
        rows = [torch.empty(0, self.width)]
        ready = (_named(f"{kind} {n}", prepare, item) for n, item in enumerate(items))
        with evaluating(self):
            for batch in _batches(ready, budget):
                rows.append(F.normalize(run(batch).float(), dim=-1).cpu())
        return torch.cat(rows)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @abstractmethod
    def _prepare_image(self, image: np.ndarray) -> tuple[Any, int]:
        """One image as :meth:`_look` takes it, and how many patches it costs."""

    @abstractmethod
    def _prepare_text(self, text: str) -> tuple[Any, int]:
        """One text as :meth:`_read` takes it, and how many tokens it costs."""

    @abstractmethod
    def _look(self, images: list[Any]) -> Tensor:
        """``(I, E)`` of any length."""

    @abstractmethod
    def _read(self, texts: list[Any]) -> Tensor:
        """``(N, E)`` of any length."""


def _named(name: str, prepare: Callable[[Given], tuple[Ready, int]], item: Given) -> tuple[Ready, int]:
    try:
        return prepare(item)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _batches(items: Iterable[tuple[Ready, int]], budget: int) -> Iterator[list[Ready]]:
    waiting: list[Ready] = []
    size = 0
    for item, cost in items:
        if waiting and size + cost > budget:
            yield waiting
            waiting, size = [], 0
        waiting.append(item)
        size += cost
    if waiting:
        yield waiting


# ---------------------------------------------------------------------------------------------- ours


@dataclass
class ImageTextConfig:
    """What ``config.yaml`` holds: the text tower, ``width`` of the common space, and what training showed at most:
    ``max_text`` ids of a caption, end included, and ``max_patches`` of an image, which is shrunk to that; 0 leaves the
    limit to the encoder's geometry."""

    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    width: int = 768
    max_text: int = 64
    max_patches: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.max_text <= self.text.max_length:
            raise ValueError(f"max_text {self.max_text} must lie in 1..{self.text.max_length}, the text tower's length")
        if self.max_patches < 0:
            raise ValueError(f"max_patches must not be negative, got {self.max_patches}")


class Aligned(Protocol):
    """What :func:`save_image_text` writes: :class:`mmagent.objectives.alignment.Alignment`, or what is built alike."""

    encoder: Any
    text_tower: TextTower
    image_head: nn.Linear
    text_head: nn.Linear

    def state_dict(self) -> dict[str, Any]: ...


class AlignedTowers(ImageTextModel):
    """Our encoder and text tower, packed and never padded."""

    def __init__(self, encoder: nn.Module, geometry: GeometryConfig, vocab: Vocab, config: ImageTextConfig):
        super().__init__()
        if config.text.vocab_size < vocab.size:
            raise ValueError(f"the text tower knows {config.text.vocab_size} ids, the vocabulary has {vocab.size}")
        self.encoder, self.vocab, self.config = encoder, vocab, config
        self.geometry = geometry.within(config.max_patches) if config.max_patches else geometry
        self.text_tower = TextTower(config.text)
        self.image_head = Linear(encoder.width, config.width)  # type: ignore[arg-type]
        self.text_head = Linear(self.text_tower.width, config.width)
        self.temperature = Temperature()
        self.width = config.width

    @property
    def logit_scale(self) -> float:  # type: ignore[override]
        return self.temperature.log_scale.exp().item()

    @property
    def logit_bias(self) -> float:  # type: ignore[override]
        return self.temperature.bias.item()

    def _prepare_image(self, image: np.ndarray) -> tuple[PatchedImage, int]:
        patched = patchify(image, self.geometry)
        return patched, len(patched.patches)

    def _prepare_text(self, text: str) -> tuple[list[int], int]:
        ids = self.vocab.caption_ids(text, self.config.max_text)
        return ids, len(ids)

    def _look(self, images: list[PatchedImage]) -> Tensor:
        return self.image_head(self.encoder(PackedVision.pack(images).to(self.device)).pooled)

    def _read(self, texts: list[list[int]]) -> Tensor:
        ids = torch.tensor([i for text in texts for i in text], device=self.device)
        return self.text_head(self.text_tower(ids, Segments([len(text) for text in texts], self.device)))


def save_image_text(
    folder: Path | str,
    alignment: Aligned,
    geometry: GeometryConfig,
    vocab: Vocab,
    *,
    max_text: int,
    max_patches: int = 0,
    custom: str = "",
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write both towers of ``alignment`` as a folder, replacing an older one, whole or not at all.

    ``max_text`` and ``max_patches`` as in :class:`ImageTextConfig`, ``custom`` as in
    :class:`~mmagent.interop.encoder_folder.EncoderConfig`. ``weights`` is the full state dict of a sharded
    alignment, gathered by all ranks; one rank writes. Raises ``ValueError``, before anything is written, for one
    without a text tower, where ``vocab`` or ``max_text`` do not fit that, or for a folder that holds anything else.
    """
    require_own(Path(folder), "folder of both towers", (ENCODER, CONFIG, WEIGHTS, TOKENIZER))
    if getattr(alignment, "text_tower", None) is None:
        raise ValueError(f"{folder}: there is no text tower to save (contrastive_weight 0); save the encoder alone")
    config = ImageTextConfig(alignment.text_tower.config, alignment.image_head.out_features, max_text, max_patches)
    if config.text.vocab_size < vocab.size:
        raise ValueError(f"{folder}: the tower knows {config.text.vocab_size} ids, the vocabulary has {vocab.size}")
    state = alignment.state_dict() if weights is None else weights
    parts = ("text_tower.", "image_head.", "text_head.", "temperature.")
    encoder = {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")}
    with new_folder(Path(folder)) as beside:
        save_encoder(beside / ENCODER, alignment.encoder, geometry, custom=custom, weights=encoder)
        save_weights({name: t for name, t in state.items() if name.startswith(parts)}, beside / WEIGHTS)
        vocab.save(beside / TOKENIZER)
        (beside / CONFIG).write_text(to_yaml(config), encoding="utf-8")


def load_image_text(source: Path | str) -> ImageTextModel:
    """From a folder of :func:`save_image_text`, or from a folder or hub id of a SigLIP, SigLIP2 or CLIP of
    transformers, whose own processor and tokenizer then prepare what it sees; on the CPU, in float32 and evaluation
    mode.

    Raises ``ValueError`` naming the file that is missing, the tensors that do not fit, or the kind of model.
    """
    folder = Path(source)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return _load_transformers(str(source))
    missing = [name for name in (ENCODER, CONFIG, WEIGHTS, TOKENIZER) if not (folder / name).exists()]
    if missing:
        raise ValueError(
            f"{folder} is no image-text folder: {', '.join(missing)} missing (alignment leaves one behind), nor is it "
            f"one of transformers, which has a config.json"
        )
    encoder, geometry, _ = load_encoder(folder / ENCODER)
    config = load_yaml(ImageTextConfig(), folder / CONFIG)
    model = AlignedTowers(encoder, geometry, Vocab.load(folder / TOKENIZER), config)
    load_weights(_Rest(model), folder / WEIGHTS)
    return model.eval()


class _Rest(nn.Module):
    """What is not the encoder, under the names that it has in the whole."""

    def __init__(self, model: AlignedTowers):
        super().__init__()
        self.text_tower, self.image_head, self.text_head = model.text_tower, model.image_head, model.text_head
        self.temperature = model.temperature


# ---------------------------------------------------------------------------------------------- transformers


class TransformersTowers(ImageTextModel):
    """A SigLIP, SigLIP2 or CLIP model with its image ``processor`` and ``tokenizer``.

    SigLIP was trained on texts padded to their full length, CLIP on texts that end where they end.
    """

    def __init__(self, model: Any, processor: Any, tokenizer: Any):
        super().__init__()
        self.model, self.processor, self.tokenizer = model, processor, tokenizer
        text = model.config.text_config
        self.padding: bool | str = True if model.config.model_type == "clip" else "max_length"
        self.max_text = min(int(text.max_position_embeddings), int(tokenizer.model_max_length))
        self.width = int(getattr(text, "projection_size", None) or model.config.projection_dim)

    @property
    def logit_scale(self) -> float:  # type: ignore[override]
        return self.model.logit_scale.exp().item()

    @property
    def logit_bias(self) -> float:  # type: ignore[override]
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else bias.item()

    def _prepare_image(self, image: np.ndarray) -> tuple[dict[str, Tensor], int]:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"image must be (height, width, 3) uint8, got {image.shape} {image.dtype}")
        ready = dict(self.processor(images=[image], input_data_format="channels_last", return_tensors="pt"))
        pixels, vision = ready["pixel_values"], self.model.config.vision_config
        naflex = "spatial_shapes" in ready
        return ready, pixels.shape[1] if naflex else pixels[0, 0].numel() // vision.patch_size**2

    def _prepare_text(self, text: str) -> tuple[str, int]:
        return text, self.max_text

    def _look(self, images: list[dict[str, Tensor]]) -> Tensor:
        inputs = {name: torch.cat([image[name] for image in images]).to(self.device) for name in images[0]}
        return self.model.get_image_features(**inputs).pooler_output

    def _read(self, texts: list[str]) -> Tensor:
        inputs = self.tokenizer(
            texts, padding=self.padding, truncation=True, max_length=self.max_text, return_tensors="pt"
        )
        known = {name: inputs[name].to(self.device) for name in ("input_ids", "attention_mask") if name in inputs}
        return self.model.get_text_features(**known).pooler_output


def _load_transformers(source: str) -> TransformersTowers:
    ensure_torchvision()
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel, Siglip2Model, SiglipModel

    classes: dict[str, Any] = {"siglip": SiglipModel, "siglip2": Siglip2Model, "clip": CLIPModel}
    try:
        kind = AutoConfig.from_pretrained(source).model_type
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no image-text model {source!r}: it must be a folder that alignment leaves behind, the folder of a model "
            f"of transformers, or a hub id that can be reached from here ({first_line(error)})"
        ) from error
    if kind not in classes:
        raise ValueError(f"{source} is a {kind!r} model; known image-text models are {', '.join(classes)}")
    model, report = classes[kind].from_pretrained(
        source, use_safetensors=True, output_loading_info=True, dtype=torch.float32
    )
    if report["missing_keys"]:
        raise ValueError(f"{source} lacks the weights {', '.join(sorted(report['missing_keys'])[:8])}")
    parts = []
    for what, loader in (("image processor", AutoImageProcessor), ("tokenizer", AutoTokenizer)):
        try:
            parts.append(loader.from_pretrained(source))
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"{source}: its {what} cannot be loaded ({first_line(error)})") from error
    return TransformersTowers(model.eval(), *parts).eval()
