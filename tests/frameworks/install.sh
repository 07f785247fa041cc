# Sourced by tests/run.sh: installs the extras `frameworks`, `onnx` and `litert`
# beside what is there, which it may not change. The tests of what does not go
# with it are skipped.
#
#   install_frameworks FOLDER
install_frameworks() {
  local python=$1/bin/python kept=$1/kept.txt names name
  "$python" -m pip list --format=freeze --exclude-editable >"$kept"
  mapfile -t names < <("$python" - <<'EOF'
import importlib.metadata as m, re
for line in m.requires('utilized_rank'):
  if re.search(r'extra == .(frameworks|onnx|litert)\b', line):
    print(line.split(';')[0].strip())
EOF
  )
  add() { "$python" -m pip install -q --disable-pip-version-check -c "$kept" "$@"; }
  if [ ${#names[@]} -eq 0 ]; then
    echo 'not tested: the installed package does not know its extra frameworks'
    return
  fi
  # One that does not install keeps no other one out.
  if ! add "${names[@]}"; then
    for name in "${names[@]}"; do
      add "$name" || echo "not tested, does not install here: $name"
    done
  fi
  # With these alone: its other dependency is TensorFlow.
  add regex sentencepiece tokenizers &&
    add --no-deps keras-hub==0.32.0 kagglehub==1.0.2 kagglesdk==0.1.28 ||
    echo 'not tested, does not install here: keras-hub'
  # Both ask for older releases of what is here (orbax-checkpoint,
  # typing_extensions), which converting a function does not use.
  add --no-deps jax2onnx==0.17.1 ||
    echo 'not tested, does not install here: jax2onnx'
  add --no-deps litert-converter==0.5.0 ||
    echo 'not tested, does not install here: litert-converter'
  # Its blocks are Flax alone; what else it wants brings TensorFlow too, and in
  # the releases after this one the blocks want it.
  add --no-deps gemma==3.0.2 || echo 'not tested, does not install here: gemma'
}
