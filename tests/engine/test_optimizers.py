from __future__ import annotations

import copy
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from villa.batch import Batch
from villa.engine.optimizers import BertAdamW
from villa.engine.parameter_groups import parameter_groups
from villa.errors import ConfigError
from villa.facts import DataFacts
from villa.models.base import Model, ModelOutput
from villa.registry import OPTIMIZERS

GOLDEN = Path(__file__).parents[1] / "golden" / "misc"
GROUPS = json.loads((GOLDEN / "parameter_groups.json").read_text())
NAMES = ("adamw", "adam", "adamax", "bert_adamw")
FUSED = ("adamw", "adam", "bert_adamw", "bert_adam")


class NamedParameters(Model):
    """A model that has parameters of the given names and shapes, and its head below ``head``."""

    def __init__(self, shapes: dict[str, list[int]], head: tuple[str, ...]) -> None:
        super().__init__()
        self.head_names = head
        for name, shape in shapes.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(torch.randn(shape)))

    @classmethod
    def from_config(cls, config: Any, facts: DataFacts) -> NamedParameters:
        return cls({}, ())

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        return ModelOutput(sum(parameter.square().sum() for parameter in self.parameters()) * torch.ones(1, 1))

    def perturbation_points(self) -> dict[str, Any]:
        return {}

    def head_prefixes(self) -> tuple[str, ...]:
        return self.head_names


def small_model() -> NamedParameters:
    shapes = {f"body.layer.{i}.{n}": s for i in (0, 1, 10) for n, s in (("weight", [3, 2]), ("bias", [3]))}
    return NamedParameters({**shapes, "head.weight": [4, 3], "head.bias": [4]}, ("head.",))


def build(name: str, model: Model, **options: Any) -> torch.optim.Optimizer:
    factory = OPTIMIZERS.get(name)
    optimizer: torch.optim.Optimizer = factory(factory.Config(name=name, **options)).build(model)
    return optimizer


def multipliers(model: Model, **options: Any) -> dict[str, float]:
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, **options)
    return {name: group["lr_multiplier"] for group in groups for name in group["names"]}


@pytest.mark.parametrize(("task", "head", "multiplier"), [("villa_vqa", "vqa_output", 10.0), ("villa_nlvr2", "", 1.0)])
def test_released_grouping_equals_the_released_code(task: str, head: str, multiplier: float) -> None:
    model = NamedParameters(GROUPS[task]["shapes"], (head,))
    groups = parameter_groups(model, lr=5e-4, weight_decay=0.01, grouping="released", head_lr_multiplier=multiplier)
    expected = GROUPS[task]["groups"]
    assert [group["weight_decay"] for group in groups] == [group["weight_decay"] for group in expected]
    assert [group["initial_lr"] for group in groups] == pytest.approx([group["lr"] for group in expected])
    for group, reference in zip(groups, expected, strict=True):
        assert set(group["names"]) == set(reference["names"])
        assert [id(p) for p in group["params"]] == [id(model.get_parameter(name)) for name in group["names"]]


def test_standard_grouping_spares_all_1d_and_normalisation_parameters() -> None:
    model = NamedParameters(GROUPS["villa_vqa"]["shapes"], ("vqa_output",))
    groups = parameter_groups(model, lr=1.0, weight_decay=0.01)
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    shapes = GROUPS["villa_vqa"]["shapes"]
    assert decayed == {name for name, shape in shapes.items() if len(shape) == 2}
    assert "uniter.img_embeddings.img_layer_norm.weight" not in decayed


def test_standard_grouping_spares_normalisation_of_two_dimensions() -> None:
    model = NamedParameters({"table": [3, 4], "attention_bias": [2, 2]}, ())
    model.norm = nn.LayerNorm((3, 4))
    groups = parameter_groups(model, lr=1.0, weight_decay=0.01)
    assert [group["names"] for group in groups] == [["table"], ["attention_bias", "norm.weight", "norm.bias"]]


def test_longest_prefix_wins_and_prefixes_end_at_dots() -> None:
    factors = multipliers(
        small_model(), head_lr_multiplier=10.0, lr_multipliers={"body": 0.5, "body.layer.1": 0.1, "head.bias": 3.0}
    )
    assert factors["body.layer.0.weight"] == factors["body.layer.10.weight"] == 0.5
    assert factors["body.layer.1.weight"] == 0.1
    assert (factors["head.weight"], factors["head.bias"]) == (10.0, 3.0)


