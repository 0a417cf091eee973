# SPDX-License-Identifier: Apache-2.0
# The extension module, private to the package. Written by python/src/stub.py, not by hand.
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, TypeAlias

import numpy
import numpy.typing
from numpy.typing import NDArray

Path: TypeAlias = str | bytes | PathLike[str] | PathLike[bytes]
Array: TypeAlias = Any  # contiguous: a numpy array, a torch tensor or a DLPack capsule

__version__: str

class Error(RuntimeError):
    pass

def build_info() -> dict[str, Any]:
    """
    Version, compiler, kernels in use and built in, unit for bf16 ("": none), CUDA devices, JPEG, PNG, OpenMP.
    """

def bf16_refusal() -> str:
    """
    Why this CPU does not compute in bfloat16, and what to do; "" where it does.
    """

def cuda_device_count() -> int: ...
def cuda_description(device: int) -> str: ...
def cuda_products() -> dict[str, Any]:
    """
    Products of matrices on CUDA so far: by cuBLASLt, by built-in kernels as it had no algorithm,
    and by it with another algorithm than for other numbers of rows.
    """

def set_give_back_memory(ask: Callable[[int, int], bool] | None) -> None:
    """
    Who is asked, by device and bytes, when a CUDA device has no memory left.

    True: the allocation is tried again.
    """

def fma_peak(threads: int) -> float: ...
def bf16_peak(threads: int) -> float: ...
def release_memory() -> None:
    """
    Frees the scratch memory that calls keep for the next ones.

    CUDA graphs captured before must not run again.
    """

