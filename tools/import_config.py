"""Turn a JSON configuration of UNITER's or VILLA's released scripts into a recipe.

python tools/import_config.py --task vqa config/train-vqa-base-4gpu-adv.json --gpus 4 > vqa.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from villa.command import Parser, run_command
from villa.convert.configurations import TASKS, read_options, released_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Print the recipe; return the exit code: 0, or 2 for a mistake in the input, reported in one line on stderr."""
    return run_command("import_config", lambda: _import(argv))


def _import(argv: Sequence[str] | None) -> int:
    parser = Parser("import_config", description=__doc__)
    parser.add_argument("config", type=Path, help="the JSON file; model_config in it is relative to the working folder")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--gpus", type=int, default=1, help="processes of the released run (default: 1)")
    parser.add_argument("--root", default=".", help="folder that the paths of the data are relative to (default: .)")
    args = parser.parse_args(argv)
    options = read_options(args.config)
    sizes = read_options(Path(str(options.get("model_config", "config/uniter-base.json"))))
    recipe = released_recipe(args.task, options, sizes, gpus=args.gpus)
    recipe["dataset"]["root"] = args.root
    print(yaml.safe_dump(recipe, sort_keys=False), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
