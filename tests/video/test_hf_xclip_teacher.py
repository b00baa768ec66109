"""Hugging Face's XCLIPModel as coarse teacher: equal to its own forward; the two X-CLIPs are never mixed up."""

import json

import pytest
import torch
from transformers import CLIPConfig, XCLIPConfig, XCLIPModel

from convclip.schema import UserError
from convclip.video.hf_xclip_teacher import HfXClipTeacher, load_hf_xclip
from convclip.video.xclip_teacher import XClipSize, XClipTeacher, load_xclip

SIDE = 32


def small_model():
    torch.manual_seed(0)
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 100, "max_position_embeddings": 10}
    vision = {**tower, "image_size": SIDE, "patch_size": 16, "num_frames": 3, "mit_hidden_size": 64}
    vision |= {"mit_intermediate_size": 64, "mit_num_attention_heads": 2}
    config = XCLIPConfig(text_config=text, vision_config=vision, projection_dim=64, prompt_num_attention_heads=2)
    model = XCLIPModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def test_score_equals_the_models_own_forward():
    model = small_model()
    frames = torch.randn(4, 3, 3, SIDE, SIDE)
    tokens = torch.zeros(5, 8, dtype=torch.long)
    for row in range(5):
        tokens[row, : row + 2] = torch.randint(1, 98, (row + 2,))
        tokens[row, row + 2] = 99
    teacher = HfXClipTeacher(model)
    with torch.no_grad():
        expected = model(input_ids=tokens, pixel_values=frames).logits_per_text
        torch.testing.assert_close(teacher(frames, tokens), expected, rtol=1e-4, atol=1e-4)
        features = {**teacher.encode_text(tokens), **teacher.encode_video(frames)}
        torch.testing.assert_close(teacher.score(**features, block_pairs=6), expected, rtol=1e-4, atol=1e-4)


def test_a_saved_model_loads_with_its_processors_statistics(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    teacher = load_hf_xclip(tmp_path)
    assert teacher.frames == 3 and not any(p.requires_grad for p in teacher.parameters())
    black = torch.zeros(1, 3, 3, SIDE, SIDE, dtype=torch.uint8)
    from_bytes = teacher.encode_video(black)["video_embed"]
    torch.testing.assert_close(from_bytes, teacher.encode_video(torch.full(black.shape, -2.0))["video_embed"])


def test_other_frame_counts_are_refused():
    with pytest.raises(UserError, match="num_frames 3, got 12 frames"):
        HfXClipTeacher(small_model()).encode_video(torch.zeros(1, 12, 3, SIDE, SIDE))


def test_the_two_xclips_are_never_loaded_into_each_other(tmp_path):
    size = XClipSize(64, 32, 16, 64, 1, 64, 1, 10, 50, 1, 10, 4, 6)
    acm = tmp_path / "pytorch_model.bin"
    torch.save(XClipTeacher(size).state_dict(), acm)
    with pytest.raises(UserError, match="two models share the name X-CLIP"):
        load_hf_xclip(acm)
    small_model().save_pretrained(tmp_path / "hf")
    for path in (tmp_path / "hf" / "model.safetensors", tmp_path / "hf"):
        with pytest.raises(UserError, match="two models share the name X-CLIP"):
            load_xclip(path)
    # X-CLIP's weights beside the other model's config.
    (tmp_path / "hf" / "model.safetensors").unlink()
    acm.rename(tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(UserError, match="two models share the name X-CLIP"):
        load_hf_xclip(tmp_path / "hf")


def test_what_is_no_whole_xclip_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no XCLIPModel at"):
        load_hf_xclip(tmp_path)
    CLIPConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(UserError, match="'clip' model, not an XCLIPModel"):
        load_hf_xclip(tmp_path / "clip")
    model = small_model()
    state = {k: v for k, v in model.state_dict().items() if k != "prompts_generator.alpha"}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(UserError, match=r"missing prompts_generator\.alpha"):
        load_hf_xclip(tmp_path / "part")
