"""The page from training to a server, in frameworks that are extras of tests.

Those that are always there are in tests/test_docs.py.
"""

import importlib.util

import pytest
import scripts

pytestmark = pytest.mark.slow


@pytest.mark.parametrize('framework', ['haiku', 'equinox', 'keras'])
# Theirs: names that Python, JAX and Keras will take away one day.
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_script_leads_from_training_to_serving(
  framework, tmp_path, monkeypatch
):
  if importlib.util.find_spec(framework) is None:
    pytest.skip(f'{framework} is not installed')
  pytest.importorskip('flatbuffers')  # of jax.export's own
  monkeypatch.chdir(tmp_path)
  scripts.assert_leads_from_training_to_serving(framework, tmp_path)
