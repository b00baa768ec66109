"""Embedding an evaluation set: one rank and two give the rows in order, and the same figures."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from convclip import distributed
from convclip.data.evaluation_set import load_evaluation_set
from convclip.data.transforms import EvalTransform, normalize
from convclip.evaluation.embedding import embed, evaluate
from convclip.evaluation.retrieval import clip_validation_loss, rowwise_recall, standard_recall
from convclip.schema import Data, ImageTower
from tests.worlds import run_in_world

SIZE, WORDS = 8, 30
CPU = torch.device("cpu")


def write_set(folder, images, captions):
    """A CSV of noise pictures, image i with 1 + i % captions captions of words that are numbers."""
    rows, generator = ["filepath,title"], np.random.default_rng(0)
    for i in range(images):
        Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows += [f"{i}.png,{i % WORDS} {k} {7 * i % WORDS}" for k in range(1 + i % captions)]
    (folder / "val.csv").write_text("\n".join(rows))
    return str(folder / "val.csv")


def numbers_of(texts):
    return torch.tensor([[int(word) for word in text.split()] for text in texts])


class Model:
    """Two fixed random towers behind the signature of the real ones; counts its batches."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.image = torch.randn(3 * SIZE * SIZE, 6, generator=generator)
        self.text = torch.randn(WORDS, 6, generator=generator)
        self.batches = []

    def __call__(self, images=None, texts=None):
        self.batches.append(len(texts if images is None else images))
        image = None if images is None else F.normalize(images.flatten(1).float() @ self.image, dim=1)
        text = None if texts is None else F.normalize(self.text[texts].sum(1), dim=1)
        return image, text, torch.tensor([20.0]), "more, as with a reference head"


def embed_and_evaluate(address, batch):
    distributed.barrier()
    dataset, model = load_evaluation_set(address, Data(workers=0), EvalTransform(SIZE), numbers_of), Model()
    embedded = embed(model, dataset, ImageTower(), CPU, torch.float32, batch)
    batches, model.batches = model.batches, []
    figures = evaluate(model, dataset, ImageTower(), CPU, torch.float32, batch)
    assert model.batches == batches
    return [x.numpy() for x in embedded], batches, figures, torch.is_grad_enabled()


def test_one_rank_and_two_agree_with_doing_it_by_hand(tmp_path):
    address = write_set(tmp_path, 11, 4)
    dataset, model = load_evaluation_set(address, Data(workers=0), EvalTransform(SIZE), numbers_of), Model()
    pixels = np.stack([np.asarray(Image.open(tmp_path / f"{i}.png")) for i in range(11)])
    tower = ImageTower()
    images, _, scale, _ = model(images=normalize(torch.tensor(pixels).permute(0, 3, 1, 2), tower.mean, tower.std))
    texts = model(texts=numbers_of(dataset.captions))[1]
    expected = {
        "standard": standard_recall(images, texts, dataset.image_of_text),
        "rowwise": rowwise_recall(images[dataset.image_of_text], texts),
        "val_loss": clip_validation_loss(images[dataset.image_of_text], texts, scale, 3),
        "images": 11,
        "texts": len(dataset.captions),
    }
    one, two = [embed_and_evaluate(address, 3)], run_in_world(2, embed_and_evaluate, address, 3)
    for embedded, _, figures, grad in (*one, *two):
        for found, wanted in zip(embedded, (images, texts, scale), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        assert figures["standard"] == expected["standard"] and figures["rowwise"] == expected["rowwise"]
        assert abs(figures["val_loss"] - expected["val_loss"]) < 1e-5
        assert (figures["images"], figures["texts"]) == (11, expected["texts"])
        assert grad
    # ZeRO-3 hangs where one rank runs a batch that another does not.
    assert two[0][1] == two[1][1] and sum(two[0][1]) >= (11 + expected["texts"]) / 2
