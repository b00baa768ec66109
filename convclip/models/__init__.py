"""Models: image and text towers, the dual tower, layer groups, weights in and out."""
