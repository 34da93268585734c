"""``run_type=probe``: what the attention of a trained model tells about links of words to regions."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from villa.analysis.probe_report import JSON, summary, table, write
from villa.analysis.probes import Key, Measured, Pairs, measure
from villa.checkpoints.layout import CONFIG
from villa.config.printer import to_yaml
from villa.config.schema import RunConfig
from villa.distributed.strategy import strategy_of
from villa.engine.inference import restore_parts
from villa.engine.journal import Journal, facts_of_model, journal_of, open_journal
from villa.engine.linked_texts import LinkedTexts, open_linked, real_tokens
from villa.engine.passes import evaluating
from villa.engine.report import protocol
from villa.engine.run_folder import claim
from villa.engine.setup import Parts
from villa.evaluation.results import print_table
from villa.files import atomic_write
from villa.hub.source import Source
from villa.models.attention import LayerMaps
from villa.progress import track

#: Texts that go through the model at once: maps take much memory.
_AT_ONCE = 16


def probe(config: RunConfig) -> int:
    """Probe a trained model; write ``probe.json``, tables and a figure to ``output_dir``.

    A probe that was interrupted goes on if it is started again with the same ``output_dir``.
    """
    processes = strategy_of(config.distributed).connect()
    folder, options = Path(config.output_dir), config.probe
    output = folder / JSON
    resumes = journal_of(output).is_file()
    with ExitStack() as stack:
        stack.enter_context(claim(folder, resume=resumes, trains=False, processes=processes))
        parts, source = restore_parts(config, fresh=options.weights == "random")
        parts.strategy.connect()  # each process has the whole model, and a share of the texts
        fused = options.fusion and importlib.util.find_spec("sklearn") is not None
        if options.fusion and not fused and processes.is_main:
            print("note: fusion is left out, for scikit-learn is not installed (pip install 'villa[probe]')")
        texts = stack.enter_context(open_linked(parts, options))
        journal = None
        if processes.is_main:
            job = _job(config, source, texts) | {"fusion": fused, "the number of processes": processes.world_size}
            journal = stack.enter_context(open_journal(output, job, anew=True))
        measured, heads = _measured(parts, texts, fused, journal)
        if not processes.is_main:
            return 0
        facts = {**asdict(protocol(parts, source.update, "given")), "probe": asdict(options)}
        content, records = summary(measured, heads, facts, options)
        run = {"name": config.name, "method": config.trainer.name, "seed": config.seed}
        write(folder, content | {"run": run}, records, config.name)
        atomic_write(folder / CONFIG, to_yaml(config))
        print_table(table(content, f"{config.name}, {options.data}"))
        print(f"{100 * content['boxes_with_a_region']:.1f} % of the boxes have a region that stands for them")
        print(f"written to {folder}")
    return 0


def _job(config: RunConfig, source: Source, texts: LinkedTexts) -> dict[str, Any]:
    """Return what the measurements depend on."""
    drawn = ("seed",) if config.probe.weights == "random" else ()
    facts = facts_of_model(config, source, "probe.", *drawn)
    return {**facts, "the texts": texts.digest(dated=config.probe.data != "generated")}


def _measured(
    parts: Parts, texts: LinkedTexts, fused: bool, journal: Journal | None
) -> tuple[list[Measured], list[str]]:
    """Measure the texts that the journal lacks, each process a share of them.

    Returns:
        On the main process all texts in order, and the names of the heads.
    """
    processes, heads = parts.strategy.processes, list[str]()
    step = _AT_ONCE * processes.world_size
    starts = range(0, len(texts.texts), step)
    first = processes.largest(0 if journal is None else journal.done)
    if journal is not None and (note := journal.note or (first and f"going on after {first * step:,} texts")):
        print(f"note: {note}", flush=True)
    for start in track(starts[first:], "probe", mode=parts.config.logging.progress):
        part = range(start, min(start + step, len(texts.texts)))
        mine = part[processes.rank :: processes.world_size]
        own, heads = _measure_batch(parts, texts, mine or part[:1], fused)
        gathered = processes.gather([[place, *_plain(one)] for place, one in zip(mine, own, strict=False)])
        if journal is not None:
            journal.add([heads, sorted(row for rows in gathered for row in rows)])
    found: list[Measured] = []
    for heads, rows in journal or ():  # noqa: B007 (those of the last batch are those of all)
        found += [_restored(values) for _, *values in rows]
    return found, heads


def _measure_batch(
    parts: Parts, texts: LinkedTexts, places: Sequence[int], fused: bool
) -> tuple[list[Measured], list[str]]:
    batch, options = texts.batch(places), parts.config.probe
    with torch.no_grad(), evaluating(parts.model), parts.precision.autocast():
        maps = parts.model.attention_maps(batch.to(parts.precision.device))
    found = []
    for row, (place, attention) in enumerate(zip(places, maps, strict=True)):
        characters = texts.characters(place, real_tokens(batch, row))
        own = [characters[token] for token in attention.tokens.tolist()]
        found.append(
            measure(attention, texts.texts[place], own, span=options.span, overlap=options.overlap, fused=fused)
        )
    return found, names_of_heads(maps[0].layers)


def names_of_heads(layers: Sequence[LayerMaps]) -> list[str]:
    """Return ``layer 1, head 1`` and so on, of all layers."""
    return [f"{layer.name}, head {head}" for layer in layers for head in range(1, layer.heads + 1)]


def _plain(one: Measured) -> list[Any]:
    """Return what was measured as JSON, for the journal and other processes."""
    pairs = [
        [*key, p.linked.tolist(), p.count, p.random.tolist(), p.random_count, p.compared.tolist()]
        for key, p in one.pairs.items()
    ]
    return [one.id, one.image, pairs, one.found, one.boxes, one.importance.tolist(), one.fusion]


def _restored(values: Sequence[Any]) -> Measured:
    id_, image, listed, found, boxes, importance, fused = values
    pairs = {
        Key(*row[:3]): Pairs(np.array(row[3]), row[4], np.array(row[5]), row[6], np.array(row[7])) for row in listed
    }
    return Measured(id_, image, pairs, found, boxes, np.array(importance), None if fused is None else tuple(fused))
