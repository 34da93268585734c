"""Training from Python: the command's results, callbacks, and interruptions that lose nothing."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import run

import villa
from villa.engine.loop import Callback, Training
from villa.errors import ConfigError
from villa.trainers.base import Logs

RECIPE: dict[str, Any] = {
    "model": {"name": "average", "hidden_size": 8},
    "dataset": {"name": "shapes", "examples": 32},
    "optimizer": {"lr": 0.01},
    "batch": {"examples": 8},
    "training": {"updates": 4},
    "logging": {"every": 1, "tensorboard": False, "figures": False, "progress": "off"},
}
BEEP = """
from dataclasses import dataclass
from villa import register_callback
from villa.engine.loop import Callback

@dataclass
class Options:
    word: str = "beep"
    every: int = 1

@register_callback("{name}")
class Beep(Callback):
    Config = Options

    def on_update(self, training, logs):
        if training.progress.update % self.config.every == 0:
            print(self.config.word, training.progress.update)
"""


class Told(Callback):
    """Keeps what it is told, and may end the process in the middle."""

    name = "told"

    def __init__(self, end: int | None = None) -> None:
        self.calls: list[Any] = []
        self.end = end

    def on_update(self, training: Training, logs: Logs) -> None:
        self.calls.append(training.progress.update)
        if training.progress.update == self.end:
            os.kill(os.getpid(), signal.SIGINT)

    def on_evaluation(self, training: Training, values: Mapping[str, float]) -> None:
        self.calls.append(dict(values))

    def on_checkpoint(self, training: Training, folder: Path) -> None:
        self.calls.append((folder.name, (folder / "manifest.json").is_file()))

    def state_dict(self) -> dict[str, Any]:
        return {"updates": [call for call in self.calls if isinstance(call, int)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.calls = [*state["updates"]]


def text(folder: Path) -> str:
    return (folder / "log.jsonl").read_text()


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command line."""
    folder = tmp_path_factory.mktemp("command") / "run"
    assert run(folder, "trainer=freelb", "evaluation.every=2") == 0
    return folder


def test_a_mapping_a_file_and_a_configuration_train_as_the_command_does(command: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"trainer": "freelb", "evaluation": {"every": 2}}
    trained = villa.train(RECIPE, output_dir=tmp_path / "mapping", **options)
    assert trained.finished
    assert trained.folder == tmp_path / "mapping"
    again = villa.train(str(command / "config.yaml"), output_dir=tmp_path / "file")
    changed = villa.train(trained.config, output_dir=tmp_path / "configuration", **{"optimizer.lr": 0.02})
    assert text(command) == text(trained.folder) == text(again.folder) != text(changed.folder)
    assert changed.config.optimizer.lr == 0.02
    assert trained.metrics == villa.Run(command).metrics
    assert {*trained.metrics} == {"val", "test"}
    records = trained.history
    assert [r["update"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4]
    assert trained.model.parts.config.trainer.name == "freelb"
    assert len(trained.plot().axes) >= 3


def test_callbacks_are_told_of_updates_evaluations_and_checkpoints(command: Path, tmp_path: Path) -> None:
    told = Told()
    trained = villa.train(
        RECIPE, output_dir=tmp_path / "run", trainer="freelb", evaluation={"every": 2}, callbacks=[told]
    )
    assert text(trained.folder) == text(command)
    assert [call if isinstance(call, int) else type(call) for call in told.calls] == [
        1,
        dict,
        2,
        tuple,
        3,
        dict,
        4,
        tuple,
    ]
    values = [
        {k: v for k, v in record.items() if k not in ("update", "kind")}
        for record in trained.history
        if record["kind"] == "val"
    ]
    assert told.calls[1::4] == values
    assert told.calls[3::4] == [("update_00000002", True), ("update_00000004", True)]


def test_an_interrupt_leaves_a_run_that_goes_on_to_the_same_end(
    command: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = villa.train(
        RECIPE, output_dir=tmp_path / "run", trainer="freelb", evaluation={"every": 2}, callbacks=[Told(end=3)]
    )
    assert not stopped.finished
    assert repr(stopped).endswith("not finished)")
    assert stopped.metrics == {}
    assert "ended by SIGINT after update 3" in capsys.readouterr().out
    told = Told()
    resumed = stopped.resume(callbacks=[told])
    assert resumed.finished
    assert text(resumed.folder) == text(command)
    assert told.state_dict() == {"updates": [1, 2, 3, 4]}


def test_stages_are_runs_of_their_own(tmp_path: Path) -> None:
    trained = villa.train(
        {"name": "both", "stages": [{**RECIPE, "name": "one"}, {**RECIPE, "name": "two"}]},
        output_dir=tmp_path / "both",
        training={"updates": 2},
    )
    assert [stage.folder.name for stage in trained.stages] == ["stage1_one", "stage2_two"]
    assert trained.folder == trained.stages[-1].folder
    assert all(stage.finished for stage in trained.stages)


def test_a_recipe_names_registered_callbacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("beep_one", "beep_two"):
        (tmp_path / f"{name}.py").write_text(BEEP.replace("{name}", name))
    recipe = {
        **RECIPE,
        "user_dir": str(tmp_path / "beep_one.py"),
        "callbacks": {"beep_one": {"word": "one", "every": 2}},
    }
    options: dict[str, Any] = {"user_dir": str(tmp_path / "beep_two.py"), "callbacks.beep_two": True}
    trained = villa.train(recipe, output_dir=tmp_path / "run", **options)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("one ", "beep "))]
    assert said == ["beep 1", "one 2", "beep 2", "beep 3", "one 4", "beep 4"]
    assert trained.config.user_dir == [str(tmp_path / "beep_one.py"), str(tmp_path / "beep_two.py")]
    assert trained.config.callbacks == {"beep_one": {"word": "one", "every": 2}, "beep_two": True}
    assert villa.Run(trained.folder).config.callbacks == trained.config.callbacks


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A module with a callback, which can be imported once."""
    path = tmp_path_factory.mktemp("late") / "late_beep.py"
    path.write_text(BEEP.replace("{name}", "late"))
    return str(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callbacks.none": True}, r"callbacks.none = true \(command line\): no callback is called 'none'"),
        ({"callbacks.late": 3}, r"callbacks.late = 3 \(command line\): give true, false, or a mapping of options"),
        ({"callbacks.late.ever": 3}, "callback 'late' has no option 'ever'; did you mean 'every'"),
        ({"callbacks.late.every": "x"}, r"every = 'x' \(callbacks.late\): must be an integer"),
        ({"run_type": "test", "checkpoint.path": "x"}, "run_type is 'test', which does not train"),
    ],
)
def test_mistakes_are_one_line(late: str, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        villa.train({**RECIPE, "user_dir": late}, output_dir=tmp_path / "run", **options)


def test_two_callbacks_need_two_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two callbacks are called 'told'"):
        villa.train(RECIPE, output_dir=tmp_path / "run", callbacks=[Told(), Told()])
    assert not (tmp_path / "run").exists()


def test_other_processes_get_no_objects(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="launcher=local starts other processes"):
        villa.train(RECIPE, output_dir=tmp_path / "run", launcher="local", callbacks=[Told()])
