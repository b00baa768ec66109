"""Mixed weights against the formula; heads that are new, batch norms, counters."""

import pytest
import torch

from convclip.models import build_model
from convclip.models.weight_mix import mix_weights
from convclip.schema import Model, UserError


def model_of(seed, head="average_linear", embed_dim=16, backbone="test_efficientnet"):
    torch.manual_seed(seed)
    image = {"backbone": backbone, "head": head, "image_size": 32}
    text = {"width": 32, "heads": 2, "layers": 1, "context_length": 8, "vocab_size": 50}
    model = build_model(Model.model_validate({"embed_dim": embed_dim, "image": image, "text": text}))
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(1, 2)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(seed)
    return model


def test_a_mix_is_the_formula_and_its_ends_are_the_ends():
    start, end = model_of(1).state_dict(), model_of(2)
    with torch.no_grad():
        end.text.token_embedding.weight.copy_(start["text.token_embedding.weight"])
    last = end.state_dict()
    mix = mix_weights(end, start, last, (), "start")
    counters = {name for name in last if name.endswith("num_batches_tracked")}
    assert counters and set(mix.kept) == counters
    assert all(torch.equal(value, last[name]) for name, value in mix.at(1.0).items())
    assert all(torch.equal(value, (last if name in counters else start)[name]) for name, value in mix.at(0.0).items())
    for alpha in (0.1, 0.5, 0.75):
        for name, value in mix.at(alpha).items():
            expected = last[name] if name in counters else (1 - alpha) * start[name] + alpha * last[name]
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
        same = mix.at(alpha)["text.token_embedding.weight"]
        assert torch.equal(same, last["text.token_embedding.weight"])


@pytest.mark.parametrize("way", ["other head", "random part"])
def test_a_head_without_a_start_is_the_ends_as_a_whole(way):
    end = model_of(2, "attention_pool_linear")
    last, fresh = end.state_dict(), ()
    start = model_of(1, "average_linear" if way == "other head" else "attention_pool_linear").state_dict()
    if way == "random part":
        fresh = ("visual.head.proj.weight", "logit_scale")
    head = {name for name in last if name.startswith("visual.head.")}
    mixed = mix_weights(end, start, last, fresh, "start").at(0.0)
    assert len(head) == 6 and all(torch.equal(mixed[name], last[name]) for name in {*head, *fresh})
    assert torch.equal(mixed["visual.trunk.conv_stem.weight"], start["visual.trunk.conv_stem.weight"])
    end.load_state_dict(mixed)


def test_what_cannot_be_mixed_is_one_line():
    end = model_of(2)
    last, start = end.state_dict(), model_of(1).state_dict()
    for other, fresh, words in (
        (model_of(1, backbone="test_convnext").state_dict(), (), "is another model than the run's: visual.trunk"),
        (model_of(1, embed_dim=8).state_dict(), (), "text.text_projection of the run are not in it"),
        (last, (), "has the same weights as the end"),
        (start, tuple(last), "has no weight that is not new in the run"),
    ):
        with pytest.raises(UserError) as caught:
            mix_weights(end, other, last, fresh, "runs/other")
        assert words in str(caught.value) and "runs/other" in str(caught.value) and "--start" in str(caught.value)
