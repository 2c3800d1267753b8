"""A Hugging Face folder (config.json and safetensors) as a Checkpoint under GGUF's names.

Tensors stay mapped but for two kinds that GGUF stores otherwise: gpt2's matrices, which its Conv1D holds as
(inputs, outputs), and gemma's norm weights, to which its formula adds one. Of matrices that granitemoehybrid and phi3
store as one, each is a part of what is mapped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from millis.models import bert_folder, modernbert_folder, reader_folder, seq2seq_folder
from millis.models.checkpoint import Checkpoint
from millis.models.config import ModelConfig
from millis.models.huggingface_config import huggingface_config
from millis.models.mapped import read_json
from millis.models.parts import folder_parts
from millis.models.safetensors import read_folder_tensors, renamed
from millis.models.tensor import CONVOLUTION, Tensor
from millis.models.tensors_expected import check_tensors
from millis.types import FormatError, ModelError

_MAX_CONFIG_BYTES = 1 << 20

_LLAMA = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_EXAONE4 = _LLAMA | {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GEMMA3 = _EXAONE4 | {"pre_feedforward_layernorm": "ffn_norm"}
_GRANITE = _LLAMA | {"shared_mlp.output_linear": "ffn_down"}  # granitemoehybrid's name
_HUNYUAN = _LLAMA | {"self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"}
_LFM2 = {
    "operator_norm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv",
    "conv.out_proj": "shortconv.out_proj",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}
_GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_NAMES = {
    "gpt2": _GPT2, "gemma3": _GEMMA3, "granite": _GRANITE, "exaone4": _EXAONE4, "hunyuan-dense": _HUNYUAN,
    "olmo2": _EXAONE4, "lfm2": _LFM2,
}  # fmt: skip
_OUTSIDE_LAYERS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.embedding_norm": "token_embd_norm",  # lfm2's last norm
    "embed_tokens": "token_embd",  # of a body alone
    "norm": "output_norm",
    "lm_head": "output",
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
}
_LAYER = re.compile(r"(?:(?:model\.)?layers|h)\.(0|[1-9][0-9]{0,3})\.(.+)\.(weight|bias)")
# Constants that older files carry along, and the parts of a multimodal model that make no text.
_NOT_WEIGHTS = re.compile(
    r"h\.\d+\.attn\.(masked_)?bias|(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    r"|(vision_tower|multi_modal_projector)\..*"
)


def read_folder(path: Path) -> Checkpoint:
    """The model in a folder; ModelError where it is no such folder, FormatError naming what is malformed or unknown."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} holds no config.json; give a Hugging Face folder or a .gguf file")
    try:
        values = read_json(path / "config.json", _MAX_CONFIG_BYTES)
        if bert_folder.is_kin(values):
            return bert_folder.read(path, values)
        if values.get("model_type") == modernbert_folder.TYPE:
            return modernbert_folder.read(path, values)
        if seq2seq_folder.is_kin(values):
            return seq2seq_folder.read(path, values)
        config, tied = huggingface_config(values, path.resolve().name)
        if reader_folder.is_decoder(values):
            config, tied = reader_folder.decoder(config, values, path), True
        elif config.both_ways:
            raise FormatError("a model that looks both ways writes no text; its architectures must be Gemma3TextModel")
        tensors = _renamed(folder_parts(read_folder_tensors(path), config), config)
        if config.both_ways and (dense := reader_folder.dense_of(path, config.hidden)):
            config = replace(config, dense=dense.shape[0])
            tensors[dense.name] = dense
        if tied:
            tensors.pop("output.weight", None)  # a copy of the embedding, if it was stored at all
        elif "output.weight" not in tensors:
            raise FormatError("the tensor 'lm_head.weight' is missing, though config.json does not tie it")
        check_tensors(config, tensors)
    except FormatError as error:
        raise FormatError(f"{path.name}: {error}") from None
    return Checkpoint(path=path, config=config, tensors=tensors)


def _renamed(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    def name_of(theirs: str) -> str | None:
        head = config.head is not None and theirs == "score.weight"
        return "cls.output.weight" if head else gguf_name(theirs, config.architecture)

    return {name: _converted(tensor, config.architecture) for name, tensor in renamed(tensors, name_of).items()}


def gguf_name(name: str, architecture: str) -> str | None:
    """GGUF's name of transformers' weight `name`; None for what is no weight. Raises FormatError if unknown."""
    bare = _without_prefix(name, architecture)
    if _NOT_WEIGHTS.fullmatch(bare):
        return None
    if match := _LAYER.fullmatch(bare):
        layer, part, kind = match.groups()
        names = _NAMES.get(architecture, _LLAMA)
        if part in names:
            return f"blk.{layer}.{names[part]}.{kind}"
    part, _, kind = bare.rpartition(".")
    if part in _OUTSIDE_LAYERS and kind in ("weight", "bias"):
        return f"{_OUTSIDE_LAYERS[part]}.{kind}"
    raise FormatError(f"the tensor {name!r} has no place in a {architecture} model as Millis knows it")


def _without_prefix(name: str, architecture: str) -> str:
    """Without what wraps a gpt2 body or, in either of two orders, gemma3's language half."""
    if architecture == "gpt2":
        return name.removeprefix("transformer.")
    if architecture == "gemma3":
        for prefix, plain in (("model.language_model.", "model."), ("language_model.", ""), ("model.vision", "vision")):
            if name.startswith(prefix):
                return plain + name.removeprefix(prefix)
        return name.replace("model.multi_modal_projector.", "multi_modal_projector.", 1)
    return name


def _converted(tensor: Tensor, architecture: str) -> Tensor:
    """The tensor as GGUF stores it."""
    if architecture == "gpt2" and tensor.name.startswith("blk.") and len(tensor.shape) == 2:
        values = tensor.data.view(f"u{tensor.type.block_bytes}").reshape(tensor.shape)
        data = np.ascontiguousarray(values.T).reshape(-1).view(np.uint8)
        return Tensor(tensor.name, tensor.type, tensor.shape[::-1], data)
    if len(tensor.shape) == 3 and tensor.shape[1] == 1 and tensor.name.endswith(CONVOLUTION):
        return replace(tensor, shape=(tensor.shape[0], tensor.shape[2]))
    if architecture in ("gemma", "gemma3") and tensor.name.endswith("norm.weight"):
        return Tensor.from_numpy(tensor.name, tensor.numpy() + np.float32(1))
    return tensor
