"""Clipping by group, and learning rates that fall with depth."""

from pathlib import Path
from typing import Any

import pytest
import torch
from processor_batches import tiny_folder
from test_frame import slopes
from tiny import tiny_batch, tiny_model
from tiny_runs import error, run
from torch import Tensor
from updaters import adamw, cut, descent, make

from villa.engine.parameter_groups import layers_above, parameter_groups
from villa.errors import ConfigError
from villa.facts import DataFacts
from villa.models.base import Model
from villa.models.huggingface.config import HuggingFaceConfig
from villa.models.huggingface.model import HuggingFaceModel
from villa.models.lxmert import Lxmert, LxmertConfig
from villa.models.uniter.config import UniterConfig
from villa.models.uniter.model import Uniter

FACTS = DataFacts(vocab_size=30, num_labels=3, feature_dim=6)
SIZES: dict[str, Any] = {"hidden_size": 8, "num_heads": 2, "max_positions": 8}


def clipped(gradients: dict[str, Tensor], bounds: dict[str, float], rest: float | None) -> dict[str, Tensor]:
    """Gradients of the tiny model clipped by hand: by first part of the name."""
    made = {}
    for group in {name.partition(".")[0] if name.partition(".")[0] in bounds else "" for name in gradients}:
        names = [
            n for n in gradients if n.partition(".")[0] == group or (not group and n.partition(".")[0] not in bounds)
        ]
        norm = torch.cat([gradients[name].flatten() for name in names]).norm()
        bound = bounds.get(group, rest)
        scale = 1.0 if bound is None else min(1.0, bound / (norm.item() + 1e-6))
        made |= {name: gradients[name] * scale for name in names}
    return made


@pytest.mark.parametrize("rest", [None, 0.02])
@pytest.mark.parametrize("method", [descent, adamw])
def test_groups_are_clipped_by_their_own_norms(method: Any, rest: float | None) -> None:
    bounds = {"words": 0.01, "head": 100.0}
    ours, theirs = tiny_model(), tiny_model()
    updater, optimizer = make(ours, optimizer=method(ours), clip_norms=bounds, clip_norm=rest), method(theirs)
    for number in (1, 2):
        batch = tiny_batch(start=6 * number)
        gradients = slopes(theirs, batch)
        logs = updater.update(number, cut(batch, (4, 2)))
        for name, gradient in clipped(gradients, bounds, rest).items():
            theirs.get_parameter(name).grad = gradient
        optimizer.step()
        for group in bounds:
            norm = torch.cat([g.flatten() for n, g in gradients.items() if n.startswith(f"{group}.")]).norm()
            torch.testing.assert_close(logs[f"gradient_norm/{group}"].double(), norm)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-12)


def test_bounds_that_fit_nothing_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "training.clip_norms={word: 1}") == 2
    assert "training.clip_norms: no parameter is below 'word'" in error(capsys.readouterr().err)
    assert run(tmp_path, "training.clip_norms={words: 0}") == 2
    assert "training.clip_norms.words = 0.0 (command line): must be a finite number above 0" in error(
        capsys.readouterr().err
    )
    assert run(tmp_path, "training.clip_norms={words: 1}") == 0


def multipliers(model: Model, **options: Any) -> dict[str, float]:
    groups = parameter_groups(model, lr=2.0, weight_decay=0.1, **options)
    assert all(group["lr"] == group["initial_lr"] == 2.0 * group["lr_multiplier"] for group in groups)
    return {name: group["lr_multiplier"] for group in groups for name in group["names"]}


def test_rates_fall_from_the_head_to_the_embeddings_of_uniter() -> None:
    model, layers = Uniter.from_config(UniterConfig(**SIZES, num_layers=3, intermediate_size=16), FACTS), 3
    found = multipliers(model, layer_decay=0.5, head_lr_multiplier=10.0)
    for name, factor in found.items():
        parts = name.split(".")
        if "layer" in parts:
            assert factor == 0.5 ** (layers - int(parts[parts.index("layer") + 1])), name
        elif "embeddings" in name:
            assert factor == 0.5 ** (layers + 1), name
        elif name.startswith(tuple(model.head_prefixes())):
            assert factor == 10.0, name
        else:
            assert factor == 1.0, name  # the pooler
    assert {0.5**depth for depth in range(1, layers + 2)} <= {*found.values()}


