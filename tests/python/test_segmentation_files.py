# SPDX-License-Identifier: Apache-2.0
"""Files of segmentation networks: what is written, read, kept and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from vimcore import _core
from vimcore.segmentation import FCN, Segmentation, Segmenter, UperNet, load
from vimcore.weights.dense import norm_groups
from vimcore.weights.info import describe_file
from vimcore.weights.task import DetectTask, default_palette, pack_task, unpack_task

SMALL: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "class_token": "none"}


def backbone(**options: Any) -> vimcore.VisionMamba:
    return vimcore.VisionMamba(**{**SMALL, "num_classes": 0, **options})


def images(size: tuple[int, int] = (16, 16), channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


NETWORKS: dict[str, Callable[[], Segmentation]] = {
    "fcn": lambda: FCN(backbone(), 5),
    "narrow": lambda: FCN(backbone(), 3, channels=8, convs=1, head_norm="group", dropout=0.0),
    "linear": lambda: FCN(backbone(class_token="middle"), 4, convs=0),
    "one class": lambda: FCN(backbone(img_size=(16, 24)), 1),
    "four channels": lambda: FCN(backbone(in_chans=4), 2),
    "uper": lambda: UperNet(backbone(patch_size=16, img_size=(16, 32), rope=True, class_token="head"), 3),
    "uper, patch 8": lambda: UperNet(backbone(patch_size=8, depth=5), 3, channels=8, indices=[1, 2, 3, -1]),
    "uper, mixer": lambda: UperNet(
        backbone(), 2, indices=[1, 1, 1, 1], aux=False, taps="mixer", head_norm="group"
    ),
    "segmenter": lambda: Segmenter(backbone(class_token="double"), 4, layers=1),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of the linear head, whose parts tests change."""
    path = tmp_path / "linear.safetensors"
    FCN(backbone(), 3, convs=0).save(path, classes=["sky", "sea", "sand"])
    return path


def metadata(path: Path) -> dict[str, str]:
    found: dict[str, str] = _core.safetensors_header(str(path))[1]
    return found


def rewritten(path: Path, tensors: dict[str, Any] | None = None, **texts: str | None) -> Path:
    """The file with other tensors (None: without) and other metadata, keys without "vimcore."."""
    arrays, about = _core.read_safetensors(str(path))
    for name, value in (tensors or {}).items():
        arrays[name] = value
    for key, text in texts.items():
        about[f"vimcore.{key}"] = text
    kept = {name: value for name, value in arrays.items() if value is not None}
    _core.write_safetensors(str(path), kept, {key: text for key, text in about.items() if text is not None})
    return path


# ---- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_gives_the_network_back(name: str, tmp_path: Path) -> None:
    model = NETWORKS[name]()
    config = model.config
    x = images(tuple(config["img_size"]), config["in_chans"])
    model.train()
    model(x)  # statistics of BatchNorm that are not those of the start
    model.eval().save(tmp_path / "a.safetensors")
    other = load(tmp_path / "a.safetensors")
    assert type(other) is type(model)
    assert (other.config, other.options, other.head) == (config, model.options, model.head)
    assert not other.training
    assert torch.equal(other(x), model(x))
    other.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    tensors, _ = _core.safetensors_header(str(tmp_path / "a.safetensors"))
    tables = {"backbone.rope.freqs_cos", "backbone.rope.freqs_sin"}
    assert {name for name, _, _ in tensors} == set(model.state_dict()) - tables


