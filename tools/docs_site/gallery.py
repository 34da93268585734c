"""Pages of the recipes: what each is for, needs and costs, its file, and what it is resolved to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path

from villa import recipes
from villa.cli.doctor import needed_extras
from villa.config import RunConfig, annotated, load_stages, to_yaml
from villa.config.loader import Loaded
from villa.config.printer import leaves
from villa.engine.train import describe_cost
from villa.errors import VillaError
from villa.planning.dry_run import plan_recipe
from villa.planning.plan import Plan, in_bytes, in_units
from villa.registry import DATASETS, TRAINERS

ROOT = Path(__file__).parents[2]
FOLDER = "recipes"
#: Options that a plan does not depend on.
_IDLE = ("name", "output_dir", "seed", "checkpoint.", "evaluation.", "logging.", "scheduler.", "model.checkpoint")
_IDLE += ("optimizer.lr", "training.updates", "training.epochs")
_WEIGHTS = ("model.checkpoint", "dataset.processor", "dataset.tokenizer", "model.architecture")
#: Scripts that draw or write small data, which plans read.
_SCRIPTS = {"projects/own_data/draw.py": "outputs/own_data/data", "projects/text/write_pairs.py": "outputs/text/data"}
_GALLERY = """---
hide: [toc]
---

# Recipes

After reading this page you can choose a recipe by what it needs and costs. `villa_run config=NAME` runs one, in a clone
or with an installed villa ([installing.md](../installing.md)); [tasks.md](../tasks.md) tells more of those of UNITER
and VILLA.

*x* is the cost of an update relative to standard training; parameters are those that are trained, memory is the peak on
one process, and compute that of all updates, as `villa_run --dry-run` plans them for texts and region features of usual
sizes. A recipe without numbers cannot be planned without its data or weights."""


@dataclass(frozen=True)
class Cost:
    """What a stage of a recipe costs; without a plan, the reason."""

    plan: Plan | None
    reason: str
    passes: str
    relative: float


class Gallery:
    """The pages by their path in the site.

    Args:
        plans: whether to plan what each recipe costs, which takes a second or more each.
    """

    def __init__(self, *, plans: bool = True) -> None:
        self._plans = plans
        self._known: dict[str, Cost] = {}
        self._rows: dict[str, str] = {}

    def pages(self, names: Sequence[str]) -> dict[str, str]:
        """Return the Markdown of every recipe's page, and of the gallery."""
        with _at_home(scripts=self._plans):
            made = {f"{FOLDER}/{name}.md": self._page(name) for name in names}
        return {f"{FOLDER}/index.md": self._index(names), **made}

    def _page(self, name: str) -> str:
        text = (recipes.home() / f"{name}.yaml").read_text(encoding="utf-8")
        title, file = _title(name, text), f"projects/{name}.yaml"
        head = f"# {name}\n\nAfter reading this page you know what the recipe `{name}` needs, costs and sets.\n"
        shown = f'## The file\n\n```yaml title="{file}"\n{text}```\n'
        if "methods" in _keys(text):
            self._rows[name] = f"| [{name}]({name}.md) | {title} | | | | | |"
            return f"{head}\n{title}\n\n```text\nvilla_run --study {file}\n```\n\n{shown}"
        values = [f"config={file}"]
        stages = load_stages(values)
        costs = [self._cost(stage, values, number) for number, stage in enumerate(stages)]
        self._rows[name] = _row(name, title, stages, costs)
        command = f"```text\nvilla_run config={name}\n```\n"
        resolved = "\n".join(_resolved(stage, number, len(stages)) for number, stage in enumerate(stages, 1))
        parts = [head, title, "", command, _needs(stages), _costs(stages, costs), shown, resolved]
        return "\n".join(parts)

    def _cost(self, stage: Loaded, values: list[str], number: int) -> Cost:
        config = stage.config
        key = repr([item for item in leaves(config).items() if not item[0].startswith(_IDLE)])
        if key not in self._known:
            trainer = TRAINERS.get(config.trainer.name)(config.trainer)
            plan, reason = self._plan(values, number)
            if plan is not None:  # without dropout, some methods save passes
                trainer.stochastic = plan.model.stochastic()
            relative = config.training.passes() * trainer.relative_cost(config.dataset.objectives())
            self._known[key] = Cost(plan, reason, describe_cost(trainer, config), relative)
        return self._known[key]

    def _plan(self, values: list[str], number: int) -> tuple[Plan | None, str]:
        if not self._plans:
            return None, "it was not planned in this build"
        try:
            return plan_recipe(values, number)[0], ""
        except VillaError as error:
            return None, str(error).splitlines()[0]

    def _index(self, names: Sequence[str]) -> str:
        lines = [_GALLERY]
        header = "| recipe | what | data | x | parameters | memory | compute |\n|---|---|---|---|---|---|---|"
        by_folder = sorted(names, key=lambda name: name.rpartition("/")[::2])
        for folder, group in groupby(by_folder, key=lambda name: name.rpartition("/")[0]):
            lines += ["", f"## {folder}", "", header, *(self._rows[name] for name in group)]
        return "\n".join(lines) + "\n"


def _keys(text: str) -> list[str]:
    return re.findall(r"^(\w+):", text, re.MULTILINE)


