"""Hugging Face's XCLIPModel (Microsoft, video recognition) as a second teacher: coarse logits only.

Shapes: B batch, T captions, V videos, F frames, W words, P patches, D embed width. Not the X-CLIP of ACM MM 2022.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import XCLIPConfig, XCLIPModel, XCLIPVisionConfig

from convclip.schema import UserError
from convclip.video.xclip_teacher import TWO_MODELS, normalize_frames, read_state

# Statistics of the released processors (ImageNet's), used where a folder has no preprocessor_config.json.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ACM_KEYS = ("clip.", "transformerClip.", "frame_position_embeddings.", "global_mat_weight", "local_mat_weight")


class HfXClipTeacher(nn.Module):
    """XCLIPModel split into video features, text features and the score of all pairs.

    Its text embedding depends on the video, so a pair's score needs the video's patch features too. It has no
    frame features that a caption could be compared with: there is no fine target.
    """

    def __init__(
        self, model: XCLIPModel, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
    ) -> None:
        super().__init__()
        self.model = model
        self.mean, self.std = mean, std
        vision = model.config.vision_config
        assert isinstance(vision, XCLIPVisionConfig)  # XCLIPConfig makes it one
        self.frames, self.image_size = vision.num_frames, vision.image_size

    def encode_video(self, frames: Tensor) -> dict[str, Tensor]:
        """Frames [B, F, 3, S, S] (uint8, or float already normalised) -> video_embed [B, D], patches [B, P, D].

        UserError when F is not the model's `vision_config.num_frames`: its attention between frames has that size.
        """
        given = frames.shape[1]
        if given != self.frames:
            raise UserError(
                f"this XCLIPModel has vision_config.num_frames {self.frames}, got {given} frames: "
                f"use a frame store of {self.frames} frames, or a checkpoint for {given}"
            )
        model = self.model
        images = normalize_frames(frames, self.mean, self.std).flatten(0, 1)
        seen = model.vision_model(pixel_values=images)
        video_embed = model.mit(model.visual_projection(seen.pooler_output).unflatten(0, (-1, given))).pooler_output
        patches = model.prompts_visual_layernorm(seen.last_hidden_state[:, 1:]) @ model.prompts_visual_projection
        return {"video_embed": video_embed, "patches": patches.unflatten(0, (-1, given)).mean(1)}

    def encode_text(self, tokens: Tensor) -> dict[str, Tensor]:
        """Tokens [B, W] int64 padded with 0 -> text_embed [B, D], before the video-specific prompt."""
        # Attention is causal and the end-of-text place is read, so padding behind it needs no mask.
        return {"text_embed": self.model.text_projection(self.model.text_model(input_ids=tokens).pooler_output)}

    def score(self, text_embed: Tensor, video_embed: Tensor, patches: Tensor, block_pairs: int = 16384) -> Tensor:
        """Logits [T, V] in fp32 of every caption against every video, about `block_pairs` pairs at a time."""
        step = max(1, block_pairs // max(1, len(text_embed)))
        columns = []
        for video, patch in zip(video_embed.split(step), patches.split(step), strict=True):
            texts = text_embed.expand(len(video), -1, -1)
            texts = F.normalize((texts + self.model.prompts_generator(texts, patch)).float(), dim=-1)
            columns.append(torch.einsum("vtd,vd->tv", texts, F.normalize(video.float(), dim=-1)))
        return self.model.logit_scale.float().exp() * torch.cat(columns, dim=1)

    def forward(self, frames: Tensor, tokens: Tensor) -> Tensor:
        """Logits [T, V] of T captions against V videos."""
        text, video = self.encode_text(tokens), self.encode_video(frames)
        return self.score(text["text_embed"], video["video_embed"], video["patches"])


def load_hf_xclip(name_or_folder: str | Path) -> HfXClipTeacher:
    """The frozen teacher of a Hugging Face folder or hub name.

    UserError: it cannot be read, is not an XCLIPModel (the X-CLIP of ACM MM 2022 is told apart), or weights are
    missing or left over.
    """
    source = Path(name_or_folder)
    if source.is_file():
        _refuse_acm(read_state(source), source)
        raise UserError(f"{source} is a file: give the folder with config.json and the weights of an XCLIPModel")
    try:
        config = XCLIPConfig.get_config_dict(str(name_or_folder))[0]
    except (OSError, ValueError) as error:
        raise UserError(f"no XCLIPModel at {name_or_folder}: {_one_line(error)}") from None
    if not config:
        raise UserError(f"no XCLIPModel at {name_or_folder}: there is no config.json")
    if config.get("model_type") != "xclip":
        raise UserError(f"{name_or_folder} holds a {config.get('model_type')!r} model, not an XCLIPModel: {TWO_MODELS}")
    try:
        # With its report it is a pair, which its declaration does not say.
        loaded: Any = XCLIPModel.from_pretrained(str(name_or_folder), output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the XCLIPModel at {name_or_folder} cannot be read: {_one_line(error)}") from None
    model, info = loaded
    _refuse_acm(info["unexpected_keys"], name_or_folder)
    wrong = [f"missing {key}" for key in info["missing_keys"]] + [f"left over {key}" for key in info["unexpected_keys"]]
    if wrong:
        raise UserError(f"{name_or_folder} is not a whole XCLIPModel: {'; '.join(sorted(wrong)[:8])}")
    teacher = HfXClipTeacher(model, *_statistics(source))
    return teacher.eval().requires_grad_(False)


def _refuse_acm(keys: Iterable[str], source: str | Path) -> None:
    if any(key.startswith(ACM_KEYS) for key in keys):
        raise UserError(f"{source} is a checkpoint of the X-CLIP of ACM MM 2022, not of XCLIPModel: {TWO_MODELS}")


def _statistics(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return IMAGENET_MEAN, IMAGENET_STD
    settings = json.loads(file.read_text(encoding="utf-8-sig"))
    return tuple(settings.get("image_mean", IMAGENET_MEAN)), tuple(settings.get("image_std", IMAGENET_STD))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
