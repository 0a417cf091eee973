# SPDX-License-Identifier: Apache-2.0
"""Optimizers by timm's names, learning rates by layer, averaged weights that ramp."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import vimcore
from torch import nn
from train_helpers import ONCE, SMALL, folder, log, stopped
from vimcore.cli import main
from vimcore.tasks.classification.settings import ClassificationSettings as Settings
from vimcore.tasks.classification.task import Classification
from vimcore.tasks.settings import read_toml
from vimcore.train.checkpoint import read_checkpoint
from vimcore.train.ema import Ema
from vimcore.train.loop import Loop
from vimcore.train.optimizer import create_optimizer, parameter_groups
from vimcore.train.presets import PRESETS, recipe, task_of

LAYERS = Classification(Settings()).layers()


def network(depth: int = 3) -> vimcore.VisionMamba:
    torch.manual_seed(0)
    return vimcore.VisionMamba(16, 8, in_chans=1, num_classes=3, embed_dim=16, depth=depth)


def test_adamw_is_torchs() -> None:
    """Same groups in the same order, same options: the same bits as ever."""
    model = network()
    s = Settings(weight_decay=0.07, decay="mamba")
    found = create_optimizer(model, s, 0.02, LAYERS, s.layer_decay)
    wanted = torch.optim.AdamW(parameter_groups(model, 0.07, "mamba"), 0.02, (0.9, 0.999), 1e-8)
    assert type(found) is torch.optim.AdamW
    assert found.state_dict() == wanted.state_dict()
    for own, other in zip(found.param_groups, wanted.param_groups):
        assert [id(p) for p in own["params"]] == [id(p) for p in other["params"]]


def test_layer_decay() -> None:
    """A factor for each block; embedding below, head and last norm above; decay groups stay what they are."""
    model = network()
    names = {id(p): name for name, p in model.named_parameters()}
    for decay in ("authors", "mamba"):
        s = Settings(weight_decay=0.07, decay=decay, layer_decay=0.5)
        optimizer = create_optimizer(model, s, 0.02, LAYERS, s.layer_decay)
        scales: dict[str, float] = {}
        decayed: set[int] = set()
        for group in optimizer.param_groups:
            for p in group["params"]:
                scales[names[id(p)]] = group["lr_scale"]
                if group["weight_decay"]:
                    assert group["weight_decay"] == 0.07
                    decayed.add(id(p))
        assert scales.keys() == set(names.values())
        for name, scale in scales.items():
            layer = int(name.split(".")[1]) + 1 if name.startswith("layers.") else 0
            layer = 4 if name.startswith(("norm_f", "head")) else layer
            assert scale == 0.5 ** (4 - layer), name
        assert decayed == {id(p) for p in parameter_groups(model, 0.07, decay)[0]["params"]}
    loop = Loop(model, optimizer, lambda step: 0.01 * (step + 1), lambda m, x: (m(x).square().mean(), {}))
    for factor in (1, 2):
        loop.update([torch.randn(2, 1, 16, 16)])
        assert all(g["lr"] == pytest.approx(0.01 * factor * g["lr_scale"]) for g in optimizer.param_groups)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = folder(tmp_path_factory.mktemp("data") / "images")
    flags = [
        "--epochs",
        "2",
        "--val-fraction",
        "0.3",
        "--log-every",
        "1",
        "--augment",
        "none",
        "--lr",
        "1e-2",
    ]
    return ["--data", str(data), *SMALL, *ONCE, *flags]


@pytest.mark.slow
@pytest.mark.parametrize("opt", ["adamw", "lion", "lookahead_sgd"])
def test_resumed_with_it(opt: str, arguments: list[str], tmp_path: Path) -> None:
    """Other optimizers count in groups of parameters or keep slow weights: all of it is in the checkpoint."""
    flags = [*arguments, "--opt", opt, "--layer-decay", "0.8"]
    assert main(["train", *flags, "--out", str(tmp_path / "uninterrupted")]) == 0
    run = stopped(tmp_path / "run", 4, *flags)
    assert main(["train", "--resume", str(run)]) == 0
    assert log(run) == log(tmp_path / "uninterrupted")
    for name in ("last", "last_ema", "best"):
        name += ".safetensors"
        assert (run / name).read_bytes() == (tmp_path / "uninterrupted" / name).read_bytes()
    content = read_checkpoint(run / "checkpoint.pt")
    state = content["optimizer"]["state"]
    assert state
    if opt != "adamw":
        next(v for v in state[0].values() if isinstance(v, torch.Tensor) and v.ndim).fill_(torch.nan)
        torch.save(content, run / "checkpoint.pt")
        assert main(["train", "--resume", str(run)]) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--opt", "adamv"], "opt: adamv: "),
        (["--opt", "adahessian"], "opt: adahessian needs second derivatives"),
        (["--layer-decay", "1.5"], "layer_decay: expected more than 0 and at most 1, got 1.5"),
    ],
)
def test_wrong_optimizers(
    flags: list[str], message: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments, *flags, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# ---- averaged weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.5, 100.0])
def test_gradients_are_clipped_by_their_norm(clip: float | None) -> None:
    """Over all parameters together, of the mean over accumulated batches; the norm before it is told."""
    model = torch.nn.Linear(2, 1)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loop = Loop(model, optimizer, lambda step: 1.0, lambda m, x: (m(x).sum(), {}), clip=clip)
    update = loop.update([torch.tensor([[2.0, 4.0]]), torch.tensor([[4.0, 0.0]])])  # gradients 3, 2 and 1
    assert update.grad_norm == pytest.approx(14**0.5)
    share = 1.0 if clip is None else min(1.0, clip / 14**0.5)
    assert model.weight.tolist()[0] == pytest.approx([-3 * share, -2 * share])
    assert model.bias.item() == pytest.approx(-share)


@pytest.mark.parametrize("ramp", [False, True])
def test_averaged_weights(ramp: bool) -> None:
    """Against the formula; it starts from the weights, and goes on from those of a checkpoint."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    ema, wanted = Ema(model, 0.9, ramp), model[0].weight.detach().double().clone()
    for step in range(6):
        with torch.no_grad():
            model[0].weight.normal_()
            model[1].running_mean.normal_()
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step)) if ramp else 0.9
        wanted = decay * wanted + (1 - decay) * model[0].weight.detach().double()
        assert torch.allclose(ema.model[0].weight.double(), wanted, atol=1e-6)
        assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
        if step == 2:
            values = [value.clone() for value in ema.values]
            assert len(values) == 3
            ema = Ema(copy.deepcopy(model), 0.9, ramp)
            ema.source = model
            ema.load(values)
    ema.write()
    assert torch.allclose(model[0].weight.double(), wanted, atol=1e-6)


def test_the_ramp_is_the_default_of_who_names_an_average(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, typed, wanted in (
        ("tiny-released", {}, False),  # as the recipe has it
        ("tiny-released", {"ema": 0.999}, True),
        ("tiny-released", {"ema": 0.999, "ema_ramp": False}, False),
        ("tiny-released", {"ema_ramp": True}, True),
        ("digits", {"ema": 0.999}, True),
    ):
        assert recipe(Settings, name, typed)[0].ema_ramp is wanted, (name, typed)
    ours = ("digits", "finetune")
    published = [name for name in PRESETS if task_of(name) == "classify" and name not in ours]
    assert not any(recipe(Settings, name, {})[0].ema_ramp for name in published)
    assert main(["train", "--ema", "0.99", "--dry-run"]) == 0
    (tmp_path / "a.toml").write_text(capsys.readouterr().out)
    assert read_toml(str(tmp_path / "a.toml"))["ema_ramp"] is True