def test_frozen_parameters_are_left_out() -> None:
    model = small_model()
    model.get_submodule("body").requires_grad_(False)
    assert set(multipliers(model, lr_multipliers={"body": 0.1})) == {"head.weight", "head.bias"}


def test_a_prefix_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no parameter is below 'body.layr.1'; did you mean 'body.layer.1'\?"):
        multipliers(small_model(), lr_multipliers={"body.layr.1": 0.1})


def test_a_head_multiplier_needs_a_head() -> None:
    with pytest.raises(ConfigError, match=r"head_lr_multiplier is 10.0, but NamedParameters has no head; set it to 1"):
        multipliers(NamedParameters({"weight": [2, 2]}, ()), head_lr_multiplier=10.0)


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        multipliers(small_model().requires_grad_(False))  # type: ignore[arg-type]


def test_bert_adamw_equals_the_released_optimizer_over_six_steps() -> None:
    golden = torch.load(GOLDEN / "adamw.pt", weights_only=True)
    parameters = [nn.Parameter(value.clone()) for value in golden["init"]]
    groups = [{"params": [p], "weight_decay": w} for p, w in zip(parameters, golden["weight_decay"], strict=True)]
    optimizer = BertAdamW(groups, lr=golden["lr"], betas=tuple(golden["betas"]), eps=golden["eps"])
    for entry in golden["trace"]:
        for parameter, gradient in zip(parameters, entry["grads"], strict=True):
            parameter.grad = gradient
        optimizer.step()
        for parameter, expected in zip(parameters, entry["params"], strict=True):
            torch.testing.assert_close(parameter.data, expected, rtol=0, atol=2.4e-7)


def reference_step(
    p: float, g: list[float], correct: bool, lr: float, b1: float, b2: float, eps: float, wd: float
) -> float:
    m = v = 0.0
    for t, grad in enumerate(g, start=1):
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad * grad
        scale = math.sqrt(1 - b2**t) / (1 - b1**t) if correct else 1.0
        p -= lr * scale * m / (math.sqrt(v) + eps)
        p -= lr * wd * p
    return p


@pytest.mark.parametrize("correct", [True, False])
def test_bert_adamw_is_the_formula_in_float64(correct: bool) -> None:
    parameter = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    options: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}
    optimizer = BertAdamW([parameter], **options, correct_bias=correct)
    gradients = [0.3, -1.2, 0.05, 2.0]
    for gradient in gradients:
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    assert parameter.item() == pytest.approx(
        reference_step(0.7, gradients, correct, 0.03, 0.8, 0.95, 1e-3, 0.2), rel=1e-14
    )


def test_bert_adamw_leaves_parameters_without_gradient_alone_and_does_not_count_them() -> None:
    both, late = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    alone = nn.Parameter(torch.tensor([1.0, -2.0]))
    together, single = BertAdamW([both, late], weight_decay=0.1), BertAdamW([alone], weight_decay=0.1)
    both.grad = torch.ones(2)
    together.step()
    assert torch.equal(late.data, torch.tensor([1.0, -2.0]))
    late.grad = alone.grad = torch.tensor([0.5, 3.0])
    together.step()
    single.step()
    assert torch.equal(late.data, alone.data)


def test_bert_adamw_calls_its_closure_with_gradients_enabled() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = BertAdamW([parameter])

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 1.0
    assert parameter.item() < 1


