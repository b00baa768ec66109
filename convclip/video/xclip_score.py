"""The score between captions and videos of X-CLIP (ACM MM 2022), from features as they are stored.

Shapes: T captions, V videos, B matched pairs, W words, F frames, D embed width. No mask enters a score: padded word
places and padded frames count, as they did when the teacher was trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

SCORE_MATRICES = (
    "global_mat_weight",
    "local_mat_weight",
    "word_logit_weight",
    "frame_logit_weight",
    "word_mat_weight",
    "frame_mat_weight",
    "word_mat_weight2",
    "frame_mat_weight2",
)
TEMPERATURE = 1e-2


def xclip_score(
    word_raw: Tensor,
    eot: Tensor,
    frame_raw: Tensor,
    video_out: Tensor,
    parameters: Mapping[str, Tensor],
    block_pairs: int = 16384,
) -> Tensor:
    """Logits Q [T, V] in fp32 of every caption against every video.

    word_raw [T, W, D] un-normalised word features; eot [T] end-of-text places; frame_raw [V, F, D] frames before the
    temporal transformer; video_out [V, D]; parameters: SCORE_MATRICES and `logit_scale` (not exponentiated). At most
    `block_pairs` pairs are in work at a time (about 8 KB each at 32 words and 12 frames). Source: xuguohai/X-CLIP.
    """
    with torch.autocast(word_raw.device.type, enabled=False):
        weights = {name: parameters[name].float() for name in SCORE_MATRICES}
        frames = F.normalize(frame_raw.float(), dim=-1)
        videos = F.normalize(video_out.float(), dim=-1)
        video_step = max(1, min(len(videos), math.isqrt(block_pairs)))
        text_step = max(1, block_pairs // video_step)
        rows = []
        for start in range(0, len(word_raw), text_step):
            texts = slice(start, start + text_step)
            words = F.normalize(word_raw[texts].float(), dim=-1)
            sentence = words[torch.arange(len(words), device=words.device), eot[texts].long()]
            pairs = zip(frames.split(video_step), videos.split(video_step), strict=True)
            rows.append(torch.cat([_four_terms(words, sentence, fr, vi, weights) for fr, vi in pairs], dim=1))
        return parameters["logit_scale"].float().exp() / 4 * torch.cat(rows)


def fine_target(word_raw: Tensor, eot: Tensor, frame_raw: Tensor) -> Tensor:
    """r [B, F]: softmax over frames of cos(sentence_b, frame_bf) at temperature 1, for matched pairs, in fp32."""
    with torch.autocast(word_raw.device.type, enabled=False):
        sentence = F.normalize(word_raw[torch.arange(len(word_raw), device=eot.device), eot.long()].float(), dim=-1)
        frames = F.normalize(frame_raw.float(), dim=-1)
        return torch.einsum("bd,bfd->bf", sentence, frames).softmax(-1)


def score_targets(
    features: Mapping[str, Tensor], parameters: Mapping[str, Tensor], own: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """What one rank distils from: logits [B, W*B] of its captions against all videos, logits [B, W*B] of its videos
    against all captions, and r [B, F] of its pairs.

    `features` (word_raw, eot, frame_raw, video_out) hold the whole batch's W*B matched pairs in rank order, `own` this
    rank's rows in them.
    """
    words, eot, frames, videos = (features[name] for name in ("word_raw", "eot", "frame_raw", "video_out"))
    target = fine_target(words[own], eot[own], frames[own])
    rows = xclip_score(words[own], eot[own], frames, videos, parameters)
    if len(rows) == len(frames):
        return rows, rows.T, target
    return rows, xclip_score(words, eot, frames[own], videos[own], parameters).T, target


def _four_terms(words: Tensor, sentence: Tensor, frames: Tensor, video: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Sum of the four terms, before logit_scale / 4, of a block of unit features: [T, V]."""
    texts, n_words, _ = words.shape
    n_videos, n_frames, _ = frames.shape
    flat_words, flat_frames = words.flatten(0, 1), frames.flatten(0, 1)
    video_sentence = sentence @ weights["global_mat_weight"] @ video.T
    word_video = (flat_words @ video.T).view(texts, n_words, n_videos).transpose(1, 2)
    sentence_frame = (sentence @ flat_frames.T).view(texts, n_videos, n_frames)
    word_frame = flat_words @ weights["local_mat_weight"] @ flat_frames.T
    word_frame = word_frame.view(texts, n_words, n_videos, n_frames).transpose(1, 2)
    frame_level = _attend(word_frame.transpose(2, 3), weights["word_mat_weight"])
    word_level = _attend(word_frame, weights["frame_mat_weight"])
    fine = _attend(frame_level, weights["frame_mat_weight2"]) + _attend(word_level, weights["word_mat_weight2"])
    video_word = _attend(word_video, weights["word_logit_weight"])
    return video_sentence + video_word + _attend(sentence_frame, weights["frame_logit_weight"]) + fine / 2


def _attend(similarity: Tensor, mix: Tensor) -> Tensor:
    """Attention over similarities: sum over the last axis N of (softmax(s / temperature) . mix [N, N]) * s."""
    return ((similarity / TEMPERATURE).softmax(-1) @ mix * similarity).sum(-1)
