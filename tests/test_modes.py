import pytest
from torch import nn

from kdtoolkit.modes import in_eval_mode, modes_kept


def test_each_module_has_its_own_mode_again_also_after_an_error():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)), nn.Dropout())
    model[1].eval()
    modes = [module.training for module in model.modules()]
    with in_eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ZeroDivisionError), in_eval_mode(model):
        _ = 1 / 0
    assert [module.training for module in model.modules()] == modes


def test_modes_of_several_modules_are_kept_whatever_the_block_does():
    one, other = nn.Sequential(nn.Dropout(), nn.Dropout()), nn.Dropout().eval()
    one[1].eval()
    with modes_kept(one, other):
        one.train()
        other.train()
    assert [module.training for module in (one, *one, other)] == [True, True, False, False]
