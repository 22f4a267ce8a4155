import pytest

from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.workflow import defaults
from kdtoolkit.workflow.defaults import Situation


def situation(**changes):
    about = {
        "images": 150,
        "val_images": 30,
        "longest": 1280,
        "library": "ultralytics",
        "parameters": 2_600_000,
        "begin": "random",
        "device": "cpu",
    }
    return Situation(**about | changes)


def test_image_size_follows_the_teacher_then_the_weights_and_never_enlarges():
    assert defaults.image_size(1280, None, None).value == 640
    assert defaults.image_size(1280, 320, 512).value == 320
    assert defaults.image_size(1280, None, 512).value == 512
    choice = defaults.image_size(400, 640, None)
    assert choice.value == 400
    assert "largest image" in choice.why
    assert defaults.image_size(28, None, None).value == 32  # the least that --image-size takes


def test_few_images_and_random_weights_are_shown_more_often():
    def epochs(**changes):
        return defaults.epochs(situation(**changes)).value

    assert epochs(images=20) == 150
    assert epochs(images=150_000) == 36
    assert epochs(images=200) == 100
    assert epochs(begin="trained") < epochs(begin="started") < epochs(begin="random")
    assert defaults.steps_of(2.5, 10, 8) == 4
    assert defaults.steps_of(2.5, 10, 8, without_labels=0.2) == 5
    assert defaults.steps_of(48, 10, 8, without_labels=0.4) == 100
    assert defaults.epochs_of(100, 80, 8, without_labels=0.2) == 8


def test_trained_weights_take_a_lower_rate_and_larger_batches_a_higher_one():
    def lr(batch=8, **changes):
        return defaults.learning_rate(situation(**changes), batch).value

    assert lr(begin="trained") < lr(begin="started") < lr(parameters=9_000_000) < lr()
    assert lr(batch=32) == pytest.approx(2 * lr())
    assert lr(library="hf", begin="started") < lr(library="hf") < lr()


@pytest.mark.parametrize("library", ["ultralytics", "hf"])
@pytest.mark.parametrize("steps", [1, 30, 400, 100_000])
def test_every_default_is_an_option_of_training(library, steps):
    chosen = defaults.training(situation(library=library, begin="started"), steps, epochs=10)
    config = TrainConfig(steps=steps, **{name: choice.value for name, choice in chosen.items()})
    assert 0 < config.warmup_steps <= max(1, steps // 2)
    assert 0.9 <= config.ema < 1
    assert all(choice.why for choice in chosen.values())


def test_evaluations_cost_little_beside_the_training():
    assert defaults.evaluations(situation(), 30_000).value == 10
    assert defaults.evaluations(situation(val_images=5000), 30_000).value == 1


def test_images_change_more_if_they_are_shown_often():
    short, long = (defaults.training(situation(), 1000, epochs=epochs)["augmentation"] for epochs in (10, 100))
    assert short.value.keys() < long.value.keys()
