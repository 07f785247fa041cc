#!/usr/bin/env bash
# Makes a virtual environment, installs the project with its test tools, and
# runs the tests; in the reference environment lint, types and the site of docs/
# before. Arguments go to pytest.
#
#   tests/run.sh                     # the pinned reference environment
#   tests/run.sh --quick             # what a change touches, a test a room
#   LATEST=1 PYTHON=python3.12 tests/run.sh -k walk    # the newest releases
#
# PYTHON chooses the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/venv.sh
quick=
case " $* " in *' --quick '* | *' -m quick '*) quick=1 ;; esac
if [ -n "${LATEST:-}" ]; then
  venv=.venv-latest
  make_venv "$venv" "${PYTHON:-python3}" --upgrade -e '.[test]'
  . tests/frameworks/install.sh
  install_frameworks "$venv"
else
  venv=.venv-test
  # A quick run takes the environment as it is, once there is one.
  if [ -z "$quick" ] || [ ! -x "$venv/bin/pytest" ]; then
    make_venv "$venv" "${PYTHON:-python3}" -c requirements.txt -e '.[test]'
  fi
fi
"$venv/bin/python" - <<'EOF'
import importlib.metadata as m, platform
names = 'jax jaxlib flax optax orbax-checkpoint numpy'.split()
print('python', platform.python_version(),
      *(f'{n} {m.version(n)}' for n in names))
EOF
if [ -z "${LATEST:-}" ]; then  # tools and stubs are those that were pinned
  "$venv/bin/ruff" check .
  "$venv/bin/ruff" format --check .
  "$venv/bin/mypy" utilized_rank configs launch benchmarks
  if [ -z "$quick" ]; then
    NO_MKDOCS_2_WARNING=1 "$venv/bin/mkdocs" build --strict --quiet
  fi
fi
case " $* " in
  *' --quick '*) [ -n "${XLA_FLAGS:-}" ] || . tests/xla_quickly.sh ;;
esac
# Compiling holds one core for long: files side by side take half of the time.
exec "$venv/bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
