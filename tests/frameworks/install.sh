# Sourced by tests/run.sh: installs the frameworks of the extra of that name,
# one by one and beside what is there, which they may not change. The tests of
# one that does not go with it are skipped.
#
#   install_frameworks FOLDER
install_frameworks() {
  local python=$1/bin/python kept=$1/kept.txt name
  "$python" -m pip list --format=freeze --exclude-editable >"$kept"
  # Without its dependencies, which are TensorFlow and these.
  set -- '--no-deps keras-hub==0.32.0 kagglehub==1.0.2 kagglesdk==0.1.28' \
    'regex tokenizers sentencepiece'
  for name in $("$python" - <<'EOF'
import importlib.metadata as m, re
for line in m.requires('utilized_rank'):
  if re.search(r'extra == .frameworks', line):
    print(line.split(';')[0].strip())
EOF
  ); do
    set -- "$@" "$name"
  done
  for name in "$@"; do
    # shellcheck disable=SC2086  # several arguments
    "$python" -m pip install --quiet --disable-pip-version-check -c "$kept" \
      $name || echo "not tested, does not install here: $name"
  done
}
