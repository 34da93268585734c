"""The names of what is in the folder of a checkpoint."""

MODEL = "model.safetensors"
TRAINING_STATE = "training_state.pt"
CONFIG = "config.yaml"
ASSETS = "assets"
MANIFEST = "manifest.json"
#: Instead of ``MODEL``: a folder of shards, and the file that says what is in all of them together.
SHARDS, INDEX = "shards", "shards.json"
