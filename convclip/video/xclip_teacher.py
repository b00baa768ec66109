"""X-CLIP of ACM MM 2022 (xuguohai/X-CLIP), the teacher: CLIP ViT-B, a temporal transformer, and the score's matrices.

Shapes: B batch, F frames, W words, D embed width, S image side. Not Hugging Face's XCLIPModel (hf_xclip_teacher.py).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, convert_weights_to_lp
from safetensors.torch import load_file
from torch import Tensor, nn

from convclip.schema import UserError
from convclip.video.temporal import frame_mask, masked_mean, over_time, temporal_blocks
from convclip.video.xclip_score import SCORE_MATRICES

# CLIP's own image statistics; the teacher's, whatever the student's are.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HF_KEYS = ("vision_model.", "text_model.", "prompts_generator.", "mit.")
TWO_MODELS = (
    "two models share the name X-CLIP: the retrieval model of ACM MM 2022 (xuguohai/X-CLIP; keys clip.*, "
    "transformerClip.*, global_mat_weight, …; load_xclip) and Microsoft's video recognition model, Hugging Face's "
    "XCLIPModel (keys vision_model.*, mit.*, prompts_generator.*, …; load_hf_xclip)"
)


@dataclass(frozen=True)
class XClipSize:
    """Sizes of an X-CLIP network; the defaults are ViT-B/32 as trained on MSR-VTT."""

    embed_dim: int = 512
    image_size: int = 224
    patch_size: int = 32
    vision_width: int = 768
    vision_layers: int = 12
    text_width: int = 512
    text_layers: int = 12
    context_length: int = 77
    vocab_size: int = 49408
    temporal_layers: int = 4
    frame_positions: int = 77
    frames: int = 12
    words: int = 32


class XClipTeacher(nn.Module):
    """Encoders and score matrices; `convclip.video.xclip_score` turns their features into logits.

    Encoder outputs are rounded to fp16, the precision of the original's: what is stored is then exactly what the
    live teacher uses. Normalisation, the temporal transformer and the score are fp32.
    """

    def __init__(self, size: XClipSize) -> None:
        super().__init__()
        self.size = size
        vision = CLIPVisionCfg(
            layers=size.vision_layers, width=size.vision_width, patch_size=size.patch_size, image_size=size.image_size
        )
        text = CLIPTextCfg(
            context_length=size.context_length,
            vocab_size=size.vocab_size,
            width=size.text_width,
            heads=size.text_width // 64,
            layers=size.text_layers,
        )
        # cast_dtype only chooses layer norms that compute in fp32, so that `half_encoders` works.
        self.clip = CLIP(size.embed_dim, vision, text, quick_gelu=True, cast_dtype=torch.float16)
        # eps of the layer norms in X-CLIP's temporal transformer, which are not CLIP's.
        self.transformerClip = temporal_blocks(size.embed_dim, size.temporal_layers, eps=1e-12)
        self.frame_position_embeddings = nn.Embedding(size.frame_positions, size.embed_dim)
        sides = {"global": size.embed_dim, "local": size.embed_dim, "word": size.words, "frame": size.frames}
        for name in SCORE_MATRICES:
            self.register_parameter(name, nn.Parameter(torch.eye(sides[name.split("_")[0]])))

    def half_encoders(self) -> XClipTeacher:
        """Run the CLIP encoders in fp16, as the original does on a GPU."""
        convert_weights_to_lp(self.clip, torch.float16)
        return self

    def score_parameters(self) -> dict[str, Tensor]:
        """Detached fp32 matrices of the score and `logit_scale` (not exponentiated), by checkpoint name."""
        parameters = {name: getattr(self, name) for name in SCORE_MATRICES}
        parameters["logit_scale"] = self.clip.logit_scale
        return {name: value.detach().float() for name, value in parameters.items()}

    def encode_video(self, frames: Tensor, n_frames: Tensor) -> dict[str, Tensor]:
        """Frames [B, F, 3, S, S] (uint8, or float already normalised) and n_frames [B] (each >= 1) ->
        frame_raw [B, F, D] fp16, video_out [B, D] fp32, n_frames [B].
        """
        self._check(frames.shape[1], self.size.frames, "frames")
        mask = frame_mask(n_frames, frames.shape[1])
        weight = self.clip.visual.conv1.weight
        # The original pads with zeros after normalising, so a padded frame is grey, not black.
        images = normalize_frames(frames) * mask[:, :, None, None, None]
        frame_raw = self.clip.encode_image(images.flatten(0, 1).to(weight.dtype)).unflatten(0, mask.shape).half()
        with torch.autocast(frames.device.type, enabled=False):
            x = over_time(self.transformerClip, self.frame_position_embeddings, frame_raw.float(), mask)
            video_out = masked_mean(F.normalize(x, dim=-1), mask)
        return {"frame_raw": frame_raw, "video_out": video_out, "n_frames": n_frames}

    def encode_text(self, tokens: Tensor) -> dict[str, Tensor]:
        """Tokens [B, W] int64, padded with 0 -> word_raw [B, W, D] fp16 (padded places too), eot [B] int64."""
        length = tokens.shape[1]
        self._check(length, self.size.words, "words")
        clip = self.clip
        dtype = clip.transformer.get_cast_dtype()
        x = clip.token_embedding(tokens).to(dtype) + clip.positional_embedding[:length].to(dtype)
        x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
        word_raw = clip.ln_final(x) @ clip.text_projection
        # The end-of-text token has the highest id of the vocabulary.
        return {"word_raw": word_raw.half(), "eot": tokens.argmax(dim=-1)}

    def forward(self, frames: Tensor, n_frames: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """All features of matched videos and captions: the keys of `encode_video` and of `encode_text`."""
        return {**self.encode_video(frames, n_frames), **self.encode_text(tokens)}

    @staticmethod
    def _check(given: int, expected: int, what: str) -> None:
        if given != expected:
            raise UserError(
                f"the X-CLIP teacher was trained on {expected} {what}, got {given}: set {what} to {expected}"
            )


def normalize_frames(frames: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """uint8 [..., 3, S, S] -> float of zero mean and unit deviation; float frames are returned as they are."""
    if frames.dtype != torch.uint8:
        return frames
    shift = frames.new_tensor(mean, dtype=torch.float32).view(3, 1, 1)
    scale = frames.new_tensor(std, dtype=torch.float32).view(3, 1, 1)
    return (frames.float() / 255 - shift) / scale


def load_xclip(path: str | Path, precision: Literal["fp32", "fp16"] = "fp32") -> XClipTeacher:
    """The frozen teacher of an X-CLIP checkpoint (`pytorch_model.bin.<n>` as xuguohai/X-CLIP saves it, or safetensors).

    Sizes (ViT-B/32 or B/16, frames, words) come from the checkpoint's shapes. UserError: the file cannot be read, is
    Hugging Face's XCLIPModel, or its keys are not exactly the network's.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder, the X-CLIP teacher is one checkpoint file: {TWO_MODELS}")
    state = read_state(path)
    if any(key.startswith(HF_KEYS) for key in state):
        raise UserError(f"{path} is a checkpoint of Hugging Face's XCLIPModel, not of the X-CLIP teacher: {TWO_MODELS}")
    teacher = XClipTeacher(size_of(state, path))
    expected = teacher.state_dict()
    wrong = [f"missing {key}" for key in expected if key not in state]
    wrong += [f"left over {key}" for key in state if key not in expected]
    shared = expected.keys() & state.keys()
    wrong += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in sorted(shared)
        if state[key].shape != expected[key].shape
    ]
    _refuse(wrong, path)
    teacher.load_state_dict({key: value.float() for key, value in state.items()})
    teacher.eval().requires_grad_(False)
    return teacher.half_encoders() if precision == "fp16" else teacher