def test_rates_of_lxmert_count_the_cross_layers_above_both_of_its_stacks() -> None:
    stages = {"language_layers": 3, "vision_layers": 2, "cross_layers": 2}
    above = layers_above(Lxmert.from_config(LxmertConfig(**SIZES, **stages), FACTS))
    depths = {}
    for stack in ("layer", "r_layers", "x_layers"):
        prefix = f"lxmert.encoder.{stack}."
        of = {int(n.removeprefix(prefix).partition(".")[0]): d for n, d in above.items() if n.startswith(prefix)}
        depths[stack] = [of[number] for number in sorted(of)]
    assert {stack: len(of) for stack, of in depths.items()} == {"layer": 3, "r_layers": 2, "x_layers": 2}
    cross = 2
    assert depths["x_layers"] == list(range(cross, 0, -1))
    for stack in ("layer", "r_layers"):
        assert depths[stack] == list(range(len(depths[stack]) + cross, cross, -1))
    most = max(map(max, depths.values())) + 1
    assert {above[n] for n in above if n.startswith("lxmert.embeddings.")} == {most}
    assert {above[n] for n in above if n.startswith("lxmert.encoder.visn_fc.")} == {most}
    assert {above[n] for n in above if n.startswith(("lxmert.pooler.", "logit_fc."))} == {0}


@pytest.mark.parametrize("name", ["llava", "clip"])
def test_rates_of_transformers_models_know_what_lies_behind_what(name: str, tmp_path: Path) -> None:
    """A language model reads what a vision model has seen; the two of a CLIP lie side by side."""
    path = tiny_folder(name, tmp_path)
    kind = HuggingFaceModel.from_config(
        HuggingFaceConfig(checkpoint=str(path)), DataFacts(task="generation" if name == "llava" else "contrastive")
    )
    above = {key.removeprefix("transformer."): value for key, value in layers_above(kind).items()}
    expected = {
        "llava": {
            "model.vision_tower.embeddings.patch_embedding.weight": 5,
            "model.vision_tower.encoder.layers.0.layer_norm1.weight": 4,
            "model.vision_tower.encoder.layers.1.layer_norm1.weight": 3,
            "model.vision_tower.post_layernorm.weight": 3,
            "model.multi_modal_projector.linear_1.weight": 3,
            "model.language_model.embed_tokens.weight": 3,
            "model.language_model.layers.0.input_layernorm.weight": 2,
            "model.language_model.layers.1.input_layernorm.weight": 1,
            "model.language_model.norm.weight": 0,
            "lm_head.weight": 0,
        },
        "clip": {
            "logit_scale": 0,
            **{
                f"{side}_model.{part}": depth
                for side in ("text", "vision")
                for part, depth in (("encoder.layers.0.mlp.fc1.weight", 2), ("encoder.layers.1.mlp.fc1.weight", 1))
            },
            "text_model.embeddings.token_embedding.weight": 3,
            "vision_model.pre_layrnorm.weight": 3,
            "text_model.final_layer_norm.weight": 0,
            "vision_model.post_layernorm.weight": 0,
            "text_projection.weight": 0,
        },
    }[name]
    assert {key: above[key] for key in expected} == expected


def test_a_model_without_layers_is_refused_and_1_is_what_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="AverageModel has no list of layers; set it to 1"):
        parameter_groups(tiny_model(), lr=1.0, weight_decay=0.0, layer_decay=0.9)
    assert multipliers(tiny_model(), layer_decay=1.0) == multipliers(tiny_model())
    for value in ("0", "1.1", "nan"):
        assert run(tmp_path, f"optimizer.layer_decay={value}") == 2
        assert "give a number above 0 and at most 1" in error(capsys.readouterr().err)
