from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray

class Adapter:
    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrices."""

class Sampler:
    def __init__(
        self,
        vocab: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition: float = 1.0,
        presence: float = 0.0,
        frequency: float = 0.0,
        bias: Sequence[tuple[int, float]] = [],
        seed: int = 0,
        logprobs: int = -1,
    ) -> None: ...
    @property
    def logprobs(self) -> int:
        """-1, or how many alternatives are reported."""

    def seen(
        self, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)]
    ) -> None:
        """Counts prompt tokens for the repetition penalty."""

    def set_mask(
        self,
        mask: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
    ) -> None:
        """
        [ceil(vocab / 32)] Only tokens whose bit, t % 32 of word t // 32, is set are chosen from now on; None frees all.

        Reported log-probabilities stay the model's own. ValueError: a mask of another size, or one without any token.
        """

    def expect_mask(self) -> None:
        """
        A mask is being computed: the next choice waits for set_mask, two seconds at most.
        """

    def commit(
        self, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)]
    ) -> None:
        """
        Counts tokens of the output that were not chosen here, and moves the random stream behind them.
        """

    def sample(
        self, logits: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)]
    ) -> tuple[int, float, list[tuple[int, float]]]:
        """
        (token, log-probability, best) of one row of logits, as Runtime.step does it.
        """

UNUSABLE: int

MASK_LATE: int

PACK_VERSION: int = 3

def pack(
    name: str,
    type: int,
    rows: int,
    cols: int,
    data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
    threads: int,
) -> Annotated[NDArray[numpy.uint8], dict(writable=False)]:
    """[bytes] a matrix's panels, as a packed file holds them."""

def packed_layout(
    key: bytes, source: bytes, matrices: Sequence[tuple[str, int, int, int]]
) -> tuple[bytes, list[int], int]:
    """
    (head, offset of each matrix's panels, size) of the packed file of `matrices`: name, GGML type, rows, columns.
    """

def packed_source(path: bytes) -> bytes:
    """
    The source that a packed file names; ValueError unless it is one of this version.
    """

def quantize(
    type: int,
    values: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    weights: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    threads: int,
) -> tuple[NDArray[numpy.uint8], NDArray[numpy.float64]]:
    """
    ([bytes], [rows]) `values` [rows, columns] in blocks of a GGML type; each row's error, by `weights` [columns].
    """

def packed_bytes(type: int, rows: int, cols: int) -> int:
    """Bytes that a product reads of a matrix of this GGML type."""

class PackedFile:
    def __init__(self, path: bytes, key: bytes) -> None: ...
    def has(self, name: str, type: int, rows: int, cols: int) -> bool: ...
    @property
    def nbytes(self) -> int: ...

def string_places(
    data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
    at: int,
    count: int,
) -> NDArray[numpy.uint64]:
    """
    [found] where `count` strings from `at` on have their lengths; fewer where the data ends before.
    """

def strings(
    data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
    places: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order="C", device="cpu", writable=False)],
) -> list[str]:
    """
    The strings at `places`, up to the first that is cut off or not UTF-8.
    """

MOST_RANK: int = 512
PAGE_TOKENS: int = 32
BIAS_SLACK: int = 32

def time_matmul(
    type: int,
    rows: int,
    cols: int,
    data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
    count: int,
    isa: str,
    threads: int,
    repeats: int,
    copies: int = 1,
    bytes: bool = False,
) -> tuple[list[float], int]:
    """
    (seconds of each product, packed bytes) of `count` rows of activations by one matrix, in the form that a step takes.
    """

def dot_peak(isa: str, threads: int) -> float:
    """10^9 byte operations a second of a plain dot loop; 0: none for this ISA."""

def supported_isas() -> list[str]:
    """ISAs this machine can run, slowest first."""

def read_bandwidth(mib: int, threads: int) -> float:
    """GB/s of a plain read of `mib` MiB by `threads` threads."""

def read_times(mib: int, threads: int, count: int) -> list[float]:
    """Milliseconds of `count` such reads, one after the other."""

def amx_state() -> str:
    """Whether AMX tiles are used here, or why not."""

def barrier_ns(threads: int) -> float:
    """Nanoseconds of one barrier among `threads` threads."""

def matmul(
    x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    type: int,
    rows: int,
    data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
    isa: str = "auto",
    by: str = "shorts",
    exact: bool = False,
) -> NDArray[numpy.float32]:
    """
    x w^T by one ISA's kernels. by: activations as shorts, bytes or wide operands; exact: all in floats.
    """

def to_iq4_nl(
    type: int,
    data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
    threads: int = 1,
) -> NDArray[numpy.uint8]:
    """The values of `data`, blocks of a GGML type, as blocks of IQ4_NL."""

def unpack(
    type: int,
    rows: int,
    cols: int,
    data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
) -> NDArray[numpy.float32]: ...

