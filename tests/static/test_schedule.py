"""The timetable of a streaming program: whatever a level reads is there, and not yet overwritten.

Plays the walk of the kernels row by row: a ring holds, in each of its slots, the row that was last written there.
"""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("focalnet.kernels needs triton", allow_module_level=True)

from focalnet.kernels import schedule

KERNELS = [(3,), (3, 5), (3, 5, 7), (5, 7, 9), (3, 5, 7, 9), (11, 13, 15), (15, 1, 3, 9), (1, 1)]
each_kernels = pytest.mark.parametrize("kernels", KERNELS, ids=str)
each_size = pytest.mark.parametrize("rows, height", [(8, 56), (8, 17), (4, 30), (8, 3), (16, 40)])


class Ring:
    def __init__(self, size):
        self.slots = [None] * size

    def write(self, row):
        self.slots[row % len(self.slots)] = row

    def holds(self, row):
        return self.slots[row % len(self.slots)] == row


def rows_at(step, lag, rows, height):
    return [row for row in range(step * rows - lag, (step + 1) * rows - lag) if 0 <= row < height]


def window(row, kernel, height):
    return [r for r in range(row - kernel // 2, row + kernel // 2 + 1) if 0 <= r < height]


@each_size
@each_kernels
def test_forward_levels_find_every_row_they_read(kernels, rows, height):
    plan = schedule.forward(kernels, rows, whole_plane=False)
    rings = [Ring(size) for size in plan.ring[:-1]]
    finished = []
    for step in range(-(-(height + plan.lag[-1]) // rows)):
        for level, kernel in enumerate(kernels):
            due = rows_at(step, plan.lag[level], rows, height)
            for row in due:
                if level > 0:
                    assert all(rings[level - 1].holds(r) for r in window(row, kernel, height))
                if level == len(kernels) - 1:
                    assert all(ring.holds(row) for ring in rings)
                    finished.append(row)
            if level < len(rings):
                for row in due:
                    rings[level].write(row)
    assert finished == list(range(height))


@each_size
@each_kernels
def test_backward_levels_find_every_row_they_read(kernels, rows, height):
    plan = schedule.backward(kernels, rows, whole_plane=False)
    last = len(kernels) - 1
    contexts = [Ring(size) for size in plan.ring[:-1]]
    # One ring holds GELU'(z_l) and then, row by row in the same place, dz_l.
    slopes, gradients = [Ring(size) for size in plan.dz_ring], [Ring(size) for size in plan.dz_ring]
    finished, correlated = [], [[] for _ in kernels]
    for step in range(-(-(height + plan.down_lag[0]) // rows)):
        for level, kernel in enumerate(kernels):
            due = rows_at(step, plan.lag[level], rows, height)
            if level > 0:
                assert all(contexts[level - 1].holds(r) for row in due for r in window(row, kernel, height))
            for row in due:
                if level < last:
                    contexts[level].write(row)
                    slopes[level].write(row)
                    gradients[level].slots[row % len(slopes[level].slots)] = None
                else:
                    gradients[level].write(row)
        for level in reversed(range(len(kernels))):
            for row in rows_at(step, plan.dz_lag[level], rows, height):
                assert gradients[level].holds(row)
                if level > 0:
                    assert all(contexts[level - 1].holds(r) for r in window(row, kernels[level], height))
                correlated[level].append(row)
            for row in rows_at(step, plan.down_lag[level], rows, height):
                assert all(gradients[level].holds(r) for r in window(row, kernels[level], height))
                if level > 0:
                    assert slopes[level - 1].holds(row)
                    slopes[level - 1].slots[row % len(slopes[level - 1].slots)] = None
                    gradients[level - 1].write(row)
                else:
                    finished.append(row)
    assert finished == list(range(height))
    assert all(rows_seen == list(range(height)) for rows_seen in correlated)


@each_kernels
def test_rings_are_no_longer_than_they_must_be(kernels):
    """One row less in any ring, and a level misses what it reads."""
    plan = schedule.forward(kernels, 8, whole_plane=False)
    assert plan.rows_kept(56) == sum(plan.ring)
    for level, size in enumerate(plan.ring[:-1]):
        below = plan.lag[level]
        oldest = max(plan.lag[level + 1] + kernels[level + 1] // 2, plan.lag[-1])
        assert size == 8 + oldest - below