def test_what_a_file_says(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = UperNet(backbone(img_size=(32, 48)), 3, channels=8)
    model.save(path)
    about = metadata(path)
    assert set(about) == {"vimcore.config", "vimcore.preprocess", "vimcore.task"}
    assert json.loads(about["vimcore.config"])["num_classes"] == 0
    assert json.loads(about["vimcore.preprocess"])["crop"] == [32, 48]
    assert json.loads(about["vimcore.task"]) == {
        "task": "segment",
        "head": "uper",
        "options": {
            "channels": 8,
            "indices": [0, 0, 0, 1],
            "aux": True,
            "taps": "stream",
            "head_norm": "batch",
            "dropout": 0.1,
        },
        "classes": ["0", "1", "2"],
        "palette": [[0, 0, 0], [128, 0, 0], [0, 128, 0]],
        "window": [32, 48],
        "stride": [21, 32],
        "resize": None,
    }
    model.save(
        path,
        classes=["sky", "sea", "straße"],
        palette=np.eye(3, dtype=np.uint8) * 255,
        window=64,
        stride=(64, 32),
        resize=(512, 2048),
        preprocess={"mean": [0.5] * 3, "std": [0.25] * 3, "crop": [32, 48], "resize": 32},
    )
    other = load(path)
    assert other.task is not None
    assert other.preprocess is not None
    assert other.task.classes == ("sky", "sea", "straße")
    assert other.task.palette == ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    assert (other.task.window, other.task.stride, other.task.resize) == ((64, 64), (64, 32), (512, 2048))
    assert other.preprocess.mean == [0.5] * 3
    other.save(path, window=32)  # the rest stays, a stride belongs to its window
    task = json.loads(metadata(path)["vimcore.task"])
    assert (task["window"], task["stride"], task["resize"]) == ([32, 32], [21, 21], [512, 2048])
    assert task["classes"] == ["sky", "sea", "straße"]
    Segmenter(backbone(), 2).save(path)
    assert json.loads(metadata(path)["vimcore.task"])["stride"] == [16, 16]


def test_info(tmp_path: Path) -> None:
    path = str(tmp_path / "a.safetensors")
    model = UperNet(backbone(class_token="middle"), 3, channels=8)
    model.save(path, classes=["a", "b", "c"])
    facts = describe_file(path)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["head_parameters"] == facts["parameters"] - sum(
        p.numel() for p in model.backbone.parameters()
    )
    assert facts["flops"] == model.flops()
    assert facts["config"] == model.config
    assert (facts["task"], facts["head"], facts["options"]) == ("segment", "uper", model.options)
    assert (facts["classes"], facts["window"], facts["stride"]) == (["a", "b", "c"], [16, 16], [10, 10])
    assert facts["palette"] == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    assert (facts["types"], facts["labels"], facts["resize"]) == (["f32"], None, None)


@pytest.mark.slow
def test_info_needs_no_torch(path: Path) -> None:
    code = (
        "import sys; from vimcore.weights.info import describe_file; describe_file(sys.argv[1]); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_other_sizes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = FCN(backbone(class_token="middle"), 3).eval()
    model.save(path)
    model.backbone.set_input_size((24, 16))
    x = images((24, 16))
    assert torch.equal(load(path, img_size=(24, 16))(x), model(x))
    free = load(path, dynamic_img_size=True)
    torch.testing.assert_close(free(x), model(x), rtol=1e-5, atol=1e-6)
    assert free(images((23, 15))).shape == (2, 3, 23, 15)


def test_palettes_differ() -> None:
    colours = default_palette(255)
    assert len(set(colours)) == 255
    assert colours[:3] == ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    assert colours[254] == (96, 224, 192)


def test_groups_have_four_channels() -> None:
    for channels, groups in ((192, 32), (384, 32), (256, 32), (64, 16), (48, 12), (8, 2), (3, 1), (1, 1)):
        assert norm_groups(channels) == groups


# ---- what save refuses -------------------------------------------------------------------------------------


class Cosine(nn.Conv2d):
    """Has the tensors of a convolution and is none."""


def another_classifier(model: Segmentation) -> None:
    model.decode_head.conv_seg = Cosine(16, 3, 1)


def more_classes(model: Segmentation) -> None:
    model.decode_head.conv_seg = nn.Conv2d(16, 4, 1)


def strided(model: Segmentation) -> None:
    model.decode_head.convs[0].conv.stride = (2, 2)


def pruned(model: Segmentation) -> None:
    prune.l1_unstructured(model.decode_head.conv_seg, "weight", 0.5)


def with_head(model: Segmentation) -> None:
    model.backbone.reset_classifier(5)


def further_module(model: Segmentation) -> None:
    model.extra = nn.Linear(2, 2)


class Compiled(nn.Module):
    """As torch.compile wraps a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


def compiled_head(model: Segmentation) -> None:
    model.decode_head = Compiled(model.decode_head)


def no_memory(model: Segmentation) -> None:
    model.to("meta")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another_classifier, "decode_head.conv_seg: a Cosine"),
        (
            more_classes,
            r"misshapen: decode_head.conv_seg.weight: expected \(3, 16, 1, 1\), got \(4, 16, 1, 1\)",
        ),
        (strided, "decode_head.convs.0.conv: other settings"),
        (pruned, r"(?s)missing: decode_head.conv_seg.weight.*prune.remove"),
        (with_head, "not described: backbone.head.bias"),
        (further_module, "not described: extra.weight"),
        (compiled_head, r"(?s)decode_head: a Compiled.*compile the whole network"),
        (no_memory, "on meta"),
    ],
)
def test_what_a_file_cannot_describe(change: Callable[[Segmentation], None], said: str, path: Path) -> None:
    before = path.read_bytes()
    model = FCN(backbone(), 3)
    change(model)
    with pytest.raises(ValueError, match=said):
        model.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"classes": ["a", "b"]}, "labels: expected 3"),
        ({"classes": "abc"}, "labels: expected a list"),
        ({"palette": [[0, 0, 0]]}, "palette: expected a list of 3, got 1"),
        ({"palette": [[0, 0, 256]] * 3}, "palette: expected a whole number from 0 to 255, got 256"),
        ({"window": 18}, r"window: expected multiples of the 4 pixels of a patch, got \[18, 18\]"),
        ({"window": (16, 0)}, "window: expected 1 or more"),
        ({"stride": 17}, r"stride: \[17, 17\] leaves gaps between windows of \[16, 16\]"),
        ({"resize": (20, 10)}, r"resize: expected \[short, long\], got \[20, 10\]"),
        ({"preprocess": {"mean": "x"}}, "mean"),
    ],
)
def test_arguments_of_save(arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        FCN(backbone(), 3).save(tmp_path / "a.safetensors", **arguments)
    assert list(tmp_path.iterdir()) == []


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_parametrised_hooked_and_averaged(tmp_path: Path) -> None:
    """What `VisionMamba.save` takes."""
    path, x = tmp_path / "a.safetensors", images((32, 32))
    model = UperNet(backbone(img_size=32, patch_size=16), 3, channels=8).eval()
    parametrize.register_parametrization(model.neck.fpn2[0], "weight", Doubled())
    parametrize.register_parametrization(model.decode_head.conv_seg, "weight", Doubled())
    parametrize.register_parametrization(model.backbone.layers[0].mixer.in_proj, "weight", Doubled())
    model.save(path)
    assert torch.equal(load(path)(x), model(x))
    plain = load(path)
    seen: list[Any] = []
    plain.decode_head.register_forward_hook(lambda *given: seen.append(given))
    averaged = torch.optim.swa_utils.AveragedModel(plain)
    for wrapped in (plain, averaged.module):
        wrapped.save(path)
        assert torch.equal(load(path)(x), plain(x))
    assert seen


# ---- what load refuses -------------------------------------------------------------------------------------


def task(**changes: Any) -> str:
    """The metadata of `path`, changed; ... : without."""
    values = {
        "task": "segment",
        "head": "linear",
        "options": {"channels": 16, "convs": 0, "head_norm": "batch", "dropout": 0.1},
        "classes": ["sky", "sea", "sand"],
        "palette": [[0, 0, 0], [128, 0, 0], [0, 128, 0]],
        "window": [16, 16],
        "stride": [10, 10],
        "resize": None,
    }
    values.update(changes)
    return json.dumps({key: value for key, value in values.items() if value is not ...})


DAMAGED = [
    ("", "Expecting value"),
    ("[1]", "expected an object, got \\[1\\]"),
    ("[" * 100_000, "nested too deeply"),
    ('{"task": "segment"', "Expecting"),
    ('{"task": NaN}', "NaN is no number"),
    ('{"task": "segment", "task": "detect"}', "'task': there twice"),
    ('{"task": %s}' % ("9" * 5000), "integer"),
    (task(task=...), "task: expected 'segment', 'detect' or 'clip', got None"),
    (task(task=["segment"]), r"task: expected 'segment', 'detect' or 'clip', got \['segment'\]"),
    (task(task="detect"), "ids: missing"),
    (task(window=...), "window: missing"),
    (task(extra=1), "'extra': unknown"),
    (task(head="uper?"), "head: expected one of fcn, linear, uper, segmenter, got 'uper\\?'"),
    (task(head={}), "head: expected one of"),
    (task(head="fcn"), "convs: expected 1 or more"),
    (task(head="segmenter"), "'channels': no option of this head"),
    (task(options=[]), "options: expected an object"),
    (task(options={"convs": {"a": 1}}), "options: 'convs': expected a plain value or a list"),
    (task(options={"convs": 0, "channels": 1e3}), r"\[FCN\] channels: expected an integer, got 1000.0"),
    (task(options={"convs": True}), r"\[FCN\] convs: expected an integer, got True"),
    (task(options={"convs": 0, "dropout": "a"}), "dropout: expected a number"),
    (task(classes=[]), "classes: expected a list of names"),
    (task(classes="abc"), "classes: expected a list of names"),
    (task(classes=["a", 1, "b"]), "classes: expected texts, got 1"),
    (task(classes=["a", "b", "\ud800"]), "classes: expected texts"),
    (task(classes=["a", "b"]), "palette: expected a list of 2, got 3"),
    (task(classes=["a"] * 4, palette=[[0, 0, 0]] * 4), "misshapen: decode_head.conv_seg.bias"),
    (task(classes=["a"] * 256, palette=[[0, 0, 0]] * 256), "expected 255 or fewer"),
    (task(palette=[[0, 0, 0], [1, 2], [3, 4, 5]]), "palette: expected a list of 3, got 2"),
    (task(palette=[[0, 0, -1]] * 3), "palette: expected a whole number from 0 to 255, got -1"),
    (task(palette=[[0, 0, 1.0]] * 3), "palette: expected a whole number from 0 to 255, got 1.0"),
    (task(window=[16]), "window: expected a list of 2, got 1"),
    (task(window=16), "window: expected a list of 2, got 16"),
    (task(window=[10**30, 16]), "window: expected a whole number from 1 to 1048576"),
    (task(window=[18, 16]), "window: expected multiples of the 4 pixels"),
    (task(stride=[0, 16]), "stride: expected a whole number from 1"),
    (task(stride=[16, 17]), "leaves gaps"),
    (task(resize=[20, 10]), r"resize: expected \[short, long\]"),
]


@pytest.mark.parametrize("number", range(len(DAMAGED)))
def test_damaged_metadata(number: int, path: Path) -> None:
    text, said = DAMAGED[number]
    assert load(rewritten(path, task=task())).task is not None
    rewritten(path, task=text)
    for reader in (load, lambda p: describe_file(str(p))):
        with pytest.raises(ValueError, match=said) as caught:
            reader(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"decode_head.conv_seg.bias": None}, "missing: decode_head.conv_seg.bias"),
        ({"backbone.norm_f.weight": None}, "missing: backbone.norm_f.weight"),
        ({"norm_f.weight": np.zeros(16, np.float32)}, "unexpected: norm_f.weight"),
        (
            {"backbone.pos_embed": np.zeros((1, 9, 16), np.float32)},
            r"misshapen: backbone.pos_embed: expected \(1, 16, 16\), got \(1, 9, 16\)",
        ),
        (
            {"decode_head.conv_seg.bias": np.zeros(3, np.int64)},
            "decode_head.conv_seg.bias: expected a float type, got i64",
        ),
        ({"backbone.norm_f.weight": np.zeros(16, bool)}, "expected a float type, got bool"),
    ],
)
def test_tensors_that_do_not_fit(tensors: dict[str, Any], said: str, path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        load(rewritten(path, tensors))
    with pytest.raises(ValueError, match=said):
        describe_file(str(path))


def test_counters_are_whole_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    FCN(backbone(), 3).save(path)
    name = "decode_head.convs.1.bn.num_batches_tracked"
    with pytest.raises(ValueError, match=f"{name}: expected i64, got f32"):
        load(rewritten(path, {name: np.float32(3)}))


def test_sizes_that_no_tensor_has(path: Path) -> None:
    """A header cannot make the reader ask for memory, nor count for long."""
    huge = {"channels": 65536, "convs": 256, "head_norm": "batch", "dropout": 0.0}
    for texts in (
        {"task": task(head="fcn", options=huge)},
        {"task": task(head="segmenter", options={"layers": 256})},
        {"config": metadata(path)["vimcore.config"].replace('"embed_dim":16', '"embed_dim":65536')},
    ):
        with pytest.raises(ValueError, match=r"do not fit|backbone's"):
            load(rewritten(path, **texts))
    with pytest.raises(ValueError, match="layers: expected 1 to 256, got 1000000000"):
        load(rewritten(path, task=task(head="segmenter", options={"layers": 10**9})))


def test_files_of_other_kinds(path: Path, tmp_path: Path) -> None:
    classifier = tmp_path / "classifier.safetensors"
    vimcore.VisionMamba(**SMALL, num_classes=3).save(classifier)
    with pytest.raises(
        ValueError, match=r"holds a classifier or backbone; vimcore.VisionMamba.load reads it"
    ):
        load(classifier)
    with pytest.raises(ValueError, match=r"vimcore.segmentation.load reads it"):
        vimcore.VisionMamba.load(path)
    with pytest.raises(ValueError, match=r"vimcore\.labels"):
        load(rewritten(path, labels='["a"]'))
    rewritten(path, labels=None, config=None)
    with pytest.raises((ValueError, vimcore.Error), match=r"no vimcore\.config"):
        load(path)
    rewritten(path, task=None)
    with pytest.raises((ValueError, vimcore.Error), match=r"no vimcore\.config"):
        load(path)
    with pytest.raises((OSError, vimcore.Error), match=r"missing\.safetensors"):
        load(tmp_path / "missing.safetensors")


def test_preprocessing_of_other_channels(path: Path) -> None:
    steps = '{"mean": [0.5], "std": [0.5], "crop": [16, 16], "resize": 16}'
    with pytest.raises(ValueError, match="the network takes 3 channels, got 1"):
        load(rewritten(path, preprocess=steps))


def test_detectors(path: Path) -> None:
    """Their part of the metadata, with which detection stands on the same checks."""
    found = DetectTask("cascade", {"masks": True}, ("cat", "dog"), (17, 18), (1024, 1024))
    text = pack_task(found)
    assert unpack_task(text, "x") == found
    assert unpack_task({}, "x") is None
    with pytest.raises(ValueError, match=r"holds a detector; vimcore.detection.load reads it"):
        load(rewritten(path, task=text["vimcore.task"]))
    for changes, said in (
        ({"ids": [1, 1]}, "ids: one is there twice"),
        ({"ids": [1]}, "ids: expected a list of 2, got 1"),
        ({"resize": None}, "resize: expected a list of 2"),
        ({"window": [1, 1]}, "'window': unknown"),
    ):
        damaged = json.dumps({**json.loads(text["vimcore.task"]), **changes})
        with pytest.raises(ValueError, match=said):
            unpack_task({"vimcore.task": damaged}, "x")
