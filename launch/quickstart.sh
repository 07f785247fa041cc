#!/usr/bin/env bash
# Installs the project into .venv and runs its main job: a ViT on handwritten
# digits is trained, measured, cut to 50 % and 25 % of its blocks' parameters,
# fine-tuned and reported on. Three to seven minutes on two CPU cores, and the
# installation before. Arguments go to launch.main:
#
#   launch/quickstart.sh                      # -> runs/digits/report.html
#   launch/quickstart.sh --config.seed=1 --workdir=runs/seed1
#
# PYTHON chooses the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/venv.sh
make_venv .venv "${PYTHON:-python3}" -c requirements.txt \
  -e '.[all]'
exec .venv/bin/python -m launch.main --config=configs/digits_vit.py \
  --workdir=runs/digits "$@"