def _title(name: str, text: str) -> str:
    """Return the first sentences of the comment at the head of a recipe, up to its first command or empty line."""
    comment = [line.lstrip("#").strip() for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]
    words = " ".join(takewhile(lambda line: line and not line.startswith(("villa_run", "python")), comment))
    return words or recipes.summary(name)


def _row(name: str, title: str, stages: Sequence[Loaded], costs: Sequence[Cost]) -> str:
    data = ", ".join(dict.fromkeys(f"`{stage.config.dataset.name}`" for stage in stages))
    times = ", ".join(dict.fromkeys(f"{cost.relative:.1f}" for cost in costs))
    plans = [cost.plan for cost in costs if cost.plan is not None]
    if len(plans) < len(costs):
        return f"| [{name}]({name}.md) | {title} | {data} | {times} | | | |"
    memory = in_bytes(max(plan.memory.peak for plan in plans))
    flops = [_total(stage.config, plan) for stage, plan in zip(stages, plans, strict=True)]
    compute = "" if None in flops else in_units(sum(filter(None, flops)), "FLOP")
    return (
        f"| [{name}]({name}.md) | {title} | {data} | {times} | {in_units(_trained(plans[-1]))} | {memory} | {compute} |"
    )


def _trained(plan: Plan) -> int:
    return sum(parameter.numel() for parameter in plan.model.parameters() if parameter.requires_grad)


def _total(config: RunConfig, plan: Plan) -> float | None:
    """Return the operations of a whole training; None if the number of updates depends on the data."""
    return plan.flops * config.training.updates if config.training.updates else None


def _needs(stages: Sequence[Loaded]) -> str:
    lines = ["## What it needs", ""]
    for number, stage in enumerate(stages, 1):
        config = stage.config
        first = f"- stage {number}: " if len(stages) > 1 else "- "
        lines.append(f"{first}data set `{config.dataset.name}`{_files(config)}")
        values = leaves(config)
        weights = [f"`{key}: {values[key]}`" for key in _WEIGHTS if isinstance(values.get(key), str)]
        if weights and not str(values.get("model.checkpoint", "")).startswith("outputs/"):
            lines.append(f"    - weights and vocabulary: {', '.join(dict.fromkeys(weights))}")
        lines += [f"    - the extra `villa[{extra}]`" for extra in needed_extras(config)]
    return "\n".join(lines) + "\n"


def _files(config: RunConfig) -> str:
    """Return the files that the data set reads, of those that are not there."""
    try:
        if hasattr(config.dataset, "root"):  # others come with a package, or name their files
            DATASETS.get(config.dataset.name)(config.dataset).split("train")
    except VillaError as error:
        named = [line.strip().partition("  (")[0] for line in str(error).splitlines() if line.startswith("  ")]
        if not named:
            return f": {_given(config)}" if _given(config) else ""
        return ": " + ", ".join(name if name.startswith("and ") else f"`{name}`" for name in named)
    return f": {_given(config)}" if _given(config) else ""


def _given(config: RunConfig) -> str:
    values = leaves(config)
    named = [values.get(f"dataset.{split}") for split in ("train", "val", "test")]
    return ", ".join(f"`{name}`" for name in named if isinstance(name, str))


def _costs(stages: Sequence[Loaded], costs: Sequence[Cost]) -> str:
    lines = ["## What it costs", "", "| trainer | passes | updates | plan of an update |", "|---|---|---|---|"]
    for number, (stage, cost) in enumerate(zip(stages, costs, strict=True), 1):
        config = stage.config
        length = f"{config.training.updates:,}" if config.training.updates else f"{config.training.epochs} epochs"
        batch = f"{config.batch.examples or config.batch.tokens:,} {'examples' if config.batch.examples else 'tokens'}"
        told = "<br>".join(line.strip() for line in cost.plan.lines()) if cost.plan else f"none here: {cost.reason}"
        first = f"stage {number}: " if len(stages) > 1 else ""
        lines.append(
            f"| {first}`{config.trainer.name}` | {cost.passes} | {length} of {batch} | {told.replace('|', '&#124;')} |"
        )
    return "\n".join(lines) + "\n"


def _resolved(stage: Loaded, number: int, count: int) -> str:
    """Return all values with their origins, after checking that they load to the same configuration."""
    text = annotated(stage.config, stage.origins, stage.notices)
    copy = Path(f"resolved_{number}.yaml")
    copy.write_text(text, encoding="utf-8")
    again = load_stages([f"config={copy}"])[0].config
    copy.unlink()
    if to_yaml(again) != to_yaml(stage.config):
        raise VillaError(f"the resolved copy of '{stage.config.name}' is not what it was made from")
    which = "" if count == 1 else f" of stage {number}"
    title = f"## All values{which}, with their origins {{ data-search-exclude }}"
    return f"{title}\n\nThe output of `--print-config`, which can be run as a recipe.\n\n```yaml\n{text}```\n"


@contextmanager
def _at_home(*, scripts: bool) -> Iterator[None]:
    """Work in a folder with the projects and, for plans, the small data that scripts write, but no other."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            Path("projects").symlink_to(ROOT / "projects")
            for script, target in _SCRIPTS.items() if scripts else ():
                subprocess.run([sys.executable, script, target], check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - ours
            yield
        finally:
            os.chdir(before)
