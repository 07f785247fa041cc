"""Model types of transformers load as they are, or are refused.

The cases are those of the table in `docs/checkpoints.md`. Prints each
difference (`-s`).
"""

import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

import hf_types  # noqa: E402

from utilized_rank.models.importing import open_checkpoint  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')

KNOWN = {t for x in open_checkpoint.LAYOUTS for t in x.model_types}


@pytest.mark.parametrize(
  'case', hf_types.CASES, ids=lambda case: case.model_type
)
def test_it_loads_as_it_is_or_is_refused(case, tmp_path):
  folders = [tmp_path / name for name in ('saved', 'alone')]
  for folder in folders:
    folder.mkdir()
  (difference, why), (bare, unsaid) = hf_types.becomes(case, *folders)
  if case.model_type in KNOWN:
    print(f'transformers {case.model_type}: {difference:.1e}')
    assert difference < hf_types.BAR, why
  else:
    assert f"model_type '{case.model_type}', which is not known" in why
  # Of none do names and shapes say all that changes the output.
  assert bare is None and unsaid


def test_every_type_that_loads_is_compared():
  assert len(hf_types.CASES) == len({c.model_type for c in hf_types.CASES})
  assert {c.model_type for c in hf_types.CASES} >= KNOWN
