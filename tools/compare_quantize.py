"""Our quantisers beside llama.cpp's on a model's weights, and its whole-file quantiser with our importance matrix.

python tools/compare_quantize.py errors MODEL.gguf --library DIR --importance FILE.npz
python tools/compare_quantize.py file MODEL.gguf OUT.gguf --ftype 2 --library DIR [--importance FILE.npz]

DIR holds libllama.so and libggml*.so, as llama.cpp's builds do. `ftype` as in llama.h: 2 is Q4_0, 15 Q4_K_M.
"""

from __future__ import annotations

import argparse
import ctypes as c
import sys
from pathlib import Path

import numpy as np

from millis import _native
from millis.models.dequantize import dequantize
from millis.models.load import read_checkpoint
from millis.models.tensor import GgmlType
from millis.quantize.tensors import TYPES

ROWS = 192  # of a tensor
NOISE = 0.05  # of the weights' deviation: takes the values off the grid of the file's own type


class Imatrix(c.Structure):
    """llama_model_imatrix_data."""

    _fields_ = [("name", c.c_char_p), ("data", c.POINTER(c.c_float)), ("size", c.c_size_t)]


class Parameters(c.Structure):
    """llama_model_quantize_params, of llama.cpp as llama-cpp-python 0.3.36 carries it."""

    _fields_ = [
        *((name, c.c_int32) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        *((name, c.c_bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy", "pure")),
        *((name, c.c_bool) for name in ("keep_split", "dry_run")),
        *((name, c.c_void_p) for name in ("imatrix", "kv_overrides", "tt_overrides", "prune_layers")),
        ("max_buf_size", c.c_size_t),
    ]


def library(folder: Path, name: str) -> c.CDLL:
    for part in ("ggml-base", "ggml-cpu", "ggml"):
        c.CDLL(str(folder / f"lib{part}.so"), mode=c.RTLD_GLOBAL)
    return c.CDLL(str(folder / f"lib{name}.so"))


def columns(path: Path | None) -> dict[str, np.ndarray]:
    if path is None:
        return {}
    arrays = np.load(path)
    return {name.removesuffix("/columns"): arrays[name] for name in arrays.files if name.endswith("/columns")}


def theirs(ggml: c.CDLL, type: GgmlType, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    out = np.zeros(x.size // type.block_values * type.block_bytes, np.uint8)
    size = [c.c_int64(0), c.c_int64(x.shape[0]), c.c_int64(x.shape[1])]
    weights = None if w is None else c.c_void_p(w.ctypes.data)
    ggml.ggml_quantize_chunk(c.c_int(type), c.c_void_p(x.ctypes.data), c.c_void_p(out.ctypes.data), *size, weights)
    return dequantize(out, type).reshape(x.shape)


def errors(given: argparse.Namespace) -> None:
    """Our weighted squared error over ggml's, by type and tensor."""
    ggml, weights, rng = library(given.library, "ggml-base"), columns(given.importance), np.random.default_rng(0)
    tensors = read_checkpoint(given.model).tensors
    for name in ("blk.7.ffn_down.weight", "blk.7.attn_output.weight", "token_embd.weight"):
        x = tensors[name].numpy()[:ROWS]
        x = np.ascontiguousarray(x + rng.normal(0, NOISE * x.std(), x.shape), np.float32)
        for w in (None, weights.get(name)) if weights else (None,):
            ours = np.ones(x.shape[1], np.float32) if w is None else np.ascontiguousarray(w)
            found = []
            for type in (type for type in TYPES if x.shape[1] % type.block_values == 0):
                error = _native.quantize(int(type), x, ours, 1)[1].sum()
                found.append(f"{type.name} {error / np.sum(ours * (x - theirs(ggml, type, x, w)) ** 2):.3f}")
            print(f"{name} {'weighted' if w is not None else 'plain'}: {', '.join(found)}")


def file(given: argparse.Namespace) -> int:
    llama = library(given.library, "llama")
    llama.llama_model_quantize_default_params.restype = Parameters
    llama.llama_model_quantize.argtypes = [c.c_char_p, c.c_char_p, c.POINTER(Parameters)]
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize = given.ftype, True
    kept = {name: np.ascontiguousarray(w, np.float32) for name, w in columns(given.importance).items()}
    entries = [Imatrix(n.encode(), w.ctypes.data_as(c.POINTER(c.c_float)), w.size) for n, w in kept.items()]
    array = (Imatrix * (len(entries) + 1))(*entries)  # ends with an entry without a name
    parameters.imatrix = c.cast(array, c.c_void_p) if entries else None
    return int(llama.llama_model_quantize(bytes(given.model), bytes(given.out), c.byref(parameters)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["errors", "file"])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--importance", type=Path)
    parser.add_argument("--ftype", type=int, default=2)
    given = parser.parse_args()
    if given.what == "file":
        return file(given)
    errors(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
