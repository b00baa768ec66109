"""Two fixed random towers behind the signature of the real ones, and pictures for them."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from convclip.models.dual_tower import Outputs

SIZE, WORDS, WIDTH = 8, 30, 6


class SmallModel:
    """Picture [B, 3, 8, 8] or word numbers [B, T] -> unit embeddings [B, 6]; counts its batches."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.image = torch.randn(3 * SIZE * SIZE, WIDTH, generator=generator)
        self.text = torch.randn(WORDS, WIDTH, generator=generator)
        self.batches = []

    def __call__(self, images=None, texts=None):
        self.batches.append(len(texts if images is None else images))
        image = None if images is None else F.normalize(images.flatten(1).float() @ self.image, dim=1)
        text = None if texts is None else F.normalize(self.text[texts].sum(1), dim=1)
        return Outputs(image, text, torch.tensor([20.0]), None, {})

    def encode_text(self, tokens, normalize):
        """What open_clip calls a model by."""
        return self(texts=tokens).text


def numbers_of(texts):
    """The tokenizer: words that are numbers, cut or padded to four."""
    rows = [[int(word) for word in text.split()][:4] for text in texts]
    return torch.tensor([row + [0] * (4 - len(row)) for row in rows])


def write_noise(path, seed):
    generator = np.random.default_rng(seed)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)


def read_pictures(paths):
    """uint8 [N, 3, 8, 8]"""
    return torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).permute(0, 3, 1, 2)