def train(optimizer: torch.optim.Optimizer, model: Model, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(Batch(ids=["0"])).logits.sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_state_saved_and_loaded_without_pickle_goes_on_bit_for_bit(name: str) -> None:
    model = small_model()
    options: dict[str, Any] = {"lr": 0.05, "lr_multipliers": {"body.layer.1": 0.5}}
    optimizer = build(name, model, **options)
    train(optimizer, model, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    copied = copy.deepcopy(model)
    resumed = build(name, copied, **options)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    train(optimizer, model, 3)
    train(resumed, copied, 3)
    for expected, actual in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_lowers_the_loss_and_takes_the_options(name: str) -> None:
    model = small_model()
    optimizer = build(name, model, lr=0.05, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.0, head_lr_multiplier=2.0)
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-5
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.05, 0.05]
    before = model(Batch(ids=["0"])).logits.item()
    train(optimizer, model, 5)
    assert model(Batch(ids=["0"])).logits.item() < 0.9 * before


@pytest.mark.parametrize("name", FUSED)
def test_fused_and_unfused_agree(name: str) -> None:
    fused, unfused = (small_model().double() for _ in range(2))
    unfused.load_state_dict(fused.state_dict())
    optimizers = build(name, fused, lr=0.05, fused="auto"), build(name, unfused, lr=0.05, fused="off")
    assert [optimizer.defaults["fused"] for optimizer in optimizers] == [True, None]
    train(optimizers[0], fused, 5)
    train(optimizers[1], unfused, 5)
    for expected, actual in zip(unfused.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "theirs"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_torchs_variants_equal_torch_bit_for_bit_and_take_over_its_state(name: str, theirs: Any) -> None:
    ours, reference = small_model(), small_model()
    reference.load_state_dict(ours.state_dict())
    optimizer, options = build(name, ours, lr=0.05, weight_decay=0.1), {"betas": (0.9, 0.98), "eps": 1e-6}
    expected = theirs(parameter_groups(reference, lr=0.05, weight_decay=0.1), **options, fused=True)
    train(optimizer, ours, 2)
    train(expected, reference, 2)
    state = copy.deepcopy(expected.state_dict())  # counts steps in tensors
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state["state"]})
    train(optimizer, ours, 2)
    train(expected, reference, 2)
    assert all(map(torch.equal, ours.parameters(), reference.parameters()))


@pytest.mark.parametrize("name", FUSED)
def test_gradients_are_divided_by_the_scale(name: str) -> None:
    scaled, by_hand = small_model(), small_model()
    by_hand.load_state_dict(scaled.state_dict())
    for model, scale in ((scaled, 4.0), (by_hand, 1.0)):
        optimizer: Any = build(name, model, lr=0.05)
        for _ in range(3):
            for number, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, scale * (number + 1))
            optimizer.grad_scale = torch.tensor(scale) if scale > 1 else None
            optimizer.step()
            assert optimizer.grad_scale is None
    assert all(map(torch.equal, scaled.parameters(), by_hand.parameters()))


def test_tensors_that_the_kernel_would_read_in_the_wrong_order_are_updated_alike() -> None:
    """The kernel ignores strides."""
    values, gradients = torch.randn(2, 3, 4)
    results = []
    for weight, gradient in ((values, gradients), (values.t().contiguous().t(), gradients), (values, gradients.t())):
        parameter = nn.Parameter(weight.clone(memory_format=torch.preserve_format))
        optimizer = BertAdamW([parameter], lr=0.1, weight_decay=0.1)
        for _ in range(2):
            parameter.grad = gradient.contiguous().t() if gradient.shape != weight.shape else gradient.clone()
            optimizer.step()
        results.append(parameter.detach())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_a_decay_to_zero_leaves_zero() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    BertAdamW([parameter], lr=0.5, weight_decay=2.0).step()
    assert not parameter.any()


def test_no_compiler_is_imported() -> None:
    code = """
import sys, torch
from villa.registry import OPTIMIZERS
import villa.engine.optimizers
from villa.engine.fused_adam import FusedAdam
parameter = torch.nn.Parameter(torch.ones(2))
optimizer = FusedAdam([parameter])
parameter.grad = torch.ones(2)
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"optimizer.lr is 0.0; give a finite number above 0"),
        ({"lr": math.nan}, r"optimizer.lr is nan"),
        ({"lr": math.inf}, r"optimizer.lr is inf"),
        ({"betas": (0.9, 1.0)}, r"optimizer.betas is 1.0; give a finite number at least 0 and below 1"),
        ({"eps": 0.0}, r"optimizer.eps is 0.0"),
        ({"weight_decay": -0.1}, r"optimizer.weight_decay is -0.1"),
        ({"head_lr_multiplier": -1.0}, r"optimizer.head_lr_multiplier is -1.0"),
        ({"lr_multipliers": {"body": math.nan}}, r"optimizer.lr_multipliers of 'body' is nan"),
    ],
)
def test_senseless_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("adamw", small_model(), **options)


@pytest.mark.parametrize("name", NAMES)
def test_configurations_come_from_yaml(name: str) -> None:
    factory = OPTIMIZERS.get(name)
    recipe = OmegaConf.create(f"name: {name}\nlr: 3e-5\nbetas: [0.8, 0.9]\nlr_multipliers: {{body.layer.1: 2}}")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(factory.Config), recipe))
    optimizer = factory(config).build(small_model())
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(6e-5)
