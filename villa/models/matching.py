"""Rows of weights that stand for word-pieces and labels, brought by name from a checkpoint's order into the data's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from villa.checkpoints.load_report import listed
from villa.errors import CheckpointError
from villa.facts import DataFacts, RowKind

#: What transformers calls labels that nobody has named, and numbers, which data without names have.
_GENERIC, _NUMBER = re.compile(r"LABEL_(\d+)"), re.compile(r"(?:LABEL_)?(\d+)")
#: Facts of reading that no weights can be used without.
_DECISIVE = ("feature extractor", "kind of tokenizer")
_SPECIAL = ("[CLS]", "[SEP]", "[MASK]")
_WORDS: dict[RowKind, str] = {"tokens": "word-pieces", "labels": "labels"}
_FRESH = -1
#: Vocabularies are brought to a multiple of one of these.
_PADDED = (8, 16, 32, 64, 128, 256, 512)

Name = str | None


class Matching:
    """What is named beside weights, against what the data name.

    Args:
        source: where the weights come from, for messages.
        given: what is known beside them; with ``vocab_size``, its tokens are only those of as many rows.
        wanted: the facts of the data.

    Raises:
        CheckpointError: the data are read in a way that these weights are certainly of no use for.
    """

    def __init__(self, source: str, given: DataFacts, wanted: DataFacts) -> None:
        self.source, self.given = source, given
        counted = _counted(given.labels, wanted.labels)
        self._numbered = counted is not None
        self.wanted = wanted = wanted if counted is None else replace(wanted, labels=counted)
        self._names: dict[RowKind, tuple[Sequence[Name] | None, Sequence[Name] | None]] = {
            "tokens": (given.tokens, wanted.tokens),
            "labels": (_usable(given.labels, wanted.labels), _usable(wanted.labels, given.labels)),
        }
        self._check()

    def names(self, kind: RowKind) -> bool:
        """Whether both sides name their rows."""
        return None not in self._names[kind]

    def moves(self, kind: RowKind) -> bool:
        """Whether both sides name their rows, and not alike."""
        given, wanted = self._names[kind]
        return given is not None and wanted is not None and tuple(given) != tuple(wanted)

    def rows(self, kind: RowKind, given: int, wanted: int) -> Tensor | None:
        """For each of ``wanted`` rows of the model the row among ``given`` of the file, -1 for a fresh one: int64.

        Rows that neither side names (of a vocabulary that is padded) are matched by their place. None where the rows
        stay as they are.
        """
        theirs, ours = self._names[kind]
        if theirs is None or ours is None or (given == wanted and not self.moves(kind)):
            return None
        named = self.given.vocab_size if kind == "tokens" else len(theirs)
        if named is not None and given != named and not (kind == "tokens" and _is_padded(named, given)):
            return None
        if kind == "labels" and len(ours) != wanted:
            return None
        theirs, ours = _filled(theirs, given), _filled(ours, wanted)
        places = {name: row for row, name in enumerate(theirs) if name is not None}
        found = [
            (row if row < given and theirs[row] is None else _FRESH) if name is None else places.get(name, _FRESH)
            for row, name in enumerate(ours)
        ]
        if kind == "labels":
            _match_spelling(found, theirs, ours)
        return torch.tensor(found)

    def place(
        self, weights: MutableMapping[str, Tensor], fresh: Mapping[str, Tensor], rows: Mapping[str, RowKind]
    ) -> None:
        """Put the rows of weights into the order of the model's names, in place.

        A tensor without a row of a known label is left out, and so stays fresh.

        Args:
            weights: what the file holds, under the model's names.
            fresh: the model's own values, which new rows keep.
            rows: what the rows of parameters stand for (``Model.named_rows``).

        Raises:
            CheckpointError: no word-piece is known on both sides.
        """
        for name, kind in rows.items():
            if name not in weights or name not in fresh or not weights[name].dim():
                continue
            given, ours = weights[name], fresh[name]
            found = self.rows(kind, len(given), len(ours)) if given.shape[1:] == ours.shape[1:] else None
            if found is None:
                continue
            known = found >= 0
            if not known.any():
                if kind == "tokens":
                    raise CheckpointError(
                        f"'{self.source}' has no word-piece in common with the data; read them by its own tokenizer"
                    )
                del weights[name]
                continue
            placed = ours.clone()
            placed[known] = given[found[known]].to(ours)
            weights[name] = placed

    def notes(
        self, loaded: Mapping[str, Tensor], fresh: Mapping[str, Tensor], rows: Mapping[str, RowKind]
    ) -> tuple[str, ...]:
        """Say what became of the rows that were named, or what was assumed of those that were not.

        Args:
            loaded: tensors of the file under the model's names, before they were put in order.
            fresh: the model's own values.
            rows: see ``place``.
        """
        both = [(name, kind) for name, kind in rows.items() if name in loaded and name in fresh and fresh[name].dim()]
        kinds = {kind: (len(loaded[name]), len(fresh[name])) for name, kind in both if loaded[name].dim()}
        moved = [kind for kind, sizes in kinds.items() if self.moves(kind) or self.rows(kind, *sizes) is not None]
        notes = [self._moved(kind, *kinds[kind]) for kind in moved]
        if self._numbered and "labels" in kinds:
            notes.append(f"the data's labels are numbers: 0 is taken to be '{(self.given.labels or ())[0]}', and so on")
        return (*notes, *self._assumed([kind for kind in kinds if kind not in moved]))

    def reading(self) -> tuple[str, ...]:
        """Say what is read otherwise than it was when the weights were trained."""
        both = ((fact, self.given.reading.get(fact), value) for fact, value in self.wanted.reading.items())
        return tuple(
            f"{fact} {before} in training, {now} in the data" for fact, before, now in both if before not in (None, now)
        )

    def _check(self) -> None:
        before, now = self.given.reading, self.wanted.reading
        for fact in _DECISIVE:
            if None not in (before.get(fact), now.get(fact)) and before[fact] != now[fact]:
                raise CheckpointError(
                    f"'{self.source}' was trained with the {fact} '{before[fact]}', but the data are read with "
                    f"'{now[fact]}'; use that of the checkpoint"
                )
        theirs, ours = _special(self.given), _special(self.wanted)
        other = next((token for token in theirs if token in ours and theirs[token] != ours[token]), None)
        if other is not None and not self.moves("tokens"):
            raise CheckpointError(
                f"'{self.source}' was trained with {other} as word-piece {theirs[other]}, but it is {ours[other]} in "
                "the data: they were made with another tokenizer; make them with that of the checkpoint"
            )

    def _moved(self, kind: RowKind, given: int, wanted: int) -> str:
        theirs, ours = self._names[kind]
        assert theirs is not None
        assert ours is not None
        found = self.rows(kind, given, wanted)
        if found is None:
            return (
                f"{len(theirs)} names for {given} {_WORDS[kind]} of the file: rows are taken to be in the data's order"
            )
        ours = _filled(ours, wanted)
        named = [row for row, name in enumerate(ours) if name is not None]
        fresh = [f"'{ours[row]}'" for row in named if found[row] < 0]
        used = set(found.tolist())
        unused = [f"'{name}'" for row, name in enumerate(theirs[:given]) if name is not None and row not in used]
        pairs = zip(found.tolist(), ours, strict=True)
        changed = [f"'{theirs[row]}' as '{name}'" for row, name in pairs if _is_renamed(theirs, row, name)]
        parts = [f"{_WORDS[kind]} by name: {len(named) - len(fresh)} of {len(named)}"]
        if len(fresh) == len(named):
            parts[0] = f"no {_WORDS[kind]} in common with the file: the last layer of the head is fresh"
        elif fresh:
            parts.append(f"fresh: {listed(fresh)}")
        if unused:
            parts.append(f"not used: {listed(unused)}")
        if changed:
            parts.append(f"spelt otherwise: {listed(changed)}")
        if not self.moves(kind):
            parts.append(f"the file has {given} rows, the model {wanted}")
        elif len(parts) == 1:
            parts[0] += ", in another order"
        return "; ".join(parts)

    def _assumed(self, kinds: Sequence[RowKind]) -> list[str]:
        """What is taken for granted about rows that are not named on both sides."""
        lacking: dict[str, list[str]] = {}
        for kind in kinds:
            theirs, ours = self._names[kind]
            if (theirs is not None and ours is not None) or self._known_alike(kind):
                continue
            where = "file" if theirs is None else "data"
            lacking.setdefault(where, []).append(_WORDS[kind])
        orders = {"file": "data's", "data": "file's"}
        return [
            f"no names in the {where}: rows of {' and '.join(what)} are taken to be in the {orders[where]} order"
            for where, what in lacking.items()
        ]

    def _known_alike(self, kind: RowKind) -> bool:
        """Whether there is nothing to assume: no labels at all, or tokenizers of the same name."""
        if kind == "labels":
            return self.wanted.labels is None and self.given.labels is None
        named = self.given.reading.get("tokenizer")
        return named is not None and named == self.wanted.reading.get("tokenizer")


def _usable(labels: Sequence[str] | None, others: Sequence[str] | None) -> Sequence[str] | None:
    """Labels that can be told from each other by their names; None where they have none, or not each its own.

    ``LABEL_0``, ... are names where the other side has such, too, or numbers among theirs: a number may mean another
    row where counting starts with 1.
    """
    if not labels or len(set(labels)) < len(labels):
        return None
    if not all(map(_GENERIC.fullmatch, labels)) or (others and all(map(_GENERIC.fullmatch, others))):
        return labels
    ours, theirs = _numbers(labels), _numbers(others or ())
    return labels if theirs and (ours <= theirs or theirs <= ours) else None


def _counted(given: Sequence[str] | None, wanted: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names that labels of the data mean which are the numbers 0, 1, ... of those of the file; else None."""
    if not given or not wanted or len(given) != len(wanted) or {*wanted} != {str(row) for row in range(len(given))}:
        return None
    named = not any(map(_NUMBER.fullmatch, given)) and len({*given}) == len(given)
    return tuple(given[int(label)] for label in wanted) if named else None


