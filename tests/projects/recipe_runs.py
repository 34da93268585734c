"""Running the recipes of ``projects`` on generated data, where there are no data sets."""

from pathlib import Path

PROJECTS = Path(__file__).parents[2] / "projects"
#: Overrides that make a synthetic run as short as it can be.
SHORT = (
    "training.updates=2",
    "dataset.synthetic_examples=32",
    "logging.tensorboard=false",
    "logging.figures=false",
    "logging.progress=off",
)


def argument(recipe: str) -> str:
    """The argument that chooses a recipe: its path below ``projects`` without the suffix."""
    return f"config={PROJECTS / recipe}.yaml"
