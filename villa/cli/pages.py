"""``villa_run --help`` and ``--list``: usage, options from the dataclasses that declare them, registered names."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from typing import get_type_hints

from omegaconf import MISSING

from villa import plugins, recipes
from villa.config.loader import import_plugins
from villa.config.options import attribute_docs, dataclass_options, describe, fixed_options
from villa.config.schema import VARIANTS, RunConfig
from villa.config.values import show
from villa.config.variants import Variant, choose, name_variants
from villa.config.yaml_text import write
from villa.errors import ConfigError, VillaError, nearest, one_line
from villa.registry import EXTRACTORS, REGISTRIES, Registry

USAGE = """\
usage: villa_run [config=RECIPE.yaml] [section.option=value ...]
                 [--print-config [--no-origins] | --parameters | --perturbation-points | --dry-run]
       villa_run config=RECIPE.yaml ... --sweep section.option=value,value,... ... [--at-once N]
       villa_run --study STUDY.yaml [section.option=value ...] [--at-once N]
       villa_run --compare FOLDER FOLDER ... [output_dir=FOLDER]
       villa_run --list [KIND] | --help [SECTION | section=name ...] | --version
       villa_run doctor [config=RECIPE.yaml ...]
       villa_run --new trainer|model|dataset|loss|attack|callback NAME
       villa_run --completion bash|zsh|fish

Train, evaluate or predict with what a recipe names. Later values win: defaults, presets, included files, the
recipe, the command line. Values are YAML; quote brackets and blanks for the shell.

  villa_run config=recipe.yaml                   (a path, or a name of --list recipes: villa/easy_vqa)
  villa_run config=recipe.yaml trainer=freelb trainer.steps=5 optimizer.lr=3e-5
  villa_run config=recipe.yaml run_type=test checkpoint.path=outputs/run
  villa_run config=recipe.yaml 'evaluation.metrics=[accuracy]' --print-config

A recipe may have stages, each a recipe that starts from the weights of the one before: stages: [a.yaml, b.yaml].
Arguments are for all of them, or for one: stage2.optimizer.lr=1e-5.

  --sweep a=1,2 b=x,y   one run for every combination of the values, each in its folder below output_dir, and a table
                        and a figure of what they reach; the same command again goes on with what is missing
  --at-once N           run N of them at once (1; as SLURM likes for launcher=slurm)
  --study STUDY.yaml    compare methods at matched updates and matched compute: train and attack what is missing, then
                        write tables, figures and a page of what they show
  --compare A B ...     compare runs that were attacked (run_type=robustness) or probed (run_type=probe)
  --print-config        show the resolved recipe with the origin of every value, and stop; with --no-origins without
                        these comments, to compare two recipes with diff
  --parameters          show by module which parameters train, with which learning rate and weight decay, and stop
  --perturbation-points show where the recipe's model is perturbed, and stop
  --dry-run             show what memory and how many operations the recipe's run needs, and stop
  --list [KIND]         list what is registered: models, datasets, losses, ...; or recipes: those that come with villa
  --help [SECTION]      this page, its part on a section (--help training), or a registered class's options
                        (--help trainer=villa)
  doctor                what is installed, devices, caches, and what a recipe lacks
  --new KIND NAME       write a class of your own that runs, and its test, as NAME.py and test_NAME.py
  --completion SHELL    print a script that makes a shell complete options, names and files, for
                        eval "$(villa_run --completion bash)"
  --version             show the version