class Runtime:
    def __init__(
        self,
        *,
        threads: int,
        isa: str,
        max_tokens: int,
        max_outputs: int,
        pages: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        vocab: int,
        context: int,
        exact: bool,
        screen: bool = True,
        bytes: bool = False,
    ) -> None: ...
    def use_packed(self, file: PackedFile) -> None:
        """Takes the matrices added from here on out of `file` where it has them."""

    def add_buffer(self, name: str, width: int) -> None: ...
    def add_matrix(
        self,
        name: str,
        type: int,
        rows: int,
        cols: int,
        data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
    ) -> None: ...
    def add_vector(
        self,
        name: str,
        values: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    ) -> None: ...
    def embed(self, out: str, weight: str, scale: float, positions: str, types: str = "") -> None: ...
    def norm(
        self,
        out: str,
        x: str,
        weight: str,
        bias: str,
        eps: float,
        layer: bool,
        residual: str,
        begin: int = 0,
        end: int = 0,
    ) -> None: ...
    def matmul(
        self, out: str, x: str, weights: Sequence[str], biases: Sequence[str], activation: str, residual: str, gate: str
    ) -> None: ...
    def attention(
        self,
        out: str,
        qkv: str,
        layer: int,
        heads: int,
        scale: float,
        rope: str,
        interleaved: bool,
        window: int,
        q_norm: str,
        k_norm: str,
        eps: float,
        bias: str = "",
        norm_rotated: bool = False,
    ) -> None: ...
    def convolve(self, out: str, bcx: str, weight: str, layer: int, taps: int) -> None: ...
    def attend_all(
        self,
        out: str,
        qkv: str,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        bias: str = "",
        rope: str = "",
        window: int = 0,
        q_norm: str = "",
        k_norm: str = "",
        eps: float = 1e-6,
    ) -> None: ...
    def remember(self, kv: str, layer: int) -> None: ...
    def end_source(self) -> None: ...
    def cross_attention(self, out: str, q: str, layer: int, heads: int, scale: float) -> None: ...
    def select(self, out: str, x: str) -> None: ...
    def pool(self, out: str, x: str, mean: bool) -> None: ...
    def finish(self) -> None: ...
    def adapter(
        self,
        pairs: Sequence[
            tuple[
                str,
                Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
                Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
                float,
            ]
        ],
    ) -> Adapter:
        """
        An adapter of this runtime: (weight, A [rank, inputs], B [outputs, rank], scale) of each product it changes.
        """

    def step(
        self,
        tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        starts: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        lengths: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        tables: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        samplers: Sequence[Sampler | None],
        drafted: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        adapters: Sequence[Adapter | None] | None = None,
        sources: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)]
        | None = None,
        source_tables: Annotated[
            NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)
        ]
        | None = None,
    ) -> list[list[tuple[int, float, list[tuple[int, float]]]]]: ...
    def propose(
        self,
        tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        starts: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        lengths: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        tables: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        samplers: Sequence[Sampler | None],
        ahead: Sequence[Sequence[int]],
        words: int | None = None,
    ) -> list[tuple[int, float]]: ...
    def logits(
        self,
        tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        starts: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        lengths: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        tables: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        all: bool = False,
        adapters: Sequence[Adapter | None] | None = None,
        sources: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)]
        | None = None,
        source_tables: Annotated[
            NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)
        ]
        | None = None,
    ) -> NDArray[numpy.float32]: ...
    def hidden(
        self,
        tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        starts: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        lengths: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        tables: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    ) -> NDArray[numpy.float32]: ...
    def read(
        self,
        tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        lengths: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        tables: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    ) -> None:
        """Reads the sources of an encoder-decoder model into the pages of their tables."""

    def texts(
        self,
        tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        lengths: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        head: bool = False,
        types: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)]
        | None = None,
    ) -> NDArray[numpy.float32]:
        """
        [texts, width]: an encoder's embedding of each text, or the logits of its head.
        """

    def score(
        self,
        tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        starts: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        lengths: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        tables: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        targets: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        adapters: Sequence[Adapter | None] | None = None,
    ) -> NDArray[numpy.float32]: ...
    def score_best(
        self,
        tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        starts: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        lengths: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        tables: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        targets: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        count: int,
        adapters: Sequence[Adapter | None] | None = None,
    ) -> tuple[NDArray[numpy.float32], NDArray[numpy.int32], NDArray[numpy.int32], NDArray[numpy.float32]]: ...
    def score_tree(
        self,
        tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        starts: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        lengths: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        tables: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        parents: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        targets: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        adapters: Sequence[Adapter | None] | None = None,
    ) -> NDArray[numpy.float32]: ...
    def copy_page(self, source: int, target: int) -> None:
        """Copies the keys and values of page `source`, all layers, into page `target`."""

    @property
    def isa(self) -> str: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def token_bytes(self) -> int: ...
