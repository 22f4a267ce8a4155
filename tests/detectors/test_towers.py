import torch
import torch.nn.functional as F

from kdtoolkit.detectors.towers import flatten, walk_towers

TOWERS = {"cls": [[lambda x: x - 3, lambda x: 2 * x]] * 2, "reg": [[lambda x: -x, lambda x: x + 1]] * 2}
MAPS = torch.tensor([-1.0, 2.0]), torch.tensor([5.0])


def test_states_are_taken_before_the_activation_and_stage_0_has_none():
    states = [*walk_towers(dict.fromkeys(TOWERS, MAPS), TOWERS, activation=F.relu)]
    assert [[x.tolist() for x in state["cls"]] for state in states] == [
        [[-1.0, 2.0], [5.0]],
        [[-4.0, -1.0], [2.0]],
        [[0.0, 0.0], [4.0]],
    ]
    assert [x.tolist() for x in states[-1]["reg"]] == [[2.0, 1.0], [1.0]]


def test_a_walk_from_a_stage_is_the_rest_of_the_walk():
    for activation in (None, F.relu):
        states = [*walk_towers(dict.fromkeys(TOWERS, MAPS), TOWERS, activation=activation)]
        for stage, state in enumerate(states):
            rest = [*walk_towers(state, TOWERS, stage, activation)]
            assert len(rest) == len(states) - stage
            for got, expected in zip(rest, states[stage:], strict=True):
                for branch in TOWERS:
                    assert all(map(torch.equal, got[branch], expected[branch]))


def test_maps_are_laid_out_cell_by_cell_with_all_priors_of_a_cell_together():
    maps = [torch.arange(24.0).view(1, 6, 2, 2), torch.arange(6.0).view(1, 6, 1, 1)]
    flat = flatten(maps, 3)
    assert flat.shape == (1, 10, 3)
    for row, (y, x, prior) in enumerate((y, x, prior) for y in (0, 1) for x in (0, 1) for prior in (0, 1)):
        assert torch.equal(flat[0, row], maps[0][0, 3 * prior : 3 * prior + 3, y, x])
    assert flat[0, 8:].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
