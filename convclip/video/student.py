"""The TeachCLIP student (CVPR 2024): a dual tower, a temporal transformer over frames, attentional frame aggregation.

Shapes: B batch, F frames, C channels, H.W image, T tokens, D embed width. Parameter names begin with their part's
name: `visual`, `text`, `logit_scale` as in the dual tower, `temporal`, `aggregation`.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convclip import schema
from convclip.models.dual_tower import DualTower, Outputs
from convclip.video.temporal import frame_mask, masked_mean, over_time, temporal_blocks

POSITIONS = 77
# Sharpens the frame weights that pool a video; the weights that are taught have temperature 1.
POOL_TEMPERATURE = 0.1


class VideoStudent(DualTower):
    """A dual tower for videos; it takes over the towers of `towers`, whose weights should be loaded by then.

    temporal_init `text`: blocks and positions of the temporal transformer are copied from the text tower's first
    ones, as in CLIP4Clip. What does not fit starts as an identity: a video's frames pass unchanged. With `identity` all
    of it does. Copied blocks add vectors of their own size to the un-normalised frame features: with random blocks
    of width 512, features of length 10 kept their recall and features of length 1 lost it (R@1 100 to 2).
    `new` lists the parameters that were newly initialised. mask_padding False: padded frames take part in both
    softmaxes, as in the original. A locked tower is locked whole, its head included: the head is as pretrained as the
    rest, and what is stored of a locked tower are its embeddings.
    """

    locks_heads = True

    def __init__(
        self,
        towers: DualTower,
        temporal_layers: int = 4,
        temporal_init: Literal["text", "identity"] = "text",
        mask_padding: bool = True,
    ) -> None:
        nn.Module.__init__(self)
        self.visual, self.text, self.logit_scale = towers.visual, towers.text, towers.logit_scale
        self.reference = self.logit_bias = None
        width = towers.text.embed_dim
        self.mask_padding = mask_padding
        self.temporal = TemporalEncoder(width, temporal_layers)
        self.aggregation = FrameAggregation(width)
        self.new = [f"temporal.{name}" for name in self.temporal.start(self.text if temporal_init == "text" else None)]
        self.new += [f"aggregation.{name}" for name, _ in self.aggregation.named_parameters()]

    def encode_frames(self, frames: Tensor, n_frames: Tensor) -> Tensor:
        """Frames [B, F, 3, H, W] (float, normalised), n_frames [B] -> un-normalised features [B, F, D]."""
        if not self.mask_padding:
            # Where padded frames count, they count as the original's do: zeros after normalising.
            frames = frames * frame_mask(n_frames, frames.shape[1])[:, :, None, None, None]
        return self.encode_image(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def encode_video(self, frame_features: Tensor, n_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, F, D], n_frames [B] (each >= 1) -> video [B, D] of unit length, frame weights [B, F]; fp32.

        The weights are those at temperature 1 (what is taught); padded frames have weight 0 unless not masked.
        """
        mask = frame_mask(n_frames, frame_features.shape[1])
        hidden = self.temporal(frame_features, mask)
        attention = self.aggregation(hidden).float()
        if self.mask_padding:
            attention = attention.masked_fill(~mask, float("-inf"))
        pooling = (attention / POOL_TEMPERATURE).softmax(-1)
        video = torch.einsum("bf,bfd->bd", pooling, F.normalize(hidden.float(), dim=-1))
        return F.normalize(video, dim=-1), attention.softmax(-1)

    def forward(  # type: ignore[override]  # frames are no images: the task's own inputs call it
        self, frames: Tensor | None = None, texts: Tensor | None = None, n_frames: Tensor | None = None
    ) -> Outputs:
        """frames [B, F, 3, H, W] with n_frames [B], or stored frame features [B, F, D]; tokens [B, T] (int64), or
        stored text features [B, D]. Stored features are taken as un-normalised and run no tower.

        `Outputs.image` is the video's embedding. extras: "frame_weights" [B, F] summing to 1, and "frame_features"
        [B, F, D] un-normalised, as they enter the temporal transformer.
        """
        text, video, extras = None, None, {}
        # Text first: it reads its longest caption's length, which on an accelerator waits for the work queued so far.
        if texts is not None:
            text = F.normalize((texts if texts.is_floating_point() else self.encode_text(texts)).float(), dim=-1)
        if frames is not None:
            assert n_frames is not None
            features = frames if frames.ndim == 3 else self.encode_frames(frames, n_frames)
            video, weights = self.encode_video(features, n_frames)
            extras = {"frame_weights": weights, "frame_features": features}
        return Outputs(video, text, self.logit_scale.float().exp(), None, extras)


class TemporalEncoder(nn.Module):
    """Transformer over frames with learned positions: features [B, F, D], mask [B, F] -> transformer(x + pos) + x."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(POSITIONS, width)
        self.blocks = temporal_blocks(width, layers)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, F, D], [B, F] bool -> [B, F, D]; padded frames are attended by none."""
        return over_time(self.blocks, self.positions, x.to(self.positions.weight.dtype), mask)

    @torch.no_grad()
    def start(self, text: nn.Module | None) -> list[str]:
        """Copy positions and blocks from a CLIP text tower where shapes allow; names of what is new instead.

        What is new adds nothing at first: positions and the last layers of each block's two branches are zero. So
        videos start aligned with captions as well as their frames are.
        """
        source = dict(text.named_parameters()) if text is not None else {}
        new = []
        if _same_shape(source.get("positional_embedding"), self.positions.weight):
            self.positions.weight.copy_(source["positional_embedding"])
        else:
            nn.init.zeros_(self.positions.weight)
            new.append("positions.weight")
        for i, block in enumerate(self.blocks.resblocks):
            parts = dict(block.named_parameters())
            found = {name: source.get(f"transformer.resblocks.{i}.{name}") for name in parts}
            if all(_same_shape(found[name], part) for name, part in parts.items()):
                for name, part in parts.items():
                    part.copy_(found[name])
                continue
            for last in (block.attn.out_proj, block.mlp.c_proj):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
            new += [f"blocks.resblocks.{i}.{name}" for name in parts]
        return new


class FrameAggregation(nn.Module):
    """Attention of each frame: Linear(D, D), ReLU, Linear(D, 1); weights N(0, 0.02), biases 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.attention = nn.Linear(width, 1)
        for layer in (self.hidden, self.attention):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, F, D] -> [B, F], before any softmax."""
        return self.attention(self.hidden(x).relu()).squeeze(-1)


def mean_pool(frame_features: Tensor, n_frames: Tensor) -> Tensor:
    """Zero-shot video embedding [B, D] of unit length: mean of the real frames' unit features, without any new layer.

    Its recall before training is the gate: recall through the aggregation should start close to it.
    """
    unit = F.normalize(frame_features.float(), dim=-1)
    return F.normalize(masked_mean(unit, frame_mask(n_frames, unit.shape[1])), dim=-1)


def video_student(towers: DualTower, video: schema.Video) -> VideoStudent:
    """The student that takes over `towers`, as the recipe's video section says."""
    return VideoStudent(towers, video.temporal_layers, video.temporal_init, video.mask_padding)


def _same_shape(source: Tensor | None, target: Tensor) -> bool:
    return source is not None and source.shape == target.shape
