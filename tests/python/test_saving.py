# SPDX-License-Identifier: Apache-2.0
"""What `save` does with networks that the file cannot describe, and classes with tensors of their own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from vimcore import _core
from vimcore.io import load_checkpoint, save_model

SMALL: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 5}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def small(**options: Any) -> vimcore.VisionMamba:
    return vimcore.VisionMamba(**{**SMALL, **options}).eval()


class Tail(vimcore.VisionMamba):
    """A head of several layers, a buffer of its own and a counter."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))


class Adapted(vimcore.VisionMamba):
    """The same head, a module besides."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.adapter = nn.Linear(16, 16)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.forward_features(images)
        return self.forward_head(tokens + self.adapter(tokens))


class Named(Tail):
    """Takes other arguments."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(**options)
        self.name = name


# ---- refusals ----------------------------------------------------------------------------------------------


def sequential_head(model: vimcore.VisionMamba) -> None:
    model.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(16, 5))


def head_without_bias(model: vimcore.VisionMamba) -> None:
    model.head = nn.Linear(16, 5, bias=False)


class Cosine(nn.Linear):
    """Has the tensors of a linear map and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(self.weight, dim=-1).T


def cosine_head(model: vimcore.VisionMamba) -> None:
    model.head = Cosine(16, 5)


def softmax_head(model: vimcore.VisionMamba) -> None:
    model.head = nn.Softmax(-1)


def pruned(model: vimcore.VisionMamba) -> None:
    prune.l1_unstructured(model.layers[0].mixer.in_proj, "weight", 0.5)


def old_weight_norm(model: vimcore.VisionMamba) -> None:
    torch.nn.utils.weight_norm(model.layers[1].mixer.out_proj)


def another_map(model: vimcore.VisionMamba) -> None:
    model.layers[1].mixer.x_proj = Cosine(32, 33, bias=False)


def extra_module(model: vimcore.VisionMamba) -> None:
    model.adapter = nn.Linear(16, 16)


class LowRank(nn.Module):
    """As PEFT wraps a linear map."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 2, bias=False)})


def low_rank(model: vimcore.VisionMamba) -> None:
    model.layers[0].mixer.in_proj = LowRank(model.layers[0].mixer.in_proj)


def meta(model: vimcore.VisionMamba) -> None:
    model.to("meta")


class Wrapped(Tensor):
    """As sharded and quantised tensors are: its memory is not what its shape says."""


def subclass(model: vimcore.VisionMamba) -> None:
    model.norm_f.weight = nn.Parameter(model.norm_f.weight.detach().as_subclass(Wrapped))


