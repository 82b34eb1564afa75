"""Which versions the package asks for, was run with, and says so."""

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.command import ROOT

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
EXTRAS = PROJECT['optional-dependencies']
LINES = (ROOT / 'constraints.txt').read_text().splitlines()
PINNED = dict(line.split('==') for line in LINES)


def _bounds(lines):
  """{name: versions} of requirements as pip reads them."""
  requirements = [Requirement(line.partition('#')[0]) for line in lines]
  return {canonicalize_name(r.name): r.specifier for r in requirements}


def test_constraints_are_names_and_exact_versions_alone():
  for line in LINES:
    assert re.fullmatch(r'[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*', line), line
  names = [canonicalize_name(name) for name in PINNED]
  assert len(set(names)) == len(LINES)
  assert 'flax-imdb' not in names


def test_constraints_name_what_is_asked_for_within_its_bounds():
  pinned = {canonicalize_name(k): v for k, v in PINNED.items()}
  asked = _bounds([*PROJECT['dependencies'], *(
      line for extra in ('gcs', 'report', 'keras', 'test')
      for line in EXTRAS[extra])])
  del asked['flax-imdb']
  for name, bounds in asked.items():
    assert bounds.contains(pinned[name]), name


def test_the_jax_that_sums_wrongly_is_refused():
  bounds = _bounds(PROJECT['dependencies'])['jax']
  versions = ('0.10.0', '0.10.1', '0.10.2', '0.11.2', '0.12.0.1', '0.13.0')
  assert [v for v in versions if bounds.contains(v)] == [
      '0.10.1', '0.11.2', '0.12.0.1']


def test_the_example_has_the_bounds_of_the_package():
  lines = (ROOT / 'examples' / 'requirements.txt').read_text().splitlines()
  package = _bounds(PROJECT['dependencies'])
  for name, bounds in _bounds(lines).items():
    assert bounds == package[name], name


def test_the_docs_name_the_versions_of_jax_that_were_run():
  page = ' '.join((ROOT / 'docs' / 'installing.md').read_text().split())
  oldest = next(bound.version for bound in _bounds(
      PROJECT['dependencies'])['jax'] if bound.operator == '>=')
  assert f'jax {oldest}' in page
  assert f'jax {PINNED["jax"]}' in page
