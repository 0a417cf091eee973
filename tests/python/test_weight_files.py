# SPDX-License-Identifier: Apache-2.0
"""Files that others wrote: wrappers around weights, files that are none, hostile headers and pickles."""

from __future__ import annotations

import collections
import io
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from vim_infer import run as vim_infer
from vimcore import _core
from vimcore.cli import main
from vimcore.io import load_checkpoint
from vimcore.weights.checkpoints import read_checkpoint
from vimcore.weights.convert import convert
from vimcore.weights.wrappers import plain_names

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_classes": 5}
State = dict[str, torch.Tensor]


def small(**options: Any) -> vimcore.VisionMamba:
    return vimcore.VisionMamba(**{**SMALL, **options}).eval()


def state_of(model: torch.nn.Module, prefix: str = "") -> State:
    return {prefix + name: value.detach().clone() for name, value in model.state_dict().items()}


def same(model: vimcore.VisionMamba, state: State, plus: float = 0) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name] + plus), name


# ---- wrappers ----------------------------------------------------------------------------------------------


def averaged(model: vimcore.VisionMamba) -> State:
    return dict(torch.optim.swa_utils.AveragedModel(model).state_dict())


WRAPPED: dict[str, tuple[Callable[[vimcore.VisionMamba], Any], str]] = {
    "timm": (
        lambda m: {"epoch": 1, "arch": "x", "state_dict": state_of(m), "optimizer": {}, "metric": 76.1},
        "weights taken from the key 'state_dict'",
    ),
    "compiled": (lambda m: state_of(m, "_orig_mod."), "_orig_mod taken out of the names"),
    "authors, compiled": (lambda m: {"model": state_of(m, "_orig_mod.")}, "_orig_mod taken out"),
    "both": (lambda m: state_of(m, "module._orig_mod."), "prefix 'module.' taken off"),
    "compiled layers": (
        lambda m: {k.replace("layers.0.", "layers.0._orig_mod."): v for k, v in state_of(m).items()},
        "_orig_mod taken out",
    ),
    "average": (averaged, "n_averaged left out"),
    "lightning": (
        lambda m: {
            "pytorch-lightning_version": "2.5.0",
            "state_dict": state_of(m, "model."),
            "hyper_parameters": {"lr": 1e-3},
            "callbacks": {},
        },
        "prefix 'model.' taken off",
    ),
    "net": (lambda m: {"model_state_dict": state_of(m, "net.")}, "prefix 'net.' taken off"),
    "mmengine": (
        lambda m: {"meta": {"epoch": 3, "best": np.float64(0.5)}, "state_dict": state_of(m, "backbone.")},
        "prefix 'backbone.' taken off",
    ),
    "deepspeed": (lambda m: {"module": state_of(m)}, "key 'module'"),
    "any prefix of all": (lambda m: state_of(m, "encoder.vim."), "prefix 'encoder.vim.' taken off"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_taken_off_and_told(kind: str, tmp_path: Path) -> None:
    wrap, said = WRAPPED[kind]
    source, target = small(), small()
    torch.save(wrap(source), tmp_path / "a.pth")
    load_checkpoint(target, tmp_path / "a.pth")
    same(target, state_of(source))
    _, notes = convert(str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors"), settings={"img_size": 32})
    assert any(said in note for note in notes), notes
    same(vimcore.VisionMamba.load(tmp_path / "b.safetensors"), state_of(source))


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema_state_dict"])
def test_averaged_weights(key: str, tmp_path: Path) -> None:
    source, target = small(), small()
    average = {name: value + 1 for name, value in state_of(source, "module.").items()}
    torch.save({"state_dict": state_of(source), key: average}, tmp_path / "a.pth")
    load_checkpoint(target, tmp_path / "a.pth", weights="ema")
    same(target, state_of(source), 1)
    load_checkpoint(target, tmp_path / "a.pth")
    same(target, state_of(source))


def test_wrapped_safetensors(tmp_path: Path) -> None:
    source, target = small(), small()
    arrays = {name: value.numpy() for name, value in state_of(source, "module._orig_mod.").items()}
    _core.write_safetensors(str(tmp_path / "a.safetensors"), arrays, {})
    load_checkpoint(target, tmp_path / "a.safetensors")
    same(target, state_of(source))
    _, notes = convert(str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"))
    assert "prefix 'module.' taken off the names" in notes
    same(vimcore.VisionMamba.load(tmp_path / "b.safetensors", img_size=32), state_of(source))


def test_formats_are_told_by_content(tmp_path: Path) -> None:
    source = small()
    torch.save(state_of(source), tmp_path / "torch.safetensors")
    source.save(tmp_path / "ours.bin")
    for name in ("torch.safetensors", "ours.bin"):
        target = small()
        load_checkpoint(target, tmp_path / name)
        same(target, state_of(source))
        convert(str(tmp_path / name), str(tmp_path / "b.safetensors"), settings={"img_size": 32})
        same(vimcore.VisionMamba.load(tmp_path / "b.safetensors"), state_of(source))


def test_nothing_beside_the_network_is_passed_over(tmp_path: Path) -> None:
    model = small()
    extra = {"criterion.weight": torch.ones(2)}
    torch.save({"state_dict": state_of(model, "model.") | extra}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"unexpected: criterion.weight \(2,\)"):
        load_checkpoint(small(), tmp_path / "a.pth")
    two = state_of(model, "student.") | state_of(model, "teacher.")
    torch.save(two, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"several networks, under 'student.', 'teacher.'"):
        load_checkpoint(small(), tmp_path / "b.pth")
    torch.save({"model": state_of(model), "state_dict": state_of(model)}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="several keys: model, state_dict"):
        load_checkpoint(small(), tmp_path / "c.pth")
    other = {"backbone." + k: v for k, v in state_of(small(num_classes=0)).items()}
    head = {"head.fc.weight": torch.ones(7, 16), "head.fc.bias": torch.ones(7)}
    torch.save({"state_dict": other | head}, tmp_path / "d.pth")
    with pytest.raises(ValueError, match=r"unexpected: head.fc.weight"):
        load_checkpoint(small(), tmp_path / "d.pth")
    target = small()
    load_checkpoint(target, tmp_path / "d.pth", head="skip")
    assert torch.equal(target.norm_f.weight, other["backbone.norm_f.weight"])


def test_names_that_would_meet() -> None:
    with pytest.raises(ValueError, match=r"x: without its wrappers, a\.b is there twice"):
        plain_names(["a.b", "a._orig_mod.b"], "x")
    assert plain_names(["conv1.weight"], "x") == ({"conv1.weight": "conv1.weight"}, [])


# ---- files that are something else -------------------------------------------------------------------------

TORCH = io.BytesIO()
torch.save({"weight": torch.zeros(2)}, TORCH)
FOREIGN = {
    "empty": (b"", "an empty file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 29000000\n", "git lfs pull"),
    "html": (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "download the file itself"),
    "text": (b"404: Not Found", '"404: Not Found"'),
    "npy": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", "numpy"),
}


def one_line(run: Callable[[], Any], kinds: Any = (ValueError, _core.Error)) -> str:
    with pytest.raises(kinds) as caught:
        run()
    text = str(caught.value)
    assert "\n" not in text
    assert "weights_only" not in text
    return text


def readers(path: Any) -> tuple[Callable[[], Any], ...]:
    return partial(vimcore.VisionMamba.load, path), partial(vimcore.Runtime, path)


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_other_files_are_named(
    kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, part = FOREIGN[kind]
    path = tmp_path / name
    path.write_bytes(data)
    for run in (partial(load_checkpoint, small(), path), *readers(path)):
        text = one_line(run)
        assert part in text
        assert str(path) in text
    assert main(["convert", str(path), str(tmp_path / "out.safetensors")]) == 1
    assert main(["predict", "--weights", str(path), str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 2
    assert error.count(part) == 2
    assert "Traceback" not in error


@pytest.mark.parametrize("command", [["info"], ["predict", "x.png"]])
def test_vim_infer_names_them_too(command: list[str], tmp_path: Path) -> None:
    for data, part in (*FOREIGN.values(), (TORCH.getvalue(), "`vimcore convert`")):
        (tmp_path / "a.pth").write_bytes(data)
        done = vim_infer(*command, "--weights", tmp_path / "a.pth")
        assert (done.returncode, done.stdout) == (1, "")
        assert part in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_pickle_where_a_vimcore_file_is_meant(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(TORCH.getvalue())
    torch.save({"weight": torch.zeros(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pth", "old.pt"):
        for run in readers(tmp_path / name):
            assert "`vimcore convert` makes a vimcore file" in one_line(run)


def test_pipes_and_folders_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", tmp_path):
        assert "not a regular file" in one_line(partial(load_checkpoint, small(), path))
        assert "not a regular file" in one_line(partial(vimcore.VisionMamba.load, path))
    with pytest.raises(FileNotFoundError):
        load_checkpoint(small(), tmp_path / "absent.pth")


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.safetensors"
    model = small()
    model.save(path)  # type: ignore[arg-type]
    for name in (path, os.fsdecode(path)):
        same(vimcore.VisionMamba.load(name), state_of(model))  # type: ignore[arg-type]
        assert vimcore.Runtime(name).config["depth"] == 2  # type: ignore[arg-type]
        load_checkpoint(small(), name)  # type: ignore[arg-type]
    Path(os.fsdecode(path)).write_bytes(b"")
    for run in readers(os.fsdecode(path)):
        assert "caf\\xe9.safetensors: an empty file" in one_line(run)


# ---- hostile pickles ---------------------------------------------------------------------------------------


class Call:
    """Calls something when it is unpickled by a careless loader."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.what = function, arguments

    def __reduce__(self) -> Any:
        return self.what


def raw(content: Any) -> bytes:
    return pickle.dumps(content, protocol=2)


def legacy(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def zipped(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize("write", [raw, legacy, zipped])
def test_hostile_pickles_run_nothing(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark, path = tmp_path / "ran", tmp_path / "a.pth"
    payloads = [
        Call(os.mkdir, str(mark)),
        Call(os.system, f"touch {mark}"),
        Call(eval, f"open({str(mark)!r}, 'w')"),
        Call(getattr, Call(__import__, "os"), "system"),
        {"model": {"head.weight": Call(os.mkdir, str(mark))}},
        {"state_dict": state_of(small()), "epoch": Call(os.mkdir, str(mark))},
        collections.OrderedDict(a=Call(np.ndarray.tofile, np.zeros(1), str(mark))),
    ]
    for payload in payloads:
        path.write_bytes(write(payload))
        text = one_line(lambda: load_checkpoint(small(), path), ValueError)
        assert str(path) in text
        assert main(["convert", str(path), str(tmp_path / "o.safetensors")]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "weights_only" not in error
    assert not mark.exists()
    if write is zipped:
        path.write_bytes(write(payloads[0]))
        assert "holds an unsupported object, posix.mkdir" in one_line(lambda: load_checkpoint(small(), path))


def test_damaged_pickles(tmp_path: Path) -> None:
    """Every opcode that the good file's pickle can be cut behind, bytes turned over, and other archives."""
    path = tmp_path / "a.pth"
    good = zipped(state_of(small(depth=1)))
    rng = np.random.default_rng(0)
    damaged = [good[:n] for n in (1, 2, 5, 30, 200, len(good) // 2, len(good) - 1)]
    for _ in range(30):
        turned = bytearray(good)
        for at in rng.integers(0, 4000, 3):
            turned[at] ^= 1 << rng.integers(8)
        damaged.append(bytes(turned))
    whole = raw({"a": 1})
    damaged += [whole[:at] for _, _, at in pickletools.genops(whole) if at]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("word/document.xml", "<x/>")
    script = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1, 1)), script)
    damaged += [archive.getvalue(), script.getvalue(), b"\x80\x02.", zipped([1, 2]), zipped(3)]
    said = []
    for data in damaged:
        path.write_bytes(data)
        try:
            read_checkpoint(str(path))
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 20
    assert not any("\n" in text or "weights_only" in text for text in said)
    assert any("TorchScript" in text for text in said)


def test_claims_of_a_pickle_are_not_believed(tmp_path: Path) -> None:
    """A few bytes can claim any shape with strides of 0."""
    state = state_of(small())
    state["head.weight"] = torch.zeros(1).expand(1 << 20, 1 << 14)
    torch.save(state, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < 1 << 18
    with pytest.raises(ValueError, match=r"hold something else: head.weight$"):
        convert(str(tmp_path / "a.pth"), str(tmp_path / "o.safetensors"), settings={"img_size": 32})
    for strange in (torch.zeros(2, 2).to_sparse(), "text", torch.zeros(2, device="meta")):
        torch.save({"a": strange}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"hold something else: a$"):
            read_checkpoint(str(tmp_path / "a.pth"))


def test_whole_networks_are_no_weights(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "a.pth")
    text = one_line(lambda: load_checkpoint(small(), tmp_path / "a.pth"))
    assert "holds an unsupported object, vimcore.nn.vision_mamba.VisionMamba" in text
    assert "save the state_dict() alone" in text


def test_training_starts_from_wrapped_weights(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from vimcore.tasks.classification.task import build
    from vimcore.tasks.settings import Settings

    source = small()
    torch.save({"state_dict": state_of(source, "module.")}, tmp_path / "a.pth")
    options = {"img_size": (32,), "embed_dim": 16, "depth": 2, "init": str(tmp_path / "a.pth")}
    model, notes = build(Settings().merged(options), 3, list("abcde"))
    same(model, state_of(source))
    assert notes[1:] == ["weights taken from the key 'state_dict'", "prefix 'module.' taken off the names"]


def test_objects_beside_the_weights_are_not_made(tmp_path: Path) -> None:
    model, target = small(), small()
    content = {
        "state_dict": state_of(model),
        "losses": np.arange(3.0),
        "best": np.float32(1),
        "to": Path("x"),
    }
    torch.save(content, tmp_path / "a.pth")
    load_checkpoint(target, tmp_path / "a.pth")
    same(target, state_of(model))
