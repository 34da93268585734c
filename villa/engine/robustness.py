"""``run_type=robustness``: attacks on a trained model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from villa.analysis.checks import checks, extra_cases
from villa.analysis.report import (
    EXAMPLES,
    REPHRASED,
    SHIFTS_FIGURE,
    curves,
    draw_shifts,
    mean_shift,
    rephrasing_line,
    rephrasing_summary,
    shift_summary,
    shift_table,
    summary,
    tables,
    verdicts,
    worst,
    worst_texts,
    write,
)
from villa.analysis.robustness import Case, Outcome
from villa.analysis.shifts import SEVERITIES
from villa.checkpoints.layout import CONFIG, UNFINISHED
from villa.config.schema import RunConfig
from villa.distributed.strategy import strategy_of
from villa.engine.attacking import Attacked, Attacks
from villa.engine.inference import restore_parts
from villa.engine.report import about_split, protocol
from villa.engine.run_folder import claim, mark_finished, saved_yaml
from villa.engine.setup import Parts
from villa.errors import ConfigError, DataError
from villa.evaluation.results import print_table
from villa.files import atomic_write, from_home, room_for, sha256
from villa.progress import track
from villa.registry import SHIFT_GROUPS, TRAINERS, expand_shifts
from villa.rng import derive_seed
from villa.trainers.base import Trainer


def robustness(config: RunConfig) -> int:
    """Attack a trained model; write ``robustness.json``, tables and a figure to ``output_dir``.

    A run that was interrupted goes on if it is started again with the same ``output_dir``.
    """
    processes = strategy_of(config.distributed).connect()
    folder = Path(config.output_dir)
    resumes = (folder / UNFINISHED).is_file()
    with claim(folder, resume=resumes, trains=False, processes=processes):
        parts, source = restore_parts(config)
        parts.distribute()
        run = _Run(parts, folder, source.update)
        run.attack()
        if not processes.is_main:
            return 0
        run.report()
        atomic_write(folder / CONFIG, saved_yaml(config))
        (folder / UNFINISHED).unlink()
        mark_finished(config)
    print(f"written to {folder}")
    return 0


class _Run:
    """Attacks on one model.

    Args:
        parts: the model and its data.
        folder: where results go.
        update: update of the checkpoint.
    """

    def __init__(self, parts: Parts, folder: Path, update: int) -> None:
        self.parts, self.folder, self.update = parts, folder, update
        self.config, self.processes = parts.config.robustness, parts.strategy.processes
        self.attacks = Attacks(parts, self.config)
        self.cases, self.metric = self.attacks.cases, self.attacks.metric
        wanted = [case for case in self.cases if (case.attack, case.loss) == ("pgd", "task")]
        self.checked = {case.modality: case for case in wanted} if self.config.checks else {}
        extras = [case for main in self.checked.values() for case in extra_cases(main) if case is not None]
        self.shifts: dict[str, dict[int, dict[str, float]]] = {}
        for name in expand_shifts(self.config.shifts):
            self.attacks.shift(name)
        file = self.config.text.rephrasings
        self.rephrasings = None if file is None else self.attacks.rephrasings(from_home(file))
        self.rephrased: dict[str, list[float]] = {}
        self.all_cases = list(dict.fromkeys([*self.cases, *extras]))

    def attack(self) -> None:
        """Run all attacks, or the rest of them."""
        if self.processes.is_main:
            for warning in about_split(self.config.split, self.attacks.split):
                print(f"note: {warning}")
        self.clean, attacked, seconds = self.attacks.run_clean()
        if self.processes.is_main:
            print(self._plan(attacked, seconds), flush=True)
        notes = _Notes(self.folder / UNFINISHED, self._facts(), self.all_cases)
        self.processes.barrier()  # every process has read what there is
        with notes.open(self.processes.is_main) as file:
            work = [(c, part) for c in self.all_cases for part in self.attacks.work(c, notes.missing(c, attacked))]
            for case, part in track(work, "attack", mode=self.parts.config.logging.progress):
                notes.add(case, self.attacks.run(case, part), file)
        names = [(name, severity) for name in expand_shifts(self.config.shifts) for severity in SEVERITIES]
        for name, severity in track(names, "shift", mode=self.parts.config.logging.progress):
            self.shifts.setdefault(name, {})[severity] = self.attacks.shifted(name, severity)
        self.shifts |= {
            name: mean_shift([self.shifts[member] for member in members])
            for name, members in SHIFT_GROUPS.items()
            if set(members) <= set(self.shifts)
        }
        if self.rephrasings is not None:
            self.rephrased = self.attacks.rephrased(self.rephrasings)
        self.outcomes = {case: [notes.found[case][one.id] for one in attacked] for case in self.all_cases}

    def report(self) -> None:
        """Write the results, and print a table."""
        own = {case: self.outcomes[case] for case in self.cases}
        found = curves(own, self.clean)
        verdict = {name: checks(main, self.outcomes, self.clean.losses) for name, main in self.checked.items()}
        config = self.parts.config
        trainer: Trainer = TRAINERS.get(config.trainer.name)(config.trainer)
        cost = trainer.relative_cost(config.dataset.objectives())
        run = {"name": config.name, "method": config.trainer.name, "seed": config.seed, "cost": cost}
        content = summary(own, self.clean, found, verdict, self._facts(), self.metric) | {"run": run}
        if self.shifts:
            content["shifts"] = shift_summary(self.shifts, self.clean)
        if self.rephrasings is not None:
            content["rephrasings"] = rephrasing_summary(self.rephrased, self.clean)
            self._write_rephrasings(self.rephrasings)
        name = config.name
        write(self.folder, content, found, self.config.norm, name)
        self._write_examples(own)
        if self.shifts:
            draw_shifts(content["shifts"], content["clean"], self.metric, self.folder / SHIFTS_FIGURE, name)
        for shown in tables(found, content["clean"], self.metric, f"{name}, {self.config.split}"):
            print_table(shown)
        if self.shifts:
            print_table(shift_table(content["shifts"], self.metric))
        if self.rephrasings is not None:
            print(rephrasing_line(content["rephrasings"], self.metric))
        for line in verdicts(verdict):
            print(line)

    def _plan(self, attacked: Sequence[Attacked], seconds: float) -> str:
        """Return what is ahead: examples, attacks, passes, and about how long they take at most."""
        passes = [self.attacks.most_passes(case, attacked) for case in self.all_cases]
        forwards, backwards = map(sum, zip(*passes, strict=True))
        minutes = len(attacked) * seconds * (forwards + 2 * backwards) / 60
        of_words, extra = sum(case.changes_words for case in self.cases), len(self.all_cases) - len(self.cases)
        counts = {
            f"attacks at {len(self.config.radii)} radii": len(self.cases) - of_words,
            f"attacks on words with {len(self.config.text.budgets)} budgets": of_words,
            "checks": extra,
        }
        work = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
        return (
            f"{len(self.clean.scores)} examples, {len(attacked)} of them right; {work}: at most {forwards:,} forward "
            f"and {backwards:,} backward passes an example, about {minutes:.1f} minutes"
        )

    def _facts(self) -> dict[str, Any]:
        options = asdict(self.config)
        if self.config.source is not None:  # results hold no path
            options["source"] = derive_seed("source", self.config.source)
        text = self.config.text
        if text.masked_lm is not None:
            options["text"]["masked_lm"] = derive_seed("masked_lm", text.masked_lm)
        for name, path in (("synonyms", text.synonyms), ("rephrasings", text.rephrasings)):
            options["text"][name] = None if path is None else sha256(from_home(path))
        return {**asdict(protocol(self.parts, self.update, "given")), "robustness": options}

    def _write_examples(self, own: Mapping[Case, Sequence[Outcome]]) -> None:
        """Write a line for each example and modality: its score without an attack, and the worst by radius.

        Of changes of words also the text as it is and, for each budget, the worst one and the attack that found it.
        """
        lines = []
        for modality in dict.fromkeys(case.modality for case in own):
            its = {case: outcomes for case, outcomes in own.items() if case.modality == modality}
            radii, texts = next(iter(its)).radii, worst_texts(its)
            lowest = worst(its, self.clean, len(radii))
            for (id_, clean), scores in zip(self.clean.scores.items(), lowest, strict=True):
                line = {"id": id_, "modality": modality, "clean": clean, "radii": radii, "worst": scores}
                lines.append(json.dumps(line | texts.get(id_, {}), ensure_ascii=False))
        atomic_write(self.folder / EXAMPLES, "".join(f"{line}\n" for line in lines))

    def _write_rephrasings(self, rephrasings: Mapping[str, Sequence[str]]) -> None:
        """Write a line for each example: its score, and those of its other wordings."""
        lines = [
            {"id": id_, "clean": self.clean.scores[id_], "texts": list(rephrasings[id_]), "scores": scores}
            for id_, scores in self.rephrased.items()
        ]
        atomic_write(self.folder / REPHRASED, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))


class _Notes:
    """Outcomes that are known, kept in a file so that an interrupted run goes on.

    Args:
        path: the file: a line of what the outcomes depend on, and one for each outcome.
        facts: what they depend on.
        known: the cases of the run.

    Attributes:
        found: outcomes by case and example.

    Raises:
        ConfigError: the file is of another run.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], known: Sequence[Case]) -> None:
        self.path, self.facts = path, json.dumps(facts, sort_keys=True)
        self.found: dict[Case, dict[str, Outcome]] = {case: {} for case in known}
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []  # the last may be cut off
        if lines and lines[0] != self.facts:
            raise ConfigError(
                f"output_dir '{path.parent}' holds attacks that were interrupted, of another model or with other "
                "options (robustness.*); give the same ones, or another output_dir"
            )
        self._lines = len(lines)
        try:
            for line in lines[1:]:
                place, outcome = json.loads(line)
                one = Outcome(**outcome)
                self.found[known[place]][one.id] = one
        except (ValueError, TypeError, IndexError) as error:
            raise DataError(f"'{path}' is damaged; remove it, and the attacks begin anew") from error

    def missing(self, case: Case, attacked: Sequence[Attacked]) -> list[Attacked]:
        """Return the examples of a case without an outcome."""
        return [one for one in attacked if one.id not in self.found[case]]

    @contextmanager
    def open(self, writes: bool) -> Iterator[TextIO | None]:
        """Open the file to add outcomes; None if another process writes them."""
        if not writes:
            yield None
            return
        kept = "".join(f"{line}\n" for line in self._kept())
        atomic_write(self.path, kept)
        with room_for(self.path), self.path.open("a", encoding="utf-8") as file:
            yield file

    def add(self, case: Case, outcomes: Sequence[Outcome], file: TextIO | None) -> None:
        """Add outcomes."""
        self.found[case] |= {one.id: one for one in outcomes}
        if file is not None and outcomes:
            place = list(self.found).index(case)
            file.writelines(f"{json.dumps([place, asdict(one)])}\n" for one in outcomes)
            file.flush()

    def _kept(self) -> Iterator[str]:
        """Yield the lines of what is known, without one that was cut off."""
        yield self.facts
        for place, outcomes in enumerate(self.found.values()):
            yield from (json.dumps([place, asdict(one)]) for one in outcomes.values())