def _numbers(labels: Sequence[str]) -> set[int]:
    """The numbers that labels are; none if one is another word."""
    found = [_NUMBER.fullmatch(label) for label in labels]
    return {int(match[1]) for match in found if match} if all(found) else set()


def _is_padded(rows: int, given: int) -> bool:
    """Whether a table of ``rows`` was brought to a size that is fast to compute with."""
    return any(given == -(-rows // size) * size for size in _PADDED)


def _filled(names: Sequence[Name], rows: int) -> list[Name]:
    """One name a row."""
    return [*names[:rows], *[None] * (rows - len(names))]


def _match_spelling(found: list[int], theirs: Sequence[Name], ours: Sequence[Name]) -> None:
    """Find labels that differ in case, white space around them or ``LABEL_``, where it is clear which is meant."""
    used, alike = set(found), Counter(map(_folded, ours))
    left: dict[str, list[int]] = {}
    for row, name in enumerate(theirs):
        if name is not None and row not in used:
            left.setdefault(_folded(name), []).append(row)
    for row, name in enumerate(ours):
        if found[row] == _FRESH and name is not None and alike[_folded(name)] == 1:
            rows = left.get(_folded(name), [])
            found[row] = rows[0] if len(rows) == 1 else _FRESH


def _folded(name: Name) -> str:
    name = (name or "").strip()
    number = _GENERIC.fullmatch(name)
    return number[1] if number else name.casefold()


def _is_renamed(theirs: Sequence[Name], row: int, name: Name) -> bool:
    return 0 <= row < len(theirs) and theirs[row] is not None and theirs[row] != name


def _special(facts: DataFacts) -> dict[str, int]:
    """Ids of the special word-pieces of BERT, as far as they are known."""
    if facts.tokens is not None:
        return {token: facts.tokens.index(token) for token in _SPECIAL if token in facts.tokens}
    return {token: int(facts.reading[token]) for token in _SPECIAL if token in facts.reading}


#: What LoRA puts around a linear map; the rows of the first are not those of the map.
_ADAPTERS = ("lora_A", "lora_B")


def rows_of(module: nn.Module, words: Iterable[nn.Module], heads: Iterable[str]) -> dict[str, RowKind]:
    """Return what the rows of parameters stand for.

    Args:
        module: what the names are below.
        words: embeddings and decoders of word-pieces.
        heads: prefixes of the names of the head.
    """
    found: dict[str, RowKind] = dict.fromkeys(_of_words(module, words), "tokens")
    heads = tuple(heads)
    last = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear)
        and any(name == head or name.startswith(f"{head}.") for head in heads)
        and not {*_ADAPTERS} & {*name.split(".")}
    ]
    if last:
        found |= dict.fromkeys(_of_layer(module, last[-1]), "labels")
    return found


def _of_words(module: nn.Module, words: Iterable[nn.Module]) -> Iterator[str]:
    """Names of the weights of word embeddings and decoders, also where they are shared, and of the decoders' biases."""
    inner = {id(value): value for part in words for value in part.parameters(recurse=False)}
    named = dict(module.named_parameters(remove_duplicate=False))
    for name, value in named.items():
        if id(value) not in inner:
            continue
        yield name
        decoder = name.rpartition(".")[0]
        for beside in (f"{decoder}.bias", f"{decoder.rpartition('.')[0]}.bias"):
            if beside in named and named[beside].shape == value.shape[:1]:
                yield beside


def _of_layer(module: nn.Module, path: str) -> Iterator[str]:
    """Names of the parameters of a linear layer, and of what LoRA has put around it."""
    whole = path.removesuffix(".base_layer")
    size = module.get_parameter(f"{path}.weight").shape[0]
    for name, value in module.named_parameters(remove_duplicate=False):
        if name.startswith(f"{whole}.") and _ADAPTERS[0] not in name.split(".") and value.shape[0] == size:
            yield name
