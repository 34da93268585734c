"""Learning rate schedules: pure functions of the update, so that resuming needs no state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.optim import Optimizer

from villa.errors import ConfigError
from villa.registry import register_scheduler

#: Updates whose learning rate is checked in advance, and the share of updates without effect that causes a warning.
_LOOKED_AT, _MANY = 10_000, 0.1


@dataclass
class ScheduleConfig:
    """Options of every schedule.

    Attributes:
        name: the registered name.
        warmup: updates of linear warm-up; a number below 1 is a share of all updates.
        floor: smallest learning rate (before a group's multiplier). The released code never goes below 1e-8.
        total: updates of the whole schedule, where this run is a part of it; None: those of this run.
        before: updates of the schedule that an earlier run has done.
    """

    name: str = "linear"
    warmup: int | float = 0
    floor: float = 0.0
    total: int | None = None
    before: int = 0

    def check(self) -> None:
        """Check the ranges of all values.

        Raises:
            ConfigError: a value is out of its range.
        """
        if not (self.warmup >= 0 and (self.warmup < 1 or float(self.warmup).is_integer())):
            raise ConfigError(
                f"scheduler.warmup is {self.warmup}; give a whole number of updates, or a share of them below 1"
            )
        if not 0 <= self.floor < math.inf:
            raise ConfigError(f"scheduler.floor is {self.floor}; give a learning rate of 0 or more")
        if self.before < 0 or (self.total is not None and self.total <= self.before):
            raise ConfigError(
                f"scheduler.before is {self.before} and scheduler.total {self.total}; give at least 0, and more in all "
                "than before"
            )


class Schedule(ABC):
    """A learning rate schedule over the updates of a run.

    Args:
        config: an instance of ``Config``.
        total: number of updates of the run.

    Attributes:
        total: number of updates of the whole schedule.
        warmup: updates of warm-up; may exceed ``total`` (a short trial of a long recipe), so that the full learning
            rate is never reached.
    """

    Config: ClassVar[type[ScheduleConfig]] = ScheduleConfig

    def __init__(self, config: Any, total: int) -> None:
        config.check()
        self.config: ScheduleConfig = config
        self.total: int = config.total or total + config.before
        self.warmup = round(config.warmup * self.total) if config.warmup < 1 else int(config.warmup)

    def factor(self, update: int) -> float:
        """Return the share of the base learning rate in ``update`` (1 to ``total``)."""
        return update / self.warmup if update <= self.warmup else self.decay(update)

    @abstractmethod
    def decay(self, update: int) -> float:
        """Return the share of the base learning rate after the warm-up."""

    def lr(self, base_lr: float, update: int) -> float:
        """Return the learning rate of the run's ``update``: base rate times factor, at least the floor."""
        return max(base_lr * self.factor(self.config.before + update), self.config.floor)

    def warnings(self, base_lr: float, updates: int) -> list[str]:
        """Return one-line warnings: many updates have no effect, or the base learning rate is far off.

        Args:
            base_lr: the base learning rate, above 0.
            updates: number of updates of the run.
        """
        step = -(-updates // _LOOKED_AT)
        rates = [self.lr(base_lr, update) for update in range(1, updates + 1, step)]
        idle, highest = step * rates.count(0.0), max(rates)
        if not highest:
            return [
                f"no update moves anything: the learning rate of scheduler '{self.config.name}' is 0 in all {updates:,}"
            ]
        if idle >= _MANY * updates:
            about = "about " * (step > 1)
            return [f"{about}{idle:,} of {updates:,} updates move nothing: their learning rate is 0"]
        if self.warmup > self.total and highest < base_lr:
            return [
                f"the warm-up ({self.warmup:,} updates) is longer than the run: the learning rate reaches "
                f"{highest:.2g}, not {base_lr:.2g}"
            ]
        return []

    def apply(self, optimizer: Optimizer, update: int) -> None:
        """Set the learning rate of every group (made by ``parameter_groups``) for ``update``."""
        lr = self.lr(optimizer.defaults["lr"], update)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]

    def progress(self, update: int) -> float:
        """Return the share in [0, 1] of the updates after the warm-up done by ``update``."""
        return min((update - self.warmup) / max(self.total - self.warmup, 1), 1.0)


@register_scheduler("linear")
class LinearSchedule(Schedule):
    """Linear decay to zero at the last update (BERT; what VILLA's recipes use)."""

    def decay(self, update: int) -> float:
        """Return a factor that falls linearly."""
        return max(self.total - update, 0) / max(self.total - self.warmup, 1)


@register_scheduler("warmup_linear")
class WarmupLinearSchedule(LinearSchedule):
    """Linear warm-up and decay that counts updates from 0, as ``BertAdam`` does: the first one moves nothing."""

    def factor(self, update: int) -> float:
        """Return the factor, without rounding a warm-up that is given as a share of the updates."""
        step, given = update - 1, self.config.warmup
        warmup = given * self.total if given < 1 else given
        return step / warmup if step < warmup else max(self.total - step, 0) / max(self.total - warmup, 1)


@register_scheduler("cosine")
class CosineSchedule(Schedule):
    """Half a cosine wave down to zero at the last update."""

    def decay(self, update: int) -> float:
        """Return a factor that falls as a half cosine."""
        return 0.5 * (1.0 + math.cos(math.pi * self.progress(update)))


@register_scheduler("constant")
class ConstantSchedule(Schedule):
    """The base learning rate."""

    def decay(self, update: int) -> float:
        """Return 1."""
        return 1.0


@register_scheduler("noam")
class NoamSchedule(Schedule):
    """Decay with the inverse square root of the update, from 1 at the end of the warm-up (Transformer)."""

    def decay(self, update: int) -> float:
        """Return the inverse square root of the update, relative to the end of the warm-up."""
        return math.sqrt(max(self.warmup, 1) / update)
