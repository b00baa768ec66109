"""What teachers say of a batch: Hugging Face's model live and coarse-only, against its own forward."""

import torch
from transformers import XCLIPConfig, XCLIPModel

from convclip.config import load_recipe
from convclip.models.dual_tower import Outputs
from convclip.video.hf_xclip_teacher import HfXClipTeacher
from convclip.video.teachclip_loss import teachclip_loss
from convclip.video.teachers import LiveCoarseTeacher
from convclip.video.video_inputs import VideoInputs
from convclip.video.video_objective import STUCK_STEPS, VideoObjective

B, FRAMES, D = 4, 3, 64


def small_teacher():
    torch.manual_seed(0)
    tower = {"hidden_size": D, "intermediate_size": D, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 32, "patch_size": 16, "num_frames": FRAMES, "mit_hidden_size": D}
    vision |= {"mit_intermediate_size": D, "mit_num_attention_heads": 2}
    text = {**tower, "vocab_size": 100, "max_position_embeddings": 10}
    config = XCLIPConfig(text_config=text, vision_config=vision, projection_dim=D, prompt_num_attention_heads=2)
    return HfXClipTeacher(XCLIPModel(config).eval())


def batch():
    torch.manual_seed(1)
    text = torch.randint(1, 98, (B, 6))
    text[:, -1] = 99
    frames = torch.randint(0, 256, (B, FRAMES, 3, 32, 32), dtype=torch.uint8)
    return {"frames": frames, "n_frames": torch.tensor([3, 1, 2, 3]), "text": text, "caption_id": torch.arange(B)}


def test_coarse_targets_are_the_models_own_scores_and_have_no_fine_part():
    teacher = small_teacher()
    targets = LiveCoarseTeacher(teacher, torch.device("cpu")).targets(batch())
    with torch.no_grad():
        expected = teacher(batch()["frames"], batch()["text"])
    torch.testing.assert_close(targets.rows, expected)
    torch.testing.assert_close(targets.columns, expected.T)
    assert targets.frames is None


def objective_and_inputs(**video):
    recipe = load_recipe("teachclip_msrvtt7k", [f"video.{key}={value}" for key, value in video.items()])
    weights = torch.rand(B, FRAMES, generator=torch.Generator().manual_seed(2)).softmax(-1)
    target = LiveCoarseTeacher(small_teacher(), torch.device("cpu")).targets(batch())
    inputs = VideoInputs(torch.zeros(B, FRAMES, D), torch.zeros(B, D), batch()["n_frames"], (target,))
    return VideoObjective(recipe), inputs, weights


def test_the_recipes_weights_and_kind_reach_the_loss():
    text, video = (torch.nn.functional.normalize(torch.randn(B, D), dim=-1) for _ in range(2))
    scale = torch.tensor([20.0])
    for settings in ({}, {"coarse": "ce", "weights": "[1, 10, 1]"}, {"mask_padding": "false", "weights": "[1, 2, 3]"}):
        objective, inputs, shares = objective_and_inputs(**settings)
        outputs = Outputs(video, text, scale, None, {"frame_weights": shares})
        found = objective(outputs, [inputs], 0)
        mask = None if "mask_padding" in settings else torch.arange(FRAMES) < inputs.n_frames[:, None]
        kind, weights = settings.get("coarse", "pearson"), objective.recipe.video.weights
        expected = teachclip_loss(text, video, scale, shares, inputs.targets, mask, kind, weights)
        assert found["total"] == expected["total"] and found["fine"] == 0


def test_a_collapse_is_said_once():
    objective, *_ = objective_and_inputs()
    chance = float(torch.tensor(120.0).log())
    said = [objective.warnings({"step": step, "loss_ground_truth": chance}) for step in range(3 * STUCK_STEPS)]
    assert sum(map(bool, said)) == 1 and "collapse" in said[STUCK_STEPS - 1][0]
    healthy, *_ = objective_and_inputs()
    values = [chance, *[0.8 * chance] * 3]
    assert not any(healthy.warnings({"step": s, "loss_ground_truth": values[s % 4]}) for s in range(3 * STUCK_STEPS))
