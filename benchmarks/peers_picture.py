"""The ratios of peers.py's tables as a picture.

python benchmarks/peers_picture.py peers.json peers.png
"""

import json
import pathlib
import sys
from typing import Any

TABLES = {
    'step': 'a padded step', 'epoch': 'an epoch', 'evaluate': 'evaluation',
    'startup_cold': 'first step, nothing compiled',
    'startup_warm': 'first step, compiled before',
    'time_to_0.87': 'to 0.87, nothing compiled'}
NAMES = {'flax_imdb': 'flax_imdb', 'keras_jax': 'Keras JAX',
         'keras_tensorflow': 'Keras TensorFlow', 'torch': 'PyTorch'}
COLOURS = {'flax_imdb': '#0b6e4f', 'keras_jax': '#c1666b',
           'keras_tensorflow': '#d4a24c', 'torch': '#48639c'}


def fastest(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """The row of each system with the smallest ratio of time, if it has one."""
  return {name: min((row for row in rows if row['system'] == name),
                    key=lambda row: row['ratio'] or float('inf'))
          for name in NAMES if any(row['system'] == name for row in rows)}


def draw(results: dict[str, Any], path: str) -> None:
  """Draws a row of bars a table: time / our time, of each system's fastest way.

  Args:
    results: what peers.py writes as JSON.
    path: a file of a kind that matplotlib writes.
  """
  import matplotlib.pyplot as plt
  shown = [name for name in TABLES if name in results]
  figure, axes = plt.subplots(
      len(shown), 1, figsize=(7, 1.15 * len(shown)), layout='constrained',
      squeeze=False, sharex=True)
  for axis, name in zip(axes[:, 0], shown, strict=True):
    best = fastest(results[name]['rows'])
    ratios = [row['ratio'] or 0 for row in best.values()]  # 0: never reached
    bars = axis.barh([NAMES[system] for system in best], ratios,
                     color=[COLOURS[system] for system in best])
    axis.bar_label(bars, [f'{ratio:.2f}' if ratio else 'never'
                          for ratio in ratios], padding=3, fontsize=8)
    axis.axvline(1, color='#0b6e4f', linewidth=0.8, zorder=0)
    axis.margins(x=0.08)
    axis.invert_yaxis()
    axis.set_title(TABLES[name], loc='left', fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[['top', 'right']].set_visible(False)
  axes[-1, 0].set_xlabel(
      'time / our time, median over rounds; shorter is faster', fontsize=8)
  figure.savefig(path, dpi=150)


if __name__ == '__main__':
  draw(json.loads(pathlib.Path(sys.argv[1]).read_text()), sys.argv[2])
