"""Names of leaves, and rules over them."""

import numpy as np
import pytest

from utilized_rank.tree import paths


def test_round_trip():
  tree = {'b': [1, {'a': 2}], 'a': (3,)}
  named, treedef = paths.flatten(tree)
  assert named == {'a/0': 3, 'b/0': 1, 'b/1/a': 2}
  assert paths.unflatten(treedef, named) == tree


def test_two_leaves_of_one_name():
  with pytest.raises(ValueError, match="path 'a/b'"):
    paths.flatten({'a': {'b': 1}, 'a/b': 2})


def test_the_first_rule_that_matches_wins():
  names = ['a/kernel', 'a/bias', 'head/kernel']
  rules = [('head/.*', False), ('.*/kernel', True)]
  assert paths.select(names, rules) == dict(zip(names, (True, False, False)))


@pytest.mark.parametrize(
  'rules, message',
  [
    ([('kernel', True)], "'kernel' matched no leaf"),
    ([('.*', True), ('a/.*', False)], "'a/.*' matched no leaf"),
    ([('(', True)], 'not a \\(regex, bool\\) pair'),
    ([('a',)], 'not a \\(regex, bool\\) pair'),
    ([None], 'not a \\(regex, bool\\) pair'),
    ([(np.ones(2), True)], 'not a \\(regex, bool\\) pair'),
  ],
)
def test_rules_that_mean_nothing(rules, message):
  with pytest.raises(ValueError, match=message):
    paths.select(['a/kernel', 'b/kernel'], rules)


def test_unknown_paths():
  assert 'did you mean' in paths.unknown('a/kernal', ['a/kernel'])
  assert 'known' in paths.unknown('zzz', ['a/kernel'])


@pytest.mark.parametrize('rules', [['.*kernel'], '.*kernel', ('ab', True)])
def test_rules_that_are_strings(rules):
  with pytest.raises(ValueError, match=r'is a string: rules are a list of'):
    paths.select(['a/kernel'], rules)
