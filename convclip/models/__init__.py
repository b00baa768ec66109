"""Models: image and text towers, the dual tower, layer groups, weights in and out."""

from convclip.models.dual_tower import DualTower, build_model

__all__ = ["DualTower", "build_model"]
