#!/usr/bin/env bash
# Makes a virtual environment with PyTorch and transformers and runs what needs
# no more than them: modules measured, compressed and brought back, directories
# of language models read and written. Arguments go to pytest in their place.
#
#   tests/parity/run.sh
#
# PYTHON chooses the interpreter. Where PyTorch does not install within ten
# minutes (its default build for Linux brings CUDA), it says so and ends well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. launch/venv.sh
. tests/xla_quickly.sh
venv=.venv-torch
make_venv "$venv" "${PYTHON:-python3}" -c requirements.txt -e '.[models]' \
  pytest pytest-xdist
if ! timeout 600 "$venv/bin/python" -m pip install -q \
    --disable-pip-version-check -c requirements.txt \
    torch==2.13.0 torchax==0.0.13 transformers==5.24.0; then
  echo 'not tested: PyTorch does not install here'
  exit
fi
if [ $# -eq 0 ]; then
  set -- tests/parity/test_{torch_modules,torch_models,pretrained,language}.py
fi
exec "$venv/bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
