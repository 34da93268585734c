"""Models: registered backbones, their heads and the loading of weights."""
