# SPDX-License-Identifier: Apache-2.0
# The extension module: private to the package. Arrays are contiguous and checked, all on the CPU or all on
# one CUDA device. `stream` is a cudaStream_t, `capturing` says that it is being captured.
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Path: TypeAlias = str | bytes | PathLike[str] | PathLike[bytes]
Array: TypeAlias = Any  # a numpy array, a torch tensor or a DLPack capsule

__version__: str

class Error(RuntimeError):
    pass

def build_info() -> dict[str, Any]: ...
def cuda_device_count() -> int: ...
def cuda_description(device: int) -> str: ...
def fma_peak(threads: int) -> float: ...
def config_normalize(config_json: str) -> str: ...
def config_facts(config_json: str) -> dict[str, Any]: ...
def param_shapes(config_json: str) -> list[tuple[str, tuple[int, ...]]]: ...
def flops(config_json: str) -> int: ...
def plan_bytes(
    config_json: str,
    batch: int,
    memory: str = "",
    dtype: str = "float32",
    threads: int = 1,
    cuda: bool = False,
) -> dict[str, int]: ...
def machine_bytes() -> int: ...
def release_memory() -> None: ...

class Weights:
    def look(self, threads: int = 0, stream: int = 0) -> int: ...

class Saved:
    def __init__(self, memory: str = "lean", capturing: bool = False) -> None: ...
    @property
    def bytes(self) -> int: ...
    @property
    def memory(self) -> str: ...
    @property
    def token(self) -> Array: ...
    @staticmethod
    def chunk(memory: str) -> int: ...
    @staticmethod
    def bytes_per_block(config_json: str, memory: str, batch: int, float64: bool = False) -> int: ...

class Network:
    def __init__(self, config_json: str) -> None: ...
    def bind(self, parameters: Sequence[Array]) -> Weights: ...
    def saved(self, memory: str = "lean", stream: int = 0, capturing: bool = False) -> Saved: ...
    def release(self) -> None: ...
    def forward(
        self,
        weights: Weights,
        images: Array,
        logits: Array | None = None,
        tokens: Array | None = None,
        layers: Sequence[int] = [],
        intermediates: Sequence[Array] = [],
        saved: Saved | None = None,
        drop_path: Array | None = None,
        mask: Array | None = None,
        flip: bool = False,
        class_position: int = -1,
        threads: int = 0,
        stream: int = 0,
        capturing: bool = False,
        constant: bool = False,
    ) -> None: ...
    def backward(
        self,
        weights: Weights,
        images: Array,
        saved: Array,
        memory: str,
        dlogits: Array | None = None,
        dtokens: Array | None = None,
        layers: Sequence[int] = [],
        dintermediates: Sequence[Array] = [],
        *,
        gradients: Array,
        offsets: Sequence[int],
        dimages: Array | None = None,
        drop_path: Array | None = None,
        mask: Array | None = None,
        flip: bool = False,
        class_position: int = -1,
        threads: int = 0,
        stream: int = 0,
        capturing: bool = False,
    ) -> None: ...

class Engine:
    def __init__(
        self,
        path: Path,
        threads: int = 0,
        img_height: int = 0,
        img_width: int = 0,
        cuda: int = -1,
        dtype: str = "float32",
    ) -> None: ...
    def run(self, images: Array) -> NDArray[np.float32]: ...
    def features(self, images: Array) -> NDArray[np.float32]: ...
    @property
    def config_json(self) -> str: ...
    @property
    def metadata(self) -> dict[str, str]: ...

def norm_forward(
    kind: str,
    eps: float,
    x: Array,
    residual: Array | None,
    weight: Array,
    bias: Array | None,
    residual_out: Array | None,
    out: Array,
    threads: int = 0,
    stream: int = 0,
    capturing: bool = False,
) -> None: ...
def norm_backward(
    kind: str,
    eps: float,
    x: Array,
    weight: Array,
    dout: Array,
    dresidual_out: Array | None,
    dresidual: Array,
    dx: Array | None,
    dweight: Array | None,
    dbias: Array | None,
    threads: int = 0,
    stream: int = 0,
    capturing: bool = False,
) -> None: ...
def conv1d_forward(
    x: Array,
    weight: Array,
    bias: Array | None,
    silu: bool,
    reverse: bool,
    out: Array,
    threads: int = 0,
    stream: int = 0,
    capturing: bool = False,
) -> None: ...
def conv1d_backward(
    x: Array,
    weight: Array,
    bias: Array | None,
    silu: bool,
    reverse: bool,
    out: Array,
    dout: Array,
    dx: Array,
    dweight: Array | None,
    dbias: Array | None,
    threads: int = 0,
    stream: int = 0,
    capturing: bool = False,
) -> None: ...
def selective_scan_forward(
    inputs: Sequence[Array | None],
    delta_softplus: bool,
    reverse: bool,
    out: Array,
    threads: int = 0,
    stream: int = 0,
    capturing: bool = False,
) -> None: ...
def selective_scan_backward(
    inputs: Sequence[Array | None],
    delta_softplus: bool,
    reverse: bool,
    out: Array,
    dout: Array,
    gradients: Sequence[Array | None],
    threads: int = 0,
    stream: int = 0,
    capturing: bool = False,
) -> None: ...
def scan_forward(
    xz: Array,
    inputs: Sequence[Sequence[Array | None]],
    outputs: Sequence[Sequence[Array | None]],
    scale: float,
    chunk: int,
    out: Array,
    threads: int = 0,
    stream: int = 0,
    capturing: bool = False,
) -> None: ...
def scan_backward(
    xz: Array,
    inputs: Sequence[Sequence[Array | None]],
    outputs: Sequence[Sequence[Array | None]],
    scale: float,
    chunk: int,
    out: Array,
    dout: Array,
    dxz: Array,
    threads: int = 0,
    stream: int = 0,
    capturing: bool = False,
) -> None: ...
def block_forward(
    config_json: str,
    parameters: Sequence[Array],
    x: Array,
    residual: Array | None,
    reverse: bool,
    residual_out: Array,
    out: Array,
    saved: Saved | None,
    threads: int = 0,
    stream: int = 0,
    capturing: bool = False,
) -> None: ...
def block_backward(
    config_json: str,
    parameters: Sequence[Array],
    residual_out: Array,
    reverse: bool,
    saved: Array,
    memory: str,
    dout: Array,
    dresidual_out: Array | None,
    dresidual: Array,
    dx: Array | None,
    gradients: Sequence[Array | None],
    threads: int = 0,
    stream: int = 0,
    capturing: bool = False,
) -> None: ...
def describe(metadata: Mapping[str, str], path: Path) -> tuple[str, list[str] | None, str | None]: ...
def check_file(path: Path, more: bool = False) -> tuple[dict[str, str], list[str]]: ...
def foreign_kind(head: bytes, size: int) -> str: ...
def read_safetensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]: ...
def safetensors_header(path: Path) -> tuple[list[tuple[str, str, tuple[int, ...]]], dict[str, str]]: ...
def write_safetensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] = {}) -> None: ...
def decode_image(data: bytes, name: str = "<memory>") -> NDArray[np.uint8]: ...
def upright(image: Array, file: bytes) -> NDArray[np.uint8]: ...
def resize_bicubic(image: Array, height: int, width: int) -> NDArray[np.uint8]: ...
def preprocess_image(data: bytes, name: str, preprocess_json: str) -> NDArray[np.float32]: ...
def preprocess_pixels(image: Array, preprocess_json: str) -> NDArray[np.float32]: ...
def preprocess_normalize(preprocess_json: str) -> str: ...
def preprocess_default() -> str: ...
