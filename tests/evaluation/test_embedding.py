"""Embedding an evaluation set: one rank and two give the rows in order, and the same figures."""

import numpy as np
import torch

from convclip import distributed
from convclip.data.evaluation_set import load_evaluation_set
from convclip.data.transforms import EvalTransform, normalize
from convclip.evaluation.embedding import Encoder, embed, evaluate
from convclip.evaluation.retrieval import rowwise_recall, standard_recall, validation_loss
from convclip.schema import Data, ImageTowerConfig
from tests.evaluation.small_model import SIZE, WORDS, SmallModel, numbers_of, read_pictures, write_noise
from tests.processes import run_in_world

CPU = torch.device("cpu")


def write_set(folder, images, captions):
    """A CSV of noise pictures, image i with 1 + i % captions captions."""
    rows = ["filepath,title"]
    for i in range(images):
        write_noise(folder / f"{i}.png", i)
        rows += [f"{i}.png,{i % WORDS} {k} {7 * i % WORDS}" for k in range(1 + i % captions)]
    (folder / "val.csv").write_text("\n".join(rows))
    return str(folder / "val.csv")


def embed_and_evaluate(address, batch):
    distributed.barrier()
    dataset, model = load_evaluation_set(address, Data(workers=0), EvalTransform(SIZE), numbers_of), SmallModel()
    encoder = Encoder(model, ImageTowerConfig(), CPU, torch.float32, batch)
    embedded = embed(encoder, dataset)
    batches, model.batches = model.batches, []
    figures = evaluate(encoder, dataset)
    assert model.batches == batches
    return [x.numpy() for x in embedded[:3]], batches, figures, torch.is_grad_enabled()


def test_one_rank_and_two_agree_with_doing_it_by_hand(tmp_path):
    address = write_set(tmp_path, 11, 4)
    dataset = load_evaluation_set(address, Data(workers=0), EvalTransform(SIZE), numbers_of)
    model, tower = SmallModel(), ImageTowerConfig()
    pixels = read_pictures([tmp_path / f"{i}.png" for i in range(11)])
    images, _, scale, *_ = model(images=normalize(pixels, tower.mean, tower.std))
    texts = model(texts=numbers_of(dataset.captions)).text
    standard = standard_recall(images, texts, dataset.image_of_text)
    rowwise = rowwise_recall(images[dataset.image_of_text], texts)
    val_loss = validation_loss(images[dataset.image_of_text], texts, 3, scale)

    one, two = [embed_and_evaluate(address, 3)], run_in_world(2, embed_and_evaluate, address, 3)
    for embedded, _, figures, grad in (*one, *two):
        for found, wanted in zip(embedded, (images, texts, scale), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        assert figures["standard"] == standard and figures["rowwise"] == rowwise
        assert abs(figures["val_loss"] - val_loss) < 1e-5
        assert (figures["images"], figures["texts"]) == (11, len(dataset.captions))
        assert grad
    # ZeRO-3 hangs where one rank runs a batch that another does not.
    assert two[0][1] == two[1][1] and sum(two[0][1]) >= (11 + len(dataset.captions)) / 2