Exit codes: 0 done, 2 a mistake in the input (one line says which), 130 interrupted.
"""

_WIDTH = 110


def help_text(args: Sequence[str]) -> str:
    """Return the help page, its part on some sections, or the options of variants chosen by ``section=name``.

    Raises:
        ConfigError: an argument names no section or variant, or the plug-in of ``user_dir`` cannot be imported.
    """
    sections = [field.name for field in dataclasses.fields(RunConfig)]
    asked = [arg for arg in args if "=" not in arg]
    unknown = next((name for name in asked if name not in sections), None)
    if unknown is not None:
        hint = nearest(unknown, sections)
        raise ConfigError(f"--help {show(unknown)}: there is no such section{hint} (known: {', '.join(sections)})")
    layer = name_variants(import_plugins([arg for arg in args if "=" in arg]))
    chosen = [section for section in VARIANTS if f"{section}.name" in layer]
    if not asked and not chosen:
        return f"{USAGE}\n{_recipe_page(sections)}"
    pages = [_recipe_page(asked).lstrip("\n")] if asked else []
    return "\n".join([*pages, *(_variant_page(section, choose(section, [layer])) for section in chosen)])


def extractor_page(name: str) -> str:
    """Return the options of an extractor.

    Raises:
        ConfigError: there is none of that name.
    """
    kind = EXTRACTORS.get(name)
    lines = _wrapped(f"extractor '{name}': {EXTRACTORS.summary(name)}")
    return "\n".join([*lines, *_options(kind.Config, "")]) + "\n"


def _recipe_page(sections: Sequence[str]) -> str:
    hints, docs = get_type_hints(RunConfig), attribute_docs(RunConfig)
    lines: list[str] = []
    for field in (field for field in dataclasses.fields(RunConfig) if field.name in sections):
        hint = hints[field.name]
        if field.name in VARIANTS:
            names = ", ".join(REGISTRIES[VARIANTS[field.name]].names())
            lines += ["", *_wrapped(f"{field.name}: {docs[field.name]}"), *_wrapped(f"names: {names}", "  ")]
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            summary = (hint.__doc__ or "").partition("\n")[0]
            lines += ["", *_wrapped(f"{field.name}: {summary}"), *_options(hint, f"{field.name}.")]
        else:
            lines += _option(field.name, describe(hint), fixed_options()[field.name].default, docs[field.name])
    return "\n".join(lines) + "\n"


def _variant_page(section: str, variant: Variant) -> str:
    summary = (variant.config.__doc__ or "").partition("\n")[0]
    presets = ", ".join(getattr(variant.config, "PRESETS", ()))
    lines = _wrapped(f"{section}={variant.name}: {summary}")
    lines += _wrapped(f"presets: {section}.reference = {presets}", "  ") if presets else []
    return "\n".join([*lines, *_options(variant.config, f"{section}.")]) + "\n"


def _options(config: type, prefix: str) -> Iterator[str]:
    for key, option in dataclass_options(config, prefix, skip=("name",)).items():
        yield from _option(key, describe(option.hint), option.default, option.doc)


def _option(key: str, kind: str, default: object, doc: str) -> list[str]:
    state = "required" if default == MISSING else f"default {write(default)}"
    heading = textwrap.wrap(f"{key}: {kind}; {state}", _WIDTH, initial_indent="  ", subsequent_indent="    ")
    return [*heading, *_wrapped(doc, "      ")]


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text.replace("``", "'"), _WIDTH, initial_indent=indent, subsequent_indent=indent)


ALL, RECIPES = "all", "recipes"


def listing(kind: str) -> tuple[list[str], list[str]]:
    """List the registered names of a kind, each with the first line of its documentation.

    Args:
        kind: plural of a kind (``models``), ``recipes``, or ``all`` but recipes.

    Returns:
        Lines for the user, and problems: plug-ins and built-ins that cannot be imported.

    Raises:
        ConfigError: no such kind.
    """
    if kind == RECIPES:
        return _recipes(), []
    if kind not in (ALL, *REGISTRIES):
        known = ", ".join((*REGISTRIES, RECIPES))
        raise ConfigError(
            f"--list {show(kind)}: nothing of that kind{nearest(kind, (*REGISTRIES, RECIPES))} (known: {known})"
        )
    problems = [f"plug-in {name} failed to import: {why}" for name, why in plugins.failures().items()]
    lines: list[str] = []
    for plural in REGISTRIES if kind == ALL else (kind,):
        lines += [f"{plural}:", *_entries(REGISTRIES[plural], problems)]
    return lines, problems


def _recipes() -> list[str]:
    width = max(map(len, recipes.names()), default=0)
    lines = (f"  {name:{width}}  {recipes.summary(name)}".rstrip() for name in recipes.names())
    return [f"recipes, in {recipes.home()} (a file of yours with the same path comes first):", *lines]


def _entries(registry: Registry[object], problems: list[str]) -> Iterator[str]:
    names = registry.names()
    width = max(map(len, names), default=0)
    for name in names:
        try:
            summary = registry.summary(name)
        except (ImportError, VillaError) as error:
            problems.append(f"{registry.kind} '{name}' cannot be used: {one_line(error)}")
            continue
        yield f"  {name:{width}}  {summary}".rstrip().replace("``", "'")
