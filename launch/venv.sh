# Sourced by the scripts: makes a virtual environment and installs the project.
#
#   make_venv FOLDER PYTHON PIP_ARGUMENTS...
#
# Needs Python and pip only: where Python has no venv (Debian splits it off),
# virtualenv is installed for the job.
make_venv() {
  local folder=$1 python=$2
  shift 2
  if [ ! -x "$folder/bin/python" ]; then
    echo "making $folder with $("$python" --version)"
    if ! "$python" -m venv "$folder" 2>/dev/null; then
      rm -rf "$folder"
      "$python" -m pip install --quiet --target "$folder.tool" virtualenv
      PYTHONPATH="$folder.tool" "$python" -m virtualenv --quiet "$folder"
      rm -rf "$folder.tool"
    fi
  fi
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}
