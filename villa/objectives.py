"""The pre-training objectives by the names that recipes and batches use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from villa.batch import Batch
from villa.errors import ConfigError, DataError, nearest

#: Every objective with what a model predicts for it.
OBJECTIVES: Mapping[str, str] = {
    "mlm": "masked tokens",
    "mrfr": "the features of masked regions",
    "mrc": "the detector's classes of masked regions",
    "mrc_kl": "the detector's class distributions of masked regions",
    "itm": "whether text and image match",
    "itm_wra": "whether they match, with tokens and regions aligned by optimal transport",
    "qa": "the answer to a question",
    "contrastive": "which texts and images of a micro-batch match, each embedded separately",
    "lxmert": "all parts of LXMERT's pre-training objective",
}

#: The parts of LXMERT's pre-training objective, by the names of their targets.
LXMERT_PARTS = ("words", "matched", "objects", "attributes", "features", "answers")


def check_objectives(option: str, names: Iterable[str]) -> None:
    """Refuse unknown objectives.

    Args:
        option: the option that names them, for the message.
        names: the objectives.

    Raises:
        ConfigError: a name is unknown.
    """
    wrong = next((name for name in names if name not in OBJECTIVES), None)
    if wrong is not None:
        raise ConfigError(
            f"{option} names '{wrong}', which is not an objective{nearest(wrong, list(OBJECTIVES))} "
            f"(known: {', '.join(OBJECTIVES)})"
        )


def asked_parts(batch: Batch) -> list[str]:
    """Return the parts of the ``lxmert`` objective that a batch has targets for.

    Raises:
        DataError: it has targets for none.
    """
    given: Iterable[str] = batch.part_targets or ()
    asked = [name for name in LXMERT_PARTS if name in given]
    if not asked:
        found = next(iter(given), "")
        raise DataError(
            f"objective 'lxmert' needs targets of at least one part{nearest(found, list(LXMERT_PARTS))} "
            f"(known: {', '.join(LXMERT_PARTS)})"
        )
    return asked