class Config:
    """
    The architecture of one Vision Mamba: a value, checked when it is made.

    Options and defaults are those of `VisionMamba`; dt_rank is the number that "auto" stands for.

    Raises:
        ValueError, TypeError: an option is unknown, out of range or of another type, or
            two do not go together.
    """

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        directions: str = "ssm_conv",
        average_directions: bool = True,
        class_token: str = "middle",
        registers: int | None = None,
        neck_reduction: int = 1,
        pool: str = "mean",
        norm: str = "rms",
        norm_eps: float = 1e-5,
        pos_embed: bool = True,
        rope: bool = False,
        rope_residual: bool = False,
        rope_grid: int = 14,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        frames: int | None = None,
    ) -> None: ...
    def replace(self, **changes: Any) -> Config:
        """The same with other options."""

    def to_dict(self) -> dict[str, Any]:
        """All options, as the constructor takes them."""

    def to_json(self) -> str: ...
    @staticmethod
    def from_json(text: str) -> Config: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...
    def __getstate__(self) -> str: ...
    def __setstate__(self, arg: str, /) -> None: ...
    @property
    def img_size(self) -> tuple[int, int]: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def in_chans(self) -> int: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def embed_dim(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def d_state(self) -> int: ...
    @property
    def d_conv(self) -> int: ...
    @property
    def expand(self) -> int: ...
    @property
    def dt_rank(self) -> int: ...
    @property
    def directions(self) -> str: ...
    @property
    def average_directions(self) -> bool: ...
    @property
    def class_token(self) -> str: ...
    @property
    def registers(self) -> int | None: ...
    @property
    def neck_reduction(self) -> int: ...
    @property
    def pool(self) -> str: ...
    @property
    def norm(self) -> str: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def pos_embed(self) -> bool: ...
    @property
    def rope(self) -> bool: ...
    @property
    def rope_residual(self) -> bool: ...
    @property
    def rope_grid(self) -> int: ...
    @property
    def layer_scale(self) -> float | None: ...
    @property
    def drop_rate(self) -> float: ...
    @property
    def drop_path_rate(self) -> float: ...
    @property
    def frames(self) -> int | None: ...
    @property
    def inner(self) -> int:
        """E, the width of the mixers."""

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""

    @property
    def patches(self) -> int: ...
    @property
    def tokens(self) -> int:
        """L, class tokens included."""

    @property
    def class_tokens(self) -> int:
        """Their number."""

    @property
    def readout_width(self) -> int:
        """Numbers that the head sees of an image."""

    @property
    def images_axes(self) -> str:
        """Shape of a batch of images, as a text."""

    @property
    def class_position(self) -> int:
        """Index of the (first) class token in eval, or -1."""

    @property
    def class_positions(self) -> list[int]:
        """Indices of the class tokens in eval, ascending."""

    @property
    def two_directions(self) -> bool: ...
    @property
    def head_per_token(self) -> bool:
        """Whether the head is applied to every token."""

    @property
    def outputs(self) -> int:
        """Classes, or the width of the read-out where there is no head."""

    def logits_shape(self, batch: int) -> tuple[int, ...]: ...
    def flops(self) -> int:
        """Multiply-adds of one image, scans included."""

    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters by state-dict key, in order."""

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of one block by name, without "layers.N."."""

class Preprocess:
    """
    How a picture becomes input: short side, centre crop, mean and standard deviation.
    """

    def __init__(
        self,
        *,
        resize: int = 256,
        crop: int | Sequence[int] = 224,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        interpolation: str = "bicubic",
    ) -> None: ...
    def replace(self, **changes: Any) -> Preprocess:
        """The same with other options."""

    def to_dict(self) -> dict[str, Any]:
        """All options, as the constructor takes them."""

    def to_json(self) -> str: ...
    @staticmethod
    def from_json(text: str) -> Preprocess: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...
    def __getstate__(self) -> str: ...
    def __setstate__(self, arg: str, /) -> None: ...
    @property
    def resize(self) -> int: ...
    @property
    def crop(self) -> tuple[int, int]: ...
    @property
    def mean(self) -> list[float]: ...
    @property
    def std(self) -> list[float]: ...
    @staticmethod
    def default(config: Config) -> Preprocess | None:
        """
        ImageNet's evaluation at the network's image size; None where its input is no picture.
        """

    def rescaled(self, crop_height: int, crop_width: int) -> Preprocess:
        """
        The same steps for another crop: the short side before it keeps its proportion.
        """

def plan_bytes(
    config: Config, batch: int, memory: str = "", dtype: str = "float32", threads: int = 1, cuda: bool = False
) -> dict[str, int]: ...
def machine_bytes() -> int: ...
def misfits(wanted: Mapping[str, Sequence[int]], given: Mapping[str, Sequence[int]]) -> list[str]:
    """
    How given tensors differ from wanted ones, by name and shape; one line each.
    """

class Place:
    """
    Where a call computes: threads on the CPU, 0 for all; on CUDA a cudaStream_t.
    """

    def __init__(self, threads: int = 0, stream: int = 0, capturing: bool = False) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def stream(self) -> int: ...
    @property
    def capturing(self) -> bool: ...

class Outputs:
    """
    Where results go, or their gradients come from; absent ones are not wanted.
    """

    def __init__(
        self,
        logits: Array | None = None,
        tokens: Array | None = None,
        layers: Sequence[int] = [],
        intermediates: Sequence[Array] = [],
    ) -> None: ...

class Draws:
    """The random draws of one training forward."""

    def __init__(
        self,
        drop_path: Array | None = None,
        dropout: Array | None = None,
        flip: bool = False,
        class_position: int = -1,
    ) -> None: ...
    @property
    def flip(self) -> bool: ...
    @property
    def class_position(self) -> int: ...

class Gradients:
    """One array for the gradients of all parameters, and that of the images."""

    def __init__(self, flat: Array, offsets: Sequence[int], dimages: Array | None = None) -> None: ...

class Kept:
    """
    What a forward kept: the bytes of Saved.token, or a copy, and their memory mode.
    """

    def __init__(self, bytes: Array, memory: str) -> None: ...

class BoundWeights:
    def look(self, place: Place) -> int: ...

class Saved:
    def __init__(self, memory: str = "lean", capturing: bool = False) -> None: ...
    @staticmethod
    def lent(memory: str, bytes: Array) -> Saved:
        """What a forward keeps goes into an array (bytes) of the caller's."""

    @staticmethod
    def size(config: Config, batch: int, dtype: str, cuda: bool, memory: str) -> int:
        """Bytes that a forward of the network keeps."""

    @staticmethod
    def block_size(config: Config, batch: int, len: int, dtype: str, cuda: bool, memory: str) -> int:
        """Bytes that a forward of one block keeps."""

    @property
    def bytes(self) -> int: ...
    @property
    def memory(self) -> str: ...
    @property
    def token(self) -> NDArray[numpy.uint8]: ...
    @staticmethod
    def chunk(memory: str) -> int: ...

class BoundNetwork:
    def __init__(self, config: Config) -> None: ...
    def bind(self, parameters: Sequence[Array]) -> BoundWeights: ...
    def saved(self, memory: str, place: Place) -> Saved: ...
    def release(self) -> None: ...
    def forward(
        self,
        weights: BoundWeights,
        images: Array,
        outputs: Outputs,
        draws: Draws,
        place: Place,
        saved: Saved | None = None,
        constant: bool = False,
    ) -> None: ...
    def backward(
        self,
        weights: BoundWeights,
        images: Array,
        kept: Kept,
        incoming: Outputs,
        gradients: Gradients,
        draws: Draws,
        place: Place,
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
    def run(self, images: Array) -> NDArray[numpy.float32]: ...
    def features(self, images: Array) -> NDArray[numpy.float32]: ...
    @property
    def config(self) -> Config: ...
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
    place: Place,
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
    place: Place,
) -> None: ...
def conv1d_forward(
    x: Array, weight: Array, bias: Array | None, silu: bool, reverse: bool, out: Array, place: Place
) -> None: ...
def conv1d_backward(
    x: Array,
    weight: Array,
    bias: Array | None,
    silu: bool,
    reverse: bool,
    dout: Array,
    dx: Array,
    dweight: Array | None,
    dbias: Array | None,
    place: Place,
) -> None: ...
def selective_scan_forward(
    inputs: Sequence[Array | None], delta_softplus: bool, reverse: bool, out: Array, place: Place
) -> None: ...
def selective_scan_backward(
    inputs: Sequence[Array | None],
    delta_softplus: bool,
    reverse: bool,
    out: Array,
    dout: Array,
    gradients: Sequence[Array | None],
    place: Place,
) -> None: ...
def scan_forward(
    xz: Array,
    inputs: Sequence[Sequence[Array | None]],
    outputs: Sequence[Sequence[Array | None]],
    scale: float,
    chunk: int,
    out: Array,
    place: Place,
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
    place: Place,
) -> None: ...
def block_forward(
    config: Config,
    parameters: Sequence[Array],
    x: Array,
    residual: Array | None,
    reverse: bool,
    residual_out: Array,
    out: Array,
    saved: Saved | None,
    place: Place,
) -> None: ...
def block_backward(
    config: Config,
    parameters: Sequence[Array],
    residual_out: Array,
    reverse: bool,
    kept: Kept,
    dout: Array,
    dresidual_out: Array | None,
    dresidual: Array,
    dx: Array | None,
    gradients: Sequence[Array | None],
    place: Place,
) -> None: ...
def class_rows(class_token: str, patches: int) -> list[int]: ...
def class_places(class_token: str, patches: int, registers: int = 0) -> list[int]: ...
def resize_positions(
    table: Array, out: Array, class_token: str, old_grid: tuple[int, int], new_grid: tuple[int, int], way: str
) -> None:
    """The position table for another grid, written to `out`."""

def resize_positions_backward(
    dout: Array,
    dtable: Array,
    class_token: str,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    way: str,
) -> None:
    """The gradient of the table, added to `dtable`."""

def rope_tables(grid: tuple[int, int], rope_grid: int, cos: Array, sin: Array) -> None: ...
def read_safetensors(path: Path) -> tuple[dict[str, numpy.typing.NDArray[Any]], dict[str, str]]:
    """Arrays by name and metadata; float types that numpy lacks as float32."""

def safetensors_header(path: Path) -> tuple[list[tuple[str, str, tuple[int, ...]]], dict[str, str]]:
    """
    (name, type, shape) of every tensor, and metadata; the tensors are not read.
    """

def describe(metadata: Mapping[str, str], path: Path) -> tuple[Config, list[str] | None, Preprocess | None]:
    """
    What a vimcore file's metadata says; ValueError names `path` and what is missing or damaged.
    """

def check_file(path: Path, more: bool = False) -> tuple[dict[str, str], list[str]]:
    """
    Metadata of a vimcore file, and names of tensors besides its architecture's.

    ValueError where tensors do not fit; those besides do not, unless `more`.
    """

def foreign_kind(head: bytes, size: int) -> str: ...
def write_safetensors(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] = {}, dtype: str | None = None
) -> None:
    """
    Writes a file whole or not at all.

    dtype: "float32", or a 16-bit type for the weights of linear maps, the rest float32; None: as given.
    """

def decode_image(data: bytes, name: str = "<memory>") -> NDArray[numpy.uint8]: ...
def picture_kind(data: bytes) -> str: ...
def upright(image: Array, file: bytes) -> NDArray[numpy.uint8]: ...
def resize_bicubic(image: Array, height: int, width: int) -> NDArray[numpy.uint8]: ...
def resize_linear(image: Array, height: int, width: int) -> NDArray[numpy.uint8]: ...
def preprocess_image(data: bytes, name: str, preprocess: Preprocess) -> NDArray[numpy.float32]: ...
def preprocess_pixels(image: Array, preprocess: Preprocess) -> NDArray[numpy.float32]: ...

class SegmentEngine:
    def __init__(self, path: Path, threads: int = 0, dtype: str = "float32") -> None: ...
    def logits(self, images: Array) -> NDArray[numpy.float32]: ...
    def classes(self, images: Array) -> NDArray[numpy.uint8]: ...
    def segment(self, image: Array) -> NDArray[numpy.uint8]: ...