@pytest.mark.parametrize(
    ("change", "named", "remedy"),
    [
        (sequential_head, "not described: head.1.weight", "reset_classifier"),
        (head_without_bias, "missing: head.bias (5,)", "reset_classifier"),
        (cosine_head, "head: a Cosine", "reset_classifier"),
        (softmax_head, "head: a Softmax", "reset_classifier"),
        (pruned, "missing: layers.0.mixer.in_proj.weight (64, 16)", "prune.remove"),
        (old_weight_norm, "missing: layers.1.mixer.out_proj.weight (16, 32)", "remove_weight_norm"),
        (another_map, "layers.1.mixer.x_proj: a Cosine", "torch.save(model.state_dict(), file)"),
        (extra_module, "not described: adapter.weight", "derived from VisionMamba"),
        (low_rank, "layers.0.mixer.in_proj: a LowRank", "merge_and_unload"),
        (meta, "on meta", "torch.save"),
        (subclass, "norm_f.weight: a Wrapped", "convert it to a torch.Tensor"),
    ],
)
def test_what_the_file_cannot_describe_is_an_error(
    change: Any, named: str, remedy: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    model = small()
    model.save(path)
    before = path.read_bytes()
    change(model)
    with pytest.raises(ValueError, match=r"\[VisionMamba\] save: ") as caught:
        model.save(path)
    assert named in str(caught.value)
    assert remedy in str(caught.value)
    assert path.read_bytes() == before


def test_long_refusals_are_cut(tmp_path: Path) -> None:
    model = small(depth=8)
    for layer in model.layers:
        for name in ("in_proj", "out_proj", "x_proj", "x_proj_b"):
            prune.identity(getattr(layer.mixer, name), "weight")
    with pytest.raises(ValueError, match=r"and 84 more") as caught:  # 8 x 4 x (missing, _orig, _mask)
        model.save(tmp_path / "a.safetensors")
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("labels", ["abcde", ["a", "b"], [1, 2, 3, 4, 5], ["a", "b", "c", "d", None]])
def test_labels_are_texts(labels: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labels: expected"):
        small().save(tmp_path / "a.safetensors", labels)
    small().save(tmp_path / "a.safetensors", np.array(list("abcde")))
    assert vimcore.Runtime(tmp_path / "a.safetensors").labels == list("abcde")


def test_preprocessing_that_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    steps = {"resize": np.int64(18), "crop": (16, 16), "mean": [np.float32(0.5)] * 3, "std": np.ones(3)}
    save_model(small(), tmp_path / "a.safetensors", preprocess=steps)
    assert vimcore.Runtime(tmp_path / "a.safetensors").preprocess["mean"] == [0.5] * 3
    with pytest.raises(ValueError, match=r"\[preprocess\] mean: expected -1e\+06 to 1e\+06, got 1e\+308"):
        save_model(small(), tmp_path / "b.safetensors", preprocess={**steps, "mean": [0, 0, 1e308]})
    with pytest.raises(ValueError, match=r"\[preprocess\] std: expected 1e-06 to"):
        save_model(small(), tmp_path / "b.safetensors", preprocess={**steps, "std": [1, 1, 0]})
    assert not (tmp_path / "b.safetensors").exists()


# ---- what is saved in full ---------------------------------------------------------------------------------


def spectral(model: vimcore.VisionMamba) -> None:
    parametrizations.spectral_norm(model.layers[0].mixer.in_proj)


def several(model: vimcore.VisionMamba) -> None:
    parametrizations.weight_norm(model.layers[0].mixer.in_proj)
    parametrizations.weight_norm(model.head)
    parametrizations.orthogonal(model.layers[1].mixer.out_proj)


class Doubled(nn.Module):
    """Cannot be inverted."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def of_the_network(model: vimcore.VisionMamba) -> None:
    parametrize.register_parametrization(model, "pos_embed", Doubled())


@pytest.mark.parametrize("change", [spectral, several, of_the_network])
def test_parametrised_weights_are_saved_as_values(change: Any, tmp_path: Path) -> None:
    model = small()
    change(model)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.save(tmp_path / "a.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name  # spectral_norm iterates in training
    assert model.layers[0].mixer.training
    again = vimcore.VisionMamba.load(tmp_path / "a.safetensors")
    assert not any("parametrizations" in name for name in again.state_dict())
    with torch.no_grad():
        expected = model.eval()(IMAGES)
        logits = again(IMAGES)
    assert torch.allclose(logits, expected, rtol=0, atol=1e-6)
    for name, value in again.named_parameters():
        owner, _, leaf = name.rpartition(".")
        assert torch.equal(value, getattr(model.get_submodule(owner), leaf)), name
    assert np.array_equal(vimcore.Runtime(tmp_path / "a.safetensors")(IMAGES.numpy()), logits.numpy())


def test_plain_values_go_into_parametrised_weights(tmp_path: Path) -> None:
    source, target = small(), small()
    several(target)
    source.layers[1].mixer.out_proj.weight.data = torch.nn.init.orthogonal_(torch.empty(16, 32))
    source.save(tmp_path / "a.safetensors")
    load_checkpoint(target, tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.allclose(target(IMAGES), source(IMAGES), atol=1e-5)
    torch.save(target.state_dict(), tmp_path / "b.pth")  # in full, what the weights are computed from
    again = small()
    several(again)
    load_checkpoint(again, tmp_path / "b.pth")
    with torch.no_grad():
        assert torch.equal(again(IMAGES), target(IMAGES))
    fixed = small()
    of_the_network(fixed)
    before = fixed.norm_f.weight.detach().clone()
    with pytest.raises(ValueError, match="pos_embed: its parametrisation takes no plain value"):
        load_checkpoint(fixed, tmp_path / "a.safetensors")
    assert torch.equal(fixed.norm_f.weight, before)


@pytest.mark.parametrize("kind", [Tail, Adapted])
def test_derived_classes_come_back(kind: type[vimcore.VisionMamba], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = kind(**SMALL)
    for name, value in model.state_dict().items():
        if name.startswith(("head.2", "adapter")) and value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5)  # running statistics too
    model.eval().save(path, labels=list("abcde"))
    again = kind.load(path)
    assert type(again) is kind
    assert not again.training
    left, right = model.state_dict(), again.state_dict()
    assert list(left) == list(right)
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        assert torch.equal(value, right[name]), name
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))
    larger = kind.load(path, img_size=32)
    assert larger.config["img_size"] == [32, 32]
    assert larger.pos_embed.shape[1] == 17
    own = "head.1.weight" if kind is Tail else "adapter.bias"
    with pytest.raises(ValueError, match="do not fit") as caught:
        vimcore.VisionMamba.load(path)
    assert f"unexpected: {own}" in str(caught.value)
    assert "the class that saved them" in str(caught.value)
    with pytest.raises(vimcore.Error, match=f"unexpected: {own}"):
        vimcore.Runtime(path)


def test_a_derived_class_of_the_same_tensors_stays_a_plain_file(tmp_path: Path) -> None:
    class Same(vimcore.VisionMamba):
        pass

    torch.manual_seed(0)
    model = Same(**SMALL)
    model.save(tmp_path / "a.safetensors")
    torch.manual_seed(0)
    small().save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert type(Same.load(tmp_path / "a.safetensors")) is Same
    assert type(vimcore.VisionMamba.load(tmp_path / "a.safetensors")) is vimcore.VisionMamba


def test_timms_class_comes_back(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    import vimcore.timm

    size = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_classes": 5}
    model = timm.create_model("vimcore_vim_tiny_patch16_224", **size, drop_rate=0.2, pos_drop_rate=0.1)
    path = tmp_path / "a.safetensors"
    model.save(path)
    again = vimcore.timm.TimmVisionMamba.load(path)
    assert type(again) is vimcore.timm.TimmVisionMamba
    assert again.config == model.config  # drop_rate there is that of the tokens
    assert again.head_drop.p == 0
    assert type(vimcore.VisionMamba.load(path)) is vimcore.VisionMamba
    model.head = nn.Sequential(model.head)
    with pytest.raises(ValueError, match=r"not described: head\.0\.bias"):
        model.save(path)


def test_other_constructors_name_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = Named("x", **SMALL)
    model.save(path)
    with pytest.raises(TypeError, match=r"Named does not take.*'name'.*load_checkpoint\(model, path\)"):
        Named.load(path)
    again = Named("y", **SMALL)
    load_checkpoint(again, path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_derived_class_and_a_file_of_another(tmp_path: Path) -> None:
    small().save(tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"missing: adapter.weight \(16, 16\)"):
        Adapted.load(tmp_path / "plain.safetensors")
    Tail(**SMALL).save(tmp_path / "tail.safetensors")
    with pytest.raises(ValueError, match=r"unexpected: head.1.bias"):
        Adapted.load(tmp_path / "tail.safetensors")
    # what such a header claims is compared before anything is made
    arrays, metadata = _core.read_safetensors(str(tmp_path / "tail.safetensors"))
    metadata["vimcore.config"] = metadata["vimcore.config"].replace('"depth": 2', '"depth": 4096')
    _core.write_safetensors(str(tmp_path / "tail.safetensors"), arrays, metadata)
    with pytest.raises(ValueError, match=r"missing: layers.2.mixer.A_log[^;]*and \d+ more"):
        Tail.load(tmp_path / "tail.safetensors")


def test_wrapped_networks_are_saved_as_themselves(tmp_path: Path) -> None:
    model = small()
    model.save(tmp_path / "a.safetensors")
    average = torch.optim.swa_utils.AveragedModel(model)
    compiled = SimpleNamespace(_orig_mod=model)  # as torch.compile gives, which takes seconds to import
    for wrapped in (compiled, average, nn.DataParallel(model)):
        save_model(wrapped, tmp_path / "b.safetensors")  # type: ignore[arg-type]
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with pytest.raises(TypeError, match="expected a VisionMamba, got Linear"):
        save_model(nn.Linear(1, 1), tmp_path / "c.safetensors")  # type: ignore[arg-type]


def test_the_configuration_of_a_file_is_complete(tmp_path: Path) -> None:
    Tail(**SMALL).save(tmp_path / "a.safetensors")
    config = json.loads(_core.safetensors_header(tmp_path / "a.safetensors")[1]["vimcore.config"])
    assert config["num_classes"] == 5  # as the constructor was told, whatever its head is
