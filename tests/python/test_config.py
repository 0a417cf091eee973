# SPDX-License-Identifier: Apache-2.0
"""`vimcore.Config` and `_core.Preprocess` as values, which tensors fit, and the stub of the extension."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from vimcore import Config, _core
from vimcore._core import Preprocess

CHANGES: list[dict[str, Any]] = [
    {},
    {"img_size": (32, 48), "patch_size": 8, "stride": 4},
    {"dt_rank": 5, "directions": "block", "depth": 2, "norm": "layer", "norm_eps": 1e-6},
    {"class_token": "none", "pool": "all", "num_classes": 0, "pos_embed": False},
    {"rope": True, "rope_residual": True, "rope_grid": 7, "class_token": "head", "layer_scale": 1e-5},
    {"drop_rate": 0.25, "drop_path_rate": 0.5, "average_directions": False, "expand": 3, "d_conv": 2},
]


@pytest.mark.parametrize("options", CHANGES)
def test_a_value(options: dict[str, Any]) -> None:
    config = Config(**options)
    for same in (
        Config(**config.to_dict()),
        Config.from_json(config.to_json()),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        config.replace(),
        eval(repr(config), {"Config": Config}),
    ):
        assert same == config
        assert hash(same) == hash(config)
    assert json.loads(config.to_json()) == config.to_dict() == vimcore.VisionMamba(**options).config
    for name, value in config.to_dict().items():
        found = getattr(config, name)
        if name == "dt_rank" and value == "auto":
            assert found == -(-config.embed_dim // 16)
        else:
            assert found == (tuple(value) if name == "img_size" else value)
    other = config.replace(depth=config.depth + 2)
    assert other != config
    assert other.depth == config.depth + 2
    assert config != config.to_json()


def test_options_are_those_of_the_network() -> None:
    """The same names, in the same order, with the same defaults; the stub says so too."""
    parameters = inspect.signature(vimcore.VisionMamba).parameters
    defaults = {
        name: p.default for name, p in parameters.items() if name not in ("memory", "dynamic_img_size")
    }
    assert Config() == Config(**defaults)
    assert list(Config().to_dict()) == list(defaults)
    stated = inspect.signature(_stub()["Config"].__init__).parameters
    assert {n: p.default for n, p in stated.items() if n != "self"} == defaults


def _stub() -> dict[str, Any]:
    """The names that `_core.pyi` defines."""
    text = (Path(__file__).parents[2] / "python/vimcore/_core.pyi").read_text()
    names: dict[str, Any] = {}
    exec(compile("from __future__ import annotations\n" + text, "_core.pyi", "exec"), names)
    return names


def test_it_does_not_change() -> None:
    config = Config()
    with pytest.raises(AttributeError):
        config.depth = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Config(224)  # type: ignore[misc]


def test_numbers_of_other_libraries() -> None:
    config = Config(
        img_size=np.array([32, 48]),  # type: ignore[arg-type]
        patch_size=np.int16(8),
        depth=torch.tensor(3),  # type: ignore[arg-type]
        norm_eps=np.float64(1e-4),
        rope=np.bool_(False),  # type: ignore[arg-type]
        drop_rate=torch.tensor(0.25),  # type: ignore[arg-type]
    )
    assert config == Config(img_size=(32, 48), patch_size=8, depth=3, norm_eps=1e-4, drop_rate=0.25)
    assert type(config.to_dict()["depth"]) is int


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"depths": 3}, ValueError, '[config] unknown option "depths"'),
        ({"depth": 0}, ValueError, "[config] depth: expected 1 to 4096, got 0"),
        ({"depth": 2.5}, ValueError, "[config] depth: expected an integer, got a number"),
        ({"depth": True}, ValueError, "[config] depth: expected an integer, got a boolean"),
        ({"depth": 10**30}, ValueError, "[config] depth: expected an integer of 64 bits, got 1000"),
        ({"norm_eps": float("nan")}, ValueError, "[config] norm_eps: expected a finite number, got nan"),
        ({"norm": "batch"}, ValueError, '[config] norm: expected one of "rms", "layer", got "batch"'),
        ({"img_size": [1, 2, 3]}, ValueError, "[config] img_size: expected an integer or [height, width]"),
        ({"img_size": object()}, TypeError, "[config] img_size: expected a number or text, got object"),
        ({"img_size": b"224"}, TypeError, "[config] img_size: expected a number or text, got bytes"),
        ({"img_size": {1: 2}}, TypeError, "[config] img_size: expected a number or text, got dict"),
        ({"rope": True}, ValueError, "[config] rope: needs class_token"),
    ],
)
def test_it_is_checked_when_made(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    for make in (lambda: Config(**options), lambda: Config().replace(**options)):
        with pytest.raises(kind) as caught:
            make()
        assert str(caught.value).startswith(text)


@pytest.mark.parametrize("pool", ["mean", "max", "last", "all"])
@pytest.mark.parametrize("class_token", ["none", "head", "double", "middle", "random"])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_shapes_of_results(class_token: str, pool: str, num_classes: int) -> None:
    options = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 8, "depth": 1, "d_state": 2}
    config = Config(**options, class_token=class_token, pool=pool, num_classes=num_classes)
    model = vimcore.VisionMamba(**config.to_dict()).eval()
    images = torch.zeros(2, 3, *config.img_size)
    with torch.no_grad():
        assert tuple(model(images).shape) == config.logits_shape(2)
        tokens = model.forward_features(images)
        assert tuple(tokens.shape) == (2, config.tokens, config.embed_dim)
        assert tuple(model.forward_head(tokens).shape) == config.logits_shape(2)
    assert config.grid == (2, 3)
    assert config.patches == 6
    assert config.tokens == 6 + config.class_tokens
    assert config.head_per_token == (class_token == "none" and pool in ("max", "all"))
    assert config.outputs == (num_classes or 8)
    assert config.flops() == model.flops()
    assert config.param_shapes() == {name: tuple(p.shape) for name, p in model.named_parameters()}
    block = {name: tuple(p.shape) for name, p in model.layers[0].named_parameters()}
    assert config.block_shapes() == block


def test_preprocessing() -> None:
    steps = Preprocess.default(Config(img_size=(24, 32), in_chans=1))
    assert steps is not None
    assert steps == Preprocess(resize=27, crop=(24, 32), mean=[0.5], std=[0.5])
    assert Preprocess.default(Config(in_chans=4)) is None
    assert steps.rescaled(24, 32) == steps
    assert steps.rescaled(48, 40) == steps.replace(resize=45, crop=[48, 40])
    assert pickle.loads(pickle.dumps(steps)) == steps != Preprocess()
    assert Preprocess(**steps.to_dict()) == Preprocess.from_json(steps.to_json()) == steps
    for options, text in (({"resize": -1}, "resize"), ({"mean": [0.5]}, "mean"), ({"size": 3}, "size")):
        with pytest.raises(ValueError, match=text):
            Preprocess(**options)


def test_what_tensors_do_not_fit() -> None:
    wanted = {"a": (2, 3), "b": (4,), "c": ()}
    assert _core.misfits(wanted, wanted) == []
    assert _core.misfits(wanted, {"a": (2, 3), "b": (5,), "d\n": (1,)}) == [
        "misshapen: b: expected (4,), got (5,)",
        "missing: c ()",
        "unexpected: d\\x0a (1,)",
    ]
    with pytest.raises(ValueError, match="at most 8 axes"):
        _core.misfits({}, {"a": (1,) * 9})


@pytest.mark.slow
def test_the_stub_is_what_the_bindings_tell() -> None:
    script = Path(__file__).parents[2] / "python/src/stub.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
