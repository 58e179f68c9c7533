#!/usr/bin/env bash
# Guess: default_rng([seed, k]) gives a stream of its own for each k, none of which is that of the
#        bare seed.
# So:    zeros at the end count for nothing: [seed], [seed, 0] and [seed, 0, 0] are the stream of
#        default_rng(seed), while RandomState(5) and RandomState([5]) differ.
# Here:  shuffling by default_rng(seed) and augmenting part 0 by default_rng([seed, 0]) draws the
#        same numbers twice. [k, seed] with k from 1, or SeedSequence.spawn, keeps them apart.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6
cd "$work"
venv/bin/python - <<'PYTHON'
import numpy as np

keys = (5, [5], [5, 0], [5, 0, 0], [0, 5], [5, 1])
draws = [np.random.default_rng(key).random() for key in keys]
spawned = np.random.default_rng(np.random.SeedSequence(5).spawn(1)[0]).random()
old = [np.random.RandomState(key).random_sample() for key in (5, [5])]
print("numpy", np.__version__)
for key, draw in zip(keys, draws):
    print(f"default_rng({key}) begins with {draw:.6f}")
print(f"the first one spawned by 5 begins with {spawned:.6f}")
print(f"RandomState(5) begins with {old[0]:.6f}, RandomState([5]) with {old[1]:.6f}")
assert len(set(draws[:4])) == 1, "zeros at the end count now"
assert len({*draws[3:], spawned}) == 4, "other keys changed"
assert old[0] != old[1], "RandomState changed"
PYTHON