def size_of(state: Mapping[str, Tensor], path: str | Path = "checkpoint") -> XClipSize:
    """Sizes read from a checkpoint's shapes. UserError names the keys that are not there."""
    shape_keys = {
        "clip.visual.conv1.weight": 4,
        "clip.visual.positional_embedding": 2,
        "clip.text_projection": 2,
        "clip.positional_embedding": 2,
        "clip.token_embedding.weight": 2,
        "frame_position_embeddings.weight": 2,
        "frame_logit_weight": 2,
        "word_logit_weight": 2,
    }
    _refuse([f"missing {key}" for key in shape_keys if key not in state], path)
    _refuse([f"{key} is not a {n}-d tensor" for key, n in shape_keys.items() if state[key].ndim != n], path)
    shapes = {key: tuple(state[key].shape) for key in shape_keys}
    stacks = ("clip.visual.transformer", "clip.transformer", "transformerClip")
    layers = {name: _count_layers(state, name) for name in stacks}
    _refuse([f"missing {name}.resblocks.*" for name, count in layers.items() if count == 0], path)
    vision_width, _, patch_size, _ = shapes["clip.visual.conv1.weight"]
    text_width, embed_dim = shapes["clip.text_projection"]
    widths = {"vision": vision_width, "text": text_width, "embedding": embed_dim}
    _refuse([f"{name} width {width} is no multiple of 64" for name, width in widths.items() if width % 64], path)
    return XClipSize(
        embed_dim=embed_dim,
        image_size=patch_size * round((shapes["clip.visual.positional_embedding"][0] - 1) ** 0.5),
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=layers["clip.visual.transformer"],
        text_width=text_width,
        text_layers=layers["clip.transformer"],
        context_length=shapes["clip.positional_embedding"][0],
        vocab_size=shapes["clip.token_embedding.weight"][0],
        temporal_layers=layers["transformerClip"],
        frame_positions=shapes["frame_position_embeddings.weight"][0],
        frames=shapes["frame_logit_weight"][0],
        words=shapes["word_logit_weight"][0],
    )


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint file, without running code from it. UserError when it cannot be read."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"checkpoint {path} cannot be read as a file of tensors: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"checkpoint {path} is not a state dict: expected one mapping of names to tensors")
    return state


def _count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.resblocks\.(\d+)\.")
    return len({match[1] for key in state if (match := pattern.match(key))})


def _refuse(problems: list[str], path: str | Path) -> None:
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{path} is not an X-CLIP checkpoint: {'; '.join(problems[:8])}{more}")
